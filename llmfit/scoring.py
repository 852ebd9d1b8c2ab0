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
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmfit.answers import answer, collate_answers, packable_answers
from llmfit.batching import length_batches, pad
from llmfit.encoding import Encoded, Ids
from llmfit.forward import Reading, ask, choices, collate, completion_states, go_on, keeps_all, packable, read
from llmfit.memory import auto_budget, halved, is_out_of_memory
from llmfit.objectives import completion_losses
from llmfit.packing import Tree, by_beginning, packed, parted

__all__ = ["head_outputs", "label_sequences", "reference_losses", "run_batches", "score_labels"]

T = TypeVar("T")
MOST_TOKENS = 512  # of labels behind a prompt in one pass


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
                kept: dict[int, Any] = {}  # what prompts begin with is read once for all tries
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
        for positions, values in run_batches(rows, length_batches(rows, budget), work):
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
            yield positions, work([rows[i] for i in positions])
            continue
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None
        middle, warned = halved(len(positions), "rows", warn=not warned), True
        waiting += [positions[middle:], positions[:middle]]


# Packed, the labels as a tree -----------------------------------------------------------------------


class Trie(NamedTuple):
    """Labels that go on from one another, each token that another one follows standing once.

    Parameters
    ----------
    tokens : tuple of int, length n
    tree : Tree
        How they stand to one another.
    following : tuple of n + 1 tuples of int
        The tokens that are asked for behind a prompt, and behind each of `tokens`.
    paths : tuple of (n_labels) tuples of (int, int)
        Of each label: for each of its tokens, where it is asked for (0 behind the prompt), and its place there.
    """

    tokens: Ids
    tree: Tree
    following: tuple[Ids, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]


def make_trie(labels: Sequence[Ids]) -> Trie:
    """Put labels together by what they begin with.

    Examples
    --------
    >>> trie = make_trie([(5, 6), (5, 7, 8), (9,)])
    >>> trie.tokens, trie.following
    ((5, 7), ((5, 9), (6, 7), (8,)))
    """
    heads = sorted({label[:i] for label in labels for i in range(len(label))})  # () first, and each before what follows
    place = {head: i for i, head in enumerate(heads)}
    behind = [[label for label in labels if len(label) > len(head) and label[: len(head)] == head] for head in heads]
    following = [sorted({label[len(head)] for label in some}) for head, some in zip(heads, behind, strict=True)]
    ends = [1 + max(place[other] for other in heads if other[: len(head)] == head) for head in heads]
    paths = [
        tuple((place[label[:i]], following[place[label[:i]]].index(token)) for i, token in enumerate(label))
        for label in labels
    ]
    tree = Tree(tuple(len(head) - 1 for head in heads[1:]), tuple(end - 1 for end in ends[1:]))
    return Trie(tuple(head[-1] for head in heads[1:]), tree, tuple(map(tuple, following)), tuple(paths))


def tries(labels: Sequence[Ids], most: int = MOST_TOKENS) -> Iterator[tuple[Trie, list[int]]]:
    """Part labels into tries of so many tokens at most, where a label is not longer by itself.

    Yields
    ------
    Trie
    list of int
        Positions of its labels; the last label is in the last one.
    """
    some: list[int] = []
    heads: set[Ids] = set()
    for i in sorted(range(len(labels)), key=lambda i: (i == len(labels) - 1, labels[i])):
        own = {labels[i][:n] for n in range(1, len(labels[i]))}
        if some and len(heads | own) > most:
            yield make_trie([labels[i] for i in some]), some
            some, heads = [], set()
        some.append(i)
        heads |= own
    yield make_trie([labels[i] for i in some]), some


