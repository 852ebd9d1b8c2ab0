"""How each kind of model reads prompts and says what follows: the one file that tells the kinds apart.

Takes a lent module and token ids; gives logits. A decoder goes on behind its prompt, in one sequence. An
encoder-decoder reads the prompt with its encoder, and its decoder answers beside it, from `start_ids`; no `start_ids`
mean a decoder. Knows no loss, no label and no estimator.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Encoded, Ids

__all__ = [
    "Batch",
    "Reading",
    "collate",
    "completion_logits",
    "generation_inputs",
    "go_on",
    "keeps_all",
    "look",
    "read",
]


# Rows whose answers are known -----------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Padded rows on a device.

    Attributes
    ----------
    input_ids : Tensor of shape (B, T)
        Prompt and completion; of an encoder-decoder the prompt alone. Padding stands at the right, where no real
        token of a causal model can see it.
    predicts : bool Tensor of shape (B, T), of an encoder-decoder (B, A)
        True at the positions whose next token carries loss.
    targets : Tensor of shape (N,)
        Those next tokens, row by row.
    weights : Tensor of shape (N,)
    attention_mask : Tensor of shape (B, T) or None
        For an encoder-decoder: 1 where the prompt has a token, as its encoder sees all of them.
    decoder_input_ids : Tensor of shape (B, A) or None
        For an encoder-decoder: what the decoder begins from, and the completion but for its last token.
    """

    input_ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    attention_mask: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None


def collate(
    rows: Sequence[Encoded], pad_id: int, device: torch.device, start_ids: Ids = (), *, step: int = PAD_STEP
) -> Batch:
    """Pad rows of prompt and completion into a batch.

    Parameters
    ----------
    rows : sequence of Encoded, length B
    pad_id : int
    device : torch.device
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    step : int
        Widths are multiples of it.
    """
    if start_ids:
        sequences, firsts = [(*start_ids, *row.completion) for row in rows], [len(start_ids)] * len(rows)
        ids, _ = pad([sequence[:-1] for sequence in sequences], pad_id, step=step)
        prompts, mask = map(torch.from_numpy, pad([row.prompt for row in rows], pad_id, step=step))
    else:
        sequences, firsts = [(*row.prompt, *row.completion) for row in rows], [row.first for row in rows]
        ids, _ = pad(sequences, pad_id, step=step)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    known: list[tuple[int, float]] = []
    for i, (row, sequence, first) in enumerate(zip(rows, sequences, firsts, strict=True)):
        tokens = sequence[first:]
        shares = row.shares[len(row.shares) - len(tokens) :] if row.shares is not None else (1.0,) * len(tokens)
        predicts[i, first - 1 : len(sequence) - 1] = torch.tensor(shares) != 0
        known += [(token, row.weight * share) for token, share in zip(tokens, shares, strict=True) if share]
    targets = torch.tensor([token for token, _ in known])
    weights = torch.tensor([weight for _, weight in known])
    read = torch.from_numpy(ids)
    tensors = [prompts, predicts, targets, weights, mask, read] if start_ids else [read, predicts, targets, weights]
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def completion_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of every loss token.

    Only the positions that predict one meet the vocabulary, where the model allows it.

    Returns
    -------
    Tensor of shape (N, V)
    """
    if batch.decoder_input_ids is not None:
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        )
    else:
        out = model(input_ids=batch.input_ids, logits_to_keep=batch.predicts, use_cache=False)
    logits: torch.Tensor = out.logits.reshape(-1, out.logits.shape[-1])
    if len(logits) != len(batch.targets):  # a model that does not know logits_to_keep gives all of them
        logits = logits[batch.predicts.reshape(-1)]
    return logits


def look(model: Any, batch: Batch) -> torch.Tensor:
    """Run a batch through a model for what its layers see, whatever comes out."""
    given: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.decoder_input_ids is not None:
        given |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.decoder_input_ids}
    model(**given)
    return torch.zeros((), device=batch.input_ids.device)


# Prompts that many answers go on from ---------------------------------------------------------------


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
    model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, start_ids: Ids = (), keep: bool = True
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
    keep : bool
        Keep what :func:`go_on` needs.
    """
    ids, mask = (torch.from_numpy(array).to(device) for array in pad(prompts, pad_id))
    if start_ids:
        starts = torch.tensor(start_ids, device=device).repeat(len(prompts), 1)
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=starts, use_cache=keep)
        first, states = out.logits[:, -1], out.encoder_last_hidden_state
    else:
        last = mask.sum(1) - 1
        out = model(input_ids=ids, logits_to_keep=last[:, None], use_cache=keep)
        first, states = _at(out.logits, last), None
    return Reading(first, mask.bool(), getattr(out, "past_key_values", None) if keep else None, states)


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
    out = model(**given, past_key_values=_fork(reading.cache, copies), use_cache=True)
    logits: torch.Tensor = out.logits
    return logits.reshape(count, n_tails, depth, -1)


def _fork(cache: Any, rows: torch.Tensor) -> Any:
    """Copy a key-value cache, with some rows repeated."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(_fork(cache.self_attention_cache, rows), _fork(cache.cross_attention_cache, rows))
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.batch_select_indices(rows)
    return forked


# Prompts whose answers are generated ----------------------------------------------------------------


def generation_inputs(
    prompts: Sequence[Ids], *, pad_id: int, device: torch.device, start_ids: Ids = (), step: int = PAD_STEP
) -> tuple[dict[str, torch.Tensor], int]:
    """Pad prompts as ``model.generate`` wants them.

    Returns
    -------
    dict of str to Tensor
    int
        Tokens that stand before each answer in what is generated.
    """
    ids, mask = (torch.from_numpy(array).to(device) for array in pad(prompts, pad_id, left=not start_ids, step=step))
    given = {"input_ids": ids, "attention_mask": mask}
    if not start_ids:
        return given, ids.shape[1]
    return {**given, "decoder_input_ids": torch.tensor(start_ids, device=device).repeat(len(ids), 1)}, len(start_ids)
