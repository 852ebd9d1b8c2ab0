"""Ludwig's configurations: every key is mapped, refused or without effect, and those that are mapped do what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmfit
from llmfit.config import from_config
from llmfit.config.ludwig import TABLES
from llmfit.config.ludwig.page import with_tables
from llmfit.config.ludwig.rows import IDLE, MAPPED, REFUSED, Row
from llmfit.exceptions import ParameterError

HERE = Path(__file__).parent
CONFIGS = HERE / "configs"
PAGE = HERE.parent / "docs" / "from-ludwig.md"
KEYS: dict[str, list[str]] = json.loads((HERE / "ludwig_keys.json").read_text(encoding="utf-8"))
TEXT_IN = {"name": "text", "type": "text"}
CLASS_OUT = {"name": "label", "type": "category"}
BASE = {"input_features": [TEXT_IN], "output_features": [CLASS_OUT]}
WORDS = {"model_type": "llm", "output_features": [{"name": "answer", "type": "text"}]}


def refused(config: Any, **overrides: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        from_config(config, **overrides)
    return str(caught.value)


def params(config: Any) -> dict[str, Any]:
    """Parameters that a config sets, other than the defaults; the class is among them."""
    found = from_config(config)
    found = getattr(found, "estimator", found)
    usual = type(found)().get_params(deep=False)
    changed = {name: value for name, value in found.get_params(deep=False).items() if value != usual[name]}
    return {"estimator": type(found).__name__, **changed}


def at(section: str, key: str, value: Any) -> dict[str, Any]:
    """A config that says one thing at one place, and beside it what that place needs."""
    if section.startswith("adapter ("):
        return {**BASE, "adapter": {"type": section[len("adapter (") : -1], key: value}}
    if section.startswith("input_features"):
        return {**BASE, "input_features": [_within(TEXT_IN, section.partition(".")[2], key, value)]}
    if section.startswith("output_features"):
        return {**BASE, "output_features": [_within(CLASS_OUT, section.partition(".")[2], key, value)]}
    if section == "defaults.<type>":
        return {**BASE, "defaults": {"text": {key: value}}}
    if section == "hyperopt.parameters.<axis>":
        return {
            **BASE,
            "hyperopt": {"parameters": {"trainer.learning_rate": {"lower": 1e-5, "upper": 1e-3, key: value}}},
        }
    nested: Any = {**NEEDED.get(section, {}), key: value}
    for part in reversed(section.split(".") if section else []):
        nested = {part: nested}
    if section.startswith("hyperopt"):
        nested["hyperopt"] = {"parameters": {"trainer.epochs": [1, 2]}, **nested["hyperopt"]}
    return {**(WORDS if section == "generation" else BASE), **nested}


NEEDED: dict[str, dict[str, Any]] = {
    "encoder": {"type": "bert"},
    "trainer.optimizer": {"type": "sgd"},
    "adapter": {"type": "lora"},
}


def _within(feature: dict[str, Any], part: str, key: str, value: Any) -> dict[str, Any]:
    return {**feature, part: {**NEEDED.get(part, {}), key: value}} if part else {**feature, key: value}


# The tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", list(KEYS))
def test_every_key_of_ludwig_is_decided_and_no_other(section: str) -> None:
    common = TABLES["adapter"] if section.startswith("adapter (") else {}
    own = {"input_features.encoder": {"preprocessing"}, "output_features": {"trainer"}}  # the presentation's
    assert set(KEYS[section]) - {*TABLES[section], *common} == set()
    assert set(TABLES[section]) - set(KEYS[section]) == own.get(section, set())


def rows_of(verdict: str) -> list[Any]:
    return [
        pytest.param(section, row, id=f"{section}.{row.key}")
        for section, rows in TABLES.items()
        for row in rows.values()
        if row.verdict == verdict
    ]


@pytest.mark.parametrize(("section", "row"), rows_of(REFUSED))
def test_a_refused_key_is_refused_with_its_place_and_reason(section: str, row: Row) -> None:
    said = refused(at(section, row.key, "something else"))
    place = section.replace(" (", "").replace(")", "") if "adapter (" in section else section
    parts = [part for part in re.split(r"\.|adapter\w+", place) if part and not part.startswith("<")]
    assert row.words in said
    assert f"{row.key}' cannot be 'something else' here" in said
    assert all(part in said for part in parts)


@pytest.mark.parametrize(("section", "row"), rows_of(REFUSED))
def test_what_asks_for_nothing_is_let_pass(section: str, row: Row) -> None:
    for value in row.neutral:
        if (section, row.key) != ("hyperopt.parameters.<axis>", "base"):
            assert params(at(section, row.key, value)) == params(at(section, row.key, None))


@pytest.mark.parametrize(("section", "row"), rows_of(IDLE))
def test_a_key_without_effect_has_none_and_says_why(section: str, row: Row) -> None:
    assert len(row.words) > 10
    for value in ("something else", 7):
        assert params(at(section, row.key, value)) == params(at(section, row.key, None))


# What is mapped ---------------------------------------------------------------------------------

LORA = {"type": "lora"}
# section, key: a value (and what else the config has), and the parameters that it makes
MAPS: dict[tuple[str, str], Any] = {
    ("", "model_type"): ("llm", {"adapter": None}),
    ("", "base_model"): ("mistral-7b", {"base_model": "mistralai/Mistral-7B-v0.1"}),
    ("", "input_features"): ([{"name": "a", "type": "number"}], {"features": {"a": "number"}}),
    ("", "output_features"): ([{"name": "a", "type": "number"}], {"estimator": "LLMRegressor", "target": "a"}),
    ("", "prompt"): ({"task": "Do."}, {"template": {"task": "Do."}}),
    ("", "adapter"): ("ia3", {"adapter": "ia3"}),
    ("", "quantization"): ({"bits": 8}, {"quantization": {"bits": 8}}),
    ("", "generation"): ({"max_new_tokens": 8}, {}),  # classes are scored; see the section
    ("", "trainer"): ({"epochs": 2}, {"epochs": 2}),
    ("", "preprocessing"): ({"global_max_sequence_length": 64}, {"max_length": 64}),
    ("", "defaults"): (
        {"text": {"encoder": "bert"}},
        {"base_model": "bert-base-uncased", "head": "linear", "adapter": None},
    ),
    ("", "hyperopt"): ({"parameters": {"trainer.epochs": [2, 4]}}, {"epochs": 2}),
    ("", "model_parameters"): ({"neftune_noise_alpha": 0}, {}),
    ("", "backend"): ("local", {}),
    ("", "combiner"): ({"type": "concat"}, {}),
    ("input_features", "name"): ("a", {"features": {"a": "text"}}),
    ("input_features", "column"): ("a", {"features": {"a": "text"}}),
    ("input_features", "type"): ("date", {"features": {"text": "text"}}),
    ("input_features", "preprocessing"): ({"max_sequence_length": 9}, {"max_length": 9}),
    ("input_features", "encoder"): ("gpt2", {"base_model": "gpt2", "head": "linear", "adapter": None}),
    ("input_features.preprocessing", "max_sequence_length"): (9, {"max_length": 9}),
    ("input_features.preprocessing", "cache_encoder_embeddings"): (True, {"adapter": None, "head": "linear"}),
    ("input_features.preprocessing", "prompt"): ({"task": "Do."}, {"template": {"task": "Do."}}),
    ("input_features.preprocessing", "fill_value"): ("none", {"template": {"na_rep": "none"}}),
    ("input_features.encoder", "type"): ("t5", {"base_model": "t5-small"}),
    ("input_features.encoder", "pretrained_model_name_or_path"): ("a/b", {"base_model": "a/b"}),
    ("input_features.encoder", "base_model"): ("a/b", {"base_model": "a/b"}),
    ("input_features.encoder", "trainable"): (True, {"adapter": "full", "head": "linear"}),
    ("input_features.encoder", "adapter"): (
        {"type": "lora", "r": 3},
        {"adapter": {"type": "lora", "r": 3}, "head": "linear"},
    ),
    ("input_features.encoder", "quantization"): ({"bits": 8}, {"quantization": {"bits": 8}}),
    ("input_features.encoder", "max_sequence_length"): (9, {"max_length": 9}),
    ("input_features.encoder", "reduce_output"): ("cls_pooled", {"head": {"type": "linear", "pooling": "first"}}),
    ("input_features.encoder", "preprocessing"): ({"cache_encoder_embeddings": True}, {"adapter": None}),
    ("output_features", "name"): ("a", {"target": "a"}),
    ("output_features", "column"): ("a", {"target": "a"}),
    ("output_features", "type"): ("binary", {"target": {"label": "binary"}}),
    ("output_features", "preprocessing"): ({"max_sequence_length": 9}, {}),
    ("output_features", "decoder"): ("classifier", {"head": "linear"}),
    ("output_features", "loss"): ({"class_weights": {"a": 2}}, {"class_weight": {"a": 2}}),
    ("output_features", "trainer"): ({"regularize": 0.1}, {"weight_decay": 0.1}),
    ("output_features.preprocessing", "max_sequence_length"): (9, {}),
    ("output_features.decoder", "type"): ("classifier", {"head": "linear"}),
    ("output_features.decoder", "max_new_tokens"): (9, {}),
    ("output_features.loss", "type"): ("softmax_cross_entropy", {}),
    ("output_features.loss", "weight"): (1.0, {}),
    ("output_features.loss", "class_weights"): ({"a": 2}, {"class_weight": {"a": 2}}),
    ("output_features.trainer", "regularize"): (0.1, {"weight_decay": 0.1}),
    ("output_features.trainer", "dropout"): (0.1, {"adapter": {"type": "lora", "dropout": 0.1}}),
    ("prompt", "task"): ("Do.", {"template": {"task": "Do."}}),
    ("prompt", "template"): ("{a}:", {"template": {"template": "{a}:"}, "features": None}),
    ("prompt", "retrieval"): ({"type": "random", "k": 2}, {"template": {"few_shot": {"k": 2, "retrieval": "random"}}}),
    ("adapter", "type"): ("ia3", {"adapter": {"type": "ia3"}}),
    ("adapter", "postprocessor"): ({"progressbar": True}, {"adapter": LORA}),
    ("quantization", "bits"): (8, {"quantization": {"bits": 8}}),
    ("quantization", "llm_int8_threshold"): (5.0, {"quantization": {"bits": 4}}),  # of 8 bits
    ("quantization", "bnb_4bit_compute_dtype"): ("float32", {"quantization": {"bits": 4, "compute_dtype": "float32"}}),
    ("quantization", "bnb_4bit_use_double_quant"): (False, {"quantization": {"bits": 4, "double_quant": False}}),
    ("quantization", "bnb_4bit_quant_type"): ("fp4", {"quantization": {"bits": 4, "type": "fp4"}}),
    ("trainer", "type"): ("finetune", {"adapter": "full"}),
    ("trainer", "epochs"): (5, {"epochs": 5}),
    ("trainer", "learning_rate"): (0.1, {"learning_rate": 0.1}),
    ("trainer", "learning_rate_scheduler"): ({"decay": None}, {"schedule": "constant"}),
    ("trainer", "batch_size"): (5, {"batch_size": 5}),
    ("trainer", "gradient_accumulation_steps"): (1, {}),
    ("trainer", "effective_batch_size"): (5, {"batch_size": 5}),
    ("trainer", "optimizer"): ("sgd", {"optimizer": "sgd"}),
    ("trainer", "regularization_lambda"): (0.1, {"weight_decay": 0.1}),
    ("trainer", "regularization_type"): ("l2", {}),
    ("trainer", "gradient_clipping"): ({"clipglobalnorm": 2.0}, {"max_grad_norm": 2.0}),
    ("trainer", "early_stop"): (3, {"early_stopping": 3, "validation_fraction": 0.125}),
    ("trainer", "enable_gradient_checkpointing"): (True, {"gradient_checkpointing": True}),
    ("trainer.learning_rate_scheduler", "decay"): ("linear", {"schedule": "linear"}),
    ("trainer.learning_rate_scheduler", "warmup_fraction"): (0.3, {"warmup": 0.3}),
    ("trainer.optimizer", "type"): ("adagrad", {"optimizer": "adagrad"}),
    ("trainer.optimizer", "weight_decay"): (0.1, {"optimizer": "sgd", "weight_decay": 0.1}),
    ("trainer.gradient_clipping", "clipglobalnorm"): (2.0, {"max_grad_norm": 2.0}),
    ("preprocessing", "split"): ({"type": "random"}, {"validation_fraction": 0.125}),
    ("preprocessing", "global_max_sequence_length"): (64, {"max_length": 64}),
    ("preprocessing.split", "type"): ("stratify", {"validation_fraction": 0.125}),
    ("preprocessing.split", "probabilities"): ([0.6, 0.2, 0.2], {"validation_fraction": 0.25}),
    ("preprocessing.split", "column"): ("label", {"validation_fraction": 0.125}),
    ("backend", "type"): ("local", {}),
    ("combiner", "type"): ("concat", {}),
    ("defaults.<type>", "preprocessing"): ({"max_sequence_length": 9}, {"max_length": 9}),
    ("defaults.<type>", "encoder"): ("gpt2", {"base_model": "gpt2"}),
    ("defaults.<type>", "decoder"): ({"type": "text_extractor"}, {}),  # of texts, and the target here is a class
    ("defaults.<type>", "loss"): ({"class_weights": {"a": 1}}, {}),
}
OPTIMIZERS = {  # who has the setting, and a value
    "betas": ("adam", [0.8, 0.9]),
    "eps": ("adam", 1e-6),
    "amsgrad": ("adam", True),
    "momentum": ("sgd", 0.9),
    "dampening": ("sgd", 0.1),
    "nesterov": ("sgd", True),
    "lr_decay": ("adagrad", 0.1),
    "initial_accumulator_value": ("adagrad", 0.1),
    "momentum_decay": ("nadam", 0.01),
    "alpha": ("rmsprop", 0.9),
    "centered": ("rmsprop", True),
}
GENERATION = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "do_sample": True}
BY_KIND = {"int": 6, "number": 0.25, "bool": True, "text": "all", "names": ["q_proj"], "mapping": {"q": 4}}
SETTINGS = ("hyperopt", "hyperopt.search_alg", "hyperopt.executor", "hyperopt.parameters.<axis>")  # tested below


def makes(section: str, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config that uses a mapped key, and the parameters that it is to make."""
    key = row.key
    if (section, key) in MAPS:
        value, expected = MAPS[section, key]
        return at(section, key, value), expected
    if section.startswith("adapter ("):
        kind = section[len("adapter (") : -1]
        return _adapter(kind, row)
    if section == "trainer.optimizer":
        name, value = OPTIMIZERS[key]
        extra = {"momentum": 0.9} if key == "nesterov" else {}
        expected = {"optimizer": {"type": name, **extra, key: value}}
        return {**BASE, "trainer": {"optimizer": {"type": name, **extra, key: value}}}, expected
    if section == "generation":
        value = GENERATION.get(key, BY_KIND[row.kind])
        extra = (
            {"num_beams": 2} if key == "length_penalty" else {"max_new_tokens": 9} if key == "min_new_tokens" else {}
        )
        drawn = {"do_sample": True} if key in GENERATION else {}
        return {**WORDS, "generation": {key: value, **extra}}, {"generation": {**extra, **drawn, key: value}}
    if section == "prompt.retrieval":
        few_shot = {"type": {"k": 1, "retrieval": "semantic"}, "k": {"k": 6, "retrieval": "semantic"}}
        asked = {"type": "semantic", **({} if key == "type" else {key: BY_KIND[row.kind]})}
        expected = few_shot.get(key, {"k": 1, "retrieval": "semantic", "model": "all"})
        return {**BASE, "prompt": {"retrieval": asked}}, {"template": {"few_shot": expected}}
    raise KeyError(f"no example of {section}.{key}")


