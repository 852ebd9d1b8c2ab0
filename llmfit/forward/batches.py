"""Rows whose answers are known: padded, or packed, and what a model says of their loss tokens.

Takes encoded rows; gives a :class:`Batch` and logits. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Encoded, Ids
from llmfit.forward.words import Words, without_words
from llmfit.packing import Behind, KeptBeginning, Layout, Layouts, Tree, lay_out

__all__ = ["Batch", "ask", "bare_states", "collate", "completion_logits", "look", "on_device", "side_by_side"]


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
        For an encoder-decoder: what the decoder begins from, what it has said before, and the completion but for its
        last token.
    layout : Layout, Layouts, Behind or None
        Of rows that are packed: then B is 1, and T its length.
    parts : tuple of int
        How many of the targets belong to each of the batches that it is made of; of one alone, there are none.
    """

    input_ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    attention_mask: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    layout: Layout | Layouts | Behind | None = None
    parts: tuple[int, ...] = ()


def collate(
    rows: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    start_ids: Ids = (),
    *,
    step: int = PAD_STEP,
    shared: int | None = None,
    kept: KeptBeginning | None = None,
) -> Batch:
    """Pad rows of prompt and completion into a batch, or pack them.

    Parameters
    ----------
    rows : sequence of Encoded, length B
    pad_id : int
    device : torch.device
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    step : int
        Widths are multiples of it.
    shared : int or None
        Tokens that all prompts begin with, each having more; None pads the rows instead of packing them.
    kept : KeptBeginning or None
        See :class:`~llmfit.packing.Layout`.
    """
    if shared is not None:
        return _pack(rows, pad_id, device, shared, kept)
    if start_ids:
        sequences = [(*start_ids, *row.said, *row.completion) for row in rows]
        firsts = [len(start_ids) + len(row.said) for row in rows]
        ids, _ = pad([sequence[:-1] for sequence in sequences], pad_id, step=step)
        prompts, mask = map(torch.from_numpy, pad([row.prompt for row in rows], pad_id, step=step))
    else:
        sequences, firsts = [(*row.prompt, *row.completion) for row in rows], [row.first for row in rows]
        ids, _ = pad(sequences, pad_id, step=step)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    known: list[tuple[int, float]] = []
    for i, (row, sequence, first) in enumerate(zip(rows, sequences, firsts, strict=True)):
        predicts[i, first - 1 : len(sequence) - 1], own = _answered(row, sequence[first:])
        known += own
    targets, weights = _columns(known)
    read = torch.from_numpy(ids)
    tensors = [prompts, predicts, targets, weights, mask, read] if start_ids else [read, predicts, targets, weights]
    return on_device(tensors, device)


def on_device(tensors: Sequence[torch.Tensor], device: torch.device) -> Batch:
    """Put the tensors of a batch, in its order, on a device."""
    on: list[Any] = [tensor.to(device, non_blocking=True) for tensor in tensors]
    return Batch(*on)


def _answered(row: Encoded, tokens: Ids) -> tuple[torch.Tensor, list[tuple[int, float]]]:
    """Tell which of the tokens behind a row's first carry loss; give those, and what each weighs."""
    shares = row.shares[len(row.shares) - len(tokens) :] if row.shares is not None else (1.0,) * len(tokens)
    known = [(token, row.weight * share) for token, share in zip(tokens, shares, strict=True) if share]
    return torch.tensor(shares) != 0, known


