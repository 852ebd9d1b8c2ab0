"""Pictures of answers beside the truth: classes, probabilities, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError, ParameterError, check_choice, check_int
from llmfit.plots.drawing import BLUE, GREY, axes_of, check_lengths, named, tidy

__all__ = ["confusion_matrix", "predicted_against_true", "reliability"]

MOST_COUNTS = 16  # classes up to which a matrix shows its numbers
MOST_NAMES = 40  # classes up to which each is named


def confusion_matrix(
    truth: Any, predicted: Any = None, *, labels: Any = None, normalize: str | None = None, ax: Any = None
) -> Any:
    """Draw how often each true class got each answer.

    Parameters
    ----------
    truth : array-like of shape (n_rows,), or DataFrame of shape (n_classes, n_classes)
        True labels; or counts, as ``evaluate(...)["confusion_matrix"]`` has them.
    predicted : array-like of shape (n_rows,), default=None
        Answered labels, where `truth` is labels.
    labels : array-like of shape (n_classes,), default=None
        The classes and their order; None takes those that occur.
    normalize : None or {"true", "pred", "all"}, default=None
        Shares of the rows of a true class, of an answered one, or of all rows, in place of counts.
    ax : matplotlib Axes or empty Figure, default=None

    Returns
    -------
    sklearn.metrics.ConfusionMatrixDisplay

    Examples
    --------
    >>> confusion_matrix(["no", "yes", "yes"], ["no", "no", "yes"]).confusion_matrix.tolist()
    [[1, 0], [1, 1]]
    """
    check_choice("normalize", "confusion_matrix", normalize, [None, "true", "pred", "all"])
    counts, names = _counts(truth, predicted, labels)
    if not len(names):
        raise DataError("confusion_matrix has nothing to draw: there is no row.")
    if normalize is not None:
        over = {"true": counts.sum(1, keepdims=True), "pred": counts.sum(0, keepdims=True), "all": counts.sum()}
        counts = counts / np.maximum(over[normalize], 1)
    side = min(10.0, max(4.5, 2.5 + 0.45 * len(names)))
    ax = axes_of(ax, (side + 0.8, side))
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(names) <= MOST_COUNTS
    shades = {"vmin": counts.min() - 1} if counts.min() == counts.max() else {}  # one number is read on a dark ground
    display = ConfusionMatrixDisplay(counts, display_labels=names).plot(
        ax=ax,
        cmap="Blues",
        include_values=few,
        values_format=".2f" if normalize else "d",
        colorbar=not few,
        im_kw=shades,
    )
    _name_classes(ax, names)
    ax.set(xlabel="predicted", ylabel="true")
    return display


def _counts(truth: Any, predicted: Any, labels: Any) -> tuple[np.ndarray, list[str]]:
    if predicted is None:
        if not isinstance(truth, pd.DataFrame) or truth.shape[0] != truth.shape[1] or labels is not None:
            raise ParameterError("confusion_matrix needs true and predicted labels, or a square DataFrame of counts.")
        return truth.to_numpy(), [named(name) for name in truth.index]
    true, answered = list(truth), list(predicted)
    check_lengths("confusion_matrix", true, answered)
    known = list(labels) if labels is not None else _in_order([*true, *answered])
    place = {label: code for code, label in enumerate(known)}
    for label in [*true, *answered]:
        if label not in place:
            raise ParameterError(f"The 'labels' parameter of confusion_matrix lacks {label!r}, which rows have.")
    counts = np.zeros((len(known), len(known)), dtype=int)
    np.add.at(counts, ([place[label] for label in true], [place[label] for label in answered]), 1)
    return counts, [named(name) for name in known]


def _in_order(labels: Iterable[Any]) -> list[Any]:
    distinct = list(dict.fromkeys(labels))
    try:
        return sorted(distinct)
    except TypeError:  # of kinds that cannot be compared
        return sorted(distinct, key=str)


def _name_classes(ax: Any, names: list[str]) -> None:
    """Name each class where there is room, else every second, fifth, ..."""
    every = math.ceil(len(names) / MOST_NAMES)
    places = range(0, len(names), every)
    size = 9 if len(names) <= MOST_COUNTS else 7
    upright = max(map(len, names)) * len(names) > 60
    turned = {"rotation": 90} if upright and len(names) > 12 else {"rotation": 35, "ha": "right"} if upright else {}
    ax.set_xticks(places, [names[i] for i in places], fontsize=size, **turned)
    ax.set_yticks(places, [names[i] for i in places], fontsize=size)


def reliability(truth: Any, proba: Any, *, classes: Any = None, n_bins: int = 10, ax: Any = None) -> Any:
    """Draw how often answers are right that are given with some probability.

    Of two classes, the probability is that of the second; of more, that of the likeliest.

    Parameters
    ----------
    truth : array-like of shape (n_rows,)
        True labels.
    proba : array-like of shape (n_rows, n_classes)
        Probabilities, as `predict_proba` gives them.
    classes : array-like of shape (n_classes,), default=None
        The classes in the order of the columns, as in ``classes_``; None sorts those of `truth`.
    n_bins : int, default=10
        Bins of equal width.
    ax : matplotlib Axes or empty Figure, default=None

    Returns
    -------
    sklearn.calibration.CalibrationDisplay
        Dots are as large as there are rows in their bin.

    Examples
    --------
    >>> reliability(["a", "b", "b"], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).prob_true.tolist()
    [0.0, 1.0, 1.0]
    """
    check_int("n_bins", "reliability", n_bins, least=1)
    labels = list(truth)
    known = _in_order(labels) if classes is None else list(classes)
    given = np.asarray(proba, dtype=float)
    if given.shape != (len(labels), len(known)):
        raise DataError(
            f"reliability: proba must have the shape {(len(labels), len(known))}. Got {given.shape} instead."
        )
    if not labels:
        raise DataError("reliability has nothing to draw: there is no row.")
    if len(known) == 2:
        chance, right = given[:, 1], np.array([label == known[1] for label in labels])
        what, axis = f"share that is {named(known[1])}", f"probability of {named(known[1])}"
    else:
        chance = given.max(axis=1)
        right = np.array([label == known[i] for label, i in zip(labels, given.argmax(axis=1), strict=True)])
        what, axis = "share that is right", "probability of the answer"
    ax = axes_of(ax, (5.0, 5.0))
    from sklearn.calibration import CalibrationDisplay, calibration_curve

    chance = chance.clip(0, 1)  # rounding leaves some a little above 1
    share, mean = calibration_curve(right, chance, n_bins=n_bins, pos_label=True)
    display = CalibrationDisplay(share, mean, chance).plot(ax=ax, color=BLUE, marker=None)
    edges = np.linspace(0, 1, n_bins + 1)
    rows = np.bincount(np.searchsorted(edges[1:-1], chance), minlength=n_bins)
    ax.scatter(mean, share, s=30 + 270 * rows[rows > 0] / rows.max(), color=BLUE, zorder=3)
    ax.set(xlabel=axis, ylabel=what, xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    ax.get_legend().remove()
    ax.plot([], [], "k:", label="as it should be")
    ax.set_title(f"{len(labels):,} rows, dots as large as their number", fontsize=10, color=GREY)
    tidy(ax)
    return display


def predicted_against_true(truth: Any, predicted: Any, *, unit: str = "", ax: Any = None) -> Any:
    """Draw predicted numbers against the true ones, as scikit-learn does: predicted across, true upwards.

    Parameters
    ----------
    truth, predicted : array-like of shape (n_rows,)
        Numbers; a prediction that is nan was no number, and is left out and counted.
    unit : str, default=""
        What the numbers are in, for the labels.
    ax : matplotlib Axes or empty Figure, default=None

    Returns
    -------
    sklearn.metrics.PredictionErrorDisplay

    Examples
    --------
    >>> display = predicted_against_true([1.0, 2.0], [1.5, float("nan")], unit="EUR")
    >>> display.ax_.get_xlabel(), display.ax_.get_title()
    ('predicted (EUR)', '1 row is not shown: its answer is no number')
    """
    true, answered = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    check_lengths("predicted_against_true", true, answered)
    shown = np.isfinite(answered) & np.isfinite(true)
    gone = int((~shown).sum())
    ax = axes_of(ax, (5.0, 5.0))
    from sklearn.metrics import PredictionErrorDisplay

    display = PredictionErrorDisplay(y_true=true[shown], y_pred=answered[shown])
    dots = {"color": BLUE, "alpha": 0.9 if shown.sum() < 100 else 0.4, "s": 24}
    if shown.any():
        display.plot(ax=ax, kind="actual_vs_predicted", scatter_kwargs=dots, line_kwargs={"color": GREY})
        _same_ticks(ax)
    else:
        display.ax_, display.figure_ = ax, ax.figure
    tail = f" ({named(unit)})" if unit else ""
    ax.set(xlabel=f"predicted{tail}", ylabel=f"true{tail}")
    if gone:
        rows = "1 row is not shown: its answer is" if gone == 1 else f"{gone:,} rows are not shown: their answers are"
        ax.set_title(f"{rows} no number", fontsize=10, color=GREY)
    tidy(ax)
    return display


def _same_ticks(ax: Any) -> None:
    """Put round numbers on both axes, in place of scikit-learn's fifths of the range."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))
