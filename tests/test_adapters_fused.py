"""LoRA layers in one piece against peft's own: the same outputs and gradients, and the others left alone."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from seq2seq_side import make_pair, plain_pair
from torch_side import classifier, make_other, plain_model

import llmfit
from llmfit import selfcheck
from llmfit.adapters import fused, products
from llmfit.exceptions import PackingWarning


def looks() -> list[bool]:
    """Say what is remembered of LoRA's layers."""
    return [alike for known in selfcheck._known.values() for key, alike in known.items() if key[0] == "LoRA"]


def wrapped(folder: str, dtype: torch.dtype, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, **settings)
    model = get_peft_model(plain_model(folder).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train()


def run(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(5, 65).view(3, 20)
    torch.manual_seed(0)  # on a CPU, both ways draw the same
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids).logits.float()
    logits.log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_dropout": 0.2}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo"])
def test_outputs_and_gradients_are_those_of_peft(kind, settings, dtype, far, tiny, tmp_path):
    clips = {"clip_qkv": 3.0} if kind == "olmo" else {}  # which writes to queries, keys and values
    folder = tiny if kind == "llama" else make_other(tmp_path / kind, tiny, kind, **clips)
    logits, gradients = run(wrapped(folder, dtype, **settings), dtype)
    model = wrapped(folder, dtype, **settings)
    fused.fuse_lora(model)
    layers = [module for module in model.modules() if isinstance(vars(module).get("forward"), partial)]
    assert {layer.base_layer.bias is not None for layer in layers} == ({True, False} if kind == "qwen2" else {False})
    found, own = run(model, dtype)
    assert (found - logits).norm() <= far * logits.norm()
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert own[name].dtype == gradient.dtype
        assert (own[name] - gradient).norm() <= far * gradient.norm(), name


