"""Log-probabilities of given answers: class labels behind prompts, references in full; answers of heads.

Takes a lent module in evaluation mode and token ids; gives float64 arrays. Knows no pandas and no estimator. What
prompts begin with goes through the network once, the rest of each once with the tokens of all labels behind it, which
stand there as a tree: a label's tokens see those it goes on from. Models that cannot read packed rows get each prompt
once and the labels over copies of its cache, and those that keep none a pass for each prompt with each label. What kind
of model it is, `forward` knows: `start_ids` are passed through to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmfit.answers import answer, collate_answers, packable_answers
from llmfit.batching import length_batches, pad
from llmfit.encoding import Encoded, Ids
from llmfit.forward import (
    Reading,
    Words,
    ask,
    choices,
    collate,
    completion_states,
    go_on,
    keeps_all,
    most_positions,
    packable,
    read,
)
from llmfit.keeping import kept_draws
from llmfit.memory import auto_budget, halved, is_out_of_memory, once_more
from llmfit.objectives import completion_losses
from llmfit.packing import KeptBeginning, by_beginning, packed, parted
from llmfit.tries import Trie, tries

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
    said: Sequence[Ids] | None = None,
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
    said : sequence of tuple of int, length n, or None
        What it has said behind that, before each label.
    progress : callable
        Told the number of prompts done.

    Returns
    -------
    ndarray of shape (n, k)
        log P(label | prompt), in nats, not normalised over the labels.
    """
    asked = list(zip(prompts, said or [()] * len(prompts), strict=True))
    times = list(Counter(asked).values())
    distinct = {one: i for i, one in enumerate(dict.fromkeys(asked))}
    rows = [Encoded(prompt, said=before) for prompt, before in distinct]
    scores = np.empty((len(rows), len(labels)))
    budget = auto_budget(batch_tokens, device)
    longest, parts = max(labels, key=len), list(tries(labels))
    through = [row._replace(completion=longest) for row in rows]
    behind = max(len(trie.tokens) for trie, _ in parts)
    shared = packable(model, through, pad_id=pad_id, device=device, start_ids=start_ids, behind=behind)
    if shared is not None:
        with packed(model):
            for some, begun in by_beginning([row.prompt for row in rows], shared, budget):
                kept = KeptBeginning()  # what prompts begin with is read once for all tries
                alike = [rows[i] for i in some]
                for trie, columns in parts:
                    passes = _score_packed(model, alike, trie, begun, kept, device, pad_id, budget)
                    for here, values in passes:
                        positions = [some[i] for i in here]
                        scores[np.ix_(positions, columns)] = values
                        progress(sum(times[i] for i in positions) if columns[-1] == len(labels) - 1 else 0)
    else:
        work = partial(
            _score_batch, model, labels=labels, device=device, pad_id=pad_id, budget=budget, start_ids=start_ids
        )
        most = most_positions(model)  # a prompt has its words too, one position each
        batches = (some[i : i + most] for some in length_batches(rows, budget) for i in range(0, len(some), most))
        for positions, values in run_batches(rows, batches, work):
            scores[positions] = values
            progress(sum(times[i] for i in positions))
    return scores[[distinct[one] for one in asked]].reshape(len(prompts), len(labels))


def run_batches(
    rows: Sequence[Encoded], batches: Iterable[list[int]], work: Callable[[list[Encoded]], T]
) -> Iterator[tuple[list[int], T]]:
    """Run work over batches of rows; a batch that does not fit in memory is halved."""
    waiting, warned = list(batches)[::-1], False
    while waiting:
        positions = waiting.pop()
        try:
            yield positions, once_more(partial(work, [rows[i] for i in positions]), undo=kept_draws())
            continue
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None
        middle, warned = halved(len(positions), "rows", warn=not warned), True
        waiting += [positions[middle:], positions[:middle]]


# Packed, the labels as a tree -----------------------------------------------------------------------


def _score_packed(
    model: Any,
    rows: Sequence[Encoded],
    trie: Trie,
    shared: int,
    kept: KeptBeginning,
    device: torch.device,
    pad_id: int,
    budget: int,
) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
    """Score the labels of a trie: one pass for some rows, each with the whole trie behind it."""
    paths = _along(trie.paths, device)

    @torch.inference_mode()
    def score(part: list[Encoded]) -> NDArray[np.float64]:
        prompts = [row.prompt for row in part]
        with kept.whole():
            batch = ask(prompts, trie.tokens, trie.tree, pad_id=pad_id, device=device, shared=shared, kept=kept)
            states, words = completion_states(model, batch)
        log_probs = choices(words, states.view(len(part), len(trie.following), -1), trie.following)  # (R, 1 + n, C)
        return _sums(log_probs, *paths)

    through = [row._replace(completion=trie.tokens) for row in rows]
    return run_batches(rows, length_batches(through, budget, shared, kept=True), score)


