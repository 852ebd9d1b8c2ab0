"""Files of text as records, one after the other, each with the line where it begins.

Takes a :class:`Place`; gives records, and for what is none the reason in its place, so that one bad line costs one row.
No more than a record is held, or what may have been one. Knows no types: cells are texts in CSV, values in JSON.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from llmfit.exceptions import DataError, missing_package, quoted, reason
from llmfit.files.paths import Place

__all__ = ["RECORDS", "Record", "check_names"]

FIELD = 2**24  # characters of a cell, and of all lines of a record; a quote that is never closed is given up there
PATIENCE = 2**26  # characters that are read in vain, after which records that are no better are given up sooner
IMPATIENT = 2**12
BLOCK = 2**16
LARGEST = 2**26  # characters of one JSON value, after which a file is taken to be damaged
NO_UTF8 = "it is not UTF-8"
HALF = "it holds half of a surrogate pair, which is no character"
SPACE = re.compile(r"\s*")


class _TwiceError(ValueError):
    """A JSON object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, no key of which hides another."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"it has the key {quoted([name for name in made if names.count(name) > 1][:1])} twice")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class Record(NamedTuple):
    """One row of a file.

    Parameters
    ----------
    line : int or None
        Where it begins, counted from 1; None where a format has no lines.
    values : dict of column to cell
        {} where it cannot be read.
    reason : str
        Why it cannot be read; "" where it can.
    """

    line: int | None
    values: dict[str, Any]
    reason: str = ""


class _EndlessError(csv.Error):
    """A record goes on for longer than one may."""


class _Lines:
    """Lines for a csv.reader, which can be given back: what follows a bad line is read anew."""

    def __init__(self, file: Any) -> None:
        self.file, self.number = file, 0
        self.taken: list[str] = []  # lines of the record that is being read
        self.size = 0  # characters of these
        self.vain = 0  # characters that were given back
        self.back: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.taken and self.size > (FIELD if self.vain < PATIENCE else IMPATIENT):
            raise _EndlessError("field limit")
        line = self.back.pop() if self.back else next(self.file)
        self.number += 1
        self.taken.append(line)
        self.size += len(line)
        return line

    def begin(self) -> int:
        """Begin a record; gives its line."""
        self.taken.clear()
        self.size = 0
        return self.number + 1

    def give_back(self) -> None:
        """Keep the first line of the record only."""
        again = self.taken[1:]
        self.vain += self.size
        self.back += reversed(again)
        self.number -= len(again)


def _delimited(place: Place, delimiter: str) -> Iterator[Record]:
    with place.open() as file:
        lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        rows = _rows(lines, delimiter)
        _, names, why = next(rows, (0, [], "it is empty"))
        header = _header(place, names, why)
        yield Record(None, dict.fromkeys(header))  # the names of the columns, for a file of no rows
        for line, cells, why in rows:
            if not why and len(cells) != len(header):
                why = f"it has {len(cells)} value(s), the header has {len(header)}"
            yield Record(line, {} if why else dict(zip(header, cells, strict=True)), why)


def _header(place: Place, names: list[str], why: str) -> list[str]:
    if why:
        raise DataError(f"{place.name!r} cannot be read: {why}.")
    header = [name or f"Unnamed: {position}" for position, name in enumerate(names)]
    check_names(place, header)
    return header


def check_names(place: Place, names: Sequence[str]) -> None:
    """Refuse a file of which two columns have one name."""
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise DataError(f"{place.name!r} has more than one column named {quoted(repeated)}. Rename or drop one.")


