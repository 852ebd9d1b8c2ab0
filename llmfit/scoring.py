"""Log-probabilities of given answers: class labels over a shared prompt cache, references in full; answers of heads.

Takes a lent module in evaluation mode and token ids; gives float64 arrays. Knows no pandas and no estimator. The prompt
of a row goes through the network once; labels that begin alike share their tokens' forward passes. Only a model whose
attention slides over less than a row, or which carries a state, reads each prompt with each label anew. What kind of
model it is, `forward` knows: `start_ids` are passed through to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmfit.batching import length_batches, pad
from llmfit.encoding import Encoded, Ids
from llmfit.forward import Reading, collate, go_on, keeps_all, read
from llmfit.memory import auto_budget, halved, is_out_of_memory
from llmfit.objectives import completion_losses

__all__ = ["head_outputs", "label_sequences", "reference_losses", "run_batches", "score_labels"]

T = TypeVar("T")


def label_sequences(labels: Sequence[Ids], end_id: int) -> list[Ids]:
    """Close every label whose tokens begin another label's, so that no label is part of another.

    Parameters
    ----------
    labels : sequence of tuple of int, length k
        Tokens of each label, distinct.
    end_id : int
        The token that ends an answer.

    Examples
    --------
    >>> label_sequences([(5,), (5, 6), (7,)], end_id=0)
    [(5, 0), (5, 6), (7,)]
    """
    return [
        (*label, end_id) if any(o != label and o[: len(label)] == label for o in labels) else label for label in labels
    ]


def score_labels(
    model: Any,
    prompts: Sequence[Ids],
    labels: Sequence[Ids],
    *,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    batch_tokens: Any = "auto",
    progress: Callable[[int], object] = lambda _: None,
) -> NDArray[np.float64]:
    """Score every label as the continuation of every prompt.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int, length n
        Equal prompts are computed once.
    labels : sequence of tuple of int, length k
        As :func:`label_sequences` gives them.
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    progress : callable
        Told the number of prompts done.

    Returns
    -------
    ndarray of shape (n, k)
        log P(label | prompt), in nats, not normalised over the labels.
    """
    times = Counter(prompts)
    distinct = {prompt: i for i, prompt in enumerate(times)}
    rows = [Encoded(prompt) for prompt in distinct]
    scores = np.empty((len(rows), len(labels)))
    budget = auto_budget(batch_tokens, device)

    def score_batch(part: list[Encoded]) -> NDArray[np.float64]:
        return _score_batch(model, part, labels, device, pad_id, budget, start_ids)

    for positions, values in run_batches(rows, budget, score_batch):
        scores[positions] = values
        progress(sum(times[rows[i].prompt] for i in positions))
    return scores[[distinct[prompt] for prompt in prompts]].reshape(len(prompts), len(labels))


def run_batches(
    rows: Sequence[Encoded], budget: int, work: Callable[[list[Encoded]], T]
) -> Iterator[tuple[list[int], T]]:
    """Run work over batches of like length; a batch that does not fit in memory is halved."""
    waiting, warned = list(length_batches(rows, budget))[::-1], False
    while waiting:
        positions = waiting.pop()
        try:
            yield positions, work([rows[i] for i in positions])
            continue
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None
        middle, warned = halved(len(positions), "rows", warn=not warned), True
        waiting += [positions[middle:], positions[:middle]]


@torch.inference_mode()
def _score_batch(
    model: Any,
    rows: list[Encoded],
    labels: Sequence[Ids],
    device: torch.device,
    pad_id: int,
    budget: int,
    start_ids: Ids,
) -> NDArray[np.float64]:
    """Score the labels for some prompts: one prefill, then the labels' further tokens over its cache."""
    longest = max(map(len, labels))
    prompts = [row.prompt for row in rows]
    reading = read(model, prompts, pad_id=pad_id, device=device, start_ids=start_ids, keep=longest > 1)
    if longest > 1 and not keeps_all(reading.cache, reading.known.shape[1] + longest):
        return _score_in_full(model, rows, labels, device, pad_id, budget, start_ids)
    scores = _log_softmax(reading.first)[:, [label[0] for label in labels]]  # (B, K)
    if longest > 1:
        _add_tails(scores, model, reading, labels, budget)
    return scores.cpu().double().numpy()


