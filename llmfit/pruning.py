"""The likeliest label alone: only those are read in full that may still be it.

Takes a lent module in evaluation mode and token ids; gives positions of labels. A label is no likelier than the tokens
that it begins with: where these are less likely than another label is in full, it is not read on. Prompts are read
once, and what goes on from them over the keys and values that they have left. Labels that are as good as equally likely
are told apart as :mod:`llmfit.scoring` scores all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmfit import scoring
from llmfit.batching import length_batches
from llmfit.encoding import Encoded, Ids
from llmfit.forward import choices, go_behind, goes_behind, number_bytes, packable, read_rows
from llmfit.memory import auto_budget
from llmfit.packing import Branch, KeptBeginning, Layout, Tree, by_beginning, common_prefix, packed
from llmfit.tries import Trie, make_trie

__all__ = ["likeliest_labels", "worth_pruning"]

Answered = tuple[NDArray[np.int64], float]
WORTH = {"cpu": 16}  # tokens of labels behind a prompt from which passes of their own cost less
WORTH_ELSEWHERE = 64
LEAST = {"cpu": 2**13}  # tokens of labels behind all prompts below which trying takes longer than it may save
LEAST_ELSEWHERE = 2**16  # where starting a pass takes as long as thousands of tokens
TRIED, MOST_TRIED = 4, 32  # prompts at least and at most that show whether there is much to leave out
ONE_IN = 32  # prompts, one of which is tried
SAVED = 0.4  # share of the labels' tokens that has to be left out there
MOST_CELLS = 2**22  # nodes times what may follow one, in a table of all
AT_ONCE = 128  # tokens that take no longer than the pass that they are in
MARGINS = {1: 1.0, 2: 0.5, 4: 1e-3}  # nats that scores may be off by, by the bytes of the smallest numbers


def worth_pruning(labels: Sequence[Ids], device: torch.device) -> bool:
    """Tell labels whose tokens take longer than some passes over a few of them."""
    tokens = len({label[:i] for label in labels for i in range(1, len(label))})
    return tokens >= WORTH.get(device.type, WORTH_ELSEWHERE)


def likeliest_labels(
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
) -> NDArray[np.int64]:
    """Find the label that :func:`~llmfit.scoring.score_labels` scores highest behind every prompt.

    Parameters are those of that function.

    Returns
    -------
    ndarray of shape (n,)
        Positions in `labels`.
    """
    in_full = partial(
        scoring.score_labels, device=device, pad_id=pad_id, start_ids=start_ids, batch_tokens=batch_tokens
    )
    begun = common_prefix(labels)  # says nothing of which label it is
    times = Counter(tuple(prompt) + labels[0][:begun] for prompt in prompts)
    rows = [Encoded(prompt) for prompt in times]
    trie = make_trie([label[begun:] for label in labels])
    through = [row._replace(completion=max(labels, key=len)[begun:]) for row in rows]
    shared = packable(model, through, pad_id=pad_id, device=device, start_ids=start_ids)
    few = len(labels) < 2 or len(rows) * len(trie.tokens) < LEAST.get(device.type, LEAST_ELSEWHERE)
    many = len(trie.following) * max(map(len, trie.following)) > MOST_CELLS
    if few or many or shared is None or not goes_behind(model, pad_id=pad_id, device=device):
        scores = in_full(model, prompts, labels, said=said, progress=progress)
        return np.asarray(scores.argmax(axis=1))
    best = np.full(len(rows), -1)
    budget, margin = auto_budget(batch_tokens, device), MARGINS[number_bytes(model)]
    work = partial(_answer, model, _Nodes(trie), margin, budget, device=device, pad_id=pad_id)
    tried, saved, sample = 0, 0.0, min(max(TRIED, len(rows) // ONE_IN), MOST_TRIED)
    with packed(model):
        for positions, (found, left_out) in _in_parts(rows, shared, budget, work, sample):
            best[positions] = found
            progress(sum(times[rows[i].prompt] for i in positions if best[i] >= 0))
            tried, saved = tried + len(positions), saved + left_out * len(positions)
            if tried >= sample and saved < SAVED * tried:
                break  # all labels are as likely here: the other rows have them scored in one pass
    undecided = np.nonzero(best < 0)[0]
    if len(undecided):
        asked = [rows[i].prompt[: len(rows[i].prompt) - begun] for i in undecided]
        best[undecided] = in_full(model, asked, labels).argmax(axis=1)
        progress(sum(times[rows[i].prompt] for i in undecided))
    place = {row.prompt: i for i, row in enumerate(rows)}
    return best[[place[tuple(prompt) + labels[0][:begun]] for prompt in prompts]]


def _in_parts(
    rows: Sequence[Encoded], shared: int, budget: int, work: Callable[..., Answered], sample: int
) -> Iterator[tuple[list[int], Answered]]:
    """Answer rows by what they begin with, which is read once."""
    for some, begun in by_beginning([row.prompt for row in rows], shared, budget):
        alike = [rows[i] for i in some]
        batches, sample = _some_first(length_batches(alike, budget, begun, kept=True), sample), 0
        for here, answered in scoring.run_batches(alike, batches, partial(work, shared=begun, kept=KeptBeginning())):
            yield [some[i] for i in here], answered


def _some_first(batches: Iterator[list[int]], sample: int) -> Iterator[list[int]]:
    """Part the first batch, so that it begins with as many rows as a sample has, taken throughout it."""
    first = next(batches, [])
    every = set(first[:: max(1, len(first) // sample)][:sample]) if sample else set()
    yield from (some for some in ([i for i in first if i in every], [i for i in first if i not in every]) if some)
    yield from batches


@torch.inference_mode()
def _answer(
    model: Any,
    nodes: _Nodes,
    margin: float,
    budget: int,
    rows: list[Encoded],
    *,
    shared: int,
    kept: KeptBeginning,
    device: torch.device,
    pad_id: int,
) -> Answered:
    """Find the likeliest label of some rows, -1 where it is not clear: one pass for all, and some over few tokens.

    What is read stays, so that it may be as many tokens as a pass may have and no more; rows that would need others
    are not clear. Given with the share of the labels' tokens that was left out, none where it is not clear.
    """
    search, trie = _Search(nodes, len(rows), margin), nodes.trie
    prompts = [row.prompt for row in rows]
    with kept.whole():
        states, words, layout = read_rows(model, prompts, pad_id=pad_id, device=device, shared=shared, kept=kept)
    first = choices(words, states[:, None], trie.following[:1])  # (R, 1, C)
    search.learn(np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64), first[:, 0])
    while wanted := search.wanted():
        if int(search.read[:, 1:].sum()) + sum(len(own) for _, own in wanted) > budget:
            break
        for part in _parts(wanted, budget):
            _read_on(model, layout, trie, search, part, pad_id)
    best = search.best()
    best[[row for row, _ in wanted]] = -1
    return best, 1 - float(search.read.mean(axis=1).clip(min=best < 0).mean())


def _read_on(
    model: Any, layout: Layout, trie: Trie, search: _Search, part: Sequence[tuple[int, list[int]]], pad_id: int
) -> None:
    """Read some nodes behind some rows, and learn what follows them."""
    branches = [search.branch(row, nodes) for row, nodes in part]
    states, words, places = go_behind(model, layout, [row for row, _ in part], branches, pad_id)
    rows, nodes = np.array([(row, node) for row, own in part for node in own]).T
    for (row, own), place in zip(part, places, strict=True):
        search.places[row, own] = place + np.arange(len(own))
    said = choices(words, states[None], [trie.following[node] for node in nodes])[0]  # (N, C)
    search.learn(rows, nodes, said)


def _parts(wanted: Sequence[tuple[int, list[int]]], budget: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Part rows into passes within the budget, those with like many tokens together."""
    part: list[tuple[int, list[int]]] = []
    taken = 0
    for row, nodes in sorted(wanted, key=lambda one: -len(one[1])):
        if part and taken + len(nodes) > budget:
            yield part
            part, taken = [], 0
        part.append((row, nodes))
        taken += len(nodes)
    yield part


