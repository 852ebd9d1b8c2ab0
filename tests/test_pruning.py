"""The likeliest label alone: always the one that the scores of all have, and for fewer tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch_side import CPU, classifier, make_other, no_collecting, plain_model

from llmfit import pruning, scoring
from llmfit.exceptions import MemoryWarning, PackingWarning
from llmfit.packing import attention
from llmfit.pruning import likeliest_labels, worth_pruning
from llmfit.scoring import label_sequences, score_labels

RNG = np.random.default_rng(0)
BEFORE = (1, *RNG.integers(5, 260, 9).tolist())
PROMPTS = [BEFORE + tuple(RNG.integers(5, 260, n).tolist()) for n in (3, 1, 12, 40, 7, 5, 90, 2, 2, 30)]
LABELS: dict[str, list[tuple[int, ...]]] = {
    "topics": [(40 + i, 50, 60 + j, 7) for i in range(10) for j in range(10)],
    "begin alike": [(9, 8, 7, 6, 40 + i, 50 + j) for i in range(9) for j in range(9)],
    "one long": [*((40 + i,) for i in range(50)), tuple(range(100, 130))],
    "nested": label_sequences([tuple([70, 71, 72, 73, 74][:n]) + (90,) * m for n in range(1, 6) for m in range(5)], 2),
    "many": [tuple(RNG.integers(5, 260, n).tolist()) for n in RNG.integers(2, 9, 150)],
    "of one token": [(40,), (41,), (42,)],
    "two": [(40, 41), (40, 42)],
}
SOME_FIRST = pruning._some_first
GIVEN: dict[str, Any] = {"device": CPU, "pad_id": 0}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave labels out however few rows there are, and however little that saves, in batches as large as may be."""
    monkeypatch.setattr(pruning, "_some_first", lambda batches, _: batches)
    monkeypatch.setitem(pruning.LEAST, "cpu", 0)
    monkeypatch.setattr(pruning, "SAVED", -1.0)


def peaked(folder: str, times: float = 4.0) -> Any:
    """The random model, surer of what it says."""
    model = plain_model(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(times)
    return model


def counted(model: Any) -> list[int]:
    """The tokens of each pass, as the embedding meets them."""
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: tokens.append(given[0].numel()))
    return tokens


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("times", [0.3, 1.0, 4.0])
def test_it_is_the_label_that_scores_highest(labels, times, tiny):
    model = peaked(tiny, times)
    expected = score_labels(model, PROMPTS, labels, **GIVEN).argmax(axis=1)
    np.testing.assert_array_equal(likeliest_labels(model, PROMPTS, labels, **GIVEN), expected)
    assert len(set(expected)) > 1 or labels is LABELS["nested"]  # short ones are likelier there


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma"])
def test_it_is_so_in_other_architectures(kind, tiny, tmp_path):
    model = plain_model(make_other(tmp_path / kind, tiny, kind, **({"head_dim": 8} if kind == "gemma" else {})))
    expected = score_labels(model, PROMPTS, LABELS["topics"], **GIVEN).argmax(axis=1)
    np.testing.assert_array_equal(likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN), expected)


@pytest.mark.parametrize("batch_tokens", [1, 40, 130, 10**6])
def test_batches_never_matter(batch_tokens, tiny):
    model = peaked(tiny, 1.0)
    expected = score_labels(model, PROMPTS, LABELS["many"], **GIVEN).argmax(axis=1)
    found = likeliest_labels(model, PROMPTS, LABELS["many"], **GIVEN, batch_tokens=batch_tokens)
    np.testing.assert_array_equal(found, expected)


