"""LoftQ beside base models in few bits: what they have lost is found whichever way weights stand, and is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from conftest import make_model
from head_side import headed, make_encoder
from safetensors.torch import load_file, save_file
from torch_side import classifier, make_other, plain_model, weights

import llmfit
from llmfit.adapters import lora_starts
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

BITS = [4, 8]
IDS = torch.tensor([[1, 70, 80, 90, 100, 41, 42, 43]])
LOFTQ = {"type": "lora", "r": 4, "init_lora_weights": "loftq"}
SIZES = {"gpt2": {"n_embd": 64}, "qwen2": {"hidden_size": 64}}


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    others = {kind: make_other(root / kind, tiny, kind, **size) for kind, size in SIZES.items()}
    return {"llama": make_model(root / "llama", hidden=64), **others}


def stands_for(layer: Any) -> torch.Tensor:
    """The weights of a layer in few bits, (out, in)."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scales[:, None] / 127


def packed_layers(folder: str, bits: int) -> tuple[Any, dict[str, Any]]:
    base = load_base_model(folder, device="cpu", dtype="float32", quantization=bits)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return base, {name: layer for name, layer in base.model.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_begins_as_what_every_layer_has_lost(
    kind: str, bits: int, folders: dict[str, str], settings: Any, frame: Any
) -> None:
    """GPT-2's layers keep their weights the other way round in files; some of them are as wide as they are high."""
    given = settings | {"base_model": folders[kind], "quantization": bits, "learning_rate": 1e-30}
    tensors = weights(classifier(given, adapter=LOFTQ).fit(frame))
    _, layers = packed_layers(folders[kind], bits)
    plain, found = plain_model(folders[kind]).state_dict(), 0
    for name, layer in layers.items():
        a, b = (tensors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            continue
        full = plain[f"{name}.weight"].T if kind == "gpt2" else plain[f"{name}.weight"]
        lost = full - stands_for(layer)
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        best = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(2 * b @ a, best, rtol=0, atol=1e-4 * float(lost.norm()) + 1e-6)
        found += 1
    assert found == {"gpt2": 8, "llama": 14}[kind]


@pytest.mark.parametrize("kind", ["gpt2"])
def test_a_square_layer_of_a_whole_base_loses_as_much(kind: str, folders: dict[str, str], settings: Any) -> None:
    from llmfit.adapters import resolve_adapter

    base = load_base_model(folders[kind], device="cpu", dtype="float32")
    with base.attach(resolve_adapter(LOFTQ), training=True) as model:
        layer = model.base_model.model.transformer.h[0].attn.c_proj
        begun = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    full = plain_model(folders[kind]).transformer.h[0].attn.c_proj.weight.T.contiguous()
    few = bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(full.data, quant_type="nf4"))
    left, values, right = torch.linalg.svd(full - few, full_matrices=False)
    torch.testing.assert_close(begun, left[:, :4] * values[:4] @ right[:4], rtol=0, atol=1e-5)


TARGETS: dict[str, dict[str, Any]] = {"all": {}, "some": {"target_modules": [r"q_proj", "down_proj"]}}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("kind", "which"), [("llama", "all"), ("llama", "some"), ("gpt2", "all"), ("qwen2", "all")])
def test_what_began_beside_few_bits_is_merged_into_what_these_stand_for(
    kind: str, which: str, bits: int, folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = settings | {"base_model": folders[kind], "quantization": bits, "epochs": 3}
    clf = classifier(given, adapter={**LOFTQ, **TARGETS[which]}).fit(frame)
    base, layers = packed_layers(folders[kind], bits)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    clf.export(tmp_path / "merged", dtype="float32")
    after = base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    expected = plain_model(folders[kind])  # by hand: every layer as its few bits are read, with its product added
    for name, layer in layers.items():
        weight = stands_for(layer)
        a, b = (weights(clf).get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        whole = weight if a is None else weight + 2 * b @ a
        expected.get_submodule(name).weight.data = whole.T.contiguous() if kind == "gpt2" else whole
    merged = plain_model(str(tmp_path / "merged"))
    with torch.no_grad():
        found = merged(input_ids=IDS).logits
        torch.testing.assert_close(found, expected(input_ids=IDS).logits, rtol=0, atol=1e-4)
    if bits == 4:  # whose products are those of the weights that they stand for
        again = classifier(settings, base_model=str(tmp_path / "merged"), adapter=None).fit(frame)
        np.testing.assert_allclose(again.predict_proba(frame), clf.predict_proba(frame), atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_names_in_files_may_have_a_prefix_that_the_model_has_not(
    parts: int, settings: Any, frame: Any, tmp_path: Path
) -> None:
    """As in files of a BERT that fills in words, read as an encoder."""
    folder = make_encoder(tmp_path / "bert", masked=True, hidden=64)
    held = load_file(Path(folder) / "model.safetensors")
    if parts == 2:
        (Path(folder) / "model.safetensors").unlink()
        named = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(held)}
        for file in {*named.values()}:
            save_file({n: t for n, t in held.items() if named[n] == file}, Path(folder) / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": named}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    given = settings | {"base_model": folder, "quantization": 4, "learning_rate": 1e-30}
    tensors = weights(headed(given, adapter={**LOFTQ, "target_modules": ["query"]}).fit(frame))
    _, layers = packed_layers(folder, 4)
    name = "encoder.layer.1.attention.self.query"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    lost = held[f"bert.{name}.weight"] - stands_for(layers[name])
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    torch.testing.assert_close(2 * b @ a, left[:, :4] * values[:4] @ right[:4], rtol=0, atol=1e-4)


def test_a_layer_that_the_files_do_not_name_is_named(
    settings: Any, frame: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where transformers renames weights when it reads them."""
    folder = make_encoder(tmp_path / "bert", hidden=64)
    files = lora_starts._files
    renamed = lambda folder: {name.replace("query", "q"): path for name, path in files(folder).items()}  # noqa: E731
    monkeypatch.setattr(lora_starts, "_files", renamed)
    given = settings | {"base_model": folder, "quantization": 4}
    with pytest.raises(ParameterError) as error:
        headed(given, adapter={**LOFTQ, "target_modules": ["query"]}).fit(frame)
    assert str(error.value) == (
        "The 'init_lora_weights' parameter of LoRA cannot be 'loftq' here: it reads what the weights were in "
        f"safetensors files, and those of {str(Path(folder).resolve())!r} have none of the name "
        "'encoder.layer.0.attention.self.query.weight'."
    )


def test_a_head_is_exported_with_it(folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path) -> None:
    from test_export_heads import logits_of, softmax

    given = settings | {"base_model": folders["llama"], "quantization": 4, "epochs": 5}
    clf = classifier(given, adapter=LOFTQ, head={"type": "linear", "bias": False}).fit(frame)
    clf.export(tmp_path / "plain", dtype="float32")
    logits = logits_of(tmp_path / "plain", frame["text"] + " is a", "right")
    np.testing.assert_allclose(softmax(logits), clf.predict_proba(frame), atol=1e-4)


def test_a_base_in_full_precision_is_refused_still(
    folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    clf = classifier(settings | {"base_model": folders["llama"], "quantization": 4}, adapter=LOFTQ).fit(frame)
    clf.save(tmp_path / "saved")
    bare = llmfit.load(tmp_path / "saved", quantization=None)
    for work in (lambda: bare.predict(frame), lambda: bare.export(tmp_path / "merged")):
        with pytest.raises(ParameterError) as error:
            work()
        assert str(error.value) == (
            "The adapter began, by init_lora_weights='loftq', as what a quantized base model has lost, and goes with "
            "such a one only; 'model.layers.0.self_attn.q_proj' is in full precision here. Set quantization as in the "
            "fit, or fit without: what is then taken out of the weights is given back when the fit ends."
        )
    assert not (tmp_path / "merged").exists()
