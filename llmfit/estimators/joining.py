"""Fits that stand before their training, trained side by side where they can be, one at a time where not.

Takes estimators and the rows of one fit of them all; gives each of them fitted, or the error that its fit has raised.
What can be is plain LoRA of any rank, scale, dropout, rate and seed on one base model; nothing has to be asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmfit.adapters import resolve_adapter
from llmfit.adapters.bank import Bank, BankError, Start, can_start, start_of
from llmfit.base_model import BaseModel
from llmfit.callbacks import Progress, State
from llmfit.checkpoints import Pause
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.fitting import Fitted, Job, history_of, with_batch_size
from llmfit.exceptions import LLMFitError, OutOfMemoryError
from llmfit.forward import packable
from llmfit.memory import enough
from llmfit.packing import common_prefix
from llmfit.together import Fit, can_read_beside, train_together

__all__ = ["Outcome", "can_join", "can_pause", "fit_together"]

LOW = "torch.float16"  # whose fits are refused, by the fit itself


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
    waiting: list[_Waiting] = []
    for outcome, pause in zip(outcomes, pauses or [None] * len(outcomes), strict=True):
        given = {"sample_weight": None, "eval_set": None, **params}
        own = _Waiting(outcome, outcome.estimator._fitting(X, y, given["sample_weight"], given["eval_set"]))
        with _timed([own]):
            own.begin(pause)
        waiting += [own] if outcome.error is None else []
    for crew in _crews(waiting):
        with _timed(crew):
            found = _train(crew) if len(crew) > 1 else [None]
        for own, fitted in zip(crew, found, strict=True):
            with _timed([own]):
                own.end(fitted)
    return outcomes


class _Waiting:
    """A fit that stands where its training begins."""

    def __init__(self, outcome: Outcome, fitting: Generator[Job, Fitted, Any]) -> None:
        self.outcome, self.fitting = outcome, fitting

    def begin(self, pause: Pause | None) -> None:
        try:
            self.job = replace(next(self.fitting), pause=pause)
        except Exception as error:  # of any kind: the search that asked for the fit deals with it
            self.outcome.error = error

    def end(self, fitted: Fitted | Exception | None) -> None:
        """Go on with what was trained; train alone where nothing was."""
        try:
            if isinstance(fitted, Exception):
                raise fitted
            self.fitting.send(fitted or self.job.train())
        except StopIteration:
            pass
        except Exception as error:
            self.outcome.error = error


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
    """Part fits into those that train at once: as many, on one base model, as fill a forward pass."""
    crews: list[list[_Waiting]] = []
    by_base: dict[int, list[_Waiting]] = {}
    for own in waiting:
        if _is_plain(own.job):
            by_base.setdefault(id(own.job.base), []).append(own)
        else:
            crews.append([own])
    for group in by_base.values():
        most = max(1, min(_room(own.job) for own in group))
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        crews += [group[i : i + size] for i in range(0, len(group), size)]
    return crews


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


def _room(job: Job) -> int:
    """Count the steps of this size that the token budget of a pass holds."""
    settings = with_batch_size(job.checked, len(job.rows)).settings
    rows_a_step = min(settings.batch_size, len(job.rows))
    shared = common_prefix([row.prompt for row in job.rows])  # stands in a pass once
    own = sum(row.length - shared for row in job.rows) / len(job.rows)
    return int(enough(settings.batch_tokens, job.base.device) / (shared + rows_a_step * own))


# Training ---------------------------------------------------------------------------------------------


def _train(crew: Sequence[_Waiting]) -> list[Fitted | Exception | None]:
    """Train the fits of a crew; None for those that have to train alone."""
    found: dict[int, Fitted | Exception] = {}
    begun = {i: begin for i, own in enumerate(crew) if (begin := _begin(own.job)) is not None}
    if len(begun) > 1:
        jobs = [crew[i].job for i in begun]
        try:
            found = dict(zip(begun, _beside(jobs, list(begun.values())), strict=False))
        except (BankError, OutOfMemoryError):
            found = {}
    return [found.get(i) for i in range(len(crew))]


def _begin(job: Job) -> tuple[Start, Fit] | None:
    """Put a fit's adapter in as it would itself, and take what it begins with."""
    checked, base = with_batch_size(job.checked, len(job.rows)), job.base
    spec: Any = checked.adapter
    longest = max(row.length for row in job.rows)
    try:
        with base.attach(spec, seed=checked.seed, training=True, longest=longest) as model:
            start = start_of(spec, model)
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
