"""Labels as trees of tokens: what labels begin alike with stands once.

Takes labels as token ids; gives a :class:`Trie`. Knows neither model nor prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llmfit.encoding import Ids
from llmfit.packing import Tree

__all__ = ["Trie", "make_trie", "tries"]

MOST_TOKENS = 512  # of labels behind a prompt in one pass


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
    asked: dict[Ids, set[int]] = {}
    for label in labels:
        for i, token in enumerate(label):
            asked.setdefault(label[:i], set()).add(token)
    heads = sorted(asked)  # () first, and each before what follows
    slots = {head: {token: slot for slot, token in enumerate(sorted(asked[head]))} for head in heads}
    place = {head: i for i, head in enumerate(heads)}
    paths = tuple(
        tuple((place[label[:i]], slots[label[:i]][token]) for i, token in enumerate(label)) for label in labels
    )
    tree = Tree(tuple(len(head) - 1 for head in heads[1:]), tuple(end - 1 for end in _ends(heads)[1:]))
    return Trie(tuple(head[-1] for head in heads[1:]), tree, tuple(tuple(slots[head]) for head in heads), paths)


def _ends(heads: Sequence[Ids]) -> list[int]:
    """Find where those end, in order, that go on from each."""
    ends, above = [len(heads)] * len(heads), [0]
    for i in range(1, len(heads)):
        while heads[above[-1]] != heads[i][:-1]:
            ends[above.pop()] = i
        above.append(i)
    return ends


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
