"""What the benchmarks judge by, on numbers made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks import alternate


def sides(more: float, *, turns: int = 3, seeds: float = 0.0) -> dict[str, list[dict[str, Any]]]:
    """Losses of two sides on the same rows, which differ much, as do the turns; the first loses so much more."""
    rng = np.random.default_rng(0)
    hard, found = rng.normal(size=(turns, 1)) + rng.normal(size=40), {}
    for name, extra in (("ours", more), ("theirs", 0.0)):
        noise = rng.normal(scale=0.01, size=hard.shape) + rng.normal(scale=seeds, size=(turns, 1)) if seeds else 0.0
        found[name] = [{"losses": each.tolist()} for each in hard + extra + noise]
    return found


def test_sides_that_lose_the_same_are_compared():
    means = alternate.check_losses(sides(0.0))
    assert means["ours"]["log_loss"] == means["theirs"]["log_loss"]
    assert means["theirs"]["chance"] == 0
    alternate.check_losses(sides(-1.0))


def test_a_side_that_loses_more_on_rows_that_differ_much_is_not_compared():
    with pytest.raises(SystemExit, match=r"ours loses 0\.1000 more than theirs"):
        alternate.check_losses(sides(0.1))


def test_what_seeds_differ_by_is_no_verdict_but_what_is_more_than_that_is():
    alternate.check_losses(sides(0.1, seeds=0.2))
    with pytest.raises(SystemExit, match="ours loses"):
        alternate.check_losses(sides(3.0, seeds=0.2))


def test_what_rows_differ_by_is_no_verdict_but_what_is_more_than_that_is():
    """One turn, in which only rows can tell: 40 that differ by 0.014 or so, by chance 0.0045 in the mean."""
    few = sides(0.002, turns=1, seeds=1e-9)
    assert alternate.check_losses(few)["theirs"]["chance"] == pytest.approx(0.0045, rel=0.3)
    with pytest.raises(SystemExit, match="ours loses"):
        alternate.check_losses(sides(0.02, turns=1, seeds=1e-9))


def test_losses_that_are_no_numbers_are_not_compared():
    with pytest.raises(SystemExit, match="ours loses nan"):
        alternate.check_losses(sides(float("nan")))


def test_sides_are_chosen_by_name_and_a_name_that_is_none_is_refused():
    every = {"llmfit": 1, "one": 2, "other": 3}
    assert alternate.chosen(every, None) == every
    assert alternate.chosen(every, ["other"]) == {"llmfit": 1, "other": 3}
    with pytest.raises(SystemExit, match=r"--sides: 'another' is none of 'llmfit', 'one', 'other'\."):
        alternate.chosen(every, ["another"])
