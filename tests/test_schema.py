"""What `from_config` accepts, the JSON Schema accepts; keys that there are not, neither does."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

import pytest
from test_from_ludwig import at

from llmfit.adapters import METHODS
from llmfit.callbacks import EarlyStopping
from llmfit.config import from_config, json_schema
from llmfit.config.keys import ESTIMATORS, documented, estimator_keys
from llmfit.config.ludwig import TABLES
from llmfit.config.ludwig.rows import MAPPED
from llmfit.config.search_settings import SETTINGS
from llmfit.exceptions import ParameterError
from llmfit.heads import HEADS
from llmfit.inference import Generation
from llmfit.quantization import Quantization
from llmfit.search.describing import KEYS
from llmfit.templates import FewShot, TemplateConfig

jsonschema = pytest.importorskip("jsonschema")

PLAIN: list[Any] = [None, True, False, 0, 1, 2, 8, 0.5, "auto", "lora", ["a"], {"a": 1.0}]
SPECS: dict[str, tuple[dict[str, Any], list[tuple[type[Any], dict[str, Any]]]]] = {
    "adapter": ({}, [(method, {"type": name}) for name, method in METHODS.items()]),
    "quantization": ({}, [(Quantization, {"bits": 4}), (Quantization, {"bits": 8})]),
    "generation": ({"estimator": "LLMGenerator"}, [(Generation, {}), (Generation, {"do_sample": True})]),
    "template": ({}, [(TemplateConfig, {})]),
    "early_stopping": ({}, [(EarlyStopping, {})]),
    "head": ({}, [(spec, {"type": name}) for name, spec in HEADS.items() if spec]),
}


@cache
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json.loads(json.dumps(json_schema())))


def accepted(config: dict[str, Any]) -> bool:
    try:
        from_config(config)
    except (ParameterError, ValueError):
        return False
    return True


def check(configs: list[dict[str, Any]]) -> None:
    """Hold the schema against what is accepted; something is."""
    taken = [config for config in configs if accepted(config)]
    assert taken
    refused = [config for config in taken if not validator().is_valid(config)]
    assert refused == []


def choices(words: str) -> list[Any]:
    """Values that a documentation lists: texts in quotes before the default, and the default."""
    return [json.loads(f'"{found}"') for found in re.findall(r'"([^"]+)"', words)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_value_that_a_parameter_may_have_is_in_the_schema(estimator: str) -> None:
    for name, key in estimator_keys(estimator).items():
        values = [*PLAIN, *choices(key.words), key.default]
        beside = {"random_state": 0} if name == "checkpoint_dir" else {}
        check([{"estimator": estimator, **beside, name: value} for value in values])


@pytest.mark.parametrize("name", SPECS)
def test_every_value_that_a_key_within_may_have_is_in_the_schema(name: str) -> None:
    config, specs = SPECS[name]
    for spec, start in specs:
        words = {k: w for parent in spec.__mro__ if "Parameters" in (parent.__doc__ or "")
                 for k, w in documented(parent).items()}  # fmt: skip
        for field in fields(spec):
            if field.init:
                values = [*PLAIN, *choices(words.get(field.name, ""))]
                values += [start.get(field.name), None if field.default is MISSING else field.default]
                configs = [{**config, name: {**start, field.name: value}} for value in values]
                if any(map(accepted, configs)):  # 4 bits have no threshold
                    check(configs)


def test_every_value_of_examples_before_a_prompt_is_in_the_schema() -> None:
    for field in fields(FewShot):
        values = [*PLAIN, "random", "semantic"]
        check([{"template": {"few_shot": {"k": 2, field.name: value}}} for value in values])


@pytest.mark.parametrize("section", TABLES)
def test_every_value_that_a_key_of_ludwigs_may_have_is_in_the_schema(section: str) -> None:
    for row in TABLES[section].values():
        values = [*PLAIN, row.default] if row.verdict == MAPPED else [None, *row.neutral]
        configs = [at(section, row.key, value) for value in values]
        if any(map(accepted, configs)):  # some need more beside them
            check(configs)


@pytest.mark.parametrize("section", TABLES)
def test_a_key_that_there_is_not_is_in_neither(section: str) -> None:
    config = at(section, "no_such_key", 1)
    assert not accepted(config)
    assert list(validator().iter_errors(config)) != []


@pytest.mark.parametrize("name", SPECS)
def test_a_key_within_that_there_is_not_is_in_neither(name: str) -> None:
    config, specs = SPECS[name]
    for _, start in specs:
        wrong = {**config, name: {**start, "no_such_key": 1}}
        assert not accepted(wrong)
        assert list(validator().iter_errors(wrong)) != []


SHARED = [
    (section, row)
    for section in TABLES
    for row in TABLES[section].values()
    if section.partition(" ")[0] in ("adapter", "quantization", "generation")
]
# What stands beside such a section, and whether the config is one of Ludwig's with it.
BESIDE_SHARED: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "an own path": ({"head.bias": False}, False),
    "an own axis": ({"hyperopt": {"parameters": {"epochs": [1, 2]}}}, False),
    "a key of Ludwig's": ({"trainer": {"epochs": 2}}, True),
    "a path of Ludwig's": ({"trainer.epochs": 2}, True),
    "an axis of Ludwig's": ({"hyperopt": {"trainer.epochs": [1, 2]}}, True),
    "one among parameters": ({"hyperopt": {"parameters": {"trainer.epochs": [1, 2]}}}, True),
}


@pytest.mark.parametrize("name", BESIDE_SHARED)
def test_keys_of_both_languages_are_those_of_the_config(name: str) -> None:
    """In one of llmfit's own keys alone, what only Ludwig says within them is in neither."""
    beside, ludwigs = BESIDE_SHARED[name]
    taken = 0
    for section, row in SHARED:
        head, _, kind = section.partition(" (")
        said = {"type": kind[:-1]} if kind else {"type": "lora"} if head == "adapter" else {}
        estimator = "LLMGenerator" if head == "generation" else "LLMClassifier"
        for value in (row.default, True, 2, "all") if row.verdict == MAPPED else (None,):
            config = {"estimator": estimator, "target": "label", **beside, head: {**said, row.key: value}}
            if accepted(config):
                assert (config, validator().is_valid(config)) == (config, True)
                taken += row.key not in OWN[head]
            elif not ludwigs and row.key not in OWN[head]:
                assert (config, validator().is_valid(config)) == (config, False)
    assert bool(taken) == ludwigs


