"""Hooks into training: a no-op base, the progress bar, early stopping.

Takes a :class:`State` at each event and changes nothing of it but ``stop``. Knows no model.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmfit.exceptions import check_int, check_keys, check_number, parameter_error

__all__ = ["Callback", "EarlyStopping", "Progress", "State", "resolve_callbacks", "resolve_early_stopping"]


@dataclass
class State:
    """Where training stands.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    total_steps : int
    epoch : int
        Epochs begun, from 1 on.
    epochs : int
    history : list of dict
        One record a step: step, epoch, loss (nats per loss token), learning_rate, grad_norm, tokens, seconds and,
        at an epoch's end, validation_loss.
    best_epoch : int or None
        The epoch with the lowest validation loss.
    stop : bool
        A callback sets it to end training after this step.
    """

    total_steps: int
    epochs: int
    step: int = 0
    epoch: int = 1
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stop: bool = False


class Callback:
    """Base of the callbacks: every hook does nothing.

    Examples
    --------
    >>> from llmfit import Callback
    >>> class StopAt(Callback):
    ...     def on_step_end(self, state):
    ...         state.stop = state.step >= 100
    """

    def on_fit_begin(self, state: State) -> None:
        """Run before the first step."""

    def on_step_end(self, state: State) -> None:
        """Run after each optimiser step."""

    def on_epoch_end(self, state: State) -> None:
        """Run after each epoch, the validation loss known."""

    def on_fit_end(self, state: State) -> None:
        """Run once at the end, also where training failed."""


class _Function(Callback):
    """A plain function, called after each step."""

    def __init__(self, function: Callable[[State], object]) -> None:
        self.function = function

    def on_step_end(self, state: State) -> None:
        self.function(state)


class Progress(Callback):
    """A progress bar over optimiser steps (tqdm), under a line that says what is trained."""

    def __init__(self, description: str = "fit", heading: str = "") -> None:
        self.description, self.heading = description, heading
        self.bar: Any = None

    def on_fit_begin(self, state: State) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        if self.heading:
            tqdm.write(self.heading, file=sys.stderr)
        self.bar = tqdm(total=state.total_steps, initial=state.step, desc=self.description, unit="step")

    def on_step_end(self, state: State) -> None:
        """Move the bar, the loss of the step beside it."""
        self.bar.set_postfix(epoch=f"{state.epoch}/{state.epochs}", loss=f"{state.history[-1]['loss']:.4f}")
        self.bar.update(1)

    def on_epoch_end(self, state: State) -> None:
        """Write the validation loss where there is one."""
        loss = state.history[-1].get("validation_loss")
        if loss is not None:
            self.bar.write(f"epoch {state.epoch}: validation loss {loss:.4f}", file=sys.stderr)

    def on_fit_end(self, state: State) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


@dataclass
class EarlyStopping(Callback):
    """Stop when the validation loss has not fallen for some epochs.

    Parameters
    ----------
    patience : int, default=1
        Epochs without improvement that are let pass.
    min_delta : float, default=0.0
        Fall of the loss, in nats per token, that counts as improvement.
    """

    patience: int = 1
    min_delta: float = 0.0

    def on_epoch_end(self, state: State) -> None:
        """Compare this epoch's validation loss with the best before it."""
        losses = [r["validation_loss"] for r in state.history if r.get("validation_loss") is not None]
        best, waited = math.inf, 0
        for loss in losses:
            best, waited = (loss, 0) if loss < best - self.min_delta else (best, waited + 1)
        state.stop = state.stop or waited >= self.patience


def resolve_early_stopping(value: Any) -> EarlyStopping | None:
    """Turn None, False, True, a patience or a dict into early stopping or None.

    Raises
    ------
    ParameterError
        If a key is unknown or a value cannot be used.
    """
    if value is None or value is False:
        return None
    given = {} if value is True else {"patience": value} if isinstance(value, numbers.Integral) else value
    if not isinstance(given, Mapping):
        raise parameter_error("early_stopping", "the estimator", "None, a bool, an int or a dict", value)
    check_keys("early_stopping", given, ["patience", "min_delta"])
    spec = EarlyStopping(**given)
    check_int("patience", "early_stopping", spec.patience, least=1)
    check_number("min_delta", "early_stopping", spec.min_delta, least=0)
    return spec


def resolve_callbacks(value: Any) -> list[Callback]:
    """Turn None, a callback, a function of the state, or a list of these into callbacks.

    Raises
    ------
    ParameterError
        If an item is neither.
    """
    items = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    return [_resolve_callback(item) for item in items]


def _resolve_callback(item: Any) -> Callback:
    if isinstance(item, Callback):
        return item
    if callable(item) and not isinstance(item, type):
        return _Function(item)
    raise parameter_error("callbacks", "the estimator", "callbacks or functions of the state", item)


def notify(callbacks: Iterable[Callback], event: str, state: State) -> None:
    """Call one hook of every callback."""
    for callback in callbacks:
        getattr(callback, event)(state)
