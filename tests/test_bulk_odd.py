"""Scoring files: places that are not there yet, and values that not every format has a form for."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_model
import pandas as pd
import pytest

import llmfit
from llmfit.exceptions import DataError
from llmfit.files import Place, make_writer, read_table


class Full(io.BytesIO):
    """A disk without room."""

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake_model.put_in_place(monkeypatch)
    frame = pd.DataFrame({"size": range(10), "label": ["low", "high"] * 5})
    return llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "in.csv").write_text("id,size\na,1\nb,x\nc,3\n")
    return tmp_path / "in.csv"


class TestStandardOutput:
    def test_the_folder_of_the_errors_is_made(self, fake: Any, table: Path, capfdbinary: Any) -> None:
        errors = table.parent / "not" / "there" / "bad.csv"
        scored = fake.predict_files(table, "-", keep=["id"], errors=errors)
        assert (scored.rows, scored.bad_rows, scored.errors) == (3, 1, str(errors))
        assert [line[:1] for line in capfdbinary.readouterr().out.splitlines()] == [b"r", b"0", b"2"]
        assert pd.read_csv(errors)["row"].tolist() == [1]

    def test_what_cannot_be_written_is_named_without_advice_to_resume(
        self, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
    ) -> None:
        errors = table.parent / "bad.csv"
        denied = PermissionError(errno.EACCES, "Permission denied", str(errors))

        def refuse(*_: Any, **__: Any) -> Any:
            raise denied

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", refuse)
            with pytest.raises(DataError) as caught:
                fake.predict_files(table, "-", errors=errors)
        assert str(caught.value) == f"{str(errors)!r} cannot be written: Permission denied."
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=Full()))
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, "-", errors=errors)
        assert str(caught.value) == "The output cannot be written: No space left on device."


class TestInfinite:
    """JSON has no infinite numbers: they stand there as text, and none becomes a gap."""

    def test_a_text_of_csv_stays_as_it_stands(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.csv").write_text("size,v\n1,inf\n2,1.5\n3,-Infinity\n4,1e999\n5,\n")
        fake.predict_files(tmp_path / "in.csv", tmp_path / "out.jsonl")
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line)["v"] for line in lines] == ["inf", 1.5, "-Infinity", "1e999", None]
        fake.predict_files(tmp_path / "in.csv", tmp_path / "out.parquet")
        assert read_table(tmp_path / "out.parquet")["v"].tolist()[:4] == [
            float("inf"),
            1.5,
            float("-inf"),
            float("inf"),
        ]

    @pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
    def test_a_number_of_another_file_becomes_one(self, source: str, fake: Any, tmp_path: Path) -> None:
        if source == "in.jsonl":
            (tmp_path / source).write_text(
                '{"size": 1, "v": Infinity}\n{"size": 2, "v": -Infinity}\n'
                '{"size": 3, "v": NaN}\n{"size": 4, "v": 2.5}\n'
            )
        else:
            values = [float("inf"), float("-inf"), None, 2.5]
            pd.DataFrame({"size": [1, 2, 3, 4], "v": values}).to_parquet(tmp_path / source)
        fake.predict_files(tmp_path / source, tmp_path / "out.jsonl")
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line, parse_constant=pytest.fail)["v"] for line in lines] == [
            "Infinity", "-Infinity", None, 2.5,
        ]  # fmt: skip

    def test_also_within_a_list(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"size": 1, "v": [1, Infinity, {"a": -Infinity}]}\n')
        for name in ("out.jsonl", "out.csv", "out.parquet"):
            fake.predict_files(tmp_path / "in.jsonl", tmp_path / name)
            cell = read_table(tmp_path / name)["v"][0]
            assert (cell if name == "out.jsonl" else json.loads(cell)) == [1, "Infinity", {"a": "-Infinity"}]

    def test_reads_as_the_number_where_numbers_were_fitted(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"v": Infinity}\n{"v": 0.5}\n')
        writer = make_writer(Place("o.jsonl", "jsonl", False), {"v": "float"})
        (tmp_path / "again.jsonl").write_bytes(writer.rows({"v": [float("inf"), 0.5]}))
        both = [read_table(tmp_path / f"{name}.jsonl", kinds={"v": "float"}) for name in ("in", "again")]
        pd.testing.assert_frame_equal(*both)


class TestWideNumbers:
    """A Parquet column of floats does not hold every whole number to its last digit."""

    ROWS = '{"size": 1, "v": 9007199254740993}\n{"size": 2, "v": 1.5}\n{"size": 3, "v": null}\n'

    def test_a_column_that_needs_more_is_text(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(self.ROWS)
        fake.predict_files(tmp_path / "in.jsonl", tmp_path / "out.parquet", chunk_rows=1)
        values = read_table(tmp_path / "out.parquet")["v"].tolist()
        assert values[:2] == ["9007199254740993", "1.5"]
        assert pd.isna(values[2])
        fake.predict_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        assert '"v": 9007199254740993,' in (tmp_path / "out.jsonl").read_text()
        assert read_table(tmp_path / "in.jsonl")["v"].dtype == "float64"  # as ever, where it is read to learn from

    @pytest.mark.parametrize("wide", [2**53, 2**60, -(2**63)])
    def test_one_that_floats_hold_is_a_number(self, wide: int, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(self.ROWS.replace("9007199254740993", str(wide)))
        fake.predict_files(tmp_path / "in.jsonl", tmp_path / "out.parquet")
        assert read_table(tmp_path / "out.parquet")["v"].tolist()[:2] == [float(wide), 1.5]

    def test_beyond_64_bits_beside_fractions(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(self.ROWS.replace("9007199254740993", "1" + "0" * 400))
        fake.predict_files(tmp_path / "in.jsonl", tmp_path / "out.parquet")
        assert read_table(tmp_path / "out.parquet")["v"].tolist()[:2] == ["1" + "0" * 400, "1.5"]

    def test_whatever_else_a_column_cannot_hold_is_said_with_its_name(self) -> None:
        writer = make_writer(Place("o.parquet", "parquet", False), {"size": "int"})
        with pytest.raises(DataError) as caught:
            writer.rows({"size": [1, "x"]})
        assert str(caught.value).startswith("The column 'size' holds what a Parquet column of the type int64 cannot: ")
        assert str(caught.value).endswith(". Leave it out with keep, or write JSONL.")
        with pytest.raises(DataError, match="The column 'size' holds what a Parquet column of the type int64 cannot: "):
            writer.rows({"size": [2**70]})
