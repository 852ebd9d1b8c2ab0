"""Which rows go through the network together: order, optimiser steps, micro-batches, padding.

Takes lengths and rows; gives lists of positions and padded integer arrays. Knows neither model nor
pandas. The token budget of a batch is a matter of memory and speed only, never of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmfit.encoding import Encoded

__all__ = ["PAD_STEP", "auto_batch_size", "epoch_order", "length_batches", "pack_step", "pad", "split_step"]

LIKE = 0.8  # rows down to this share of a batch's longest go with it
WORTH_A_PASS = 1024  # tokens from which one more forward pass costs less than padding
FORWARD_OVERHEAD = 128  # tokens' worth of time that one more forward and backward pass costs
PAD_STEP = 16  # widths are multiples of it: libraries keep a kernel for every shape that they have met
AUTO_STEPS = 50  # optimiser steps that an epoch should have, where its rows are enough for them
AUTO_ROWS = (2, 16)  # least and most rows of a step


def auto_batch_size(n_rows: int) -> int:
    """Rows per optimiser step where the user leaves it open.

    A model needs some tens of steps to learn the form of an answer before it learns which answer: what few rows there
    are go into many small steps.

    Examples
    --------
    >>> [auto_batch_size(n_rows) for n_rows in (40, 400, 10_000)]
    [2, 8, 16]
    """
    least, most = AUTO_ROWS
    return max(least, min(most, n_rows // AUTO_STEPS))


@lru_cache(maxsize=16)  # fits side by side
def epoch_order(n_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle rows for an epoch, from seed and epoch alone, so that training can be resumed anywhere."""
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    order.flags.writeable = False
    return order


def split_step(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Part the rows of one optimiser step into micro-batches that cost least.

    A micro-batch of rows padded to the longest costs ``rows * longest`` tokens and a fixed overhead. Rows are
    taken by length, and the cheapest way to cut that sequence is found by dynamic programming.

    Parameters
    ----------
    lengths : sequence of int, length n
    budget : int
        Padded tokens of a micro-batch; a row longer than that goes alone.

    Returns
    -------
    list of list of int
        Positions into `lengths`; each stands in just one micro-batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    best: list[tuple[int, int]] = [(0, 0)]  # (cost of the first `stop` rows, where their last batch starts)
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        starts = [s for s in range(stop) if s == stop - 1 or (stop - s) * longest <= budget]
        best.append(min((best[s][0] + (stop - s) * longest + FORWARD_OVERHEAD, s) for s in starts))
    batches, stop = [], len(order)
    while stop:
        start = best[stop][1]
        batches.append(order[start:stop])
        stop = start
    return batches[::-1]


def pack_step(lengths: Sequence[int], shared: int, budget: int) -> list[list[int]]:
    """Part the rows of one optimiser step into packed micro-batches of like size.

    Rows are taken by length, and each goes with those before it where there is room, until they have their share of the
    fewest micro-batches that could hold all of them: a row that no longer fits may make one more.

    Parameters
    ----------
    lengths : sequence of int, length n
    shared : int
        Tokens of each that all begin with, and that stand in each micro-batch once.
    budget : int
        Tokens of a micro-batch; a row longer than that goes alone. Where what all begin with takes more than half, what
        stands behind it takes half all the same.

    Returns
    -------
    list of list of int
        Positions into `lengths`; each stands in just one micro-batch.

    Examples
    --------
    >>> pack_step([60, 50, 70, 55], shared=40, budget=90)
    [[1, 3, 0], [2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    own = [lengths[i] - shared for i in order]
    room = _room(shared, budget)
    fair = sum(own) / math.ceil(sum(own) / room) if sum(own) else room
    batches: list[list[int]] = []
    taken = 0
    for i, length in zip(order, own, strict=True):
        if not batches or taken + length > room or taken >= fair:
            batches.append([])
            taken = 0
        batches[-1].append(i)
        taken += length
    return batches


def _room(shared: int, budget: int) -> int:
    """Count the tokens that may stand behind what rows share.

    However long that is, half of the budget is left: it is computed once a pass, which few rows would not be worth.
    """
    return max(budget - shared, budget // 2, 1)


def length_batches(
    rows: Sequence[Encoded], budget: int, shared: int | None = None, *, kept: bool = False, alike: bool = True
) -> Iterator[list[int]]:
    """Part rows into batches of like length within a budget, longest first.

    A batch that is worth a forward pass ends where rows get much shorter, so that little of it is padding. The order
    depends on the rows' contents alone, so that shuffled rows meet in the same batches. What decoders have said before
    their answers is of one length in a batch: nothing is padded there.

    Parameters
    ----------
    rows : sequence of Encoded, length n
    budget : int
        Tokens of a batch, padding included.
    shared : int or None
        Of rows that are packed, which need not be alike: tokens that all begin with, which stand in a batch once.
    kept : bool
        Whether those stand in the first batch only, whose keys and values serve the others.
    alike : bool
        Whether a batch ends where rows get much shorter; not where padding takes memory alone, and no time.

    Yields
    ------
    list of int
        Positions into `rows`.
    """
    keys = [(len(row.said), -row.length, row.prompt, row.said, row.completion) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    if shared is not None:
        room = _room(shared, budget)
        yield from _fill([rows[i].length - shared for i in order], order, room, budget if kept else room)
        return
    start = 0
    while start < len(order):
        longest = max(rows[order[start]].length, 1)
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * longest <= budget:
            worth = alike and (stop - start) * longest >= WORTH_A_PASS
            if worth and rows[order[stop]].length < LIKE * longest:
                break
            if keys[order[stop]][0] != keys[order[start]][0]:
                break
            stop += 1
        yield order[start:stop]
        start = stop


def _fill(lengths: Sequence[int], order: Sequence[int], first: int, others: int) -> Iterator[list[int]]:
    """Fill batches one after another, with so much room in the first, and in each of the others."""
    batch: list[int] = []
    taken, room = 0, first
    for i, length in zip(order, lengths, strict=True):
        if batch and taken + length > room:
            yield batch
            batch, taken, room = [], 0, others
        batch.append(i)
        taken += length
    if batch:
        yield batch


def pad(
    rows: Sequence[Sequence[int]], value: int, *, left: bool = False, step: int = PAD_STEP
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows of ids to the longest, rounded up to a multiple of `step`.

    Returns
    -------
    ids : ndarray of shape (n_rows, width)
    mask : ndarray of shape (n_rows, width)
        1 where there is a token.
    """
    width = -(-max(map(len, rows), default=0) // step) * step
    ids = np.full((len(rows), width), value, dtype=np.int64)  # (B, T)
    mask = np.zeros((len(rows), width), dtype=np.int64)  # (B, T)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask
