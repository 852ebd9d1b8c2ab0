"""Packed prompts that answers go on from: each read once, without padding, then one more token of all at a time.

Takes a lent module and prompts; gives a cache for ``model.generate`` of transformers, and lets the model attend over
it: each row's keys and values stand beside those of the others, behind them, once, those of what all begin with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmfit.batching import PAD_STEP
from llmfit.encoding import Ids
from llmfit.forward.behind import read_rows
from llmfit.kinds import find_own
from llmfit.packing import DecodeStep, KeptBeginning, Layout, PackingError, packed

__all__ = ["PackedPrompts"]


@dataclass(frozen=True)
class PackedPrompts:
    """What all prompts begin with, read once; what is a row's own is packed.

    Attributes
    ----------
    ids : tuple of int
        Tokens that all of them begin with; each has two more at least.
    longest : int
        Tokens that a row may come to.
    kept : KeptBeginning
        Keys and values of these, empty until they are read.
    """

    ids: Ids
    longest: int
    kept: KeptBeginning = field(default_factory=KeptBeginning)

    pads = False  # whether a row's own tokens are padded when they are read
    copied = 0  # tokens of the beginning, for each row

    def read(self, model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device) -> Layout:
        """Read prompts, and what they begin with if it is not read yet."""
        with packed(model), self.kept.whole():
            return read_rows(model, prompts, pad_id=pad_id, device=device, shared=len(self.ids), kept=self.kept)[2]

    def make_cache(self, model: Any, prompts: Sequence[Ids], width: int, *, pad_id: int, device: torch.device) -> Any:
        """Read prompts but for their last tokens, and put what is kept of each side by side.

        Parameters
        ----------
        width : int
            Tokens of a row behind the beginning, its last one and padding before its first one included.
        """
        layout = self.read(model, [prompt[:-1] for prompt in prompts], pad_id=pad_id, device=device)
        cache = DynamicCache(config=find_own(model).config)
        cache.layers = [*_side_by_side(layout, cache.layers, width - 1)]
        return cache

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """Let the model attend over such a cache, one token of each row at a time, inside."""

        def tell(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask, filled = given.get("attention_mask"), given["past_key_values"].get_seq_length() + 1
            if mask is None:  # as `generate` drops one that hides nothing
                mask = torch.ones(given["input_ids"].shape[0], filled, device=given["input_ids"].device)
            known = functional.pad(mask[:, len(self.ids) :].bool(), (0, (len(self.ids) - filled) % PAD_STEP))
            return args, {**given, "layout": DecodeStep(self.kept, known, self.longest)}

        telling = find_own(model).register_forward_pre_hook(tell, with_kwargs=True)
        try:
            with packed(model):
                yield
        finally:
            telling.remove()


class SideBySide(DynamicLayer):
    """Keys and values of rows behind what all begin with, in memory that grows a step of tokens at a time.

    Parameters
    ----------
    keys, values : Tensor of shape (heads, B, W, D)
    shared : int
        Tokens before all of them.
    filled : int
        Places that are taken; those behind them are free.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, shared: int, filled: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.shared, self.filled, self.own = shared, filled, [keys, values]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of a token of each row, and give all places, (B, heads, W, D)."""
        if self.filled == self.own[0].shape[2]:
            self.own = [functional.pad(x, (0, 0, 0, PAD_STEP)) for x in self.own]
        for x, new in zip(self.own, (key_states, value_states), strict=True):
            if new.shape != (x.shape[1], x.shape[0], 1, x.shape[3]):
                raise PackingError("it keeps other keys and values than it attends to")
            x[:, :, self.filled : self.filled + 1] = new.transpose(0, 1)
        self.filled += 1
        return tuple(x.transpose(0, 1) for x in self.own)

    def get_seq_length(self) -> int:
        """Count the tokens of a row, padding and those of the beginning too."""
        return self.shared + self.filled


def _side_by_side(layout: Layout, layers: Sequence[Any], width: int) -> Iterator[Any]:
    """Put the keys and values of packed rows side by side, and give up the packed ones.

    Parameters
    ----------
    layers : sequence of CacheLayerMixin
        Those that a model keeps for itself; of some, which attend to what others keep, it keeps nothing.
    width : int
        Places that are taken: a row's tokens are the last of them. There is room for one more at least.
    """
    read: Any = layout.read
    places = torch.full((len(layout.own), -(-(width + 1) // PAD_STEP) * PAD_STEP), layout.length - 1)
    for row, (start, own) in enumerate(zip(layout.starts, layout.own, strict=True)):
        places[row, width - own : width] = torch.arange(start, start + own)
    places = places.to(layout.positions.device)
    for i, layer in enumerate(layers):
        if i not in read:
            raise PackingError("some of its layers keep no keys and values")
        whole = read.pop(i)
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):  # of windows that are longer than any row
            keys, values = (x.transpose(0, 1)[:, places] for x in whole)  # (heads, B, W, D)
            yield SideBySide(keys, values, layout.shared, width)
        elif layer.keys is None and not isinstance(layer, CacheLayerMixin):
            yield layer
        else:
            raise PackingError("some of its layers keep more than keys and values")
