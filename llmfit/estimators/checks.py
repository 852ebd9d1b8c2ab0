"""The parameters of an estimator, resolved and checked: the first thing that `fit` does.

Takes an estimator; gives a :class:`Checked` or one ParameterError. Loads nothing.
"""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfit.adapters import AdapterSpec, adapter_start, resolve_adapter
from llmfit.callbacks import Callback, EarlyStopping, resolve_callbacks, resolve_early_stopping
from llmfit.exceptions import ParameterError, check_choice, check_int, check_number, parameter_error
from llmfit.heads import LinearHead, check_use, resolve_head
from llmfit.optim import SCHEDULES, resolve_optimizer
from llmfit.quantization import check_quantizable, resolve_quantization
from llmfit.templates import TemplateConfig, resolve_template
from llmfit.training import Settings

__all__ = ["Checked", "check_parameters"]


@dataclass(frozen=True)
class Checked:
    """Parameters with every shorthand spelled out."""

    adapter: AdapterSpec | None
    template: TemplateConfig
    settings: Settings
    early_stopping: EarlyStopping | None
    callbacks: list[Callback]
    seed: int
    gradient_checkpointing: bool = False
    head: LinearHead | None = None
    outputs: int = 0  # of the head, once the target is known
    start: Path | None = None  # a PEFT folder whose weights the adapter begins from

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: without adapter and head, the base model answers in words as it is."""
        return self.adapter is not None or self.head is not None


def check_parameters(estimator: Any, *, validated: bool = False) -> Checked:
    """Resolve and check what all estimators share.

    Parameters
    ----------
    estimator : BaseLLM
    validated : bool
        `fit` was given an eval_set.

    Raises
    ------
    ParameterError
        For the first parameter that cannot be used.
    """
    owner = type(estimator).__name__
    head = resolve_head(estimator._wanted_head(), owner, estimator._heads)
    _check_numbers(estimator, owner)
    check_choice("truncation", owner, estimator.truncation, ["error", "prompt"])
    check_choice("schedule", owner, estimator.schedule, list(SCHEDULES))
    check_choice("warm_start", owner, estimator.warm_start, [True, False])
    resolve_optimizer(estimator.optimizer)
    adapter = resolve_adapter(estimator.adapter)
    check_quantizable(adapter, resolve_quantization(estimator.quantization))
    _check_recomputable(estimator, adapter, head, owner)
    check_use(head, adapter)
    stopping = resolve_early_stopping(estimator.early_stopping)
    if stopping is not None and not (estimator.validation_fraction or validated):
        raise ParameterError("early_stopping needs validation_fraction > 0, or an eval_set passed to fit.")
    seed = _draw_seed(estimator, owner)
    return Checked(
        adapter=adapter,
        template=resolve_template(estimator.template),
        settings=_settings(estimator, adapter or head, stopping, seed),
        early_stopping=stopping,
        callbacks=resolve_callbacks(estimator.callbacks),
        seed=seed,
        gradient_checkpointing=estimator.gradient_checkpointing,
        head=head,
        start=adapter_start(estimator.adapter),
    )


def _check_recomputable(estimator: Any, adapter: AdapterSpec | None, head: LinearHead | None, owner: str) -> None:
    check_choice("gradient_checkpointing", owner, estimator.gradient_checkpointing, [True, False])
    if estimator.gradient_checkpointing and adapter is not None and not adapter.recomputable:
        raise ParameterError(
            f"The 'gradient_checkpointing' parameter of {owner} must be False with adapter={adapter.type!r}, whose "
            "vectors the layers would lose when they are computed again."
        )
    if estimator.gradient_checkpointing and adapter is None and head is not None:
        raise ParameterError(
            "The 'gradient_checkpointing' parameter has no meaning with a linear head alone, for which no layer of the "
            "base model is trained. Set gradient_checkpointing=False, or an adapter."
        )


def _check_numbers(estimator: Any, owner: str) -> None:
    check_int("epochs", owner, estimator.epochs, least=1)
    if not isinstance(estimator.verbose, bool):
        check_int("verbose", owner, estimator.verbose, least=0)
    if not _is_auto(estimator.learning_rate):
        check_number("learning_rate", owner, estimator.learning_rate, least=0, open_ends=True, other="'auto' or ")
    for name in ("batch_size", "batch_tokens"):
        if not _is_auto(getattr(estimator, name)):
            check_int(name, owner, getattr(estimator, name), least=1, other="'auto' or ")
    if estimator.max_length is not None:
        check_int("max_length", owner, estimator.max_length, least=2)
    if estimator.max_grad_norm is not None:
        check_number("max_grad_norm", owner, estimator.max_grad_norm, least=0, open_ends=True)
    check_number("warmup", owner, estimator.warmup, least=0)
    check_number("weight_decay", owner, estimator.weight_decay, least=0)
    fraction = check_number("validation_fraction", owner, estimator.validation_fraction, least=0, most=1)
    if fraction == 1:
        raise parameter_error("validation_fraction", owner, "a number >= 0 and < 1", fraction)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _draw_seed(estimator: Any, owner: str) -> int:
    """Draw the seed of a fit from `random_state`, as scikit-learn does."""
    from sklearn.utils import check_random_state

    given, folder = estimator.random_state, estimator.checkpoint_dir
    if not (folder is None or isinstance(folder, str | os.PathLike)):
        raise parameter_error("checkpoint_dir", owner, "None or a path", folder)
    if folder is not None and not isinstance(given, numbers.Integral):
        raise ParameterError(
            f"The 'checkpoint_dir' parameter of {owner} needs random_state to be an int, so that a fit which is "
            f"started again is the same fit. Got {given!r} instead."
        )
    try:
        return int(check_random_state(given).randint(2**31 - 1))
    except ValueError as error:
        raise ParameterError(f"The 'random_state' parameter of {owner} cannot be used: {error}") from error


def _settings(estimator: Any, trained: Any, stopping: EarlyStopping | None, seed: int) -> Settings:
    """Resolve how to train; `trained` is the adapter, the head where there is none, or None."""
    rate = estimator.learning_rate
    if rate == "auto":
        rate = trained.learning_rate if trained else 0.0
    return Settings(
        epochs=int(estimator.epochs),
        batch_size=estimator.batch_size,
        batch_tokens=estimator.batch_tokens,
        learning_rate=float(rate),
        weight_decay=float(estimator.weight_decay),
        warmup=float(estimator.warmup),
        schedule=estimator.schedule,
        optimizer=estimator.optimizer,
        max_grad_norm=None if estimator.max_grad_norm is None else float(estimator.max_grad_norm),
        seed=seed,
        restore_best=stopping is not None,
    )
