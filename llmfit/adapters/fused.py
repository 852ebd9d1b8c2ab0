"""peft's LoRA layers with their products fused: the update is added where the frozen layer's output is written.

Takes a model that peft has wrapped; changes how its plain LoRA layers compute, not what. Layers of another kind stay
as peft computes them, and so do all of a model in which the two are seen to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from llmfit.adapters.products import Change, adapted, draw_kept, read_together, turns_of
from llmfit.kinds import find_own
from llmfit.selfcheck import Said, seen_alike

__all__ = ["fuse_lora", "is_plain"]

ROWS = 16  # that a layer reads both ways
ROUNDING = {1: 0.05, 2: 0.05, 4: 1e-3}  # by the bytes of a weight


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
    if not _are_alike(model, plain, adapter):
        return

    def compute(layers: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _compute(layers, adapter, x)

    read_together(model, {*plain}, compute, kind=lambda layer: _kind(layer, adapter)[:3], able=_computes)


def _are_alike(model: Any, layers: Sequence[Any], adapter: str) -> bool:
    """See once for a base model and each kind of its layers whether both ways are the same."""
    weights = [layer.base_layer.weight for layer in layers]
    if torch.is_inference_mode_enabled() or any(weight.is_meta or weight.is_inference() for weight in weights):
        return False  # without gradients there is nothing to see
    kinds = {_kind(layer, adapter): layer for layer in layers}
    return all(
        seen_alike(
            find_own(model) or model,
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
    """Give a layer's outputs and gradients both ways, without dropout and with half of what is read dropping out."""

    def twice(x: torch.Tensor, dropout: float) -> torch.Tensor:
        one, other = _in_one_piece([layer, layer], adapter, x, dropout, lambda: (x > 0).to(x))
        return (one + other) / 2

    rounding, said = ROUNDING[min(4, layer.base_layer.weight.dtype.itemsize)], []
    for dropout in (0.0, 0.5):
        with _dropping(layer, adapter, dropout):
            plain = _probe(layer, adapter, partial(type(layer).forward, layer))
        fused = _probe(layer, adapter, partial(twice, dropout=dropout))
        said += [(one, other, rounding) for one, other in zip(plain, fused, strict=True)]
    return said


class _Positive(nn.Module):
    """Drops what is not positive."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.scale = 1 / (1 - dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the others, larger."""
        return torch.where(x > 0, x * self.scale, torch.zeros_like(x))


@contextmanager
def _dropping(layer: Any, adapter: str, dropout: float) -> Iterator[None]:
    """Inside, let so much of what a layer reads drop out, always the same."""
    before = layer.lora_dropout[adapter]
    layer.lora_dropout[adapter] = _Positive(dropout) if dropout else nn.Identity()
    try:
        yield
    finally:
        layer.lora_dropout[adapter] = before


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


def _computes(layer: Any) -> bool:
    """Tell a layer that is not switched off or merged."""
    return not (layer.disable_adapters or layer.merged)


def _compute(layers: Sequence[Any], adapter: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Let layers read x, (..., in): (..., out) of each, in their order."""
    dropout = getattr(layers[0].lora_dropout[adapter], "p", 0.0) if layers[0].training else 0.0
    flat = x.reshape(-1, x.shape[-1])
    return _in_one_piece(layers, adapter, x, dropout, lambda: draw_kept(flat, dropout))


def _in_one_piece(
    layers: Sequence[Any], adapter: str, x: torch.Tensor, dropout: float, draw: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Compute layers with so much of what each reads dropping out, as it is drawn."""
    changes = []
    for i, layer in enumerate(layers):
        a, b = (part[adapter].weight for part in (layer.lora_A, layer.lora_B))
        changes.append(Change(i, a, b, layer.scaling[adapter] / (1 - dropout), draw() if dropout else None))
    turns, weights = turns_of(slice(None), changes)
    return adapted(x, [layer.base_layer for layer in layers], turns, weights)