def test_what_goes_on_from_rows_is_what_whole_rows_say(tiny):
    """Every node of a trie, read at once behind rows of many lengths, against the labels' own scores."""
    model, trie = plain_model(tiny), pruning.make_trie(LABELS["nested"])
    expected = score_labels(model, PROMPTS, LABELS["nested"], **GIVEN)
    seen: list[Any] = []
    real = pruning._Search.best

    def best(self: Any) -> Any:
        seen.append(self.labels.copy())
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning._Search, "best", best)
        patch.setattr(pruning, "MARGINS", dict.fromkeys((1, 2, 4), 1e9))  # nothing is left out
        likeliest_labels(model, PROMPTS, LABELS["nested"], **GIVEN)
    lengths = [-len(prompt) for prompt in PROMPTS]
    order = sorted(range(len(PROMPTS)), key=lambda i: (lengths[i], PROMPTS[i]))  # as batches take them
    found, known = (scores - scores.max(axis=1, keepdims=True) for scores in (seen[0], expected[order]))
    np.testing.assert_allclose(found, known, atol=1e-4)  # but for what all labels begin with
    assert len(trie.tokens) > 16


@pytest.fixture
def sure(tiny: str) -> tuple[Any, list[tuple[int, ...]]]:
    """A model that has learned prompts and their labels by heart."""
    model, labels = plain_model(tiny).train(), LABELS["topics"]
    prompts = [BEFORE + tuple(np.random.default_rng(i).integers(5, 260, 32).tolist()) for i in range(32)]
    ids = torch.tensor([[*prompt, *labels[(7 * i) % len(labels)]] for i, prompt in enumerate(prompts)])
    answers = torch.where(torch.arange(ids.shape[1]) < len(prompts[0]), -100, ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=answers).loss.backward()
        optimizer.step()
    return model.eval(), prompts


def test_few_tokens_are_read_where_answers_are_peaked(sure):
    model, prompts = sure
    labels = LABELS["topics"]
    likeliest_labels(model, prompts[:2], labels, **GIVEN)  # the model is looked at once
    tokens = counted(model)
    score_labels(model, prompts, [(40,), (41,)], **GIVEN)
    of_two = sum(tokens)
    tokens.clear()
    full = score_labels(model, prompts, labels, **GIVEN)
    of_all = sum(tokens)
    tokens.clear()
    found = likeliest_labels(model, prompts, labels, **GIVEN)
    np.testing.assert_array_equal(found, full.argmax(axis=1))
    assert found.tolist() == [(7 * i) % len(labels) for i in range(32)]
    assert of_all > 4 * of_two
    assert sum(tokens) < 1.2 * of_two
    assert tokens[0] <= of_two  # every prompt once


def test_what_labels_begin_alike_with_is_read_with_the_prompt(tiny):
    model, labels = peaked(tiny), LABELS["begin alike"]
    likeliest_labels(model, PROMPTS[:2], labels, **GIVEN)
    tokens = counted(model)
    likeliest_labels(model, PROMPTS, labels, **GIVEN)
    own = sum(len(prompt) + 4 for prompt in set(PROMPTS)) - (len(set(PROMPTS)) - 1) * len(BEFORE)
    assert own < tokens[0] <= own + 16


@pytest.mark.parametrize("margin", [0.0, 0.3, 1e9])
def test_what_is_as_good_as_equally_likely_is_scored_in_full(margin, tiny, monkeypatch):
    model = plain_model(tiny)
    labels = LABELS["topics"]
    scores = score_labels(model, PROMPTS, labels, **GIVEN)
    second, first = np.sort(scores, axis=1)[:, -2:].T
    monkeypatch.setattr(pruning, "MARGINS", dict.fromkeys((1, 2, 4), margin))
    asked: list[Any] = []
    monkeypatch.setattr(
        scoring, "score_labels", lambda *given, **named: (asked.extend(given[1]), score_labels(*given, **named))[1]
    )
    np.testing.assert_array_equal(likeliest_labels(model, PROMPTS, labels, **GIVEN), scores.argmax(axis=1))
    close = {prompt for prompt, gap in zip(PROMPTS, first - second, strict=True) if gap <= margin}
    assert set(asked) == close
    assert len(asked) == len(close)
    assert {0.0: 0, 1e9: len(set(PROMPTS))}.get(margin, len(close)) == len(close)