class _Nodes:
    """The beginnings of labels, and where they stand to one another.

    A node is a beginning of labels: 0 is the empty one, i the one that ends with the trie's token i - 1.

    Parameters
    ----------
    trie : Trie
    """

    def __init__(self, trie: Trie) -> None:
        self.trie = trie
        nodes, width = len(trie.following), max(map(len, trie.following))
        self.depths = np.array([0, *(depth + 1 for depth in trie.tree.depths)])
        self.ends = np.array([nodes, *(end + 1 for end in trie.tree.ends)])
        self.goes_on, self.is_label = (np.full((nodes, width), -1) for _ in range(2))
        for k, path in enumerate(trie.paths):
            self.is_label[path[-1]] = k
            for (node, slot), (after, _) in pairwise(path):
                self.goes_on[node, slot] = after
        self.above: list[tuple[int, ...]] = [()]  # of each node, all before it but the empty one
        line: list[int] = []
        for node in range(1, nodes):
            del line[self.depths[node] - 1 :]
            self.above.append(tuple(line))
            line.append(node)
        self.lines = [self._line(node) for node in range(nodes)]

    def _line(self, node: int) -> list[int]:
        """Give a node, and what alone can follow it, one behind the other."""
        line = [node]
        while len(self.trie.following[line[-1]]) == 1 and self.goes_on[line[-1], 0] > 0:
            line.append(int(self.goes_on[line[-1], 0]))
        return line


