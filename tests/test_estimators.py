"""What estimators promise: labels back as they came, nothing of the target leaks, answers belong to rows alone."""

from __future__ import annotations

import datetime
import math
import warnings
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars
import pytest
import torch
import transformers
from fake_model import NAME, put_in_place
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn import metrics

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator
from llmfit.exceptions import DataWarning, ParameterError, TruncationWarning
from llmfit.training import train

FAKE: dict[str, Any] = {"base_model": NAME, "adapter": "full", "verbose": 0}
N = 8


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


def points() -> pd.DataFrame:
    return pd.DataFrame({"a": np.arange(float(N)), "b": np.arange(N) % 3}, index=[f"i{i}" for i in range(N)])


def repeated(*values: Any, dtype: Any = None) -> pd.Series:
    """A label a row, in an order that is neither sorted nor that of first sight of the classes' names."""
    found = [values[i % len(values)] for i in range(N)]
    return pd.Series(found, dtype=dtype, name="label", index=[f"i{i}" for i in range(N)])


# Labels ------------------------------------------------------------------------------------------------------------

ORDERED = pd.CategoricalDtype(["small", "medium", "large", "never seen"], ordered=True)
LABELS: dict[str, tuple[pd.Series, list[Any]]] = {
    "str": (repeated("b", "a", "c"), ["a", "b", "c"]),
    "object of str": (repeated("b", "a", dtype=object), ["a", "b"]),
    "object of int": (repeated(10, 9, dtype=object), [9, 10]),
    "object of bool": (repeated(True, False, dtype=object), [False, True]),
    "string": (repeated("b", "a", dtype="string"), ["a", "b"]),
    "string of pyarrow": (repeated("b", "a", dtype="string[pyarrow]"), ["a", "b"]),
    "int64": (repeated(10, 9, -1), [-1, 9, 10]),
    "int8": (repeated(10, 9, dtype="int8"), [9, 10]),
    "bool": (repeated(True, False), [False, True]),
    "float of whole numbers": (repeated(2.0, 1.0), [1.0, 2.0]),
    "Int64": (repeated(10, 9, dtype="Int64"), [9, 10]),
    "boolean": (repeated(True, False, dtype="boolean"), [False, True]),
    "Float64": (repeated(2.0, 1.0, dtype="Float64"), [1.0, 2.0]),
    "category": (repeated("b", "a", dtype="category"), ["a", "b"]),
    "ordered category": (repeated("small", "medium", "large", dtype=ORDERED), ["large", "medium", "small"]),
    "category of int": (repeated(10, 9, dtype="category"), [9, 10]),
    "category of bool": (repeated(True, False, dtype="category"), [False, True]),
    "category of Int64": (
        pd.Series(pd.Categorical(repeated(10, 9, dtype="Int64")), points().index, name="label"),
        [9, 10],
    ),
    "words with spaces and signs": (repeated(" b", "b", "ä|{x}\n"), [" b", "b", "ä|{x}\n"]),
    "labels that begin others": (repeated("no", "none", "n"), ["n", "no", "none"]),
    "many": (pd.Series(range(N), points().index, name="label"), list(range(N))),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("y", "classes"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_labels_come_back_in_their_own_dtype(cls: Any, y: pd.Series, classes: list[Any]) -> None:
    X = points()
    model = cls(target={"label": "category"}, **FAKE).fit(X, y)
    assert model.classes_.tolist() == classes
    assert [type(label) for label in model.classes_.tolist()] == [type(label) for label in classes]
    pd.testing.assert_series_equal(model.predict(X), y)
    proba = model.predict_proba(X)
    assert proba.shape == (N, len(classes))
    assert [classes[i] for i in proba.argmax(axis=1)] == y.tolist()
    assert np.allclose(proba.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert model.score(X, y) == 1.0
    assert model.score(X, y.shift(1, fill_value=y.iloc[-1]).astype(y.dtype)) == (y == np.roll(y, 1)).mean()
    result = model.evaluate(X, y)
    assert (result["accuracy"], result["f1_macro"]) == (1.0, 1.0)
    assert result["confusion_matrix"].index.tolist() == classes
    empty = model.predict(X[:0])
    assert empty.dtype == y.dtype
    assert (len(empty), empty.name) == (0, "label")
    assert model.predict_proba(X[:0]).shape == (0, len(classes))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("as_list", [list, np.asarray], ids=["list", "array"])
@pytest.mark.parametrize("labels", [["b", "a"], [2, 1], [True, False], [2.0, 1.0]], ids=str)
def test_labels_of_lists_and_arrays_come_back_as_series_of_a_frame(labels: list[Any], as_list: Any) -> None:
    y = as_list(labels * (N // 2))
    found = LLMClassifier(**FAKE).fit(points(), y).predict(points())
    assert found.tolist() == labels * (N // 2)
    assert (found.name, found.index.tolist()) == ("label", points().index.tolist())
    assert found.dtype == pd.Series(y).dtype


@pytest.mark.usefixtures("fake")
def test_row_of_y_belongs_to_row_of_x_by_position() -> None:
    y = repeated("b", "a")
    model = LLMClassifier(**FAKE).fit(points(), y[::-1].set_axis(y.index))
    other = LLMClassifier(**FAKE).fit(points(), y[::-1])
    assert model.predict(points()).tolist() == other.predict(points()).tolist() == y.tolist()[::-1]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "index",
    [
        pd.RangeIndex(5, 5 + N),
        pd.Index([0] * N),
        pd.date_range("2024", periods=N),
        pd.MultiIndex.from_product([[1, 2], list("abcd")]),
    ],
    ids=["range", "repeated", "dates", "levels"],
)
def test_index_of_the_frame_is_kept(index: pd.Index) -> None:
    X, y = points().set_axis(index), repeated("b", "a").to_numpy()
    for model in (LLMClassifier(**FAKE), LLMGenerator(**FAKE), LLMEstimator(**FAKE)):
        assert model.fit(X, y).predict(X).index.equals(index)


# Frames in, answers out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full", None])
@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_target_inside_the_frame_is_the_same_fit_bit_for_bit(
    cls: Any, adapter: Any, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    inside = cls(target="label", adapter=adapter, **settings).fit(frame)
    X, y = frame[["text", "size"]], frame["label"]
    for beside in (
        cls(adapter=adapter, **settings).fit(X, y),
        cls(target="label", adapter=adapter, **settings).fit(X, y),
    ):
        assert np.array_equal(beside.predict_proba(X), inside.predict_proba(frame))
        assert beside.features_ == inside.features_ == {"text": "text", "size": "number"}
        assert (beside.history_["loss"] == inside.history_["loss"]).all()
        assert beside.feature_names_in_.tolist() == ["text", "size"]
        assert beside.n_features_in_ == 2


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("target", [None, "label", ["label"], {"label": "category"}, {"label": None}])
@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_every_spelling_of_the_target_means_the_same(cls: Any, target: Any) -> None:
    X, y = points(), repeated("b", "a")
    model = cls(target=target, **FAKE).fit(X, y)
    assert model.target_ == "label"
    if target is not None:
        other = cls(target=target, **FAKE).fit(X.assign(label=y))
        assert np.array_equal(other.predict_proba(X), model.predict_proba(X))


JUNK: dict[str, Any] = {
    "garbage": [object() for _ in range(N)],
    "unseen": ["never seen"] * N,
    "missing": [None] * N,
    "another kind": list(range(N)),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_target_column_is_not_read_at_predict(cls: Any, junk: Any) -> None:
    X, y = points(), repeated("b", "a")
    model = cls(target="label", **FAKE).fit(X.assign(label=y))
    pd.testing.assert_series_equal(model.predict(X.assign(label=junk)), model.predict(X))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
@pytest.mark.parametrize("target", [None, "b"])
def test_y_named_like_a_column_does_not_leak_into_prompts(cls: Any, target: str | None) -> None:
    X = points().assign(b=["v", "u"] * (N // 2))
    model = cls(target=target, **FAKE).fit(X, X["b"])
    assert model.features_ == {"a": "number"}
    shuffled = X.assign(b=list(X["b"])[::-1])
    assert model.predict(shuffled).tolist() == model.predict(X).tolist()
    assert not model.preview(X)["prompt"].str.contains("b: ").any()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["other", "label"])
def test_unnamed_y_takes_no_column_of_the_frame_away(name: str) -> None:
    X = points().rename(columns={"b": name})
    model = LLMClassifier(**FAKE).fit(X, ["v", "u"] * (N // 2))
    assert list(model.features_) == ["a", name]
    assert model.target_ not in model.features_
    assert model.predict(X).tolist() == ["v", "u"] * (N // 2)


FORMS: dict[str, Any] = {
    "polars frame": lambda df: polars.DataFrame({name: df[name].to_list() for name in df}),
    "list of dicts": lambda df: df.to_dict("records"),
    "other column order": lambda df: df[df.columns[::-1]],
    "more columns": lambda df: df.assign(extra=1, note="u"),
    "another index": lambda df: df.reset_index(drop=True),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form_of_the_rows_does_not_change_the_answers(form: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    X, y = frame[["text", "size"]], frame["label"]
    clf = LLMClassifier(features=["text", "size"], **settings).fit(X, y)
    same = LLMClassifier(features=["text", "size"], **settings).fit(form(X), y.tolist())
    assert np.array_equal(clf.predict_proba(form(X)), clf.predict_proba(X))
    assert np.array_equal(same.predict_proba(X), clf.predict_proba(X))


@pytest.mark.parametrize(
    "form", [list, tuple, np.asarray, lambda s: s.rename(None), polars.Series, lambda s: s.to_frame()],
    ids=["list", "tuple", "array", "series", "polars", "frame"],
)  # fmt: skip
def test_one_text_column_may_come_bare(form: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    settings |= {"adapter": None}
    named = frame.rename(columns={"text": "words"})[["words"]]
    plain = LLMClassifier(**settings).fit(named, frame["label"])
    X = form(named["words"])
    for features in ("words", ["words"]):
        clf = LLMClassifier(features=features, **settings).fit(X, frame["label"].tolist())
        assert np.array_equal(clf.predict_proba(X), plain.predict_proba(named))
        assert list(clf.predict(X)) == plain.predict(named).tolist()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_arrays_in_are_arrays_out(cls: Any) -> None:
    X, y = points().to_numpy(), np.array(["v", "u"] * (N // 2))
    model = cls(**FAKE).fit(X, y)
    found = model.predict(X)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == y.tolist()
    assert (model.n_features_in_, hasattr(model, "feature_names_in_")) == (2, False)
    assert model.features_ == {"x0": "number", "x1": "number"}
    assert model.score(X, y) == 1.0


# Answers belong to rows --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tiny: str) -> LLMClassifier:
    """A classifier whose labels have several tokens, so that batches and caches are put to use.

    In float64, but for the norms, which transformers computes in float32.
    """
    texts = ["red apple", "green pear", "old car", "fast train and a long way to go", "plum", "truck"]
    frame = pd.DataFrame({"text": texts, "n": range(6), "label": ["fruit", "fruits", "vehicle"] * 2})
    clf = LLMClassifier(tiny, target="label", epochs=2, learning_rate=1e-2, dtype="float64", device="cpu", verbose=0)
    return clf.set_params(adapter="full", random_state=0, batch_tokens=256).fit(frame)


rows = st.lists(
    st.tuples(st.sampled_from(["", "apple", "a long text, longer than others", "ünï"]), st.integers(-3, 3)),
    min_size=1,
    max_size=6,
)


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.randoms(use_true_random=False))
def test_answers_do_not_depend_on_order_duplicates_columns_or_batch(
    learned: LLMClassifier, some: list[tuple[str, int]], random: Any
) -> None:
    frame = pd.DataFrame(some, columns=["text", "n"])
    alone = np.vstack([learned.predict_proba(frame.iloc[[i]]) for i in range(len(frame))])
    order = [random.randrange(len(frame)) for _ in range(len(frame))] + list(range(len(frame)))
    random.shuffle(order)
    mixed = frame.iloc[order].assign(extra="x", label=None)[["n", "label", "extra", "text"]]
    assert np.allclose(learned.predict_proba(mixed), alone[order], rtol=0, atol=1e-6)
    assert learned.predict(mixed).index.tolist() == order


def test_equal_rows_have_equal_answers_bit_for_bit(learned: LLMClassifier) -> None:
    frame = pd.DataFrame({"text": ["apple", "a much longer text", "apple"], "n": [1, 2, 1]})
    proba = learned.predict_proba(frame)
    assert np.array_equal(proba[0], proba[2])
    assert not np.array_equal(proba[0], proba[1])


@pytest.mark.parametrize("batch_tokens", [1, 64, "auto"])
def test_token_budget_does_not_change_probabilities(learned: LLMClassifier, batch_tokens: Any) -> None:
    frame = pd.DataFrame({"text": ["apple", "a much longer text", ""], "n": [1, 2, 3]})
    wanted = learned.predict_proba(frame)
    found = llmfit.LLMClassifier.predict_proba(_with(learned, batch_tokens=batch_tokens), frame)
    assert np.allclose(found, wanted, rtol=0, atol=1e-6)


def _with(model: Any, **params: Any) -> Any:
    import copy

    return copy.copy(model).set_params(**params)


def test_log_probabilities_are_those_of_a_naive_pass(learned: LLMClassifier, tiny: str) -> None:
    zero = LLMClassifier(tiny, adapter=None, dtype="float64", device="cpu", verbose=0)
    X = pd.DataFrame({"text": ["apple", "car"]})
    labels = ["fruit", "fruits", "vehicle"]  # "fruit" begins "fruits": it is closed
    zero.fit(pd.DataFrame({"text": ["x", "y", "z"]}), labels)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    shown = zero.preview(X)["prompt"]
    scores = np.empty((2, 3))
    for i, prompt in enumerate(shown):
        for k, answer in enumerate([" fruit</s>", " fruits", " vehicle"]):
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=ids).logits.log_softmax(-1)[0]
            scores[i, k] = sum(float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
    wanted = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert np.allclose(zero.predict_log_proba(X), wanted, rtol=0, atol=1e-6)
    assert np.allclose(zero.predict_proba(X), np.exp(wanted), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_predict_and_evaluate_change_no_attribute(cls: Any) -> None:
    X, y = points(), repeated("v", "u")
    model = cls(**FAKE).fit(X, y)
    before = dict(vars(model))
    model.predict(X), model.score(X, y), model.evaluate(X, y), model.preview(X)
    assert vars(model).keys() - before.keys() <= {"evaluation_"}  # for the model card
    assert all(vars(model)[name] is value for name, value in before.items())


# Zero-shot and few-shot --------------------------------------------------------------------------------------------


def test_every_class_may_be_said_once_where_nothing_is_trained(settings: dict[str, Any]) -> None:
    known = pd.DataFrame({"text": ["?"] * 30, "label": [f"kind {i}" for i in range(30)]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LLMClassifier(target="label", features="text", **(settings | {"adapter": None})).fit(known)
    assert len(model.classes_) == 30


def test_zero_shot_trains_nothing(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    settings |= {"adapter": None}
    clf = LLMClassifier(target="label", features="text", **settings).fit(frame)
    assert clf.history_.empty
    assert clf.history_.columns[:3].tolist() == ["step", "epoch", "loss"]
    assert (clf.trainable_parameters_, clf.best_epoch_) == (0, None)
    relabelled = frame.assign(label=list(frame["label"])[::-1])
    other = LLMClassifier(target="label", features="text", **settings).fit(relabelled)
    assert np.array_equal(clf.predict_proba(frame), other.predict_proba(frame))
    trained = LLMClassifier(target="label", features="text", **settings | {"adapter": "lora"}).fit(frame)
    assert len(trained.history_) == 1
    assert trained.trainable_parameters_ > 0
    assert not np.array_equal(trained.predict_proba(frame), clf.predict_proba(frame))


@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator])
def test_few_shot_shows_fitted_rows_but_never_the_row_itself(
    cls: Any, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    settings |= {"adapter": None, "template": {"few_shot": {"k": 2}}}
    model = cls(target="label", features="text", **settings).fit(frame)
    assert model.history_.empty
    label_of = dict(zip(frame["text"], frame["label"], strict=True))
    kinds = []
    for own, prompt in zip(frame["text"], model.preview(frame, n=8)["prompt"], strict=True):
        shown = [text for text in frame["text"] if f"text: {text}\n\nlabel: {label_of[text]}\n\n" in prompt]
        assert len(shown) == 2
        assert own not in shown
        assert prompt.endswith(f"text: {own}\n\nlabel:")
        assert prompt.count("label:") == 3
        kinds.append({label_of[text] for text in shown})
    if cls is LLMClassifier:  # examples take the classes in turn; the row that is one of them is replaced
        assert sum(len(kind) == 2 for kind in kinds) >= 6
        relabelled = frame.assign(label=list(frame["label"])[::-1])
        other = cls(target="label", features="text", **settings).fit(relabelled)
        assert not np.array_equal(model.predict_proba(frame), other.predict_proba(frame))


# The estimator that chooses ----------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "words that repeat": (["u", "v"] * 4, None, LLMClassifier),
    "words that do not": (list("abcdefgh"), None, LLMGenerator),
    "whole numbers that repeat": ([1, 2, 3, 4] * 2, None, LLMClassifier),
    "two numbers": ([0.5, 1.5] * 4, None, None),
    "booleans": ([True, False] * 4, None, LLMClassifier),
    "categories": (pd.Categorical(list("abcdefgh")), None, LLMClassifier),
    "declared text": (["u", "v"] * 4, "text", LLMGenerator),
    "declared category": (list("abcdefgh"), "category", LLMClassifier),
    "declared binary": (["u", "v"] * 4, "binary", LLMClassifier),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("y", "kind", "chosen"), [k for k in KINDS.values() if k[2]], ids=[n for n in KINDS if KINDS[n][2]]
)
def test_target_decides_the_estimator(y: Any, kind: Any, chosen: Any) -> None:
    model = LLMEstimator(target={"label": kind} if kind else "label", epochs=2, **FAKE).fit(points().assign(label=y))
    assert type(model.estimator_) is chosen
    assert model.estimator_.epochs == 2
    assert model.predict(points()).tolist() == list(y)
    assert hasattr(model, "predict_proba") == (chosen is LLMClassifier)
    assert hasattr(model, "classes_") == (chosen is LLMClassifier)
    assert model.target_ == "label"
    assert model.features_ == {"a": "number", "b": "number"}
    twin = chosen(epochs=2, **FAKE).fit(points(), pd.Series(y, name="label"))
    assert model.score(points(), y) == twin.score(points(), y) == 1.0
    assert model.evaluate(points(), y).keys() == twin.evaluate(points(), y).keys()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("y", "params", "error", "sentence"),
    [
        (
            [0.5 * i for i in range(N)],
            {"class_weight": "balanced"},
            ParameterError,
            "The 'class_weight' parameter has no meaning here: the target is numbers.",
        ),
        (
            list("abcdefgh"),
            {"class_weight": "balanced"},
            ParameterError,
            "The 'class_weight' parameter has no meaning here: the target is text.",
        ),
        (
            ["u", "v"] * 4,
            {"generation": {"num_beams": 2}},
            ParameterError,
            "The 'generation' parameter has no meaning here: the target is classes.",
        ),
    ],
)
def test_chooser_refuses_what_has_no_meaning(y: Any, params: Any, error: Any, sentence: str) -> None:
    model = LLMEstimator(**params, **FAKE)
    with pytest.raises(error) as caught:
        model.fit(points(), y)
    assert str(caught.value) == sentence
    assert not hasattr(model, "estimator_")


@pytest.mark.usefixtures("fake")
def test_chooser_chooses_anew_at_every_fit() -> None:
    model = LLMEstimator(**FAKE).fit(points(), ["u", "v"] * 4)
    model.fit(points(), list("abcdefgh"))
    assert isinstance(model.estimator_, LLMGenerator)
    assert not hasattr(model, "predict_proba")


# Measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_measures_of_a_classifier_are_those_of_scikit_learn(
    cls: Any, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    frame = frame.assign(label=["a", "b", "c", "a", "b", "c", "a", "b"])
    model = cls(target={"label": "category"}, adapter=None, **settings).fit(frame)
    y, proba = frame["label"], model.predict_proba(frame)
    predicted = np.array(["a", "b", "c"])[proba.argmax(axis=1)]
    weights = np.arange(1.0, 9.0)
    assert model.score(frame) == model.score(frame, y) == metrics.accuracy_score(y, predicted)
    weighted = metrics.accuracy_score(y, predicted, sample_weight=weights)
    assert model.score(frame, sample_weight=weights) == pytest.approx(weighted, abs=1e-12)
    result = model.evaluate(frame, metrics=[metrics.matthews_corrcoef], per_class=True)
    wanted = {
        "accuracy": metrics.accuracy_score(y, predicted),
        "f1_macro": metrics.f1_score(y, predicted, average="macro", zero_division=0),
        "log_loss": metrics.log_loss(y, proba, labels=["a", "b", "c"]),
        "roc_auc": metrics.roc_auc_score(y, proba, multi_class="ovr", labels=["a", "b", "c"]),
        "matthews_corrcoef": metrics.matthews_corrcoef(y, predicted),
    }
    assert {name: result[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert np.array_equal(result["confusion_matrix"], metrics.confusion_matrix(y, predicted, labels=["a", "b", "c"]))
    assert result["per_class"]["support"].tolist() == [3, 3, 2]
    assert model.evaluate(frame[["text", "size"]], y.tolist())["log_loss"] == result["log_loss"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_unseen_label_counts_as_wrong_and_warns(cls: Any) -> None:
    X, y = points(), repeated("u", "v")
    model = cls(**FAKE).fit(X, y)
    truth = y.where(np.arange(N) != 3, "w")
    with pytest.warns(
        DataWarning, match=r"^evaluate: 1 row holds a label that fit never saw: 'w'\. It counts as wrong"
    ):
        assert model.evaluate(X, truth)["accuracy"] == 7 / 8
    with pytest.warns(
        DataWarning, match=r"^score: 1 row holds a label that fit never saw: 'w'\. It counts as wrong\.$"
    ):
        assert model.score(X, truth) == 7 / 8


def test_perplexity_is_that_of_a_naive_pass(frame: pd.DataFrame, settings: dict[str, Any], tiny: str) -> None:
    model = LLMGenerator(
        target="label", features="text", adapter=None, generation={"max_new_tokens": 3}, **settings
    ).fit(frame)
    with pytest.warns(TruncationWarning):
        result = model.evaluate(frame, frame["label"])
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    total, count = 0.0, 0
    for prompt, label in zip(model.preview(frame, n=8)["prompt"], frame["label"], strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {label}</s>", return_tensors="pt")["input_ids"]
        labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
        with torch.no_grad():
            total += float(network(input_ids=ids, labels=labels).loss) * (ids.shape[1] - start)
        count += ids.shape[1] - start
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result["exact_match"] == model_score(model, frame)


def model_score(model: Any, frame: pd.DataFrame) -> float:
    with pytest.warns(TruncationWarning):
        return float(model.score(frame))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMGenerator, LLMEstimator])
def test_score_of_texts_is_the_share_of_exact_answers(cls: Any) -> None:
    X, y = points(), [f"answer {i}" for i in range(N)]
    model = cls(**FAKE).fit(X, y)
    truth = [*y[:5], " answer 5\n", "other", "answer  7"]
    assert model.score(X, truth) == 6 / 8
    assert model.score(X, truth, sample_weight=[0, 0, 0, 0, 0, 1, 1, 2]) == 1 / 4
    assert model.score(X.assign(answer=truth), truth) == 6 / 8
    assert model.score(X, y) == 1.0


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "values",
    [
        list("abcdefgh"),
        list(range(N)),
        [Decimal(i) for i in range(N)],
        [datetime.date(2024, 1, i + 1) for i in range(N)],
        [True, False] * 4,
    ],
    ids=["str", "int", "Decimal", "date", "bool"],
)
def test_generator_answers_any_value_as_text(values: Any) -> None:
    found = LLMGenerator(**FAKE).fit(points(), pd.Series(values)).predict(points())
    assert found.tolist() == [str(value) for value in values]
    assert found.dtype == "str"
    assert found.name == "answer"


def test_generated_answers_are_the_models_own_greedy_words(
    frame: pd.DataFrame, settings: dict[str, Any], tiny: str
) -> None:
    model = LLMGenerator(target="label", features="text", adapter=None, generation={"max_new_tokens": 5}, **settings)
    model.fit(frame)
    with pytest.warns(TruncationWarning, match=r"of 8 answers for 'label' reached max_new_tokens=5 without an end\.$"):
        found = model.predict(frame)
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    for prompt, answer in zip(model.preview(frame, n=8)["prompt"], found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == text.removeprefix(" ")


# Weights and seeds -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_weight_of_a_row_is_that_of_the_user_times_that_of_its_class() -> None:
    X = pd.DataFrame({"a": [1.0, 1.0, 1.0]})  # one prompt: probabilities are the shares of the weights
    y = ["u", "v", "v"]

    def shares(sample_weight: Any = None, **params: Any) -> list[float]:
        clf = LLMClassifier(**params, **FAKE).fit(X, y, sample_weight=sample_weight)
        return clf.predict_proba(X[:1])[0].tolist()

    assert shares() == pytest.approx([1 / 3, 2 / 3])
    assert shares(class_weight="balanced") == pytest.approx([1 / 2, 1 / 2])
    assert shares(class_weight={"u": 4}) == pytest.approx([4 / 6, 2 / 6])
    assert shares([3, 1, 0]) == pytest.approx([3 / 4, 1 / 4])
    assert shares([3, 1, 0], class_weight={"v": 3}) == pytest.approx([3 / 6, 3 / 6])


def test_same_seed_same_fit_bit_for_bit(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    fits = [
        LLMClassifier(target="label", features="text", **settings | {"random_state": seed}).fit(frame)
        for seed in (0, 0, 1)
    ]
    probas = [clf.predict_proba(frame) for clf in fits]
    assert np.array_equal(probas[0], probas[1])
    assert not np.array_equal(probas[0], probas[2])
    torch.manual_seed(5)
    np.random.seed(5)
    state = (torch.get_rng_state(), np.random.get_state()[1].copy())
    fits[0].fit(frame).predict(frame)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_memorised_rows_come_back_and_stop(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    faq = pd.DataFrame({"q": ["a", "b", "c"], "reply": ["yes", "no", "maybe so"]})
    model = LLMGenerator(target="reply", template="{q}:", **settings | {"adapter": "full", "epochs": 60})
    assert model.fit(faq).predict(faq).tolist() == faq["reply"].tolist()  # and no warning of cut answers
    assert model.score(faq) == 1.0
    clf = LLMClassifier(target="label", template="{text}:", **settings | {"epochs": 20}).fit(frame)
    assert clf.score(frame) == 1.0


# Validation and warm starts ----------------------------------------------------------------------------------------


def test_eval_set_is_measured_as_evaluate_would(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    params = settings | {"target": "label", "features": "text", "epochs": 2, "generation": {"max_new_tokens": 2}}
    one = LLMGenerator(**params).fit(frame[:4], eval_set=frame[4:].drop(columns="size"))
    two = LLMGenerator(**params).fit(frame[:4], eval_set=(frame[4:], frame["label"][4:].tolist()))
    losses = one.history_["validation_loss"].tolist()
    assert len(losses) == 2
    assert losses == two.history_["validation_loss"].tolist()
    assert one.best_epoch_ == int(np.argmin(losses)) + 1
    with pytest.warns(TruncationWarning):
        perplexity = one.evaluate(frame[4:])["perplexity"]
    assert losses[-1] == pytest.approx(math.log(perplexity), rel=1e-5)


def test_held_out_rows_keep_the_proportion_of_classes_and_are_not_trained_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def watch(model: Any, rows: Any, *args: Any, validation: Any = (), **kwargs: Any) -> Any:
        seen["trained"], seen["held"] = [row.row for row in rows], [row.row for row in validation]
        return train(model, rows, *args, validation=validation, **kwargs)

    monkeypatch.setattr("llmfit.estimators.fitting.train", watch)
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(20)], "label": ["rare"] * 4 + ["common"] * 16})
    LLMClassifier(target="label", validation_fraction=0.25, **settings).fit(frame)
    assert sorted(seen["trained"] + seen["held"]) == list(range(20))
    assert (len(seen["held"]), sum(row < 4 for row in seen["held"])) == (5, 1)
    weights = [0.0, 1.0] * 10
    LLMClassifier(target="label", validation_fraction=0.25, **settings).fit(frame, sample_weight=weights)
    assert all(row % 2 for row in seen["trained"] + seen["held"])


@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_warm_start_goes_on_from_the_last_fit(cls: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    params = settings | {"target": {"label": "category"}, "features": "text", "adapter": {"r": 2}}
    model = cls(warm_start=True, **params).fit(frame)
    first = model.predict_proba(frame)
    model.fit(frame)
    assert model.history_["step"].tolist() == [1, 2]
    assert not np.array_equal(model.predict_proba(frame), first)
    cold = cls(**params).fit(frame).fit(frame)
    assert cold.history_["step"].tolist() == [1]
    assert np.array_equal(cold.predict_proba(frame), first)
    with pytest.raises(
        ParameterError, match=r"^warm_start continues the adapter of the last fit, LoRA\(.*r=2\b.*anew\.$"
    ):
        model.set_params(adapter="full").fit(frame)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("longest", "given", "wanted"), [(5, None, 32), (30, None, 64), (30, 7, 7)])
def test_answers_may_be_twice_as_long_as_those_of_fit(longest: int, given: Any, wanted: int) -> None:
    y = ["a", "b" * longest] * (N // 2)  # tokens: the space before, a byte each, the end
    model = LLMGenerator(generation={"max_new_tokens": given}, **FAKE).fit(points(), y)
    assert model.max_new_tokens_ == wanted
