"""What is minimised: losses as functions of (model, batch) to a sum and no more.

Takes a module and a :class:`~llmfit.forward.Batch`; gives the sum of the weighted losses. The caller divides once per
optimiser step, so that no way of cutting the step into micro-batches changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmfit.answers import LOSSES, several
from llmfit.encoding import Encoded
from llmfit.forward import Batch, collate, completion_states, token_losses

__all__ = [
    "OBJECTIVES",
    "Batch",
    "collate",
    "completion_losses",
    "loss_mass",
    "objective_of",
    "supervised",
    "weighed_losses",
]


def loss_mass(rows: Sequence[Encoded]) -> float:
    """Sum of weights over the loss tokens, or a head's answers: what the summed loss of these rows is divided by."""
    return sum(row.weight * row.mass for row in rows)


def completion_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every loss token, in float32 or wider.

    Returns
    -------
    Tensor of shape (N,), in nats
    """
    states, words = completion_states(model, batch)
    return token_losses(words, states, batch.targets, batch.parts)  # (N,)


def weighed_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every loss token, times its weight: (N,), in nats."""
    losses = completion_losses(model, batch)
    return losses * batch.weights.to(losses.dtype)


def supervised(model: Any, batch: Batch) -> torch.Tensor:
    """Weighted sum of the completion tokens' negative log-likelihoods, a scalar in nats."""
    return weighed_losses(model, batch).sum()


def objective_of(given: Any) -> Callable[[Any, Any], torch.Tensor]:
    """Take the loss of a name, or compose that of several :class:`~llmfit.answers.Part`."""
    return OBJECTIVES[given] if isinstance(given, str) else several(given)


OBJECTIVES: dict[str, Callable[[Any, Any], torch.Tensor]] = {"supervised": supervised, **LOSSES}
