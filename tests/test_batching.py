"""Batching: every row goes through once, within the budget, at the least cost, whatever the order of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmfit.batching import (
    FORWARD_OVERHEAD,
    auto_batch_size,
    epoch_order,
    length_batches,
    pack_step,
    pad,
    split_step,
)
from llmfit.encoding import Encoded

quick = examples(max_examples=150, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 400), max_size=30)
BUDGETS = st.integers(1, 3000)


def cost(batches: list[list[int]], lengths: list[int]) -> int:
    """Padded tokens, and an overhead a batch."""
    return sum(len(batch) * max(lengths[i] for i in batch) + FORWARD_OVERHEAD for batch in batches)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to part items into batches, in any order."""
    if not items:
        yield []
        return
    first, *others = items
    for rest in partitions(others):
        yield [[first], *rest]
        for i, batch in enumerate(rest):
            yield [*rest[:i], [first, *batch], *rest[i + 1 :]]


def fits(batch: list[int], lengths: list[int], budget: int) -> bool:
    return len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


# --- split_step -----------------------------------------------------------------------------------------


@quick
@given(LENGTHS, BUDGETS)
def test_a_step_is_parted_into_batches_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = split_step(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    assert all(fits(batch, lengths, budget) for batch in batches)


@quick
@given(st.lists(st.integers(0, 400), max_size=6), BUDGETS)
def test_no_other_parting_of_a_step_costs_less(lengths: list[int], budget: int) -> None:
    allowed = (
        cost(parting, lengths)
        for parting in partitions(list(range(len(lengths))))
        if all(fits(batch, lengths, budget) for batch in parting)
    )
    assert cost(split_step(lengths, budget), lengths) == min(allowed)


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [
        ([], 100, []),
        ([500], 100, [[0]]),
        ([10, 10, 10], 1000, [[0, 1, 2]]),
        ([10, 10, 10], 20, [[0], [1, 2]]),
        ([300, 10, 300, 10], 4000, [[1, 3], [0, 2]]),
        ([140, 10], 4000, [[1], [0]]),
        ([138, 10], 4000, [[1, 0]]),
    ],
)
def test_steps_worked_out_by_hand(lengths: list[int], budget: int, batches: list[list[int]]) -> None:
    got = split_step(lengths, budget)
    assert cost(got, lengths) == cost(batches, lengths)
    assert sorted(map(sorted, got)) == sorted(map(sorted, batches)) or len(set(lengths)) < 2


# --- pack_step ------------------------------------------------------------------------------------------

SHARED = st.integers(0, 300)


def room(shared: int, budget: int) -> int:
    """Tokens behind what rows share: the rest of the budget, half of it at least."""
    return max(budget - shared, budget // 2, 1)


@quick
@given(st.lists(st.integers(1, 400), max_size=30), SHARED, BUDGETS)
def test_a_packed_step_is_parted_within_the_budget(own: list[int], shared: int, budget: int) -> None:
    lengths = [shared + n for n in own]
    batches = pack_step(lengths, shared, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(own)))
    assert all(batches)
    assert all(len(batch) == 1 or sum(own[i] for i in batch) <= room(shared, budget) for batch in batches)
    flat = [own[i] for batch in batches for i in batch]
    assert flat == sorted(flat)
    assert len(batches) <= len(own)
    if sum(own) <= room(shared, budget):
        assert len(batches) <= 1


@pytest.mark.parametrize(
    ("lengths", "shared", "budget", "batches"),
    [
        ([], 0, 100, []),
        ([1, 2, 3, 4], 0, 5, [[0, 1], [2], [3]]),  # two would do
        ([10, 10, 10, 10], 0, 20, [[0, 1], [2, 3]]),
        ([5010, 5020, 5010, 5030], 5000, 4096, [[0, 2, 1, 3]]),
        ([1, 2000, 3], 0, 10, [[0, 2], [1]]),
    ],
)
def test_packed_steps_worked_out_by_hand(lengths, shared, budget, batches) -> None:
    assert pack_step(lengths, shared, budget) == batches


# --- length_batches -------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 2), max_size=12).map(tuple)
ROWS = st.lists(st.tuples(IDS, IDS).map(lambda pair: Encoded(pair[0], pair[1][:3])), max_size=25)
MANY = st.lists(st.integers(1, 600).map(lambda n: Encoded((7,) * n)), max_size=25)


@quick
@given(ROWS | MANY, BUDGETS)
def test_rows_are_parted_into_batches_within_the_budget_longest_first(rows: list[Encoded], budget: int) -> None:
    batches = list(length_batches(rows, budget))
    lengths = [row.length for row in rows]
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert all(batches)
    assert all(fits(batch, [max(n, 1) for n in lengths], budget) for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)


