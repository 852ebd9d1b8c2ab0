"""Frames: whatever holds the rows, the same prompts come of it, and the answers come back in the same form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest

import llmfit.scoring
from llmfit import LLMClassifier
from llmfit.exceptions import DataError
from llmfit.frames import as_column, is_array_like, to_table

TEXTS = ["red apple", "old car", 'say "hi" {x}', "日本 café"]
LABELS = ["fruit", "vehicle", "fruit", "vehicle"]
INDEX = ["a", "b", "c", "d"]


def pandas_frame() -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS}, index=INDEX)


# Everything that makes one column of texts, and what comes back for it: a Series with an index, or an array (None).
ONE_COLUMN: dict[str, tuple[Callable[[], Any], list[Any] | None]] = {
    "pandas frame": (pandas_frame, INDEX),
    "pandas Series": (lambda: pandas_frame()["text"], INDEX),
    "pandas Series without a name": (lambda: pandas_frame()["text"].rename(None), INDEX),
    "pandas Series whose name is no str": (lambda: pandas_frame()["text"].rename(3), INDEX),
    "polars frame": (lambda: pl.DataFrame({"text": TEXTS}), [0, 1, 2, 3]),
    "polars lazy frame": (lambda: pl.LazyFrame({"text": TEXTS}), [0, 1, 2, 3]),
    "polars Series": (lambda: pl.Series("text", TEXTS), [0, 1, 2, 3]),
    "polars Series without a name": (lambda: pl.Series(TEXTS), [0, 1, 2, 3]),
    "list of str": (lambda: list(TEXTS), [0, 1, 2, 3]),
    "tuple of str": (lambda: tuple(TEXTS), [0, 1, 2, 3]),
    "list of dict": (lambda: [{"text": text} for text in TEXTS], [0, 1, 2, 3]),
    "datasets.Dataset": (lambda: datasets.Dataset.from_dict({"text": TEXTS}), [0, 1, 2, 3]),
    "1-d array of str": (lambda: np.array(TEXTS), None),
    "1-d array of objects": (lambda: np.array(TEXTS, dtype=object), None),
}
each_form = pytest.mark.parametrize(("make", "index"), ONE_COLUMN.values(), ids=ONE_COLUMN)


@pytest.fixture(autouse=True)
def _scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score labels by their prompt's ids, without a forward pass: equal prompts have equal scores, others do not."""

    def score_labels(_: Any, prompts: Any, labels: Any, **__: Any) -> np.ndarray:
        return np.array([[-np.log1p(hash((*prompt, *label)) % 1000) for label in labels] for prompt in prompts])

    monkeypatch.setattr(llmfit.scoring, "score_labels", score_labels)


@pytest.fixture
def zero_shot(settings: dict[str, Any]) -> LLMClassifier:
    return LLMClassifier(**settings, adapter=None)


# --- rows -----------------------------------------------------------------------------------------------


@each_form
def test_every_form_makes_the_same_table(make: Callable[[], Any], index: list[Any] | None) -> None:
    table = to_table(make())
    assert list(table.frame.columns) == ["text"]
    assert table.frame["text"].tolist() == TEXTS
    assert table.as_array is (index is None)
    assert table.frame.index.tolist() == (index or [0, 1, 2, 3])


@each_form
def test_every_form_gives_the_same_prompts_and_answers_in_its_own_form(
    make: Callable[[], Any], index: list[Any] | None, zero_shot: LLMClassifier
) -> None:
    shown = zero_shot.preview(make(), y=LABELS)
    assert shown["prompt"].tolist() == [
        f"Predict the label. Answer with one of: fruit, vehicle.\n\ntext: {text}\n\nlabel:" for text in TEXTS
    ]
    zero_shot.fit(make(), LABELS)
    answers = zero_shot.predict(make())
    assert zero_shot.features_ == {"text": "text"}
    if index is None:
        assert type(answers) is np.ndarray
    else:
        assert type(answers) is pd.Series
        assert answers.index.tolist() == index
        assert answers.name == "label"
    assert list(answers) == list(zero_shot.predict(pandas_frame()))
    np.testing.assert_array_equal(zero_shot.predict_proba(make()), zero_shot.predict_proba(pandas_frame()))


