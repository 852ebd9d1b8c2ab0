"""Features: the kind of a column, the text of a value, and the sentences where a column cannot be used."""

from __future__ import annotations

import datetime
import decimal
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llmfit import LLMClassifier, LLMGenerator
from llmfit.exceptions import DataError, DataWarning, ParameterError
from llmfit.features import KINDS, Feature, infer_kind, label_text, resolve_features, row_name


def prompts(settings: dict[str, Any], values: Any, **params: Any) -> list[str]:
    """Render one column of values, each between bars."""
    frame = pd.DataFrame({"a": values})
    generator = LLMGenerator(**settings, **{"template": "|{a}|", **params})
    return generator.preview(frame, n=len(frame), y=["answer"] * len(frame))["prompt"].tolist()


# --- kinds ----------------------------------------------------------------------------------------------

INFERRED = {
    "bool": (pd.Series([True, False]), "binary"),
    "nullable bool": (pd.Series([True, None, True], dtype="boolean"), "binary"),
    "one value of bool": (pd.Series([True, True]), "binary"),
    "two words that repeat": (pd.Series(["yes", "no"] * 2), "binary"),
    "two numbers that repeat": (pd.Series([0, 1] * 2), "binary"),
    "two floats that repeat": (pd.Series([0.5, 1.5] * 2), "number"),
    "two words, each once": (pd.Series(["yes", "no"]), "text"),
    "three words that repeat": (pd.Series(["a", "b", "c"] * 2), "category"),
    "three words, one short of twice each": (pd.Series(["a", "b", "c", "a", "b"]), "text"),
    "a hundred words that repeat": (pd.Series([f"w{i}" for i in range(100)] * 2), "category"),
    "a hundred and one words that repeat": (pd.Series([f"w{i}" for i in range(101)] * 2), "text"),
    "texts": (pd.Series(["one text", "another", "a third"]), "text"),
    "integers of few values": (pd.Series([1, 2, 3, 4, 5] * 2), "category"),
    "integers of twenty values": (pd.Series(list(range(20)) * 2), "category"),
    "integers of twenty-one values": (pd.Series(list(range(21)) * 2), "number"),
    "integers that do not repeat": (pd.Series([1, 2, 3, 4, 5]), "number"),
    "floats of few values": (pd.Series([1.5, 2.5, 3.5] * 4), "number"),
    "nullable integers": (pd.Series([1, 2, 3, None] * 3, dtype="Int64"), "category"),
    "categorical of three": (pd.Series(["a", "b", "c"], dtype="category"), "category"),
    "categorical of two": (pd.Series(["a", "b"], dtype="category"), "binary"),
    "missing values do not count": (pd.Series(["yes", None, "no", None, "no", "yes"]), "binary"),
    "lists": (pd.Series([[1], [2], [3]]), "set"),
    "lists and one that is none": (pd.Series([[1], [2], 3]), "text"),
}


@pytest.mark.parametrize(("column", "kind"), INFERRED.values(), ids=INFERRED)
def test_the_kind_of_a_column_is_inferred(column: pd.Series, kind: str) -> None:
    assert infer_kind(column) == kind
    assert kind in KINDS


def test_features_of_numbers_are_numbers_however_few(settings: dict[str, Any]) -> None:
    frame = pd.DataFrame(
        {
            "few": [1, 2, 3] * 2,
            "two": [0.0, 1.0] * 3,
            "flag": [True, False] * 3,
            "word": ["u", "v", "w"] * 2,
            "free": list("abcdef"),
            "label": ["p", "q"] * 3,
        }
    )
    clf = LLMClassifier(**settings, adapter=None, target="label").fit(frame)
    kinds = {"few": "number", "two": "number", "flag": "binary", "word": "category", "free": "text"}
    assert clf.features_ == kinds
    assert clf.feature_names_in_.tolist() == list(kinds)


# --- spellings ------------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"a": ["x", "y"], "b": [1, 2], "label": ["u", "v"]})
SPELLED: dict[str, tuple[Any, dict[str, str]]] = {
    "None": (None, {"a": "text", "b": "number"}),
    "a name": ("a", {"a": "text"}),
    "a list, in its order": (["b", "a"], {"b": "number", "a": "text"}),
    "a tuple": (("a",), {"a": "text"}),
    "an Index": (pd.Index(["a", "b"]), {"a": "text", "b": "number"}),
    "an array": (np.array(["a", "b"]), {"a": "text", "b": "number"}),
    "kinds": ({"a": "category", "b": "text"}, {"a": "category", "b": "text"}),
    "a kind left open": ({"a": None, "b": "category"}, {"a": "text", "b": "category"}),
}


