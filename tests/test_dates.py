"""A date reads alike in a prompt, whether it comes as a value, as a text or out of a file."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

import llmfit
from llmfit.estimators.answering import answered
from llmfit.estimators.filing import read_as
from llmfit.exceptions import DataError, ParameterError, TemplateError, TruncationWarning
from llmfit.files import read_table

EAST = timezone(timedelta(hours=1))
# Columns, and how each of their values reads.
COLUMNS: dict[str, tuple[Any, list[str]]] = {
    "days": (pd.to_datetime(["2024-01-31", "2023-12-01"]), ["2024-01-31", "2023-12-01"]),
    "days with a gap": (pd.to_datetime(["2024-01-31", None]), ["2024-01-31", ""]),
    "times": (
        pd.to_datetime(["2024-01-31 12:30", "2024-02-01 00:00"]),
        ["2024-01-31 12:30:00", "2024-02-01 00:00:00"],
    ),
    "fractions": (
        pd.to_datetime(["2024-01-31 12:30:00.25", "2024-02-01 00:00"], format="ISO8601"),
        ["2024-01-31 12:30:00.250000", "2024-02-01 00:00:00"],
    ),
    "zoned": (
        pd.to_datetime(["2024-01-31", "2024-02-01"]).tz_localize(EAST),
        ["2024-01-31 00:00:00+01:00", "2024-02-01 00:00:00+01:00"],
    ),
    "date": ([date(2024, 1, 31), date(1, 1, 1)], ["2024-01-31", "0001-01-01"]),
    "datetime": ([datetime(2024, 1, 31, 12, 30, tzinfo=UTC), None], ["2024-01-31 12:30:00+00:00", ""]),
    "datetime64": (
        np.array([np.datetime64("2024-01-31T12:30"), np.datetime64("2024-01-31")], dtype=object),
        ["2024-01-31 12:30:00", "2024-01-31 00:00:00"],
    ),
    "seconds": (np.array(["2024-01-31", "0900-01-01"], dtype="datetime64[s]"), ["2024-01-31", "0900-01-01"]),
}
WAYS = ["csv", "tsv", "jsonl", "parquet", "xlsx"]


def rows(column: Any) -> pd.DataFrame:
    values = pd.Series(column) if not isinstance(column, list) else pd.Series(column, dtype=object)
    return pd.DataFrame({"day": pd.concat([values] * 3, ignore_index=True), "label": list("ababab")})


def prompts(clf: Any, frame: pd.DataFrame) -> list[str]:
    return clf.preview(frame)["prompt"].tolist()


@pytest.fixture
def make(settings: Any) -> Any:
    def made(column: Any, **more: Any) -> Any:
        own = {**settings, "target": "label", "template": "{day}", "adapter": None, **more}
        return llmfit.LLMClassifier(**own).fit(rows(column))

    return made


def write(frame: pd.DataFrame, path: Path) -> Path:
    """Write rows as pandas writes them."""
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True, date_format="iso")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_excel(path, index=False)
    return path


class TestPrompts:
    @pytest.mark.parametrize("name", COLUMNS)
    def test_dates_read_as_iso_8601(self, make: Any, name: str) -> None:
        column, texts = COLUMNS[name]
        clf = make(column)
        assert prompts(clf, rows(column))[:2] == texts
        assert clf.features_["day"] == "date"

    @pytest.mark.parametrize("name", [name for name in COLUMNS if name != "datetime64"])  # which no writer knows
    @pytest.mark.parametrize("way", WAYS)
    def test_and_from_any_file(self, make: Any, name: str, way: str, tmp_path: Path) -> None:
        pytest.importorskip("openpyxl" if way == "xlsx" else "pyarrow")
        column, texts = COLUMNS[name]
        frame = rows(column)
        if way == "xlsx" and ("+" in texts[0] or texts[1].startswith("0")):
            pytest.skip("Excel has no zones, and no years before 1900")
        if way == "jsonl" and name == "zoned":
            texts = ["2024-01-30 23:00:00+00:00", "2024-01-31 23:00:00+00:00"]  # so pandas writes it
        clf = make(column)
        path = write(frame, tmp_path / f"rows.{way}")
        assert prompts(clf, read_as(clf, path))[:2] == texts

    def test_texts_read_as_dates_where_dates_were_learned(self, make: Any) -> None:
        days, times = make(COLUMNS["days"][0]), make(COLUMNS["times"][0])
        given = rows(["2024-01-31", "2024-02-01T09:00:00Z"])
        assert prompts(days, given)[:2] == ["2024-01-31", "2024-02-01 09:00:00+00:00"]
        assert prompts(times, given)[:2] == ["2024-01-31 00:00:00", "2024-02-01 09:00:00+00:00"]

    def test_dates_read_as_days_where_texts_were_learned(self, make: Any) -> None:
        clf = make(["2024-01-31", "2024-02-01"])
        assert clf.features_["day"] != "date"
        assert prompts(clf, rows(COLUMNS["days"][0]))[:2] == ["2024-01-31", "2023-12-01"]

    def test_a_declared_date_takes_texts(self, make: Any) -> None:
        clf = make(["2024-01-31T12:30", "2024-02-01 00:00:00"], features={"day": "date"})
        assert prompts(clf, rows(COLUMNS["times"][0]))[:2] == ["2024-01-31 12:30:00", "2024-02-01 00:00:00"]

    def test_a_date_in_a_column_with_times_reads_as_from_a_file(self, make: Any, tmp_path: Path) -> None:
        clf = make(COLUMNS["times"][0])
        given = rows([date(2024, 1, 31), datetime(2024, 1, 31, 12, 30)])
        assert prompts(clf, given)[:2] == ["2024-01-31 00:00:00", "2024-01-31 12:30:00"]
        days = rows([date(2024, 1, 31), date(2024, 2, 1)])
        for way in ("csv", "parquet"):
            assert prompts(clf, read_as(clf, write(days, tmp_path / f"rows.{way}"))) == prompts(clf, days)

    def test_true_answers_may_have_another_name(self, settings: Any) -> None:
        due = pd.Series(COLUMNS["times"][0], name="due")
        frame = pd.DataFrame({"text": ["a", "b"]})
        gen = llmfit.LLMGenerator(**{**settings, "target": "due", "adapter": None}).fit(frame.assign(due=due))
        one, other = gen.preview(frame, y=due), gen.preview(frame, y=due.rename("truth"))
        assert one["completion"].tolist() == other["completion"].tolist()
        assert "00:00:00" in one["completion"].iloc[1]

    def test_what_other_rows_hold_changes_nothing(self, make: Any) -> None:
        clf, frame = make(COLUMNS["times"][0]), rows(COLUMNS["times"][0])
        assert prompts(clf, frame[1:2]) == prompts(clf, frame)[1:2]

    def test_survives_saving(self, make: Any, tmp_path: Path) -> None:
        clf = make(COLUMNS["times"][0])
        clf.save(tmp_path / "model")
        frame = rows(COLUMNS["times"][0])
        again = llmfit.load(tmp_path / "model")
        path = write(frame, tmp_path / "rows.csv")
        assert prompts(again, read_as(again, path)) == prompts(clf, frame)

    def test_scoring_a_file_is_scoring_the_frame(self, make: Any, tmp_path: Path) -> None:
        column = COLUMNS["days"][0]
        clf, frame = make(column), rows(column)
        clf.predict_files(write(frame, tmp_path / "rows.csv"), tmp_path / "out.csv", proba=True)
        out = pd.read_csv(tmp_path / "out.csv")
        assert np.allclose(out["label_proba_a"], clf.predict_proba(frame)[:, 0], atol=1e-12)

    @pytest.mark.parametrize("name", ["days", "times"])
    def test_answers_that_are_dates_are_written_so(self, settings: Any, name: str, tmp_path: Path) -> None:
        column, texts = COLUMNS[name]
        frame = pd.DataFrame({"text": ["a", "b"], "due": column})
        gen = llmfit.LLMGenerator(**{**settings, "target": "due", "adapter": None})
        for shown in (gen.preview(frame), gen.fit(frame).preview(frame), gen.preview(frame[1:])):
            for completion, text in zip(shown["completion"][::-1], texts[::-1], strict=False):
                assert completion.strip().startswith(text)
                assert len(completion.strip()) - len(text) <= len("<|endoftext|>")
        gen.save(tmp_path / "model")
        again = llmfit.load(tmp_path / "model")
        assert again.preview(frame[1:])["completion"].tolist() == gen.preview(frame[1:])["completion"].tolist()
        with pytest.warns(TruncationWarning, match="without an end"):
            assert answered(gen, frame)[1][0].truth.tolist() == texts

    @pytest.mark.parametrize("kind", ["text", "category"])
    def test_dates_of_another_kind_have_a_time_where_the_column_has(self, make: Any, kind: str) -> None:
        for name in ("days", "times"):
            column, texts = COLUMNS[name]
            clf = make(column, features={"day": kind})
            assert prompts(clf, rows(column))[:2] == texts

    @pytest.mark.parametrize("kind", ["text", "category", "date"])
    def test_one_without_a_time_has_one_in_a_column_of_times(self, make: Any, kind: str, tmp_path: Path) -> None:
        clf, days = make(COLUMNS["times"][0], features={"day": kind}), rows([date(2024, 1, 31), date(2024, 2, 1)])
        clf.save(tmp_path / "model")
        for model in (clf, llmfit.load(tmp_path / "model")):
            assert prompts(model, days)[:2] == ["2024-01-31 00:00:00", "2024-02-01 00:00:00"]
            assert prompts(model, read_as(model, write(days, tmp_path / "rows.csv"))) == prompts(model, days)

    MIXED: ClassVar[dict[str, tuple[list[Any], list[str]]]] = {
        "a word": ([date(2024, 1, 31), "soon"], ["2024-01-31", "soon"]),
        "a number": ([date(2024, 1, 31), 5], ["2024-01-31", "5"]),
        "a gap": ([date(2024, 1, 31), None, "soon"], ["2024-01-31", "", "soon"]),
        "times": (
            [datetime(2024, 1, 31), date(2024, 2, 1), datetime(2024, 2, 1, 5, 30), "soon"],
            ["2024-01-31 00:00:00", "2024-02-01", "2024-02-01 05:30:00", "soon"],
        ),
    }

    @pytest.mark.parametrize("name", MIXED)
    @pytest.mark.parametrize("way", ["csv", "tsv"])
    def test_a_date_beside_other_values_reads_as_from_a_file(
        self, settings: Any, name: str, way: str, tmp_path: Path
    ) -> None:
        column, texts = self.MIXED[name]
        frame = pd.DataFrame({"day": pd.Series(column, dtype=object), "label": [*"abab"][: len(column)]})
        frame = pd.concat([frame] * 2, ignore_index=True)
        own = {**settings, "target": "label", "template": "{day}", "adapter": None}
        clf = llmfit.LLMClassifier(**own).fit(frame)
        assert prompts(clf, frame)[: len(texts)] == texts
        path = write(frame, tmp_path / f"rows.{way}")
        assert prompts(clf, read_as(clf, path)) == prompts(clf, frame)
        of_file = llmfit.LLMClassifier(**own).fit(read_table(path))
        assert prompts(of_file, frame) == prompts(clf, frame)

    def test_a_day_reads_as_the_text_of_one_where_words_were_learned(self, make: Any, tmp_path: Path) -> None:
        clf, days = make(["soon", "later"]), rows([date(2024, 1, 31), date(2024, 2, 1)])
        assert prompts(clf, days)[:2] == ["2024-01-31", "2024-02-01"]
        assert prompts(clf, read_as(clf, write(days, tmp_path / "rows.csv"))) == prompts(clf, days)

    def test_dates_read_as_the_texts_that_were_learned(self, make: Any) -> None:
        clf = make(["2024-01-31 12:30:00", "2024-02-01 00:00:00"])
        assert prompts(clf, rows(COLUMNS["times"][0]))[:2] == COLUMNS["times"][1]


class TestFormats:
    def test_takes_those_of_strftime(self, make: Any) -> None:
        clf = make(COLUMNS["days with a gap"][0], template="On {day:%d.%m.%Y at %H:%M}.")
        assert prompts(clf, rows(COLUMNS["times"][0]))[:2] == ["On 31.01.2024 at 12:30.", "On 01.02.2024 at 00:00."]
        assert prompts(clf, rows(COLUMNS["days with a gap"][0]))[1] == "On ."

    def test_a_format_of_a_number_is_refused(self, make: Any) -> None:
        with pytest.raises(TemplateError, match=r"formats 'day' as '.2f', but it is a date"):
            make(COLUMNS["days"][0], template="{day:.2f}")

    def test_a_format_of_dates_on_texts_says_how_to_declare_them(self, make: Any) -> None:
        with pytest.raises(TemplateError, match=r"features=\{'day': 'date'\}"):
            make(["2024-01-31", "2024-02-01"], template="{day:%Y}")
        declared = make(["2024-01-31", "2024-02-01"], template="{day:%Y}", features={"day": "date"})
        assert prompts(declared, rows(["2024-01-31", "2025-02-01"]))[:2] == ["2024", "2025"]


class TestRefusals:
    @pytest.mark.parametrize("value", ["yesterday", "31.01.2024", "2024-02-31", "2024", 20240131, "2024-01-31 25:00"])
    def test_what_is_no_date_names_the_row(self, make: Any, value: Any) -> None:
        clf = make(COLUMNS["days"][0])
        with pytest.raises(DataError, match=r"Row 1 \(index 1\): the date column 'day' holds .*which is no date"):
            clf.predict(rows([date(2024, 1, 31), value]))

    def test_a_target_is_no_date(self, settings: Any) -> None:
        for kind in (llmfit.LLMClassifier, llmfit.LLMGenerator, llmfit.LLMEstimator):
            with pytest.raises(ParameterError, match="'date'"):
                kind(**{**settings, "target": {"label": "date"}}).fit(rows(["x", "y"]))

    def test_a_year_that_no_format_knows_is_one_sentence(self, make: Any) -> None:
        far = np.array(["20240-01-31", "2024-01-31"], dtype="datetime64[s]")
        with pytest.raises(TemplateError, match=r"formats 'day' as '%Y', which the date '20240-01-31' cannot take"):
            make(far, template="{day:%Y}")
