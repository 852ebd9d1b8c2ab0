"""Typed columns: what kind of value a column holds, how a value is written, how an answer is read.

Takes pandas columns; gives :class:`Feature` objects and strings. Knows no torch and no template.
A kind is one of ``text``, ``category``, ``number``, ``binary``, ``set`` (several labels in a list, tuple or set) and
``date``, which features have alone.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from llmfit.dates import are_days, as_date, date_text, holds_dates, is_date
from llmfit.exceptions import DataError, ParameterError, check_choice, parameter_error, quoted

__all__ = [
    "KINDS",
    "Feature",
    "infer_kind",
    "is_set",
    "label_text",
    "resolve_features",
    "resolve_target",
    "resolve_targets",
]

TARGET_KINDS = ("text", "category", "number", "binary", "set")
KINDS = (*TARGET_KINDS, "date")
MOST_CATEGORIES = 100


@dataclass(frozen=True)
class Feature:
    """A column by name, and the kind of value that it holds.

    `whole` says that its numbers are whole, and are written so where a gap in the column makes them floats; or that its
    dates are days, and are written without a time where that is midnight. `timed` says that all of it was dates, with
    times: one without a time gets it, whatever the kind.
    """

    name: str
    kind: str
    whole: bool = False
    timed: bool = False

    def format(self, column: pd.Series, na_rep: str) -> list[str]:
        """Write every value of a column as text.

        Parameters
        ----------
        column : pandas.Series of length n
        na_rep : str
            Stands for a missing value (None, NaN, NaT, pandas.NA).

        Returns
        -------
        list of str, length n

        Raises
        ------
        DataError
            If the kind is number or date and a value is none; the row is named.
        """
        missing = column.isna().to_numpy()
        values: Any = _values(column)
        if column.dtype == object:
            _check_no_bytes(column, values)
        if self.kind == "number":
            _check_numbers(column, missing)
        if self.kind == "date":
            values = _dates(column, values, missing)
        write = self._writer()
        return [na_rep if gone else write(value) for value, gone in zip(values, missing, strict=True)]

    def _writer(self) -> Callable[[Any], str]:
        """Choose how a value is written: by kind, and by what the column held when it was learned."""
        if self.kind == "date":
            return partial(date_text, days=self.whole)
        if self.kind == "number" and not self.whole:
            return _float_text
        return _text_of_set if self.kind == "set" else label_text if self.whole else partial(_text, timed=self.timed)


def _values(column: pd.Series) -> np.ndarray:
    """Take the values as Python's, but narrow floats as they are: widened, 0.1 reads 0.10000000149011612."""
    dtype = column.dtype
    if pd.api.types.is_float_dtype(dtype) and dtype.itemsize < 8:
        return np.asarray(column.to_numpy(dtype=f"f{dtype.itemsize}", na_value=np.nan))
    return np.asarray(column.astype(object).to_numpy())


def _text(value: Any, *, timed: bool = False) -> str:
    if isinstance(value, str):
        return value
    if not is_date(value):
        return str(value)
    # Beside words a date stands in a file without a time, and is read there as the text that it is.
    return date_text(value, days=not timed and not isinstance(value, datetime | np.datetime64))


