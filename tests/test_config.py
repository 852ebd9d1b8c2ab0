"""Configurations in llmfit's own keys: reading and merging, checks at any depth, exact round trips, the JSON Schema."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from llmfit import DoRA, LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor, LoRA, PrefixTuning, Quantization
from llmfit.adapters import METHODS
from llmfit.config import from_config, json_schema, to_config, to_yaml
from llmfit.config.keys import ESTIMATORS, estimator_keys, own_keys
from llmfit.config.reading import READERS, merge, read_config
from llmfit.exceptions import ParameterError
from llmfit.heads import LinearHead
from llmfit.templates import FewShot, TemplateConfig

DOCS = Path(__file__).parent.parent / "docs"
CONFIGS = Path(__file__).parent / "configs"


def refused(config: Any, **overrides: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        from_config(config, **overrides)
    return str(caught.value)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Reading ----------------------------------------------------------------------------------------


def test_a_dict_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    config = {
        "estimator": "LLMClassifier",
        "target": "label",
        "adapter": {"type": "lora", "r": 8},
        "learning_rate": 1e-4,
    }
    files = [
        written(tmp_path, "a.yaml", to_yaml(config)),
        written(tmp_path, "a.yml", to_yaml(config)),
        written(tmp_path, "a.json", json.dumps(config)),
    ]
    expected = LLMClassifier(target="label", adapter={"type": "lora", "r": 8}, learning_rate=1e-4)
    for source in (config, *files, *map(str, files)):
        found = from_config(source)
        assert type(found) is LLMClassifier
        assert found.get_params() == expected.get_params()


def test_the_dict_given_is_not_changed() -> None:
    config = {"target": "a", "adapter": {"r": 4}, "hyperopt": {"adapter.r": [4, 8]}}
    before = json.dumps(config)
    from_config(config, adapter__alpha=3)
    assert json.dumps(config) == before


YAML: dict[str, tuple[str, Any]] = {
    "small numbers": ("a: 1e-4", 1e-4),
    "more of them": ("a: 5E+3", 5e3),
    "numbers with a point": ("a: .5", 0.5),
    "whole numbers": ("a: 010", 10),
    "words of version 1.1": ("a: [yes, no, on, off]", ["yes", "no", "on", "off"]),
    "truth": ("a: [true, False]", [True, False]),
    "nothing": ("a: null", None),
    "nothing written": ("a:", None),
    "dates are words": ("a: 2024-01-01", "2024-01-01"),
    "times are words": ("a: 12:30:00", "12:30:00"),
    "keys that are numbers": ("a: {1: 2.0, 5: 1.0}", {1: 2.0, 5: 1.0}),
    "merged keys": ("b: &b {c: 1}\na: {<<: *b, d: 2}", {"c": 1, "d": 2}),
    "lines": ("a: |\n  x\n  y\n", "x\ny\n"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_read_as_version_1_2(name: str, tmp_path: Path) -> None:
    text, value = YAML[name]
    found = read_config(written(tmp_path, "a.yaml", text))["a"]
    assert found == value
    assert type(found) is type(value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1), PLAIN))
@hypothesis_settings(deadline=None, max_examples=150)
def test_whatever_is_written_as_yaml_is_read_back(config: dict[str, Any]) -> None:
    assert READERS[".yaml"](to_yaml(config)) == config
    assert repr(READERS[".yaml"](to_yaml(config))) == repr(config)  # 1 is not True, and 1.0 is not 1


MERGED: dict[str, tuple[list[Any], Any]] = {
    "keys": ([{"a": 1, "b": 2}, {"b": 3, "c": 4}], {"a": 1, "b": 3, "c": 4}),
    "within keys": ([{"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}], {"a": {"x": 1, "y": 3}}),
    "lists are taken whole": ([{"a": [1, 2]}, {"a": [3]}], {"a": [3]}),
    "another type is taken whole": (
        [{"a": {"type": "lora", "r": 3}}, {"a": {"type": "ia3"}}],
        {"a": {"type": "ia3"}},
    ),
    "the same type": ([{"a": {"type": "lora", "r": 3}}, {"a": {"type": "lora"}}], {"a": {"type": "lora", "r": 3}}),
    "a mapping over a name": ([{"a": "lora"}, {"a": {"r": 3}}], {"a": {"r": 3}}),
    "nothing over something": ([{"a": {"r": 3}}, {"a": None}], {"a": None}),
    "a path": ([{"a": {"x": 1}}, {"a.y": 2}], {"a": {"x": 1, "y": 2}}),
    "a path in one": ([{"a": {"x": 1}, "a.y.z": 2}], {"a": {"x": 1, "y": {"z": 2}}}),
    "a path over a name": ([{"adapter": "ia3"}, {"adapter.r": 2}], {"adapter": {"type": "ia3", "r": 2}}),
    "a path over bits": (
        [{"quantization": 4}, {"quantization.type": "fp4"}],
        {"quantization": {"bits": 4, "type": "fp4"}},
    ),
    "a path into a list": ([{"a": [{"x": 1}, {"x": 2}]}, {"a.1.x": 3}], {"a": [{"x": 1}, {"x": 3}]}),
    "nothing": ([], {}),
}


@pytest.mark.parametrize("name", MERGED)
def test_configs_are_merged(name: str) -> None:
    sources, whole = MERGED[name]
    assert read_config(sources) == whole


def test_merging_changes_neither_side() -> None:
    first, second = {"a": {"x": 1}}, {"a": {"y": 2}}
    merge(first, second)
    assert (first, second) == ({"a": {"x": 1}}, {"a": {"y": 2}})


FILES: dict[str, tuple[str, str, str]] = {
    "no mapping": ("a.yaml", "- a\n- b\n", "The config {path!r} must hold keys and values, not a list."),
    "no yaml": (
        "a.yaml",
        "a: [1,\nb: 2",
        "The config {path!r} cannot be read in line 2: expected ',' or ']', but got '<stream end>'.",
    ),
    "a key twice": ("a.yaml", "a: 1\nb: 2\na: 3\n", "The config {path!r} cannot be read in line 3: 'a' stands twice."),
    "a key of json twice": ("a.json", '{"a": 1, "a": 2}', "The config {path!r} cannot be read: 'a' stands twice."),
    "another ending": ("a.toml", "", "The config {path!r} must be a file that ends in one of .yaml, .yml, .json."),
    "keys that are no texts": ("a.yaml", "1: a", "The keys of a config must be texts. Got 1 instead."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_says_so(name: str, tmp_path: Path) -> None:
    file, text, sentence = FILES[name]
    path = written(tmp_path, file, text)
    assert refused(path) == sentence.format(path=str(path))


def test_a_file_that_is_missing_or_no_source_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "no.yaml")
    assert refused(path) == f"The config {path!r} cannot be read: No such file or directory."
    assert refused(3) == (
        "The 'config' parameter of from_config must be a dict, the path of a file, or a list of them. Got 3 instead."
    )
    assert refused([{"a": [1]}, {"a.3": 2}]) == "The config's 'a' is a list of 1: '3' is none of its items."


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    assert from_config(written(tmp_path, "a.yaml", "# nothing\n")).get_params() == LLMEstimator().get_params()


# Parameters given beside ------------------------------------------------------------------------


def test_parameters_take_the_place_of_what_the_config_says() -> None:
    config = {"estimator": "LLMClassifier", "adapter": {"type": "lora", "r": 8}, "epochs": 5}
    found = from_config(config, epochs=2, adapter__alpha=3, **{"adapter.dropout": 0.5})
    assert found.epochs == 2
    assert found.adapter == {"type": "lora", "r": 8, "alpha": 3, "dropout": 0.5}
    assert from_config(config, adapter=None).adapter is None
    assert from_config(config, adapter=LoRA(r=3)).adapter == LoRA(r=3)


def test_other_keys_are_merged_into_the_config() -> None:
    base = {"input_features": {"name": "a", "type": "text"}, "trainer": {"epochs": 2}}
    found = from_config(base, **{"trainer.learning_rate": 0.5, "estimator": "LLMGenerator"})
    assert (type(found), found.epochs, found.learning_rate) == (LLMGenerator, 2, 0.5)
    search = from_config(base, hyperopt={"trainer.epochs": [1, 2]})
    assert search.param_grid == {"epochs": [1, 2]}


def test_a_parameter_given_takes_the_place_of_the_axis_over_it() -> None:
    config = {"hyperopt": {"adapter.r": [4, 8], "learning_rate": [1e-4, 1e-3]}}
    assert from_config(config, learning_rate=0.5).param_grid == {"adapter__r": [4, 8]}
    assert from_config(config, adapter__r=2).estimator.adapter == {"type": "lora", "r": 2}


# Checks -----------------------------------------------------------------------------------------

SENTENCES: dict[str, tuple[Any, str]] = {
    "a key": ({"epoch": 1}, "The config has no key 'epoch'. Did you mean 'epochs'?"),
    "a key within": ({"adapter": {"rr": 1}}, "The config has no key 'adapter.rr'. Did you mean 'adapter.r'?"),
    "a key of another method": (
        {"adapter": {"type": "prefix_tuning", "r": 1}},
        "The config has no key 'adapter.r'. Did you mean 'adapter.type'?",
    ),
    "a key within a key": (
        {"template": {"few_shot": {"n": 1}}},
        "The config has no key 'template.few_shot.n'. Did you mean 'template.few_shot.k'?",
    ),
    "a key of another estimator": (
        {"estimator": "LLMRegressor", "class_weight": "balanced"},
        "The config has no key 'class_weight'. LLMRegressor has no such parameter.",
    ),
    "an estimator": (
        {"estimator": "LLMClasifier"},
        "The 'estimator' parameter of the config must be one of 'LLMClassifier', 'LLMRegressor', 'LLMGenerator', "
        "'LLMEstimator'. Got 'LLMClasifier' instead. Did you mean 'LLMClassifier'?",
    ),
    "a method": (
        {"adapter": {"type": "fuller"}},
        f"The 'adapter' parameter of the estimator must be one of {', '.join(map(repr, METHODS))}, or another method "
        "of peft's. Got 'fuller' instead. Did you mean 'full'?",
    ),
    "a value": (
        {"epochs": "three"},
        "The 'epochs' parameter of LLMClassifier must be an int >= 1. Got 'three' instead.",
    ),
    "a value within": (
        {"estimator": "LLMGenerator", "adapter": {"r": 0}},
        "The 'r' parameter of LoRA must be an int >= 1. Got 0 instead.",
    ),
    "two that do not agree": (
        {"adapter": "full", "quantization": 4},
        "adapter='full' trains the base model's own weights, and weights stored in 4 bits cannot be trained. Set "
        "quantization=None, or choose an adapter such as 'lora'.",
    ),
    "a search that is none": ({"hyperopt": 3}, "The config's 'hyperopt' must be a mapping. Got 3 instead."),
    "a search without an axis": (
        {"hyperopt": {"kind": "random"}},
        "The config's 'hyperopt' needs at least one axis, such as parameters: {adapter.r: [4, 16]}.",
    ),
    "an axis": (
        {"hyperopt": {"learning_rat": [1, 2]}},
        "The config has no key 'hyperopt.learning_rat'. Did you mean 'learning_rate'?",
    ),
    "a key of an axis": (
        {"hyperopt": {"adapter.rr": [1, 2]}},
        "The config has no key 'adapter.rr'. Did you mean 'adapter.r'?",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_is_said_in_one_sentence(name: str) -> None:
    config, sentence = SENTENCES[name]
    assert refused(config) == sentence


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_parameter_is_a_key_and_no_other(estimator: str) -> None:
    assert list(estimator_keys(estimator)) == ESTIMATORS[estimator]._get_param_names() or set(
        estimator_keys(estimator)
    ) == set(ESTIMATORS[estimator]._get_param_names())
    assert set(estimator_keys(estimator)) <= set(own_keys())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_defaults_of_every_estimator_can_be_read(estimator: str) -> None:
    usual = ESTIMATORS[estimator]().get_params(deep=False)
    assert from_config({"estimator": estimator, **usual}).get_params() == ESTIMATORS[estimator]().get_params()


# To a config and back ---------------------------------------------------------------------------


def test_a_fitted_estimator_says_how_it_was_made(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(target="label", features="text", class_weight={"fruit": 2.0}, **settings).fit(frame)
    config = clf.to_config()
    assert config == {
        "estimator": "LLMClassifier", "target": "label", "features": "text", "class_weight": {"fruit": 2.0}, **settings
    }  # fmt: skip
    again = from_config(config).fit(frame)
    assert np.array_equal(again.predict_proba(frame), clf.predict_proba(frame))


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a spec": (
        {"adapter": LoRA(r=4, target_modules=["q"])},
        {"adapter": {"type": "lora", "target_modules": ["q"], "r": 4}},
    ),
    "a spec of defaults": ({"adapter": LoRA()}, {"adapter": {"type": "lora"}}),
    "a head": ({"head": LinearHead(pooling="mean")}, {"head": {"type": "linear", "pooling": "mean"}}),
    "bits": ({"quantization": Quantization(bits=8)}, {"quantization": {"bits": 8}}),
    "a template": (
        {"template": TemplateConfig(task="t", few_shot=FewShot(k=2))},
        {"template": {"task": "t", "few_shot": {"k": 2}}},
    ),
    "labels that are numbers": ({"class_weight": {1: 2.0}}, {"class_weight": {"__pairs__": [[1, 2.0]]}}),
    "numbers of NumPy": (
        {"epochs": np.int64(2), "learning_rate": np.float64(0.5)},
        {"epochs": 2, "learning_rate": 0.5},
    ),
    "a path": ({"checkpoint_dir": Path("a") / "b", "random_state": 0}, {"random_state": 0, "checkpoint_dir": "a/b"}),
    "a truth that is not the number": ({"verbose": True}, {"verbose": True}),
    "a tuple": ({"features": ("a", "b")}, {"features": ["a", "b"]}),
}


@pytest.mark.parametrize("name", FORMS)
def test_specs_and_other_values_have_a_plain_form(name: str) -> None:
    params, plain = FORMS[name]
    config = to_config(LLMClassifier(**params))
    assert config == {"estimator": "LLMClassifier", **plain}
    assert json.loads(json.dumps(config)) == config
    assert READERS[".yaml"](to_yaml(config)) == config
    again = from_config(config)
    assert to_config(again) == config
    if name == "labels that are numbers":
        assert again.class_weight == {1: 2.0}


@pytest.mark.parametrize(
    ("name", "value"), [("callbacks", [print]), ("random_state", np.random.RandomState(0)), ("adapter", object())]
)
def test_what_has_no_plain_form_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        LLMClassifier(**{name: value}).to_config()
    assert str(caught.value) == (
        f"The {name!r} parameter of LLMClassifier has no plain form that a config could hold. Got {value!r}. Set it "
        "after from_config."
    )


def as_dict(value: Any) -> Any:
    """A spec as the dict that stands for it, by hand."""
    if type(value) in (LoRA, DoRA, PrefixTuning, LinearHead, Quantization, TemplateConfig, FewShot):
        own = {f.name: as_dict(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default}
        return {**({"type": value.type} if type(value) not in (Quantization, TemplateConfig, FewShot) else {}), **own}
    return value


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARES = st.floats(0, 0.9)
LORA = st.fixed_dictionaries(
    {}, optional={"r": st.integers(1, 64), "alpha": st.none() | st.integers(1, 64), "dropout": SHARES}
)
ADAPTERS = st.one_of(
    st.sampled_from([None, "lora", "ia3", "prefix_tuning"]),
    LORA,
    LORA.map(lambda keys: {"type": "lora", **keys}),
    LORA.map(lambda keys: LoRA(**keys)),
    LORA.map(lambda keys: DoRA(**keys)),
    st.integers(1, 9).map(lambda n: PrefixTuning(num_virtual_tokens=n)),
)
TEMPLATES = st.one_of(
    st.none(),
    TEXTS,
    st.fixed_dictionaries(
        {}, optional={"task": st.none() | TEXTS, "na_rep": TEXTS, "few_shot": st.none() | st.integers(1, 5)}
    ),
    st.builds(TemplateConfig, task=TEXTS, few_shot=st.builds(FewShot, k=st.integers(1, 9))),
)
LABELS = st.one_of(TEXTS, st.integers(), st.booleans())
COMMON = {
    "base_model": TEXTS.filter(bool),
    "features": st.none() | TEXTS.filter(bool) | st.lists(TEXTS.filter(bool), min_size=1, max_size=3, unique=True),
    "template": TEMPLATES,
    "adapter": ADAPTERS,
    "quantization": st.sampled_from([None, 4, 8, {"bits": 4, "type": "fp4"}, Quantization(bits=8, threshold=3.0)]),
    "epochs": st.integers(1, 9),
    "learning_rate": st.just("auto") | st.floats(1e-8, 10),
    "batch_size": st.just("auto") | st.integers(1, 64),
    "max_length": st.none() | st.integers(2, 4096),
    "truncation": st.sampled_from(["error", "prompt"]),
    "warmup": SHARES,
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "optimizer": st.sampled_from(["adamw", "sgd", {"type": "sgd", "momentum": 0.9}]),
    "weight_decay": st.floats(0, 1),
    "max_grad_norm": st.none() | st.floats(0.1, 10),
    "validation_fraction": SHARES,
    "early_stopping": st.sampled_from([None, False, True, 3, {"patience": 2, "min_delta": 0.5}]),
    "device": st.sampled_from(["auto", "cpu"]),
    "random_state": st.none() | st.integers(0, 99),
    "verbose": st.integers(0, 1) | st.booleans(),
}
OWN: dict[type[Any], dict[str, Any]] = {
    LLMClassifier: {
        "target": st.none() | TEXTS.filter(bool),
        "head": st.sampled_from(["lm", "linear", {"type": "linear", "dropout": 0.5}, LinearHead(pooling="last")]),
        "class_weight": st.none()
        | st.just("balanced")
        | st.dictionaries(LABELS, st.floats(0.1, 9), min_size=1, max_size=3),
    },
    LLMRegressor: {"target": st.none() | TEXTS.filter(bool), "generation": st.none() | st.just({"max_new_tokens": 3})},
    LLMGenerator: {"generation": st.none() | st.just({"do_sample": True, "temperature": 0.5})},
    LLMEstimator: {
        "target": st.none() | TEXTS.filter(bool) | st.just({"a": "category", "b": "number"}),
        "loss_weights": st.none(),
    },
}


@pytest.mark.parametrize("estimator", list(OWN))
@given(data=st.data())
@hypothesis_settings(deadline=None, max_examples=60)
def test_a_config_gives_the_same_parameters_back(estimator: type[Any], data: st.DataObject) -> None:
    params = data.draw(st.fixed_dictionaries({}, optional={**COMMON, **OWN[estimator]}))
    if estimator is LLMRegressor and params.get("generation"):
        params["head"] = "lm"  # a linear head generates nothing
    model = estimator(**params)
    config = to_config(model)
    assert READERS[".yaml"](to_yaml(config)) == config == json.loads(json.dumps(config))
    for source in (config, READERS[".json"](json.dumps(config)), READERS[".yaml"](to_yaml(config))):
        again = from_config(source)
        assert type(again) is estimator
        assert again.get_params(deep=False) == {k: as_dict(v) for k, v in model.get_params(deep=False).items()}
        assert repr(again.get_params(deep=False)) == repr(clone(again).get_params(deep=False))
        assert again.to_config() == config


def test_a_search_over_lists_is_written_and_read_back() -> None:
    config = {
        "estimator": "LLMClassifier",
        "target": "label",
        "adapter": {"r": 4},
        "learning_rate": 0.1,
        "hyperopt": {"kind": "grid", "parameters": {"adapter.r": [4, 8], "learning_rate": [0.1, 0.2]}, "cv": 3},
    }
    search = from_config(config)
    assert isinstance(search, GridSearchCV)
    assert to_config(search) == config
    drawn = {**config, "hyperopt": {**config["hyperopt"], "kind": "random", "n_iter": 2, "random_state": 0}}
    assert to_config(from_config(drawn)) == drawn


def test_a_search_from_a_config_fits(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    config = {"estimator": "LLMClassifier", "target": "label", "features": "text", "adapter": {"r": 2}}
    hyperopt = {"parameters": {"adapter.r": [2, 4]}, "scoring": "accuracy", "cv": 2}
    search = from_config({**config, "hyperopt": hyperopt}, **settings).fit(frame, frame["label"])
    by_hand = GridSearchCV(
        LLMClassifier(target="label", features="text", adapter={"r": 2}, **settings),
        {"adapter__r": [2, 4]},
        scoring="accuracy",
        cv=2,
    ).fit(frame, frame["label"])
    assert search.cv_results_["mean_test_score"].tolist() == by_hand.cv_results_["mean_test_score"].tolist()
    assert search.best_params_ == by_hand.best_params_


# The schema -------------------------------------------------------------------------------------


def test_the_schema_in_docs_is_that_of_the_code() -> None:
    text = (DOCS / "config.schema.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(json_schema())), "run: make tables"


def test_the_schema_knows_every_key_and_no_other() -> None:
    from llmfit.config.ludwig import TOP

    assert set(json_schema()["properties"]) == {"estimator", *own_keys(), *TOP}
    assert all(schema.get("description") for schema in json_schema()["properties"].values())


GOOD: list[Any] = [
    {"estimator": "LLMRegressor", "epochs": 2, "adapter": {"type": "ia3"}, "template": {"few_shot": 3}},
    {"adapter": {"r": 3}, "quantization": 4, "head": "linear", "early_stopping": True, "learning_rate": "auto"},
    {"adapter": "lora", "class_weight": {"a": 1.0}, "target": ["a", "b"], "generation": {"do_sample": True}},
    {"adapter": {"type": "miss", "r": 3}, "adapter.r": 4, "random_state": 3},
    {"hyperopt": {"adapter.r": [1, 2], "kind": "random", "n_iter": 3}},
    *(LLMClassifier(**params).to_config() for name, (params, _) in FORMS.items() if "truth" not in name),
]
BAD: list[Any] = [
    {"epoch": 1},
    {"estimator": "LLM"},
    {"epochs": "three"},
    {"truncation": "cut"},
    {"adapter": {"type": "lora", "rr": 1}},
    {"adapter": {"type": "ia3", "r": 1}},
    {"quantization": {"bits": 3}},
    {"template": {"tasks": "a"}},
    {"template": {"few_shot": {"n": 1}}},
    {"trainer": {"learning_rat": 1}},
    {"trainer": {"train_steps": 3}},
    {"trainer": {"epochs": "three"}},
    {"input_features": [{"name": "a", "typ": "text"}]},
    {"input_features": {"name": "a", "encoder": {"type": "bert", "adapter": {"type": "lora", "rr": 1}}}},
    {"hyperopt": {"epochs": 3}},
]


def test_what_the_schema_lets_pass_is_what_can_be_read() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    for config in [*map(read_config, sorted(CONFIGS.glob("*.yaml"))), *GOOD]:
        assert [error.message for error in validator.iter_errors(config)] == []
        from_config(config)
    for config in BAD:
        assert list(validator.iter_errors(config)), config
        refused(config)


def test_reading_a_config_loads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import llmfit.base_model

    monkeypatch.setattr(llmfit.base_model, "find_source", lambda _: pytest.fail("a model was looked for"))
    from_config(CONFIGS / "intent_classifier_hyperopt.yaml")
    assert llmfit.from_config is from_config


@pytest.mark.parametrize(
    "settings",
    [{"typ": "sgd"}, {"betas": 3}, {"betas": [0.9]}, {"betas": [0.9, 0.99, 0.5]}, {"fused": True, "foreach": True}],
    ids=str,
)
def test_settings_of_an_optimizer_are_checked_with_the_config(settings: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"^The optimizer 'adamw' cannot take \{'(typ|betas|fused)': "):
        from_config({"target": "label", "optimizer": {"type": "adamw", **settings}})


def test_a_setting_for_another_device_is_not_tried_here() -> None:
    settings = {"type": "adamw", "capturable": True}
    assert from_config({"target": "label", "optimizer": settings}).optimizer == settings