class _Search:
    """What is known of the labels behind some rows, and what is to be read next.

    Parameters
    ----------
    nodes : _Nodes
    count : int
        Of rows.
    margin : float
        Nats that a label must be likelier by.
    """

    def __init__(self, nodes: _Nodes, count: int, margin: float) -> None:
        self.nodes, self.margin = nodes, margin
        number = len(nodes.depths)
        self.scores = np.full((count, number), -np.inf)  # of each node that is known
        self.scores[:, 0] = 0.0
        self.labels = np.full((count, len(nodes.trie.paths)), -np.inf)
        self.read = np.zeros((count, number), dtype=bool)
        self.places = np.zeros((count, number), dtype=np.int64)  # where each was read

    def learn(self, rows: NDArray[np.int64], nodes: NDArray[np.int64], log_probs: torch.Tensor) -> None:
        """Take what follows some nodes, (N, C); a node comes behind the one before it."""
        said = log_probs.cpu().double().numpy()
        for depth in np.unique(self.nodes.depths[nodes]):
            here = self.nodes.depths[nodes] == depth
            row, node = rows[here], nodes[here]
            total = self.scores[row, node][:, None] + said[here, : self.nodes.goes_on.shape[1]]
            for table, known in ((self.nodes.goes_on[node], self.scores), (self.nodes.is_label[node], self.labels)):
                i, slot = np.nonzero(table[:, : total.shape[1]] >= 0)
                known[row[i], table[i, slot]] = total[i, slot]
        self.read[rows, nodes] = True

    def wanted(self) -> list[tuple[int, list[int]]]:
        """Say which nodes to read behind which rows.

        Until a label is known in full, the likeliest one and what alone can follow it; then each that may lead to a
        likelier label. All that goes on from these where that is not much.
        """
        best = self.labels.max(axis=1)
        open_ = np.where(self.read, -np.inf, self.scores)
        alive = open_ > (best - self.margin)[:, None]
        wanted = []
        for row in np.nonzero(alive.any(axis=1))[0]:
            nodes = np.nonzero(alive[row])[0] if np.isfinite(best[row]) else self.nodes.lines[int(open_[row].argmax())]
            wanted.append((int(row), [int(node) for node in nodes]))
        whole = [
            (row, sorted({n for node in nodes for n in range(node, self.nodes.ends[node])})) for row, nodes in wanted
        ]
        return whole if sum(len(nodes) for _, nodes in whole) <= AT_ONCE else wanted

    def branch(self, row: int, nodes: Sequence[int]) -> Branch:
        """Put nodes, in order, together as what goes on from a row."""
        depths = tuple(int(self.nodes.depths[node]) - 1 for node in nodes)
        ends = tuple(bisect_left(nodes, int(self.nodes.ends[node])) for node in nodes)
        sees = tuple(
            tuple(int(self.places[row, other]) for other in self.nodes.above[node] if self.read[row, other])
            for node in nodes
        )
        return Branch(tuple(self.nodes.trie.tokens[node - 1] for node in nodes), Tree(depths, ends), sees)

    def best(self) -> NDArray[np.int64]:
        """Give each row's likeliest label, -1 where another one is as good."""
        second, first = np.partition(self.labels, -2, axis=1)[:, -2:].T
        with np.errstate(invalid="ignore"):  # of scores that are no numbers nothing is clear
            return np.where(first - second > self.margin, self.labels.argmax(axis=1), -1)
