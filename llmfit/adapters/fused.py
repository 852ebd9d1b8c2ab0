"""peft's LoRA layers with their products fused: the update is added where the frozen layer's output is written.

Takes a model that peft has wrapped; changes how its plain LoRA layers compute, not what. A frozen W with float32 A and
B beside it costs four products and no pass over its outputs more than W alone. Layers with dropout, or of another kind,
stay as peft computes them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["fuse_lora", "is_plain"]


class _Adapted(torch.autograd.Function):
    """x W' + s (x A') B', all in the dtype of W; the gradients of A and B come in theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # (N, in)
        low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)  # (r, in), (out, r)
        inner = (flat @ low_a.t()).mul_(scaling)  # (N, r)
        out = functional.linear(flat, weight, bias).addmm_(inner, low_b.t())
        ctx.save_for_backward(flat, weight, low_a, low_b, inner)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (x.dtype, a.dtype, b.dtype), x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        flat, weight, low_a, low_b, inner = ctx.saved_tensors
        given, kind_a, kind_b = ctx.dtypes
        grad = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)  # (N, out)
        grad_inner = (grad @ low_b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, low_a).view(ctx.shape).to(given)
        grad_a = (grad_inner.t() @ flat).to(kind_a) if ctx.needs_input_grad[3] else None
        grad_b = (grad.t() @ inner).to(kind_b) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


def fuse_lora(model: Any, adapter: str = "default") -> None:
    """Let the plain LoRA layers of a model compute in one piece.

    Parameters
    ----------
    model : torch.nn.Module
    adapter : str
        peft's name of the adapter; layers with another one beside it stay.
    """
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if type(layer) is Linear and is_plain(layer, adapter):
            layer.forward = partial(_forward, layer, adapter)


def is_plain(layer: Any, adapter: str) -> bool:
    """Tell a LoRA layer of peft that is no more than x W' + s (x A') B', W frozen, dropout of x aside."""
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and not any(p.requires_grad for p in base.parameters())
        and [*layer.lora_A] == [adapter]
        and not layer.lora_variant
        and not layer.lora_bias[adapter]
    )


def _forward(layer: Any, adapter: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    drops = layer.training and getattr(layer.lora_dropout[adapter], "p", 0.0) > 0
    if drops or args or kwargs or layer.disable_adapters or layer.merged:
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    base, a, b = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    fused: torch.Tensor = _Adapted.apply(x, base.weight, base.bias, a, b, layer.scaling[adapter])  # type: ignore[no-untyped-call]
    return fused
