"""LoRA layers in one piece against peft's own: the same outputs and gradients, and the others left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch_side import classifier, plain_model

from llmfit.adapters import fused


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
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids).logits.float()
    logits.log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_outputs_and_gradients_are_those_of_peft(settings, dtype, far, tiny):
    logits, gradients = run(wrapped(tiny, dtype, **settings), dtype)
    model = wrapped(tiny, dtype, **settings)
    fused.fuse_lora(model)
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