@pytest.mark.parametrize(("given", "kinds"), SPELLED.values(), ids=SPELLED)
def test_every_spelling_of_features(given: Any, kinds: dict[str, str], settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, features=given, target="label", template="{__sample__}.")
    values = {"a": "x", "b": "1"}
    lines = [f"{name}: {values[name]}" for name in kinds] if len(kinds) > 1 else ["x"]
    assert clf.preview(FRAME)["prompt"].iloc[0] == "\n".join(lines) + "."
    clf.fit(FRAME)
    assert list(clf.features_.items()) == list(kinds.items())
    assert all(type(name) is str for name in clf.features_)


@pytest.mark.parametrize("target", ["label", ["label"], ("label",), {"label": "category"}, {"label": "binary"}])
def test_every_spelling_of_target(target: Any, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, target=target).fit(FRAME)
    assert clf.target_ == "label"
    assert list(clf.features_) == ["a", "b"]


WANTED = "None, a column name, a list of column names or a dict of column name to kind"
CHOICES = "'text', 'category', 'number', 'binary', 'set', 'date'"
MISSPELLED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no features": (
        {"features": []},
        ParameterError,
        f"The 'features' parameter of LLMClassifier must be {WANTED}. Got [] instead.",
    ),
    "a number": (
        {"features": 3},
        ParameterError,
        f"The 'features' parameter of LLMClassifier must be {WANTED}. Got 3 instead.",
    ),
    "names that are numbers": (
        {"features": [1]},
        ParameterError,
        f"The 'features' parameter of LLMClassifier must be {WANTED}. Got [1] instead.",
    ),
    "a set, which has no order": (
        {"features": {"a"}},
        ParameterError,
        f"The 'features' parameter of LLMClassifier must be {WANTED}. Got {{'a'}} instead.",
    ),
    "an unknown kind": (
        {"features": {"a": "Text"}},
        ParameterError,
        f"The \"features['a']\" parameter of LLMClassifier must be one of {CHOICES}. Got 'Text' instead. "
        "Did you mean 'text'?",
    ),
    "a column that is not there": (
        {"features": ["a", "c"]},
        DataError,
        "LLMClassifier needs the feature column 'c', but the frame has only 'a', 'b', 'label'.",
    ),
    "a column named twice": ({"features": ["a", "a"]}, DataError, "'a' is named twice in 'features' of LLMClassifier."),
    "an array that names a column twice": (
        {"features": np.array(["a", "a"])},
        DataError,
        "'a' is named twice in 'features' of LLMClassifier.",
    ),
    "the target among the features": (
        {"features": ["a", "label"]},
        DataError,
        "The target column 'label' is among the features. Leave it out of 'features'.",
    ),
    "a target that is not there": (
        {"target": "stars"},
        DataError,
        "LLMClassifier needs the target column 'stars', but the frame has only 'a', 'b', 'label'.",
    ),
    "two targets": (
        {"target": ["a", "label"]},
        ParameterError,
        "The 'target' parameter of LLMClassifier must be one column. Got 'a', 'label'. LLMEstimator answers several.",
    ),
    "no target in the list": (
        {"target": []},
        ParameterError,
        f"The 'target' parameter of LLMClassifier must be {WANTED}. Got [] instead.",
    ),
    "a target of a kind it does not answer": (
        {"target": {"label": "text"}},
        ParameterError,
        "LLMClassifier predicts categories; its target is declared as 'text'.",
    ),
}


@pytest.mark.parametrize(("params", "error", "sentence"), MISSPELLED.values(), ids=MISSPELLED)
def test_what_is_no_spelling_is_refused(
    params: dict[str, Any], error: type[Exception], sentence: str, settings: dict[str, Any]
) -> None:
    clf = LLMClassifier(**settings, **{"target": "label", **params})
    for call in (clf.fit, clf.preview):
        with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
            call(FRAME)


def test_a_frame_of_nothing_but_the_target_is_refused(settings: dict[str, Any]) -> None:
    sentence = "LLMClassifier needs at least one feature column beside the target 'label'."
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        LLMClassifier(**settings, target="label").fit(FRAME[["label"]])


def test_a_feature_that_predict_lacks_is_named(settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, target="label").fit(FRAME)
    sentence = "LLMClassifier needs the feature column 'b', but the frame has only 'a', 'label'."
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        clf.predict(FRAME.drop(columns="b"))


