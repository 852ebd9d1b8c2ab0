"""Files of one table, read whole or a chunk of rows at a time.

Takes places; gives frames whose column types are those of all the files together, wherever a chunk begins, beside the
cells as they stand in the file. Rows are counted from 0 over all files, those that cannot be read among them. What is
held at a time is a chunk.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import pandas as pd

from llmfit.exceptions import DataError, quoted, reason
from llmfit.files.paths import Place, find_inputs
from llmfit.files.records import RECORDS, Record, check_names
from llmfit.files.types import Column, as_kind, kinds_of

__all__ = ["Bad", "Chunk", "Source", "open_source", "read_table"]

SCANNED = 4096  # rows at a time


class Bad(NamedTuple):
    """A row that has no answer, and why.

    Parameters
    ----------
    row : int
        Counted from 0 over all files.
    file : str
    line : int or None
        Where it begins, counted from 1; None where the format has no lines.
    reason : str
    """

    row: int
    file: str
    line: int | None
    reason: str

    @property
    def where(self) -> str:
        """The row's place, for sentences."""
        return f"{self.file!r}, row {self.row}" if self.line is None else f"{self.file!r}, line {self.line}"


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table.

    Parameters
    ----------
    size : int
        Rows, those that cannot be read among them.
    frame : DataFrame of shape (n_good, n_columns)
        The rows that can be read; the index holds their numbers.
    cells : dict of column to list, length n_good
        The same cells as they stand in the file.
    spots : list of (str, int or None), length n_good
        File and line of each row.
    bad : list of Bad
    textual : bool
        Those cells are texts, of which `frame` has the values.
    """

    size: int
    frame: pd.DataFrame
    cells: dict[str, list[Any]]
    spots: list[tuple[str, int | None]]
    bad: list[Bad]
    textual: bool = False

    def read_as(self, kinds: Mapping[str, str]) -> pd.DataFrame:
        """Take the rows, columns that `kinds` names as what they are known to hold, whatever else the files have."""
        frame = self.frame.copy(deep=False)
        for name, known in kinds_of(self.frame).items():
            # Whole numbers beside fractions or gaps may stand as floats here, which do not hold all of their digits.
            rounded = kinds.get(name) == "int" and pd.api.types.is_float_dtype(frame[name].dtype)
            if kinds.get(name, known) != known or rounded:
                frame[name] = as_kind(kinds[name], self.cells[name], textual=self.textual)
        return frame


class Source(ABC):
    """A table in files, known by one reading through all of it.

    Attributes
    ----------
    kinds : dict of column to str
        A kind of llmfit.files.types.KINDS, or a type of pyarrow where the files have such.
    n_rows : int
        Those that cannot be read among them.
    textual : bool
        Cells are texts in the files.
    """

    kinds: dict[str, Any]
    n_rows: int
    textual = False

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.n_rows = 0
        self._first_bad: Bad | None = None
        self._scan()
        if not self.kinds:
            raise self._nothing()

    @abstractmethod
    def _scan(self) -> None:
        """Learn columns, types and the number of rows."""

    @abstractmethod
    def chunks(self, size: int, *, start: int = 0) -> Iterator[Chunk]:
        """Read rows from number `start` on, `size` of them at a time."""

    def digest(self) -> str:
        """Digest of the files' names and bytes."""
        found = "".join(f"{place.shown}\n{place.digest()}\n" for place in self.places)
        return hashlib.sha256(found.encode()).hexdigest()

    def _nothing(self) -> DataError:
        """Say why there is not even the name of a column."""
        if self._first_bad is not None:
            return DataError(
                f"{self._first_bad.where}: {self._first_bad.reason} No other row can be read, either."
                if self.n_rows > 1
                else f"{self._first_bad.where}: {self._first_bad.reason}"
            )
        held = "no rows, and so no columns" if not self.n_rows else f"{self.n_rows} row(s), but no columns"
        return DataError(f"{self.places[0].name!r} has {held}.")

    def _check_columns(self, place: Place, names: Iterable[str]) -> None:
        """Refuse a file that has other columns than the one before."""
        if set(names) != set(self.kinds):
            first = self.places[0].name
            raise DataError(
                f"{place.name!r} has the columns {quoted(names)}, but {first!r} has {quoted(self.kinds)}. Files that "
                "are read together must have the same."
            )


