"""Where tokens stand that go on from packed rows which were read before, and which of them sees which.

Takes the layout of those rows and a branch of answers for some of them; gives a :class:`Behind`. Where each row goes on
by one token, rows stand side by side instead: :class:`DecodeStep`. Knows tensors of places and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

from llmfit.batching import PAD_STEP
from llmfit.encoding import Ids
from llmfit.packing.layouts import SCORES, Group, KeptBeginning, Layout, Tree, width_class

__all__ = ["Behind", "Branch", "DecodeStep", "Part", "lay_behind"]


class Branch(NamedTuple):
    """Tokens that go on from a row.

    Parameters
    ----------
    tokens : tuple of int, length n
    tree : Tree
        How they stand to one another; depths count from the row's end.
    sees : tuple of n tuples of int
        What each sees of earlier branches: places among all that was read.
    """

    tokens: Ids
    tree: Tree
    sees: tuple[tuple[int, ...], ...]


class Part(NamedTuple):
    """Rows of like length.

    Parameters
    ----------
    queries : Tensor of shape (B * T,)
        Places in the sequence; where a row has fewer, its first again.
    keys : Tensor of shape (B * W,)
        Places among the tokens that were read and, behind them, the sequence's; where a row has fewer, its first again.
    group : Group
        Which of these keys each of these queries sees, (B, T, W).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    group: Group


@dataclass(frozen=True)
class Behind:
    """Where the tokens of a sequence belong that goes on from those before.

    Attributes
    ----------
    before : Layout
        Of the rows. In its `read` stand their keys and values, behind these those of all branches.
    length : int
        Tokens of the sequence, padding at its end included.
    starts : tuple of int
        Where each chosen row's branch begins in the sequence.
    offset : int
        Tokens that were read before.
    positions : Tensor of shape (1, length)
        Of each token in its own row.
    longest : int
        Tokens of the longest row, with all before it.
    parts : tuple of Part
        The rows, to attend within each.
    met : set of int
        Layers that have attended by this layout.
    """

    before: Layout
    length: int
    starts: tuple[int, ...]
    offset: int
    positions: torch.Tensor
    longest: int
    parts: tuple[Part, ...]
    met: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class DecodeStep:
    """One more token behind each of some rows, whose keys and values stand side by side.

    Attributes
    ----------
    before : KeptBeginning
        Of what all of them begin with; empty where that is nothing.
    known : Tensor of bool, of shape (B, W)
        At which places behind it a row has a token, the new one too.
    longest : int
        Tokens that a row may come to.
    """

    before: KeptBeginning
    known: torch.Tensor
    longest: int


def lay_behind(before: Layout, rows: Sequence[int], branches: Sequence[Branch]) -> Behind:
    """Lay a branch of answers behind each of some rows that were read.

    Parameters
    ----------
    before : Layout
        Without a tree, its `read` filled.
    rows : sequence of int
        Positions in it.
    branches : sequence of Branch, as long
    """
    starts, end = [], 0
    for branch in branches:
        starts.append(end)
        end += len(branch.tokens)
    length = -(-(end + 1) // PAD_STEP) * PAD_STEP
    positions = torch.zeros(length, dtype=torch.long)
    for row, start, branch in zip(rows, starts, branches, strict=True):
        depths = torch.tensor(branch.tree.depths)
        positions[start : start + len(depths)] = depths + before.shared + before.own[row]
    longest = int(positions.max()) + 1
    offset = len(next(iter((before.read or {}).values()))[0])
    device = before.positions.device
    parts = tuple(_parts(before, rows, [offset + start for start in starts], branches, offset, device))
    return Behind(before, length, tuple(starts), offset, positions[None].to(device), longest, parts)


def _parts(
    before: Layout,
    rows: Sequence[int],
    places: Sequence[int],
    branches: Sequence[Branch],
    offset: int,
    device: torch.device,
) -> Iterator[Part]:
    """Part rows into groups of like length; `places` are those of each branch's first token."""
    own = [before.own[row] for row in rows]
    seen = [sorted({place for each in branch.sees for place in each}) for branch in branches]
    width = [a + len(b) + len(branch.tokens) for a, b, branch in zip(own, seen, branches, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: width[i])
    for _, alike in groupby(order, key=lambda i: width_class(width[i])):
        members = list(alike)
        wide, deep = max(width[i] for i in members), max(len(branches[i].tokens) for i in members)
        most = max(1, SCORES // (deep * (before.shared + wide)))
        for some in (members[i : i + most] for i in range(0, len(members), most)):
            queries = torch.empty(len(some), deep, dtype=torch.long)
            keys = torch.empty(len(some), wide, dtype=torch.long)
            visible = torch.zeros(len(some), deep, wide, dtype=torch.bool)
            for b, i in enumerate(some):
                first, tokens = before.starts[rows[i]], len(branches[i].tokens)
                queries[b] = places[i] - offset
                queries[b, :tokens] += torch.arange(tokens)
                keys[b] = first
                there = [*range(first, first + own[i]), *seen[i], *range(places[i], places[i] + tokens)]
                keys[b, : width[i]] = torch.tensor(there)
                visible[b, :tokens, : width[i]] = _sees(own[i], seen[i], branches[i])
                visible[b, tokens:] = visible[b, 0]
            group = Group(len(some), deep, before.shared > 0, visible.to(device))
            yield Part(queries.reshape(-1).to(device), keys.reshape(-1).to(device), group)


def _sees(own: int, seen: Sequence[int], branch: Branch) -> torch.Tensor:
    """Tell what each token of a branch sees of its row, of earlier branches and of its own."""
    place, until = torch.arange(len(branch.tokens)), torch.tensor(branch.tree.ends)
    earlier = torch.tensor([[there in each for there in seen] for each in branch.sees], dtype=torch.bool)
    within = (place <= place[:, None]) & (place[:, None] < until)
    return torch.cat([torch.ones(len(place), own, dtype=torch.bool), earlier.view(len(place), -1), within], dim=1)
