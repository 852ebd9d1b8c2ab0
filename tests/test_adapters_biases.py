"""Biases that methods other than LoRA train beside, and blocks of BOFT: kept, merged, and read by peft alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from benchmarks.adapters import IDS, RATES
from torch_side import classifier, make_other, plain_model, weights

import llmfit
from llmfit.adapters import METHODS
from llmfit.adapters.folders import spec_from_folder
from llmfit.adapters.some import Biased
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

OWN = {"fourierft": "fourier_only", "adalora": "lora_only"}  # the others: the method's name
NAMES = [name for name, method in METHODS.items() if issubclass(method, Biased)]
CASES = [(name, bias) for name in NAMES for bias in ("all", OWN.get(name, f"{name}_only"))]


@pytest.fixture(scope="module")
def biased(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_other(tmp_path_factory.mktemp("biased") / "llama", tiny, "llama", attention_bias=True)


@pytest.fixture(scope="module")
def wide(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return make_other(tmp_path_factory.mktemp("wide") / "llama", tiny, "llama", attention_bias=True, **sizes)


@pytest.fixture(scope="module")
def fits(tiny: str, biased: str) -> Any:
    """Fit a method, with some of the biases or none, each pair once."""
    texts = ["red apple", "green pear", "old car", "fast train"]
    frame = pd.DataFrame({"text": texts, "label": ["fruit", "fruit", "vehicle", "vehicle"]})
    given = {"base_model": biased, "epochs": 2, "batch_size": 4, "random_state": 0}
    given |= {"device": "cpu", "dtype": "float32", "verbose": 0}

    @cache
    def fit(name: str, bias: str) -> Any:
        adapter = {"type": name, "target_modules": ["q_proj", "o_proj"], "bias": bias}
        return classifier(given, adapter=adapter, learning_rate=RATES.get(name, 1e-2)).fit(frame)

    return frame, fit


@torch.no_grad()
def logits_of(clf: Any) -> torch.Tensor:
    base = load_base_model(clf.base_model, device="cpu", dtype="float32")
    with base.attach(clf._adapter, weights(clf)) as model:
        return model(input_ids=IDS).logits


def biases_of(clf: Any) -> dict[str, torch.Tensor]:
    """What was trained of the base model's biases, by their names there."""
    found = {name: tensor for name, tensor in weights(clf).items() if name.endswith(".bias")}
    return {n.removeprefix("base_model.model.").replace(".base_layer", ""): tensor for n, tensor in found.items()}


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_biases_are_trained_and_kept(name: str, bias: str, fits: Any, biased: str, tmp_path: Path) -> None:
    frame, fit = fits
    before = {key: tensor.clone() for key, tensor in plain_model(biased).state_dict().items()}
    clf = fit(name, bias)
    now = load_base_model(biased, device="cpu", dtype="float32").model.state_dict()
    assert [key for key in before if not torch.equal(before[key], now[key])] == []
    learned = biases_of(clf)
    layers = {"q_proj", "o_proj"} | ({"k_proj", "v_proj"} if bias == "all" else set())
    assert {key.split(".")[-2] for key in learned} == layers
    changed = {key.split(".")[-2] for key, tensor in learned.items() if not torch.equal(tensor, before[key])}
    assert changed >= {"q_proj", "o_proj"}  # what is added to every key leaves attention as it is
    more = sum(tensor.numel() for tensor in learned.values())
    assert clf.trainable_parameters_ == fit(name, "none").trainable_parameters_ + more
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    assert again._adapter == clf._adapter
    told: Any = spec_from_folder(tmp_path / "saved" / "adapter", METHODS.values())
    assert told.bias == bias