def test_a_column_without_a_name_takes_that_of_the_only_feature(settings: dict[str, Any]) -> None:
    for features in ("review", ["review"]):
        clf = LLMClassifier(**settings, adapter=None, features=features, template="R={review}")
        for X in (TEXTS, np.array(TEXTS), pd.Series(TEXTS), pl.Series(TEXTS)):
            assert clf.preview(X, y=LABELS)["prompt"].tolist() == [f"R={text}" for text in TEXTS]


def test_the_name_of_a_series_stands_above_that_of_a_feature(zero_shot: LLMClassifier) -> None:
    for X in (pd.Series(TEXTS, name="title"), pl.Series("title", TEXTS)):
        assert to_table(X, "review").frame.columns.tolist() == ["title"]


TWO_COLUMNS = {
    "array of str": (
        np.array([["a", "b"], ["c", "d"]]),
        {"x0": "text", "x1": "text"},
        ["x0: a\nx1: b", "x0: c\nx1: d"],
    ),
    "array of float": (np.array([[0.5, 1], [2, 3]]), {"x0": "number", "x1": "number"}, ["x0: 0.5\nx1: 1.0"]),
    "array of int": (np.array([[7, 1], [2, 3]]), {"x0": "number", "x1": "number"}, ["x0: 7\nx1: 1"]),
    "list of lists": ([[7, 1], [2, 3]], {"x0": "number", "x1": "number"}, ["x0: 7\nx1: 1"]),
}


@pytest.mark.parametrize(("X", "kinds", "lines"), TWO_COLUMNS.values(), ids=TWO_COLUMNS)
def test_arrays_have_columns_x0_x1(X: Any, kinds: dict[str, str], lines: list[str], zero_shot: LLMClassifier) -> None:
    zero_shot.set_params(template="{__sample__}.")
    assert zero_shot.preview(X, y=["p", "q"])["prompt"].tolist()[: len(lines)] == [f"{line}." for line in lines]
    answers = zero_shot.fit(X, ["p", "q"]).predict(X)
    assert type(answers) is np.ndarray
    assert zero_shot.features_ == kinds
    assert zero_shot.n_features_in_ == 2


def test_lists_of_dicts_may_lack_a_key_and_it_is_missing(zero_shot: LLMClassifier) -> None:
    zero_shot.set_params(template={"template": "{a}/{b}", "na_rep": "none"})
    shown = zero_shot.preview([{"a": "x", "b": 1}, {"a": "y"}, {"b": 3}], y=["p", "q", "p"])
    assert shown["prompt"].tolist() == ["x/1", "y/none", "none/3"]


def test_a_frame_of_int_names_is_read_by_their_text_and_left_as_it_was(zero_shot: LLMClassifier) -> None:
    frame = pd.DataFrame([["a", "b"], ["c", "d"]], columns=[0, 10], index=INDEX[:2])
    zero_shot.set_params(template="{10}-{0}.")
    zero_shot.fit(frame, ["p", "q"])
    assert zero_shot.preview(frame)["prompt"].tolist() == ["b-a.", "d-c."]
    assert zero_shot.predict(frame).index.tolist() == INDEX[:2]
    assert frame.columns.tolist() == [0, 10]


def test_fit_and_predict_may_take_different_forms(zero_shot: LLMClassifier) -> None:
    zero_shot.fit(pl.DataFrame({"text": TEXTS}), LABELS)
    answers = zero_shot.predict(pandas_frame())
    assert answers.index.tolist() == INDEX
    np.testing.assert_array_equal(zero_shot.predict(TEXTS), answers)
    np.testing.assert_array_equal(zero_shot.predict(np.array(TEXTS)), answers)


