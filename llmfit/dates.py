"""Dates and times: what is one, how it is read in a file, how it is written in a prompt.

Takes values and pandas columns; gives ISO 8601 texts, so that a row reads the same from a frame and from any file.
"""

from __future__ import annotations

import re
from datetime import date, datetime, time
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["are_days", "as_date", "date_text", "holds_dates", "is_date"]

# Whole dates only: 2024 is a number, and 20240131 may be one. A text of a day has no time at all.
ISO = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII)


def is_date(value: Any) -> bool:
    """Tell a date, or a date with a time; NaT is none."""
    return isinstance(value, date | np.datetime64) and not pd.isna(value)


def holds_dates(column: pd.Series) -> bool:
    """Tell a column of dates by its dtype, or by its values where it holds objects; texts are none."""
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        return True
    if pd.api.types.is_numeric_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype):
        return False
    known = column.dropna().astype(object)
    return bool(len(known)) and all(map(is_date, known))


def as_date(value: Any) -> Any:
    """Read an ISO 8601 text, 2024-01-31 or 2024-01-31 12:30:00+01:00; whatever else it is comes back as it is."""
    if not (isinstance(value, str) and ISO.fullmatch(value.strip())):
        return value
    try:
        return pd.Timestamp(value.strip())
    except ValueError:  # the 31st of February
        return value


def are_days(column: pd.Series, *, texts: bool = True) -> bool:
    """Tell a column of dates without times: a time, where there is one, is midnight everywhere.

    Parameters
    ----------
    column : pandas.Series
    texts : bool
        Take a text with the time of midnight for a day, too; else only one that has no time.
    """
    known = column.dropna().astype(object)
    return bool(len(known)) and all(_reads_as_day(value, texts) for value in known)


def _reads_as_day(value: Any, texts: bool) -> bool:
    if isinstance(value, str) and not texts and len(value) > len("2024-01-31"):
        return False
    value = as_date(value)
    return is_date(value) and _is_day(value)


def date_text(value: Any, *, days: bool) -> str:
    """Write a date as ISO 8601 has it, with a space before the time.

    Parameters
    ----------
    value : date, datetime, Timestamp or datetime64
    days : bool
        Leave midnight out, which is there only because the type has a place for a time. Otherwise a date without a time
        gets it: so it comes back from a file of the same column.
    """
    value = pd.Timestamp(value) if isinstance(value, np.datetime64) else value
    if not isinstance(value, datetime):
        return str(value.isoformat()) if days else f"{value.isoformat()} 00:00:00"
    text = str(value.isoformat(" "))
    return text.partition(" ")[0] if days and _is_day(value) else text


def _is_day(value: Any) -> bool:
    value = pd.Timestamp(value) if isinstance(value, np.datetime64) else value
    if not isinstance(value, datetime):
        return True
    return value.tzinfo is None and value.time() == time.min and not getattr(value, "nanosecond", 0)
