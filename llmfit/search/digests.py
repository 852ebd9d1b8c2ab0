"""What a value is, in 32 hex digits: equal for equal values, in every process.

Takes parameters, functions, frames and arrays; gives digests. Knows no estimator and writes nothing.
"""

from __future__ import annotations

import hashlib
import pickle
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import ParameterError, reason

__all__ = ["digest_of"]

Update = Callable[[bytes], None]
Inside = tuple[int, ...]  # the objects that are being read, so that one which holds itself ends


def digest_of(*values: Any) -> str:
    """Digest values: type, order and content count, identity does not.

    Parameters
    ----------
    *values
        Plain values, containers, arrays, frames, classes, functions (by their code), and whatever can be pickled.

    Returns
    -------
    str
        32 hex digits.

    Raises
    ------
    ParameterError
        If a value has no content to digest.

    Examples
    --------
    >>> digest_of({"r": 8}) == digest_of({"r": 8}), digest_of(1) == digest_of(1.0)
    (True, False)
    """
    digest = hashlib.sha256()
    for value in values:
        _read(digest.update, value, ())
    return digest.hexdigest()[:32]


def _read(update: Update, value: Any, inside: Inside) -> None:
    if id(value) in inside:
        return update(b"again")
    if isinstance(value, np.generic):
        value = value.item()
    reader = next((read for kinds, read in READERS if isinstance(value, kinds)), _object)
    update(f"<{type(value).__qualname__}>".encode())
    return reader(update, value, (*inside, id(value)))


def _bytes(update: Update, value: bytes) -> None:
    update(f"{len(value)}:".encode() + value)


def _plain(update: Update, value: Any, _: Inside) -> None:
    _bytes(update, value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))


def _array(update: Update, value: np.ndarray, inside: Inside) -> None:
    update(f"{value.dtype.str}{value.shape}".encode())
    if value.dtype.hasobject:
        _items(update, value.ravel().tolist(), inside)
    else:
        _bytes(update, np.ascontiguousarray(value).tobytes())


def _column(update: Update, value: Any, inside: Inside) -> None:
    update(f"{value.dtype}{value.name!r}".encode("utf-8", "surrogatepass"))
    plain = isinstance(value.dtype, np.dtype)
    _array(update, value.to_numpy() if plain else value.to_numpy(dtype=object), inside)
    if isinstance(value, pd.Series):
        _read(update, value.index, inside)


def _frame(update: Update, value: pd.DataFrame, inside: Inside) -> None:
    _items(update, list(value.columns), inside)
    _read(update, value.index, inside)
    for place in range(value.shape[1]):
        _column(update, value.iloc[:, place].reset_index(drop=True), inside)


def _items(update: Update, value: Any, inside: Inside) -> None:
    update(f"{len(value)}:".encode())
    for item in value:
        _read(update, item, inside)


def _mapping(update: Update, value: Mapping[Any, Any], inside: Inside) -> None:
    _items(update, [part for pair in value.items() for part in pair], inside)


def _set(update: Update, value: Any, _: Inside) -> None:
    for digest in sorted(digest_of(item) for item in value):
        update(digest.encode())


def _class(update: Update, value: Any, _: Inside) -> None:
    update(f"{value.__module__}.{value.__qualname__};".encode())


def _function(update: Update, value: types.FunctionType, inside: Inside) -> None:
    """Read a function by what it does, as every lambda has the same name."""
    _class(update, value, inside)
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    _items(update, [value.__code__, value.__defaults__, value.__kwdefaults__, cells], inside)


def _code(update: Update, value: types.CodeType, inside: Inside) -> None:
    _items(update, [value.co_code, value.co_names, value.co_consts], inside)


def _object(update: Update, value: Any, inside: Inside) -> None:
    """Read any other object as pickle would: what makes it, from what, and its state."""
    try:
        made = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever an object's own pickling raises
        raise ParameterError(
            f"checkpoint_dir cannot tell one {type(value).__name__} from another: {reason(error)}. Leave it out of the "
            "parameters, or search without checkpoint_dir."
        ) from error
    if isinstance(made, str):
        return _bytes(update, f"{type(value).__module__}.{made}".encode())
    parts = [list(part) if part is not None and place > 2 else part for place, part in enumerate(made[:5])]
    return _items(update, parts, inside)


READERS: list[tuple[Any, Callable[[Update, Any, Inside], None]]] = [
    ((type(None), bool, int, float, complex, str, bytes, PurePath), _plain),
    (np.ndarray, _array),
    ((pd.Series, pd.Index), _column),
    (pd.DataFrame, _frame),
    (Mapping, _mapping),
    ((list, tuple), _items),
    ((set, frozenset), _set),
    ((type, types.BuiltinFunctionType), _class),
    (types.FunctionType, _function),
    (types.CodeType, _code),
]
