"""What a head is trained on: rows with the numbers that it is to answer, and its losses.

Takes a module called with ids, lengths and a layout, and an :class:`Answers`; gives the sum of the weighted losses, a
row weighing what it weighs. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from llmfit.batching import pad
from llmfit.encoding import Encoded
from llmfit.forward import packable
from llmfit.packing import KeptBeginning, Layout, lay_out

__all__ = [
    "LOSSES",
    "Answers",
    "Part",
    "answer",
    "classes",
    "collate_answers",
    "number",
    "packable_answers",
    "sets",
    "several",
]


@dataclass(frozen=True)
class Answers:
    """Padded prompts on a device, and what a head is to answer to each.

    Attributes
    ----------
    input_ids : Tensor of shape (B, T)
        Padding stands at the right.
    lengths : Tensor of shape (B,)
        Tokens of each prompt.
    targets : Tensor of shape (B, K)
        See :class:`~llmfit.encoding.Encoded`.
    weights : Tensor of shape (B,)
    layout : Layout or None
        Of prompts that are packed into one row.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    layout: Layout | None = None


def collate_answers(
    rows: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    shared: int | None = None,
    kept: KeptBeginning | None = None,
) -> Answers:
    """Pad prompts, and what a head is to answer to each, into a batch, or pack them.

    Parameters
    ----------
    rows : sequence of Encoded, length B
        Without a target, 0 is to be answered.
    pad_id : int
    device : torch.device
    shared : int or None
        Tokens that all prompts begin with, each having more; None pads the prompts instead of packing them.
    kept : KeptBeginning or None
        See :class:`~llmfit.packing.Layout`.
    """
    prompts = [row.prompt for row in rows]
    layout = None
    if shared is not None:
        layout = lay_out([len(prompt) - shared for prompt in prompts], shared, device, kept=kept)
    input_ids = torch.from_numpy(pad(prompts, pad_id)[0]) if layout is None else layout.ids(prompts, pad_id)
    lengths = torch.tensor(list(map(len, prompts)))
    targets = torch.tensor([row.target or (0.0,) for row in rows], dtype=torch.float32)
    weights = torch.tensor([row.weight for row in rows])
    ids, long, wanted, heavy = (
        tensor.to(device, non_blocking=True) for tensor in (input_ids, lengths, targets, weights)
    )
    return Answers(ids, long, wanted, heavy, layout)


def answer(model: Any, batch: Answers) -> torch.Tensor:
    """Run what :mod:`llmfit.heads` puts on a model, or the vectors alone, over a batch: (B, outputs)."""
    out: torch.Tensor = model(batch.input_ids, batch.lengths, batch.layout)
    return out


def packable_answers(model: Any, rows: Sequence[Encoded], *, pad_id: int, device: torch.device) -> int | None:
    """Say how many tokens prompts may share, packed; see :func:`llmfit.forward.packable`."""
    vectors = getattr(model, "backbone", model)

    def read(some: Sequence[Encoded], shared: int | None) -> tuple[torch.Tensor, Layout | None]:
        kept, said = KeptBeginning(), []
        for _ in range(1 if shared is None else 2):  # with what all rows begin with, and behind what is kept of it
            batch = collate_answers(some, pad_id, device, shared, kept)
            said.append(answer(vectors, batch))
        return torch.stack([said[0], said[-1]], dim=1), batch.layout

    return packable(model, rows, pad_id=pad_id, device=device, read=read, kind=str(getattr(vectors, "pooling", None)))


def _weighted(losses: torch.Tensor, batch: Answers) -> torch.Tensor:
    return (losses * batch.weights.to(losses.dtype)).sum()


def classes(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' cross-entropies over the classes, a scalar in nats."""
    logits = answer(model, batch)  # (B, K)
    return _weighted(functional.cross_entropy(logits, batch.targets[:, 0].long(), reduction="none"), batch)


def sets(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' binary cross-entropies, each the mean over the labels, a scalar in nats."""
    logits = answer(model, batch)  # (B, K)
    losses = functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype), reduction="none")
    return _weighted(losses.mean(-1), batch)


def number(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' squared errors, a scalar in the squared units of the targets."""
    answers = answer(model, batch)  # (B, 1)
    return _weighted((answers - batch.targets.to(answers.dtype)).square().sum(-1), batch)


class Part(NamedTuple):
    """One of several targets that a head answers side by side.

    Parameters
    ----------
    loss : str
        A name in `LOSSES`.
    outputs : int
        Of the head, for this target.
    columns : int
        Of what it is to answer.
    weight : float
        Of its loss beside the others'.
    """

    loss: str
    outputs: int
    columns: int
    weight: float


def several(parts: Sequence[Part]) -> Callable[[Any, Answers], torch.Tensor]:
    """Compose the losses of targets whose outputs stand side by side: their weighted sum, a scalar."""

    def loss(model: Any, batch: Answers) -> torch.Tensor:
        outputs = torch.split(answer(model, batch), [part.outputs for part in parts], dim=1)
        truths = torch.split(batch.targets, [part.columns for part in parts], dim=1)
        losses = [
            part.weight * LOSSES[part.loss](lambda *_, own=own: own, replace(batch, targets=truth))
            for part, own, truth in zip(parts, outputs, truths, strict=True)
        ]
        return torch.stack(losses).sum()

    return loss


LOSSES: dict[str, Callable[[Any, Answers], torch.Tensor]] = {"classes": classes, "sets": sets, "number": number}
