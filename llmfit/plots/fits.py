"""Pictures of a fit: its losses, and how long its rows are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError, parameter_error
from llmfit.plots.drawing import BLUE, GREY, ORANGE, axes_of, tidy

__all__ = ["learning_curve", "token_lengths"]


def learning_curve(fitted: Any, *, ax: Any = None) -> Any:
    """Draw the loss of every optimiser step, and of the validation rows.

    Parameters
    ----------
    fitted : fitted estimator or DataFrame
        An estimator, or its ``history_``.
    ax : matplotlib Axes or empty Figure, default=None
        Where to draw; None makes a figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    DataError
        If nothing was trained.

    Examples
    --------
    >>> import pandas as pd
    >>> history = pd.DataFrame({"step": [1, 2], "loss": [0.7, 0.4], "validation_loss": [None, 0.5]})
    >>> learning_curve(history).get_xlabel()
    'optimiser step'
    """
    history = fitted if isinstance(fitted, pd.DataFrame) else getattr(fitted, "history_", None)
    if history is None or not {"step", "loss"} <= set(history.columns):
        raise parameter_error("fitted", "learning_curve", "a fitted estimator or its history_", fitted)
    if not len(history):
        raise DataError("learning_curve has nothing to draw: no step was trained.")
    ax = axes_of(ax)
    steps, losses = history["step"].to_numpy(), history["loss"].to_numpy(dtype=float)
    smooth = len(steps) >= 20
    ax.plot(
        steps,
        losses,
        color=BLUE,
        alpha=0.35 if smooth else 1,
        marker="o" if len(steps) < 20 else None,
        label=None if smooth else "training",
    )
    if smooth:
        window = max(5, len(steps) // 20)
        mean = pd.Series(losses).rolling(window, min_periods=1, center=True).mean()
        ax.plot(steps, mean, color=BLUE, linewidth=2, label=f"training (mean of {window} steps)")
    if "validation_loss" in history and history["validation_loss"].notna().any():
        held = history.dropna(subset="validation_loss")
        ax.plot(held["step"], held["validation_loss"].astype(float), color=ORANGE, marker="s", label="validation")
    _mark_best(ax, fitted, history)
    ax.set(xlabel="optimiser step", ylabel=f"loss{_unit(fitted)}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(steps) < 3:  # a range of one has no two whole numbers to stand at
        ax.set_xlim(steps.min() - 1, steps.max() + 1)
    ax.legend(frameon=False)
    return tidy(ax)


def _mark_best(ax: Any, fitted: Any, history: pd.DataFrame) -> None:
    """Draw where the weights are from, with early stopping."""
    best = getattr(fitted, "best_epoch_", None)
    if best is not None and "epoch" in history and (history["epoch"] == best).any():
        step = history.loc[history["epoch"] == best, "step"].max()
        ax.axvline(step, color=GREY, linestyle=":", label=f"best epoch, {best}")


def _unit(fitted: Any) -> str:
    if isinstance(fitted, pd.DataFrame):
        return ""
    fitted = vars(fitted).get("estimator_", fitted)
    if getattr(fitted, "_head", None) is None:
        return " (nats per token)"
    return " (squared error / variance)" if hasattr(fitted, "target_scale_") else " (nats per row)"


def token_lengths(source: Any, X: Any = None, y: Any = None, *, max_length: int | None = None, ax: Any = None) -> Any:
    """Draw how many tokens rows have, and where `max_length` cuts.

    Parameters
    ----------
    source : estimator, or array-like of int of shape (n_rows,)
        An estimator, which counts the tokens of prompt and answer of the rows of `X`; or lengths. One that is not
        fitted counts them uncut, up to its model's context.
    X, y
        Rows for the estimator, as for its `preview`.
    max_length : int, default=None
        Where to draw the line; None takes the estimator's.
    ax : matplotlib Axes or empty Figure, default=None

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> token_lengths([12, 40, 33], max_length=32).get_title()
    '2 of 3 rows have more than 32 tokens'
    """
    if hasattr(source, "preview"):
        lengths, limit, cut = _measured(source, X, y)
    else:
        lengths, limit, cut = np.asarray(source, dtype=int), None, 0
    limit = max_length if max_length is not None else limit
    if not len(lengths):
        raise DataError("token_lengths has nothing to draw: there is no row.")
    ax = axes_of(ax)
    ax.hist(lengths, bins=_bins(lengths), color=BLUE, edgecolor="white", linewidth=0.5)
    over = 0 if limit is None else int((lengths > limit).sum())
    if limit is not None and limit <= 3 * lengths.max():
        ax.axvline(limit, color=ORANGE, linewidth=2, label=f"max_length, {limit:,}")
        ax.legend(frameon=False)
    if over or cut:
        said = f"have more than {limit:,} tokens" if over else "are cut"
        ax.set_title(f"{over or cut:,} of {len(lengths):,} rows {said}", fontsize=10, color=GREY)
    elif limit is not None:
        text = f"longest {lengths.max():,} of max_length {limit:,} tokens"
        ax.set_title(text, fontsize=10, color=GREY)
    ax.set(xlabel="tokens of prompt and answer", ylabel="rows")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if np.ptp(lengths) < 10:
        ax.set_xlim(lengths.min() - 5.5, lengths.max() + 5.5)
    return tidy(ax)


def _measured(estimator: Any, X: Any, y: Any) -> tuple[np.ndarray, int | None, int]:
    """Count tokens by the estimator's own preview: lengths, max_length, rows that are cut."""
    limit = getattr(estimator, "max_length_", estimator.max_length)
    if not hasattr(estimator, "max_length_"):
        from sklearn.base import clone

        estimator = clone(estimator).set_params(max_length=None, truncation="prompt")
    seen = estimator.preview(X, len(X), y)
    lengths = (seen["prompt_tokens"] + seen["completion_tokens"]).to_numpy(dtype=int)
    return lengths, limit, int((seen["cut"] > 0).sum())


def _bins(lengths: np.ndarray) -> np.ndarray:
    """Edges between whole numbers, at most 40 bins."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / 40))
    return np.arange(low, high + width + 1, width) - 0.5