def test_equal_prompts_are_computed_once_and_progress_tells_of_all(tiny):
    model, told = plain_model(tiny), []
    likeliest_labels(model, PROMPTS[:2], LABELS["topics"], **GIVEN)
    once = likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    tokens = counted(model)
    likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    first = list(tokens)
    tokens.clear()
    found = likeliest_labels(model, [*PROMPTS, *PROMPTS[::-1]], LABELS["topics"], **GIVEN, progress=told.append)
    assert tokens == first
    np.testing.assert_array_equal(found, [*once, *once[::-1]])
    assert sum(told) == 2 * len(PROMPTS)
    assert likeliest_labels(model, [], LABELS["topics"], **GIVEN).shape == (0,)


def test_a_batch_that_memory_does_not_hold_is_halved(tiny, monkeypatch):
    no_collecting(monkeypatch)
    model = plain_model(tiny)
    expected = likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    real, sizes = pruning.go_behind, []

    def small(lent: Any, layout: Any, *rest: Any) -> Any:
        sizes.append(len(layout.own))
        if len(layout.own) > 3:
            raise torch.OutOfMemoryError("oom")
        return real(lent, layout, *rest)

    monkeypatch.setattr(pruning, "go_behind", small)
    with pytest.warns(MemoryWarning, match="going on with batches of 5 rows"):
        found = likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    np.testing.assert_array_equal(found, expected)
    assert sizes[0] == len(PROMPTS)


def test_a_model_that_goes_on_otherwise_reads_all_labels_with_a_warning(tiny, monkeypatch):
    model = plain_model(tiny)
    expected = score_labels(model, PROMPTS, LABELS["topics"], **GIVEN).argmax(axis=1)
    real = attention._go_on
    monkeypatch.setattr(attention, "_go_on", lambda *given: real(*given).flip(0))
    with pytest.warns(PackingWarning) as warned:
        found = likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    assert [str(each.message) for each in warned] == [
        "This model cannot go on from packed rows that it has read (its answers differ): all classes are read behind "
        "each prompt, which takes longer."
    ]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN), expected)  # said once


def test_scores_that_are_no_numbers_are_left_to_those_of_all_labels(tiny):
    model = plain_model(tiny)
    likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN)
    with torch.no_grad():
        model.get_output_embeddings().weight[45] = torch.nan
    expected = score_labels(model, PROMPTS, LABELS["topics"], **GIVEN).argmax(axis=1)
    np.testing.assert_array_equal(likeliest_labels(model, PROMPTS, LABELS["topics"], **GIVEN), expected)


def test_only_labels_of_many_tokens_are_worth_it():
    assert worth_pruning(LABELS["topics"], CPU)
    assert not worth_pruning([(i, 5) for i in range(8)], CPU)
    assert not worth_pruning([(i,) for i in range(500)], CPU)
    assert worth_pruning([(i, 5) for i in range(20)], CPU)
    assert not worth_pruning([(i, 5) for i in range(20)], torch.device("cuda"))


def test_where_labels_are_as_likely_the_other_rows_have_them_scored_at_once(sure, tiny, monkeypatch):
    labels = LABELS["topics"]
    monkeypatch.setattr(pruning, "SAVED", 0.4)
    monkeypatch.setattr(pruning, "_some_first", SOME_FIRST)
    asked: list[Any] = []
    monkeypatch.setattr(
        scoring, "score_labels", lambda *given, **named: (asked.extend(given[1]), score_labels(*given, **named))[1]
    )
    model, prompts = sure
    assert likeliest_labels(model, prompts, labels, **GIVEN).tolist() == [(7 * i) % 100 for i in range(32)]
    assert asked == []
    model, told = peaked(tiny, 0.3), []  # all but as likely
    expected = score_labels(model, prompts, labels, **GIVEN).argmax(axis=1)
    np.testing.assert_array_equal(likeliest_labels(model, prompts, labels, **GIVEN, progress=told.append), expected)
    assert 28 <= len(asked) == told[-1] < 32  # what four rows were tried for is not asked again
    assert sum(told) == 32