def test_a_feature_that_the_template_leaves_out_is_warned_of(settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, features=["a", "b"], target="label", template="{b}")
    sentence = "The template does not use the features 'a': the model will not see them."
    with pytest.warns(DataWarning, match=f"^{re.escape(sentence)}$"):
        clf.preview(FRAME)


@pytest.mark.parametrize(
    ("template", "names"),
    [("{b}", ["b"]), ("{b} {a} {b:.2f}", ["b", "a"]), ("{__sample__}", ["a", "b"]), (None, ["a", "b"])],
)
def test_without_features_those_of_the_template_are_taken(
    template: str | None, names: list[str], settings: dict[str, Any]
) -> None:
    clf = LLMClassifier(**settings, adapter=None, target="label", template=template).fit(FRAME)
    assert list(clf.features_) == names
    assert clf.feature_names_in_.tolist() == names


def test_a_kind_that_is_given_stands_and_the_others_are_inferred() -> None:
    given = {"b": "category", "a": None}
    resolved = resolve_features(given, FRAME, "label", "LLMClassifier")
    assert resolved == (Feature("b", "category", whole=True), Feature("a", "text"))


# --- values ---------------------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[Any, list[str]]] = {
    "str, untouched": ([" a\tb\n", "", "é日"], [" a\tb\n", "", "é日"]),
    "int": ([1, -20], ["1", "-20"]),
    "float": ([1.5, 2.0], ["1.5", "2.0"]),
    "large float": ([1e22, 0.1], ["1e+22", "0.1"]),
    "float32, as short as it is": (np.array([0.1, 2.5], dtype="float32"), ["0.1", "2.5"]),
    "bool": ([True, False], ["True", "False"]),
    "nullable int": (pd.array([1, None], dtype="Int64"), ["1", ""]),
    "nullable bool": (pd.array([True, None], dtype="boolean"), ["True", ""]),
    "category of str: the value, not the code": (pd.Categorical(["u", "t", None]), ["u", "t", ""]),
    "category of int: the value, not the code": (pd.Categorical([20, 10, None]), ["20", "10", ""]),
    "date and time": ([pd.Timestamp("2024-01-02 03:04"), pd.NaT], ["2024-01-02 03:04:00", ""]),
    "date": ([datetime.date(2024, 1, 2), None], ["2024-01-02", ""]),
    "Decimal": ([decimal.Decimal("1.10"), None], ["1.10", ""]),
    "list, whose own None is a value": ([[1, None], "x"], ["[1, None]", "x"]),
    "mixed": (["x", 1, 2.5, None], ["x", "1", "2.5", ""]),
    "infinite": ([np.inf, np.nan], ["inf", ""]),
    "text that looks missing is text": (["nan", "None", "<NA>", "NaT"], ["nan", "None", "<NA>", "NaT"]),
}


@pytest.mark.parametrize(("values", "texts"), WRITTEN.values(), ids=WRITTEN)
def test_a_value_is_written_as_itself(values: Any, texts: list[str], settings: dict[str, Any]) -> None:
    assert prompts(settings, values) == [f"|{text}|" for text in texts]


MISSING: dict[str, Any] = {
    "None among str": pd.Series(["x", None]),
    "None among objects": pd.Series(["x", None], dtype=object),
    "nan among objects": pd.Series(["x", float("nan")], dtype=object),
    "pandas.NA among objects": pd.Series(["x", pd.NA], dtype=object),
    "NaT among objects": pd.Series(["x", pd.NaT], dtype=object),
    "NaN among floats": pd.Series([1.0, np.nan]),
    "NaT among times": pd.Series([pd.Timestamp("2024-01-01"), pd.NaT]),
    "NaT among durations": pd.Series(pd.to_timedelta(["1D", None])),
    "NA among strings": pd.Series(["x", None], dtype="string"),
    "NA among Int64": pd.Series([1, None], dtype="Int64"),
    "NA among Float64": pd.Series([1.5, None], dtype="Float64"),
    "NA among booleans": pd.Series([True, None], dtype="boolean"),
    "missing category": pd.Series(["x", None], dtype="category"),
}


@pytest.mark.parametrize("na_rep", ["", "unknown", "{a}"])
@pytest.mark.parametrize("column", MISSING.values(), ids=MISSING)
def test_every_missing_value_reads_as_na_rep(column: pd.Series, na_rep: str, settings: dict[str, Any]) -> None:
    known, missing = prompts(settings, column, template={"template": "|{a}|", "na_rep": na_rep})
    assert missing == f"|{na_rep}|"
    assert known != missing