@pytest.mark.filterwarnings("ignore:.*pattern keys did not match")  # which peft has written itself, of AdaLoRA
@pytest.mark.parametrize(("name", "bias"), CASES)
def test_trained_biases_are_merged_and_read_by_peft(
    name: str, bias: str, fits: Any, biased: str, tmp_path: Path
) -> None:
    clf = fits[1](name, bias)
    expected = logits_of(clf)
    clf.export(tmp_path / "merged", dtype="float32")
    clf.export(tmp_path / "adapter", merge=False)
    merged = plain_model(str(tmp_path / "merged"))
    state = merged.state_dict()
    assert [key for key, tensor in biases_of(clf).items() if not torch.equal(state[key], tensor)] == []
    read = peft.PeftModel.from_pretrained(plain_model(biased), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(read(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_that_a_method_does_not_know_is_one_sentence(name: str, settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": name, "bias": "beft_only"}).fit(frame)
    owner, own = METHODS[name].__name__, OWN.get(name, f"{name}_only")
    assert str(error.value).startswith(
        f"The 'bias' parameter of {owner} must be one of 'none', 'all', {own!r}. Got 'beft_only' instead."
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].quantizable])
def test_biases_are_trained_beside_few_bits_or_refused(
    name: str, bits: int, settings: Any, frame: Any, wide: str, tmp_path: Path
) -> None:
    given = {**settings, "base_model": wide, "quantization": bits, "epochs": 2}
    clf = classifier(given, adapter={"type": name, "bias": "all"})
    if name == "c3a":  # peft adds in place to what such a layer gives
        with pytest.raises(ParameterError) as error:
            clf.fit(frame)
        assert str(error.value) == (
            "The adapter 'c3a' does not go with quantized layers that have a bias, as "
            "'model.layers.0.self_attn.q_proj' has. Name others in target_modules, choose another adapter, or "
            "set quantization=None."
        )
        clf.set_params(adapter={"type": name, "target_modules": ["up_proj"]})
    before = {key: t.clone() for key, t in load_quantized(wide, bits).items()}
    clf.fit(frame).save(tmp_path / "saved")
    assert [key for key, tensor in load_quantized(wide, bits).items() if not torch.equal(tensor, before[key])] == []
    assert {tensor.dtype for tensor in weights(clf).values()} == {torch.float32}
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


def load_quantized(folder: str, bits: int) -> dict[str, torch.Tensor]:
    base = load_base_model(folder, device="cpu", dtype="float32", quantization=bits)
    return dict(base.model.state_dict())


# Blocks of BOFT -------------------------------------------------------------------------------------


def test_blocks_of_a_number_are_as_large_as_each_layer_makes_them(settings: Any, frame: Any, tmp_path: Path) -> None:
    clf = classifier(settings, adapter={"type": "boft", "boft_block_num": 4}, epochs=3).fit(frame)
    shapes = {name.split(".")[-3]: (*tensor.shape,) for name, tensor in weights(clf).items() if ".boft_R" in name}
    assert shapes == {"self_attn": (1, 4, 8, 8), "mlp": (1, 4, 16, 16)}
    expected = logits_of(clf)
    clf.export(tmp_path / "merged", dtype="float32")
    clf.export(tmp_path / "adapter", merge=False)
    read = peft.PeftModel.from_pretrained(plain_model(settings["base_model"]), tmp_path / "adapter").eval()
    with torch.no_grad():
        merged = plain_model(str(tmp_path / "merged"))(input_ids=IDS).logits
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(read(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    again = classifier(settings, adapter=str(tmp_path / "adapter"), learning_rate=1e-12).fit(frame)
    assert again._adapter.boft_block_num == 4
    np.testing.assert_allclose(again.predict_proba(frame), clf.predict_proba(frame), atol=1e-6)


WRONG = {
    "two ways": ({"boft_block_num": 4, "boft_block_size": 8}, "0 where boft_block_size is given. Got 4 instead."),
    "no divisor": (
        {"boft_block_num": 3},
        "a divisor of the inputs of every layer adapted and less than them, and 'model.layers.0.self_attn.q_proj' has "
        "32. Got 3 instead.",
    ),
    "blocks of one": (
        {"boft_block_num": 32},
        "a divisor of the inputs of every layer adapted and less than them, and 'model.layers.0.self_attn.q_proj' has "
        "32. Got 32 instead.",
    ),
}


@pytest.mark.parametrize(("given", "rest"), WRONG.values(), ids=WRONG)
def test_blocks_that_do_not_go_with_a_layer_are_one_sentence(given: Any, rest: str, settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "boft", **given}).fit(frame)
    assert str(error.value) == f"The 'boft_block_num' parameter of BOFT must be {rest}"
