"""peft's LoRA layers with their products fused: the update is added where the frozen layer's output is written.

Takes a model that peft has wrapped; changes how its plain LoRA layers compute, not what. A frozen W with float32 A and
B beside it costs four products and no pass over its outputs more than W alone. Layers with dropout, or of another kind,
stay as peft computes them, and so do all of a model in which the two are seen to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llmfit.selfcheck import Said, seen_alike

__all__ = ["fuse_lora", "is_plain"]

ROWS = 16  # that a layer reads both ways
ROUNDING = {1: 0.05, 2: 0.05, 4: 1e-3}  # by the bytes of a weight


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
    @once_differentiable
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

    One layer of each kind that a base model has not had before reads random rows both ways, with random A and B.

    Parameters
    ----------
    model : torch.nn.Module
    adapter : str
        peft's name of the adapter; layers with another one beside it stay.

    Warns
    -----
    PackingWarning
        If outputs or gradients are not those of peft; then all layers stay.
    """
    from peft.tuners.lora.layer import Linear

    plain = [layer for layer in model.modules() if type(layer) is Linear and is_plain(layer, adapter)]
    if _are_alike(model, plain, adapter):
        for layer in plain:
            layer.forward = partial(_forward, layer, adapter)


def _are_alike(model: Any, layers: Sequence[Any], adapter: str) -> bool:
    """See once for a base model and each kind of its layers whether both ways are the same."""
    from transformers import PreTrainedModel

    weights = [layer.base_layer.weight for layer in layers]
    if torch.is_inference_mode_enabled() or any(weight.is_meta or weight.is_inference() for weight in weights):
        return False  # without gradients there is nothing to see
    own = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    kinds = {_kind(layer, adapter): layer for layer in layers}
    return all(
        seen_alike(
            own,
            ("LoRA", kind),
            layer,
            partial(_look, layer, adapter),
            what="compute LoRA in one piece",
            instead="peft does it, which takes longer",
        )
        for kind, layer in kinds.items()
    )


def _kind(layer: Any, adapter: str) -> tuple[Any, ...]:
    weight, low = layer.base_layer.weight, layer.lora_A[adapter].weight
    return weight.dtype, weight.device, low.dtype, layer.base_layer.bias is None


def _look(layer: Any, adapter: str) -> Said:
    """Give a layer's outputs and gradients both ways."""
    plain, fused = (
        _probe(layer, adapter, way) for way in (partial(type(layer).forward, layer), partial(_forward, layer, adapter))
    )
    rounding = ROUNDING[min(4, layer.base_layer.weight.dtype.itemsize)]
    return [(one, other, rounding) for one, other in zip(plain, fused, strict=True)]


@torch.enable_grad()
def _probe(layer: Any, adapter: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> Sequence[torch.Tensor]:
    """Read random rows; give the outputs, and the gradients of the rows, of A and of B."""
    weight = layer.base_layer.weight
    source = torch.Generator().manual_seed(0)  # nobody else's numbers are drawn

    def draw(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        numbers: torch.Tensor = torch.randn(tuple(shape), generator=source) * shape[-1] ** -0.5
        return numbers.to(like.device, like.dtype)

    x = draw((ROWS, layer.base_layer.in_features), weight).requires_grad_(True)
    parts = layer.lora_A[adapter], layer.lora_B[adapter]
    low = weight.dtype.itemsize == 2
    with _filled(parts, [nn.Parameter(draw(part.weight.shape, part.weight)) for part in parts]):
        with torch.autocast(weight.device.type, dtype=weight.dtype if low else None, enabled=low):
            out = forward(x)
        leaves = [x, *(part.weight for part in parts)]
        return [out.detach(), *torch.autograd.grad(out, leaves, draw(out.shape, out))]


@contextmanager
def _filled(parts: Sequence[Any], weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, let other weights stand in layers."""
    before = [part.weight for part in parts]
    try:
        for part, weight in zip(parts, weights, strict=True):
            part.weight = weight
        yield
    finally:
        for part, weight in zip(parts, before, strict=True):
            part.weight = weight


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