def _score_packed(
    model: Any,
    rows: Sequence[Encoded],
    trie: Trie,
    shared: int,
    kept: dict[int, Any],
    device: torch.device,
    pad_id: int,
    budget: int,
) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
    """Score the labels of a trie: one pass for some rows, each with the whole trie behind it."""
    width = max(map(len, trie.paths))
    path = torch.tensor([[*path, *((0, 0),) * (width - len(path))] for path in trie.paths], device=device)  # (K, L, 2)
    known = torch.tensor([[i < len(path) for i in range(width)] for path in trie.paths])  # where sums are taken

    @torch.inference_mode()
    def score(part: list[Encoded]) -> NDArray[np.float64]:
        prompts = [row.prompt for row in part]
        with _whole(kept):
            batch = ask(prompts, trie.tokens, trie.tree, pad_id=pad_id, device=device, shared=shared, kept=kept)
            states, words = completion_states(model, batch)
        log_probs = choices(words, states.view(len(part), len(trie.following), -1), trie.following)  # (R, 1 + n, C)
        chosen = log_probs[:, path[..., 0], path[..., 1]]  # (R, K, L)
        return chosen.cpu().double().where(known, 0.0).sum(-1).numpy()

    through = [row._replace(completion=trie.tokens) for row in rows]
    return run_batches(rows, length_batches(through, budget, shared, kept=True), score)


@contextmanager
def _whole(kept: dict[int, Any] | None) -> Iterator[None]:
    """Forget keys and values where a pass fails, before all layers have theirs."""
    try:
        yield
    except BaseException:
        if kept is not None:
            kept.clear()
        raise


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
    scores = _log_softmax(reading.first)[:, [label[0] for label in labels]]  # (B, K)
    if longest > 1:
        _add_tails(scores, model, reading, labels, max(1, budget // (width - 1)))
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
    pairs = [row._replace(completion=label) for row in rows for label in labels]
    scores = np.empty(len(pairs))
    for positions in length_batches(pairs, budget):
        batch = [pairs[i] for i in positions]
        losses = completion_losses(model, collate(batch, pad_id, device, start_ids))
        parts = torch.split(losses, [len(row.completion) for row in batch])
        scores[positions] = [-float(part.sum()) for part in parts]
    return scores.reshape(len(rows), len(labels))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _add_tails(scores: torch.Tensor, model: Any, reading: Reading, labels: Sequence[Ids], forks: int) -> None:
    """Add the scores of all but the first token of each label, a few rows at a time over copies of their cache.

    Labels with equal heads are one sequence of the forward pass, however many tokens may follow the head. A pass holds
    `forks` copies of one row's cache at most.
    """
    heads = sorted({label[:-1] for label in labels if len(label) > 1})
    for some in (heads[i : i + forks] for i in range(0, len(heads), forks)):
        tails = torch.from_numpy(pad(some, 0, step=1)[0]).to(scores.device)
        for rows in torch.split(torch.arange(len(scores), device=scores.device), max(1, forks // len(some))):
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

    shared = packable(model, rows, pad_id=pad_id, device=device, start_ids=start_ids) if rows else None

    def measure(part: list[Encoded], begun: int | None) -> torch.Tensor:
        return completion_losses(model, collate(part, pad_id, device, start_ids, shared=begun))

    with packed(model) if shared is not None else nullcontext():
        for positions, begun in parted(rows, shared, budget):
            some = [rows[i] for i in positions]
            for _, losses in run_batches(some, length_batches(some, budget, begun), partial(measure, begun=begun)):
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
    keeps = getattr(getattr(model, "backbone", model), "pooling", None) == "last"
    budget = auto_budget(batch_tokens, device)

    @torch.no_grad()
    def run(part: list[Encoded], begun: int | None, kept: dict[int, Any] | None) -> torch.Tensor:
        with _whole(kept):
            return answer(model, collate_answers(part, pad_id, device, begun, kept)).cpu()

    with packed(model) if shared is not None else nullcontext():
        for positions, begun in parted(rows, shared, budget):
            some = [rows[i] for i in positions]
            work = partial(run, begun=begun, kept={} if keeps else None)
            for here, values in run_batches(some, length_batches(some, budget, begun, kept=keeps), work):
                done |= {some[i].prompt: value for i, value in zip(here, values, strict=True)}
                progress(sum(times[some[i].prompt] for i in here))
    return torch.stack([done[prompt] for prompt in prompts])