def _rows(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    csv.field_size_limit(max(FIELD, csv.field_size_limit()))  # of the process; the default is too small for documents
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = _csv_words(str(error), len(lines.taken))
            lines.give_back()
            yield line, [], why
            continue
        if cells:  # an empty line is no row
            spoiled = any(not cell.isascii() and _spoiled(cell) for cell in cells)
            yield line, cells, NO_UTF8 if spoiled else ""


def _csv_words(error: str, lines: int) -> str:
    if "field limit" in error:
        return "it has more characters than a row may have, or a quote that is not closed"
    unclosed = lines > 1 or "unexpected end" in error
    return "a quote is opened in it and not closed" if unclosed else "a quoted value goes on behind its closing quote"


def _spoiled(text: str) -> bool:
    """Tell bytes that were no UTF-8, which stand as lone surrogates."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _spoiled_value(value: Any) -> bool:
    """Tell escaped halves of surrogate pairs, in any text of a JSON value: no file could hold them."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if not one.isascii() and _spoiled(one):
                return True
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return False


def _json_lines(place: Place) -> Iterator[Record]:
    with place.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield Record(number, {}, NO_UTF8)
                continue
            if text.strip():
                yield _record(number, text)


def _record(line: int, text: str) -> Record:
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        return Record(line, {}, f"it is no JSON at character {error.pos + 1}: {error.msg}")
    except _TwiceError as error:
        return Record(line, {}, str(error))
    except (RecursionError, ValueError) as error:  # nested without end, or a number of too many digits
        return Record(line, {}, f"it is no JSON that can be read: {type(error).__name__}")
    return _of_value(line, value)


def _of_value(line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(line, {}, "it is no JSON object")
    return Record(line, {}, HALF) if _spoiled_value(value) else Record(line, value)


class _Stream:
    """Text of a JSON file, of which as little is held as one value needs."""

    def __init__(self, place: Place, file: Any) -> None:
        self.place, self.text, self.at, self.ended = place, "", 0, False
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """Line of the next character."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> None:
        """Read on, and let go of what has been read."""
        if len(self.text) - self.at > LARGEST:
            raise self.damaged("a value has no end")
        _ = self.line
        try:  # as much again as there is, so that a long value is not tried too often
            read = self._file.read(max(BLOCK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise self.damaged(NO_UTF8) from error
        self.text, self.at, self._counted, self.ended = self.text[self.at :] + read, 0, 0, not read

    def peek(self) -> str:
        """Next character that is no white space; "" at the end."""
        while True:
            self.at += len(SPACE.match(self.text, self.at)[0])  # type: ignore[index]  # it matches nothing, too
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """Read the next value."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                if self.ended or isinstance(error, RecursionError):
                    raise self.damaged("it is no JSON") from error
                self.more()
            except _TwiceError as error:
                raise self.damaged(str(error)) from error
            except ValueError as error:
                raise self.damaged("a number has too many digits") from error
            else:
                if end < len(self.text) or self.ended:  # a number may go on in what is not read yet
                    self.at = end
                    return value
                self.more()

    def damaged(self, why: str) -> DataError:
        """Refuse the file: where one value is damaged, nobody can say where the next begins."""
        return DataError(f"{self.place.name!r}, line {self.line}: {why}.")


def _json(place: Place) -> Iterator[Record]:
    """Read a list of objects, or objects one behind the other."""
    with place.open() as file:
        stream = _Stream(place, file)
        inside = stream.peek() == "["
        if inside:
            stream.at += 1
        while (char := stream.peek()) and not (inside and char == "]"):
            line = stream.line
            yield _of_value(line, stream.value())
            if inside and stream.peek() == ",":
                stream.at += 1
            elif inside and stream.peek() != "]":
                raise stream.damaged("',' or ']' is missing behind a value")
        if inside:
            if not char:
                raise stream.damaged("the list has no end")
            stream.at += 1
            if stream.peek():
                raise stream.damaged("something stands behind the end of the list")


def _excel(place: Place) -> Iterator[Record]:
    """Read the first sheet, whose first row names the columns."""
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise missing_package("Reading Excel files", "openpyxl", "excel") from error
    with place.open() as file:
        try:
            book = load_workbook(file, read_only=True, data_only=True)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{place.name!r} cannot be read: {reason(error)}.") from error
        rows = enumerate(book.worksheets[0].iter_rows(values_only=True), start=1)
        filled = ((line, cells) for line, cells in rows if any(cell is not None for cell in cells))
        _, first = next(filled, (0, ()))
        while first and first[-1] is None:  # columns that hold nothing but a format
            first = first[:-1]
        header = _header(
            place, ["" if name is None else str(name) for name in first], "" if first else "its first sheet is empty"
        )
        yield Record(None, dict.fromkeys(header))
        for line, cells in filled:
            if any(cell is not None for cell in cells[len(header) :]):
                width = max(number for number, cell in enumerate(cells, start=1) if cell is not None)
                yield Record(line, {}, f"it has {width} value(s), the header has {len(header)}")
            else:
                yield Record(line, dict(zip_longest(header, cells[: len(header)])))


def _unpacked(place: Place) -> Iterator[Record]:
    """Read records, and say what is wrong with a packed file as with any other."""
    try:
        yield from READERS[place.format](place)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{place.name!r} cannot be read: {str(error).rstrip('.')}.") from error


READERS: dict[str, Any] = {
    "csv": lambda place: _delimited(place, ","),
    "tsv": lambda place: _delimited(place, "\t"),
    "jsonl": _json_lines,
    "json": _json,
    "excel": _excel,
}
RECORDS = dict.fromkeys(READERS, _unpacked)
