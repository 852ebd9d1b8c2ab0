"""Prompts whose answers are generated: as ``model.generate`` of transformers wants them, their beginning read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Encoded, Ids
from llmfit.forward.batches import collate, completion_logits
from llmfit.forward.checking import SHORT, packable, rescales, same_words, some_ids, some_rows
from llmfit.forward.packed_prompts import PackedPrompts
from llmfit.forward.reading import begin_from, keeps_all
from llmfit.kinds import find_own
from llmfit.memory import is_out_of_memory
from llmfit.packing import common_prefix

__all__ = ["PaddedPrompts", "begin", "generation_inputs"]

LOOKED_AT = 3  # tokens of an answer
INLINE = 8  # a beginning of at most one in so many tokens of the budget is read with the first prompts


@dataclass(frozen=True)
class PaddedPrompts:
    """What all prompts begin with, read once; what is a row's own is padded.

    Attributes
    ----------
    ids : tuple of int
        Tokens that all of them begin with.
    cache : transformers.Cache
        Keys and values of these, of one row.
    """

    ids: Ids
    cache: Any

    pads = True  # whether a row's own tokens are padded when they are read

    @property
    def copied(self) -> int:
        """Tokens of the beginning that are copied for each row, one layer at a time: the mean over layers."""
        return -(-len(self.ids) // len(self.cache.layers))

    def make_cache(self, *_: Any, **__: Any) -> Any:
        """Make a cache for rows, however many, behind what was read."""
        behind = copy.copy(self.cache)
        behind.layers = [Continued(layer) for layer in self.cache.layers]
        return behind

    def attending(self, model: Any) -> AbstractContextManager[None]:
        """Let the model attend as it does."""
        return nullcontext()


@torch.inference_mode()
def begin(
    model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int, budget: int
) -> PaddedPrompts | PackedPrompts | None:
    """Say how prompts of a decoder are read: packed, or padded behind what they begin with, which is read here.

    None where they are read whole, padded: a single one, or where the model can do neither, or nothing they begin with
    is worth a pass. A model that is met for the first time reads some both ways, always the same ones: where the two
    disagree, it takes the next of these ways.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int
    room : int
        Tokens of the longest answer to come.
    budget : int
        Tokens of a pass.

    Warns
    -----
    PackingWarning
        If two ways disagree, and nothing in the model says why.
    """
    if len(prompts) < 2:
        return None
    try:
        packed = _begin_packed(model, prompts, pad_id=pad_id, device=device, room=room, budget=budget)
        return packed or _begin_padded(model, prompts, pad_id=pad_id, device=device, room=room)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None  # whole prompts, few at a time, may fit


def _begin_packed(
    model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int, budget: int
) -> PackedPrompts | None:
    """Let prompts be read packed, and a long beginning by itself; None for a model that cannot, or has to pad them."""
    answer, longest = (0,) * room, max(map(len, prompts)) + room
    shared = packable(model, [Encoded(prompt, answer) for prompt in prompts], pad_id=pad_id, device=device)
    if shared is None:
        return None
    begun = PackedPrompts(prompts[0][: max(0, shared - 1)], longest)  # each last token is read by itself
    look = partial(_look, model, pad_id, device)
    if min(map(len, prompts)) < len(begun.ids) + 2 or not same_words(model, "decoding", look):
        return None
    if len(begun.ids) > budget // INLINE:
        begun.read(model, [prompts[0][:shared]], pad_id=pad_id, device=device)
    return begun


def _look(model: Any, pad_id: int, device: torch.device) -> list[torch.Tensor]:
    """Let a model answer packed prompts, in memory that has to grow, and read what it says behind padded ones."""
    from transformers import GenerationConfig

    prompts = [row.prompt for row in some_rows(find_own(model), SHORT, 0)]
    begun = PackedPrompts(prompts[0][:5], max(map(len, prompts)) + LOOKED_AT)
    given, before = generation_inputs(model, prompts, pad_id=pad_id, device=device, begun=begun)
    settings: dict[str, Any] = {"max_new_tokens": LOOKED_AT, "min_new_tokens": LOOKED_AT, "pad_token_id": pad_id}
    config = GenerationConfig(**settings, output_logits=True, return_dict_in_generate=True)
    with begun.attending(model):
        out = model.generate(**given, generation_config=config)
    rows = [Encoded(p, tuple(said)) for p, said in zip(prompts, out.sequences[:, before:].tolist(), strict=True)]
    plain = completion_logits(model, collate(rows, pad_id, device))
    alone = torch.cat([completion_logits(model, collate([row], pad_id, device)) for row in rows])
    return [plain, torch.stack(out.logits, dim=1).flatten(0, 1), alone]


def _begin_padded(
    model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, room: int
) -> PaddedPrompts | None:
    """Read what prompts begin with, for rows that are padded behind it; None where they are read whole."""
    shared = common_prefix(prompts)
    if shared < PAD_STEP or not all(getattr(module, "packable", True) for module in model.modules()):
        return None
    own, tokens = find_own(model), max(map(len, prompts)) + PAD_STEP + room
    if own is None or rescales(own, tokens):
        return None
    begun = _begun(model, prompts[0][:shared], device)
    if not keeps_all(begun.cache, tokens):
        return None
    ids = some_ids(own, PAD_STEP + 5)
    looked_at = [ids[: PAD_STEP + 1], ids[:PAD_STEP] + ids[PAD_STEP + 1 :]]  # padding stands behind the beginning

    def read() -> list[torch.Tensor]:
        ways = (None, _begun(model, ids[:PAD_STEP], device))
        return [_next_words(model, looked_at, pad_id, device, way) for way in ways]

    return begun if same_words(model, "begun", read) else None


def _begun(model: Any, ids: Ids, device: torch.device) -> PaddedPrompts:
    out = model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
    return PaddedPrompts(ids, getattr(out, "past_key_values", None))


def _next_words(
    model: Any, prompts: Sequence[Ids], pad_id: int, device: torch.device, begun: PaddedPrompts | None
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
    begun: PaddedPrompts | PackedPrompts | None = None,
) -> tuple[dict[str, Any], int]:
    """Pad prompts as ``model.generate`` wants them, and read what stands before what it is to read.

    Parameters
    ----------
    model : torch.nn.Module
        Reads packed prompts here, but for their last tokens.
    prompts : sequence of tuple of int, length B
    said : sequence of tuple of int, length B or 0
        What the decoder of an encoder-decoder has said before each answer, of one length.
    step : int
        Widths are multiples of it.
    begun : PaddedPrompts, PackedPrompts or None
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
        given["past_key_values"] = begun.make_cache(model, prompts, own.shape[1], pad_id=pad_id, device=device)
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