class _Records(Source):
    """Rows of CSV, JSON and Excel files."""

    def _scan(self) -> None:
        self.textual = self.places[0].format in ("csv", "tsv")
        self._columns: dict[str, Column] = {}
        self._read = 0  # rows that could be read
        for place in self.places:
            records = RECORDS[place.format](place)
            while some := list(islice(records, SCANNED)):
                self._learn(place, some)
        self.kinds = {name: column.stored for name, column in self._columns.items()}

    def _learn(self, place: Place, records: list[Record]) -> None:
        if records[0].line is None:  # names of the columns
            if self._columns:
                self.kinds = dict.fromkeys(self._columns)
                self._check_columns(place, records[0].values)
            self._add_columns(records.pop(0))
        good = [record for record in records if not record.reason]
        if self._first_bad is None and len(good) < len(records):
            number, first = next((i, one) for i, one in enumerate(records) if one.reason)
            self._first_bad = _bad(self.n_rows + number, place, first)
        self.n_rows += len(records)
        if not self.textual:
            for record in good:
                self._add_columns(record)
        for name, column in self._columns.items():
            column.see([record.values.get(name) for record in good])
        self._read += len(good)

    def _add_columns(self, record: Record) -> None:
        for name in record.values:
            if name not in self._columns:
                self._columns[name] = Column(textual=self.textual)
                self._columns[name].gaps = bool(self._read)  # the rows before have no such cell

    def chunks(self, size: int, *, start: int = 0) -> Iterator[Chunk]:
        rows = islice(enumerate(self._rows()), start, None)
        while some := list(islice(rows, size)):
            yield self._chunk(some)

    def _rows(self) -> Iterator[tuple[Place, Record]]:
        return chain.from_iterable(
            ((place, record) for record in RECORDS[place.format](place) if record.line is not None)
            for place in self.places
        )

    def _chunk(self, rows: list[tuple[int, tuple[Place, Record]]]) -> Chunk:
        good = [(number, place, record) for number, (place, record) in rows if not record.reason]
        cells = {name: [record.values.get(name) for _, _, record in good] for name in self._columns}
        try:
            arrays = {name: column.array(cells[name]) for name, column in self._columns.items()}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.places[0].name!r} was changed while it was read.") from error
        return Chunk(
            len(rows),
            pd.DataFrame(arrays, index=pd.Index([number for number, _, _ in good], dtype="int64")),
            cells,
            [(place.shown, record.line) for _, place, record in good],
            [_bad(number, place, record) for number, (place, record) in rows if record.reason],
            self.textual,
        )


def _bad(number: int, place: Place, record: Record) -> Bad:
    return Bad(number, place.shown, record.line, f"{record.reason}.")


