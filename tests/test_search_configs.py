"""Searches in configurations: keys that contradict each other are refused, and a search is written as it was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import loguniform
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
from sklearn.metrics import get_scorer
from sklearn.model_selection import GridSearchCV, HalvingRandomSearchCV, KFold
from sklearn.tree import DecisionTreeClassifier

from llmfit import LLMClassifier
from llmfit.config import from_config, to_config, to_yaml
from llmfit.config.reading import READERS
from llmfit.exceptions import ParameterError
from llmfit.search import make_search

AXIS: dict[str, Any] = {"epochs": [1, 2]}
RANGE = {"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}


def refused(hyperopt: dict[str, Any], config: dict[str, Any] | None = None, **given: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        from_config({"target": "label", **(config or {}), "hyperopt": hyperopt}, **given)
    return str(caught.value)


# 1. What contradicts itself ---------------------------------------------------------------------

NOTHING = "every combination is tried, and nothing is drawn. Leave it out."
CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "draws of a grid": (
        {**AXIS, "kind": "grid", "n_iter": 3},
        f"The config's 'hyperopt.n_iter' has no meaning in a search of the kind 'grid': {NOTHING}",
    ),
    "samples of a grid": (
        {**AXIS, "kind": "grid", "executor": {"num_samples": 3}},
        f"The config's 'hyperopt.executor.num_samples' has no meaning in a search of the kind 'grid': {NOTHING}",
    ),
    "draws of halving over lists": (
        {**AXIS, "kind": "halving", "n_iter": 3},
        f"The config's 'hyperopt.n_iter' has no meaning in a search of the kind 'halving' over lists: {NOTHING}",
    ),
    "a seed of a grid": (
        {**AXIS, "kind": "grid", "random_state": 3},
        f"The config's 'hyperopt.random_state' has no meaning in a search of the kind 'grid': {NOTHING}",
    ),
    "a seed of lists": (
        {**AXIS, "random_state": 3},
        f"The config's 'hyperopt.random_state' has no meaning in a search of the kind 'grid': {NOTHING}",
    ),
    "scoring and metric": (
        {**AXIS, "scoring": "f1_macro", "metric": "accuracy"},
        "The config's 'hyperopt.scoring' and 'hyperopt.metric' both say what is measured: 'f1_macro' and 'accuracy'. "
        "Leave one out.",
    ),
    "scoring and goal": (
        {**AXIS, "scoring": "f1_macro", "goal": "minimize"},
        "The config's 'hyperopt.scoring' and 'hyperopt.goal' both say what is measured: 'f1_macro' and 'minimize'. "
        "Leave one out.",
    ),
    "scoring of no target": (
        {**AXIS, "scoring": "f1_macro", "output_feature": "size"},
        "The config's 'hyperopt.output_feature' must be the target. Got 'size' instead.",
    ),
    "kind and algorithm": (
        {**AXIS, "kind": "random", "n_iter": 2, "search_alg": "optuna"},
        "The config's 'hyperopt.kind' is 'random', but 'hyperopt.search_alg.type' is 'optuna'. Leave one out.",
    ),
    "algorithm and kind": (
        {**AXIS, "kind": "optuna", "search_alg": {"type": "random"}},
        "The config's 'hyperopt.kind' is 'optuna', but 'hyperopt.search_alg.type' is 'random'. Leave one out.",
    ),
    "kind and executor": (
        {**AXIS, "kind": "grid", "executor": {"type": "optuna"}},
        "The config's 'hyperopt.kind' is 'grid', but 'hyperopt.executor.type' is 'optuna'. Leave one out.",
    ),
    "executor and algorithm": (
        {**AXIS, "search_alg": "random", "executor": {"type": "optuna"}},
        "The config's 'hyperopt.executor.type' is 'optuna', but 'hyperopt.search_alg.type' is 'random'. Leave one out.",
    ),
    "two numbers of draws": (
        {**AXIS, "n_iter": 2, "executor": {"num_samples": 3}},
        "The config's 'hyperopt.n_iter' is 2, but 'hyperopt.executor.num_samples' is 3, and both mean the same. Leave "
        "one out.",
    ),
    "two seeds": (
        {**AXIS, "n_iter": 2, "random_state": 0, "search_alg": {"type": "random", "random_state": 1}},
        "The config's 'hyperopt.random_state' is 0, but 'hyperopt.search_alg.random_state' is 1, and both mean the "
        "same. Leave one out.",
    ),
    "a list and a range": (
        {"epochs": {"space": "choice", "categories": [1, 2], "lower": 1, "upper": 2}},
        "The config's 'hyperopt.epochs.categories' and 'hyperopt.epochs.lower' cannot stand together: an axis is one "
        "list of values, or one range. Leave one out.",
    ),
    "a list and half a range": (
        {"epochs": {"values": [1, 2], "high": 2}},
        "The config's 'hyperopt.epochs.values' and 'hyperopt.epochs.high' cannot stand together: an axis is one "
        "list of values, or one range. Leave one out.",
    ),
    "two lists": (
        {"epochs": {"categories": [1, 2], "values": [1, 3]}},
        "The config's 'hyperopt.epochs.categories' and 'hyperopt.epochs.values' cannot stand together: an axis is one "
        "list of values, or one range. Leave one out.",
    ),
    "a choice of nothing": (
        {"epochs": {"space": "choice", "lower": 1, "upper": 2}},
        "The config's 'hyperopt.epochs' is a 'choice', which needs 'categories'. "
        "Got {'space': 'choice', 'lower': 1, 'upper': 2} instead.",
    ),
    "ends in two languages": (
        {"learning_rate": {"lower": 0.1, "upper": 0.2, "log": True}},
        "The config's 'hyperopt.learning_rate.log' cannot stand beside 'lower': a range is {low, high, step, log}, or "
        "Ludwig's {space, lower, upper}.",
    ),
    "one axis twice": (
        {**AXIS, "parameters": {"epochs": [3, 4]}},
        "The config's 'hyperopt.parameters.epochs' and 'hyperopt.epochs' are one axis. Leave one out.",
    ),
    "a kind": (
        {**AXIS, "kind": "rand"},
        "The 'kind' parameter of the config's 'hyperopt' must be one of 'grid', 'fused', 'fused_halving', 'random', "
        "'halving', 'optuna'. Got "
        "'rand' instead. Did you mean 'random'?",
    ),
    "settings that are none": (
        {**AXIS, "settings": 3},
        "The config's 'hyperopt.settings' must be a mapping. Got 3 instead.",
    ),
    "a setting with a key of its own": (
        {**AXIS, "settings": {"cv": 3}},
        "The config's 'hyperopt.settings.cv' stands in the wrong place: say hyperopt.cv.",
    ),
    "a scorer": (
        {**AXIS, "scoring": "acc"},
        "The 'scoring' parameter of make_search must be a name that scikit-learn has, such as 'accuracy', 'f1_macro', "
        "'neg_log_loss' or 'r2'. Got 'acc' instead. Did you mean 'accuracy'?",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_contradicts_itself_is_refused_with_its_places(name: str) -> None:
    hyperopt, sentence = CONFLICTS[name]
    assert refused(hyperopt) == sentence


@pytest.mark.parametrize("cv", [1, 0, -2, "abc", 2.5, True, [1]])
def test_folds_are_checked_with_the_config(cv: Any) -> None:
    assert refused({**AXIS, "cv": cv}) == (
        f"The config's 'hyperopt.cv' must be null or an int >= 2. Got {cv!r} instead."
    )
    assert from_config({"target": "label", "hyperopt": {**AXIS, "cv": None}}).cv is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a seed that is no int": (
        {"kind": "random", "n_iter": 2, "random_state": 1.5},
        "The config's 'hyperopt.random_state' must be null or an int from 0 to 4294967295. Got 1.5 instead.",
    ),
    "a seed of a grid": (
        {"random_state": "abc"},
        "The config's 'hyperopt.random_state' must be null or an int from 0 to 4294967295. Got 'abc' instead.",
    ),
    "a seed of Ludwig's": (
        {"kind": "random", "n_iter": 2, "search_alg": {"type": "random", "seed": -1}},
        "The config's 'hyperopt.search_alg.seed' must be null or an int from 0 to 4294967295. Got -1 instead.",
    ),
    "draws": (
        {"kind": "random", "n_iter": 0},
        "The config's 'hyperopt.n_iter' must be null or an int >= 1. Got 0 instead.",
    ),
    "samples": (
        {"executor": {"num_samples": 0}},
        "The config's 'hyperopt.executor.num_samples' must be null or an int >= 1. Got 0 instead.",
    ),
    "a folder": (
        {"checkpoint_dir": 5},
        "The config's 'hyperopt.checkpoint_dir' must be null or a path. Got 5 instead.",
    ),
    "a scorer": (
        {"scoring": 5},
        "The config's 'hyperopt.scoring' must be null, a name of scikit-learn's, a list of names, or a mapping of "
        "texts to names. Got 5 instead.",
    ),
    "no scorers": (
        {"scoring": []},
        "The config's 'hyperopt.scoring' must be null, a name of scikit-learn's, a list of names, or a mapping of "
        "texts to names. Got [] instead.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_is_checked_with_the_config(name: str) -> None:
    hyperopt, sentence = WRONG[name]
    assert refused({**AXIS, **hyperopt}) == sentence


def test_a_scorer_and_a_path_of_python_are_let_pass(tmp_path: Path) -> None:
    scorer = get_scorer("accuracy")
    for scoring in (scorer, {"a": scorer}):
        hyperopt = {**AXIS, "scoring": scoring, "checkpoint_dir": tmp_path}
        search = from_config({"target": "label", "hyperopt": hyperopt})
        assert (search.scoring, search.checkpoint_dir) == (scoring, tmp_path)


def test_one_of_several_targets_is_not_what_is_measured() -> None:
    assert refused({**AXIS, "output_feature": "a"}, {"target": ["a", "b"]}) == (
        "The config's 'hyperopt.output_feature' must be 'combined' with several targets: candidates are measured by "
        "all of them. Got 'a' instead."
    )


def test_what_says_the_same_twice_is_let_pass() -> None:
    search = from_config(
        {
            "target": "label",
            "hyperopt": {
                **RANGE,
                "kind": "random",
                "n_iter": 3,
                "random_state": 1,
                "search_alg": {"type": "random", "random_state": 1},
                "executor": {"num_samples": 3},
            },
        }
    )
    assert (search.n_iter, search.random_state) == (3, 1)


def test_a_seed_of_ludwigs_has_no_effect_on_a_grid() -> None:
    said = {"target": "label", "hyperopt": {**AXIS, "search_alg": {"type": "variant_generator", "random_state": 1}}}
    assert isinstance(from_config(said), GridSearchCV)


# 2. Parameters given beside axes ----------------------------------------------------------------

BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the only axis": (
        AXIS,
        {"epochs": 3},
        "The config's 'hyperopt' has no axis left to search: 'epochs' is given. Leave 'hyperopt' out.",
    ),
    "no adapter": (
        {**AXIS, "adapter.r": [1, 2]},
        {"adapter": None},
        "The config's 'hyperopt' searches over 'adapter.r', which adapter=None does not have. Leave one of them out.",
    ),
    "another adapter": (
        {**AXIS, "adapter.r": [1, 2]},
        {"adapter": "ia3"},
        "The config's 'hyperopt' searches over 'adapter.r', which adapter='ia3' does not have. Leave one of them out.",
    ),
    "a key of a whole": (
        {"adapter": [{"type": "lora", "r": 2}, "ia3"]},
        {"adapter__dropout": 0.1},
        "The config's 'hyperopt' searches over 'adapter' as a whole, in which adapter__dropout=0.1 would be lost. Give "
        "'adapter' itself, which takes the place of the axis.",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_given_beside_an_axis_it_cannot_stand_with(name: str) -> None:
    hyperopt, given, sentence = BESIDE[name]
    assert refused(hyperopt, **given) == sentence


# 3. Written and read back -----------------------------------------------------------------------

BASE: dict[str, Any] = {"estimator": "LLMClassifier", "target": "label", "epochs": 1}
SETTINGS = {"refit": "f1", "error_score": "raise", "n_jobs": 1, "return_train_score": True}
SEARCHES: dict[str, dict[str, Any]] = {
    "a grid": {"kind": "grid", "parameters": AXIS, "cv": 3},
    "one value as the config has it": {"kind": "grid", "parameters": {"epochs": [1]}},
    "settings": {
        "kind": "grid",
        "parameters": AXIS,
        "scoring": {"f1": "f1_macro", "loss": "neg_log_loss"},
        "checkpoint_dir": "records",
        "settings": SETTINGS,
    },
    "no refit": {"kind": "grid", "parameters": AXIS, "scoring": ["accuracy"], "settings": {"refit": False}},
    "wholes": {"kind": "grid", "parameters": {"adapter": [{"type": "lora", "r": 4}, None, "ia3"]}},
    "wholes that differ in one key": {
        "kind": "grid",
        "parameters": {"adapter": [{"type": "lora", "r": 4}, {"type": "lora", "r": 8}]},
    },
    "one whole": {"kind": "grid", "parameters": {"adapter": [{"type": "lora", "r": 4}]}},
    "a whole and another axis": {
        "kind": "grid",
        "parameters": {"quantization": [{"bits": 4}, {"bits": 8}], "epochs": [1, 2]},
    },
    "wholes side by side": {
        "kind": "fused",
        "parameters": {"adapter": [{"type": "lora", "r": 4}, {"type": "lora", "r": 8}]},
    },
    "labels that are numbers": {
        "kind": "grid",
        "parameters": {"class_weight": [{"__pairs__": [[1, 2.0]]}, {"__pairs__": [[1, 3.0]]}]},
    },
    "draws of lists": {"kind": "random", "parameters": AXIS, "n_iter": 2, "random_state": 0},
    "draws of ranges": {
        "kind": "random",
        "parameters": {**RANGE, "max_length": {"low": 16, "high": 64, "step": 8}, "warmup": {"low": 0.0, "high": 0.5}},
        "n_iter": 4,
    },
    "side by side": {"kind": "fused", "parameters": AXIS, "cv": 3, "settings": {"return_train_score": True}},
    "side by side, halved": {
        "kind": "fused_halving",
        "parameters": AXIS,
        "settings": {"factor": 2, "max_resources": 4},
    },
    "halving": {"kind": "halving", "parameters": AXIS, "settings": {"factor": 2, "min_resources": 8}},
    "halving of ranges": {"kind": "halving", "parameters": RANGE, "n_iter": 9, "random_state": 3, "cv": 2},
    "optuna": {
        "kind": "optuna",
        "parameters": {
            **RANGE,
            "epochs": {"low": 1, "high": 9},
            "max_length": {"low": 16, "high": 64, "step": 8},
            "adapter": [None, {"type": "lora", "r": 2}],
        },
        "n_iter": 3,
        "random_state": 0,
        "scoring": "f1_macro",
        "settings": {"timeout": 60.0, "refit": False},
    },
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_written_as_it_was_read(name: str) -> None:
    if SEARCHES[name]["kind"] == "optuna":
        pytest.importorskip("optuna_integration")  # imported before the search asks for it
    config = {**BASE, "hyperopt": SEARCHES[name]}
    search = from_config(config)
    assert to_config(search) == search.to_config() == config
    assert list(to_config(search)["hyperopt"]["parameters"]) == list(SEARCHES[name]["parameters"])
    for again in (READERS[".yaml"](to_yaml(config)), READERS[".json"](json.dumps(config))):
        read = from_config(again)
        assert type(read) is type(search)
        mine, other = (one.get_params(deep=False) for one in (read, search))
        assert mine.pop("estimator").get_params() == other.pop("estimator").get_params()
        assert repr(mine) == repr(other)


def test_a_whole_that_the_config_says_otherwise_is_an_axis_over_the_whole() -> None:
    hyperopt = {"kind": "grid", "parameters": {"adapter": [{"type": "lora", "r": 4}]}}
    search = from_config({**BASE, "adapter": {"type": "lora", "r": 8}, "hyperopt": hyperopt})
    assert to_config(search)["hyperopt"] == hyperopt


def test_a_step_that_does_not_meet_the_upper_end_is_said_and_written_as_optuna_has_it() -> None:
    pytest.importorskip("optuna_integration")
    with pytest.warns(UserWarning, match=r"replaced with \[1, 7\]"):
        search = from_config({**BASE, "hyperopt": {"kind": "optuna", "epochs": {"low": 1, "high": 8, "step": 3}}})
    written = to_config(search)
    assert written["hyperopt"]["parameters"] == {"epochs": {"low": 1, "high": 7, "step": 3}}
    assert to_config(from_config(written)) == written


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another value": ({"epochs": 5}, {"epochs": [1, 2]}),
    "a method by its name": ({"adapter": "dora"}, {"adapter.r": [4, 8]}),
    "a method with settings": ({"adapter": {"type": "lora", "alpha": 8}}, {"adapter.r": [4, 8]}),
    "nothing": ({}, {"adapter.r": [4, 8], "epochs": [1, 2]}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_config_says_beside_its_axes_is_kept(name: str) -> None:
    beside, axes = WRITTEN[name]
    config = {**BASE, **beside, "hyperopt": {"kind": "grid", "parameters": axes}}
    assert to_config(from_config(config)) == config


def test_an_axis_that_a_config_cannot_be_without_has_its_first_value() -> None:
    """Without an adapter, nothing has a rank."""
    search = from_config({**BASE, "adapter": None, "hyperopt": {"parameters": {"adapter": ["lora", "ia3"]}}})
    assert search.estimator.adapter is None
    zero_shot = {"model_type": "llm", "output_features": [{"name": "label", "type": "category"}]}
    search = from_config({**zero_shot, "hyperopt": {"parameters": {"adapter.r": [4, 8]}}})
    assert search.estimator.adapter == {"r": 4}


def test_what_is_named_otherwise_in_ludwig_is_written_by_its_own_name() -> None:
    config = {
        "output_features": {"name": "label", "type": "category"},
        "hyperopt": {
            "parameters": {"trainer.learning_rate": {"space": "loguniform", "lower": 1e-4, "upper": 1e-2}},
            "executor": {"num_samples": 3},
        },
    }
    written = to_config(from_config(config))
    assert written == {
        "estimator": "LLMClassifier",
        "target": {"label": "category"},
        "hyperopt": {
            "kind": "random",
            "parameters": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
            "n_iter": 3,
        },
    }
    assert to_config(from_config(written)) == written


PLAINLESS: dict[str, tuple[Any, str]] = {
    "a distribution": (
        lambda model: make_search(model, {"learning_rate": loguniform(0.1, 1)}, "random"),
        "The search's values of 'learning_rate' have no plain form that a config could hold: they must be a list or a "
        "range. Got ",
    ),
    "folds": (
        lambda model: make_search(model, AXIS, cv=KFold(3)),
        "The search's 'cv' has no plain form that a config could hold. Got KFold(n_splits=3, random_state=None, "
        "shuffle=False). Set it after from_config.",
    ),
    "a generator": (
        lambda model: make_search(model, AXIS, "random", random_state=np.random.RandomState(0)),
        "The search's 'random_state' has no plain form that a config could hold. Got RandomState(MT19937)",
    ),
    "two spaces": (
        lambda model: make_search(model, [AXIS, RANGE], "random"),
        "to_config writes estimators, and searches of scikit-learn and Optuna over one dict of parameters. Got ",
    ),
    "another estimator": (
        lambda _: make_search(DecisionTreeClassifier(), {"max_depth": [1, 2]}),
        "to_config writes searches over 'LLMClassifier', 'LLMRegressor', 'LLMGenerator', 'LLMEstimator'. Got one over "
        "DecisionTreeClassifier() instead.",
    ),
    "halving that exhausts": (
        lambda model: HalvingRandomSearchCV(model, {"epochs": [1, 2]}),
        "A config that halves draws a number of candidates, from one range at least. Got n_candidates='exhaust' and "
        "{'epochs': [1, 2]} instead.",
    ),
    "no search": (
        lambda _: 3,
        "to_config writes estimators, and searches of scikit-learn and Optuna over one dict of parameters. Got 3 "
        "instead.",
    ),
}


@pytest.mark.parametrize("name", PLAINLESS)
def test_a_search_without_a_plain_form_is_refused(name: str) -> None:
    make, sentence = PLAINLESS[name]
    with pytest.raises(ParameterError) as caught:
        to_config(make(LLMClassifier(target="label")))
    assert str(caught.value).startswith(sentence)


def test_a_path_is_written_as_a_text(tmp_path: Path) -> None:
    search = make_search(LLMClassifier(target="label"), AXIS, checkpoint_dir=tmp_path)
    assert to_config(search)["hyperopt"]["checkpoint_dir"] == str(tmp_path)


# 4. Axes changed --------------------------------------------------------------------------------

CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "an axis": ({"adapter.r": [1, 2]}, {"hyperopt.adapter.r": [3]}, {"adapter.r": [3]}),
    "an axis that is new": (AXIS, {"hyperopt.adapter.r": [3]}, {**AXIS, "adapter.r": [3]}),
    "a listed axis": (
        {"parameters": {"adapter.r": [1, 2]}},
        {"hyperopt.parameters.adapter.r": [3]},
        {"parameters": {"adapter.r": [3]}},
    ),
    "a listed axis by its name alone": (
        {"parameters": {"adapter.r": [1, 2]}},
        {"hyperopt.adapter.r": [3]},
        {"parameters": {"adapter.r": [3]}},
    ),
    "an axis in Python's words": ({"adapter__r": [1, 2]}, {"hyperopt.adapter.r": [3]}, {"adapter__r": [3]}),
    "an axis of Ludwig's": (
        {"parameters": {"trainer.epochs": [1, 2]}},
        {"hyperopt.parameters.trainer.epochs": [3, 4]},
        {"parameters": {"trainer.epochs": [3, 4]}},
    ),
    "an end of a range": (
        {"adapter.dropout": {"low": 0.1, "high": 0.5}},
        {"hyperopt.adapter.dropout.high": 0.3},
        {"adapter.dropout": {"low": 0.1, "high": 0.3}},
    ),
    "a range in the place of a list": (
        {"max_length": [8, 16]},
        {"hyperopt.max_length.low": 8, "hyperopt.max_length.high": 32},
        {"max_length": {"low": 8, "high": 32}},
    ),
    "a key of its own": (
        {**AXIS, "settings": {"refit": True}},
        {"hyperopt.settings.refit": False, "hyperopt.cv": 3},
        {**AXIS, "settings": {"refit": False}, "cv": 3},
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_axis_is_changed_by_its_name(name: str) -> None:
    hyperopt, given, expected = CHANGED[name]
    same = to_config(from_config({"target": "label", "hyperopt": expected}))
    config = {"target": "label", "hyperopt": hyperopt}
    assert to_config(from_config(config, **given)) == same
    assert to_config(from_config([config, given])) == same


def test_a_name_that_is_no_axis_gets_no_advice_of_keys_that_nobody_has() -> None:
    assert refused(AXIS, **{"hyperopt.adaptor.r": [3]}).startswith("The config has no key 'hyperopt.adaptor.r'.")
    assert refused(AXIS, **{"hyperopt.low": [3]}).startswith("The config has no key 'hyperopt.low'.")
    assert refused({"parameters": [3]}, **{"hyperopt.adapter.r": [3]}).startswith("The config's 'hyperopt.parameters'")
    assert refused({"adapter": {"r": [3]}}) == (
        "The config's 'hyperopt.adapter' must be a list of values or a range. Got {'r': [3]} instead. An axis over a "
        "key inside has it in its name: 'hyperopt.adapter.r'."
    )
