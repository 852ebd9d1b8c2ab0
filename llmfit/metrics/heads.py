"""Measures of numbers and of several labels a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError

__all__ = ["regression_metrics", "set_metrics"]


def regression_metrics(y_true: Any, y_pred: Any, *, mean: float) -> dict[str, Any]:
    """Compare answered numbers with the true ones.

    Parameters
    ----------
    y_true : array-like of shape (n,)
    y_pred : array-like of shape (n,)
        nan where the answer was no number.
    mean : float
        Stands for such an answer, so that none is better than a wild one and no better than knowing nothing: the mean
        of the targets that fit saw.

    Returns
    -------
    dict
        Floats, ``mae`` and ``rmse`` in the units of the target: ``r2`` (1 is best, 0 is the mean of `y_true`; nan for
        one row), ``mae``, ``rmse`` and ``spearman`` (rank correlation from -1 to 1, nan where either side is
        constant). ``unanswered``: rows whose answer is no number, an int.

    Raises
    ------
    DataError
        If there is no row, or the lengths differ.

    Examples
    --------
    >>> from llmfit.metrics import regression_metrics
    >>> result = regression_metrics([1.0, 2.0, 3.0], [1.0, 2.0, float("nan")], mean=2.0)
    >>> result["r2"], result["unanswered"]
    (0.5, 1)
    """
    from scipy.stats import rankdata
    from sklearn import metrics

    true, pred = np.asarray(y_true, dtype=float), np.asarray(y_pred, dtype=float)
    _check_rows(len(true), len(pred))
    unanswered = np.isnan(pred)
    pred = np.where(unanswered, mean, pred)
    ranks = rankdata(true), rankdata(pred)
    varied = all(np.ptp(side) > 0 for side in ranks)
    return {
        "r2": float(metrics.r2_score(true, pred)) if len(true) > 1 else np.nan,
        "mae": float(metrics.mean_absolute_error(true, pred)),
        "rmse": float(metrics.root_mean_squared_error(true, pred)),
        "spearman": float(np.corrcoef(*ranks)[0, 1]) if varied else np.nan,
        "unanswered": int(unanswered.sum()),
    }


def set_metrics(
    y_true: Sequence[Collection[Any]], y_pred: Sequence[Collection[Any]], classes: Any, *, per_class: bool = False
) -> dict[str, Any]:
    """Compare answered sets of labels with the true ones.

    Parameters
    ----------
    y_true, y_pred : sequence of collections of labels, length n
    classes : ndarray of shape (k,)
        The labels that fit saw; others in `y_true` are never answered, and count as missed.
    per_class : bool, default=False
        Add the key ``per_class``.

    Returns
    -------
    dict
        Floats from 0 to 1: ``subset_accuracy`` (rows with all labels right), ``hamming_loss`` (wrong decisions about
        a label; 0 is best), ``f1_micro`` (over all decisions), ``f1_macro`` (mean over the labels that occur),
        ``f1_samples`` and ``jaccard`` (means over the rows; 1 where neither side has a label).
        ``per_class``: DataFrame of precision, recall, f1 and support of each label.

    Raises
    ------
    DataError
        If there is no row, or the lengths differ.

    Examples
    --------
    >>> import numpy as np
    >>> from llmfit.metrics import set_metrics
    >>> result = set_metrics([["a", "b"], []], [["a"], []], np.array(["a", "b"]))
    >>> result["subset_accuracy"], result["hamming_loss"], result["jaccard"]
    (0.5, 0.25, 0.75)
    """
    _check_rows(len(y_true), len(y_pred))
    labels = list(dict.fromkeys([*np.asarray(classes).tolist(), *(label for row in y_true for label in row)]))
    true, pred = (np.array([[label in row for label in labels] for row in side]) for side in (y_true, y_pred))
    both, either = true & pred, true | pred  # (n, k)
    f1 = _ratio(2 * both.sum(0), true.sum(0) + pred.sum(0), 0.0)  # (k,)
    scores: dict[str, Any] = {
        "subset_accuracy": float(np.mean((true == pred).all(1))),
        "hamming_loss": float(np.mean(true != pred)),
        "f1_micro": float(_ratio(2 * both.sum(), true.sum() + pred.sum(), 1.0)),
        "f1_macro": float(f1[either.any(0)].mean()) if either.any() else 1.0,
        "f1_samples": float(_ratio(2 * both.sum(1), true.sum(1) + pred.sum(1), 1.0).mean()),
        "jaccard": float(_ratio(both.sum(1), either.sum(1), 1.0).mean()),
    }
    if per_class:
        columns = {
            "precision": _ratio(both.sum(0), pred.sum(0), 0.0),
            "recall": _ratio(both.sum(0), true.sum(0), 0.0),
            "f1": f1,
            "support": true.sum(0),
        }
        scores["per_class"] = pd.DataFrame(columns, index=pd.Index(labels, name="class"))
    return scores


def _ratio(above: Any, below: Any, undefined: float) -> Any:
    """Divide counts; 0/0 is what it is said to be."""
    # Written out, since scikit-learn takes a single label for a binary target, which has no samples to average.
    return np.where(np.equal(below, 0), undefined, above / np.maximum(below, 1))


def _check_rows(n_true: int, n_answers: int) -> None:
    if n_true != n_answers:
        raise DataError(f"evaluate needs one answer per row. Got {n_answers} answers for {n_true} rows.")
    if n_true == 0:
        raise DataError("evaluate needs at least one row. Got none.")