class _Parquet(Source):
    """Rows of Parquet files; columns that hold an index without a name are left out."""

    def _scan(self) -> None:
        self.kinds, self._gaps = {}, set()
        for place in self.places:
            with place.open() as stored:
                file = self._open(place, stored)
                check_names(place, file.schema_arrow.names)
                types = {f.name: _of_any_size(f.type) for f in file.schema_arrow if not _is_index(f.name)}
                if not self.kinds:
                    self.kinds = types
                self._check_columns(place, types)
                odd = next((name for name, type_ in types.items() if type_ != self.kinds[name]), None)
                if odd is not None:
                    raise DataError(
                        f"The column {odd!r} is {types[odd]} in {place.name!r}, but {self.kinds[odd]} in "
                        f"{self.places[0].name!r}. Files that are read together must have the same types."
                    )
                self.n_rows += file.metadata.num_rows
                self._gaps |= _with_gaps(file, types)

    def _open(self, place: Place, stored: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(stored)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{place.name!r} cannot be read: {reason(error)}.") from error

    def chunks(self, size: int, *, start: int = 0) -> Iterator[Chunk]:
        number, held = 0, []
        for place, batch in self._batches(min(size, SCANNED)):
            skipped = min(max(start - number, 0), len(batch))
            held.append((place, batch.slice(skipped)))
            number += skipped
            while sum(len(piece) for _, piece in held) >= size:
                taken, held = _cut(held, size)
                yield self._chunk(taken, number)
                number += size
        if any(len(piece) for _, piece in held):
            yield self._chunk(held, number)

    def _batches(self, size: int) -> Iterator[tuple[Place, Any]]:
        import pyarrow as pa

        schema = pa.schema(list(self.kinds.items()))
        for place in self.places:
            with place.open() as stored:
                try:
                    for batch in self._open(place, stored).iter_batches(size, columns=list(self.kinds)):
                        yield place, pa.Table.from_batches([batch]).select(list(self.kinds)).cast(schema)
                except (pa.ArrowInvalid, OSError) as error:
                    raise DataError(f"{place.name!r} cannot be read: {reason(error)}.") from error

    def _chunk(self, pieces: list[tuple[Place, Any]], number: int) -> Chunk:
        import pyarrow as pa

        table = pa.concat_tables([piece for _, piece in pieces])
        nullable = {**_nullable()}
        columns = {
            name: table.column(name).to_pandas(types_mapper=nullable.get if name in self._gaps else None).array
            for name in self.kinds
        }
        return Chunk(
            len(table),
            pd.DataFrame(columns, index=pd.RangeIndex(number, number + len(table))),
            {name: table.column(name).to_pylist() for name in self.kinds},
            [(place.shown, None) for place, piece in pieces for _ in range(len(piece))],
            [],
        )


def _of_any_size(type_: Any) -> Any:
    """Take texts and bytes, which some writers store with longer offsets, as those of other files."""
    import pyarrow as pa

    return {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}.get(type_, type_)


def _is_index(name: str) -> bool:
    return name.startswith("__index_level_") and name.endswith("__")


def _cut(held: list[tuple[Place, Any]], size: int) -> tuple[list[tuple[Place, Any]], list[tuple[Place, Any]]]:
    """Take the first `size` rows of pieces."""
    taken = []
    for place, piece in held:
        taken.append((place, piece.slice(0, size)))
        size -= len(taken[-1][1])
    rest = [(place, piece.slice(len(own))) for (place, piece), (_, own) in zip(held, taken, strict=True)]
    return taken, [(place, piece) for place, piece in rest if len(piece)]


def _with_gaps(file: Any, types: dict[str, Any]) -> set[str]:
    """Find whole numbers and truth values some of which are missing: pandas needs other types for them."""
    plain = _nullable()
    doubtful = [name for name, type_ in types.items() if type_ in plain]
    gaps: set[str] = set()
    for batch in file.iter_batches(SCANNED, columns=doubtful) if doubtful else ():
        gaps |= {name for name in doubtful if batch.column(name).null_count}
    return gaps


def _nullable() -> dict[Any, Any]:
    import pyarrow as pa

    whole = {getattr(pa, f"{u}int{n}")(): f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
    names = {type_: name.replace("uint", "UInt").replace("int", "Int") for type_, name in whole.items()}
    return {pa.bool_(): pd.BooleanDtype(), **{t: pd.array([], dtype=name).dtype for t, name in names.items()}}


def open_source(given: Any, *, format: str | None = None) -> Source:  # noqa: A002 - the word of the command line
    """Find files and read through them once.

    Parameters
    ----------
    given, format
        As for :func:`llmfit.files.find_inputs`.

    Returns
    -------
    Source

    Raises
    ------
    DataError
        If a file cannot be read at all, or the files do not belong together.
    """
    places = find_inputs(given, format=format)
    return SOURCES.get(places[0].format, _Records)(places)


def read_table(
    given: Any,
    *,
    format: str | None = None,  # noqa: A002 - as above
    kinds: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Read files whole, as one frame.

    Parameters
    ----------
    given : str, path or list of them
        Paths, globs, or ``-`` for standard input.
    format : str or None, default=None
        "csv", "tsv", "json", "jsonl", "parquet" or "excel"; None takes it from each name, and CSV for standard input.
    kinds : dict of column to str or None, default=None
        What columns are known to hold, as :func:`llmfit.files.kinds_of` says it of a frame: they are read so.

    Returns
    -------
    DataFrame of shape (n_rows, n_columns)
        Numbers and truth values are recognised as in pandas.read_csv, but for digits behind a zero (007), which
        stay text.

    Raises
    ------
    DataError
        If a file or one of its rows cannot be read; the line is named.

    Examples
    --------
    >>> import tempfile
    >>> from llmfit.datasets import load_book_reviews
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_book_reviews().to_csv(f"{folder}/reviews.csv", index=False)
    ...     read_table(f"{folder}/*.csv").columns.tolist()
    ['title', 'review', 'score']
    """
    source = open_source(given, format=format)
    frames = []
    for chunk in source.chunks(SCANNED):
        for bad in chunk.bad:
            raise DataError(f"{bad.where}: {bad.reason}")
        frames.append(chunk.read_as(kinds or {}))
    if not frames:
        return pd.DataFrame({name: [] for name in source.kinds})
    return pd.concat(frames, ignore_index=True)


SOURCES: dict[str, type[Source]] = {"parquet": _Parquet}
