"""What the user passes to a method becomes a table and a target column.

Takes an estimator, for its parameters and its name, and X and y in any accepted form; gives a
:class:`~llmfit.frames.Table` and a Series without missing values. Sets scikit-learn's attributes of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import _check_sample_weight, validate_data

from llmfit.exceptions import DataError, quoted
from llmfit.features import resolve_target, row_name
from llmfit.frames import TEXT_COLUMN, Table, as_column, check_readable, has_names, is_array_like, to_table

__all__ = ["mean_hit", "naming", "read_eval_set", "read_fit", "read_table", "read_target", "read_weights"]


def read_table(estimator: Any, X: Any, *, fitting: bool = False) -> Table:
    """Read the rows that the user passed; arrays go through scikit-learn's checks."""
    check_readable(X)
    learned = list(getattr(estimator, "features_", ())) if not fitting else []
    if learned and is_array_like(X) and _is_empty(X, len(learned)):
        return Table(pd.DataFrame(columns=learned), as_array=isinstance(X, np.ndarray))
    if is_array_like(X):
        X = validate_data(estimator, X, dtype=None, ensure_all_finite=False, reset=fitting)
        return to_table(X)
    given = estimator.features
    names = [given] if isinstance(given, str) else learned if given is None else given
    one_name = isinstance(names, list | tuple) and len(names) == 1 and isinstance(names[0], str)
    return to_table(X, names[0] if one_name else TEXT_COLUMN)


def _is_empty(X: Any, n_columns: int) -> bool:
    """Tell a list or an array of no rows, as wide as the fitted ones where it has a width."""
    shape = np.shape(X) if isinstance(X, list | tuple | np.ndarray) else (1,)
    return shape[0] == 0 and (len(shape) == 1 or shape[1] == n_columns)


def read_fit(estimator: Any, X: Any, y: Any, default_name: str) -> tuple[Table, Any]:
    """Read features and target of `fit`: a Series, or a frame of several targets.

    Raises
    ------
    DataError
        If there is no row, no target, or a row without one.
    """
    owner = type(estimator).__name__
    if estimator._targets is not None:
        table = read_table(estimator, X, fitting=True)
        return table, _several_targets(estimator, table, y)
    name, kind = resolve_target(estimator.target, owner)
    estimator._check_target_kind(kind)
    table = read_table(estimator, X, fitting=True)
    y = estimator._one_column(y, fitting=True)
    if y is None:
        target = _target_column(table.frame, name, owner)
    else:
        while default_name in table.frame.columns:  # a column of that name is a feature, not the target
            default_name += "_"
        target = as_column(y, len(table.frame), default_name)
        target = target.rename(name or target.name)
    if len(target) == 0:
        raise DataError(f"{owner} needs at least one row to fit, but the frame has 0 sample(s).")
    return table, _without_gaps(target, table.frame.index)


def read_target(estimator: Any, table: Table, y: Any) -> Any:
    """Read the true answers of rows, for an estimator that knows its target, or its several ones.

    Raises
    ------
    DataError
        If there is no row, no target, or a row without one.
    """
    owner = type(estimator).__name__
    if estimator._targets is not None:
        return _several_targets(estimator, table, y)
    if y is None:
        target = _target_column(table.frame, estimator.target_, owner)
    else:
        target = as_column(estimator._one_column(y), len(table.frame), estimator.target_)
    if len(target) == 0:
        raise DataError(f"{owner} needs at least one row to compare with its target, but the frame has none.")
    return _without_gaps(target, table.frame.index).rename(estimator.target_)


def _several_targets(estimator: Any, table: Table, y: Any) -> pd.DataFrame:
    """Read several targets out of the rows' frame, or out of y: by name from a frame, else by place."""
    owner, names, index = type(estimator).__name__, list(estimator._targets), table.frame.index
    given = table.frame if y is None else _several_columns(y, names)
    if len(given) != len(index):
        raise DataError(
            f"X and y must have the same length: inconsistent numbers of samples, {len(index)} and {len(given)}."
        )
    if not len(given):
        raise DataError(f"{owner} needs at least one row with targets, but the frame has 0 sample(s).")
    columns = [
        _without_gaps(_target_column(given, name, owner, "the frame" if y is None else "y"), index) for name in names
    ]
    return pd.concat(columns, axis=1)  # each of its dtype


def _several_columns(y: Any, names: list[str]) -> pd.DataFrame:
    if isinstance(y, pd.Series):
        return y.to_frame(y.name if isinstance(y.name, str) else TEXT_COLUMN)
    if has_names(y):
        return to_table(y).frame
    array = y if isinstance(y, np.ndarray) else np.asarray(y, dtype=object)
    frame = pd.DataFrame(array).infer_objects() if array.ndim in (1, 2) else None
    if frame is None or frame.shape[1] != len(names):
        wrong = f"{type(y).__name__} of shape {array.shape}" if frame is None else frame.shape[1]
        raise DataError(f"y must have a column for each of the targets {quoted(names)}. Got {wrong} instead.")
    return frame.set_axis(names, axis=1)


def read_eval_set(estimator: Any, eval_set: Any) -> tuple[Table, Any]:
    """Read the rows of an eval_set, a frame with the target or a tuple (X, y)."""
    X, y = _eval_pair(eval_set)
    with naming("eval_set"):
        table = read_table(estimator, X)
        return table, read_target(estimator, table, y)


def _eval_pair(eval_set: Any) -> tuple[Any, Any]:
    pairs = isinstance(eval_set, list) and any(isinstance(item, tuple) for item in eval_set)
    if pairs or (isinstance(eval_set, tuple) and len(eval_set) != 2):
        kind = "list of tuples" if pairs else f"tuple of {len(eval_set)}"
        raise DataError(f"eval_set must be a frame or a tuple (X, y). Got a {kind} instead.")
    return eval_set if isinstance(eval_set, tuple) else (eval_set, None)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin what an error says of rows with the name under which they were passed."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{what}: {error}") from error


def _target_column(frame: pd.DataFrame, name: str | None, owner: str, what: str = "the frame") -> pd.Series:
    if name is None:
        raise DataError(
            f"This {owner} estimator requires y to be passed, but the target y is None. Pass y, or name the "
            "target column of the frame with the 'target' parameter."
        )
    if name not in frame.columns:
        raise DataError(f"{owner} needs the target column {name!r}, but {what} has only {quoted(frame.columns)}.")
    return frame[name]


def _without_gaps(target: pd.Series, index: pd.Index) -> pd.Series:
    missing = target.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{row_name(int(missing.argmax()), index)}: the target {target.name!r} is missing, in "
            f"{int(missing.sum())} row(s) in all. Drop or fill them: Input y contains NaN."
        )
    return target.set_axis(index)


def read_weights(table: Table, sample_weight: Any) -> np.ndarray | None:
    """Read the weight of every row, or None where all weigh one.

    Raises
    ------
    DataError
        If there is not one weight a row, one is negative or no number, or all are zero.
    """
    if sample_weight is None:
        return None
    try:
        weights = _check_sample_weight(sample_weight, table.frame, dtype=np.float64, ensure_non_negative=True)
    except ValueError as error:
        raise DataError(f"sample_weight cannot be used: {error}") from None
    return np.asarray(weights)


def mean_hit(table: Table, hits: Any, sample_weight: Any) -> float:
    """Weigh which rows were answered right into one share."""
    return float(np.average(hits, weights=read_weights(table, sample_weight)))
