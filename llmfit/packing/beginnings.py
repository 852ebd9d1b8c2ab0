"""Rows parted by what they begin with: one that begins otherwise does not end what all others share.

Takes prompts; gives parts of them, and how many tokens the rows of each begin with. What is parted depends on the rows,
on what all of a fit or a prediction begin with, and on the token budget alone. Knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from llmfit.batching import FORWARD_OVERHEAD, PAD_STEP, pack_step, split_step
from llmfit.encoding import Encoded, Ids
from llmfit.packing.layouts import common_prefix

__all__ = ["by_beginning", "cut_step", "extent", "parted"]

OF_A_BUDGET = 32  # one more pass costs this part of it: the larger passes are, the quicker is a device in them
MOST = 512  # tokens that it costs at most, whatever the budget


def by_beginning(prompts: Sequence[Ids], least: int, budget: int) -> list[tuple[list[int], int]]:
    """Part rows by what they begin with, so that the fewest tokens are computed.

    A part costs its beginning once more, and one more pass. Where all rows begin alike, they are one part.

    Parameters
    ----------
    prompts : sequence of tuple of int, length n
    least : int
        Tokens that all of them begin with, and all other rows of a fit. Less than a step of padding beyond that is not
        worth another shape, of which libraries keep a kernel each.
    budget : int
        Tokens of a pass.

    Returns
    -------
    list of (list of int, int)
        Positions into `prompts`, each in one part, and how many tokens the part's prompts begin with, each having more.

    Examples
    --------
    >>> long, other = tuple(range(900)), tuple(range(500, 1400))
    >>> by_beginning([(*long, 1), (*other, 2), (*long, 3)], least=0, budget=4096)
    [([1], 0), ([0, 2], 900)]
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    alike = [_alike(prompts[i], prompts[j], least) for i, j in pairwise(order)]
    base = _counted(min(alike, default=least), least)
    alike = [_counted(tokens, base) for tokens in alike]
    if max(alike, default=base) == base:
        return [(list(range(len(prompts))), base)]
    depths, parents, holders = _tree(alike, base)
    chosen = _choose(depths, parents, holders, min(max(FORWARD_OVERHEAD, budget // OF_A_BUDGET), MOST))
    parts: dict[int, list[int]] = {}
    for i, holder in zip(order, holders, strict=True):
        parts.setdefault(chosen[holder], []).append(i)
    return [(sorted(some), _shared([prompts[i] for i in some], depths[place])) for place, some in sorted(parts.items())]


def _alike(one: Ids, other: Ids, least: int) -> int:
    """Count the tokens that two begin with, each keeping one of its own; `least` are known to be alike."""
    most = min(len(one), len(other)) - 1
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(least, most) if one[i] != other[i])


def _counted(tokens: int, least: int) -> int:
    return tokens if tokens - least >= PAD_STEP else least


def _shared(prompts: Sequence[Ids], least: int) -> int:
    """Count what a part begins with: more than was known, where rows that had less are gone."""
    return _counted(common_prefix(prompts), least) if len(prompts) > 1 else least


def _tree(alike: Sequence[int], base: int) -> tuple[list[int], list[int], list[int]]:
    """Find the beginnings that sorted rows share.

    Parameters
    ----------
    alike : sequence of int, length n - 1
        Tokens that each row has in common with the next.
    base : int
        Tokens that all have in common: the first beginning, which all others go on from.

    Returns
    -------
    list of int
        Tokens of each beginning.
    list of int
        The one that each goes on from.
    list of int, length n
        The longest that each row has.
    """
    depths, parents, holders, above = [base], [0], [], [0]
    for left, right in pairwise([base, *alike, base]):
        last = 0
        while depths[above[-1]] > left:
            last = above.pop()
        if depths[above[-1]] < left:  # what was left goes on from it too
            parents[last] = len(depths)
        for tokens in (left, right):
            if depths[above[-1]] < tokens:
                parents.append(above[-1])
                depths.append(tokens)
                above.append(len(depths) - 1)
        holders.append(above[-1])
    return depths, parents, holders


def _choose(depths: Sequence[int], parents: Sequence[int], holders: Sequence[int], cost: int) -> list[int]:
    """Choose beginnings that parts are made of; give for each the one whose part its rows go into.

    The rows of a beginning save so many tokens each, in a part of their own or in that of one before it: what is the
    most in all is counted from the longest on, for each that could be the last one chosen before.
    """
    own, after = Counter(holders), sorted(range(1, len(depths)), key=depths.__getitem__)
    before: dict[int, list[int]] = {0: []}
    for place in after:
        before[place] = [parents[place], *before[parents[place]]]
    saved = {place: {a: own[place] * depths[a] for a in (place, *some)} for place, some in before.items()}
    alone = {}
    for place in reversed(after):
        alone[place] = saved[place][place] - depths[place] - cost
        for a in before[place]:
            saved[parents[place]][a] += max(alone[place], saved[place][a])
    chosen = [0] * len(depths)
    for place in after:
        there = chosen[parents[place]]
        chosen[place] = place if alone[place] > saved[place][there] else there
    return chosen


def parted(rows: Sequence[Encoded], shared: int | None, budget: int) -> list[tuple[list[int], int | None]]:
    """Part rows that are packed by what they begin with, as :func:`by_beginning`; padded ones are one part."""
    if shared is None:
        return [(list(range(len(rows))), None)]
    return [*by_beginning([row.prompt for row in rows], shared, budget)]


def cut_step(rows: Sequence[Encoded], shared: int | None, budget: int) -> list[tuple[list[Encoded], int | None]]:
    """Part the rows of one optimiser step into micro-batches.

    Parameters
    ----------
    rows : sequence of Encoded
    shared : int or None
        Tokens that all rows of the fit begin with; None where rows are padded.
    budget : int

    Returns
    -------
    list of (list of Encoded, int or None)
        Rows, and how many tokens these begin with.
    """
    cut: list[tuple[list[Encoded], int | None]] = []
    for positions, begun in parted(rows, shared, budget):
        some = [rows[i] for i in positions]
        lengths = [row.length for row in some]
        batches = split_step(lengths, budget) if begun is None else pack_step(lengths, begun, budget)
        cut += [([some[i] for i in batch], begun) for batch in batches]
    return cut


def extent(rows: Sequence[Encoded], shared: int | None, budget: int) -> tuple[int, int]:
    """Count the tokens of a pass without a budget, and of the largest budget whose passes hold one row each."""
    most = max(row.length for row in rows)
    if shared is None:
        return len(rows) * most, most
    together, least = 0, most
    for positions, begun in by_beginning([row.prompt for row in rows], shared, budget):
        lengths = [rows[i].length for i in positions]
        together = max(together, begun + sum(length - begun for length in lengths))
        least = min(least, max(lengths), 2 * (max(lengths) - begun) + 1)
    return together, least
