"""Ludwig's configurations: every key is mapped, refused or without effect, and does what its table says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV

import llmfit
from llmfit.config import from_config
from llmfit.config.ludwig import TABLES
from llmfit.config.ludwig.page import with_tables
from llmfit.config.ludwig.rows import IDLE, MAPPED, REFUSED, Row
from llmfit.config.ludwig.search_rows import SCORINGS
from llmfit.config.ludwig.training import COUPLED
from llmfit.exceptions import ParameterError, TruncationWarning
from llmfit.optim import make_optimizer

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
    part, _, deeper = part.partition(".")
    if deeper:
        return _within(feature, part, deeper, {key: value})
    return {**feature, part: {**NEEDED.get(part, {}), key: value}} if part else {**feature, key: value}


# The tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", list(KEYS))
def test_every_key_of_ludwig_is_decided_and_no_other(section: str) -> None:
    common = TABLES["adapter"] if section.startswith("adapter (") else {}
    own = {"input_features.encoder": {"preprocessing"}, "output_features": {"trainer"}}  # a shorthand
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
    assert params(at(section, row.key, "something else")) == params(at(section, row.key, None))


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
    ("", "preprocessing"): ({"global_max_sequence_length": 64}, {"max_length": 64, "truncation": "prompt"}),
    ("", "defaults"): (
        {"text": {"encoder": "bert"}},
        {"base_model": "bert-base-uncased", "head": "linear", "adapter": None},
    ),
    ("", "hyperopt"): ({"parameters": {"trainer.epochs": [2, 4]}}, {}),
    ("", "model_parameters"): ({"neftune_noise_alpha": 0}, {}),
    ("", "backend"): ("local", {}),
    ("", "combiner"): ({"type": "concat"}, {}),
    ("input_features", "name"): ("a", {"features": {"a": "text"}}),
    ("input_features", "column"): ("a", {"features": {"a": "text"}}),
    ("input_features", "type"): ("date", {"features": {"text": "text"}}),
    ("input_features", "preprocessing"): ({"max_sequence_length": 9}, {"max_length": 9, "truncation": "prompt"}),
    ("input_features", "encoder"): ("gpt2", {"base_model": "gpt2", "head": "linear", "adapter": None}),
    ("input_features.preprocessing", "max_sequence_length"): (9, {"max_length": 9, "truncation": "prompt"}),
    ("input_features.preprocessing", "cache_encoder_embeddings"): (True, {"adapter": None, "head": "linear"}),
    ("input_features.preprocessing", "prompt"): ({"task": "Do."}, {"template": {"task": "Do."}}),
    ("input_features.preprocessing", "fill_value"): ("none", {"template": {"na_rep": "none"}}),
    ("input_features.encoder", "type"): ("t5", {"base_model": "t5-small"}),
    ("input_features.encoder", "pretrained_model_name_or_path"): ("a/b", {"base_model": "a/b"}),
    ("input_features.encoder", "base_model"): ("phi-2", {"base_model": "microsoft/phi-2"}),
    ("input_features.encoder", "trainable"): (True, {"adapter": "full", "head": "linear"}),
    ("input_features.encoder", "adapter"): (
        {"type": "lora", "r": 3},
        {"adapter": {"type": "lora", "r": 3}, "head": "linear"},
    ),
    ("input_features.encoder", "quantization"): ({"bits": 8}, {"quantization": {"bits": 8}}),
    ("input_features.encoder", "max_sequence_length"): (9, {"max_length": 9, "truncation": "prompt"}),
    ("input_features.encoder", "reduce_output"): ("cls_pooled", {"head": {"type": "linear", "pooling": "first"}}),
    ("input_features.encoder", "preprocessing"): ({"cache_encoder_embeddings": True}, {"adapter": None}),
    ("input_features.encoder.preprocessing", "cache_encoder_embeddings"): (True, {"adapter": None, "head": "linear"}),
    ("output_features", "name"): ("a", {"target": {"a": "category"}}),
    ("output_features", "column"): ("a", {"target": {"a": "category"}}),
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
    ("trainer", "regularization_lambda"): (0.1, {"weight_decay": 0.2, "optimizer": "adam"}),
    ("trainer", "regularization_type"): ("l2", {}),
    ("trainer", "gradient_clipping"): ({"clipglobalnorm": 2.0}, {"max_grad_norm": 2.0}),
    ("trainer", "early_stop"): (3, {"early_stopping": 3, "validation_fraction": 0.125}),
    ("trainer", "skip_all_evaluation"): (True, {"early_stopping": None, "validation_fraction": None}),
    ("trainer", "enable_gradient_checkpointing"): (True, {"gradient_checkpointing": True}),
    ("trainer.learning_rate_scheduler", "decay"): ("linear", {"schedule": "linear"}),
    ("trainer.learning_rate_scheduler", "warmup_fraction"): (0.3, {"warmup": 0.3}),
    ("trainer.optimizer", "type"): ("adagrad", {"optimizer": "adagrad"}),
    ("trainer.optimizer", "weight_decay"): (0.1, {"optimizer": "sgd", "weight_decay": 0.1}),
    ("trainer.gradient_clipping", "clipglobalnorm"): (2.0, {"max_grad_norm": 2.0}),
    ("preprocessing", "split"): ({"type": "random"}, {"validation_fraction": 0.125}),
    ("preprocessing", "global_max_sequence_length"): (64, {"max_length": 64, "truncation": "prompt"}),
    ("preprocessing.split", "type"): ("stratify", {"validation_fraction": 0.125}),
    ("preprocessing.split", "probabilities"): ([0.6, 0.2, 0.2], {"validation_fraction": 0.25}),
    ("preprocessing.split", "column"): ("label", {"validation_fraction": 0.125}),
    ("backend", "type"): ("local", {}),
    ("combiner", "type"): ("concat", {}),
    ("defaults.<type>", "preprocessing"): ({"max_sequence_length": 9}, {"max_length": 9, "truncation": "prompt"}),
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
    named = "dropout" if row.key.endswith("_dropout") else named
    special = {"init_lora_weights": "gaussian", "wavelet_family": "db2", "loraplus_lr_ratio": 4.0, "weight_tying": 0.5}
    value = special.get(row.key, BY_KIND.get(row.kind))
    extra: dict[str, Any] = {"init_r": {"target_r": 4}, "eps": {"coft": True}}.get(row.key, {})
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


# Files as they are written ----------------------------------------------------------------------

INTENT, REVIEW = (
    {"features": {"sentence": "text"}, "target": {"intent": "category"}},
    {"features": {"review": "text"}, "target": {"sentiment": "category"}},
)
ROWS = pd.DataFrame(
    {
        "sentence": ["book a flight", "play a song", "fly to rome", "play jazz"] * 3,
        "intent": ["travel", "music"] * 6,
        "review": ["great", "awful", "lovely", "bad"] * 3,
        "sentiment": ["pos", "neg"] * 6,
        "title": ["A"] * 12,
        "score": [5, 1] * 6,
    }
)
FILES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "zero-shot": (
        ["book_review_zero_shot.yaml"],
        {
            "estimator": "LLMEstimator",
            "base_model": "Llama-2-7b-hf",
            "adapter": None,
            "template": {
                "task": "Rate this book review with from 1 to 5",
                "template": 'Task: {task}.\nReview: "{title} {review}".\nWhat score would you assign?\n',
            },
        },
    ),
    "a column in, a class out": (["intent_classifier.yaml"], INTENT),
    "an encoder by name": (
        ["intent_classifier_expert.yaml"],
        {
            **INTENT,
            "base_model": "bert-base-uncased",
            "adapter": None,
            "head": {"type": "linear", "dropout": 0.05},
            "weight_decay": 0.1,
        },
    ),
    "LoRA": (
        ["intent_classifier.yaml", "lora.yaml"],
        {**INTENT, "adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.1}},
    ),
    "QLoRA": (
        ["intent_classifier.yaml", "qlora.yaml"],
        {**INTENT, "adapter": {"type": "lora"}, "quantization": {"bits": 4}},
    ),
    "LoRA in 4 bits": (
        ["intent_classifier.yaml", "lora.yaml", "qlora.yaml"],
        {
            **INTENT,
            "adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.1},
            "quantization": {"bits": 4},
        },
    ),
    "LoRA alone": (
        ["lora.yaml"],
        {"estimator": "LLMEstimator", "adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.1}},
    ),
    "QLoRA alone": (
        ["qlora.yaml"],
        {"estimator": "LLMEstimator", "adapter": {"type": "lora"}, "quantization": {"bits": 4}},
    ),
    "frozen": (
        ["sentiment_frozen_cached.yaml"],
        {**REVIEW, "base_model": "Llama-2-7b-hf", "adapter": None, "head": "linear"},
    ),
    "full": (["sentiment_full.yaml"], {**REVIEW, "base_model": "Llama-2-7b-hf", "adapter": "full", "head": "linear"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_it_is_meant(name: str) -> None:
    files, expected = FILES[name]
    assert params([CONFIGS / file for file in files]) == {"estimator": "LLMClassifier", **expected}


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_and_predicts_with_another_base_model(name: str, settings: dict[str, Any]) -> None:
    target = {} if "target" in FILES[name][1] else {"target": "score"}
    model = from_config([CONFIGS / file for file in FILES[name][0]], **settings, **target).fit(ROWS)
    assert len(model.predict(ROWS)) == len(ROWS)
    expected = {**FILES[name][1], **settings, **target}
    by_hand = getattr(llmfit, expected.pop("estimator", "LLMClassifier"))(**expected).fit(ROWS)
    assert (by_hand.predict_proba(ROWS) == model.predict_proba(ROWS)).all()


def test_every_file_is_among_those_that_are_fitted() -> None:
    fitted = {file for files, _ in FILES.values() for file in files}
    assert {path.name for path in CONFIGS.iterdir()} == fitted | {"intent_classifier_hyperopt.yaml"}


LINEAR: dict[str, Any] = {"adapter": None, "head": {"type": "linear", "dropout": 0.1}}
HYPEROPTS: dict[str, tuple[list[str], dict[str, Any], dict[str, list[Any]]]] = {
    "alone": ([], LINEAR, {"head__dropout": [0.1, 0.2]}),
    "with LoRA": (
        ["lora.yaml"],
        {"adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.1}, "head": "linear"},
        {"adapter__dropout": [0.1, 0.2]},
    ),
    "with QLoRA": (
        ["qlora.yaml"],
        {"adapter": {"type": "lora", "dropout": 0.1}, "quantization": {"bits": 4}, "head": "linear"},
        {"adapter__dropout": [0.1, 0.2]},
    ),
}


@pytest.mark.parametrize("name", HYPEROPTS)
def test_the_file_of_a_search_finds_what_a_grid_by_hand_finds(name: str, settings: dict[str, Any]) -> None:
    files, expected, grid = HYPEROPTS[name]
    paths = [CONFIGS / file for file in ["intent_classifier_hyperopt.yaml", *files]]
    search = from_config(paths, **settings, **{"hyperopt.cv": 2})
    assert search.param_grid == grid
    search.fit(ROWS)
    by_hand = GridSearchCV(llmfit.LLMClassifier(**{**INTENT, **settings, **expected}), grid, cv=2)
    by_hand.fit(ROWS, ROWS["intent"])
    assert (search.cv_results_["mean_test_score"] == by_hand.cv_results_["mean_test_score"]).all()
    assert (search.predict_proba(ROWS) == by_hand.predict_proba(ROWS)).all()


def test_lists_under_hyperopt_are_a_grid_over_encoders_and_dropout() -> None:
    search = from_config(CONFIGS / "intent_classifier_hyperopt.yaml", epochs=1)
    assert isinstance(search, GridSearchCV)
    assert search.param_grid == {
        "head__dropout": [0.1, 0.2],
        "base_model": ["meta-llama/Llama-2-7b-hf", "bert-base-uncased"],
    }
    assert (search.estimator.adapter, search.estimator.epochs) == (None, 1)


def test_a_base_model_given_takes_the_place_of_every_encoder(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    config = {**BASE, "hyperopt": {"dropout": [0.0, 0.5], "encoder": ["llama", "bert"], "cv": 2}}
    search = from_config(config, **settings)
    assert search.param_grid == {"head__dropout": [0.0, 0.5]}
    search.fit(frame, frame["label"])
    assert len(search.cv_results_["params"]) == 2
    assert search.best_estimator_.base_model == settings["base_model"]


# What decides ----------------------------------------------------------------------------------

TRAINED: dict[str, tuple[dict[str, Any], Any]] = {
    "no trainer, no adapter": ({}, None),
    "none": ({"trainer": {"type": "none", "batch_size": 2}}, None),
    "an adapter": ({"adapter": "lora"}, "lora"),
    "an adapter and a trainer": ({"adapter": "lora", "trainer": {"epochs": 1}}, "lora"),
    "finetune": ({"trainer": {"type": "finetune"}}, "full"),
    "finetune an adapter": ({"trainer": {"type": "finetune"}, "adapter": {"type": "ia3"}}, {"type": "ia3"}),
    "finetune no adapter": ({"trainer": {"type": "finetune"}, "adapter": None}, "full"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_an_llm_trains(name: str) -> None:
    more, adapter = TRAINED[name]
    assert from_config({**WORDS, **more}).adapter == adapter


OUTPUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "category": ({"name": "a", "type": "category"}, {"estimator": "LLMClassifier", "target": {"a": "category"}}),
    "binary": ({"name": "a", "type": "binary"}, {"estimator": "LLMClassifier", "target": {"a": "binary"}}),
    "set": ({"name": "a", "type": "set"}, {"estimator": "LLMClassifier", "target": {"a": "set"}, "head": "linear"}),
    "number": ({"name": "a", "type": "number"}, {"estimator": "LLMRegressor", "target": "a"}),
    "text": ({"name": "a", "type": "text"}, {"estimator": "LLMGenerator", "target": "a"}),
    "not said": ({"name": "a"}, {"estimator": "LLMEstimator", "target": ["a"]}),
    "two": (
        [{"name": "a", "type": "category"}, {"name": "b", "type": "number", "loss": {"weight": 0.5}}],
        {"estimator": "LLMEstimator", "target": {"a": "category", "b": "number"}, "loss_weights": {"b": 0.5}},
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_type_of_the_output_chooses_the_estimator(name: str) -> None:
    outputs, expected = OUTPUTS[name]
    found = params({"input_features": TEXT_IN, "output_features": outputs})
    assert found == {"features": {"text": "text"}, **expected}


STEPS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "a batch": ({"batch_size": 4}, "ecd", 4),
    "batches gathered": ({"batch_size": 2, "gradient_accumulation_steps": 8}, "ecd", 16),
    "one row a batch in an LLM": ({"gradient_accumulation_steps": 8}, "llm", 8),
    "whole": ({"effective_batch_size": 12}, "ecd", 12),
    "whole and parts": ({"effective_batch_size": 12, "batch_size": 3, "gradient_accumulation_steps": 4}, "ecd", 12),
    "whole and auto": ({"effective_batch_size": 12, "batch_size": "auto"}, "ecd", 12),
    "auto": ({"batch_size": "auto"}, "ecd", "auto"),
    "auto of all": ({"batch_size": "auto", "gradient_accumulation_steps": "auto"}, "ecd", "auto"),
}


@pytest.mark.parametrize("name", STEPS)
def test_rows_of_a_step(name: str) -> None:
    trainer, kind, size = STEPS[name]
    assert from_config({**WORDS, "model_type": kind, "adapter": "lora", "trainer": trainer}).batch_size == size


GENERATED: dict[str, tuple[dict[str, Any], Any]] = {
    "drawn": ({"temperature": 0.1}, {"temperature": 0.1, "do_sample": True}),
    "drawn without temperature": ({"temperature": 0}, None),
    "not drawn": (
        {"temperature": 0.1, "top_k": 50, "do_sample": False, "num_beams": 2},
        {"do_sample": False, "num_beams": 2},
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_how_texts_are_generated(name: str) -> None:
    given, expected = GENERATED[name]
    assert from_config({**WORDS, "generation": given}).generation == (expected or {"do_sample": False})


SKIPPED: dict[str, tuple[dict[str, Any], tuple[Any, Any]]] = {
    "nothing is stopped": ({"trainer": {"early_stop": 3, "skip_all_evaluation": True}}, (None, 0.0)),
    "what a split holds out stays so": (
        {
            "trainer": {"early_stop": 3, "skip_all_evaluation": True},
            "preprocessing": {"split": {"type": "random", "probabilities": [0.6, 0.2, 0.2]}},
        },
        (None, 0.25),
    ),
    "false": ({"trainer": {"early_stop": 3, "skip_all_evaluation": False}}, (3, 0.125)),
    "null": ({"trainer": {"early_stop": 3, "skip_all_evaluation": None}}, (3, 0.125)),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_not_validated_stops_nothing(name: str) -> None:
    config, expected = SKIPPED[name]
    found = from_config({**BASE, **config})
    assert (found.early_stopping, found.validation_fraction) == expected


def test_a_template_names_the_features_unless_it_shows_the_sample() -> None:
    text = {**WORDS, "input_features": [{"name": "prompt", "type": "text"}]}
    assert from_config({**text, "prompt": {"template": "{a} {b}"}}).features is None
    assert from_config({**text, "prompt": {"template": "{prompt} {b}"}}).features is None
    assert from_config({**text, "prompt": {"template": "{prompt", "task": "t"}}).features is None
    known = {"task": "t", "template": "{__task__} {prompt:.2f}"}
    assert from_config({**text, "prompt": known}).features == {"prompt": "text"}
    assert from_config({**text, "prompt": {"template": "{__sample__}"}}).features == {"prompt": "text"}


CONTEXTS: dict[str, tuple[str, str]] = {  # a template of Ludwig's, and what of it is the prompt of one row
    "a line of its own": ("Rate.\n{__context__}\n\nText: {text}\nLabel:", "Rate.\nText: {text}\nLabel:"),
    "a line with a label": ("Rate.\n\n  Examples: {__context__}\n\nText: {text}", "Rate.\n\nText: {text}"),
    "a task is no label": ("Rate this text:\n{__context__}\n  Text: {text}", "Rate this text:\n  Text: {text}"),
    "a label of words": ("Some similar texts:\n{__context__}\n{text}", "{text}"),
    "a label above": ("Examples:\n{__context__}\n\nText: {text}", "Text: {text}"),
    "the first words": ("{__context__} {text}:", "{text}:"),
    "between words": ("Given {__context__} and {text}:", "Given and {text}:"),
    "between others": ("{a} {__context__} {text}", "{a} {text}"),
    "behind a separator": ("{a} | {__context__} | {text}", "{a} | {text}"),
    "the last line": ("Text: {text}\n\nExamples: {__context__}\n", "Text: {text}"),
    "the last words": ("{text}, like {__context__}", "{text}, like"),
    "quotes": ('Like "{__context__}".\n"""\n{__context__}\n"""\n{text}', "Like.\n{text}"),
    "quotes of others": ("'{a}' {__context__} '{text}'", "'{a}' '{text}'"),
    "a tag": ("<examples>\n{__context__}\n</examples>\n{text}", "{text}"),
    "twice": ("{__context__}\n{text}\n{__context__}", "{text}"),
    "formatted": ("{__context__!s:>3}\n{text}", "{text}"),
    "no field": ("{{__context__}} {text}", "{{__context__}} {text}"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_examples_stand_before_the_prompt_and_not_within_it(name: str) -> None:
    given, expected = CONTEXTS[name]
    prompt = {"template": given, "retrieval": {"type": "semantic", "k": 2}}
    few_shot = {"k": 2, "retrieval": "semantic"}
    assert params({**BASE, "prompt": prompt})["template"] == {"template": expected, "few_shot": few_shot}


def test_a_prompt_with_examples_is_fitted_and_shows_them(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    prompt = {"template": "Like:\n{__context__}\nText: {text}\nLabel:", "retrieval": {"type": "random", "k": 1}}
    model = from_config({**BASE, "prompt": prompt}, **settings, adapter=None).fit(frame)
    shown = model.preview(frame, n=1).iloc[0]["prompt"]
    assert (shown.count("Text: "), shown.count("Label:"), shown.count("Like")) == (2, 2, 0)


def test_own_keys_may_stand_beside_and_may_not_contradict() -> None:
    found = params({**BASE, "learning_rate": 1e-3, "trainer": {"epochs": 2}, "epochs": 2})
    assert (found["learning_rate"], found["epochs"]) == (1e-3, 2)
    assert refused({**BASE, "trainer": {"epochs": 2}, "epochs": 3}) == (
        "The config says epochs=3, but Ludwig's keys in it say epochs=2. Leave one out."
    )


def test_a_rendered_config_of_ludwig_is_read() -> None:
    """All of Ludwig's defaults that its tables name, at once."""

    def defaults(section: str) -> dict[str, Any]:
        rows = TABLES[section].values()
        return {row.key: row.default for row in rows if row.default is not None and row.kind not in ("spec",)}

    trainer = {
        **defaults("trainer"),
        "type": "finetune",
        "learning_rate_scheduler": defaults("trainer.learning_rate_scheduler"),
    }
    config = {
        **WORDS,
        "base_model": "smollm2",
        "adapter": {"type": "lora", **defaults("adapter (lora)"), "postprocessor": defaults("adapter.postprocessor")},
        "quantization": defaults("quantization"),
        "generation": defaults("generation"),
        "model_parameters": defaults("model_parameters"),
        "trainer": trainer,
        "preprocessing": {"sample_ratio": 1.0, "split": {"type": "random", "probabilities": [0.7, 0.1, 0.2]}},
    }
    found = params(config)
    assert found["adapter"] == {
        "type": "lora", "r": 8, "dropout": 0.05, "bias": "none", "use_rslora": False, "use_dora": False,
        "init_lora_weights": True,
    }  # fmt: skip
    assert found["quantization"] == {
        "bits": 4, "compute_dtype": "float16", "double_quant": True, "type": "nf4"
    }  # fmt: skip
    assert (found["epochs"], found["learning_rate"], found["early_stopping"]) == (100, 0.001, 5)
    assert found["validation_fraction"] == 0.125
    assert found["generation"]["temperature"] == 0.1


