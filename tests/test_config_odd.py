"""What else a configuration may hold by mistake: said in a sentence, or read as it is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from llmfit.adapters import LoRA
from llmfit.cli import main
from llmfit.config import from_config
from llmfit.exceptions import ParameterError

TEXT = {"name": "text", "type": "text"}
SENTENCES: dict[str, tuple[dict[str, Any], str]] = {
    "an input twice": (
        {"input_features": [TEXT, TEXT]},
        "The config's 'input_features[1]' names the column 'text', as another before it does. Drop one.",
    ),
    "a column twice": (
        {"input_features": [TEXT, {"name": "other", "column": "text"}]},
        "The config's 'input_features[1]' names the column 'text', as another before it does. Drop one.",
    ),
    "an output twice": (
        {"output_features": [TEXT, TEXT]},
        "The config's 'output_features[1]' names the column 'text', as another before it does. Drop one.",
    ),
    "a device": (
        {"device": None},
        "The 'device' parameter of the estimator must be 'auto' or a device of torch, like 'cpu' or 'cuda:0'. Got None "
        "instead.",
    ),
    "a dtype": (
        {"dtype": "float3"},
        "The 'dtype' parameter of the estimator must be one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'. "
        "Got 'float3' instead. Did you mean 'float32'?",
    ),
    "weights of classes": (
        {"output_features": {"name": "label", "type": "category", "loss": {"class_weights": True}}},
        "The config's 'output_features.loss.class_weights' must be a mapping of label to weight, as a list has no "
        "labels. Got True instead.",
    ),
    "an optimiser": (
        {"trainer": {"optimizer": {"type": ["sgd"]}}},
        "The config's 'trainer.optimizer.type' must be one of ",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_is_said_in_one_sentence(name: str) -> None:
    config, sentence = SENTENCES[name]
    with pytest.raises(ParameterError) as caught:
        from_config(config)
    assert str(caught.value) == sentence or (name == "an optimiser" and str(caught.value).startswith(sentence))


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"epochs": 2}'), ("a.yaml", "epochs: 2")])
def test_a_byte_order_mark_is_no_part_of_a_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert from_config(tmp_path / name).epochs == 2


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [("a.json", '{"epochs": 2, "epochs": 3}', ""), ("a.yaml", "epochs: 2\nepochs: 3", " in line 2")],
)
def test_a_key_that_stands_twice_is_refused(name: str, text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError) as caught:
        from_config(tmp_path / name)
    assert str(caught.value) == f"The config {str(tmp_path / name)!r} cannot be read{where}: 'epochs' stands twice."


GENERATED: dict[str, tuple[dict[str, Any], Any]] = {
    "a text": ({"output_features": {"name": "a", "type": "text"}}, {"max_new_tokens": 3}),
    "a number in words": ({"output_features": {"name": "a", "type": "number"}, "head": "lm"}, {"max_new_tokens": 3}),
    "a number of a head": ({"output_features": {"name": "a", "type": "number"}}, None),
    "a class": ({"output_features": {"name": "a", "type": "category"}}, None),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generation_is_handed_on_where_an_answer_is_generated(name: str) -> None:
    config, generation = GENERATED[name]
    assert getattr(from_config({**config, "generation": {"max_new_tokens": 3}}), "generation", None) == generation


def test_keys_of_generation_are_checked_beside_a_class() -> None:
    with pytest.raises(ParameterError, match=r"The config has no key 'generation.temperatur'"):
        from_config({"output_features": {"name": "a", "type": "category"}, "generation": {"temperatur": 3}})


def test_the_template_of_the_helps_example_is_a_template(
    tiny: str, frame: pd.DataFrame, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "c.yaml").write_text(f"estimator: LLMClassifier\nbase_model: {tiny}\ntarget: label\ndevice: cpu\n")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    command = ["preview", str(tmp_path / "c.yaml"), str(tmp_path / "rows.csv"), "-n", "1"]
    assert main([*command, "--set", "template=Message: {text}"]) == 0
    assert f"Message: {frame['text'].iloc[0]}[" in capsys.readouterr().out


INSIDE: dict[str, tuple[dict[str, Any], str, Any, Any]] = {
    "few shots": ({"template": {"few_shot": {"k": 1, "seed": 3}}}, "template.few_shot.k", 2, None),
    "few shots of none": ({}, "template.few_shot.k", 2, None),
    "a feature": ({"features": {"text": "text"}}, "features.zip", "text", None),
    "a class": ({"class_weight": {"ham": 1.0}}, "class_weight.spam", 3, None),
    "the optimiser": ({}, "optimizer.type", "sgd", None),
    "a rank": ({"adapter": {"r": 2}}, "adapter.rank_pattern.q_proj", 2, None),
    "the rank of no adapter": ({"adapter": None}, "adapter.r", 3, None),
    "quantization of none": ({"quantization": None}, "quantization.bits", 4, None),
    "a spec": ({"adapter": LoRA(r=3)}, "adapter.alpha", 3, {"type": "lora", "r": 3, "alpha": 3}),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_given_reaches_as_deep_as_a_file_does(name: str) -> None:
    config, place, value, expected = INSIDE[name]
    config, head = {"estimator": "LLMClassifier", "target": "label", **config}, place.partition(".")[0]
    if expected is None:
        expected = getattr(from_config([config, {place: value}]), head)
    assert getattr(from_config(config, **{place: value}), head) == expected
    assert getattr(from_config(config, **{place.replace(".", "__"): value}), head) == expected


def test_what_is_given_inside_a_parameter_given_reaches_it_too() -> None:
    found = from_config({"adapter": "ia3"}, **{"adapter.rank_pattern": {"k": 1}, "adapter": {"type": "lora", "r": 2}})
    assert found.adapter == {"type": "lora", "r": 2, "rank_pattern": {"k": 1}}
    found = from_config({"adapter": {"rank_pattern": {"q": 2}}}, adapter__rank_pattern={"k": 1})
    assert found.adapter == {"rank_pattern": {"k": 1}}


NOWHERE: dict[str, tuple[str, str]] = {
    "few shots": ("template.few_shot.kk", "{} Did you mean 'template.few_shot.k'?"),
    "an adapter": ("adapter.rr", "{} Did you mean 'adapter.r'?"),
    "a number": ("epochs.x", "The config has no key 'epochs.x': 'epochs' has no keys."),
    "a name": ("class_weight.x", "The config has no key 'class_weight.x': 'class_weight' is 'balanced'."),
    "another estimator": (
        "generation.seed",
        "The config has no key 'generation.seed': LLMClassifier has no parameter 'generation'.",
    ),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_what_is_given_and_is_nowhere_is_named_as_it_was_written(name: str) -> None:
    place, sentence = NOWHERE[name]
    with pytest.raises(ParameterError) as caught:
        from_config({"estimator": "LLMClassifier", "class_weight": "balanced"}, **{place: 3})
    assert str(caught.value) == sentence.format(f"The config has no key {place!r}.")


def test_what_is_given_inside_an_axis_would_be_lost() -> None:
    config = {"template": {"few_shot": {"k": 1}}, "hyperopt": {"template.few_shot": [{"k": 1}, {"k": 2}]}}
    with pytest.raises(
        ParameterError, match=r"'template.few_shot' as a whole, in which template.few_shot.seed=3 would"
    ):
        from_config(config, **{"template.few_shot.seed": 3})
