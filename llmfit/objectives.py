"""What is minimised: losses as functions of (model, batch) to a sum and no more.

Takes a module and a :class:`Batch`; gives the sum of the weighted losses. The caller divides once per optimiser
step, so that no way of cutting the step into micro-batches changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from llmfit.answers import LOSSES
from llmfit.batching import pad
from llmfit.encoding import Encoded

__all__ = ["OBJECTIVES", "Batch", "collate", "completion_losses", "loss_mass", "supervised"]


@dataclass(frozen=True)
class Batch:
    """Padded rows on a device.

    Attributes
    ----------
    input_ids : Tensor of shape (B, T)
        Padding stands at the right, where no real token of a causal model can see it.
    predicts : bool Tensor of shape (B, T)
        True at the positions whose next token carries loss.
    targets : Tensor of shape (N,)
        Those next tokens, row by row.
    weights : Tensor of shape (N,)
    """

    input_ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> Batch:
    """Pad rows of prompt and completion into a batch."""
    ids, _ = pad([(*row.prompt, *row.completion) for row in rows], pad_id)
    input_ids = torch.from_numpy(ids)
    predicts = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        predicts[i, _first(row) - 1 : row.length - 1] = True
    targets = torch.tensor([t for row in rows for t in (*row.prompt, *row.completion)[_first(row) :]])
    weights = torch.tensor([row.weight for row in rows for _ in range(row.length - _first(row))])
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in (input_ids, predicts, targets, weights)))


def _first(row: Encoded) -> int:
    """First position that carries loss; the very first token of a text has nothing to be predicted from."""
    return max(len(row.prompt), 1)


def loss_mass(rows: Sequence[Encoded]) -> float:
    """Sum of weights over the loss tokens, or a head's answers: what the summed loss of these rows is divided by."""
    return sum(row.weight * (row.length - _first(row) if row.target is None else 1) for row in rows)


def completion_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every loss token, in float32 or wider.

    Only the labelled positions meet the vocabulary.

    Returns
    -------
    Tensor of shape (N,), in nats
    """
    out = model(input_ids=batch.input_ids, logits_to_keep=batch.predicts, use_cache=False)
    logits = out.logits.reshape(-1, out.logits.shape[-1])
    if len(logits) != len(batch.targets):  # a model that does not know logits_to_keep gives all of them
        logits = logits[batch.predicts.reshape(-1)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(logits.to(wide), batch.targets, reduction="none")  # (N,)


def supervised(model: Any, batch: Batch) -> torch.Tensor:
    """Weighted sum of the completion tokens' negative log-likelihoods, a scalar in nats."""
    losses = completion_losses(model, batch)
    return (losses * batch.weights.to(losses.dtype)).sum()


OBJECTIVES: dict[str, Callable[[Any, Any], torch.Tensor]] = {"supervised": supervised, **LOSSES}