def _score_in_full(
    model: Any,
    rows: list[Encoded],
    labels: Sequence[Ids],
    device: torch.device,
    pad_id: int,
    budget: int,
    start_ids: Ids,
) -> NDArray[np.float64]:
    """Score every prompt with every label in a pass of its own, for models whose cache cannot be shared."""
    pairs = [Encoded(row.prompt, label) for row in rows for label in labels]
    scores = np.empty(len(pairs))
    for positions in length_batches(pairs, budget):
        batch = [pairs[i] for i in positions]
        losses = completion_losses(model, collate(batch, pad_id, device, start_ids))
        parts = torch.split(losses, [len(row.completion) for row in batch])
        scores[positions] = [-float(part.sum()) for part in parts]
    return scores.reshape(len(rows), len(labels))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _add_tails(scores: torch.Tensor, model: Any, reading: Reading, labels: Sequence[Ids], budget: int) -> None:
    """Add the scores of all but the first token of each label, a few rows at a time over copies of their cache.

    Labels with equal heads are one sequence of the forward pass, however many tokens may follow the head.
    """
    heads = sorted({label[:-1] for label in labels if len(label) > 1})
    count, width = reading.known.shape
    forks = max(1, budget // (width + max(map(len, heads))))  # copies of one row's cache that a pass may hold
    for some in (heads[i : i + forks] for i in range(0, len(heads), forks)):
        tails = torch.from_numpy(pad(some, 0, step=1)[0]).to(scores.device)
        for rows in torch.split(torch.arange(count, device=scores.device), max(1, forks // len(some))):
            logits = go_on(model, reading, rows, tails)
            scores[rows] += _sum_tails(_log_softmax(logits), some, labels)


def _sum_tails(log_probs: torch.Tensor, heads: Sequence[Ids], labels: Sequence[Ids]) -> torch.Tensor:
    """Add up the log-probabilities of all tokens but the first, for the labels behind these heads: (R, K)."""
    sums = log_probs.new_zeros(len(log_probs), len(labels))
    place = {head: i for i, head in enumerate(heads)}
    for k, label in enumerate(labels):
        if label[:-1] in place:
            steps = torch.arange(len(label) - 1, device=log_probs.device)
            following = torch.tensor(label[1:], device=log_probs.device)
            sums[:, k] = log_probs[:, place[label[:-1]], steps, following].sum(-1)
    return sums


@torch.inference_mode()
def reference_losses(
    model: Any,
    rows: Sequence[Encoded],
    *,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    batch_tokens: Any = "auto",
) -> tuple[float, int]:
    """Negative log-likelihood of the rows' completions, summed, and the number of their tokens.

    Returns
    -------
    float
        In nats.
    int
    """
    total, count = 0.0, 0
    budget = auto_budget(batch_tokens, device)

    def measure(part: list[Encoded]) -> torch.Tensor:
        return completion_losses(model, collate(part, pad_id, device, start_ids))

    for _, losses in run_batches(rows, budget, measure):
        total, count = total + float(losses.cpu().double().sum()), count + len(losses)
    return total, count


def head_outputs(
    model: Any,
    prompts: Sequence[Ids],
    *,
    device: torch.device,
    pad_id: int,
    batch_tokens: Any = "auto",
    progress: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """Run what :mod:`llmfit.heads` puts on a model over every prompt.

    Parameters
    ----------
    model : torch.nn.Module
        Called with padded ids and lengths.
    prompts : sequence of tuple of int, length n
        Equal prompts are computed once.
    progress : callable
        Told the number of prompts done.

    Returns
    -------
    Tensor of shape (n, outputs)
        On the CPU.
    """
    times = Counter(prompts)
    rows = [Encoded(prompt) for prompt in times]
    done: dict[Ids, torch.Tensor] = {}
    for positions, values in run_batches(
        rows, auto_budget(batch_tokens, device), lambda part: _run_head(model, part, device, pad_id)
    ):
        done |= {rows[i].prompt: value for i, value in zip(positions, values, strict=True)}
        progress(sum(times[rows[i].prompt] for i in positions))
    return torch.stack([done[prompt] for prompt in prompts])


@torch.no_grad()
def _run_head(model: Any, rows: list[Encoded], device: torch.device, pad_id: int) -> torch.Tensor:
    input_ids = torch.from_numpy(pad([row.prompt for row in rows], pad_id)[0])
    lengths = torch.tensor([len(row.prompt) for row in rows])
    out: torch.Tensor = model(input_ids.to(device), lengths.to(device)).cpu()
    return out
