"""Where the tokens of packed rows stand, which of them sees which, and how many all rows begin with.

Takes lengths of rows and trees of answers; gives a :class:`Layout`. Knows tensors of places and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch.nn import functional

from llmfit.batching import PAD_STEP
from llmfit.encoding import Ids

__all__ = ["Group", "KeptBeginning", "Layout", "Layouts", "Tree", "common_prefix", "lay_out"]

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


class KeptBeginning(dict[int, tuple[torch.Tensor, torch.Tensor]]):
    """A layer's keys and values of what all rows begin with: by the layer's place, (heads, tokens, D) each.

    Attributes
    ----------
    summed : Tensor of shape (H,) or None
        Hidden states of those tokens, added up, where a head takes a mean.
    """

    summed: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget all of it."""
        super().clear()
        self.summed = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Forget all of it where the pass that fills it fails, before all layers have theirs."""
        filled = bool(self)
        try:
            yield
        except BaseException:
            if not filled:
                self.clear()
            raise


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


class Groups(NamedTuple):
    """The rows in groups, to attend within each.

    Parameters
    ----------
    take : Tensor of shape (M,)
        Place in the sequence of every place of the groups, the last one aside from them.
    put : Tensor of shape (length,)
        Place among those of every token of the sequence.
    each : tuple of Group
    """

    take: torch.Tensor
    put: torch.Tensor
    each: tuple[Group, ...]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence belong.

    Attributes
    ----------
    length : int
        Tokens of the sequence, padding at its end included: one token of padding at least.
    shared : int
        Tokens that all rows begin with.
    inline : bool
        Whether the shared tokens are in the sequence.
    starts, own : tuple of int
        Where each row's own tokens begin in the sequence, and how many they are, a tree aside.
    tree : Tree
        What stands behind every row.
    positions : Tensor of shape (1, length)
        Of each token in its own row.
    kept : KeptBeginning or None
        Of the shared beginning. An empty one is filled; a filled one stands for the tokens, which are then not in the
        sequence. None where the beginning is computed in each pass, with gradients.
    read : dict of int to (Tensor, Tensor), or None
        A layer's keys and values of the whole sequence, (length, heads, D), where more is to go on from its rows.
        Filled by a pass.
    met : set of int
        Layers that have attended by this layout.
    """

    length: int
    shared: int
    inline: bool
    starts: tuple[int, ...]
    own: tuple[int, ...]
    tree: Tree
    positions: torch.Tensor
    kept: KeptBeginning | None = None
    read: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    met: set[int] = field(default_factory=set)
    _masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with all before it."""
        return self.shared + max(self.own, default=0) + 1 + max(self.tree.depths, default=-1)

    @property
    def seen(self) -> int:
        """Tokens that are seen: those of the sequence, and the shared ones where they stand before it."""
        return self.length if self.inline else self.shared + self.length

    def ids(self, rows: Sequence[Ids], pad_id: int) -> torch.Tensor:
        """Write rows, each with what all begin with and a tree behind it, into the sequence: (1, length)."""
        ids = torch.full((1, self.length), pad_id)
        if self.inline:
            ids[0, : self.shared] = torch.tensor(rows[0][: self.shared])
        for row, start in zip(rows, self.starts, strict=True):
            ids[0, start : start + len(row) - self.shared] = torch.tensor(row[self.shared :])
        return ids

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Make what is added to the scores of all pairs of tokens, (length, seen): -inf where one is not seen."""
        if dtype not in self._masks:
            wide = -(-self.seen // PAD_STEP) * PAD_STEP  # rows of kernels begin at multiples
            mask = torch.full((self.length, wide), -torch.inf, dtype=dtype, device=self.positions.device)
            self._masks[dtype] = mask[:, : self.seen].masked_fill_(self._visible(), 0)
        return self._masks[dtype]

    def _visible(self) -> torch.Tensor:
        """Tell which token sees which: (length, seen)."""
        owner, until = torch.full((self.length,), -1), torch.full((self.length,), self.length)
        for row, (start, own) in enumerate(zip(self.starts, self.own, strict=True)):
            answer = start + own
            owner[start : answer + len(self.tree.ends)] = row
            until[answer : answer + len(self.tree.ends)] = torch.tensor(self.tree.ends) + answer
        owner, until = (x.to(self.positions.device, non_blocking=True) for x in (owner, until))
        place = torch.arange(self.length, device=owner.device)
        causal = place <= place[:, None]
        sees = causal & (owner == owner[:, None]) & (place[:, None] < until)
        if self.inline:
            return sees | (causal & (place < self.shared))
        return functional.pad(sees, (self.shared, 0), value=True)

    @cached_property
    def groups(self) -> Groups:
        """The rows in groups of like length."""
        totals = [own + len(self.tree.depths) for own in self.own]
        inline = self.shared if self.inline else 0
        take, groups = _group(totals, self.own, self.starts, self.tree, inline, self.shared)
        places = torch.cat([*take, torch.tensor([-1])])
        places[places < 0] = self.length - 1
        put = torch.full((self.length,), len(places) - 1)
        real = places < self.length - 1
        put[places[real]] = torch.arange(len(places))[real]
        device = self.positions.device
        each = (group._replace(visible=group.visible.to(device, non_blocking=True)) for group in groups)
        return Groups(places.to(device, non_blocking=True), put.to(device, non_blocking=True), tuple(each))


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
    kept: KeptBeginning | None = None,
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
    kept : KeptBeginning or None
        See :class:`Layout`.
    """
    tree = tree or Tree()
    inline = shared > 0 and not kept
    starts, end = [], shared if inline else 0
    for own in lengths:
        starts.append(end)
        end += own + len(tree.depths)
    length = -(-(end + 1) // PAD_STEP) * PAD_STEP
    positions = torch.zeros(length, dtype=torch.long)
    if inline:
        positions[:shared] = torch.arange(shared)
    for start, own in zip(starts, lengths, strict=True):
        positions[start : start + own] = torch.arange(shared, shared + own)
        behind = torch.tensor(tree.depths, dtype=torch.long) + shared + own
        positions[start + own : start + own + len(behind)] = behind
    there = positions[None].to(device, non_blocking=True)
    return Layout(length, shared, inline, tuple(starts), tuple(lengths), tree, there, kept)


def _group(
    totals: Sequence[int], lengths: Sequence[int], starts: Sequence[int], tree: Tree, inline: int, shared: int
) -> tuple[list[torch.Tensor], list[Group]]:
    """Part rows into groups of like length; -1 is a place without a token."""
    take, groups = [], []
    if inline:
        take.append(torch.arange(inline))
        groups.append(Group(1, inline, False, _causal(inline)))
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    for _, alike in groupby(order, key=lambda i: width_class(totals[i])):
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


def width_class(length: int) -> int:
    """Tell lengths apart by steps, each twice as long as the one before: few products, and padding is cheap there."""
    return (max(length - 1, 0) // PAD_STEP).bit_length()


def _causal(width: int) -> torch.Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()