@quick
@given(ROWS | MANY, BUDGETS, st.randoms(use_true_random=False))
def test_shuffled_rows_meet_in_the_same_batches(rows: list[Encoded], budget: int, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert [[shuffled[i] for i in batch] for batch in length_batches(shuffled, budget)] == [
        [rows[i] for i in batch] for batch in length_batches(rows, budget)
    ]


def test_rows_that_differ_in_the_answer_alone_have_an_order_too() -> None:
    rows = [Encoded((7, 7), (i,)) for i in (2, 0, 3, 1)]
    assert [[rows[i].completion for i in batch] for batch in length_batches(rows, 6)] == [
        [(0,), (1,)],
        [(2,), (3,)],
    ]


@pytest.mark.parametrize("budget", [40, 100, 4096])
def test_the_place_and_weight_of_a_row_do_not_choose_its_batch(budget: int) -> None:
    rows = [Encoded((i % 3, *(9,) * (i % 5)), (1,), row=i, weight=1.0 + i) for i in range(20)]
    turned = [row._replace(row=99 - row.row, weight=1 / row.weight) for row in rows]
    assert list(length_batches(rows, budget)) == list(length_batches(turned, budget))


def test_a_batch_worth_a_pass_ends_where_rows_get_much_shorter() -> None:
    rows = [Encoded((0,) * n) for n in (512, 500, 420, 100, 100)]
    assert [[rows[i].length for i in batch] for batch in length_batches(rows, 10**6)] == [[512, 500, 420], [100, 100]]
    short = [Encoded((0,) * n) for n in (60, 50, 5, 4)]
    assert [sorted(batch) for batch in length_batches(short, 10**6)] == [[0, 1, 2, 3]]


def test_a_full_budget_is_used_to_the_last_token() -> None:
    rows = [Encoded((i,) * 10) for i in range(6)]
    assert [len(batch) for batch in length_batches(rows, 30)] == [3, 3]
    assert [len(batch) for batch in length_batches(rows, 29)] == [2, 2, 2]
    assert [len(batch) for batch in length_batches(rows, 5)] == [1] * 6


@quick
@given(MANY, SHARED, BUDGETS, st.booleans())
def test_packed_rows_are_parted_within_the_budget_longest_first(
    own: list[Encoded], shared: int, budget: int, kept: bool
) -> None:
    rows = [row._replace(prompt=(9,) * shared + row.prompt) for row in own]
    batches = list(length_batches(rows, budget, shared, kept=kept))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert all(batches)
    for place, batch in enumerate(batches):
        most = budget if kept and place else room(shared, budget)
        assert len(batch) == 1 or sum(own[i].length for i in batch) <= most
    flat = [rows[i].length for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    turned = list(length_batches(rows[::-1], budget, shared, kept=kept))
    assert [[rows[::-1][i] for i in batch] for batch in turned] == [[rows[i] for i in batch] for batch in batches]


def test_a_beginning_longer_than_the_budget_does_not_part_rows() -> None:
    rows = [Encoded((9,) * 5000 + (i,) * 20) for i in range(300)]
    assert [len(batch) for batch in length_batches(rows, 4096, 5000)] == [102, 102, 96]
    assert [len(batch) for batch in length_batches(rows, 4096, 5000, kept=True)] == [102, 198]


# --- pad ------------------------------------------------------------------------------------------------


def test_padding_stands_at_the_right_unless_asked_for_at_the_left() -> None:
    rows = [(5, 6, 7), (8,), ()]
    ids, mask = pad(rows, 9, step=1)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    ids, mask = pad(rows, 9, left=True, step=1)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert (ids.dtype, mask.dtype) == (np.int64, np.int64)


@quick
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=7), st.integers(0, 9), st.booleans(), st.integers(1, 9)
)
def test_padded_rows_come_back_where_the_mask_is_one(rows: list[list[int]], value: int, left: bool, step: int) -> None:
    ids, mask = pad(rows, value, left=left, step=step)
    assert ids.shape == mask.shape == (len(rows), math.ceil(max(map(len, rows), default=0) / step) * step)
    assert [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == value).all()
    steps = np.diff(mask, axis=1)
    assert (steps >= 0).all() if left else (steps <= 0).all()


# --- epoch_order ----------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 60), st.integers(0, 2**31 - 2), st.integers(0, 50))
def test_an_epoch_takes_every_row_once_in_an_order_that_comes_again(n_rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(n_rows, seed, epoch).tolist()
    assert sorted(order) == list(range(n_rows))
    epoch_order(n_rows, seed, epoch + 1)
    epoch_order(n_rows + 1, seed, epoch)
    assert epoch_order(n_rows, seed, epoch).tolist() == order


def test_seed_and_epoch_each_make_another_order() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_a_kept_order_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 3


# --- auto_batch_size ------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 2000))
def test_few_rows_go_into_small_steps(n_rows: int) -> None:
    size = auto_batch_size(n_rows)
    assert 2 <= size <= 16
    assert size <= auto_batch_size(n_rows + 1)
    assert size == 2 or n_rows / size >= 50
    assert size == 16 or n_rows / (size + 1) < 50
