"""Plain LoRA adapters of several fits in one base model, through whose layers the rows of all of them go in one pass.

Takes what each fit alone would begin with, and of every pass how many tokens belong to whom; gives the weights to
train, by peft's names. A pass goes once through the layers, in which each adapter's tokens meet the weights in a
product of their own, have its update added and drop out what would drop out in a fit alone. Knows no loss and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from llmfit.adapters.fused import is_plain
from llmfit.adapters.methods.lora import LoRA
from llmfit.adapters.peft_spec import WRAPPED
from llmfit.adapters.products import Adapted, Change, Turn, adapted, draw_kept, read_together, reads_together, turns_of
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
        None where anything but the A and B of plain layers is trained, or a fit alone would not compute as one in a
        bank does.
    """
    from peft.tuners.lora.layer import Linear

    named = model.named_parameters()
    parameters = {name: nn.Parameter(p.detach().clone()) for name, p in named if p.requires_grad}  # its own from now on
    layers: dict[str, Update] = {}
    for name, layer in model.named_modules():
        if type(layer) is Linear and is_plain(layer, "default") and reads_together(layer):
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
        All of which change the same layers.
    """

    def __init__(self, starts: Sequence[Start]) -> None:
        if any(start.layers.keys() != starts[0].layers.keys() for start in starts):
            raise BankError("adapters change different layers")
        self.starts = starts
        self._draws: dict[int, Any] = {}
        self._reading: list[tuple[int, slice]] = []
        self._together: list[list[Any]] = []
        self._names: dict[Any, str] = {}  # of the layers that compute here

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Let the linear layers compute, those that are changed with all of the adapters; give the module to call."""
        self.device = base.device
        if is_low(base.dtype):
            compute_low(base, base.model)
        words = base.model.get_output_embeddings()
        self._names = {
            layer: name
            for name, layer in base.model.named_modules()
            if name in self._changed
            or (type(layer) is nn.Linear and layer is not words and layer.weight.dtype == base.dtype)
        }

        def kind(layer: Any) -> Any:
            alone = None if self._names[layer] in self._changed else layer
            return layer.weight.dtype, layer.weight.device, alone

        groups = read_together(base.model, self._names, self._compute, kind=kind)
        self._together = [group for group in groups if self._names[group[0]] in self._changed]
        return base.model

    @property
    def _changed(self) -> Collection[str]:
        """Names of the layers that the adapters change."""
        return self.starts[0].layers.keys()

    @property
    def together(self) -> frozenset[tuple[str, ...]]:
        """Names of the layers that are changed, those in one that are computed together."""
        return frozenset(tuple(self._names[layer] for layer in group) for group in self._together)

    def draw_from(self, place: int, seed: int) -> None:
        """Let the dropout of one of the adapters draw from a seed on."""
        torch.manual_seed(seed)
        self._draws[place] = _generator(self.device)[0]()

    @contextmanager
    def reading(self, tokens: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, the tokens of a pass belong to the adapters of these places, so many to each, in this order."""
        self._reading, end = [], 0
        for place, number in tokens:
            self._reading.append((place, slice(end, end + number)))
            end += number
        try:
            yield
        finally:
            self._reading = []

    def both_ways(self) -> list[torch.Tensor]:
        """Compute as autograd records it, and as it is written, a layer or the most that are computed together.

        Returns
        -------
        list of two Tensors
            Each in one row what comes out and the gradients, each as a share of the recorded one's norm.
        """
        layers, count = max(self._together, key=len), len(self.starts)
        source, own = torch.Generator().manual_seed(0), layers[0].weight
        x = torch.randn(LOOKED_AT * count, own.shape[1], generator=source).to(own)
        grads = [torch.randn(len(x), len(layer.weight), generator=source).to(own) for layer in layers]
        pieces = [slice(place * LOOKED_AT, (place + 1) * LOOKED_AT) for place in range(count)]
        turns, weights = [], []
        for place, here in enumerate(pieces):
            kept = (x[here] > 0).to(x) if place % 2 else None
            found, low = self._turns(place, here, layers, lambda _, kept=kept: kept)  # type: ignore[misc]
            turns += found
            weights += low
        frozen = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
        ways = []
        with torch.enable_grad():
            for way in (_recorded, Adapted.apply):
                leaf = x.clone().requires_grad_()
                out = way(leaf, len(layers), pieces, turns, *frozen, *weights)
                ways.append([*(one.detach() for one in out), *torch.autograd.grad(out, [leaf, *weights], grads)])
        sizes = [float(y.float().norm()) or 1.0 for y in ways[0]]  # an A beside a B of zeros has no gradient
        return [torch.cat([y.flatten().float() / n for y, n in zip(found, sizes, strict=True)]) for found in ways]

    def _compute(self, layers: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Let layers read what belongs to all adapters, (..., in): (..., out) of each."""
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        if not self._reading or len(flat) != self._reading[-1][1].stop:
            if self._names[layers[0]] in self._changed:
                raise BankError("not every layer sees all tokens")
            return tuple(type(layer).forward(layer, x) for layer in layers)
        turns, weights = [], []
        for place, here in self._reading:

            def draw(update: Update, place: int = place, here: slice = here) -> torch.Tensor | None:
                return self._kept(place, flat[here], update.dropout) if update.dropout and layers[0].training else None

            found, low = self._turns(place, here, layers, draw)
            turns += found
            weights += low
        return adapted(x, layers, turns, weights, [here for _, here in self._reading])

    def _turns(
        self, place: int, here: slice, layers: Sequence[Any], draw: Callable[[Update], torch.Tensor | None]
    ) -> tuple[list[Turn], list[torch.Tensor]]:
        """Say what an adapter adds to its tokens, with A and B of each layer, some of whose inputs may drop out."""
        start, changes = self.starts[place], []
        for i, layer in enumerate(layers):
            if (update := start.layers.get(self._names[layer])) is not None:
                a, b, kept = start.parameters[update.a], start.parameters[update.b], draw(update)
                factor = update.scaling if kept is None else update.scaling / (1 - update.dropout)
                changes.append(Change(i, a, b, factor, kept))
        return turns_of(here, changes)

    def _kept(self, place: int, x: torch.Tensor, dropout: float) -> torch.Tensor:
        """Draw which numbers are kept, from this adapter's draws."""
        get, put = _generator(self.device)
        put(self._draws[place])
        kept = draw_kept(x, dropout)
        self._draws[place] = get()
        return kept


def _generator(device: torch.device) -> tuple[Any, Any]:
    """Find what gets and puts the state of the numbers that a device draws."""
    if device.type == "cuda":
        return partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)
    of: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    return of.get_rng_state, of.set_rng_state


def _recorded(
    x: torch.Tensor, count: int, _: Sequence[slice], turns: Sequence[Turn], *weights: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Compute what :class:`~llmfit.adapters.products.Adapted` does, and leave the way back to autograd."""
    out = [functional.linear(x, w, bias) for w, bias in zip(weights[:count], weights[count : 2 * count], strict=True)]
    low = iter(weights[2 * count :])
    for turn in turns:
        read = x[turn.here] if turn.kept is None else x[turn.here] * turn.kept
        for i, factor in zip(turn.layers, turn.factors, strict=True):
            a, b = (w.to(x.dtype) for w in (next(low), next(low)))
            changed = out[i][turn.here] + factor * (read @ a.t() @ b.t())
            out[i] = torch.cat([out[i][: turn.here.start], changed, out[i][turn.here.stop :]])
    return tuple(out)
