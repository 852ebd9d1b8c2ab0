"""Prompts that many answers go on from: read once, their keys and values copied for each answer.

Takes prompts as ids; gives a :class:`Reading`, and the logits of what follows one. The plain way, for every kind of
model that keeps keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmfit.batching import pad
from llmfit.encoding import Ids

__all__ = ["Reading", "begin_from", "fork", "go_on", "keeps_all", "read"]


@dataclass(frozen=True)
class Reading:
    """Prompts that a model has read.

    Attributes
    ----------
    first : Tensor of shape (B, V)
        Logits of an answer's first token.
    known : bool Tensor of shape (B, W)
        True where a prompt has a token; the others are padding at the right.
    cache : transformers.Cache or None
        Keys and values of all that was read.
    states : Tensor of shape (B, W, D) or None
        What an encoder made of the prompts.
    """

    first: torch.Tensor
    known: torch.Tensor
    cache: Any = None
    states: torch.Tensor | None = None


def read(
    model: Any,
    prompts: Sequence[Ids],
    *,
    pad_id: int,
    device: torch.device,
    start_ids: Ids = (),
    said: Sequence[Ids] = (),
    keep: bool = True,
) -> Reading:
    """Read prompts once.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int, length B
    pad_id : int
    device : torch.device
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    said : sequence of tuple of int, length B or 0
        What it has said behind that, of one length.
    keep : bool
        Keep what :func:`go_on` needs.
    """
    ids, mask = (torch.from_numpy(array).to(device) for array in pad(prompts, pad_id))
    if start_ids:
        starts = begin_from(start_ids, said, len(prompts), device)
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=starts, use_cache=keep)
        first, states = out.logits[:, -1], out.encoder_last_hidden_state
    else:
        last = mask.sum(1) - 1
        out = model(input_ids=ids, logits_to_keep=last[:, None], use_cache=keep)
        first, states = _at(out.logits, last), None
    return Reading(first, mask.bool(), getattr(out, "past_key_values", None) if keep else None, states)


def begin_from(start_ids: Ids, said: Sequence[Ids], count: int, device: torch.device) -> torch.Tensor:
    """Put together what a decoder reads before the first token of each of `count` answers: (count, S)."""
    return torch.tensor([(*start_ids, *own) for own in said or [()] * count], device=device)


def _at(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick one position a row: the only one kept, or out of all where the model gave all."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), positions]


def keeps_all(cache: Any, tokens: int) -> bool:
    """Tell whether a cache holds so many tokens each at its place: not where attention slides or a state is carried."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return all(keeps_all(half, tokens) for half in (cache.self_attention_cache, cache.cross_attention_cache))
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= tokens)
        for layer in getattr(cache, "layers", [None])
    )


def go_on(model: Any, reading: Reading, rows: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
    """Run every tail behind every chosen prompt, over copies of what was read.

    Parameters
    ----------
    model : torch.nn.Module
    reading : Reading
        Whose cache keeps all.
    rows : Tensor of shape (R,)
        Positions of the prompts.
    tails : Tensor of shape (H, T)
        Tokens of answers; padding stands at the right.

    Returns
    -------
    Tensor of shape (R, H, T, V)
        Logits behind each token of each tail.
    """
    count, (n_tails, depth) = len(rows), tails.shape
    copies = rows.repeat_interleave(n_tails)
    known, ids = reading.known[copies], tails.repeat(count, 1)
    if reading.states is not None:
        given = {
            "encoder_outputs": (reading.states[copies],),
            "attention_mask": known.long(),
            "decoder_input_ids": ids,
        }
    else:
        given = {
            "input_ids": ids,
            "attention_mask": torch.cat([known, known.new_ones(len(ids), depth)], dim=1).long(),
            "position_ids": known.sum(1)[:, None] + torch.arange(depth, device=rows.device),
        }
    out = model(**given, past_key_values=fork(reading.cache, copies), use_cache=True)
    logits: torch.Tensor = out.logits
    return logits.reshape(count, n_tails, depth, -1)


def fork(cache: Any, rows: torch.Tensor) -> Any:
    """Copy a key-value cache, with some rows repeated."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(fork(cache.self_attention_cache, rows), fork(cache.cross_attention_cache, rows))
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.batch_select_indices(rows)
    return forked
