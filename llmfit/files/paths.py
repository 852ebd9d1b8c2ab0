"""Names of files become places to read from or to write to, each of one format.

Takes what a user wrote: a path, a glob, ``-`` for standard input or output, or a list of them. Reads nothing but
standard input, which is put aside in a file of its own where it is read more than once.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from llmfit.exceptions import DataError, ParameterError, check_choice, parameter_error, quoted

__all__ = ["FORMATS", "STANDARD", "Place", "check_writable", "find_inputs", "find_output"]

STANDARD = "-"
PACKED = ".gz"


@dataclass(frozen=True)
class Place:
    """Where a table lies or is to lie.

    Parameters
    ----------
    name : str
        As the user wrote it; ``-`` for standard input or output.
    format : str
        A value of FORMATS.
    packed : bool
        Compressed by gzip.
    """

    name: str
    format: str
    packed: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.name).expanduser()

    @property
    def shown(self) -> str:
        """The name for sentences and files of errors, which tell of no folder."""
        return "standard input" if self.name == STANDARD else self.path.name

    @cached_property
    def _spool(self) -> IO[bytes]:
        """Standard input in a file without a name, which goes with the process."""
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - it is to stay open
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        weakref.finalize(self, spool.close)
        return spool

    def open_stored(self) -> Any:
        """Open the bytes as they are stored."""
        if self.name == STANDARD:
            copy = os.fdopen(os.dup(self._spool.fileno()), "rb")
            copy.seek(0)
            return copy
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.name!r} cannot be read: {error.strerror}.") from error

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the bytes, unpacked."""
        with self.open_stored() as stored:
            if self.packed:
                with gzip.GzipFile(fileobj=stored) as unpacked:
                    yield unpacked
            else:
                yield stored

    def digest(self) -> str:
        """SHA-256 of the stored bytes."""
        with self.open_stored() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_inputs(given: Any, *, format: str | None = None) -> list[Place]:  # noqa: A002 - the word of the command line
    """Find the files that a user named.

    Parameters
    ----------
    given : str, path or list of them
        Paths, globs (``data/*.csv``, ``**`` for folders below; in the order of their names), ``-``.
    format : str or None, default=None
        A value of FORMATS; None takes it from each name, and CSV for standard input.

    Returns
    -------
    list of Place
        All of one format.

    Raises
    ------
    DataError
        If there is no such file, a glob matches none, or formats differ.
    """
    names = [name for one in _as_list(given, "inputs") for name in _expanded(one)]
    if not names:
        raise parameter_error("inputs", "predict_files", "a path, a glob or a list of them", given)
    places = [_place(name, format) for name in names]
    formats = dict.fromkeys(place.format for place in places)
    if len(formats) > 1:
        raise DataError(f"The files have several formats, {quoted(formats)}. Read those of one format at a time.")
    if names.count(STANDARD) > 1:
        raise DataError("Standard input can be read once, but '-' stands among the files more than once.")
    return places


def find_output(given: Any) -> Place:
    """Find the file to write; its format is one that can be written a chunk at a time.

    Raises
    ------
    ParameterError
        If there is no such format, or it cannot go to standard output.
    DataError
        If no file can be made there.
    """
    (name,) = _as_list(given, "output")
    found = _format_of(name)[0] if name != STANDARD else "csv"
    if found not in WRITABLE:
        suffixes = [suffix for suffix, form in FORMATS.items() if form in WRITABLE]
        packable = sum(suffix in PACKABLE for suffix in suffixes)
        raise ParameterError(
            f"{name!r} cannot be written: its name must end in one of {quoted(suffixes)}, each of the first {packable} "
            f"also with {PACKED!r}."
        )
    if name != STANDARD:
        check_writable(name)
    return _place(name, None, "written")


def check_writable(name: str, *, folder: bool = False) -> None:
    """Refuse a place where no file can be made, or no folder; folders above it may be missing.

    Raises
    ------
    DataError
    """
    path = Path(name).expanduser().absolute()
    if path.is_dir() and not folder:
        raise DataError(f"{name!r} cannot be written: it is a folder.")
    above = next(parent for parent in path.parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise DataError(f"{name!r} cannot be written: {str(above)!r} is no folder that may be written to.")


def _as_list(given: Any, parameter: str) -> list[str]:
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(one, str | os.PathLike) for one in several):
        raise parameter_error(parameter, "predict_files", "a path, a glob or a list of them", given)
    return [os.fspath(one) for one in several]


def _expanded(name: str) -> Sequence[str]:
    if name == STANDARD or os.path.lexists(os.path.expanduser(name)):
        return [name]
    if not glob.has_magic(name):
        raise DataError(f"{name!r} cannot be read: there is no such file.")
    found = sorted(path for path in glob.glob(os.path.expanduser(name), recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"{name!r} matches no file.")
    return found


def _format_of(name: str) -> tuple[str | None, bool]:
    """Read a format off a name, and whether the file is packed."""
    bare = name.lower()
    return FORMATS.get(Path(bare.removesuffix(PACKED)).suffix), bare.endswith(PACKED)


def _place(name: str, wanted: str | None, done: str = "read") -> Place:
    if wanted is not None:
        check_choice("format", "predict_files", wanted, sorted(set(FORMATS.values())))
    if name != STANDARD and Path(name).expanduser().is_dir():
        raise DataError(f"{name!r} is a folder. Name its files: '{name.rstrip('/')}/*.csv'.")
    of_name, packed = _format_of(name)
    found = wanted or ("csv" if name == STANDARD else of_name)
    if found is None:
        raise DataError(
            f"{name!r} has no suffix of a known format: {quoted(FORMATS, most=99)}, each of the first "
            f"{len(PACKABLE)} also with {PACKED!r}. Rename it, or name the format."
        )
    if packed and found not in set(PACKABLE.values()):
        advice = "Unpack it" if done == "read" else f"Leave {PACKED!r} out"
        raise DataError(f"{name!r} cannot be {done}: {found} is compressed by itself. {advice}.")
    return Place(name, found, packed)


PACKABLE = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
FORMATS = {**PACKABLE, ".parquet": "parquet", ".pq": "parquet", ".xlsx": "excel"}
WRITABLE = ("csv", "tsv", "jsonl", "parquet")
