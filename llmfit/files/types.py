"""What a column of a file holds, learned from all of its cells and not from the first of them.

Takes cells: texts of a CSV file, or values of a JSON file; gives one kind a column and the cells as such a column. As
the kind comes of the whole file, it does not depend on where a chunk begins. Where the kind was settled before, by a
frame that was learned from, each cell is read by itself.
"""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from llmfit.dates import are_days, as_date, holds_dates
from llmfit.features import is_set, is_whole

__all__ = ["KINDS", "MISSING", "Column", "as_kind", "kinds_of"]

# Texts that pandas.read_csv takes for a missing value.
MISSING = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
TRUTH = {"true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False}
# No zero before other digits: 007 is a name that is made of digits, and loses itself as a number.
INTEGER = re.compile(r"\s*[+-]?(?:0|[1-9][0-9]*)\s*")
REAL = re.compile(r"\s*[+-]?(?:(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf|infinity))\s*")
MANTISSA = 53  # bits of a float of 64
LIMITS = (-(2**63), 2**63 - 1)
DIGITS = 4000  # of a whole number; Python reads no more than 4300
# Where numbers are known to stand, 007 is one.
NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf|infinity))")
WHOLE = re.compile(r"[+-]?[0-9]+")


class Column:
    """One column of a file: what has been seen in it, and then its cells as an array.

    Parameters
    ----------
    textual : bool
        Cells are texts, whose kind is to be read out of them; else they are values of JSON.
    """

    def __init__(self, *, textual: bool) -> None:
        self.textual = textual
        self.gaps = False
        self._seen: set[str] = set()
        self._exact = True  # whole numbers are so as floats

    def see(self, cells: Iterable[Any]) -> None:
        """Learn from cells."""
        if self.textual and "text" in self._seen:
            return  # it stays a text, whatever follows
        kind_of = _kind_of_text if self.textual else _kind_of_value
        kinds = set(map(kind_of, cells))
        self.gaps |= "gap" in kinds
        self._seen |= kinds - {"gap"}
        if not self.textual and "int" in kinds:
            self._exact &= all(map(_is_exact, cells))

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if len(self._seen) == 1:
            return next(iter(self._seen))
        if self._seen == {"int", "float"} or not self._seen:
            return "float"
        return "text" if self.textual else "object"

    @property
    def stored(self) -> str:
        """Kind of a column that holds these cells to their last digit: one of KINDS."""
        return "object" if self.kind == "float" and not self._exact else self.kind

    def array(self, cells: Sequence[Any]) -> Any:
        """Give cells as an array of the column's kind.

        Raises
        ------
        ValueError
            If a cell is none that was seen.
        """
        known = [cell if not self._is_gap(cell) else None for cell in cells]
        return KINDS[self.kind](known, self.gaps)

    def _is_gap(self, cell: Any) -> bool:
        return cell in MISSING if self.textual and cell is not None else _kind_of_value(cell) == "gap"


def _is_exact(cell: Any) -> bool:
    """Tell what a float of 64 bits holds to its last digit, of whole numbers."""
    if type(cell) is not int or cell.bit_length() <= MANTISSA:
        return True
    return LIMITS[0] <= cell <= LIMITS[1] and float(cell) == cell


def _kind_of_text(cell: str | None) -> str:
    if cell is None or cell in MISSING:
        return "gap"
    if INTEGER.fullmatch(cell):
        return "int" if len(cell) <= DIGITS and LIMITS[0] <= int(cell) <= LIMITS[1] else "text"
    if REAL.fullmatch(cell):
        return "float"
    return "bool" if cell in TRUTH else "text"


def _kind_of_value(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):  # nan
        return "gap"
    if isinstance(cell, int) and not isinstance(cell, bool) and not LIMITS[0] <= cell <= LIMITS[1]:
        return "object"
    return OF_VALUE.get(type(cell), "object")


def _integers(cells: Sequence[Any], gaps: bool) -> Any:
    numbers = [None if cell is None else int(cell) for cell in cells]
    return pd.array(numbers, dtype="Int64") if gaps else np.array(numbers, dtype="int64")


def _reals(cells: Sequence[Any], _: bool) -> Any:
    return np.array([np.nan if cell is None else float(cell) for cell in cells], dtype="float64")


