"""Tables in files: what is read does not depend on where a chunk begins, and nothing bad goes by in silence."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies

from llmfit.exceptions import DataError, ParameterError

from llmfit.files import records  # isort: skip
from llmfit.files import find_inputs, find_output, make_writer, open_source, plain_values, read_table
from llmfit.files.types import MISSING

FRAME = pd.DataFrame(
    {
        "text": ["one", 'with "quotes", commas', "two\nlines", "ünï→", None],
        "number": [1, 2, 3, 4, 5],
        "real": [0.1, 2.0, None, 1e300, -3.5],
        "gappy": pd.array([1, None, 2**60, 4, 5], dtype="Int64"),
        "truth": [True, False, True, True, False],
    }
)


def write(frame: pd.DataFrame, path: Path) -> Path:
    bare = path.name.removesuffix(".gz")
    if bare.endswith((".csv", ".tsv")):
        frame.to_csv(path, index=False, sep="," if bare.endswith(".csv") else "\t")
    elif bare.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=bare.endswith(".jsonl"), double_precision=15)
    return path


NAMES = ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet", "t.csv.gz", "t.jsonl.gz"]


class TestReading:
    @pytest.mark.parametrize("name", NAMES)
    def test_gives_the_frame_that_was_written(self, name: str, tmp_path: Path) -> None:
        read = read_table(write(FRAME, tmp_path / name))
        pd.testing.assert_frame_equal(read, FRAME.astype({"text": "str"}))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_chunks_are_the_whole_at_every_size_and_start(self, name: str, size: int, tmp_path: Path) -> None:
        path = write(FRAME, tmp_path / name)
        whole = read_table(path)
        for start in (0, 1, 4, 5):
            frames = [chunk.frame for chunk in open_source(path).chunks(size, start=start)]
            assert [len(frame) for frame in frames[:-1]] == [size] * (len(frames) - 1)
            rows = pd.concat(frames) if frames else whole[:0]
            pd.testing.assert_frame_equal(rows, whole[start:], check_index_type=False)

    @pytest.mark.parametrize(
        ("cells", "kind", "values"),
        [
            (["1", "2", "x"], "text", ["1", "2", "x"]),
            (["007", "1", "2"], "text", ["007", "1", "2"]),
            (["0", "-1", "+2"], "int", [0, -1, 2]),
            (["1", "", "3"], "int", [1, None, 3]),
            (["1", "2.5", "3"], "float", [1.0, 2.5, 3.0]),
            (["1", "inf", "-1e-3"], "float", [1.0, np.inf, -0.001]),
            (["true", "False", "NA"], "bool", [True, False, None]),
            (["true", "1", "0"], "text", ["true", "1", "0"]),
            (["", "NA", "None"], "float", [None, None, None]),
            (["9223372036854775808", "1", "2"], "text", ["9223372036854775808", "1", "2"]),
            (["0.5", ".5", "1e5"], "float", [0.5, 0.5, 1e5]),
            (["00.5", "1.5", "2.5"], "text", ["00.5", "1.5", "2.5"]),
        ],
    )
    def test_types_come_of_all_cells(self, cells: list[str], kind: str, values: list[Any], tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("id,cell\n" + "".join(f"i,{cell}\n" for cell in cells))
        source = open_source(tmp_path / "t.csv")
        assert source.kinds["cell"] == kind
        chunks = list(source.chunks(1))
        assert [value for chunk in chunks for value in plain_values(chunk.frame["cell"])] == values
        assert [cell for chunk in chunks for cell in chunk.cells["cell"]] == cells  # as they stand in the file

    def test_missing_values_are_those_of_pandas(self) -> None:
        from pandas._libs.parsers import STR_NA_VALUES

        assert MISSING == STR_NA_VALUES

    @settings(max_examples=60, deadline=None)
    @given(
        strategies.lists(
            strategies.tuples(
                strategies.text("ab,\"\n' \t1.é", max_size=6),
                strategies.integers(-(10**20), 10**20),
                strategies.floats(),
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_reads_as_pandas_does(self, tmp_path_factory: Any, rows: list[tuple[str, int, float]]) -> None:
        path = tmp_path_factory.mktemp("rows") / "t.csv"
        frame = pd.DataFrame([(f"x{text}", number % 2**62, real) for text, number, real in rows], columns=list("abc"))
        frame.to_csv(path, index=False)
        expected = pd.read_csv(path)
        read = read_table(path)
        assert read["a"].tolist() == expected["a"].tolist()
        assert read["b"].tolist() == expected["b"].tolist()
        np.testing.assert_array_equal(read["c"].to_numpy(float), expected["c"].to_numpy(float))
        np.testing.assert_array_equal(read["c"].to_numpy(float), frame["c"].to_numpy())

    def test_several_files_are_one_table(self, tmp_path: Path) -> None:
        write(FRAME[:2], tmp_path / "b.csv")
        write(FRAME[2:], tmp_path / "c.csv")
        pd.testing.assert_frame_equal(read_table(tmp_path / "*.csv"), FRAME.astype({"text": "str"}))
        write(FRAME[["truth", "text", "number", "gappy", "real"]][2:], tmp_path / "c.csv")  # in another order
        again = read_table([tmp_path / "b.csv", tmp_path / "c.csv"])
        pd.testing.assert_frame_equal(again, FRAME.astype({"text": "str"}))

    def test_objects_may_lack_keys(self, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n{"b": [1, "x"]}\n{"a": 3, "b": null}\n')
        read = read_table(tmp_path / "t.jsonl")
        assert plain_values(read["a"]) == [1, None, 3]
        assert plain_values(read["b"]) == [None, [1, "x"], None]

    def test_json_values_keep_their_types(self, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text('{"a": "007", "b": 1, "c": 1}\n{"a": "8", "b": "x", "c": 2.5}\n')
        read = read_table(tmp_path / "t.jsonl")
        assert read["a"].tolist() == ["007", "8"]
        assert read["b"].tolist() == [1, "x"]
        assert read["c"].tolist() == [1.0, 2.5]

    def test_a_long_json_list_is_read_piece_by_piece(self, tmp_path: Path) -> None:
        rows = [{"a": i, "b": "é" * (i % 90)} for i in range(9000)]
        (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
        read = read_table(tmp_path / "t.json")
        assert read["a"].tolist() == list(range(9000))
        assert read["b"].str.len().tolist() == [i % 90 for i in range(9000)]

    def test_objects_behind_one_another_are_rows_as_well(self, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text('{"a":\n 1}\n{"a": 2} {"a": 3}')
        assert read_table(tmp_path / "t.json")["a"].tolist() == [1, 2, 3]

    def test_the_index_of_a_parquet_file_is_no_column_unless_it_has_a_name(self, tmp_path: Path) -> None:
        frame = pd.DataFrame({"a": [1, 2]}, index=["x", "y"])
        frame.to_parquet(tmp_path / "t.parquet")
        assert read_table(tmp_path / "t.parquet").columns.tolist() == ["a"]
        frame.rename_axis("id").to_parquet(tmp_path / "t.parquet")
        assert sorted(read_table(tmp_path / "t.parquet").columns) == ["a", "id"]

    def test_standard_input_is_read_twice_from_its_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a,b\n1,x\n2,y\n")))
        assert read_table("-").to_dict("list") == {"a": [1, 2], "b": ["x", "y"]}
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 5}\n')))
        assert read_table("-", format="jsonl").to_dict("list") == {"a": [5]}

    def test_a_byte_order_mark_is_no_part_of_a_name(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfa\r\n1\r\n")
        assert read_table(tmp_path / "t.csv").to_dict("list") == {"a": [1]}

    def test_excel_needs_its_reader(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        (tmp_path / "t.xlsx").write_bytes(b"")
        with pytest.raises(ParameterError) as caught:
            read_table(tmp_path / "t.xlsx")
        wanted = "Reading Excel files needs openpyxl. Install it with: pip install 'llmfit[excel]'."
        assert str(caught.value) == wanted

    def test_excel(self, tmp_path: Path) -> None:
        pytest.importorskip("openpyxl")
        frame = FRAME.drop(columns=["gappy"]).assign(code="007")
        frame.to_excel(tmp_path / "t.xlsx", index=False)
        pd.testing.assert_frame_equal(read_table(tmp_path / "t.xlsx"), frame.astype({"text": "str", "code": "str"}))


class TestBadRows:
    CSV = b'a,b\n1,x\n2\n3,"open\n4,z\n5,"q"r\n6,\xff\n7,"two\nlines"\n8,y,9\n9,w\n'

    def test_each_costs_itself_alone_and_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(self.CSV)
        for size in (1, 2, 100):
            chunks = list(open_source(tmp_path / "t.csv").chunks(size))
            rows = [row for chunk in chunks for row in chunk.frame.itertuples()]
            assert rows == [(0, 1, "x"), (3, 4, "z"), (6, 7, "two\nlines"), (8, 9, "w")]
            bad = [(row.row, row.file, row.line, row.reason) for chunk in chunks for row in chunk.bad]
            assert bad == [
                (1, "t.csv", 3, "it has 1 value(s), the header has 2."),
                (2, "t.csv", 4, "a quote is opened in it and not closed."),
                (4, "t.csv", 6, "a quoted value goes on behind its closing quote."),
                (5, "t.csv", 7, "it is not UTF-8."),
                (7, "t.csv", 10, "it has 3 value(s), the header has 2."),
            ]

    def test_a_long_cell_is_one_cell(self, tmp_path: Path) -> None:
        document = "a line, with a comma\n" * 2**16
        pd.DataFrame({"id": [7, 8], "text": [document, "short"]}).to_csv(tmp_path / "t.csv", index=False)
        (chunk,) = open_source(tmp_path / "t.csv").chunks(100)
        assert (chunk.frame["text"].tolist(), list(chunk.bad)) == ([document, "short"], [])

    def test_a_cell_without_end_costs_its_row_and_says_how_long_one_may_be(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text('id,text\n1,"' + "x" * (2**24 + 1) + '"\n2,y\n')
        (chunk,) = open_source(tmp_path / "t.csv").chunks(100)
        assert chunk.frame["text"].tolist() == ["y"]
        assert [(row.row, row.reason) for row in chunk.bad] == [
            (0, "it has more characters than a row may have, or a quote that is not closed.")
        ]

    def test_quotes_that_never_close_cost_little_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each line alone opens a quote that the next one closes and opens again."""
        monkeypatch.setattr(records, "PATIENCE", 2**16)
        monkeypatch.setattr(records, "IMPATIENT", 2**8)
        (tmp_path / "t.csv").write_text("a,b\n" + 'x","y\n' * 3000 + "last,one\n")
        read = []
        line = records._Lines.__next__
        monkeypatch.setattr(records._Lines, "__next__", lambda lines: read.append(1) or line(lines))
        chunks = list(open_source(tmp_path / "t.csv").chunks(1000))
        assert len(read) < 3000 * 100
        assert sum(len(chunk.bad) for chunk in chunks) == 3000
        assert chunks[-1].frame["a"].tolist() == ["last"]

    def test_lines_of_json(self, tmp_path: Path) -> None:
        lines = [b'{"a": 1}', b'{"a": ', b"[1]", b"\xff", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a": 7}']
        (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
        (chunk,) = open_source(tmp_path / "t.jsonl").chunks(100)
        assert chunk.frame["a"].to_dict() == {0: 1, 6: 7}
        assert [(row.row, row.line) for row in chunk.bad] == [(i, i + 1) for i in range(1, 6)]
        assert [row.reason for row in chunk.bad[:3]] == [
            "it is no JSON at character 7: Expecting value.",
            "it is no JSON object.",
            "it is not UTF-8.",
        ]

    def test_cells_of_excel_beside_the_last_column(self, tmp_path: Path) -> None:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for cells in (["a", "b"], [1, "x"], [2, "y", None, "z"], [3, None]):
            book.active.append(cells)
        book.save(tmp_path / "t.xlsx")
        (chunk,) = open_source(tmp_path / "t.xlsx").chunks(100)
        assert chunk.frame["a"].to_dict() == {0: 1, 2: 3}
        assert [(row.row, row.line, row.reason) for row in chunk.bad] == [
            (1, 3, "it has 4 value(s), the header has 2.")
        ]

    @pytest.mark.parametrize("row", ['{"a": 1, "b": 2, "a": 3}', '{"b": [{"a": 1, "a": 1}]}'])
    def test_a_key_twice_in_an_object_of_json(self, row: str, tmp_path: Path) -> None:
        for name in ("t.jsonl", "t.json"):
            (tmp_path / name).write_text(f'{{"a": 0}}\n{row}\n{{"a": 4}}\n')
        (chunk,) = open_source(tmp_path / "t.jsonl").chunks(100)
        assert chunk.frame["a"].to_dict() == {0: 0, 2: 4}
        assert [(row.row, row.line, row.reason) for row in chunk.bad] == [(1, 2, "it has the key 'a' twice.")]
        with pytest.raises(DataError) as caught:
            read_table(tmp_path / "t.json")
        assert str(caught.value) == f"'{tmp_path}/t.json', line 2: it has the key 'a' twice."

    def test_a_whole_table_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(self.CSV)
        with pytest.raises(DataError) as caught:
            read_table(tmp_path / "t.csv")
        assert str(caught.value) == "'t.csv', line 3: it has 1 value(s), the header has 2."


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"", "'{}' cannot be read: it is empty."),
        ("t.csv", b"a,b,a\n", "'{}' has more than one column named 'a'. Rename or drop one."),
        ("t.json", b'[{"a": 1},\n{"a": }]', "'{}', line 2: it is no JSON."),
        ("t.json", b'[{"a": 1}\n{"a": 2}]', "'{}', line 2: ',' or ']' is missing behind a value."),
        ("t.json", b'[{"a": 1}', "'{}', line 1: ',' or ']' is missing behind a value."),
        ("t.json", b'[{"a": 1},', "'{}', line 1: the list has no end."),
        ("t.csv.gz", b"no gzip", "'{}' cannot be read: Not a gzipped file (b'no')."),
        (
            "t.csv.gz",
            gzip.compress(b"a\n" + b"1\n" * 99, mtime=0)[:-9],
            "'{}' cannot be read: Compressed file ended before the end-of-stream marker was reached.",
        ),
        (
            "t.parquet",
            b"none",
            "'{}' cannot be read: Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes).",
        ),
        (
            "t.txt",
            b"",
            "'{}' has no suffix of a known format: '.csv', '.tsv', '.tab', '.jsonl', '.ndjson', '.json', "
            "'.parquet', '.pq', '.xlsx', each of the first 6 also with '.gz'. Rename it, or name the format.",
        ),
        ("t.parquet.gz", b"", "'{}' cannot be read: parquet is compressed by itself. Unpack it."),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name)
    assert str(caught.value) == sentence.format(tmp_path / name)


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    write(FRAME, tmp_path / "a.csv")
    write(FRAME, tmp_path / "b.jsonl")
    write(FRAME[["text"]], tmp_path / "c.csv")
    cases = {
        f"'{tmp_path}/no.csv' cannot be read: there is no such file.": f"{tmp_path}/no.csv",
        f"'{tmp_path}/no*.csv' matches no file.": f"{tmp_path}/no*.csv",
        f"'{tmp_path}' is a folder. Name its files: '{tmp_path}/*.csv'.": tmp_path,
        "The files have several formats, 'csv', 'jsonl'. Read those of one format at a time.": f"{tmp_path}/[ab].*",
        "Standard input can be read once, but '-' stands among the files more than once.": ["-", "-"],
    }
    for sentence, named in cases.items():
        with pytest.raises(DataError) as caught:
            find_inputs(named)
        assert str(caught.value) == sentence
    with pytest.raises(DataError) as caught:
        read_table(f"{tmp_path}/[ac].csv")
    assert str(caught.value) == (
        f"'{tmp_path}/c.csv' has the columns 'text', but '{tmp_path}/a.csv' has 'text', 'number', 'real', 'gappy', "
        "'truth'. Files that are read together must have the same."
    )
    with pytest.raises(ParameterError) as wrong:
        find_inputs(7)
    assert str(wrong.value) == (
        "The 'inputs' parameter of predict_files must be a path, a glob or a list of them. Got 7 instead."
    )
    with pytest.raises(ParameterError) as wrong:
        find_output("x.json")
    assert str(wrong.value) == (
        "'x.json' cannot be written: its name must end in one of '.csv', '.tsv', '.tab', '.jsonl', '.ndjson', "
        "'.parquet', '.pq', each of the first 5 also with '.gz'."
    )