@pytest.mark.parametrize(
    ("count", "sample", "some"), [(64, 8, [0, 8, 16, 24, 32, 40, 48, 56]), (16, 2, [0, 8]), (2, 4, [0, 1]), (3, 0, [])]
)
def test_a_sample_is_taken_throughout_the_first_batch(count, sample, some):
    batches = [*SOME_FIRST(iter([[*range(count)], [100, 101]]), sample)]
    tried, *rest = batches if some else ([], *batches)
    assert tried == some
    assert [i for batch in rest for i in batch] == [i for i in range(count) if i not in some] + [100, 101]
    assert [*SOME_FIRST(iter([]), 4)] == []


def test_few_rows_have_all_labels_scored_at_once(tiny, monkeypatch):
    monkeypatch.setitem(pruning.LEAST, "cpu", 512)
    model = plain_model(tiny)
    tokens = counted(model)
    for count, passes in ((1, 1), (2, 1), (10, 5)):
        likeliest_labels(model, PROMPTS[:count], LABELS["topics"], **GIVEN)  # the model is looked at once
        tokens.clear()
        likeliest_labels(model, PROMPTS[:count], LABELS["topics"], **GIVEN)
        assert len(tokens) == passes if passes == 1 else len(tokens) >= passes


# Through the estimators --------------------------------------------------------------------------------

TOPICS = [
    f"{kind} about {what}" for kind in ("thanks", "joke", "offer") for what in ("plans", "work", "a car", "health")
]


@pytest.fixture
def rows() -> pd.DataFrame:
    texts = [f"{word} {i}" for i, word in enumerate(["red", "slow boat", "sweet plum", "old"] * 6)]
    return pd.DataFrame({"text": texts, "label": TOPICS * 2})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changed", [{"adapter": None}, {"adapter": "lora", "epochs": 6}], ids=["zero-shot", "fitted"])
def test_predict_is_the_likeliest_of_predict_proba(changed, dtype, settings, rows, monkeypatch):
    clf = classifier(settings, dtype=dtype, **changed).fit(rows)
    expected = clf.classes_[clf.predict_proba(rows).argmax(axis=1)]
    monkeypatch.setattr(pruning, "likeliest_labels", spied := Spy(likeliest_labels))
    np.testing.assert_array_equal(clf.predict(rows.iloc[::-1]), expected[::-1])
    assert clf.score(rows.iloc[:20]) == np.mean(expected[:20] == rows["label"][:20])
    assert spied.calls == 2


class Spy:
    """Counts calls."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        return self.real(*given, **named)


def test_files_get_the_same_classes(settings, rows, tmp_path, monkeypatch):
    clf = classifier(settings).fit(rows)
    rows[["text"]].to_csv(tmp_path / "rows.csv", index=False)
    monkeypatch.setattr(pruning, "likeliest_labels", spied := Spy(likeliest_labels))
    clf.predict_files(tmp_path / "rows.csv", tmp_path / "out.csv", chunk_rows=10)
    assert spied.calls == 3
    assert pd.read_csv(tmp_path / "out.csv")["label_predicted"].tolist() == clf.predict(rows).tolist()


def test_few_tokens_of_labels_and_heads_are_answered_in_full(settings, rows, monkeypatch):
    monkeypatch.setattr(pruning, "likeliest_labels", lambda *_, **__: pytest.fail("labels were left out"))
    few = rows.assign(label=["a", "b"] * 12)
    assert set(classifier(settings).fit(few).predict(few)) <= {"a", "b"}
    assert set(classifier(settings, head="linear").fit(rows).predict(rows)) <= set(TOPICS)