RENDERED_TEXT = {  # what Ludwig writes of a text, whatever the features of a config are
    "preprocessing": {
        "max_sequence_length": 64, "missing_value_strategy": "fill_with_const", "fill_value": "<UNK>",
        "lowercase": False, "prompt": {"retrieval": {"type": None, "k": 0}, "task": None, "template": None},
    },
    "encoder": {"type": "parallel_cnn", "num_filters": 256, "skip": False},
    "decoder": {"type": "generator", "num_fc_layers": 0, "beam_width": 1},
    "loss": {"type": "sequence_softmax_cross_entropy", "weight": 1.0},
}  # fmt: skip


def test_defaults_of_preprocessing_are_those_of_inputs_alone() -> None:
    """Of an output Ludwig takes the decoder's and the loss's."""
    text = {**RENDERED_TEXT, "encoder": {"type": "passthrough", "skip": False}}
    found = params({**WORDS, "input_features": [TEXT_IN], "defaults": {"text": text}})
    assert (found["max_length"], found["truncation"]) == (64, "prompt")
    assert "generation" not in found


def test_defaults_of_types_that_no_feature_has_are_let_pass() -> None:
    config = {
        **BASE,
        "defaults": {
            "text": {"preprocessing": {"max_sequence_length": 64}},
            "audio": {"preprocessing": {"audio_file_length_limit_in_s": 7.5}, "encoder": {"type": "parallel_cnn"}},
            "category_distribution": {"loss": {"type": "softmax_cross_entropy"}},
            "number": {"encoder": {"type": "dense", "fc_size": 256}, "preprocessing": {"normalization": "zscore"}},
        },
    }
    assert params(config) == params({**BASE, "defaults": {"text": {"preprocessing": {"max_sequence_length": 64}}}})