def _float_text(value: Any) -> str:
    """Write a number of a column that has fractions: 2 reads 2.0, whatever stands in the rows beside it."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_):
        return str(float(value))
    return _text(value)


def is_set(cell: Any) -> bool:
    """Tell several labels in one cell."""
    return isinstance(cell, list | tuple | set | frozenset | np.ndarray)


def _text_of_set(value: Any) -> str:
    """Write several labels as one text; those of a set, which has no order, are sorted."""
    if not is_set(value):
        return _text(value)
    texts = [label_text(label) for label in value]
    return ", ".join(sorted(texts) if isinstance(value, set | frozenset) else texts)


def _check_no_bytes(column: pd.Series, values: np.ndarray) -> None:
    for row, value in enumerate(values):
        if isinstance(value, bytes):
            raise DataError(
                f"{row_name(row, column.index)}: the column {column.name!r} holds bytes, which are no text. Decode "
                f"them first, for example with df[{column.name!r}].str.decode('utf-8')."
            )


def _check_numbers(column: pd.Series, missing: np.ndarray) -> None:
    bad = pd.to_numeric(column, errors="coerce").isna().to_numpy() & ~missing
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{row_name(row, column.index)}: the number column {column.name!r} holds "
            f"{column.iloc[row]!r}, which is no number."
        )


def _dates(column: pd.Series, values: np.ndarray, missing: np.ndarray) -> list[Any]:
    dates = [as_date(value) for value in values]
    for row, (value, gone) in enumerate(zip(dates, missing, strict=True)):
        if not gone and not is_date(value):
            raise DataError(
                f"{row_name(row, column.index)}: the date column {column.name!r} holds {value!r}, which is no date as "
                f"ISO 8601 writes it (2024-01-31). Convert the column, for example with pandas.to_datetime."
            )
    return dates


def row_name(row: int, index: pd.Index) -> str:
    """Name a row by its position and its index label."""
    (label,) = index[row : row + 1].tolist()  # a value of Python, whose repr is what the user wrote
    return f"Row {row} (index {label!r})"


def label_text(value: Any) -> str:
    """Write a class label as the text that the model answers with."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real) and float(value).is_integer():
        return str(int(float(value)))
    if isinstance(value, bytes):
        raise DataError(f"The label {value!r} is bytes, which are no text. Decode the column that holds it.")
    return date_text(value, days=True) if is_date(value) else str(value)


def infer_kind(column: pd.Series) -> str:
    """Infer the kind of a column.

    Booleans and columns of two distinct whole numbers or words are binary; numbers are numbers, unless they are
    integers of few distinct values; strings that repeat (at most 100 distinct ones, each seen twice
    or more on average) are categories; lists, tuples and sets are sets; everything else is text.
    """
    known = column.dropna()
    if known.dtype == object and len(known) and all(map(is_set, known)):
        return "set"
    distinct = int(known.astype(str).nunique())
    repeats = distinct <= MOST_CATEGORIES and len(known) >= 2 * distinct
    if pd.api.types.is_bool_dtype(column.dtype):
        return "binary"
    if isinstance(column.dtype, pd.CategoricalDtype):
        return "binary" if len(column.dtype.categories) == 2 else "category"
    if distinct == 2 and repeats and not _has_fractions(known):
        return "binary"
    if pd.api.types.is_numeric_dtype(column.dtype):
        few = pd.api.types.is_integer_dtype(column.dtype) and distinct <= 20 and repeats
        return "category" if few else "number"
    return "category" if repeats else "text"


def _has_fractions(known: pd.Series) -> bool:
    """Tell floats that are not all whole: measurements, however few values they take."""
    return bool(pd.api.types.is_float_dtype(known.dtype) and (known.to_numpy(dtype=float) % 1 != 0).any())


def resolve_features(
    given: Any, frame: pd.DataFrame, target: str | Sequence[str] | None, owner: str
) -> tuple[Feature, ...]:
    """Turn every accepted spelling of `features` into typed features that the frame has.

    Parameters
    ----------
    given : None, str, list of str, or dict of str to kind
        None stands for every column but the target.
    frame : pandas.DataFrame
    target : str, sequence of str or None
        Names of target columns; they may not be features.
    owner : str
        Name of the estimator, for the sentences.

    Raises
    ------
    ParameterError
        If the spelling or a kind is none of the accepted ones.
    DataError
        If a column is missing, named twice, or is the target, or one declared as binary has more than two values.
    """
    kinds = _spelled("features", given, owner, KINDS)
    targets = [target] if isinstance(target, str) else list(target or ())
    if kinds is None:
        kinds = {name: None for name in frame.columns if name not in targets}
        if not kinds:
            beside = quoted(targets or [None])
            raise DataError(f"{owner} needs at least one feature column beside the target {beside}.")
    for name in targets:
        if name in kinds:
            raise DataError(f"The target column {name!r} is among the features. Leave it out of 'features'.")
    check_columns(kinds, frame, owner)
    _check_binary([name for name, kind in kinds.items() if kind == "binary"], frame)
    return tuple(_learn_feature(name, kind or _feature_kind(frame[name]), frame[name]) for name, kind in kinds.items())