def _along(paths: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Write down where each label's tokens are asked for, (K, L, 2), and where a label has any, (K, L)."""
    width = max(map(len, paths))
    filled = [[*path, *((0, 0),) * (width - len(path))] for path in paths]
    known = torch.tensor([[i < len(path) for i in range(width)] for path in paths])
    return torch.tensor(filled, device=device).view(len(paths), width, 2), known


def _sums(log_probs: torch.Tensor, path: torch.Tensor, known: torch.Tensor) -> NDArray[np.float64]:
    """Add up the log-probabilities, of (R, P, C), that each label passes: (R, K)."""
    chosen = log_probs[:, path[..., 0], path[..., 1]]  # (R, K, L)
    return chosen.cpu().double().where(known, 0.0).sum(-1).numpy()


# Padded ---------------------------------------------------------------------------------------------


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
    prompts, said = [row.prompt for row in rows], [row.said for row in rows]
    reading = read(model, prompts, pad_id=pad_id, device=device, start_ids=start_ids, said=said, keep=longest > 1)
    width = reading.known.shape[1] + len(said[0]) + longest
    if longest > 1 and not keeps_all(reading.cache, width):
        return _score_in_full(model, rows, labels, device, pad_id, budget, start_ids)
    firsts = choices(Words(), reading.first[:, None], [[label[0] for label in labels]])  # (B, 1, K)
    scores = firsts[:, 0].cpu().double().numpy()
    if longest > 1:
        forks = max(1, min(budget // (width - 1), most_positions(model) // (longest - 1)))
        _add_tails(scores, model, reading, labels, forks, device)
    return scores


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
    pairs = [row._replace(completion=label) for row in rows for label in labels]
    scores = np.empty(len(pairs))
    for positions in length_batches(pairs, budget):
        batch = [pairs[i] for i in positions]
        losses = completion_losses(model, collate(batch, pad_id, device, start_ids))
        parts = torch.split(losses, [len(row.completion) for row in batch])
        scores[positions] = [-float(part.sum()) for part in parts]
    return scores.reshape(len(rows), len(labels))


def _add_tails(
    scores: NDArray[np.float64],
    model: Any,
    reading: Reading,
    labels: Sequence[Ids],
    forks: int,
    device: torch.device,
) -> None:
    """Add the scores of all but the first token of each label, a few rows at a time over copies of their cache.

    Labels with equal heads are one sequence of the forward pass, however many tokens may follow the head. A pass holds
    `forks` copies of one row's cache at most.
    """
    heads = sorted({label[:-1] for label in labels if len(label) > 1})
    for some in (heads[i : i + forks] for i in range(0, len(heads), forks)):
        tails = torch.from_numpy(pad(some, 0, step=1)[0]).to(device)
        asked, paths = _asked(some, tails.shape[1], labels)
        along = _along(paths, device)
        for rows in torch.split(torch.arange(len(scores), device=device), max(1, forks // len(some))):
            logits = go_on(model, reading, rows, tails).flatten(1, 2)  # (R, H * T, V)
            scores[rows.cpu().numpy()] += _sums(choices(Words(), logits, asked), *along)


def _asked(
    heads: Sequence[Ids], steps: int, labels: Sequence[Ids]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Say what is asked for behind each of so many tokens of each head, and where all but the first of a label are."""
    asked: list[list[int]] = [[] for _ in range(len(heads) * steps)]
    first = {head: i * steps for i, head in enumerate(heads)}
    paths = []
    for label in labels:
        behind = range(first[label[:-1]], len(asked)) if label[:-1] in first else ()
        path = list(zip(behind, label[1:], strict=False))
        for place, token in path:
            if token not in asked[place]:
                asked[place].append(token)
        paths.append([(place, asked[place].index(token)) for place, token in path])
    return asked, paths


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

    shared = packable(model, rows, pad_id=pad_id, device=device, start_ids=start_ids) if rows else None

    def measure(part: list[Encoded], begun: int | None, kept: KeptBeginning) -> torch.Tensor:
        with kept.whole():
            return completion_losses(model, collate(part, pad_id, device, start_ids, shared=begun, kept=kept))

    with packed(model) if shared is not None else nullcontext():
        for positions, begun in parted(rows, shared, budget):
            some = [rows[i] for i in positions]
            work = partial(measure, begun=begun, kept=KeptBeginning())
            for _, losses in run_batches(some, length_batches(some, budget, begun, kept=True), work):
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
        Called with ids, lengths and a layout.
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
    shared = packable_answers(model, rows, pad_id=pad_id, device=device)
    budget = auto_budget(batch_tokens, device)

    @torch.no_grad()
    def run(part: list[Encoded], begun: int | None, kept: KeptBeginning) -> torch.Tensor:
        with kept.whole():
            return answer(model, collate_answers(part, pad_id, device, begun, kept)).cpu()

    with packed(model) if shared is not None else nullcontext():
        for positions, begun in parted(rows, shared, budget):
            some = [rows[i] for i in positions]
            work = partial(run, begun=begun, kept=KeptBeginning())
            for here, values in run_batches(some, length_batches(some, budget, begun, kept=True), work):
                done |= {some[i].prompt: value for i, value in zip(here, values, strict=True)}
                progress(sum(times[some[i].prompt] for i in here))
    return torch.stack([done[prompt] for prompt in prompts])