def test_the_length_of_a_config_cuts_as_in_ludwig_unless_it_says_otherwise(
    settings: dict[str, Any], frame: pd.DataFrame
) -> None:
    config = {**BASE, "preprocessing": {"global_max_sequence_length": 256}}
    assert from_config({**config, "truncation": "error"}).truncation == "error"
    long = frame.assign(text=frame["text"] + " and so on" * 99)
    settings = {**settings, "adapter": None}
    with pytest.warns(TruncationWarning):
        from_config(config, **settings).fit(long).predict(long)


@pytest.mark.parametrize("name", COUPLED)
def test_a_term_of_the_loss_pulls_as_in_ludwig(name: str) -> None:
    """Lambda times the squares of the weights, against the weight_decay that it becomes."""
    found = params({**BASE, "trainer": {"optimizer": {"type": name}, "regularization_lambda": 0.05}})
    mine, ludwigs = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2))
    settings = {"learning_rate": 0.1, "weight_decay": found["weight_decay"]}
    stepping = make_optimizer(found["optimizer"], [mine], **settings)
    plain = {"nadam": "NAdam", "radam": "RAdam", "rmsprop": "RMSprop", "sgd": "SGD"}.get(name, name.title())
    in_ludwig = getattr(torch.optim, plain)([ludwigs], lr=0.1)
    for _ in range(8):
        for weight, optimizer, term in ((mine, stepping, 0.0), (ludwigs, in_ludwig, 0.05)):
            optimizer.zero_grad()
            (torch.sin(weight).sum() + term * weight.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(mine, ludwigs)


def test_a_term_of_no_type_is_none() -> None:
    config = {**BASE, "trainer": {"regularization_lambda": 0.1, "regularization_type": None}}
    assert "weight_decay" not in params(config)


def test_an_axis_over_a_term_of_the_loss_is_one_over_the_decay() -> None:
    search = from_config({**BASE, "hyperopt": {"trainer.regularization_lambda": [0, 0.1]}})
    assert search.param_grid == {"weight_decay": [0, 0.2]}


@pytest.mark.parametrize("name", ["nadam", "radam"])
def test_decay_of_an_optimizer_is_in_the_gradient_as_in_ludwig(name: str) -> None:
    found = params({**BASE, "trainer": {"optimizer": {"type": name, "weight_decay": 0.1}}})
    assert found["optimizer"] == {"type": name, "decoupled_weight_decay": False}
    assert params({**BASE, "trainer": {"optimizer": name}})["optimizer"] == name


def test_accuracy_is_ludwigs_of_the_kind_of_target() -> None:
    """torchmetrics' of several classes is the mean over the classes; that of a binary target counts rows."""
    asked = {"epochs": [1, 2], "metric": "accuracy"}
    assert from_config({**BASE, "hyperopt": asked}).scoring == "balanced_accuracy"
    binary = {**BASE, "output_features": [{"name": "label", "type": "binary"}], "hyperopt": asked}
    assert from_config(binary).scoring == "accuracy"
    assert from_config({"estimator": "LLMClassifier", "target": "label", "hyperopt": asked}).scoring == "accuracy"


SENTENCES: dict[str, tuple[Any, str]] = {
    "a key that no default has": (
        {**BASE, "defaults": {"number": {"preprocessing": {"lower_case": True}}}},
        "The config has no key 'defaults.number.preprocessing.lower_case'. Did you mean "
        "'defaults.number.preprocessing.lowercase'?",
    ),
    "a key of a loss that no default has": (
        {**BASE, "defaults": {"text": {"loss": {"wieght": 1}}}},
        "The config has no key 'defaults.text.loss.wieght'. Did you mean 'defaults.text.loss.weight'?",
    ),
    "defaults of no type": (
        {**BASE, "defaults": {"txt": {}}},
        "The config has no key 'defaults.txt'. Did you mean 'defaults.text'?",
    ),
    "two prompts": (
        {
            "input_features": [{**TEXT_IN, "preprocessing": {"prompt": {"task": "A"}}}],
            "output_features": [CLASS_OUT],
            "prompt": {"task": "B"},
        },
        "The config's 'prompt' says task='B', but that of a feature says 'A'. Leave one out.",
    ),
    "a warm-up of all steps": (
        {**BASE, "trainer": {"learning_rate_scheduler": {"warmup_fraction": 1.0}}},
        "The config's 'trainer.learning_rate_scheduler.warmup_fraction' must be a share of all steps, from 0 to below "
        "1. Got 1.0 instead.",
    ),
    "a term of the loss that an optimizer cannot have": (
        {**BASE, "trainer": {"regularization_lambda": 0.1, "optimizer": "adamw"}},
        "The config's 'trainer.regularization_lambda' cannot be used with the optimizer 'adamw', which pulls weights "
        "past its moments: its 'weight_decay' does. Optimizers with such a term: 'adam', 'sgd', 'adagrad', 'rmsprop', "
        "'nadam', 'radam'.",
    ),
    "an unknown key": (
        {**BASE, "trainer": {"learning_rat": 1}},
        "The config has no key 'trainer.learning_rat'. Did you mean 'trainer.learning_rate'?",
    ),
    "an unknown key of a feature": (
        {"input_features": [TEXT_IN, {"name": "b", "type": "text", "encode": "bert"}]},
        "The config has no key 'input_features[1].encode'. Did you mean 'input_features[1].encoder'?",
    ),
    "an unknown section": (
        {**BASE, "traner": {}},
        "The config has no key 'traner'. Did you mean 'trainer'?",
    ),
    "a key that is refused": (
        {**BASE, "trainer": {"train_steps": 100}},
        "The config's 'trainer.train_steps' cannot be 100 here: training is counted in epochs. Set trainer.epochs.",
    ),
    "a key of the wrong kind": (
        {**BASE, "trainer": {"epochs": "three"}},
        "The config's 'trainer.epochs' must be a whole number. Got 'three' instead.",
    ),
    "a section that is none": (
        {**BASE, "trainer": 3},
        "The config's 'trainer' must be a mapping. Got 3 instead.",
    ),
    "a feature without a name": (
        {"input_features": {"type": "text"}},
        "The config's 'input_features' needs a 'name': the column that it stands for.",
    ),
    "a feature that is none": (
        {"input_features": ["text"]},
        "The config's 'input_features[0]' must be a mapping. Got 'text' instead.",
    ),
    "a type that cannot be read": (
        {"input_features": {"name": "a", "type": "image"}},
        "The config's 'input_features.type' must be one of 'text', 'category', 'number', 'binary', 'set', 'sequence', "
        "'date': llmfit reads and writes words, numbers and classes. Got 'image' instead.",
    ),
    "another model type": (
        {**BASE, "model_type": "gbm"},
        "The config's 'model_type' must be 'llm' or 'ecd'. Got 'gbm' instead.",
    ),
    "an encoder that is no language model": (
        {"input_features": {"name": "a", "type": "text", "encoder": "rnn"}},
        "The config's 'input_features.encoder.type' must be one of 'auto_transformer', 'llm', 'albert', 'bert', "
        "'camembert', 'deberta', 'distilbert', 'electra', 'gpt', 'gpt2', 'llama', 'longformer', 'modernbert', "
        "'roberta', 't5', 'xlmroberta', 'xlnet': a pretrained language model. Got 'rnn' instead.",
    ),
    "an encoder without a model": (
        {"input_features": {"name": "a", "type": "text", "encoder": {"type": "auto_transformer"}}},
        "The config's 'input_features.encoder' needs 'pretrained_model_name_or_path': the pretrained model that "
        "'auto_transformer' stands for.",
    ),
    "two encoders": (
        {"input_features": [{**TEXT_IN, "encoder": "bert"}, {"name": "b", "type": "text", "encoder": "gpt2"}]},
        "The config's 'input_features[1].encoder' must be as 'input_features[0].encoder': one model reads all columns.",
    ),
    "vectors kept of a model that is trained": (
        at(
            "input_features",
            "encoder",
            {"type": "bert", "trainable": True, "preprocessing": {"cache_encoder_embeddings": True}},
        ),
        "The config's 'cache_encoder_embeddings' needs an encoder that is not trained. Got adapter='full' beside it: "
        "its training changes the vectors.",
    ),
    "a pooling that is not here": (
        at("input_features", "encoder", {"type": "bert", "reduce_output": "max"}),
        "The config's 'input_features[0].encoder.reduce_output' must be one of 'last', 'mean', 'sum', 'cls_pooled'. "
        "Got 'max' instead.",
    ),
    "another trainer": (
        {**WORDS, "trainer": {"type": "dpo"}},
        "The config's 'trainer.type' must be 'finetune' or 'none': llmfit learns from answers. Got 'dpo' instead.",
    ),
    "an adapter that is not trained": (
        {**WORDS, "adapter": "lora", "trainer": {"type": "none"}},
        "The config's 'trainer.type' is 'none', so that the adapter would never be trained. Leave one out.",
    ),
    "a trainer that does not say what it trains": (
        {**WORDS, "trainer": {"epochs": 3}},
        "The config's 'trainer' needs a 'type': with model_type 'llm' and no adapter, 'finetune' trains all weights, "
        "and 'none' trains nothing.",
    ),
    "steps that do not fit": (
        {**BASE, "trainer": {"effective_batch_size": 8, "batch_size": 3, "gradient_accumulation_steps": 2}},
        "The config's 'trainer.effective_batch_size' is 8, but batch_size * gradient_accumulation_steps is 3 * 2. "
        "Leave "
        "one of them out.",
    ),
    "steps of nothing": (
        {**BASE, "trainer": {"gradient_accumulation_steps": 2}},
        "The config's 'trainer.gradient_accumulation_steps' is 2, which needs a number as 'trainer.batch_size': a "
        "step has "
        "as many rows as both multiplied.",
    ),
    "a schedule": (
        {**BASE, "trainer": {"learning_rate_scheduler": {"decay": "wsd"}}},
        "The config's 'trainer.learning_rate_scheduler.decay' must be null or one of 'cosine', 'linear'. Got 'wsd' "
        "instead.",
    ),
    "an optimizer's setting that it has not": (
        {**BASE, "trainer": {"optimizer": {"type": "sgd", "betas": [0.9, 0.9]}}},
        "The config has no key 'trainer.optimizer.betas'. Did you mean 'trainer.optimizer.nesterov'?",
    ),
    "a regularisation": (
        {**BASE, "trainer": {"regularization_lambda": 0.1, "regularization_type": "l1"}},
        "The config's 'trainer.regularization_type' must be 'l2'. Got 'l1' instead.",
    ),
    "two pulls": (
        {**BASE, "trainer": {"regularization_lambda": 0.1, "optimizer": {"type": "adam", "weight_decay": 0.2}}},
        "The config's 'trainer.regularization_lambda' and 'trainer.optimizer.weight_decay' are one parameter here, "
        "weight_decay. Leave one of them out.",
    ),
    "a split by a column": (
        {**BASE, "preprocessing": {"split": {"type": "fixed", "column": "split"}}},
        "The config's 'preprocessing.split.type' cannot be 'fixed' here: pass the rows of the validation to "
        "fit(..., eval_set=...), and keep those of the test to yourself.",
    ),
    "a split by another column": (
        {**BASE, "preprocessing": {"split": {"type": "stratify", "column": "text"}}},
        "The config's 'preprocessing.split.column' must be the target, whose classes a split keeps in proportion. "
        "Got 'text' instead.",
    ),
    "shares": (
        {**BASE, "preprocessing": {"split": {"probabilities": [0.5, 0.5]}}},
        "The config's 'preprocessing.split.probabilities' must be three numbers: the shares of training, validation "
        "and "
        "test. Got [0.5, 0.5] instead.",
    ),
    "a sample": (
        {**BASE, "preprocessing": {"sample_ratio": 0.1}},
        "The config's 'preprocessing.sample_ratio' cannot be 0.1 here: take a sample before fit: "
        "frame.sample(frac=0.1, random_state=0).",
    ),
    "a cluster": (
        {**BASE, "backend": {"type": "ray"}},
        "The config's 'backend.type' must be 'local': llmfit runs in the process that calls it. Got 'ray' instead.",
    ),
    "a cluster and its workers": (
        {**BASE, "backend": {"trainer": {"num_workers": 4}, "processor": {"type": "dask"}, "type": "ray"}},
        "The config's 'backend.type' must be 'local': llmfit runs in the process that calls it. Got 'ray' instead.",
    ),
    "a field for examples that nothing finds": (
        {**BASE, "prompt": {"template": "{__context__} {text}"}},
        "The config's 'prompt.template' has the field {__context__}, but nothing finds the examples that it stands "
        "for. Say prompt.retrieval, or take the field out.",
    ),
    "a template of examples alone": (
        {**BASE, "prompt": {"template": "Like these: {__context__}", "retrieval": {"type": "random"}}},
        "The config's 'prompt.template' shows nothing of a row beside {__context__}. "
        "Got 'Like these: {__context__}' instead.",
    ),
    "an adapter's unknown key": (
        {**BASE, "adapter": {"type": "lora", "ranks": 3}},
        "The config has no key 'adapter.ranks'. Did you mean 'adapter.r'?",
    ),
    "one setting by two names": (
        {**BASE, "adapter": {"type": "lora", "bias": "all", "bias_type": "none"}},
        "The config's 'adapter.bias_type' is 'bias' here, which is given as well: 'none' and 'all'. Leave one out.",
    ),
    "bits that there are not": (
        {**BASE, "quantization": {"bits": 3}},
        "The config's 'quantization.bits' must be 4 or 8. Got 3 instead.",
    ),
    "weights of one target": (
        at("output_features", "loss", {"weight": 2.0}),
        "The config's 'output_features.loss.weight' weighs several targets, but there is one.",
    ),
    "weights of classes without names": (
        at("output_features", "loss", {"class_weights": [1, 2]}),
        "The config's 'output_features[0].loss.class_weights' must be a mapping of label to weight, as a list has no "
        "labels. Got [1, 2] instead.",
    ),
    "another loss": (
        at("output_features", "loss", "focal"),
        "The config's 'output_features[0].loss.type' must be 'softmax_cross_entropy', "
        "'next_token_softmax_cross_entropy', "
        "'sequence_softmax_cross_entropy' for a target of the type 'category'. Got 'focal' instead.",
    ),
    "a dropout without a place": (
        {
            **WORDS,
            "trainer": {"type": "none"},
            "output_features": {"name": "a", "type": "text", "trainer": {"dropout": 0.1}},
        },
        "The config's dropout of 0.1 has no place: neither the adapter nor a linear head has one.",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_is_said_in_one_sentence(name: str) -> None:
    config, sentence = SENTENCES[name]
    assert refused(config) == sentence


# Searches ---------------------------------------------------------------------------------------

AXES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trainer": ({"trainer.learning_rate": [1e-4, 1e-3]}, {"learning_rate": [1e-4, 1e-3]}),
    "adapter": ({"adapter.r": [4, 8]}, {"adapter__r": [4, 8]}),
    "another name in Ludwig": ({"adapter.bias_type": ["none", "all"]}, {"adapter__bias": ["none", "all"]}),
    "own name": ({"adapter__r": [4, 8]}, {"adapter__r": [4, 8]}),
    "types": ({"adapter.type": ["lora", "ia3"]}, {"adapter": [{"type": "lora"}, {"type": "ia3"}]}),
    "one value": ({"trainer.epochs": [5], "adapter.r": [4]}, {"epochs": [5], "adapter__r": [4]}),
    "one value that changes nothing": ({"trainer.epochs": [3], "adapter.r": [4, 8]}, {"adapter__r": [4, 8]}),
    "wholes": (
        {"adapter": [{"type": "lora", "r": 4}, {"type": "ia3"}]},
        {"adapter": [{"type": "lora", "r": 4}, {"type": "ia3"}]},
    ),
    "bits": ({"quantization.bits": [4, 8]}, {"quantization": [{"bits": 4}, {"bits": 8}]}),
    "a feature's encoder": ({"text.encoder.trainable": [True, False]}, {"adapter": ["full", None]}),
    "rows of a step": ({"trainer.batch_size": [2, 4]}, {"batch_size": [2, 4]}),
    "a product": ({"trainer.gradient_accumulation_steps": [1, 4]}, {"batch_size": [3, 12]}),
    "categories": ({"trainer.epochs": {"space": "choice", "categories": [1, 2]}}, {"epochs": [1, 2]}),
    "a grid's values": ({"trainer.epochs": {"space": "grid_search", "values": [1, 2]}}, {"epochs": [1, 2]}),
}
NEEDS = {
    "a feature's encoder": {"input_features": {**TEXT_IN, "encoder": "bert"}},
    "a product": {"trainer": {"batch_size": 3}},
}


@pytest.mark.parametrize("name", AXES)
def test_an_axis_is_the_parameter_that_differs(name: str) -> None:
    axes, space = AXES[name]
    search = from_config(
        {**BASE, "adapter": {"type": "lora"}, **NEEDS.get(name, {}), "hyperopt": {"parameters": axes}}
        if name != "a feature's encoder"
        else {**BASE, **NEEDS[name], "hyperopt": {"parameters": axes}}
    )
    assert isinstance(search, GridSearchCV)
    assert search.param_grid == space


def test_an_axis_of_encoders_leaves_what_else_is_said_of_one() -> None:
    encoder = {"type": "auto_transformer", "pretrained_model_name_or_path": "a/b", "trainable": True}
    search = from_config({**at("input_features", "encoder", encoder), "hyperopt": {"encoder": ["bert", "gpt2"]}})
    assert search.param_grid == {"base_model": ["bert-base-uncased", "gpt2"]}
    assert search.estimator.adapter == "full"


def test_ranges_are_drawn_from() -> None:
    hyperopt = {
        "parameters": {
            "trainer.learning_rate": {"space": "loguniform", "lower": 1e-5, "upper": 1e-2},
            "adapter.r": {"space": "randint", "lower": 2, "upper": 8},
        },
        "executor": {"type": "ray", "num_samples": 7, "cpu_resources_per_trial": 2},
        "search_alg": {"type": "variant_generator", "random_state": 3},
    }
    search = from_config({**BASE, "adapter": {"type": "lora"}, "hyperopt": hyperopt})
    assert isinstance(search, RandomizedSearchCV)
    assert (search.n_iter, search.random_state) == (7, 3)
    rates, ranks = (
        [search.param_distributions[name].rvs(random_state=i) for i in range(200)]
        for name in ("learning_rate", "adapter__r")
    )
    assert 1e-5 <= min(rates) < 1e-4
    assert 1e-3 < max(rates) <= 1e-2
    assert set(ranks) == set(range(2, 8))  # the upper end is left out, as in Ray Tune


SCORED: dict[str, tuple[dict[str, Any], Any]] = {
    "nothing said": ({}, None),
    "accuracy": ({"metric": "accuracy", "goal": "maximize"}, "balanced_accuracy"),
    "accuracy of all rows": ({"metric": "accuracy_micro", "goal": "maximize"}, "accuracy"),
    "loss": ({"metric": "loss", "goal": "minimize"}, "neg_log_loss"),
    "of the target": ({"metric": "roc_auc", "output_feature": "label"}, "roc_auc_ovr"),
    "own word": ({"scoring": "f1_macro"}, "f1_macro"),
}


@pytest.mark.parametrize("name", SCORED)
def test_what_a_search_measures(name: str) -> None:
    said, scoring = SCORED[name]
    assert from_config({**BASE, "hyperopt": {"trainer.epochs": [1, 2], **said}}).scoring == scoring


OF_CLASSES = [name for name, (_, _, of) in SCORINGS.items() if of == "classes"]


@pytest.mark.filterwarnings("ignore:Precision is ill-defined")  # where a tiny model's answers are all of one class
@pytest.mark.parametrize("classes", [2, 3])
def test_each_metric_measures_classes_with_names(classes: int, settings: dict[str, Any]) -> None:
    labels = ["fruit", "vehicle", "animal"][:classes] * 4
    rows = pd.DataFrame({"text": [f"{label} {n}" for n, label in enumerate(labels)], "label": labels})
    searches = [
        from_config({**BASE, "hyperopt": {"max_length": [256], "cv": 2, "metric": metric}}, **settings, adapter=None)
        for metric in [*OF_CLASSES, "loss"]
    ]
    scoring = sorted({search.scoring for search in searches})  # in one search, that all are measured by the same fits
    search = searches[0].set_params(scoring=scoring, refit=False, error_score="raise").fit(rows, rows["label"])
    for name in scoring:
        assert np.isfinite([search.cv_results_[f"split{fold}_test_{name}"][0] for fold in range(2)]).all()


SEARCH_SENTENCES: dict[str, tuple[dict[str, Any], str]] = {
    "an axis that is none": (
        {"parameters": {"trainer.epoch": [1]}},
        "The config has no key 'trainer.epoch'. Did you mean 'trainer.epochs'?",
    ),
    "a name that is none": ({"epoch": [1]}, "The config has no key 'hyperopt.epoch'. Did you mean 'epochs'?"),
    "no axis": ({}, "The config's 'hyperopt' needs at least one axis, such as parameters: {adapter.r: [4, 16]}."),
    "no values": ({"epochs": []}, "The config's 'hyperopt.epochs' needs at least one value."),
    "no list": ({"epochs": 3}, "The config's 'hyperopt.epochs' must be a list of values or a range. Got 3 instead."),
    "half a range": (
        {"parameters": {"learning_rate": {"space": "uniform", "lower": 0.1}}},
        "The config's 'hyperopt.parameters.learning_rate' needs a lower and an upper end. "
        "Got {'space': 'uniform', 'lower': 0.1} instead.",
    ),
    "no difference": (
        {"trainer.max_batch_size": [1, 2]},
        "The config's 'hyperopt.trainer.max_batch_size' makes no difference between its values [1, 2].",
    ),
    "two at once": (
        {"trainer.early_stop": [0, 2]},
        "The config's 'hyperopt.trainer.early_stop' changes 'early_stopping', 'validation_fraction' at once: search "
        "over "
        "one of them by its name.",
    ),
    "the same twice": (
        {"trainer.epochs": [1, 2], "epochs": [1, 2]},
        "The config says epochs=1, but Ludwig's keys in it say epochs=2. Leave one out.",
    ),
    "an algorithm": (
        {"epochs": [1], "search_alg": {"type": "bohb"}},
        "The config's 'hyperopt.search_alg.type' must be one of 'variant_generator', 'random', 'optuna'. Got 'bohb' "
        "instead.",
    ),
    "a metric": (
        {"epochs": [1], "metric": "jaccard"},
        "The config's 'hyperopt.metric' must be one of 'accuracy', 'accuracy_micro', 'precision', 'recall', 'roc_auc', "
        "'softmax_cross_entropy', 'binary_weighted_cross_entropy', 'loss', or 'scoring' a name of scikit-learn's. "
        "Got 'jaccard' instead.",
    ),
    "a goal": (
        {"epochs": [1], "metric": "accuracy", "goal": "minimize"},
        "The config's 'hyperopt.goal' must be 'maximize' with metric='accuracy'. Got 'minimize'.",
    ),
    "another target": (
        {"epochs": [1], "output_feature": "size"},
        "The config's 'hyperopt.output_feature' must be the target. Got 'size' instead.",
    ),
}


@pytest.mark.parametrize("name", SEARCH_SENTENCES)
def test_a_search_that_cannot_be_is_refused_in_one_sentence(name: str) -> None:
    hyperopt, sentence = SEARCH_SENTENCES[name]
    assert refused({**BASE, "hyperopt": hyperopt}) == sentence


def test_the_page_holds_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run: make tables"