def _truths(cells: Sequence[Any], gaps: bool) -> Any:
    values = [TRUTH[cell] if isinstance(cell, str) else cell for cell in cells]
    return pd.array(values, dtype="boolean") if gaps else np.array(values, dtype=bool)


def _texts(cells: Sequence[Any], _: bool) -> Any:
    return pd.array(list(cells), dtype="str")


def _objects(cells: Sequence[Any], _: bool) -> Any:
    values = np.empty(len(cells), dtype=object)
    for place, cell in enumerate(cells):
        values[place] = cell
    return values


def kinds_of(frame: pd.DataFrame) -> dict[str, str]:
    """Say what the columns of a frame hold, each as a kind of KINDS; as they are read again in any file."""
    return {str(name): _kind_of_column(frame[name]) for name in frame.columns}


def _kind_of_column(column: pd.Series) -> str:
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return _kind_of_column(dtype.categories.to_series())
    if pd.api.types.is_bool_dtype(dtype):
        return "bool"
    if pd.api.types.is_numeric_dtype(dtype):
        return "int" if is_whole(column) else "float" if pd.api.types.is_float_dtype(dtype) else "object"
    if holds_dates(column):
        return "day" if are_days(column) else "date"
    if pd.api.types.is_object_dtype(dtype):
        known = column.dropna()
        if len(known) and all(map(is_set, known)):
            return "list"
        return OF_OBJECTS.get(pd.api.types.infer_dtype(column, skipna=True), "object")
    return "text" if pd.api.types.is_string_dtype(dtype) else "object"


def as_kind(kind: str, cells: Sequence[Any], *, textual: bool) -> Any:
    """Read cells as what their column was known to hold, each by itself; a cell that is no such value stays as it is.

    Parameters
    ----------
    kind : str
        One of KINDS.
    cells : sequence, length n
    textual : bool
        Cells are texts of a file, some of which stand for a gap.

    Returns
    -------
    array of length n
        Of a type for the kind, or of objects where a value is of another.
    """
    read = READ[kind]
    gone = [cell is None or (cell in MISSING if textual else _kind_of_value(cell) == "gap") for cell in cells]
    values = [None if gap else read(cell) for gap, cell in zip(gone, cells, strict=True)]
    alike = {_kind_of_value(value) for value in values} <= {kind, "gap"}
    return KINDS[kind if alike else "object"](values, any(gone))


def _number(cell: Any) -> Any:
    if isinstance(cell, Decimal) and cell.is_finite():
        return int(cell) if cell == cell.to_integral_value() else float(cell)
    if not isinstance(cell, str):
        return cell
    bare = cell.strip()
    if WHOLE.fullmatch(bare) and len(bare) <= DIGITS:
        return int(bare)
    return float(bare) if NUMBER.fullmatch(bare) else cell


def _whole(cell: Any) -> Any:
    """Read 7, 007, 7.0, which some write where a column has gaps; 7.5 is a number as well."""
    number = _number(cell)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _real(cell: Any) -> Any:
    number = _number(cell)
    if isinstance(number, bool) or not isinstance(number, int):
        return number
    try:
        return float(number)
    except OverflowError:
        return number


def _truth(cell: Any) -> Any:
    return TRUTH.get(cell, cell) if isinstance(cell, str) else cell


def _text(cell: Any) -> Any:
    return str(cell) if isinstance(cell, numbers.Real) else cell


def _list(cell: Any) -> Any:
    """Read a list that was written into a CSV file as JSON."""
    if not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        return cell
    try:
        return json.loads(cell)
    except (RecursionError, ValueError):
        return cell


READ: dict[str, Callable[[Any], Any]] = {
    "int": _whole,
    "float": _real,
    "bool": _truth,
    "text": _text,
    "list": _list,
    "date": as_date,
    "day": as_date,
    "object": lambda cell: cell,
}
OF_OBJECTS = {"string": "text", "empty": "text", "integer": "int", "floating": "float", "boolean": "bool"}
OF_VALUE = {bool: "bool", int: "int", float: "float", str: "text"}
KINDS: dict[str, Callable[[Sequence[Any], bool], Any]] = {
    "int": _integers,
    "float": _reals,
    "bool": _truths,
    "text": _texts,
    "list": _objects,
    "date": _objects,
    "day": _objects,
    "object": _objects,
}
