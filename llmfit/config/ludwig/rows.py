"""What a key of Ludwig's is here: a row of a table, and how a section of a config is read by its rows.

Takes the rows of a section and what a config says there; gives the values of keys that mean something here, and refuses
the others with a sentence that names their place. Knows no single key.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llmfit.exceptions import ParameterError, suggest

__all__ = ["KINDS", "Row", "Table", "idle", "many", "mapped", "read_section", "refused", "unknown"]

MAPPED, REFUSED, IDLE = "mapped", "refused", "without effect"


class Row(NamedTuple):
    """A key of Ludwig's.

    Parameters
    ----------
    key : str
    verdict : {"mapped", "refused", "without effect"}
    words : str
        What it becomes, or why it does not.
    kind : str
        A name in `KINDS`: what its value may be.
    default : any
        Ludwig's own, for the page that compares.
    neutral : tuple
        Of a key that is refused: values that ask for nothing, and are let pass.
    """

    key: str
    verdict: str
    words: str
    kind: str = "any"
    default: Any = None
    neutral: tuple[Any, ...] = ()


Table = dict[str, Row]


def mapped(key: str, words: str, kind: str = "any", default: Any = None) -> Row:
    """Describe a key that means something here: `words` says what."""
    return Row(key, MAPPED, words, kind, default)


def refused(key: str, words: str, *neutral: Any) -> Row:
    """Describe a key that has no meaning here, but for neutral values: None, and those given, Ludwig's own first."""
    return Row(key, REFUSED, words, "any", neutral[0] if neutral else None, (None, *neutral))


def idle(key: str, words: str, default: Any = None) -> Row:
    """Describe a key whose value can change no result here: `words` says why."""
    return Row(key, IDLE, words, "any", default)


def many(keys: str, make: Any, *settings: Any) -> list[Row]:
    """Describe keys, separated by spaces, of which the same is to be said."""
    return [make(key, *settings) for key in keys.split()]


def table(*rows: Row | Iterable[Row]) -> Table:
    """Make a section's table of rows, and lists of rows; a key stands once."""
    flat = [row for rows_ in rows for row in ([rows_] if isinstance(rows_, Row) else rows_)]
    return {row.key: row for row in flat}


def read_section(rows: Table, given: Any, place: str, *, more: Iterable[str] = ()) -> dict[str, Any]:
    """Read what a config says in a section.

    Parameters
    ----------
    rows : dict of str to Row
    given : any
        A mapping, or None for an empty one.
    place : str
        Where it stands, for the sentences; "" is the config as a whole.
    more : iterable of str
        Keys that mean something beside those of the table: llmfit's own.

    Returns
    -------
    dict of str to any
        The keys that are mapped, and those of `more`.

    Raises
    ------
    ParameterError
        For the first key that is unknown, refused, or has a value of the wrong type.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ParameterError(f"The config's {place!r} must be a mapping. Got {given!r} instead.")
    own, found = set(more), {}
    for key, value in given.items():
        where = f"{place}.{key}" if place else str(key)
        if key in own and (key not in rows or rows[key].verdict != MAPPED):
            found[key] = value
        elif key not in rows:
            raise unknown(where, place, [*rows, *own])
        elif rows[key].verdict == MAPPED:
            check_kind(rows[key], where, value)
            found[key] = value
        elif rows[key].verdict == REFUSED and not _is_neutral(value, rows[key].neutral):
            raise ParameterError(f"The config's {where!r} cannot be {value!r} here: {rows[key].words}")
    return found


def unknown(where: str, place: str, known: Iterable[str]) -> ParameterError:
    """Refuse a key at a place that has no such key."""
    paths = [f"{place}.{key}" if place else key for key in known]
    return ParameterError(f"The config has no key {where!r}.{suggest(where, paths)}")


def check_kind(row: Row, where: str, value: Any) -> None:
    """Raise unless a value is of the kind that a row wants; None stands for Ludwig's default."""
    wanted, accepts, _ = KINDS[row.kind]
    if value is not None and not accepts(value):
        raise ParameterError(f"The config's {where!r} must be {wanted}. Got {value!r} instead.")


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Compare as JSON would: 0 is 0.0, but False is not 0."""
    as_list = list(value) if isinstance(value, tuple) else value
    return any(isinstance(value, bool) == isinstance(other, bool) and as_list == other for other in neutral)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# In words, as a test, and as JSON Schema has it.
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "any": ("any value", lambda _: True, {}),
    "bool": ("true or false", lambda value: isinstance(value, bool), {"type": "boolean"}),
    "int": ("a whole number", _is_int, {"type": "integer"}),
    "number": ("a number", _is_number, {"type": "number"}),
    "text": ("a text", lambda value: isinstance(value, str), {"type": "string"}),
    "list": ("a list", lambda value: isinstance(value, list | tuple), {"type": "array"}),
    "mapping": ("a mapping", lambda value: isinstance(value, Mapping), {"type": "object"}),
    "names": (
        "a name or a list of names",
        lambda value: isinstance(value, str | list | tuple),
        {"type": ["string", "array"]},
    ),
    "spec": ("a name or a mapping", lambda value: isinstance(value, str | Mapping), {"type": ["string", "object"]}),
    "several": (
        "a mapping or a list of mappings",
        lambda value: isinstance(value, Mapping | list | tuple),
        {"type": ["object", "array"]},
    ),
    "int or auto": (
        "a whole number or 'auto'",
        lambda value: value == "auto" or _is_int(value),
        {"anyOf": [{"type": "integer"}, {"const": "auto"}]},
    ),
    "number or auto": (
        "a number or 'auto'",
        lambda value: value == "auto" or _is_number(value),
        {"anyOf": [{"type": "number"}, {"const": "auto"}]},
    ),
}