OWN = {
    head: {field.name for spec, _ in SPECS[head][1] for field in fields(spec)} | {"type"}
    for head in ("adapter", "quantization", "generation")
}


def test_null_stands_for_a_default_in_a_config_of_ludwigs_alone() -> None:
    own: dict[str, Any] = {"target": "label", "adapter": {"type": "lora", "r": None}}
    for config, there in ((own, False), ({**own, "trainer": {"epochs": 2}}, True)):
        assert (accepted(config), validator().is_valid(config)) == (there, there)


# Of the settings of a search: what beside them makes each mean something, and values that only the rest can judge.
BESIDE: dict[str, dict[str, Any]] = {
    "n_iter": {"kind": "random"},
    "random_state": {"kind": "random", "n_iter": 2},
}
ELSEWHERE: dict[str, list[Any]] = {
    "scoring": ["", "abc", "grid", "random", ["abc"]],
    "settings": [{"a": 1}, {"a": "accuracy"}],
}
SAID: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.5, 2**32 - 1, 2**32, "", "abc", "grid", "random", "accuracy", [], [1], ["abc"],
    ["accuracy"], ["accuracy", "f1_macro"], ["accuracy", 1], {}, {"a": 1}, {"a": "accuracy"}, {"refit": False},
    {"cv": 3},
]  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_setting_of_a_search_may_be_is_the_same_in_both(name: str) -> None:
    for value in SAID:
        if not any(value is other or value == other for other in ELSEWHERE.get(name, [])):
            config = {"target": "label", "hyperopt": {"epochs": [1, 2], **BESIDE.get(name, {}), name: value}}
            assert (value, accepted(config)) == (value, validator().is_valid(config))


def test_the_settings_of_a_search_are_those_that_it_is_written_with() -> None:
    assert tuple(SETTINGS) == KEYS
