"""Prompts whose answers are generated: as ``model.generate`` of transformers wants them, their beginning read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Ids
from llmfit.forward.checking import rescales, same_words, some_ids
from llmfit.forward.reading import begin_from, keeps_all
from llmfit.kinds import find_own
from llmfit.memory import is_out_of_memory
from llmfit.packing import common_prefix

__all__ = ["Begun", "begin", "generation_inputs"]


@dataclass(frozen=True)
class Begun:
    """What all prompts begin with, read.

    Attributes
    ----------
    ids : tuple of int
    cache : transformers.Cache
        Its keys and values, of one row.
    """

    ids: Ids
    cache: Any


@torch.inference_mode()
def begin(model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int) -> Begun | None:
    """Read what the prompts of a decoder begin with; None where it is not worth a pass, or the model keeps no cache.

    A model that is met for the first time reads two prompts both ways, always the same ones: where the two disagree, it
    reads whole prompts.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int
    room : int
        Tokens of the longest answer to come.
    """
    shared = common_prefix(prompts)
    if len(prompts) < 2 or shared < PAD_STEP or not all(getattr(m, "packable", True) for m in model.modules()):
        return None
    own, tokens = find_own(model), max(map(len, prompts)) + PAD_STEP + room
    if own is None or rescales(own, tokens):
        return None
    try:
        begun = _begun(model, prompts[0][:shared], device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None  # whole prompts, few at a time, may fit
    if not keeps_all(begun.cache, tokens):
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
    given, width = generation_inputs(prompts, pad_id=pad_id, device=device, begun=begun)
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    read = 0 if begun is None else len(begun.ids)
    given |= {"input_ids": given["input_ids"][:, read:width], "position_ids": positions[:, read:width]}
    logits: torch.Tensor = model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


def generation_inputs(
    prompts: Sequence[Ids],
    *,
    pad_id: int,
    device: torch.device,
    start_ids: Ids = (),
    said: Sequence[Ids] = (),
    step: int = PAD_STEP,
    begun: Begun | None = None,
) -> tuple[dict[str, Any], int]:
    """Pad prompts as ``model.generate`` wants them.

    Parameters
    ----------
    prompts : sequence of tuple of int, length B
    said : sequence of tuple of int, length B or 0
        What the decoder of an encoder-decoder has said before each answer, of one length.
    step : int
        Widths are multiples of it.
    begun : Begun or None
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
        ids = torch.cat([torch.tensor(begun.ids, device=device).expand(len(ids), -1), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), read), mask], dim=1)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if begun is not None:
        given["past_key_values"] = _go_on(begun.cache)
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


def _go_on(cache: Any) -> Any:
    """Make a cache for rows, however many, behind what was read."""
    behind = copy.copy(cache)
    behind.layers = [Continued(layer) for layer in cache.layers]
    return behind
