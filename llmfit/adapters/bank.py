"""Plain LoRA adapters of several fits beside one base model, which multiplies the rows of all of them at once.

Takes what each fit alone would begin with, and of every pass how many tokens belong to whom; gives the weights to
train, by peft's names. A frozen layer computes its product once, each adapter adds its update to its own tokens, and
dropout draws what it would draw in a fit alone. Knows no loss and no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llmfit.adapters.fused import is_plain
from llmfit.adapters.methods.lora import LoRA
from llmfit.adapters.peft_spec import WRAPPED
from llmfit.adapters.spec import AdapterSpec, Tensors, compute_low, count_parameters, is_low

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["Bank", "BankError", "Start", "can_start", "start_of"]

STARTS = (True, "gaussian", "orthogonal")  # that look at nothing and leave the base as it is
NAME = ".default."  # of the adapter, which peft leaves out in files
LOOKED_AT = 16  # rows of each adapter with which a layer is seen to give the same forth and back


class BankError(RuntimeError):
    """A model in which adapters cannot stand side by side; they are trained one at a time."""


class Update(NamedTuple):
    """Of one layer: names of A and B, what their product is scaled by, the share of inputs set to zero."""

    a: str
    b: str
    scaling: float
    dropout: float


@dataclass
class Start:
    """Where a fit of plain LoRA begins.

    Attributes
    ----------
    parameters : dict of str to Parameter
        By their names in peft's module, in its order.
    layers : dict of str to Update
        By the layer's name in the base model.
    trainable, every : int
        Number of weights that are trained, and of all.
    """

    parameters: dict[str, nn.Parameter]
    layers: dict[str, Update]
    trainable: int
    every: int

    def tensors(self) -> Tensors:
        """Copy the weights to the CPU, under the names that they have in files."""
        named = self.parameters.items()
        return {name.replace(NAME, "."): p.detach().cpu().clone().contiguous() for name, p in named}


def can_start(spec: AdapterSpec | None) -> bool:
    """Tell settings of an adapter that may stand in a bank, as far as they say."""
    return isinstance(spec, LoRA) and spec.init_lora_weights in STARTS


def start_of(spec: AdapterSpec, model: Any) -> Start | None:
    """Take what a fit begins with from a model that its adapter has been put into.

    Returns
    -------
    Start or None
        None where anything but the A and B of plain layers is trained.
    """
    from peft.tuners.lora.layer import Linear

    named = model.named_parameters()
    parameters = {name: nn.Parameter(p.detach().clone()) for name, p in named if p.requires_grad}  # its own from now on
    layers: dict[str, Update] = {}
    for name, layer in model.named_modules():
        if type(layer) is Linear and is_plain(layer, "default"):
            a, b = (f"{name}.lora_{part}{NAME}weight" for part in "AB")
            dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
            layers[name.removeprefix(WRAPPED)] = Update(a, b, layer.scaling["default"], dropout)
    names = {name for update in layers.values() for name in (update.a, update.b)}
    words = model.get_output_embeddings()  # which meet some of the tokens only
    if names != parameters.keys() or words is not getattr(words, "base_layer", words):
        return None
    if {name.replace(NAME, ".") for name in names} != spec.tensors(model).keys():
        return None
    return Start(parameters, layers, *count_parameters(model))


class Bank:
    """An adapter, as :meth:`llmfit.base_model.BaseModel.attach` takes it, that is those of several fits.

    Parameters
    ----------
    starts : sequence of Start, length K
    """

    def __init__(self, starts: Sequence[Start]) -> None:
        self.starts = starts
        self._draws: dict[int, Any] = {}
        self._turns: list[tuple[int, slice]] = []
        self._layers: dict[str, Any] = {}

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Let the layers that any of the adapters changes compute with all of them; give the module to call."""
        self.device = base.device
        if is_low(base.dtype):
            compute_low(base, base.model)
        adapted = {name for start in self.starts for name in start.layers}
        for name, layer in base.model.named_modules():
            if name in adapted:
                layer.forward = partial(self._forward, layer, name)
                self._layers[name] = layer
        return base.model

    def draw_from(self, place: int, seed: int) -> None:
        """Let the dropout of one of the adapters draw from a seed on."""
        torch.manual_seed(seed)
        self._draws[place] = _generator(self.device)[0]()

    @contextmanager
    def reading(self, tokens: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, the tokens of a pass belong to the adapters of these places, so many to each, in this order."""
        self._turns, end = [], 0
        for place, number in tokens:
            self._turns.append((place, slice(end, end + number)))
            end += number
        try:
            yield
        finally:
            self._turns = []

    def both_ways(self) -> list[torch.Tensor]:
        """Compute one layer as autograd records it, and as it is written here; with all adapters that change it.

        Returns
        -------
        list of two Tensors
            Each in one row what comes out and the gradients, each as a share of the recorded one's norm.
        """
        name, layer = next(iter(self._layers.items()))
        changing = [start for start in self.starts if name in start.layers]
        source, given = torch.Generator().manual_seed(0), layer.weight
        x, grad = (torch.randn(LOOKED_AT * len(changing), n, generator=source).to(given) for n in reversed(given.shape))
        turns, weights = [], []
        for i, start in enumerate(changing):
            here = slice(i * LOOKED_AT, (i + 1) * LOOKED_AT)
            noise = (x[here] > 0).to(x) * 2 if i % 2 else None
            turns.append(_Turn(here, start.layers[name].scaling, noise))
            weights += [start.parameters[start.layers[name].a], start.parameters[start.layers[name].b]]
        ways = []
        with torch.enable_grad():
            for way in (_recorded, _Beside.apply):
                leaf = x.clone().requires_grad_()
                out = way(leaf, layer.weight, layer.bias, turns, *weights)
                ways.append([out.detach(), *torch.autograd.grad(out, [leaf, *weights], grad)])
        sizes = [float(y.float().norm()) or 1.0 for y in ways[0]]  # an A beside a B of zeros has no gradient
        return [torch.cat([y.flatten().float() / n for y, n in zip(found, sizes, strict=True)]) for found in ways]

    def _forward(self, layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        if not self._turns or len(flat) != self._turns[-1][1].stop:
            raise BankError("not every layer sees all tokens")
        turns, weights = [], []
        for place, here in self._turns:
            start = self.starts[place]
            if name in start.layers:
                update = start.layers[name]
                noise = self._noise(place, flat[here], update.dropout) if layer.training and update.dropout else None
                turns.append(_Turn(here, update.scaling, noise))
                weights += [start.parameters[update.a], start.parameters[update.b]]
        out: torch.Tensor = _Beside.apply(flat, layer.weight, layer.bias, turns, *weights)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    def _noise(self, place: int, x: torch.Tensor, dropout: float) -> torch.Tensor:
        """Draw what dropout multiplies its input with, from this adapter's numbers."""
        get, put = _generator(self.device)
        put(self._draws[place])
        noise = functional.dropout(torch.ones_like(x), dropout)
        self._draws[place] = get()
        return noise


def _generator(device: torch.device) -> tuple[Any, Any]:
    """Find what gets and puts the state of the numbers that a device draws."""
    if device.type == "cuda":
        return partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)
    of: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    return of.get_rng_state, of.set_rng_state