def test_a_column_of_missing_values_alone_can_be_rendered(settings: dict[str, Any]) -> None:
    for values in ([None, None], [np.nan, np.nan], pd.array([None, None], dtype="Int64")):
        assert prompts(settings, values, template={"template": "|{a}|", "na_rep": "-"}) == ["|-|", "|-|"]


# --- declared numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [["1", "2.5"], [1, None], ["-3e5", None], pd.Categorical(["1", "2"]), [True, False]])
def test_a_declared_number_may_be_written_as_text(values: Any, settings: dict[str, Any]) -> None:
    shown = prompts(settings, values, features={"a": "number"})
    assert len(shown) == 2
    assert "nan" not in "".join(shown)


NO_NUMBERS = {
    "a word": (["1", "x"], ["r", "s"], "Row 1 (index 's'): the number column 'a' holds 'x', which is no number."),
    "nothing written": (["", "1"], [5, 6], "Row 0 (index 5): the number column 'a' holds '', which is no number."),
    "nan as a word": (["1", "nan"], [5, 6], "Row 1 (index 6): the number column 'a' holds 'nan', which is no number."),
    "thousands with a comma": (
        ["1", "1,000"],
        pd.to_datetime(["2024-01-01", "2024-01-02"]),
        "Row 1 (index Timestamp('2024-01-02 00:00:00')): the number column 'a' holds '1,000', which is no number.",
    ),
    "a category": (
        pd.Categorical(["1", "b"]),
        pd.MultiIndex.from_tuples([(1, "u"), (2, "v")]),
        "Row 1 (index (2, 'v')): the number column 'a' holds 'b', which is no number.",
    ),
    "behind a missing value": (
        [None, "x"],
        [0.5, 1.5],
        "Row 1 (index 1.5): the number column 'a' holds 'x', which is no number.",
    ),
    "a list": ([[1], 2], [5, 6], "Row 0 (index 5): the number column 'a' holds [1], which is no number."),
}


@pytest.mark.parametrize(("values", "index", "sentence"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_declared_number_that_is_none_names_the_row(
    values: Any, index: Any, sentence: str, settings: dict[str, Any]
) -> None:
    frame = pd.DataFrame({"a": values}, index=index)
    generator = LLMGenerator(**settings, features={"a": "number"})
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        generator.preview(frame, y=["p", "q"])


def test_a_number_that_is_none_is_named_at_predict_too(settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, target="label").fit(FRAME)
    sentence = "Row 1 (index 'j'): the number column 'b' holds 'many', which is no number."
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        clf.predict(pd.DataFrame({"a": ["x", "y"], "b": [1, "many"]}, index=["i", "j"]))


def test_a_row_is_named_by_position_and_index() -> None:
    assert row_name(1, pd.Index([7, 8])) == "Row 1 (index 8)"
    assert row_name(0, pd.RangeIndex(3)) == "Row 0 (index 0)"


# --- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a b", "a b"),
        (True, "True"),
        (np.False_, "False"),
        (3, "3"),
        (np.int64(-3), "-3"),
        (3.0, "3"),
        (np.float32(4), "4"),
        (2.5, "2.5"),
        (np.float64(0.1), "0.1"),
        (float("inf"), "inf"),
        (pd.Timestamp("2024-01-01"), "2024-01-01"),
        (pd.Timestamp("2024-01-01 12:30"), "2024-01-01 12:30:00"),
    ],
)
def test_a_label_is_written_as_a_person_would(value: Any, text: str) -> None:
    assert label_text(value) == text


def test_labels_are_completions(settings: dict[str, Any]) -> None:
    for labels, texts in (([1.0, 2.0], ["1", "2"]), ([True, False], ["True", "False"]), ([7, 30], ["7", "30"])):
        shown = LLMClassifier(**settings).preview(FRAME[["a"]], y=labels)
        assert shown["completion"].tolist() == [f" {text}</s>" for text in texts]


def test_a_feature_declared_as_binary_has_two_values_at_most(frame, settings):
    colours = ["red", "green", None, "red"] * 2
    clf = LLMClassifier(**settings, features={"text": "text", "colour": "binary"}, target="label", adapter=None)
    assert clf.fit(frame.assign(colour=colours)).features_["colour"] == "binary"
    with pytest.raises(DataError) as error:
        clf.fit(frame.assign(colour=[*colours[:7], "blue"]))
    assert str(error.value) == "The feature 'colour' is declared as 'binary', but has 3 distinct values."
    kept = clf.predict(frame.assign(colour="a value that no fitted row had"))
    assert len(kept) == 8
