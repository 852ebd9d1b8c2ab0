"""Packed prompts whose answers are generated: each read once, without padding, then one token more of all at a time.

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
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmfit.batching import PAD_STEP
from llmfit.encoding import Encoded, Ids
from llmfit.forward.batches import collate, completion_logits
from llmfit.forward.behind import read_rows
from llmfit.forward.checking import SHORT, packable, same_words, some_ids
from llmfit.kinds import find_own
from llmfit.packing import KeptBeginning, Layout, OneMore, PackingError, common_prefix, packed

__all__ = ["Onward", "go_onward"]

INLINE = 512  # tokens that all prompts begin with, up to which they are read with the first ones


@dataclass(frozen=True)
class Onward:
    """What all prompts begin with, read once; what is a row's own is packed.

    Attributes
    ----------
    ids : tuple of int
        Each prompt has two more at least.
    longest : int
        Tokens that a row may come to.
    kept : KeptBeginning
    """

    ids: Ids
    longest: int
    kept: KeptBeginning = field(default_factory=KeptBeginning)

    pads = False  # prompts that are read
    copied = 0  # tokens of the beginning, for each row

    def cache(self, model: Any, prompts: Sequence[Ids], width: int, *, pad_id: int, device: torch.device) -> Any:
        """Read prompts but for their last tokens, and put what is kept of each side by side.

        Parameters
        ----------
        width : int
            Places of a row behind the beginning: its own tokens stand last, padding before them.
        """
        layout = self.read(model, [prompt[:-1] for prompt in prompts], pad_id=pad_id, device=device)
        cache = DynamicCache()
        cache.layers = [*_side_by_side(layout, width - 1)]
        return cache

    def read(self, model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device) -> Layout:
        """Read prompts, and what they begin with if it is not read yet."""
        with packed(model), self.kept.whole():
            return read_rows(model, prompts, pad_id=pad_id, device=device, shared=len(self.ids), kept=self.kept)[2]

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """Let the model attend over such a cache, one token of each row at a time, inside."""

        def tell(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask, filled = given.get("attention_mask"), given["past_key_values"].get_seq_length() + 1
            if mask is None:  # of rows without padding
                mask = torch.ones(given["input_ids"].shape[0], filled, device=given["input_ids"].device)
            known = functional.pad(mask[:, len(self.ids) :].bool(), (0, (len(self.ids) - filled) % PAD_STEP))
            return args, {**given, "layout": OneMore(self.kept, known, self.longest)}

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
        self.shared, self.filled, self.kept = shared, filled, [keys, values]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of a token of each row, and give all places, (B, heads, W, D)."""
        if self.filled == self.kept[0].shape[2]:
            self.kept = [functional.pad(x, (0, 0, 0, PAD_STEP)) for x in self.kept]
        for x, new in zip(self.kept, (key_states, value_states), strict=True):
            x[:, :, self.filled : self.filled + 1] = new.transpose(0, 1)
        self.filled += 1
        return tuple(x.transpose(0, 1) for x in self.kept)

    def get_seq_length(self) -> int:
        """Count the tokens of a row, padding and those of the beginning too."""
        return self.shared + self.filled


def _side_by_side(layout: Layout, width: int) -> Iterator[SideBySide]:
    """Put the keys and values of packed rows side by side, so many places each; the packed ones are given up."""
    read: Any = layout.read
    if sorted(read) != [*range(len(read))]:
        raise PackingError("some of its layers keep no keys and values")
    places = torch.full((len(layout.own), -(-(width + 1) // PAD_STEP) * PAD_STEP), layout.length - 1)
    for row, (start, own) in enumerate(zip(layout.starts, layout.own, strict=True)):
        places[row, width - own : width] = torch.arange(start, start + own)
    places = places.to(layout.positions.device)
    for layer in range(len(read)):
        keys, values = (x.transpose(0, 1)[:, places] for x in read.pop(layer))  # (heads, B, W, D)
        yield SideBySide(keys, values, layout.shared, width)


def go_onward(model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int) -> Onward | None:
    """Let prompts be read packed, and answers go on from there; None for a model that cannot, or has to be padded.

    A model that is met for the first time reads rows that way and padded, always the same ones.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int
    room : int
        Tokens of the longest answer to come.

    Warns
    -----
    PackingWarning
        If the two ways disagree, and nothing in the model says why.
    """
    answer: Ids = (0,) * room
    where: dict[str, Any] = {"pad_id": pad_id, "device": device}
    shared = packable(model, [Encoded(prompt, answer) for prompt in prompts], **where)
    begun = max(0, common_prefix(prompts) - 1)
    if shared is None or min(map(len, prompts)) < begun + 2 or not _goes_onward(model, **where):
        return None
    onward = Onward(prompts[0][:begun], max(map(len, prompts)) + room)
    if begun > INLINE:
        onward.read(model, [prompts[0][: begun + 1]], **where)
    return onward


def _goes_onward(model: Any, *, pad_id: int, device: torch.device) -> bool:
    """Tell whether a model says behind packed rows, a token at a time, what it says of padded ones; seen once."""

    def read() -> list[torch.Tensor]:
        ids = some_ids(find_own(model), 9 + sum(SHORT))
        before, answer, rest = ids[:6], ids[6:9], ids[9:]
        ends = [sum(SHORT[: i + 1]) for i in range(len(SHORT))]
        prompts = [(*before, *rest[end - own : end]) for own, end in zip(SHORT, ends, strict=True)]
        rows = [Encoded(prompt, answer) for prompt in prompts]
        plain = completion_logits(model, collate(rows, pad_id, device))
        alone = torch.cat([completion_logits(model, collate([row], pad_id, device)) for row in rows])
        behind, width = Onward(before[:-1], max(map(len, prompts)) + len(answer)), max(SHORT) + 1
        cache = behind.cache(model, prompts, width, pad_id=pad_id, device=device)
        known = torch.tensor([[place >= width - own - 1 for place in range(-5, width)] for own in SHORT])
        known[:, :5] = True
        said, last = [], [prompt[-1] for prompt in prompts]
        with behind.attending(model):
            for tokens in (last, *([token] * len(rows) for token in answer[:-1])):
                given = {
                    "attention_mask": known.long().to(device),
                    "position_ids": known.sum(1).to(device)[:, None] - 1,
                }
                given["input_ids"] = torch.tensor(tokens, device=device)[:, None]
                said.append(model(**given, past_key_values=cache, use_cache=True).logits[:, -1])
                known = functional.pad(known, (0, 1), value=True)
        return [plain, torch.stack(said, dim=1).flatten(0, 1), alone]

    return same_words(model, "onward", read)