class _Turn(NamedTuple):
    """Tokens of one adapter in a layer: where they stand, the scale of B A, and what dropout multiplies them with."""

    here: slice
    scaling: float
    noise: torch.Tensor | None


def _recorded(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, turns: list[_Turn], *weights: torch.Tensor
) -> torch.Tensor:
    """Compute what :class:`_Beside` does, turns side by side, and leave the way back to autograd."""
    base, parts = functional.linear(x, weight, bias), []
    for turn, a, b in zip(turns, weights[::2], weights[1::2], strict=True):
        read = x[turn.here] if turn.noise is None else x[turn.here] * turn.noise
        update = functional.linear(functional.linear(read, a.to(weight.dtype)), b.to(weight.dtype))
        parts.append(base[turn.here] + turn.scaling * update)
    return torch.cat(parts)


class _Beside(torch.autograd.Function):
    """x W' + s (x A') B', each of some rows with an A, B and s of its own, all in the dtype of W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, turns: list[_Turn], *weights: torch.Tensor
    ) -> torch.Tensor:
        flat = x.to(weight.dtype)  # (N, in)
        out = functional.linear(flat, weight, bias)
        low = [w.to(weight.dtype) for w in weights]  # A (r, in) and B (out, r) of each turn
        read, inner = [], []
        for turn, a, b in zip(turns, low[::2], low[1::2], strict=True):
            read.append(flat[turn.here] if turn.noise is None else (x[turn.here] * turn.noise).to(weight.dtype))
            inner.append((read[-1] @ a.t()).mul_(turn.scaling))  # (n, r)
            out[turn.here].addmm_(inner[-1], b.t())
        ctx.save_for_backward(weight, *low, *read, *inner)
        ctx.turns, ctx.given, ctx.dtypes = turns, x.dtype, [w.dtype for w in weights]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        n = len(ctx.turns)
        low, read, inner = saved[: 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
        grad = grad.to(weight.dtype)  # (N, out)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor] = []
        for i, turn in enumerate(ctx.turns):
            a, b, own = low[2 * i], low[2 * i + 1], grad[turn.here]
            grad_inner = (own @ b).mul_(turn.scaling)
            if grad_x is not None and turn.noise is None:
                grad_x[turn.here].addmm_(grad_inner, a)
            elif grad_x is not None:
                grad_x[turn.here] += (grad_inner @ a) * turn.noise
            found += [grad_inner.t() @ read[i], own.t() @ inner[i]]
        found = [own.to(kind) for own, kind in zip(found, ctx.dtypes, strict=True)]
        return None if grad_x is None else grad_x.to(ctx.given), None, None, None, *found
