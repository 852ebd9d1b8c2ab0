"""peft's LoRA layers with their products fused: the update is added where the frozen layer's output is written.

Takes a model that peft has wrapped; changes how its plain LoRA layers compute, not what. A frozen W with float32 A and
B beside it costs four products and no pass over its outputs more than W alone; layers that read the same, as those of
queries, keys and values do, share three of these, and the sum of their gradients. Layers with dropout, or of another
kind, stay as peft computes them, and so do all of a model in which the two are seen to differ.
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

from llmfit.kinds import find_own
from llmfit.selfcheck import Said, seen_alike

__all__ = ["fuse_lora", "is_plain"]

READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names within an attention, and an MLP
ROWS = 16  # that a layer reads both ways
ROUNDING = {1: 0.05, 2: 0.05, 4: 1e-3}  # by the bytes of a weight


class _Adapted(torch.autograd.Function):
    """x W' + s (x A') B' of each layer that reads x, all in the dtype of W; the gradients of A and B come in theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scalings: tuple[float, ...], *weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        frozen, biases, every_a, every_b = _by_kind(weights)  # (out, in), (out,) or None, (r, in), (out, r) of each
        dtype, ranks = frozen[0].dtype, [len(a) for a in every_a]
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
        low_a, low_b = torch.cat(every_a).to(dtype), [b.to(dtype) for b in every_b]  # (all r, in)
        inner = flat @ low_a.t()  # (N, all r)
        parts = [part.mul_(scaling) for part, scaling in zip(torch.split(inner, ranks, 1), scalings, strict=True)]
        each = zip(frozen, biases, parts, low_b, strict=True)
        out = [functional.linear(flat, w, bias).addmm_(part, b.t()) for w, bias, part, b in each]
        ctx.save_for_backward(flat, low_a, inner, *frozen, *low_b)
        ctx.scalings, ctx.ranks, ctx.shape = scalings, ranks, x.shape
        ctx.dtypes = x.dtype, every_a[0].dtype, every_b[0].dtype
        return tuple(out)  # (N, out) of each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        flat, low_a, inner, *rest = ctx.saved_tensors
        frozen, low_b = rest[: len(grads)], rest[len(grads) :]
        given, kind_a, kind_b = ctx.dtypes
        every = [grad.to(flat.dtype) for grad in grads]  # (N, out) of each
        back = zip(every, low_b, ctx.scalings, strict=True)
        grad_inner = torch.cat([(grad @ b).mul_(scaling) for grad, b, scaling in back], 1)  # (N, all r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = every[0] @ frozen[0]
            for grad, weight in zip(every[1:], frozen[1:], strict=True):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.addmm_(grad_inner, low_a).view(ctx.shape).to(given)
        found: list[Any] = [grad_x, None]
        if not any(ctx.needs_input_grad[2:]):
            return (*found, *[None] * 4 * len(grads))
        of_a = (grad_inner.t() @ flat).to(kind_a).split(ctx.ranks)
        for one, grad, part in zip(of_a, every, inner.split(ctx.ranks, 1), strict=True):
            found += [None, None, one, (grad.t() @ part).to(kind_b)]
        return tuple(found)


def _by_kind(weights: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Part what layers have, W, bias, A and B of each in turn, into all W, all biases, all A and all B."""
    return weights[0::4], weights[1::4], weights[2::4], weights[3::4]


class _Readers:
    """Layers that read the same: whichever is called first computes for all, and the others hand out what is theirs.

    What nobody asks for waits until their parent has done its work, or until the next time if that is interrupted. A
    layer that is given something else computes that for all, which is in vain if it alone reads it.
    """

    def __init__(self, layers: Sequence[Any], adapter: str) -> None:
        self.layers, self.adapter = layers, adapter
        self.forget()

    def forget(self, *_: Any) -> None:
        """Let go of what nobody has asked for."""
        self._waiting: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}  # what was read, and what comes of it

    def forward(self, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do what one of the layers does."""
        if args or kwargs or not _computes(layer, self.adapter):
            out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return out
        read, said = self._waiting.pop(layer, (None, None))
        if said is not None and read is x:
            return said
        if any(read is x for read, _ in self._waiting.values()):  # it has had its own
            return _compute([layer], self.adapter, x)[0]
        others = [one for one in self.layers if one is not layer and _computes(one, self.adapter)]
        first, *rest = _compute([layer, *others], self.adapter, x)
        self._waiting = {one: (x, out) for one, out in zip(others, rest, strict=True)}
        return first


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
    own, known = find_own(model), {*plain}
    crosses = own is not None and own.config.is_encoder_decoder  # there, keys are often not of what queries are of
    names = () if crosses else READ_THE_SAME
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if child in known}
        for group in _groups(children, adapter, names):
            readers = _Readers(group, adapter)
            for layer in group:
                layer.forward = partial(readers.forward, layer)
            if len(group) > 1:
                parent.register_forward_hook(readers.forget, always_call=True)


def _groups(children: dict[str, Any], adapter: str, every: Sequence[Sequence[str]]) -> Iterator[list[Any]]:
    """Part the layers of one parent into those that read the same, by their names, and others, each by itself."""
    for names in every:
        group = [children[name] for name in names if name in children]
        if len(group) == len(names) and len({(_kind(layer, adapter)[:3], layer.in_features) for layer in group}) == 1:
            children = {name: child for name, child in children.items() if name not in names}
            yield group
    yield from ([child] for child in children.values())


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
    """Give a layer's outputs and gradients both ways."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        one, other = _compute([layer, layer], adapter, x)
        return (one + other) / 2

    plain, fused = (_probe(layer, adapter, way) for way in (partial(type(layer).forward, layer), twice))
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


def _computes(layer: Any, adapter: str) -> bool:
    """Tell a layer of which nothing drops out, is switched off or merged."""
    drops = layer.training and getattr(layer.lora_dropout[adapter], "p", 0.0) > 0
    return not (drops or layer.disable_adapters or layer.merged)


def _compute(layers: Sequence[Any], adapter: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Let layers read x, (..., in), in one piece: (..., out) of each, in their order."""
    weights: list[Any] = []
    for layer in layers:
        own = layer.base_layer
        weights += [own.weight, own.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    every = _Adapted.apply(x, tuple(layer.scaling[adapter] for layer in layers), *weights)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], -1) for out in every)  # here, so that it may be written to
