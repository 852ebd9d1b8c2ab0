"""Layers named by a regular expression, as peft reads one; settings that are left out, with the reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from sklearn.base import clone
from torch_side import classifier, make_other, plain_model, same, weights

import llmfit
from llmfit.adapters import METHODS, resolve_adapter
from llmfit.adapters.left_out import LEFT_OUT
from llmfit.adapters.peft_spec import config_class
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

PATTERN = r"model\.layers\.1\..*\.(q|v)_proj"
LISTED = ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
IDS = torch.tensor([[1, 70, 80, 90, 100]])
METHOD: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
    "eva": {"type": "lora", "r": 4, "init_lora_weights": "eva"},
    "loha": {},
    "adalora": {},
    "vera": {"r": 8},
    "fourierft": {},
    "oft": {},
    "ia3": {"feedforward_modules": LISTED[1:]},
    "miss": {"r": 4},  # of peft
}


@pytest.mark.parametrize("name", METHOD)
def test_a_pattern_is_the_layers_that_it_matches(name: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    given = {"type": name, **METHOD[name], "target_modules": PATTERN}
    own = {"epochs": 3, "learning_rate": 5e-2}
    clf = classifier(settings, adapter=given, **own).fit(frame)
    assert same(clf, classifier(settings, adapter={**given, "target_modules": LISTED}, **own).fit(frame))
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    assert again._adapter == clf._adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = peft.PeftModel.from_pretrained(plain_model(settings["base_model"]), tmp_path / "saved/adapter").eval()
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(clf._adapter, clf._tensors) as ours:
        torch.testing.assert_close(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert clone(clf).get_params()["adapter"]["target_modules"] == PATTERN


def test_a_pattern_leaves_layers_out(settings: Any, frame: Any, tmp_path: Path) -> None:
    given = {"r": 4, "exclude_modules": r".*\.(0|1)\.(?!self_attn).*"}
    clf = classifier(settings, adapter=given).fit(frame)
    assert {name.split(".")[-4] for name in weights(clf)} == {"self_attn"}
    clf.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["exclude_modules"] == given["exclude_modules"]
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": (
        {"target_modules": r".*\.q_prj"},
        "The 'target_modules' parameter of LoRA must name layers of this model. The regular expression "
        "'.*\\\\.q_prj' matches the whole name of none.",
    ),
    "an end alone": (
        {"target_modules": "(q|v)_proj"},
        "The 'target_modules' parameter of LoRA must name layers of this model. The regular expression "
        "'(q|v)_proj' matches the whole name of none.",
    ),
    "nothing left out": (
        {"exclude_modules": ".*[xyz]_proj"},
        "The 'exclude_modules' parameter of LoRA must name layers of this model. The regular expression "
        "'.*[xyz]_proj' matches the whole name of none.",
    ),
    "all left out": (
        {"exclude_modules": ".*"},
        "The 'exclude_modules' parameter of LoRA must be names that leave a layer to adapt. Got '.*' instead.",
    ),
    "not readable": (
        {"target_modules": ".*(q_proj"},
        "The 'target_modules' parameter of LoRA names layers by a pattern that cannot be read, '.*(q_proj': "
        "missing ), unterminated subpattern at position 2.",
    ),
    "what is no layer": (
        {"target_modules": ".*self_attn"},
        "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
        "Got '.*self_attn' instead.",
    ),
    "blocks beside": (
        {"type": "loha", "target_modules": ".*q_proj", "layers_to_transform": 0},
        "The 'layers_to_transform' parameter of LoHa must be None where target_modules is a regular expression. "
        "Got 0 instead.",
    ),
}


@pytest.mark.parametrize(("adapter", "sentence"), WRONG.values(), ids=WRONG)
def test_a_pattern_that_cannot_be_used_is_one_sentence(adapter: Any, sentence: str, settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter=adapter).fit(frame)
    assert str(error.value) == sentence


def test_a_pattern_of_layers_of_another_kind(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    folder = make_other(tmp_path / "gpt2", tiny, "gpt2")
    with pytest.raises(ParameterError) as error:
        classifier(settings, base_model=folder, adapter={"type": "loha", "target_modules": ".*c_attn$"}).fit(frame)
    assert str(error.value) == (
        "The adapter 'loha' cannot be put into this model: it adapts layers of the kind Linear only, and 'c_attn' is "
        "of the kind Conv1D here, which keeps its weights the other way round."
    )


# What is left out -----------------------------------------------------------------------------------------

ROWS = [(kind, key) for kind, rows in LEFT_OUT.items() if kind for key in rows]


@pytest.mark.parametrize(("kind", "key"), ROWS)
def test_a_setting_that_is_left_out_says_why(kind: str, key: str) -> None:
    for name, method in METHODS.items():
        if getattr(method, "peft_type", None) != kind:
            continue
        with pytest.raises(ParameterError) as error:
            resolve_adapter({"type": name, key: 1})
        assert str(error.value) == f"The adapter {name!r} has no parameter {key!r}: {LEFT_OUT[kind][key]}."


def test_the_table_and_the_fields_are_all_that_peft_has() -> None:
    """A setting that a later version of peft brings is found here."""
    from dataclasses import fields

    common = {"peft_type", "auto_mapping", "peft_version", "revision", *LEFT_OUT[""]}
    for name, method in METHODS.items():
        if not hasattr(method, "peft_type"):
            continue
        known = {method.names.get(field.name, field.name) for field in fields(method)}
        left = {field.name for field in fields(config_class(method.peft_type)) if field.init} - known - common
        assert left == LEFT_OUT.get(method.peft_type, {}).keys() & left, name
        assert LEFT_OUT.get(method.peft_type, {}).keys() <= left | {"r"}, name


def test_feedforward_layers_of_ia3_are_some_of_those_that_match(settings: Any, frame: Any) -> None:
    spec = {"type": "ia3", "target_modules": ".*[.](k|down)_proj", "feedforward_modules": ["down_proj"]}
    classifier(settings, adapter=spec).fit(frame)
    with pytest.raises(ParameterError, match="The 'feedforward_modules' parameter of IA3 must be among target_modules"):
        classifier(settings, adapter={**spec, "target_modules": ".*[.]k_proj"}).fit(frame)