def _learn_feature(name: str, kind: str, column: pd.Series) -> Feature:
    whole = is_whole(column) or are_days(column, texts=kind == "date")
    return Feature(name, kind, whole, timed=not whole and holds_dates(column))


def _check_binary(names: Sequence[str], frame: pd.DataFrame) -> None:
    """Raise for the first column declared as binary that has more than two values."""
    for name in names:
        distinct = int(frame[name].dropna().astype(str).nunique())
        if distinct > 2:
            raise DataError(f"The feature {name!r} is declared as 'binary', but has {distinct} distinct values.")


def is_whole(column: pd.Series) -> bool:
    """Tell integers, also where pandas holds them as floats because some are missing."""
    dtype = column.dtype
    if pd.api.types.is_float_dtype(dtype) and column.isna().any():
        known = column.dropna().to_numpy(dtype=float)
        return bool(len(known) and np.isfinite(known).all() and (known % 1 == 0).all())
    return bool(pd.api.types.is_integer_dtype(dtype))


def _feature_kind(column: pd.Series) -> str:
    """Infer the kind of a feature: numbers stay numbers, and dates dates, however few they are."""
    if holds_dates(column):
        return "date"
    numeric = pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    return "number" if numeric else infer_kind(column)


def check_columns(names: Any, frame: pd.DataFrame, owner: str) -> None:
    """Raise for the first feature column that the frame lacks."""
    for name in names:
        if name not in frame.columns:
            raise DataError(
                f"{owner} needs the feature column {name!r}, but the frame has only {quoted(frame.columns)}."
            )


def _spelled(parameter: str, given: Any, owner: str, known: Sequence[str]) -> dict[str, str | None] | None:
    """Read one name, a list of names, or a mapping of names to kinds."""
    if given is None:
        return None
    if isinstance(given, str):
        return {given: None}
    if isinstance(given, Mapping):
        names, kinds = list(given), list(given.values())
    elif isinstance(given, list | tuple) or type(given).__name__ in {"Index", "ndarray"}:
        names, kinds = list(given), [None] * len(given)
    else:
        names, kinds = [], []
    if not names or not all(isinstance(name, str) for name in names):
        wanted = "None, a column name, a list of column names or a dict of column name to kind"
        raise parameter_error(parameter, owner, wanted, given)
    names = [str(name) for name in names]  # those of an array are NumPy's
    for name, kind in zip(names, kinds, strict=True):
        if kind is not None:
            check_choice(f"{parameter}[{name!r}]", owner, kind, known)
        if names.count(name) > 1:
            raise DataError(f"{name!r} is named twice in {parameter!r} of {owner}.")
    return dict(zip(names, kinds, strict=True))


def resolve_targets(given: Any, owner: str) -> dict[str, str | None]:
    """Turn the accepted spellings of `target` into names with their kinds; {} where none is named."""
    return _spelled("target", given, owner, TARGET_KINDS) or {}


def resolve_target(given: Any, owner: str) -> tuple[str | None, str | None]:
    """Turn the accepted spellings of `target` into (name, kind), either of which may be None.

    Raises
    ------
    ParameterError
        If more than one target is named.
    """
    kinds = resolve_targets(given, owner)
    if len(kinds) > 1:
        raise ParameterError(
            f"The 'target' parameter of {owner} must be one column. Got {quoted(kinds)}. LLMEstimator answers several."
        )
    return next(iter(kinds.items()), (None, None))
