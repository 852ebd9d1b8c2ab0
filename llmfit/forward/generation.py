"""Prompts whose answers are generated: as ``model.generate`` of transformers wants them, their beginning read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Ids
from llmfit.forward.checking import rescales, same_words, some_ids
from llmfit.forward.onward import Onward, go_onward
from llmfit.forward.reading import begin_from, keeps_all
from llmfit.kinds import find_own
from llmfit.memory import is_out_of_memory
from llmfit.packing import common_prefix

__all__ = ["Begun", "begin", "generation_inputs"]


@dataclass(frozen=True)
class Begun:
    """What all prompts begin with, read once; what is a row's own is padded.

    Attributes
    ----------
    ids : tuple of int
    read : transformers.Cache
        Its keys and values, of one row.
    """

    ids: Ids
    read: Any

    pads = True  # prompts that are read

    @property
    def copied(self) -> int:
        """Tokens of the beginning that are copied for each row, one layer at a time, by what all layers keep."""
        return -(-len(self.ids) // len(self.read.layers))

    def cache(self, *_: Any, **__: Any) -> Any:
        """Make a cache for rows, however many, behind what was read."""
        behind = copy.copy(self.read)
        behind.layers = [Continued(layer) for layer in self.read.layers]
        return behind

    def attending(self, model: Any) -> AbstractContextManager[None]:
        """Let the model attend as it does."""
        return nullcontext()


@torch.inference_mode()
def begin(model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int) -> Begun | Onward | None:
    """Let prompts of a decoder be read packed, or read what they begin with; None where they are read whole.

    They are whole where no pass is worth it, or the model keeps no cache. A model that is met for the first time reads
    some prompts both ways, always the same ones: where the two disagree, it takes the next of these ways.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int
    room : int
        Tokens of the longest answer to come.
    """
    if len(prompts) < 2:
        return None
    try:
        packed = go_onward(model, prompts, pad_id=pad_id, device=device, room=room)
        return packed or _read_begun(model, prompts, pad_id=pad_id, device=device, room=room)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None  # whole prompts, few at a time, may fit


def _read_begun(model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int) -> Begun | None:
    """Read what prompts begin with, for rows that are padded behind it."""
    shared = common_prefix(prompts)
    if shared < PAD_STEP or not all(getattr(module, "packable", True) for module in model.modules()):
        return None
    own, tokens = find_own(model), max(map(len, prompts)) + PAD_STEP + room
    if own is None or rescales(own, tokens):
        return None
    begun = _begun(model, prompts[0][:shared], device)
    if not keeps_all(begun.read, tokens):
        return None
    ids = some_ids(own, PAD_STEP + 5)
    looked_at = [ids[: PAD_STEP + 1], ids[:PAD_STEP] + ids[PAD_STEP + 1 :]]  # padding stands behind the beginning

    def read() -> list[torch.Tensor]:
        ways = (None, _begun(model, ids[:PAD_STEP], device))
        return [_next_words(model, looked_at, pad_id, device, way) for way in ways]

    return begun if same_words(model, "begun", read) else None


def _begun(model: Any, ids: Ids, device: torch.device) -> Begun:
    out = model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
    return Begun(ids, getattr(out, "past_key_values", None))


def _next_words(
    model: Any, prompts: Sequence[Ids], pad_id: int, device: torch.device, begun: Begun | None
) -> torch.Tensor:
    given, width = generation_inputs(model, prompts, pad_id=pad_id, device=device, begun=begun)
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    read = 0 if begun is None else len(begun.ids)
    given |= {"input_ids": given["input_ids"][:, read:width], "position_ids": positions[:, read:width]}
    logits: torch.Tensor = model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


def generation_inputs(
    model: Any,
    prompts: Sequence[Ids],
    *,
    pad_id: int,
    device: torch.device,
    start_ids: Ids = (),
    said: Sequence[Ids] = (),
    step: int = PAD_STEP,
    begun: Begun | Onward | None = None,
) -> tuple[dict[str, Any], int]:
    """Pad prompts as ``model.generate`` wants them.

    Parameters
    ----------
    model : torch.nn.Module
        Reads what a cache has to hold.
    prompts : sequence of tuple of int, length B
    said : sequence of tuple of int, length B or 0
        What the decoder of an encoder-decoder has said before each answer, of one length.
    step : int
        Widths are multiples of it.
    begun : Begun, Onward or None
        What all of them begin with: padding stands behind it, before what is a row's own.

    Returns
    -------
    dict of str to Tensor, or Cache
    int
        Tokens that stand before each answer in what is generated.
    """
    read = 0 if begun is None else len(begun.ids)
    own, known = pad([prompt[read:] for prompt in prompts], pad_id, left=not start_ids, step=step)
    ids, mask = torch.from_numpy(own).to(device), torch.from_numpy(known).to(device)
    if begun is not None:
        ids = torch.cat([torch.tensor(begun.ids, dtype=ids.dtype, device=device).expand(len(ids), -1), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), read), mask], dim=1)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if begun is not None:
        given["past_key_values"] = begun.cache(model, prompts, own.shape[1], pad_id=pad_id, device=device)
    if not start_ids:
        return given, ids.shape[1]
    starts = begin_from(start_ids, said, len(ids), device)
    return {**given, "decoder_input_ids": starts}, starts.shape[1]


class Continued(DynamicLayer):
    """Keys and values of rows behind those of their common beginning, which are held once for all rows.

    Parameters
    ----------
    begun : transformers.cache_utils.DynamicLayer
        Keys and values of the beginning, of one row.
    """

    def __init__(self, begun: Any) -> None:
        super().__init__()
        self.before = begun.keys, begun.values  # (1, heads, shared, D)
        self.is_sliding = begun.is_sliding
        self.lazy_initialization(*self.before)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of new tokens, and give those of all: copies that live as long as the layer attends."""
        own = super().update(key_states, value_states, *args, **kwargs)
        both = zip(self.before, own, strict=True)
        return tuple(torch.cat([before.expand(len(y), -1, -1, -1), y], dim=-2) for before, y in both)

    def get_seq_length(self) -> int:
        """Count the tokens of a row, those of the beginning too."""
        return int(super().get_seq_length() + self.before[0].shape[-2])