def test_the_users_frame_is_not_changed(zero_shot: LLMClassifier) -> None:
    frame = pandas_frame().assign(label=LABELS)
    before = frame.copy(deep=True)
    zero_shot.set_params(target="label").fit(frame)
    zero_shot.predict(frame)
    pd.testing.assert_frame_equal(frame, before)


UNREADABLE = {
    "doubled column": (
        pd.DataFrame([["a", "b", "c"], ["d", "e", "f"]], columns=["t", "u", "t"]),
        "The frame has more than one column named 't'. Rename or drop one.",
    ),
    "doubled after names became text": (
        pd.DataFrame([["a", "b"], ["d", "e"]], columns=[1, 1]),
        "The frame has more than one column named '1'. Rename or drop one.",
    ),
    "str and int names": (
        pd.DataFrame([["a", "b"], ["d", "e"]], columns=["t", 7]),
        "Column names must all be str. Got 7 (int) beside str names. "
        "Rename it, for example with df.columns = df.columns.astype(str).",
    ),
    "no row": (
        pd.DataFrame({"t": []}),
        "LLMClassifier needs at least one row to fit, but the frame has 0 sample(s).",
    ),
}


@pytest.mark.parametrize(("X", "sentence"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_frame_that_cannot_be_read_is_refused(X: Any, sentence: str, zero_shot: LLMClassifier) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        zero_shot.fit(X, ["p", "q"][: len(X)])


@pytest.mark.parametrize(
    ("X", "truth"),
    [
        (pandas_frame(), False),
        (pandas_frame()["text"], False),
        (pl.DataFrame({"text": TEXTS}), False),
        (pl.LazyFrame({"text": TEXTS}), False),
        (datasets.Dataset.from_dict({"text": TEXTS}), False),
        (TEXTS, False),
        ([{"a": 1}], False),
        ([], True),
        (["a", 1], True),
        ([[1, 2]], True),
        (np.zeros((2, 2)), True),
        (np.array(TEXTS), False),
        (np.array(["a", None], dtype=object), False),
        (pd.Index(TEXTS), False),
        (np.array(["a", 1], dtype=object), True),
    ],
)
def test_only_what_has_no_column_names_is_array_like(X: Any, truth: bool) -> None:
    assert is_array_like(X) is truth


# --- the target -----------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: list(LABELS), "label"),
    "tuple": (lambda: tuple(LABELS), "label"),
    "1-d array": (lambda: np.array(LABELS), "label"),
    "Series, whose index is not that of X": (lambda: pd.Series(LABELS, index=[9, 0, 1, 2], name="kind"), "kind"),
    "Series without a name": (lambda: pd.Series(LABELS), "label"),
    "frame of one column": (lambda: pd.DataFrame({"kind": LABELS}), "kind"),
    "polars Series": (lambda: pl.Series("kind", LABELS), "kind"),
    "polars Series without a name": (lambda: pl.Series(LABELS), "label"),
    "polars frame": (lambda: pl.DataFrame({"kind": LABELS}), "kind"),
    "polars lazy frame": (lambda: pl.LazyFrame({"kind": LABELS}), "kind"),
    "column of a datasets.Dataset": (lambda: datasets.Dataset.from_dict({"kind": LABELS})["kind"], "label"),
    "datasets.Dataset of one column": (lambda: datasets.Dataset.from_dict({"kind": LABELS}), "kind"),
    "Categorical": (lambda: pd.Series(LABELS, dtype="category", name="kind"), "kind"),
}


@pytest.mark.parametrize(("make", "name"), TARGETS.values(), ids=TARGETS)
def test_every_form_of_y_is_matched_by_position(make: Callable[[], Any], name: str, zero_shot: LLMClassifier) -> None:
    shown = zero_shot.preview(pandas_frame(), y=make())
    assert shown["completion"].tolist() == [f" {label}</s>" for label in LABELS]
    assert shown.index.tolist() == INDEX
    assert shown["prompt"].iloc[0].endswith(f"\n\n{name}:")
    zero_shot.fit(pandas_frame(), make())
    assert zero_shot.classes_.tolist() == ["fruit", "vehicle"]
    assert zero_shot.target_ == name
    assert zero_shot.predict(pandas_frame()).name == name


def test_the_target_may_stand_in_the_frame_of_any_library(zero_shot: LLMClassifier) -> None:
    zero_shot.set_params(target="kind", template="{text}")
    data = {"text": TEXTS, "kind": LABELS}
    for X in (
        pd.DataFrame(data),
        pl.DataFrame(data),
        datasets.Dataset.from_dict(data),
        [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)],
    ):
        shown = zero_shot.preview(X)
        assert shown["prompt"].tolist() == TEXTS
        assert shown["completion"].tolist() == [f" {label}</s>" for label in LABELS]