def test_it_is_fused_where_it_can_be_and_nowhere_else(tiny):
    def count(**settings: Any) -> int:
        model = wrapped(tiny, torch.float32, **settings)
        fused.fuse_lora(model)
        return sum("forward" in vars(module) for module in model.modules())

    assert count() == 14
    assert count(use_dora=True) == 0
    model = wrapped(tiny, torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    fused.fuse_lora(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers read in each piece."""
    found: list[int] = []
    compute = fused._compute
    monkeypatch.setattr(
        fused, "_compute", lambda layers, *given: (found.append(len(layers)), compute(layers, *given))[1]
    )
    return found


def once(folder: str, read: list[int], **settings: Any) -> list[int]:
    """Run a model once that is fused."""
    model = wrapped(folder, torch.float32, **settings)
    fused.fuse_lora(model)
    read.clear()
    run(model, torch.float32)
    return read


def test_layers_that_read_the_same_read_it_once(tiny, read):
    assert once(tiny, read) == [3, 1, 2, 1] * 2  # queries, keys and values; what is attended to; gate and up; down


def test_layers_whose_siblings_have_no_adapter_read_alone(tiny, read):
    assert once(tiny, read, exclude_modules=["k_proj", "up_proj"]) == [1, 1, 1, 1, 1] * 2


def test_encoder_decoders_whose_keys_are_of_something_else_read_one_by_one(tiny, tmp_path, read):
    pair = plain_pair(make_pair(tmp_path / "bart", tiny, "bart"))
    model = get_peft_model(pair, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fused.fuse_lora(model)
    read.clear()
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    assert {*read} == {1}


def test_layers_that_are_given_something_else_compute_that_and_nothing_waits(tiny):
    """As keys would be of other states than queries; what the first has computed for the second is let go of."""
    model = wrapped(tiny, torch.float32)
    fused.fuse_lora(model)
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    readers = query.forward.func.__self__
    x, other = torch.randn(2, 1, 5, query.in_features)
    plain = type(key).forward
    for layer, given in ((query, x), (value, x), (value, x), (key, other), (query, other), (key, x), (query, x)):
        torch.testing.assert_close(layer(given), plain(layer, given))
    assert [*readers._waiting] == [value]
    with pytest.raises(TypeError):
        attention(x)  # it lacks the angles, and ends
    assert not readers._waiting


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_was_read_is_held_behind_a_pass(fails, tiny):
    model = wrapped(tiny, torch.float32)
    fused.fuse_lora(model)
    seen: list[Any] = []
    layers = [module for module in model.modules() if isinstance(vars(module).get("forward"), partial)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: seen.append(weakref.ref(given[0])))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("oom")

    if fails:
        layers[-2].register_forward_hook(fail)  # up, behind gate
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext(), torch.set_grad_enabled(fails):
        model(input_ids=torch.arange(5, 25)[None])
    assert len(seen) == len(layers) - fails
    assert not any(x() is not None for x in seen)


def test_an_adapter_that_is_switched_off_is_off(tiny):
    model = wrapped(tiny, torch.float32).eval()
    fused.fuse_lora(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        torch.testing.assert_close(off, plain_model(tiny)(input_ids=ids).logits)
    assert (on - off).abs().max() > 1e-2


@pytest.mark.parametrize("changed", [{}, {"dropout": 0.2}])
def test_a_fit_is_the_one_of_peft_alone(changed, settings, frame, monkeypatch):
    own = {**settings, "adapter": {"r": 4, **changed}, "epochs": 3, "batch_size": 4}
    one = classifier(own).fit(frame)
    monkeypatch.setattr(fused, "fuse_lora", lambda *_: None)
    other = classifier(own).fit(frame)
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=1e-4)


def fuse_with(monkeypatch: pytest.MonkeyPatch, folder: str, **settings: Any) -> Any:
    """A model that is met for the first time."""
    monkeypatch.setattr(selfcheck, "_known", type(selfcheck._known)())
    model = wrapped(folder, torch.float32, **settings)
    fused.fuse_lora(model)
    return model


def is_fused(model: Any) -> bool:
    return any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("part", ["outputs", "gradients"])
def test_layers_that_would_compute_something_else_are_left_to_peft_with_a_warning(part, tiny, monkeypatch):
    name, of = ("forward", 8) if part == "outputs" else ("backward", 9)  # which of A's or B's numbers are wrong
    real = getattr(products.Adapted, name)

    def wrong(ctx: Any, *given: Any) -> Any:
        if name == "forward":
            return real(ctx, *(x * 1.1 if i == of else x for i, x in enumerate(given)))
        return tuple(g * 1.1 if i == of else g for i, g in enumerate(real(ctx, *given)))

    monkeypatch.setattr(products.Adapted, name, staticmethod(wrong))
    with pytest.warns(PackingWarning) as warned:
        model = fuse_with(monkeypatch, tiny)
    assert [str(each.message) for each in warned if each.category is PackingWarning] == [
        "This model cannot compute LoRA in one piece (its answers differ): peft does it, which takes longer."
    ]
    assert not is_fused(model)
    fused.fuse_lora(model)  # said once
    assert not is_fused(model)


def test_layers_that_would_drop_something_else_are_left_to_peft_with_a_warning(tiny, monkeypatch):
    real = fused.Change
    monkeypatch.setattr(
        fused, "Change", lambda i, a, b, factor, kept: real(i, a, b, 1.5 if kept is not None else factor, kept)
    )
    with pytest.warns(PackingWarning, match="compute LoRA in one piece"):
        model = fuse_with(monkeypatch, tiny, lora_dropout=0.2)
    assert not is_fused(model)


def test_a_base_model_is_looked_at_once_and_nothing_of_it_changes(tiny, monkeypatch):
    looked_at: list[Any] = []
    real = fused._look
    monkeypatch.setattr(fused, "_look", lambda layer, name: (looked_at.append(layer), real(layer, name))[1])
    monkeypatch.setattr(selfcheck, "_known", type(selfcheck._known)())
    model = wrapped(tiny, torch.float32, lora_dropout=0.2)
    before = dict(model.named_parameters())
    values, numbers = {name: p.clone() for name, p in before.items()}, torch.get_rng_state()
    fused.fuse_lora(model)
    fused.fuse_lora(model)
    assert len(looked_at) == 1
    assert is_fused(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, p in model.named_parameters():
        assert p is before[name]
        assert torch.equal(p, values[name])
        assert p.grad is None


def test_memory_that_runs_out_in_the_comparison_is_remembered_by_nobody(tiny, monkeypatch):
    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("oom")

    with monkeypatch.context() as full:
        full.setattr(fused, "_probe", never)
        model = fuse_with(monkeypatch, tiny)
    assert not is_fused(model)
    fused.fuse_lora(model)
    assert is_fused(model)


def test_a_prediction_is_looked_at_too(settings, frame, monkeypatch):
    """Whatever is trained: what is compared has gradients."""
    clf = classifier(settings, adapter={"r": 4}).fit(frame)
    expected = clf.predict_log_proba(frame)
    llmfit.clear_cache()
    monkeypatch.setattr(selfcheck, "_known", type(selfcheck._known)())
    np.testing.assert_array_equal(clf.predict_log_proba(frame), expected)
    assert looks() == [True]


def test_what_says_nothing_of_a_layer_is_not_remembered(settings, frame):
    clf = classifier(settings, adapter={"type": "lora", "r": 4}).fit(frame)
    expected = clf.predict_proba(frame)
    llmfit.clear_cache()
    selfcheck._known.clear()
    with torch.inference_mode():
        np.testing.assert_allclose(clf.predict_proba(frame), expected, atol=1e-6)
    assert looks() == []
    clf.predict_proba(frame)
    assert looks() == [True]


def test_gradients_of_nothing_are_alike():
    nothing = torch.zeros(2, 3)
    assert selfcheck.apart(nothing, nothing) == 0.0
    assert selfcheck.apart(nothing + 1, nothing) > 1.0