def _columns(known: Sequence[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([token for token, _ in known]), torch.tensor([weight for _, weight in known])


def _pack(rows: Sequence[Encoded], pad_id: int, device: torch.device, shared: int, kept: KeptBeginning | None) -> Batch:
    """Pack rows behind what they all begin with; a row's last token, behind which nothing is asked, is left out."""
    sequences = [(*row.prompt, *row.completion) for row in rows]
    read = [sequence[: max(len(sequence) - 1, shared + 1)] for sequence in sequences]
    layout = lay_out([len(tokens) - shared for tokens in read], shared, device, kept=kept)
    predicts = torch.zeros(1, layout.length, dtype=torch.bool)
    known: list[tuple[int, float]] = []
    for row, sequence, start in zip(rows, sequences, layout.starts, strict=True):
        asked, own = _answered(row, sequence[row.first :])
        begin = start + row.first - 1 - shared
        predicts[0, begin : begin + len(asked)] = asked
        known += own
    ids = layout.ids(read, pad_id)
    return replace(on_device([ids, predicts, *_columns(known)], device), layout=layout)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Put packed batches behind one another, to go through the network at once; none sees the others."""
    ids, predicts = (torch.cat([getattr(b, name) for b in batches], dim=1) for name in ("input_ids", "predicts"))
    targets, weights = (torch.cat([getattr(b, name) for b in batches]) for name in ("targets", "weights"))
    layout = Layouts(tuple(b.layout for b in batches))  # type: ignore[misc]
    return Batch(ids, predicts, targets, weights, layout=layout, parts=tuple(len(b.targets) for b in batches))


def ask(
    prompts: Sequence[Ids],
    tokens: Ids,
    tree: Tree,
    *,
    pad_id: int,
    device: torch.device,
    shared: int,
    kept: KeptBeginning | None = None,
) -> Batch:
    """Pack prompts with the same answers behind each, to be asked what follows each prompt and each of their tokens.

    Parameters
    ----------
    prompts : sequence of tuple of int, length R
    tokens : tuple of int, length n
        Of all answers, what they begin alike with standing once.
    tree : Tree
        How they stand to one another.
    shared : int
        Tokens that all prompts begin with, each having more.
    kept : KeptBeginning or None
        See :class:`~llmfit.packing.Layout`.

    Returns
    -------
    Batch
        Of ``R * (1 + n)`` positions: the prompt's last and each of the tokens, row by row. Its targets mean nothing.
    """
    layout = lay_out([len(prompt) - shared for prompt in prompts], shared, device, tree=tree, kept=kept)
    predicts = torch.zeros(1, layout.length, dtype=torch.bool)
    for own, start in zip(layout.own, layout.starts, strict=True):
        predicts[0, start + own - 1 : start + own + len(tokens)] = True
    ids = layout.ids([(*prompt, *tokens) for prompt in prompts], pad_id)
    nothing = torch.zeros(len(prompts) * (1 + len(tokens)), dtype=torch.long)
    return replace(on_device([ids, predicts, nothing, nothing], device), layout=layout)


def completion_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of every loss token; those of padded rows as the model itself makes them.

    Returns
    -------
    Tensor of shape (N, V)
    """
    if batch.layout is None:
        return _read(model, batch)
    states, words = bare_states(model, batch)
    return words(states)


def bare_states(model: Any, batch: Batch) -> tuple[torch.Tensor, Words]:
    """Hidden states of every loss token's predecessor, (N, D), and what makes logits of them."""
    with without_words(model) as words:
        return _read(model, batch), words


def _read(model: Any, batch: Batch) -> torch.Tensor:
    """Run a batch through a model, for what it says at the positions that predict."""
    given: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.layout is not None:
        given |= {"position_ids": batch.layout.positions, "layout": batch.layout}
    if batch.decoder_input_ids is not None:
        given |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.decoder_input_ids}
    else:
        given["logits_to_keep"] = batch.predicts
    return _predicting(model(**given).logits, batch)


def _predicting(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Pick the positions that predict: a model that does not know logits_to_keep gives all of them."""
    rows = out.reshape(-1, out.shape[-1])
    return rows if len(rows) == len(batch.targets) else rows[batch.predicts.reshape(-1)]


def look(model: Any, batch: Batch) -> torch.Tensor:
    """Run a batch through a model for what its layers see, whatever comes out."""
    given: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.decoder_input_ids is not None:
        given |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.decoder_input_ids}
    model(**given)
    return torch.zeros((), device=batch.input_ids.device)
