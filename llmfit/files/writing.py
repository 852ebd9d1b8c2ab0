"""Rows become the bytes of a file, a chunk at a time, so that chunks can be put one behind the other.

Takes columns of values; gives bytes. A Parquet file, whose end says where everything lies, is written as a stream of
Arrow first and made of it at the end. The same values give the same bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError, reason
from llmfit.files.paths import Place

__all__ = ["Writer", "cell_text", "is_binary", "is_infinite", "make_writer", "plain_values"]

GROUP = 2**16  # rows of a row group, in a Parquet file


class Writer(ABC):
    """The form of a file.

    Parameters
    ----------
    kinds : dict of column to str or pyarrow type
        The columns, in their order.
    packed : bool
        Compress by gzip.
    """

    textual = True  # cells that are texts in the input stay as they are
    infinite = True  # there is a form for infinite numbers

    def __init__(self, kinds: Mapping[str, Any], *, packed: bool = False) -> None:
        self.kinds = dict(kinds)
        self.packed = packed

    def head(self) -> bytes:
        """Write what stands before the first row."""
        return b""

    @abstractmethod
    def rows(self, columns: Mapping[str, Sequence[Any]]) -> bytes:
        """Write rows."""

    def pack(self, content: bytes) -> bytes:
        """Compress, where that is wanted; pieces of a packed file may follow one another."""
        return gzip.compress(content, mtime=0) if self.packed and content else content

    finish: Callable[[Path, Path], None] | None = None  # makes the file of its pieces, where they are not yet the file


class _Delimited(Writer):
    delimiter = ","

    def head(self) -> bytes:
        return self._bytes([list(self.kinds)])

    def rows(self, columns: Mapping[str, Sequence[Any]]) -> bytes:
        return self._bytes(zip(*([cell_text(value) for value in columns[name]] for name in self.kinds), strict=True))

    def _bytes(self, rows: Any) -> bytes:
        lines: list[str] = []
        # A cell is quoted for the characters of lineterminator alone, and readers end a line at either of both.
        sink = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
        csv.writer(sink, delimiter=self.delimiter, lineterminator="\r\n").writerows(rows)
        return self.pack("".join(lines).encode("utf-8", "surrogatepass"))


class _Tabbed(_Delimited):
    delimiter = "\t"


class _JsonLines(Writer):
    textual, infinite = False, False

    def rows(self, columns: Mapping[str, Sequence[Any]]) -> bytes:
        rows = zip(*(columns[name] for name in self.kinds), strict=True)
        lines = (
            json.dumps(dict(zip(self.kinds, map(json_value, row), strict=True)), ensure_ascii=False) for row in rows
        )
        return self.pack("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))


class _Parquet(Writer):
    textual = False

    def _schema(self) -> Any:
        import pyarrow as pa

        return pa.schema(
            [(name, getattr(pa, ARROW[k])() if isinstance(k, str) else k) for name, k in self.kinds.items()]
        )

    def rows(self, columns: Mapping[str, Sequence[Any]]) -> bytes:
        import pyarrow as pa

        schema = self._schema()
        arrays = [self._array(field.name, field.type, columns[field.name]) for field in schema]
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, schema) as stream:  # each chunk is a stream of its own
            stream.write_table(pa.table(arrays, schema=schema))
        return sink.getvalue()

    def _array(self, name: str, type_: Any, cells: Sequence[Any]) -> Any:
        import pyarrow as pa

        try:
            return pa.array([self._value(name, value) for value in cells], type=type_)
        except (ValueError, TypeError, OverflowError) as error:  # pyarrow's own are such
            raise DataError(
                f"The column {name!r} holds what a Parquet column of the type {type_} cannot: {reason(error)}. Leave "
                "it out with keep, or write JSONL."
            ) from error

    def _value(self, name: str, value: Any) -> Any:
        kind = self.kinds[name]
        if isinstance(kind, str):
            value = None if is_missing(value) else value
            if kind == "float" and type(value) is int:  # pyarrow takes those of 53 bits alone, also where all are kept
                return float(value)
            return cell_text(value) if kind in ("object", "text") and value is not None else value
        return value

    def finish(self, stored: Path, target: Path) -> None:
        """Make the Parquet file of the streams."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self._schema()
        with pq.ParquetWriter(target, schema) as writer, stored.open("rb") as file:
            held: list[Any] = []
            while file.peek(1):
                held.append(pa.ipc.open_stream(file).read_all())
                if sum(map(len, held)) >= GROUP:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held))


def make_writer(place: Place, kinds: Mapping[str, Any]) -> Writer:
    """Make the writer of a file.

    Parameters
    ----------
    place : Place
    kinds : dict of column to str or pyarrow type
        The columns, in their order; a str is a kind of llmfit.files.KINDS.
    """
    return WRITERS[place.format](kinds, packed=place.packed)


def is_binary(kind: Any) -> bool:
    """Tell a type of pyarrow whose cells are bytes."""
    import pyarrow as pa

    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return isinstance(kind, pa.DataType) and any(is_such(kind) for is_such in of_bytes)


def is_missing(value: Any) -> bool:
    """Tell a gap."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


def is_infinite(value: Any) -> bool:
    """Tell an infinite number."""
    return isinstance(value, float) and math.isinf(value)


def cell_text(value: Any) -> str:
    """Write a value as the cell of a CSV file: nothing for a gap, numbers to their last digit, lists as JSON."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, list | tuple | dict | set | frozenset | np.ndarray):
        return json.dumps(json_value(value), ensure_ascii=False)
    return str(value)


def json_value(value: Any) -> Any:
    """Write a value as JSON can hold it; what it has no form for, a date or Infinity for example, as text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return INFINITE.get(value, value) if value == value else None
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(json_value, value), key=str)
    if isinstance(value, list | tuple):
        return list(map(json_value, value))
    return None if is_missing(value) else str(value)


def plain_values(column: Any) -> list[Any]:
    """Take the values of a Series as Python's, None for a gap."""
    values = pd.Series(column).astype(object).tolist()
    return [None if is_missing(value) else value for value in values]


INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}  # as JavaScript and Python write them where JSON ends
ARROW = {"int": "int64", "float": "float64", "bool": "bool_", "text": "string", "object": "string"}
WRITERS: dict[str, type[Writer]] = {"csv": _Delimited, "tsv": _Tabbed, "jsonl": _JsonLines, "parquet": _Parquet}