def _adapter(kind: str, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    named = {"bias_type": "bias", "delta_t": "deltaT"}.get(row.key, row.key)
    named = "dropout" if row.key.endswith("_dropout") and row.key not in ("module_dropout",) else named
    special = {"init_lora_weights": "gaussian", "wavelet_family": "db2", "loraplus_lr_ratio": 4.0, "weight_tying": 0.5}
    value = special.get(row.key, BY_KIND.get(row.kind))
    extra: dict[str, Any] = {"init_r": {"target_r": 4}}.get(row.key, {})
    if kind == "ia3" and row.key.endswith("_modules"):  # which belong together
        extra = {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}
    if row.key in ("eva_config", "loftq_config"):
        extra, value = (
            {"init_lora_weights": row.key[:-7]},
            {"eva_config": {"rho": 3.0}, "loftq_config": {"loftq_iter": 2}}[row.key],
        )
    config = {"type": kind, **extra, row.key: value}
    return {**BASE, "adapter": config}, {"adapter": {"type": kind, **extra, named: value}}


@pytest.mark.parametrize(("section", "row"), [one for one in rows_of(MAPPED) if one.values[0] not in SETTINGS])
def test_a_mapped_key_becomes_what_the_table_says(section: str, row: Row) -> None:
    config, expected = makes(section, row)
    found = params(config)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(("section", "row"), [one for one in rows_of(MAPPED) if one.values[1].kind != "any"])
def test_a_value_of_the_wrong_kind_is_refused_with_its_place(section: str, row: Row) -> None:
    wrong = 1.5 if row.kind in ("text", "names", "spec", "several", "list", "mapping", "bool") else ["a"]
    said = refused(at(section, row.key, wrong))
    assert f"{row.key}' must be " in said
    assert f"Got {wrong!r} instead." in said
