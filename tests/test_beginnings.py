"""Rows that begin otherwise than the others: they cost a pass of their own, never the sharing of the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV
from torch_side import CPU, classifier, furthest, generator, plain_model, same, token_losses

from llmfit import inference, scoring, training
from llmfit.batching import FORWARD_OVERHEAD, PAD_STEP
from llmfit.encoding import Encoded
from llmfit.exceptions import MemoryWarning
from llmfit.objectives import OBJECTIVES
from llmfit.packing import by_beginning, common_prefix, cut_step, extent
from llmfit.search import FusedGridSearchCV

BLOCKS = {name: tuple(range(start, start + 200)) for name, start in (("a", 100), ("b", 300), ("c", 500))}
PROMPTS = st.lists(st.tuples(st.text("abc", max_size=3), st.integers(0, 2)), min_size=1, max_size=5)


# Which rows are parts of their own ------------------------------------------------------------------


def written(drawn: list[tuple[str, int]]) -> list[tuple[int, ...]]:
    return [(7, *(token for name in names for token in BLOCKS[name]), own) for names, own in drawn]


def partings(items: list[int]) -> list[list[list[int]]]:
    if not items:
        return [[]]
    first, *rest = items
    return [
        other
        for some in partings(rest)
        for other in [[[first], *some], *([*some[:i], [first, *some[i]], *some[i + 1 :]] for i in range(len(some)))]
    ]


def cost(parts: list[list[int]], prompts: list[tuple[int, ...]]) -> int:
    """Tokens that are computed, and what passes cost: a row alone shares nothing with anybody."""
    total = 0
    for part in parts:
        shared = common_prefix([prompts[i] for i in part])
        total += FORWARD_OVERHEAD + shared + sum(len(prompts[i]) - shared for i in part)
    return total


@quickly(max_examples=60, deadline=None, database=None)
@given(PROMPTS)
def test_hardly_any_other_parting_costs_less(drawn: list[tuple[str, int]]) -> None:
    prompts = written(drawn)
    parts = by_beginning(prompts, common_prefix(prompts), 4096)
    assert sorted(i for part, _ in parts for i in part) == list(range(len(prompts)))
    for part, shared in parts:
        assert len({prompts[i][:shared] for i in part}) == 1
        assert all(len(prompts[i]) > shared for i in part)
    found = cost([part for part, _ in parts], prompts)
    everything = list(range(len(prompts)))
    assert found <= cost([everything], prompts)
    least = min(cost(parting, prompts) for parting in partings(everything))
    assert found <= least + FORWARD_OVERHEAD + common_prefix(prompts)  # the first part counts, where it is left empty


@quickly(max_examples=50, deadline=None, database=None)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_shuffled_rows_are_parted_alike(drawn: list[tuple[str, int]], random: Any) -> None:
    found = []
    for _ in range(2):
        prompts = written(drawn)
        parts = by_beginning(prompts, common_prefix(prompts), 4096)
        found.append([(sorted(prompts[i] for i in part), shared) for part, shared in parts])
        random.shuffle(drawn)
    assert found[0] == found[1]


def test_rows_that_all_begin_alike_are_one_part_as_they_stand() -> None:
    prompts = [(*range(50), 60 + i % 3, i) for i in (4, 2, 9, 0, 7, 3)]
    assert by_beginning(prompts, 50, 4096) == [([0, 1, 2, 3, 4, 5], 50)]
    assert by_beginning(prompts[:1], 50, 4096) == [([0], 50)]
    assert by_beginning([], 0, 4096) == [([], 0)]


@pytest.mark.parametrize(("more", "shared"), [(PAD_STEP - 1, 30), (PAD_STEP, 30 + PAD_STEP)])
def test_a_little_more_than_a_fit_shares_is_not_worth_another_shape(more, shared) -> None:
    prompts = [(*range(30 + more), 900 + i) for i in range(3)]
    assert by_beginning(prompts, 30, 4096) == [([0, 1, 2], shared)]


def test_one_more_pass_costs_more_where_passes_are_large() -> None:
    prompts = [*((*range(200), 900 + i) for i in range(3)), tuple(range(500, 700))]
    assert len(by_beginning(prompts, 0, 4096)) == 2  # 600 tokens less for 200 and a pass
    assert len(by_beginning(prompts, 0, 16384)) == 1


def test_a_row_may_stay_with_those_it_shares_most_with() -> None:
    """Of eight rows behind 90 tokens and 400, one leaves after 470 of those: it costs the others 20 tokens each."""
    known = tuple(range(490))
    prompts = [(*known, 900 + i) for i in range(6)] + [(*known[:470], *range(700, 730)), tuple(range(90)) + (5,) * 400]
    assert by_beginning(prompts, 90, 4096) == [([7], 90), ([0, 1, 2, 3, 4, 5, 6], 470)]


def test_thousands_of_beginnings_are_parted_in_no_time() -> None:
    rng = np.random.default_rng(0)
    tasks = [tuple(rng.integers(5, 1000, 300).tolist()) for _ in range(300)]
    prompts = [(1, *tasks[i % 300], *rng.integers(5, 1000, 20).tolist()) for i in range(6000)]
    parts = by_beginning(prompts, 1, 4096)
    assert sorted({shared for _, shared in parts}) == [301]
    growing = [(*range(i), -1) for i in range(1, 1200)]  # each goes on from the one before
    assert sum(len(part) for part, _ in by_beginning(growing, 0, 4096)) == len(growing)


def test_a_step_is_cut_by_beginnings_and_then_by_the_budget() -> None:
    long, other = tuple(range(100, 400)), tuple(range(500, 800))
    rows = [Encoded((*task, i, *(9,) * 50), (1,)) for i, task in enumerate([long, other] * 4)]
    cut = cut_step(rows, 0, 400)
    assert [shared for _, shared in cut] == [300, 300, 300, 300]
    assert [[row.prompt[300] for row in some] for some, _ in cut] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert [shared for _, shared in cut_step(rows, None, 400)] == [None] * 8


def test_tokens_of_a_pass_are_those_of_the_largest_part() -> None:
    long, other = tuple(range(100, 400)), tuple(range(500, 700))
    rows = [Encoded((*task, i), (1,)) for i, task in enumerate([long, other] * 4)]
    assert extent(rows, 0, 4096) == (300 + 4 * 2, 2 * 2 + 1)
    assert extent(rows, None, 4096) == (8 * 302, 302)
    assert extent(rows[::2], 300, 4096) == (308, 5)


# Through the public API -----------------------------------------------------------------------------


@pytest.fixture
def many() -> pd.DataFrame:
    """Rows of which the first eight are to be the examples before all others."""
    kinds = [("ripe fruit", "fruit"), ("fast vehicle", "vehicle")]
    texts = [f"number {i:02} of the {kinds[i % 2][0]}s that somebody wrote about" for i in range(24)]
    return pd.DataFrame({"text": texts, "label": [kinds[i % 2][1] for i in range(24)]})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass, as the embedding of the model sees them."""
    seen: list[int] = []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (seen.append(ids.numel()), forward(self, ids))[1]
    )
    return seen


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of each fit and prediction, as they are asked about."""
    asked: list[Any] = []
    for room in (scoring, training):
        for name in ("packable", "packable_answers"):
            real = getattr(room, name)

            def spy(model: Any, rows: Any, real: Any = real, **named: Any) -> Any:
                asked.extend([list(rows)] * bool(rows))
                return real(model, rows, **named)

            monkeypatch.setattr(room, name, spy)
    return asked


def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (scoring, training):
        for name in ("packable", "packable_answers"):
            monkeypatch.setattr(room, name, lambda *_, **__: None)
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)


def few_shot(settings: dict[str, Any], k: int = 4, **changed: Any) -> Any:
    template = {"template": "{text} is a", "few_shot": {"k": k}}
    return classifier({**settings, "max_length": None}, **{"template": template, "batch_size": 4, **changed})


def beginning_of_most(rows: list[Encoded]) -> tuple[int, list[bool]]:
    """Tokens that all but the eight examples begin with, and which rows are such."""
    for tokens in range(min(len(row.prompt) for row in rows) - 1, 0, -1):
        head, times = Counter(row.prompt[:tokens] for row in rows).most_common(1)[0]
        if times >= len(rows) - 8:
            return tokens, [row.prompt[:tokens] == head for row in rows]
    raise AssertionError("nothing is shared")


def test_examples_before_all_rows_are_computed_once_a_step(settings, many, counted, rows_of):
    few_shot(settings, k=1).fit(many[:3].assign(text=many["text"] * 6))  # how long rows are read is seen once
    counted.clear()
    rows_of.clear()
    clf = few_shot(settings, k=8, batch_size=8).fit(many)
    shared, usual = beginning_of_most(rows_of[0])
    assert usual.count(False) == 8
    assert shared > 400
    own = sum(row.length - shared for row, known in zip(rows_of[0], usual, strict=True) if known)
    odd = sum(row.length for row, known in zip(rows_of[0], usual, strict=True) if not known)
    steps, everything = 3, clf.history_["tokens"].sum()
    assert sum(counted) <= steps * shared + own + odd + 2 * PAD_STEP * len(counted)
    assert len(counted) <= 3 * steps
    assert sum(counted) < 0.65 * everything  # of 24 rows 8 share little
    counted.clear()
    clf.predict(many)
    assert sum(counted) <= shared + own + odd + (24 + 2 * len(counted)) * PAD_STEP
    counted.clear()
    places = [row.row for row, known in zip(rows_of[0], usual, strict=True) if known]
    clf.predict(many.iloc[[*places, *({*range(24)} - {*places})][:17]])  # one row reads as an example
    one = max(len(row.prompt) for row in rows_of[-1])
    assert sum(counted) <= one + shared + own + (17 + 2 * len(counted)) * PAD_STEP
    assert len(counted) == 2


@pytest.mark.parametrize("batch_tokens", [700, "auto"])
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_fit_with_examples_is_that_of_padded_rows(head, batch_tokens, settings, many, monkeypatch):
    own = {"batch_tokens": batch_tokens, "learning_rate": 1e-3, "dtype": "float64", "head": head}
    rows, others = many[:8], many[4:10]
    one = few_shot(settings, **own).fit(rows, eval_set=others)
    found = one.predict_log_proba(many[:12])
    padded(monkeypatch)
    other = few_shot(settings, **own).fit(rows, eval_set=others)
    for column in ("loss", "grad_norm", "validation_loss"):
        np.testing.assert_allclose(one.history_[column], other.history_[column], rtol=1e-5)
    assert furthest(one, other) < 1e-5
    np.testing.assert_allclose(found, other.predict_log_proba(many[:12]), atol=1e-5)


@pytest.mark.parametrize("step", [1, 2])
def test_a_fit_with_examples_goes_on_from_any_step(step, settings, many, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfit.checkpoints.SHARE_OF_TIME", float("inf"))
    own = {"adapter": {"r": 4, "dropout": 0.2}, "random_state": 0}
    rows = many[:12]
    expected = few_shot(settings, **own).fit(rows)

    def kill(state: Any) -> None:
        if state.step == step:
            raise KeyboardInterrupt

    own |= {"checkpoint_dir": tmp_path / "states"}
    with pytest.raises(KeyboardInterrupt):
        few_shot(settings, **own, callbacks=kill).fit(rows)
    assert same(few_shot(settings, **own).fit(rows), expected)


def test_candidates_with_examples_side_by_side_are_those_fitted_alone(settings, many):
    grid = {"adapter__r": [2, 4], "learning_rate": [1e-3]}
    many, model = many[:12], few_shot(settings, k=3)
    how = {"cv": 2, "scoring": "neg_log_loss", "refit": False}
    found, alone = (kind(model, grid, **how).fit(many, many["label"]) for kind in (FusedGridSearchCV, GridSearchCV))
    each, other = (search.cv_results_["mean_test_score"] for search in (found, alone))
    np.testing.assert_allclose(each, other, atol=1e-5)


@pytest.fixture
def halves(many: pd.DataFrame) -> pd.DataFrame:
    """Rows of two kinds, each behind an instruction of its own."""
    tasks = ["Say of the fruit that is named here what it is. " * 8, "Name the vehicle, and nothing but that. " * 9]
    return many[:12].assign(text=[tasks[i % 2] + text for i, text in enumerate(many["text"][:12])])


@pytest.mark.parametrize("batch_tokens", [500, "auto"])
@pytest.mark.parametrize("changed", [{}, {"head": "linear"}, {"head": {"type": "linear", "pooling": "mean"}}], ids=str)
def test_two_beginnings_are_each_read_once(changed, batch_tokens, settings, halves, counted, monkeypatch):
    own = {**settings, "dtype": "float64", "max_length": None}
    clf = classifier(own, **changed).fit(halves)
    clf.set_params(batch_tokens=batch_tokens).predict_log_proba(halves)
    counted.clear()
    found = clf.predict_log_proba(halves)
    prompts = [f"<{text} is a" for text in halves["text"]]
    each = [common_prefix([tuple(text) for text in prompts[i::2]]) for i in (0, 1)]
    rest = sum(len(text) - each[i % 2] for i, text in enumerate(prompts))
    assert sum(counted) <= sum(each) + rest + 12 * PAD_STEP + len(counted) * PAD_STEP
    assert len(counted) >= (2 if batch_tokens == "auto" else 4)
    padded(monkeypatch)
    np.testing.assert_allclose(found, clf.predict_log_proba(halves), atol=1e-6)


def test_many_labels_behind_two_beginnings(tiny, monkeypatch):
    """In several tries, whose prompts' beginnings are read once for all of them."""
    model, seen = plain_model(tiny), []
    labels = [(40, 50), (40, 60, 70), (41,), (42, 43, 44, 45)]
    tasks = [tuple(range(70, 200)), tuple(range(60, 190))]
    prompts = [(1, *tasks[i % 2], 80 + i, *(9,) * (i % 3)) for i in range(12)]
    tries = scoring.tries
    monkeypatch.setattr(scoring, "tries", lambda some: tries(some, 2))
    scoring.score_labels(model, prompts, labels, device=CPU, pad_id=0)
    expected = [[-token_losses(model, list(p), list(label)).sum() for label in labels] for p in prompts]
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    found = scoring.score_labels(model, prompts, labels, device=CPU, pad_id=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(seen) == 2 * len(list(tries(labels, 2)))
    assert sum(count > 130 for count in seen) == 2


@pytest.mark.parametrize("generation", [{}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.filterwarnings("ignore:.*without an end")
def test_answers_are_generated_behind_each_of_two_beginnings(generation, settings, halves, monkeypatch):
    own = {**settings, "dtype": "float64", "max_length": None, "batch_tokens": 4000}
    model = generator(own, generation={"max_new_tokens": 5, **generation}).fit(halves)
    real, begun = inference.begin, []
    monkeypatch.setattr(inference, "begin", lambda *given, **named: begun.append(real(*given, **named)) or begun[-1])
    found = model.predict(halves)
    assert [len(each.ids) > 300 for each in begun] == [True, True]
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    pd.testing.assert_series_equal(found, model.predict(halves))


@pytest.mark.filterwarnings("ignore:.*without an end")
def test_a_prompt_that_reads_as_an_example_answers_apart(settings, many, monkeypatch):
    own = {**settings, "dtype": "float64", "max_length": None, "generation": {"max_new_tokens": 4}}
    model = generator(own, template={"template": "{text} is a", "few_shot": {"k": 4}}).fit(many[:12])
    real, begun = inference.begin, []
    monkeypatch.setattr(inference, "begin", lambda *given, **named: begun.append(real(*given, **named)) or begun[-1])
    found = model.predict(many[:12])
    assert [each is not None and len(each.ids) > 250 for each in begun].count(True) == 1
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    pd.testing.assert_series_equal(found, model.predict(many[:12]))


def test_references_behind_two_beginnings_are_measured_alike(settings, halves, monkeypatch):
    own = {**settings, "dtype": "float64", "max_length": None, "generation": {"max_new_tokens": 2}}
    model = generator(own).fit(halves)
    with pytest.warns(UserWarning, match="without an end"):
        found = model.evaluate(halves)["perplexity"]
    padded(monkeypatch)
    with pytest.warns(UserWarning, match="without an end"):
        assert model.evaluate(halves)["perplexity"] == pytest.approx(found, rel=1e-6)


def test_memory_that_runs_out_cuts_parts_too(settings, many, monkeypatch):
    monkeypatch.setattr("llmfit.memory.free", lambda: None)
    many = many[:12]
    whole = few_shot(settings, adapter={"r": 4}).fit(many)
    supervised = OBJECTIVES["supervised"]

    def objective(model: Any, batch: Any) -> torch.Tensor:
        if batch.input_ids.numel() > 450:
            raise torch.OutOfMemoryError("oom")
        return supervised(model, batch)

    monkeypatch.setitem(OBJECTIVES, "supervised", objective)
    with pytest.warns(MemoryWarning, match="Memory ran out: going on with batches of"):
        cut = few_shot(settings, adapter={"r": 4}).fit(many)
    np.testing.assert_allclose(cut.history_["loss"], whole.history_["loss"], rtol=1e-4)
