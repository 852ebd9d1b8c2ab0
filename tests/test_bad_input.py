"""Every bad input has its sentence, whole; and what is refused leaves an estimator as it was."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_model import NAME, put_in_place
from sklearn.exceptions import NotFittedError

from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LoRA
from llmfit.adapters import METHODS
from llmfit.exceptions import DataError, DataWarning, ModelLoadError, ParameterError, TemplateError, TrainingError
from llmfit.templates import FewShot, TemplateConfig

FAKE: dict[str, Any] = {"base_model": NAME, "adapter": "full", "verbose": 0}
N = 6


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


def rows(**columns: Any) -> pd.DataFrame:
    """Six rows of text, number and label; `columns` change or add some."""
    given = {"text": list("abcdef"), "size": [1.0, 2.0, 3.0] * 2, "label": ["u", "v"] * 3} | columns
    return pd.DataFrame(given, index=[f"i{i}" for i in range(N)])


def refused(error: type[Exception], work: Any, *args: Any, **kwargs: Any) -> str:
    """What an error says that is of exactly this type."""
    with pytest.raises(error) as caught:
        work(*args, **kwargs)
    assert type(caught.value) is error
    return str(caught.value)


# Parameters, each by itself ----------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[list[Any], str]] = {
    "epochs": ([0, -1, 1.5, True, None, "3"], "an int >= 1"),
    "batch_size": ([0, 2.0, None, "all", np.arange(2)], "'auto' or an int >= 1"),
    "verbose": ([-1, 1.0, None], "an int >= 0"),
    "batch_tokens": ([0, -5, 1.5, None, "all"], "'auto' or an int >= 1"),
    "max_length": ([1, 0, -1, 64.0, "long"], "an int >= 2"),
    "learning_rate": (
        [0, -1e-4, float("nan"), float("inf"), None, "fast", np.ones(2)],
        "'auto' or a finite number > 0",
    ),
    "max_grad_norm": ([0, -1, float("nan"), "1"], "a finite number > 0"),
    "warmup": ([-0.1, float("nan"), float("inf"), None, "x"], "a finite number >= 0"),
    "weight_decay": ([-0.1, float("nan"), None], "a finite number >= 0"),
    "validation_fraction": ([-0.1, 1.1, float("nan"), None, "half"], "a finite number >= 0 and <= 1"),
}
CHOICES: dict[str, tuple[list[Any], str]] = {
    "truncation": (["cut", None, True], "one of 'error', 'prompt'"),
    "schedule": (["cosin", 3], "one of 'cosine', 'linear', 'constant'"),
    "warm_start": ([2, None, "yes"], "one of True, False"),
}
ONE_BY_ONE = [(name, value, wanted) for name, (values, wanted) in {**NUMBERS, **CHOICES}.items() for value in values]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("name", "value", "wanted"), ONE_BY_ONE, ids=[f"{n}={v}" for n, v, _ in ONE_BY_ONE])
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator])
def test_parameter_that_cannot_be_used_is_named(cls: Any, name: str, value: Any, wanted: str) -> None:
    sentence = refused(ParameterError, cls(target="label", **FAKE | {name: value}).fit, rows())
    tail = " Did you mean 'cosine'?" if isinstance(value, str) and value == "cosin" else ""
    assert sentence == f"The {name!r} parameter of {cls.__name__} must be {wanted}. Got {value!r} instead.{tail}"


OTHER: list[tuple[dict[str, Any], str]] = [
    (
        {"validation_fraction": 1.0},
        "The 'validation_fraction' parameter of LLMClassifier must be a number >= 0 and < 1. Got 1.0 instead.",
    ),
    (
        {"adapter": "lorra"},
        f"The 'adapter' parameter of the estimator must be one of {', '.join(map(repr, METHODS))}, or another method "
        "of peft's. Got 'lorra' instead. Did you mean 'lora'?",
    ),
    (
        {"adapter": 3},
        "The 'adapter' parameter of the estimator must be None, a name, a dict or a spec. Got 3 instead.",
    ),
    (
        {"adapter": {"type": "lora", "rank": 4}},
        "The adapter 'lora' has no parameter 'rank'. It has "
        f"{', '.join(sorted(repr(f.name) for f in dataclasses.fields(LoRA)))}.",
    ),
    ({"adapter": {"r": 0}}, "The 'r' parameter of LoRA must be an int >= 1. Got 0 instead."),
    ({"adapter": {"dropout": 1}}, "The 'dropout' parameter of LoRA must be a number >= 0 and < 1. Got 1 instead."),
    ({"template": 3}, "The 'template' parameter of the estimator must be None, a str or a dict. Got 3 instead."),
    (
        {"template": {"tasks": "T"}},
        "template has no parameter 'tasks'. It has 'chat', 'few_shot', 'na_rep', 'system', 'task', 'template'. "
        "Did you mean 'task'?",
    ),
    ({"template": {"task": 3}}, "The 'task' parameter of template must be a str. Got 3 instead."),
    (
        {"template": {"chat": "yes"}},
        "The 'chat' parameter of template must be 'auto', True or False. Got 'yes' instead.",
    ),
    ({"template": {"few_shot": {"k": 0}}}, "The 'k' parameter of few_shot must be an int >= 1. Got 0 instead."),
    ({"early_stopping": True}, "early_stopping needs validation_fraction > 0, or an eval_set passed to fit."),
    (
        {"early_stopping": {"patiance": 1}, "validation_fraction": 0.5},
        "early_stopping has no parameter 'patiance'. It has 'min_delta', 'patience'. Did you mean 'patience'?",
    ),
    (
        {"early_stopping": 0, "validation_fraction": 0.5},
        "The 'patience' parameter of early_stopping must be an int >= 1. Got 0 instead.",
    ),
    (
        {"optimizer": "adamww"},
        "The 'optimizer' parameter of the estimator must be one of 'adamw', 'adam', 'sgd', 'adafactor', 'adagrad', "
        "'nadam', 'radam', 'rmsprop', 'adamw_8bit', 'paged_adamw_8bit', 'lion', 'lion_8bit'. Got 'adamww' instead. "
        "Did you mean 'adamw'?",
    ),
    (
        {"callbacks": 3},
        "The 'callbacks' parameter of the estimator must be callbacks or functions of the state. Got 3 instead.",
    ),
    (
        {"random_state": "a"},
        "The 'random_state' parameter of LLMClassifier cannot be used: 'a' cannot be used to seed a "
        "numpy.random.RandomState instance",
    ),
    (
        {"checkpoint_dir": "states"},
        "The 'checkpoint_dir' parameter of LLMClassifier needs random_state to be an int, so that a fit which is "
        "started again is the same fit. Got None instead.",
    ),
    ({"checkpoint_dir": 3}, "The 'checkpoint_dir' parameter of LLMClassifier must be None or a path. Got 3 instead."),
    (
        {"class_weight": "balance"},
        "The 'class_weight' parameter of LLMClassifier must be None, 'balanced' or a dict. Got 'balance' instead.",
    ),
    (
        {"class_weight": np.ones(2)},
        "The 'class_weight' parameter of LLMClassifier must be None, 'balanced' or a dict. "
        "Got array([1., 1.]) instead.",
    ),
    ({"class_weight": {"w": 1}}, "class_weight names the label 'w'; the classes are 'u', 'v'."),
    (
        {"class_weight": {"u": -1}},
        "The \"class_weight['u']\" parameter of LLMClassifier must be a finite number >= 0. Got -1 instead.",
    ),
    (
        {"class_weight": {"u": "heavy"}},
        "The \"class_weight['u']\" parameter of LLMClassifier must be a finite number >= 0. Got 'heavy' instead.",
    ),
    (
        {"features": 3},
        "The 'features' parameter of LLMClassifier must be None, a column name, a list of column names or a dict of "
        "column name to kind. Got 3 instead.",
    ),
    (
        {"features": []},
        "The 'features' parameter of LLMClassifier must be None, a column name, a list of column names or a dict of "
        "column name to kind. Got [] instead.",
    ),
    (
        {"features": {"size": "nummer"}},
        "The \"features['size']\" parameter of LLMClassifier must be one of 'text', 'category', 'number', 'binary', "
        "'set', 'date'. Got 'nummer' instead. Did you mean 'number'?",
    ),
    (
        {"target": ["label", "size"]},
        "The 'target' parameter of LLMClassifier must be one column. Got 'label', 'size'. LLMEstimator answers "
        "several.",
    ),
    (
        {"target": {"label": "number"}},
        "LLMClassifier predicts categories; its target is declared as 'number'.",
    ),
]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("params", "sentence"), OTHER, ids=[str(params) for params, _ in OTHER])
def test_parameter_that_makes_no_sense_has_its_sentence(params: dict[str, Any], sentence: str) -> None:
    clf = LLMClassifier(**{"target": "label"} | FAKE | params)
    assert refused(ParameterError, clf.fit, rows()) == sentence
    assert not clf.__sklearn_is_fitted__()


GENERATION: list[tuple[Any, str]] = [
    (3, "The 'generation' parameter of the estimator must be None or a dict. Got 3 instead."),
    (
        {"max_tokens": 3},
        "generation has no parameter 'max_tokens'. It has 'do_sample', 'length_penalty', 'max_new_tokens', "
        "'min_new_tokens', 'no_repeat_ngram_size', 'num_beams', 'repetition_penalty', 'temperature', 'top_k', "
        "'top_p'. Did you mean 'max_new_tokens'?",
    ),
    ({"max_new_tokens": 0}, "The 'max_new_tokens' parameter of generation must be an int >= 1. Got 0 instead."),
    ({"temperature": 0}, "The 'temperature' parameter of generation must be a finite number > 0. Got 0 instead."),
    ({"top_p": 1.5}, "The 'top_p' parameter of generation must be a finite number >= 0 and <= 1. Got 1.5 instead."),
    (
        {"temperature": 0.5},
        "The 'do_sample' parameter of generation must be True where temperature, top_p or top_k is set. "
        "Got False instead.",
    ),
]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("generation", "sentence"), GENERATION, ids=[str(g) for g, _ in GENERATION])
def test_generation_that_makes_no_sense_has_its_sentence(generation: Any, sentence: str) -> None:
    model = LLMGenerator(target="label", generation=generation, **FAKE)
    assert refused(ParameterError, model.fit, rows()) == sentence


def test_generator_refuses_a_target_that_is_no_text(fake: None) -> None:
    sentence = refused(ParameterError, LLMGenerator(target={"label": "category"}, **FAKE).fit, rows())
    assert sentence == "LLMGenerator generates text; its target is declared as 'category'."


# Data --------------------------------------------------------------------------------------------------------------

DATA: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no such feature": (
        {"features": ["txt", "size"]},
        (rows(),),
        {},
        DataError,
        "LLMClassifier needs the feature column 'txt', but the frame has only 'text', 'size', 'label'.",
    ),
    "feature named twice": (
        {"features": ["text", "text"]},
        (rows(),),
        {},
        DataError,
        "'text' is named twice in 'features' of LLMClassifier.",
    ),
    "target among the features": (
        {"features": ["text", "label"]},
        (rows(),),
        {},
        DataError,
        "The target column 'label' is among the features. Leave it out of 'features'.",
    ),
    "no feature but the target": (
        {},
        (rows()[["label"]],),
        {},
        DataError,
        "LLMClassifier needs at least one feature column beside the target 'label'.",
    ),
    "no such target": (
        {"target": "lable"},
        (rows(),),
        {},
        DataError,
        "LLMClassifier needs the target column 'lable', but the frame has only 'text', 'size', 'label'.",
    ),
    "y None and no target": (
        {"target": None},
        (rows(),),
        {},
        DataError,
        "This LLMClassifier estimator requires y to be passed, but the target y is None. Pass y, or name the target "
        "column of the frame with the 'target' parameter.",
    ),
    "y of another length": (
        {},
        (rows(), ["u", "v"]),
        {},
        DataError,
        "X and y must have the same length: inconsistent numbers of samples, 6 and 2.",
    ),
    "y with two columns": (
        {},
        (rows(), rows()[["text", "size"]]),
        {},
        DataError,
        "y should be a 1d array, got an array of shape (6, 2) instead.",
    ),
    "missing target value": (
        {},
        (rows(label=["u", "v", None, "u", None, "v"]),),
        {},
        DataError,
        "Row 2 (index 'i2'): the target 'label' is missing, in 2 row(s) in all. Drop or fill them: "
        "Input y contains NaN.",
    ),
    "no row": (
        {},
        (rows()[:0],),
        {},
        DataError,
        "LLMClassifier needs at least one row to fit, but the frame has 0 sample(s).",
    ),
    "one class": (
        {},
        (rows(label="u"),),
        {},
        DataError,
        "LLMClassifier needs at least two classes in 'label', but every row is 'u': only one class.",
    ),
    "labels of two kinds": (
        {},
        (rows(label=[1, "1"] * 3),),
        {},
        DataError,
        "The labels of 'label' are of kinds that cannot be sorted: int, str.",
    ),
    "categories of two kinds": (
        {},
        (rows(label=pd.Categorical(["1", 1] * 3)),),
        {},
        DataError,
        "The labels of 'label' are of kinds that cannot be sorted: int, str.",
    ),
    "empty label": (
        {},
        (rows(label=["", "v"] * 3),),
        {},
        DataError,
        "Each class of 'label' needs a text of its own that is not empty. Got '', 'v'.",
    ),
    "measurements as labels": (
        {},
        (rows(label=[0.5, 1.5] * 3),),
        {},
        DataError,
        "The labels of 'label' are no classes: Unknown label type: continuous. Maybe you are trying to fit a "
        "classifier, which expects discrete classes on a regression target with continuous values.",
    ),
    "validation leaves none to validate": (
        {"validation_fraction": 0.05},
        (rows(),),
        {},
        DataError,
        "validation_fraction 0.05 of 6 row(s) leaves no row to validate on.",
    ),
    "validation leaves none to train": (
        {"validation_fraction": 0.95},
        (rows(),),
        {},
        DataError,
        "validation_fraction 0.95 of 6 row(s) leaves no row to train on.",
    ),
    "eval_set without the target": (
        {},
        (rows(),),
        {"eval_set": rows()[["text", "size"]]},
        DataError,
        "eval_set: LLMClassifier needs the target column 'label', but the frame has only 'text', 'size'.",
    ),
    "eval_set without rows": (
        {},
        (rows(),),
        {"eval_set": rows()[:0]},
        DataError,
        "eval_set: LLMClassifier needs at least one row to compare with its target, but the frame has none.",
    ),
    "eval_set in a list": (
        {},
        (rows(),),
        {"eval_set": [(rows(), ["u"] * 6)]},
        DataError,
        "eval_set must be a frame or a tuple (X, y). Got a list of tuples instead.",
    ),
    "eval_set of three": (
        {},
        (rows(),),
        {"eval_set": (rows(), ["u"] * 6, None)},
        DataError,
        "eval_set must be a frame or a tuple (X, y). Got a tuple of 3 instead.",
    ),
    "weights all zero": (
        {},
        (rows(),),
        {"sample_weight": [0] * 6},
        DataError,
        "sample_weight cannot be used: Sample weights must contain at least one non-zero number.",
    ),
    "negative weight": (
        {},
        (rows(),),
        {"sample_weight": [1, 1, 1, -1, 1, 1]},
        DataError,
        "sample_weight cannot be used: Negative values in data passed to `sample_weight`.",
    ),
    "missing weight": (
        {},
        (rows(),),
        {"sample_weight": [1, 1, 1, np.nan, 1, 1]},
        DataError,
        "sample_weight cannot be used: Input sample_weight contains NaN.",
    ),
    "weight that is no number": (
        {},
        (rows(),),
        {"sample_weight": ["a"] * 6},
        DataError,
        "sample_weight cannot be used: could not convert string to float: 'a'",
    ),
    "weights of another length": (
        {},
        (rows(),),
        {"sample_weight": [1, 1]},
        DataError,
        "sample_weight cannot be used: sample_weight.shape == (2,), expected (6,)!",
    ),
    "class weights that leave nothing": (
        {"class_weight": {"u": 0, "v": 0}},
        (rows(),),
        {},
        DataError,
        "Every row to train on has weight zero: look at sample_weight and class_weight.",
    ),
    "column that is there twice": (
        {},
        (rows().set_axis(["text", "text", "label"], axis="columns"),),
        {},
        DataError,
        "The frame has more than one column named 'text'. Rename or drop one.",
    ),
    "mixed column names": (
        {},
        (rows().set_axis(["text", 1, "label"], axis="columns"),),
        {},
        DataError,
        "Column names must all be str. Got 1 (int) beside str names. Rename it, for example with "
        "df.columns = df.columns.astype(str).",
    ),
    "number that is none": (
        {"features": {"text": "number"}},
        (rows(),),
        {},
        DataError,
        "Row 0 (index 'i0'): the number column 'text' holds 'a', which is no number.",
    ),
    "target in the template": (
        {"template": "{text} is {label}"},
        (rows(),),
        {},
        TemplateError,
        "The template reads the target column 'label', which is what it must predict.",
    ),
    "no such column in the template": (
        {"template": "{txt}"},
        (rows(),),
        {},
        TemplateError,
        "The template uses {txt}, but the columns are 'text', 'size'. Did you mean 'text'? "
        "Write {{ and }} for braces that are text.",
    ),
    "column beside the features": (
        {"template": "{text} {size}", "features": ["text"]},
        (rows(),),
        {},
        TemplateError,
        "The template uses the column 'size', which is not among the features 'text'. Add it.",
    ),
    "attribute in the template": (
        {"template": "{text.__class__}"},
        (rows(),),
        {},
        TemplateError,
        "The template reads {text.__class__}, an attribute, index or conversion of 'text': a field is the exact name "
        "of a column.",
    ),
    "brace left open": (
        {"template": "{text"},
        (rows(),),
        {},
        TemplateError,
        "The template '{text' cannot be read: expected '}' before end of string. Write {{ and }} for braces that "
        "are text.",
    ),
    "task that is never used": (
        {"template": {"task": "Sort.", "template": "{text}"}},
        (rows(),),
        {},
        TemplateError,
        "The task is given, but the template never uses it: write {task} where it belongs.",
    ),
    "format that is none": (
        {"template": "{size:hello}"},
        (rows(),),
        {},
        TemplateError,
        "The template formats 'size' as 'hello', which is no format of a number (such as .2f or 03d) or a date "
        "(such as %d.%m.%Y).",
    ),
    "format of no number": (
        {"template": "{text:.2f}"},
        (rows(text=["1", "2", "x", "4", "5", "6"]),),
        {},
        TemplateError,
        "Row 2 (index 'i2'): the template formats 'text' as '.2f', but its value is 'x'.",
    ),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("params", "args", "kwargs", "error", "sentence"), DATA.values(), ids=DATA)
def test_bad_data_has_its_sentence_and_changes_nothing(
    params: dict[str, Any], args: Any, kwargs: Any, error: Any, sentence: str
) -> None:
    clf = LLMClassifier(**{"target": "label"} | FAKE).fit(rows())
    wanted = clf.predict_proba(rows())
    clf.set_params(**params)
    before = dict(vars(clf))
    assert refused(error, clf.fit, *args, **kwargs) == sentence
    assert vars(clf) == before
    assert np.array_equal(clf.predict_proba(rows()), wanted)
    assert clf.classes_.tolist() == ["u", "v"]
    new = LLMClassifier(**{"target": "label"} | FAKE | params)
    before = dict(vars(new))
    assert refused(error, new.fit, *args, **kwargs) == sentence
    assert vars(new) == before


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("params", "args", "kwargs", "error", "sentence"), DATA.values(), ids=DATA)
def test_chooser_says_the_same(params: dict[str, Any], args: Any, kwargs: Any, error: Any, sentence: str) -> None:
    model = LLMEstimator(**{"target": {"label": "category"}} | FAKE).fit(rows())
    if params.get("target", "label") is not None:
        params = {**params, "target": {params.get("target", "label"): "category"}}
    wanted = model.predict_proba(rows())
    model.set_params(**params)
    before = dict(vars(model))
    inner = dict(vars(model.estimator_))
    found = refused(error, model.fit, *args, **kwargs).replace("LLMEstimator", "LLMClassifier")
    assert found == sentence
    assert vars(model) == before
    assert vars(model.estimator_) == inner
    assert np.array_equal(model.predict_proba(rows()), wanted)


PREDICT: dict[str, tuple[Any, type[Exception], str]] = {
    "missing column": (
        rows()[["text", "label"]],
        DataError,
        "LLMClassifier needs the feature column 'size', but the frame has only 'text', 'label'.",
    ),
    "column that is there twice": (
        pd.concat([rows(), rows()[["size"]]], axis="columns"),
        DataError,
        "The frame has more than one column named 'size'. Rename or drop one.",
    ),
    "number that is none": (
        rows(size=[1, 2, 3, 4, "five", 6]),
        DataError,
        "Row 4 (index 'i4'): the number column 'size' holds 'five', which is no number.",
    ),
    "bare texts": (
        ["a", "b"],
        DataError,
        "LLMClassifier needs the feature column 'size', but the frame has only 'text'.",
    ),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("X", "error", "sentence"), PREDICT.values(), ids=PREDICT)
def test_rows_that_cannot_be_answered_are_named(X: Any, error: Any, sentence: str) -> None:
    clf = LLMClassifier(target="label", **FAKE).fit(rows())
    for method in (clf.predict, clf.predict_proba, clf.score, clf.evaluate):
        assert refused(error, method, X) == sentence


MEASURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no row": (
        (rows()[:0],),
        "{} needs at least one row to compare with its target, but the frame has none.",
    ),
    "no target": (
        (rows()[["text", "size"]],),
        "{} needs the target column 'label', but the frame has only 'text', 'size'.",
    ),
    "another length": (
        (rows(), ["u"]),
        "X and y must have the same length: inconsistent numbers of samples, 6 and 1.",
    ),
    "missing label": (
        (rows(label=["u", None] * 3),),
        "Row 1 (index 'i1'): the target 'label' is missing, in 3 row(s) in all. Drop or fill them: "
        "Input y contains NaN.",
    ),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("args", "sentence"), MEASURED.values(), ids=MEASURED)
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator])
def test_rows_that_cannot_be_measured_are_named(cls: Any, args: Any, sentence: str) -> None:
    model = cls(target="label", **FAKE).fit(rows())
    for method in (model.score, model.evaluate):
        assert refused(DataError, method, *args) == sentence.format(cls.__name__)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([0] * 6, "sample_weight cannot be used: Sample weights must contain at least one non-zero number."),
        ([1, 1], "sample_weight cannot be used: sample_weight.shape == (2,), expected (6,)!"),
    ],
)
def test_weights_that_cannot_score_are_refused(cls: Any, weights: Any, sentence: str) -> None:
    model = cls(target="label", **FAKE).fit(rows())
    assert refused(DataError, model.score, rows(), sample_weight=weights) == sentence


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        *((cls, name) for cls in (LLMClassifier, LLMEstimator) for name in ("predict_proba", "predict", "score")),
        *((cls, name) for cls in (LLMClassifier, LLMGenerator, LLMEstimator) for name in ("evaluate", "save")),
        (LLMClassifier, "predict_log_proba"),
        (LLMGenerator, "predict"),
        (LLMGenerator, "score"),
    ],
)
def test_what_is_not_fitted_says_so(cls: Any, method: str) -> None:
    sentence = refused(NotFittedError, getattr(cls(), method), rows())
    assert sentence == (
        f"This {cls.__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before using this "
        "estimator."
    )


@pytest.mark.usefixtures("fake")
def test_labels_that_are_the_same_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clf = LLMClassifier(target="label", **FAKE).fit(rows())
    monkeypatch.setattr("fake_model.ByteTokenizer.__call__", lambda _, texts, **__: {"input_ids": [[1]] * len(texts)})
    monkeypatch.setattr("llmfit.encoding.Encoder.prompts", lambda _, rows: [(1,)] * len(rows))
    sentence = refused(DataError, clf.predict, rows())
    assert sentence == "Two of the classes 'u', 'v' are the same tokens to this model. Rename one."


# What only a model with a tokenizer can refuse -----------------------------------------------------------------------


REAL: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "prompt that is too long": (
        {"max_length": 40},
        {"text": ["a", "b", "c" * 40, "d", "e", "f"]},
        TemplateError,
        "Row 2 (index 'i2'): the prompt has 45 tokens and 3 are for the answer, max_length is 40. Raise max_length, "
        "or set truncation='prompt'.",
    ),
    "answer that does not fit": (
        {"max_length": 20, "truncation": "prompt"},
        {"label": ["u" * 30, "v"] * 3},
        TemplateError,
        "Row 0 (index 'i0'): the answer has 32 tokens, max_length is 20. An answer is never cut: raise max_length.",
    ),
    "FewShot that cannot be": (
        {"template": {"few_shot": FewShot(k=0)}},
        {},
        ParameterError,
        "The 'k' parameter of few_shot must be an int >= 1. Got 0 instead.",
    ),
    "TemplateConfig that cannot be": (
        {"template": TemplateConfig(chat="sometimes")},
        {},
        ParameterError,
        "The 'chat' parameter of template must be 'auto', True or False. Got 'sometimes' instead.",
    ),
    "no such base model": (
        {"base_model": "/nothing/here"},
        {},
        ModelLoadError,
        "The base model '/nothing/here' is a path, but there is nothing there.",
    ),
    "base model that is no name": (
        {"base_model": None},
        {},
        ParameterError,
        "The 'base_model' parameter of the estimator must be a hub id, a path or an alias. Got None instead.",
    ),
    "no such dtype": (
        {"dtype": "float31"},
        {},
        ParameterError,
        "The 'dtype' parameter of the estimator must be one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'. "
        "Got 'float31' instead. Did you mean 'float32'?",
    ),
}


@pytest.fixture
def real(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"target": "label", "features": "text", "template": "{text} is:", "adapter": "full"}


@pytest.mark.parametrize(("params", "columns", "error", "sentence"), REAL.values(), ids=REAL)
def test_what_a_base_model_cannot_do_has_its_sentence(
    params: dict[str, Any], columns: dict[str, Any], error: Any, sentence: str, real: dict[str, Any]
) -> None:
    clf = LLMClassifier(**real).fit(rows())
    wanted = clf.predict_proba(rows())
    fitted = {name: value for name, value in vars(clf).items() if name not in clf.get_params()}
    assert refused(error, clf.set_params(**params).fit, rows(**columns)) == sentence
    assert {name: value for name, value in vars(clf).items() if name not in clf.get_params()} == fitted
    clf.set_params(**real)
    assert np.array_equal(clf.predict_proba(rows()), wanted)


def test_an_unseen_label_in_eval_set_is_named(real: dict[str, Any]) -> None:
    held = rows(label=["u", "v", "w"] * 2)
    for cls in (LLMClassifier, LLMEstimator):
        assert refused(DataError, cls(**real).fit, rows(), eval_set=held) == (
            "eval_set: Row 2 (index 'i2') has the label 'w', which no fitted row has. The classes are 'u', 'v'."
        )


def test_too_few_rows_for_the_worked_examples_are_said(real: dict[str, Any]) -> None:
    few = LLMClassifier(**real | {"adapter": None, "template": {"template": "{text} is:", "few_shot": 9}})
    with pytest.warns(DataWarning) as warned:
        few.fit(rows())
    assert [str(w.message) for w in warned] == [
        "few_shot asks for 9 worked examples, but the rows have 6 distinct prompt(s): 5 can stand before each row, "
        "which is never its own example."
    ]


def test_base_model_that_is_nowhere_says_where_it_was_looked_for(real: dict[str, Any]) -> None:
    sentence = refused(ModelLoadError, LLMClassifier(**real | {"base_model": "no-such/model"}).fit, rows())
    assert sentence.startswith(
        "The base model 'no-such/model' is no local folder or file, none of the aliases smollm2, and cannot be had "
        "from the hub: "
    )


def test_rows_asked_that_are_too_long_are_named(real: dict[str, Any]) -> None:
    clf = LLMClassifier(**real, max_length=40).fit(rows())
    long = rows(text=["a", "b", "c", "d" * 50, "e", "f"])
    assert refused(TemplateError, clf.predict, long) == (
        "Row 3 (index 'i3'): the prompt has 55 tokens and 3 are for the answer, max_length is 40. Raise max_length, "
        "or set truncation='prompt'."
    )


@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize(
    ("broken", "error"),
    [("loss", TrainingError), ("interrupt", KeyboardInterrupt), ("callback", ZeroDivisionError)],
)
def test_fit_that_fails_in_training_leaves_the_one_before(
    cls: Any, broken: str, error: Any, warm_start: bool, real: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"generation": {"max_new_tokens": 2, "min_new_tokens": 2}} if cls is LLMGenerator else {}
    real |= {"warm_start": warm_start, "batch_size": 3, **own}
    model = cls(**real).fit(rows())
    ask = model.predict_proba if cls is not LLMGenerator else lambda X: model.evaluate(X)["perplexity"]
    with pytest.warns() if cls is LLMGenerator else nullcontext():
        wanted = ask(rows())
    before, steps = dict(vars(model)), len(model.history_)

    def fail(state: Any) -> None:
        if state.step == 1:
            raise error("stopped")

    if broken == "loss":
        model.set_params(learning_rate=1e30, optimizer="sgd", max_grad_norm=None, epochs=20, schedule="constant")
    else:
        model.set_params(callbacks=fail)
    changed = rows(label=["w", "x"] * 3, text=["longer than before"] * 6)
    with pytest.raises(error):
        model.fit(changed)
    fitted = {name for name in before if name not in model.get_params()}
    assert set(vars(model)) - set(model.get_params()) == fitted
    assert all(vars(model)[name] is before[name] for name in fitted)
    assert len(model.history_) == steps
    with pytest.warns() if cls is LLMGenerator else nullcontext():
        assert np.array_equal(ask(rows()), wanted)


@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_first_fit_that_fails_leaves_no_estimator_that_looks_fitted(cls: Any, real: dict[str, Any]) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError

    model = cls(**real, callbacks=fail)
    before = dict(vars(model))
    refused(ZeroDivisionError, model.fit, rows())
    assert vars(model) == before
    refused(NotFittedError, model.predict, rows())
