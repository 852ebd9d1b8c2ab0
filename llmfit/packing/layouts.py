"""Where the tokens of packed rows stand, which of them sees which, and how many all rows begin with.

Takes lengths of rows and trees of answers; gives a :class:`Layout`. Knows tensors of places and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

from llmfit.batching import PAD_STEP
from llmfit.encoding import Ids

__all__ = ["Group", "Layout", "Layouts", "Tree", "common_prefix", "lay_out"]

SCORES = 2**21  # numbers of one product of queries and keys: what a cache holds


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Count the tokens that all sequences begin with, each keeping one of its own.

    Examples
    --------
    >>> common_prefix([(5, 6, 7), (5, 6, 8, 9)]), common_prefix([(5, 6), (5, 6)])
    (2, 1)
    """
    if not sequences:
        return 0
    first, last = min(sequences), max(sequences)
    shared = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return max(0, min(shared, *(len(sequence) - 1 for sequence in sequences)))


class Tree(NamedTuple):
    """Answers behind a row, tokens that they begin alike with standing once.

    Parameters
    ----------
    depths : tuple of int
        How many of the answer's tokens stand before each.
    ends : tuple of int
        Behind which place each token is seen no more: the tokens from its own place to there go on from it.
    """

    depths: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class Group(NamedTuple):
    """Rows of like length, padded to one width inside the attention; `shared`: they see the shared beginning."""

    rows: int
    width: int
    shared: bool
    visible: torch.Tensor  # (T, T), or (B, T, T) with trees: which key a query sees


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence belong.

    Attributes
    ----------
    length : int
        Tokens of the sequence, padding at its end included: one token of padding at least.
    shared : int
        Tokens that all rows begin with.
    starts, own : tuple of int
        Where each row's own tokens begin in the sequence, and how many they are, a tree aside.
    longest : int
        Tokens of the longest row, with all before it.
    positions : Tensor of shape (1, length)
        Of each token in its own row.
    take : Tensor of shape (M,)
        Place in the sequence of every place of the groups, the last one aside from them.
    put : Tensor of shape (length,)
        Place among those of every token of the sequence.
    kept : dict of int to (Tensor, Tensor), or None
        A layer's keys and values of the shared beginning. An empty one is filled; a filled one stands for the tokens,
        which are then not in the sequence. None where the beginning is computed in each pass, with gradients.
    met : set of int
        Layers that have attended by this layout.
    """

    length: int
    shared: int
    starts: tuple[int, ...]
    own: tuple[int, ...]
    longest: int
    positions: torch.Tensor
    take: torch.Tensor
    put: torch.Tensor
    groups: tuple[Group, ...]
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    met: set[int] = field(default_factory=set)

    @property
    def inline(self) -> bool:
        """Whether the shared tokens are in the sequence."""
        return self.shared > 0 and not self.groups[0].shared

    def ids(self, rows: Sequence[Ids], pad_id: int) -> torch.Tensor:
        """Write rows, each with what all begin with and a tree behind it, into the sequence: (1, length)."""
        ids = torch.full((1, self.length), pad_id)
        if self.inline:
            ids[0, : self.shared] = torch.tensor(rows[0][: self.shared])
        for row, start in zip(rows, self.starts, strict=True):
            ids[0, start : start + len(row) - self.shared] = torch.tensor(row[self.shared :])
        return ids


class Layouts(NamedTuple):
    """Packed sequences behind one another, each of which sees itself alone."""

    parts: tuple[Layout, ...]

    @property
    def positions(self) -> torch.Tensor:
        """Of each token in its own row: (1, length of all)."""
        return torch.cat([part.positions for part in self.parts], dim=1)


def lay_out(
    lengths: Sequence[int],
    shared: int,
    device: torch.device,
    *,
    tree: Tree | None = None,
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Layout:
    """Lay rows out behind one another.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row behind the shared beginning; at least one.
    shared : int
    device : torch.device
    tree : Tree or None
        Stands behind every row.
    kept : dict or None
        See :class:`Layout`.
    """
    tree = tree or Tree()
    inline = 0 if kept else shared
    totals = [length + len(tree.depths) for length in lengths]
    starts, end = [], inline
    for total in totals:
        starts.append(end)
        end += total
    length = -(-(end + 1) // PAD_STEP) * PAD_STEP
    positions = torch.zeros(length, dtype=torch.long)
    positions[:inline] = torch.arange(inline)
    for start, own in zip(starts, lengths, strict=True):
        positions[start : start + own] = torch.arange(shared, shared + own)
        behind = torch.tensor(tree.depths, dtype=torch.long) + shared + own
        positions[start + own : start + own + len(behind)] = behind
    take, groups = _group(totals, lengths, starts, tree, inline, shared)
    places = torch.cat([*take, torch.tensor([-1])])
    places[places < 0] = length - 1
    put = torch.full((length,), len(places) - 1)
    real = places < length - 1
    put[places[real]] = torch.arange(len(places))[real]
    there, take_on, put_on = (tensor.to(device, non_blocking=True) for tensor in (positions[None], places, put))
    groups = [group._replace(visible=group.visible.to(device, non_blocking=True)) for group in groups]
    longest = shared + max(lengths, default=0) + 1 + max(tree.depths, default=-1)
    return Layout(length, shared, tuple(starts), tuple(lengths), longest, there, take_on, put_on, tuple(groups), kept)


def _group(
    totals: Sequence[int], lengths: Sequence[int], starts: Sequence[int], tree: Tree, inline: int, shared: int
) -> tuple[list[torch.Tensor], list[Group]]:
    """Part rows into groups of like length; -1 is a place without a token."""
    take, groups = [], []
    if inline:
        take.append(torch.arange(inline))
        groups.append(Group(1, inline, False, _causal(inline)))
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    for _, alike in groupby(order, key=lambda i: _width_class(totals[i])):
        members = list(alike)
        width = -(-max(totals[i] for i in members) // PAD_STEP) * PAD_STEP
        most = max(1, SCORES // (width * (shared + width)))
        for some in (members[i : i + most] for i in range(0, len(members), most)):
            places = torch.full((len(some), width), -1)
            for row, i in enumerate(some):
                places[row, : totals[i]] = torch.arange(starts[i], starts[i] + totals[i])
            take.append(places.reshape(-1))
            visible = _causal(width)
            if tree.depths:
                until = torch.full((len(some), width), width)
                for row, i in enumerate(some):
                    until[row, lengths[i] : totals[i]] = torch.tensor(tree.ends) + lengths[i]
                visible = visible & (torch.arange(width)[:, None] < until[:, None, :])
            groups.append(Group(len(some), width, shared > 0, visible))
    return take, groups


def _width_class(length: int) -> int:
    """Tell lengths apart by steps, each twice as long as the one before: few products, and padding is cheap there."""
    return (max(length - 1, 0) // PAD_STEP).bit_length()


def _causal(width: int) -> torch.Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()