COLUMNS = {
    "text": ["a,b", 'say "x"', None, ""],
    "n": [1, None, 3, 4],
    "r": [0.1, float("nan"), 1e-9, 2.0],
    "o": [["x", 1], {"k": 1.5}, datetime.date(2024, 1, 2), None],
}
KINDS = {"text": "text", "n": "int", "r": "float", "o": "object"}


class TestWriting:
    def written(self, name: str, tmp_path: Path) -> bytes:
        place = find_output(tmp_path / name)
        writer = make_writer(place, KINDS)
        first = {key: values[:1] for key, values in COLUMNS.items()}
        rest = {key: values[1:] for key, values in COLUMNS.items()}
        content = writer.head() + writer.rows(first) + writer.rows({key: [] for key in first}) + writer.rows(rest)
        if writer.finish is None:
            place.path.write_bytes(content)
        else:
            (tmp_path / "stored").write_bytes(content)
            writer.finish(tmp_path / "stored", place.path)
        return place.path.read_bytes()

    def test_csv(self, tmp_path: Path) -> None:
        content = self.written("t.csv", tmp_path)
        assert content == (
            b'text,n,r,o\n"a,b",1,0.1,"[""x"", 1]"\n"say ""x""",,,"{""k"": 1.5}"\n,3,1e-09,2024-01-02\n,4,2.0,\n'
        )
        assert gzip.decompress(self.written("t.csv.gz", tmp_path)) == content
        assert self.written("t.csv.gz", tmp_path) == self.written("t.csv.gz", tmp_path)  # no time of day in it

    @pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
    def test_a_carriage_return_stays_in_its_cell(self, name: str, tmp_path: Path) -> None:
        columns = {"a\r": ["x\ry", "\r", "x\r\ny", "\ny"], "b": ["1\r", "z", "", "w"]}
        place = find_output(tmp_path / name)
        writer = make_writer(place, dict.fromkeys(columns, "text"))
        place.path.write_bytes(writer.head() + writer.rows(columns))
        read = read_table(place.path)
        assert {key: plain_values(read[key]) for key in read} == columns | {"b": ["1\r", "z", None, "w"]}

    def test_jsonl(self, tmp_path: Path) -> None:
        rows = [json.loads(line) for line in self.written("t.jsonl", tmp_path).splitlines()]
        assert rows == [
            {"text": "a,b", "n": 1, "r": 0.1, "o": ["x", 1]},
            {"text": 'say "x"', "n": None, "r": None, "o": {"k": 1.5}},
            {"text": None, "n": 3, "r": 1e-9, "o": "2024-01-02"},
            {"text": "", "n": 4, "r": 2.0, "o": None},
        ]

    def test_parquet(self, tmp_path: Path) -> None:
        self.written("t.parquet", tmp_path)
        read = pd.read_parquet(tmp_path / "t.parquet", dtype_backend="numpy_nullable")
        assert plain_values(read["n"]) == [1, None, 3, 4]
        assert plain_values(read["text"]) == ["a,b", 'say "x"', None, ""]
        assert plain_values(read["r"]) == [0.1, None, 1e-9, 2.0]
        assert plain_values(read["o"]) == ['["x", 1]', '{"k": 1.5}', "2024-01-02", None]

    def test_parquet_of_no_rows_has_its_columns(self, tmp_path: Path) -> None:
        (tmp_path / "none").write_bytes(b"")
        make_writer(find_output("t.parquet"), KINDS).finish(tmp_path / "none", tmp_path / "t.parquet")
        assert pd.read_parquet(tmp_path / "t.parquet").columns.tolist() == list(KINDS)


