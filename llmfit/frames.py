"""Whatever a user holds as a table becomes a pandas frame with string column names.

Takes a pandas or polars frame, a Series, a list of str or of dicts, a ``datasets.Dataset`` or an array;
gives a :class:`Table`. Knows nothing of features, templates or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError, quoted

__all__ = ["Table", "as_column", "check_readable", "has_names", "is_array_like", "to_table"]

TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Table:
    """A frame and how its user wants columns of answers back.

    Parameters
    ----------
    frame : pandas.DataFrame of shape (n_rows, n_columns)
        Column names are str.
    as_array : bool
        Answers go back as NumPy arrays rather than as a Series with the frame's index.
    """

    frame: pd.DataFrame
    as_array: bool = False

    def answer(self, values: Any, name: str, dtype: Any = None) -> Any:
        """Give answers back in the form in which the rows came."""
        if self.as_array:
            return np.asarray(values)
        return pd.Series(values, index=self.frame.index, name=name, dtype=dtype)


def _from_library(X: Any, library: str) -> bool:
    return type(X).__module__.partition(".")[0] == library


def is_array_like(X: Any) -> bool:
    """Tell whether `X` has no column names, so that scikit-learn's checks of arrays apply."""
    named = isinstance(X, pd.DataFrame | pd.Series) or _from_library(X, "polars")
    return not (named or _from_library(X, "datasets") or _is_column_of_texts(X) or _is_list_of(X, dict))


def has_names(X: Any) -> bool:
    """Tell what names its columns itself: a frame, a Dataset, a list of dicts."""
    return hasattr(X, "columns") or hasattr(X, "column_names") or _is_list_of(X, dict)


def _is_column_of_texts(X: Any) -> bool:
    """Tell a flat list, array or index of str, some of which may be missing."""
    flat = isinstance(X, list | tuple | pd.Index | pd.api.extensions.ExtensionArray)
    if not flat and not (isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype.kind in "OUT"):
        return False
    return len(X) > 0 and all(isinstance(item, str) or item is None or item is pd.NA for item in X)


def _is_list_of(X: Any, kind: type) -> bool:
    """Tell a list of one kind."""
    return isinstance(X, list | tuple) and len(X) > 0 and all(isinstance(item, kind) for item in X)


def to_table(X: Any, text_column: str = TEXT_COLUMN) -> Table:
    """Convert what the user passed into a :class:`Table`.

    Parameters
    ----------
    X : pandas.DataFrame, pandas.Series, polars frame or Series, datasets.Dataset, list or ndarray
        ``n_rows`` rows. A list of str, a Series without a name and a 1-d array make one column.
    text_column : str, default="text"
        Name of a column that has none of its own.

    Raises
    ------
    DataError
        If column names repeat, or some are str and some are not.
    """
    check_readable(X)
    if _from_library(X, "polars"):
        X = X.collect() if hasattr(X, "collect") else X
        X = X.to_pandas()
    elif _from_library(X, "datasets"):
        X = X.to_pandas()
    if isinstance(X, pd.Series):
        X = X.to_frame(name=X.name if isinstance(X.name, str) and X.name else text_column)
    elif _is_column_of_texts(X):
        as_array = isinstance(X, np.ndarray)
        return Table(pd.DataFrame({text_column: pd.Series(list(X), dtype="str")}), as_array)
    elif _is_list_of(X, dict):
        X = pd.DataFrame.from_records(X)
    if isinstance(X, pd.DataFrame):
        return Table(_with_string_names(X))
    return Table(_array_to_frame(np.asarray(X), text_column), as_array=True)


def check_readable(X: Any) -> None:
    """Raise for what cannot be rows at all."""
    splits = type(X).__name__ in ("DatasetDict", "IterableDatasetDict")  # of datasets: several tables, not one
    mapping = splits or (isinstance(X, Mapping) and not hasattr(X, "shape"))  # scikit-learn refuses a sparse array
    if X is None or mapping or isinstance(X, str | bytes | Iterator):
        raise DataError(
            "X must be a frame, a Series, a list of str or of dicts, a Dataset or an array of rows. "
            f"Got {type(X).__name__} instead."
        )


def _array_to_frame(array: np.ndarray, text_column: str) -> pd.DataFrame:
    if array.ndim == 1:
        return pd.DataFrame({text_column: array})
    return pd.DataFrame(array, columns=[f"x{i}" for i in range(array.shape[1])])


def _with_string_names(frame: pd.DataFrame) -> pd.DataFrame:
    names = list(frame.columns)
    if not all(isinstance(name, str) for name in names):
        odd = next(name for name in names if not isinstance(name, str))
        if any(isinstance(name, str) for name in names):
            raise DataError(
                f"Column names must all be str. Got {odd!r} ({type(odd).__name__}) beside str names. "
                "Rename it, for example with df.columns = df.columns.astype(str)."
            )
        frame = frame.set_axis([str(name) for name in names], axis="columns")
    repeated = frame.columns[frame.columns.duplicated()].unique()
    if len(repeated):
        raise DataError(f"The frame has more than one column named {quoted(repeated)}. Rename or drop one.")
    return frame


def as_column(y: Any, n_rows: int, name: str) -> pd.Series:
    """Convert a 1-d target into a Series of length `n_rows`, its dtype untouched.

    Raises
    ------
    DataError
        If the lengths differ or `y` has more than one column.
    """
    from sklearn.utils.validation import column_or_1d

    if _from_library(y, "polars") or _from_library(y, "datasets"):
        y = y.collect() if hasattr(y, "collect") else y
        y = y.to_pandas() if hasattr(y, "to_pandas") else list(y)
    if _is_list_of(y, dict):
        y = pd.DataFrame.from_records(y)
    if isinstance(y, pd.DataFrame) and y.shape[1] == 1:
        y = y.iloc[:, 0]
    if not isinstance(y, pd.Series):
        y = _to_series(y, column_or_1d)
    if len(y) != n_rows:
        raise DataError(f"X and y must have the same length: inconsistent numbers of samples, {n_rows} and {len(y)}.")
    return y.rename(y.name if isinstance(y.name, str) and y.name else name)


def _to_series(y: Any, column_or_1d: Any) -> pd.Series:
    if isinstance(y, pd.api.extensions.ExtensionArray | pd.Index):  # NumPy would lose a nullable dtype
        return pd.Series(y)
    if isinstance(y, Sequence) and not isinstance(y, str):
        return pd.Series(list(y))
    try:
        return pd.Series(column_or_1d(y, warn=True))
    except ValueError as error:
        raise DataError(str(error)) from None
