"""What a head is trained on: rows with the numbers that it is to answer, and its losses.

Takes a module called with padded ids and lengths, and an :class:`Answers`; gives the sum of the weighted losses, a row
weighing what it weighs. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from llmfit.batching import pad
from llmfit.encoding import Encoded

__all__ = ["LOSSES", "Answers", "Part", "classes", "collate_answers", "number", "sets", "several"]


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
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def collate_answers(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> Answers:
    """Pad prompts, and what a head is to answer to each, into a batch."""
    input_ids = torch.from_numpy(pad([row.prompt for row in rows], pad_id)[0])
    lengths = torch.tensor([len(row.prompt) for row in rows])
    targets = torch.tensor([row.target for row in rows], dtype=torch.float32)
    weights = torch.tensor([row.weight for row in rows])
    return Answers(*(tensor.to(device, non_blocking=True) for tensor in (input_ids, lengths, targets, weights)))


def _weighted(losses: torch.Tensor, batch: Answers) -> torch.Tensor:
    return (losses * batch.weights.to(losses.dtype)).sum()


def classes(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' cross-entropies over the classes, a scalar in nats."""
    logits = model(batch.input_ids, batch.lengths)  # (B, K)
    return _weighted(functional.cross_entropy(logits, batch.targets[:, 0].long(), reduction="none"), batch)


def sets(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' binary cross-entropies, each the mean over the labels, a scalar in nats."""
    logits = model(batch.input_ids, batch.lengths)  # (B, K)
    losses = functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype), reduction="none")
    return _weighted(losses.mean(-1), batch)


def number(model: Any, batch: Answers) -> torch.Tensor:
    """Weighted sum of the rows' squared errors, a scalar in the squared units of the targets."""
    answers = model(batch.input_ids, batch.lengths)  # (B, 1)
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
        outputs = torch.split(model(batch.input_ids, batch.lengths), [part.outputs for part in parts], dim=1)
        truths = torch.split(batch.targets, [part.columns for part in parts], dim=1)
        losses = [
            part.weight * LOSSES[part.loss](lambda *_, own=own: own, replace(batch, targets=truth))
            for part, own, truth in zip(parts, outputs, truths, strict=True)
        ]
        return torch.stack(losses).sum()

    return loss


LOSSES: dict[str, Callable[[Any, Answers], torch.Tensor]] = {"classes": classes, "sets": sets, "number": number}
