"""Fits that stand before their training, trained side by side where they can be, one at a time where not.

Takes estimators and the rows of one fit of them all; gives each of them fitted, or the error that its fit has raised.
What can be is plain LoRA of any rank, scale, dropout, rate and seed on the same layers of one base model; nothing has
to be asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmfit.adapters import resolve_adapter
from llmfit.adapters.bank import Bank, Start, can_start, start_of
from llmfit.base_model import BaseModel
from llmfit.callbacks import Progress, State
from llmfit.checkpoints import Pause
from llmfit.encoding import Encoded
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.fitting import Fitted, Job, history_of, with_batch_size
from llmfit.exceptions import LLMFitError, MemoryWarning, PackingWarning, reason, warn
from llmfit.forward import packable
from llmfit.memory import bare, enough, free, once_more, runs_out
from llmfit.packing import by_beginning, common_prefix
from llmfit.together import Fit, can_read_beside, train_together

__all__ = ["Outcome", "can_join", "can_pause", "fit_together"]

LOW = "torch.float16"  # whose fits are refused, by the fit itself
PLACES = ("target_modules", "exclude_modules", "layers_to_transform")  # settings of LoRA


@dataclass
class Outcome:
    """Of one estimator.

    Attributes
    ----------
    estimator : estimator
        Fitted, unless there is an error.
    seconds : float
        Its own, and its share of what was done together.
    error : Exception or None
        What its fit has raised.
    """

    estimator: Any
    seconds: float = 0.0
    error: Exception | None = None


def can_pause(estimator: Any) -> bool:
    """Tell an estimator whose class leaves `fit` as it is here, so that it can stand before its training."""
    from llmfit.estimators.auto import LLMEstimator

    return isinstance(estimator, BaseLLM) and type(estimator).fit in (BaseLLM.fit, LLMEstimator.fit)


def can_join(estimator: Any) -> bool:
    """Tell an estimator of plain LoRA that can stand before its training."""
    if not can_pause(estimator):
        return False
    try:
        return can_start(resolve_adapter(estimator.adapter))
    except LLMFitError:  # which its fit will raise, and say
        return False


def fit_together(
    estimators: Sequence[Any],
    X: Any,
    y: Any,
    params: Mapping[str, Any],
    pauses: Sequence[Pause | None] | None = None,
) -> list[Outcome]:
    """Fit estimators, none of which is fitted yet, on the same rows.

    Parameters
    ----------
    estimators : sequence of estimator, length n
        Each of a kind that :func:`can_pause`.
    X, y, params
        As for their `fit`.
    pauses : sequence of Pause or None, length n, or None
        Where each goes on from, and how far.

    Returns
    -------
    list of Outcome, length n
    """
    outcomes = [Outcome(estimator) for estimator in estimators]
    each = zip(outcomes, pauses or [None] * len(outcomes), strict=True)
    by_base: dict[str, list[tuple[Outcome, Pause | None]]] = {}
    for outcome, pause in each:
        by_base.setdefault(_base_of(outcome.estimator), []).append((outcome, pause))
    for group in by_base.values():
        _fit_group(group, X, y, {"sample_weight": None, "eval_set": None, **params})
    return outcomes


def _base_of(estimator: Any) -> str:
    """Name what decides which base model is lent: those of one name are begun while it is in memory."""
    return repr([getattr(estimator, name, None) for name in ("base_model", "device", "dtype", "quantization")])


def _fit_group(group: Sequence[tuple[Outcome, Pause | None]], X: Any, y: Any, params: Mapping[str, Any]) -> None:
    """Fit estimators on one base model."""
    waiting: list[_Waiting] = []
    alike: dict[Encoded, Encoded] = {}  # rows of several fits are the same more often than not
    for outcome, pause in group:
        own = _Waiting(outcome, outcome.estimator._fitting(X, y, params["sample_weight"], params["eval_set"]))
        with _timed([own]):
            own.begin(pause, alike)
        waiting += [own] if outcome.error is None else []
    del alike
    crews = _crews(waiting)
    del waiting
    while crews:
        crew = crews.pop(0)
        with _timed(crew):
            found = _train(crew) if len(crew) > 1 else [None]
        for own, fitted in zip(crew, found, strict=True):
            with _timed([own]):
                own.end(fitted)


class _Waiting:
    """A fit that stands where its training begins."""

    def __init__(self, outcome: Outcome, fitting: Generator[Job, Fitted, Any]) -> None:
        self.outcome, self.fitting = outcome, fitting

    def begin(self, pause: Pause | None, alike: dict[Encoded, Encoded]) -> None:
        try:
            job = next(self.fitting)
            self.job = replace(job, rows=[alike.setdefault(row, row) for row in job.rows], pause=pause)
        except Exception as error:  # of any kind: the search that asked for the fit deals with it
            self.outcome.error = bare(error)  # whose frames hold the rows

    def end(self, fitted: Fitted | Exception | None) -> None:
        """Go on with what was trained; train alone where nothing was."""
        try:
            if isinstance(fitted, Exception):
                raise fitted
            trained = fitted or self.job.train()
            with suppress(StopIteration):  # the end of the fit
                self.fitting.send(trained)
        except Exception as error:
            self.outcome.error = bare(error)


class _timed:  # noqa: N801 - reads as the statement that it is
    """Share the time that a block takes out to its fits."""

    def __init__(self, fits: Sequence[_Waiting]) -> None:
        self.fits = fits

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        seconds = (time.perf_counter() - self.started) / len(self.fits)
        for own in self.fits:
            own.outcome.seconds += seconds


# Who trains with whom ---------------------------------------------------------------------------------


def _crews(waiting: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """Part fits into those that train at once: as many, with the same settings of layers, as fill a pass."""
    crews: list[list[_Waiting]] = []
    alike: dict[tuple[int, str], list[_Waiting]] = {}
    for own in waiting:
        if _is_plain(own.job):
            alike.setdefault((id(own.job.base), _changed_by(own.job)), []).append(own)
        else:
            crews.append([own])
    for group in alike.values():
        crews += _fill([(own, *_share(own.job)) for own in group])
    return crews


def _fill(group: Sequence[tuple[_Waiting, float, int]]) -> list[list[_Waiting]]:
    """Part fits, each with the tokens of a step and those that a pass takes, into crews of like size."""
    crews = [[own] for own, tokens, most in group if tokens > most]
    rest = [(own, tokens, most) for own, tokens, most in group if tokens <= most]
    if not rest:
        return crews
    total, most = sum(tokens for _, tokens, _ in rest), min(most for *_, most in rest)
    crew: list[_Waiting] = []
    share, filled = total / math.ceil(total / most), 0.0
    for own, tokens, _ in rest:
        if crew and filled + tokens > max(share, 1.01 * tokens):
            crews.append(crew)
            crew, filled = [], 0.0
        crew.append(own)
        filled += tokens
    return [*crews, crew]


def _is_plain(job: Job) -> bool:
    """Tell a fit that is no more than rows, LoRA and steps."""
    checked, base = job.checked, job.base
    more = [checked.head, checked.early_stopping, checked.start, job.before, job.checkpoint_dir, base.quantization]
    return (
        can_start(checked.adapter)
        and all(part is None for part in more)
        and not (checked.callbacks or job.validation or checked.gradient_checkpointing)
        and base.kind == "decoder"
        and not base.has_dropout
        and str(base.dtype) != LOW
        and bool(job.rows)
    )


def _changed_by(job: Job) -> str:
    """Name what decides which layers an adapter changes: others would sum up their gradients in another order."""
    settings = job.checked.adapter.settings()  # type: ignore[union-attr]
    chosen = [settings.get(name) for name in PLACES]
    every = [sorted({*one}) if isinstance(one, list) else [one] if isinstance(one, int) else one for one in chosen]
    return repr([*every, settings.get("layers_pattern")])


def _share(job: Job) -> tuple[float, int]:
    """Count the tokens of a step, and those that are worth to be brought together in a pass."""
    settings = with_batch_size(job.checked, len(job.rows)).settings
    rows_a_step = min(settings.batch_size, len(job.rows))
    prompts, most = [row.prompt for row in job.rows], enough(settings.batch_tokens, job.base.device)
    positions, shared = max(by_beginning(prompts, common_prefix(prompts), most), key=lambda part: len(part[0]))
    own = sum(job.rows[i].length - shared for i in positions) / len(positions)
    return shared + rows_a_step * own, most  # what most rows share stands in a pass once


# Training ---------------------------------------------------------------------------------------------


def _train(crew: Sequence[_Waiting]) -> list[Fitted | Exception | None]:
    """Train the fits of a crew, in halves where memory does not hold all; None for those that have to train alone."""
    found = _at_once(crew)
    if found is not None:
        return found
    free()  # nothing of what was begun is in reach any more
    half = len(crew) // 2
    return [one for part in (crew[:half], crew[half:]) for one in (_train(part) if len(part) > 1 else [None])]


def _at_once(crew: Sequence[_Waiting]) -> list[Fitted | Exception | None] | None:
    """Train the fits of a crew; None where memory does not hold them all."""
    found: dict[int, Fitted | Exception] = {}
    try:
        begun = {i: begin for i, own in enumerate(crew) if (begin := _begin(own.job)) is not None}
        if len(begun) > 1:
            jobs = [crew[i].job for i in begun]
            found = dict(zip(begun, _beside(jobs, list(begun.values())), strict=False))
    except Exception as error:  # each of them says alone what is wrong with it, if anything is
        if runs_out(error):
            bare(error)
            sentence = f"Memory does not hold {len(crew)} candidates side by side: going on with fewer at once."
            warn(MemoryWarning(sentence))
            return None
        warn(PackingWarning(f"Candidates cannot train side by side ({reason(error)}): they are trained one by one."))
    return [found.get(i) for i in range(len(crew))]


def _begin(job: Job) -> tuple[Start, Fit] | None:
    """Put a fit's adapter in as it would itself, and take what it begins with."""
    checked, base = with_batch_size(job.checked, len(job.rows)), job.base
    spec: Any = checked.adapter
    longest = max(row.length for row in job.rows)
    try:
        with base.attach(spec, seed=checked.seed, training=True, longest=longest) as model:
            start = once_more(partial(start_of, spec, model))
            shared = packable(model, job.rows, pad_id=base.pad_id, device=base.device) if start else None
    except LLMFitError:  # which the fit alone will raise, and say
        return None
    return (
        None if start is None or shared is None else (start, Fit(job.rows, checked.settings, spec, shared, job.pause))
    )


def _beside(jobs: Sequence[Job], begun: Sequence[tuple[Start, Fit]]) -> list[Fitted | Exception]:
    base: BaseModel = jobs[0].base
    starts, fits = [start for start, _ in begun], [fit for _, fit in begun]
    bank = Bank(starts)
    where = {"device": base.device, "pad_id": base.pad_id}
    longest = max(row.length for fit in fits for row in fit.rows)
    with base.attach(bank, training=True, longest=longest) as model:
        if not can_read_beside(model, bank, fits, **where):  # type: ignore[arg-type]
            return []
        label = next((job.label for job in jobs if job.label), "")
        bar = [Progress(f"{label}, {len(jobs)} side by side")] if label else []
        states = train_together(model, bank, fits, callbacks=bar, **where)  # type: ignore[arg-type]
    return [_fitted(fit, start, state) for fit, start, state in zip(fits, starts, states, strict=True)]


def _fitted(fit: Fit, start: Start, state: State | Exception) -> Fitted | Exception:
    if isinstance(state, Exception):
        return state
    return Fitted(fit.adapter, fit.settings, start.tensors(), start.trainable, history_of(state))