class TestOddFiles:
    """Files that are almost right."""

    def sentence(self, path: Any) -> str:
        with pytest.raises(DataError) as caught:
            read_table(path)
        return str(caught.value)

    HALVES = '{"a": "x"}\n{"a": "\\ud800"}\n{"b": [1, {"k": ["\\udc00!"]}]}\n{"\\ud83d": 1}\n{"a": "\\ud83d\\ude00"}\n'

    @pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
    def test_half_a_surrogate_pair_makes_a_bad_row(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(self.HALVES)
        (chunk,) = open_source(tmp_path / name).chunks(100)
        assert chunk.frame["a"].to_dict() == {0: "x", 4: "😀"}
        assert [(row.row, row.line, row.reason) for row in chunk.bad] == [
            (i, i + 1, "it holds half of a surrogate pair, which is no character.") for i in (1, 2, 3)
        ]
        assert self.sentence(tmp_path / name) == (
            f"'{name}', line 2: it holds half of a surrogate pair, which is no character."
        )

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            (
                "t.jsonl",
                "x\ny\n",
                "'t.jsonl', line 1: it is no JSON at character 1: Expecting value. No other row can be read, either.",
            ),
            ("t.jsonl", "{}\n{}\n", "'{}' has 2 row(s), but no columns."),
            ("t.jsonl", "", "'{}' has no rows, and so no columns."),
            ("t.json", "[]", "'{}' has no rows, and so no columns."),
            ("t.json", '[{"a": ' + "9" * 5000 + "}]", "'{}', line 1: a number has too many digits."),
        ],
    )
    def test_no_columns(self, name: str, content: str, sentence: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        assert self.sentence(tmp_path / name) == sentence.replace("{}", str(tmp_path / name))

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ('[{"a": 1}, {"a": 2}]\n[{"a": 3}]', "line 2: something stands behind the end of the list."),
            ('[{"a": 1}] ]', "line 1: something stands behind the end of the list."),
            ('{"a": 1}\n]\n{"a": 2}', "line 2: it is no JSON."),
        ],
    )
    def test_what_follows_the_end_of_a_list_of_json(self, content: str, sentence: str, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text(content)
        assert self.sentence(tmp_path / "t.json") == f"'{tmp_path}/t.json', {sentence}"

    def test_a_number_of_too_many_digits_is_text_in_csv(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("a\n" + "9" * 5000 + "\n")
        assert read_table(tmp_path / "t.csv")["a"].tolist() == ["9" * 5000]

    @pytest.mark.parametrize("first", ["", "\n", '{"a": 0}\n'])
    @pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
    def test_a_byte_order_mark_is_no_part_of_json(self, name: str, first: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f'{first}{{"a": 1}}\n{{"a": 2}}\n'.encode())
        assert read_table(tmp_path / name)["a"].tolist()[-2:] == [1, 2]

    def test_parquet_of_two_columns_of_one_name(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "b", "a"])
        pq.write_table(table, tmp_path / "t.parquet")
        assert self.sentence(tmp_path / "t.parquet") == (
            f"'{tmp_path}/t.parquet' has more than one column named 'a'. Rename or drop one."
        )

    @pytest.mark.parametrize("turn", [1, -1])
    def test_parquet_of_texts_of_two_sizes(self, turn: int, tmp_path: Path) -> None:
        for name, kind in (("p1", pa.string()), ("p2", pa.large_string())):
            pq.write_table(pa.table({"a": pa.array([name, None], kind), "n": [1, 2]}), tmp_path / f"{name}.parquet")
        source = open_source([tmp_path / f"{name}.parquet" for name in ("p1", "p2")[::turn]])
        assert [plain_values(chunk.frame["a"]) for chunk in source.chunks(3)] == [
            [["p1", None, "p2"], [None]],
            [["p2", None, "p1"], [None]],
        ][turn < 0]
        assert source.kinds["a"] == pa.string()