DTYPES = {
    "int64": pd.Series([0, 1, 0, 1]),
    "int8": pd.Series([0, 1, 0, 1], dtype="int8"),
    "bool": pd.Series([True, False, True, False]),
    "Int64": pd.Series([0, 1, 0, 1], dtype="Int64"),
    "boolean": pd.Series([True, False, True, False], dtype="boolean"),
    "category of str": pd.Series(LABELS, dtype="category"),
    "category of int": pd.Series([30, 4, 30, 4], dtype="category"),
    "string": pd.Series(LABELS, dtype="string"),
    "object": pd.Series(LABELS, dtype=object),
}


@pytest.mark.parametrize("y", DTYPES.values(), ids=DTYPES)
def test_answers_have_the_dtype_of_the_target(y: pd.Series, zero_shot: LLMClassifier) -> None:
    answers = zero_shot.fit(pandas_frame(), y).predict(pandas_frame())
    assert answers.dtype == y.dtype
    assert answers.notna().all()
    assert set(answers) <= set(y)


MISFITS = {
    "too short": (
        LABELS[:3],
        "X and y must have the same length: inconsistent numbers of samples, 4 and 3.",
    ),
    "too long": (
        pd.Series([*LABELS, "x"]),
        "X and y must have the same length: inconsistent numbers of samples, 4 and 5.",
    ),
    "two columns": (
        pd.DataFrame({"a": LABELS, "b": LABELS}),
        "y should be a 1d array, got an array of shape (4, 2) instead.",
    ),
    "a text": ("ffvv", "y should be a 1d array, got an array of shape () instead."),
    "nothing": (
        None,
        "This LLMClassifier estimator requires y to be passed, but the target y is None. Pass y, or name the "
        "target column of the frame with the 'target' parameter.",
    ),
    "a gap": (
        ["f", None, "v", None],
        "Row 1 (index 'b'): the target 'label' is missing, in 2 row(s) in all. Drop or fill them: "
        "Input y contains NaN.",
    ),
}


@pytest.mark.parametrize(("y", "sentence"), MISFITS.values(), ids=MISFITS)
def test_a_target_that_does_not_fit_is_refused(y: Any, sentence: str, zero_shot: LLMClassifier) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        zero_shot.fit(pandas_frame(), y)


def test_as_column_leaves_the_dtype_alone() -> None:
    for y in DTYPES.values():
        column = as_column(y, 4, "label")
        assert column.dtype == y.dtype
        assert column.name == "label"
        assert column.tolist() == y.tolist()


def test_answers_of_a_table_come_back_as_the_rows_came() -> None:
    answer = to_table(pandas_frame()).answer([1, 2, 3, 4], "score", "Int64")
    pd.testing.assert_series_equal(answer, pd.Series([1, 2, 3, 4], index=INDEX, name="score", dtype="Int64"))
    array = to_table(np.array(TEXTS)).answer([1, 2, 3, 4], "score", "Int64")
    assert type(array) is np.ndarray
    assert array.tolist() == [1, 2, 3, 4]
