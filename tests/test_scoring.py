"""Scores of labels against a full forward pass for each prompt and label, whatever is shared, cut or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch_side import (
    CPU,
    classifier,
    generator,
    make_other,
    no_collecting,
    plain_model,
    plain_tokenizer,
    token_losses,
    token_rows,
)

from llmfit import scoring
from llmfit.batching import PAD_STEP
from llmfit.exceptions import MemoryWarning, OutOfMemoryError
from llmfit.scoring import label_sequences, score_labels

RAGGED = ["a", "red apple", "b" * 70, "an old car by the road", "x y", "b" * 70 + "!", "fast", "q" * 30]
LABELS: dict[str, list[str]] = {
    "words": ["fruit", "vehicle"],
    "prefixes": ["a", "ab", "abc", "b"],
    "nested twice": ["1", "10", "100", "2", "20"],
    "one character": ["x", "y", "z"],
    "like heads": ["not good", "not bad", "not"],
    "a hundred": [f"class {i}" for i in range(100)],
    "special text": ["</s>", "<s>", "ok"],
}


pytestmark = pytest.mark.usefixtures("way")


class Spied(list[list[Any]]):
    """The prompts of each pass, in order; `refuse` gives an error to raise instead of some."""

    refuse: Callable[[list[Any]], Exception | None] = staticmethod(lambda _: None)


@pytest.fixture
def spied(way: str, monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Look at what is read for labels, whichever way it is."""
    passes, name = Spied(), "ask" if way == "packed" else "read"
    real = getattr(scoring, name)

    def spy(*given: Any, **settings: Any) -> Any:
        prompts = given[0 if way == "packed" else 1]
        passes.append(list(prompts))
        error = passes.refuse(prompts)
        if error is not None:
            raise error
        return real(*given, **settings)

    monkeypatch.setattr(scoring, name, spy)
    return passes


def frame_of(labels: Sequence[str], texts: Sequence[str] = RAGGED) -> pd.DataFrame:
    """Rows of these texts, three a label at least."""
    count = max(3 * len(labels), len(texts))
    return pd.DataFrame(
        {
            "text": [texts[i % len(texts)] for i in range(count)],
            "label": [labels[i % len(labels)] for i in range(count)],
        }
    )


def zero_shot(settings: dict[str, Any], labels: Sequence[str], **changed: Any) -> Any:
    return classifier(settings, adapter=None, **changed).fit(frame_of(labels))


def naive(folder: str, texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """log P(label | prompt), one forward pass each; a label that begins another is closed by the end token."""
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    scores = np.empty((len(texts), len(labels)))
    for i, text in enumerate(texts):
        prompt = tokenizer(f"{text} is a")["input_ids"]
        for k, label in enumerate(labels):
            ids = [i for char in f" {label}" for i in tokenizer(char, add_special_tokens=False)["input_ids"]]
            begins = any(other != label and other.startswith(label) for other in labels)
            scores[i, k] = -token_losses(model, prompt, ids + [2] * begins).sum()
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_scores_are_those_of_a_forward_pass_for_each_label(labels, settings, tiny):
    clf = zero_shot(settings, labels)
    texts = RAGGED if len(labels) < 50 else RAGGED[:3]
    expected = naive(tiny, texts, clf.classes_.tolist())
    found = clf.predict_log_proba(pd.DataFrame({"text": texts}))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-9)
    assert np.ptp(expected, axis=1).min() > 0.1  # the labels do differ


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_scores_of_other_architectures(kind, settings, tiny, tmp_path):
    folder = make_other(tmp_path / kind, tiny, kind)
    clf = zero_shot(settings, LABELS["prefixes"], base_model=folder)
    found = clf.predict_log_proba(pd.DataFrame({"text": RAGGED}))
    np.testing.assert_allclose(found, naive(folder, RAGGED, clf.classes_.tolist()), atol=1e-4)


@pytest.mark.parametrize(("kind", "changed"), [("mistral", {"sliding_window": 8}), ("mamba", {"state_size": 4})])
def test_scores_of_a_model_that_does_not_keep_every_token(kind, changed, settings, tiny, tmp_path):
    folder = make_other(tmp_path / kind, tiny, kind, **changed)
    clf = zero_shot(settings, LABELS["nested twice"], base_model=folder)
    found = clf.predict_log_proba(pd.DataFrame({"text": RAGGED}))
    np.testing.assert_allclose(found, naive(folder, RAGGED, clf.classes_.tolist()), atol=1e-4)


@pytest.mark.parametrize("labels", [["x", "y", "z"], ["a", "ab", "b"], ["good", "bad"]])
def test_labels_of_a_chat_follow_its_turn(labels, settings, tiny_chat):
    clf = zero_shot(settings, labels, base_model=tiny_chat)
    model, tokenizer = plain_model(tiny_chat), plain_tokenizer(tiny_chat)
    scores = np.empty((len(RAGGED), len(labels)))
    for i, text in enumerate(RAGGED):
        turn = f"<|im_start|>user\n{text} is a<|im_end|>\n<|im_start|>assistant\n"  # the template writes no BOS
        prompt = tokenizer(turn, add_special_tokens=False)["input_ids"]
        for k, label in enumerate(clf.classes_):
            ids = tokenizer(label, add_special_tokens=False)["input_ids"]
            ids += [4] * any(other != label and other.startswith(label) for other in labels)  # <|im_end|>
            scores[i, k] = -token_losses(model, prompt, ids).sum()
    expected = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(clf.predict_log_proba(pd.DataFrame({"text": RAGGED})), expected, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 10**6])
def test_batches_never_matter(batch_tokens, settings, tiny):
    labels = LABELS["prefixes"]
    expected = zero_shot(settings, labels).predict_log_proba(pd.DataFrame({"text": RAGGED}))
    found = zero_shot(settings, labels, batch_tokens=batch_tokens).predict_log_proba(pd.DataFrame({"text": RAGGED}))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_row_alone_scores_as_among_others(settings, frame):
    clf = classifier(settings, epochs=3).fit(frame)
    together = clf.predict_log_proba(frame)
    alone = np.concatenate([clf.predict_log_proba(frame.iloc[[i]]) for i in range(len(frame))])
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [60, "auto"])
def test_shuffled_and_repeated_rows_score_bit_for_bit_the_same(batch_tokens, settings, frame):
    clf = classifier(settings, batch_tokens=batch_tokens).fit(frame)
    rows = pd.DataFrame({"text": [*RAGGED, *frame["text"], "aa", "bb", "cc"]})
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), 3))
    np.testing.assert_array_equal(clf.predict_proba(rows.iloc[order]), clf.predict_proba(rows)[order])


def test_equal_prompts_are_computed_once(settings, frame, way, spied):
    clf = classifier(settings).fit(frame)
    spied.clear()
    clf.predict(pd.concat([frame, frame.iloc[::-1], frame.assign(size=99)]))
    seen = [prompt for prompts in spied for prompt in prompts]
    assert len(seen) == len(set(seen)) == len(frame)


def test_labels_that_begin_alike_share_their_forward_passes(tiny, way):
    model = plain_model(tiny)
    score_labels(model, [(1, 70, 80)], [(9,)], device=CPU, pad_id=0)
    tokens: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    labels = [(40, 50, 60 + i) for i in range(20)]
    score_labels(model, [(1, 70, 80)], labels, device=CPU, pad_id=0)
    # padded: the prompt, then the two tokens that all twenty begin with; packed: all of it at once
    assert tokens == ([PAD_STEP, 2] if way == "padded" else [PAD_STEP])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([(5,), (5, 6), (7,)], [(5, 0), (5, 6), (7,)]),
        ([(5,), (6,)], [(5,), (6,)]),
        ([(5,), (5, 6), (5, 6, 7)], [(5, 0), (5, 6, 0), (5, 6, 7)]),
        ([(5, 6), (6,), (4, 5)], [(5, 6), (6,), (4, 5)]),  # an end is no beginning
        ([(5, 6, 7), (5, 7)], [(5, 6, 7), (5, 7)]),
    ],
)
def test_a_label_is_closed_only_where_it_begins_another(labels, expected):
    assert label_sequences(labels, end_id=0) == expected


def test_no_answer_is_scored_twice(tiny):
    """Closed labels are disjoint events: their probabilities sum to one at most, and to one where they are all."""
    model = plain_model(tiny)
    every = [(i,) for i in range(261)]
    scores = score_labels(model, [(1, 70, 80)], every, device=CPU, pad_id=0)
    np.testing.assert_allclose(np.logaddexp.reduce(scores, axis=1), 0.0, atol=1e-5)
    split = [*[(i,) for i in range(261) if i != 70], *[(70, i) for i in range(261)]]
    scores = score_labels(model, [(1, 70, 80), (1, 9)], split, device=CPU, pad_id=0)
    np.testing.assert_allclose(np.logaddexp.reduce(scores, axis=1), 0.0, atol=1e-5)


def test_progress_tells_of_every_row_also_of_equal_ones_and_empty_input_is_empty(tiny):
    told: list[int] = []
    prompts = [(1, 70), (1, 71, 72), (1, 70)]
    scores = score_labels(
        plain_model(tiny), prompts, [(5,), (6, 7)], device=CPU, pad_id=0, batch_tokens=2, progress=told.append
    )
    assert told == [1, 2]  # two rows of the same prompt are done at once
    assert scores.shape == (3, 2)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores[0], scores[2])
    assert score_labels(plain_model(tiny), [], [(5,), (6,)], device=CPU, pad_id=0).shape == (0, 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("oom"), RuntimeError("can't allocate memory: you tried")])
def test_a_batch_that_memory_does_not_hold_is_halved(error, settings, frame, monkeypatch, way, spied):
    no_collecting(monkeypatch)
    clf = classifier(settings).fit(frame)
    expected = clf.predict_log_proba(frame)
    clf._fitted_base()._standing.forget()  # which would go first
    spied.clear()
    spied.refuse = lambda prompts: error if len(prompts) > 2 else None
    with pytest.warns(MemoryWarning) as warned:
        found = clf.predict_log_proba(frame)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [len(prompts) for prompts in spied] == [8, 4, 2, 2, 4, 2, 2]
    assert [str(w.message) for w in warned] == [
        "Memory ran out: going on with batches of 4 rows, smaller ones if it runs out again."
    ]


def test_a_row_that_memory_does_not_hold_is_one_sentence(settings, frame, monkeypatch, way, spied):
    no_collecting(monkeypatch)
    clf = classifier(settings).fit(frame)
    spied.refuse = lambda _: torch.OutOfMemoryError("oom")
    with pytest.warns(MemoryWarning), pytest.raises(OutOfMemoryError) as error:
        clf.predict(frame)
    assert str(error.value) == (
        "Memory does not hold one row. Lower max_length. Choose a smaller base_model or adapter rank, or a dtype of "
        "fewer bytes."
    )


def test_another_error_is_none_of_memory(settings, frame, way, spied):
    clf = classifier(settings).fit(frame)
    spied.refuse = lambda _: RuntimeError("broken")
    with pytest.raises(RuntimeError, match=r"^broken$"):
        clf.predict(frame)


@pytest.mark.parametrize("batch_tokens", [1, "auto"])
def test_perplexity_is_that_of_the_answers_by_hand(batch_tokens, settings, frame, tiny):
    model = generator(settings, adapter=None, batch_tokens=batch_tokens, generation={"max_new_tokens": 1}).fit(frame)
    with pytest.warns(UserWarning, match="without an end"):
        found = model.evaluate(frame)["perplexity"]
    plain = plain_model(tiny)
    losses = np.concatenate([token_losses(plain, *row) for row in token_rows(tiny, frame["text"], frame["label"])])
    np.testing.assert_allclose(found, np.exp(losses.mean()), rtol=1e-5)


def test_a_base_in_few_bits_scores_nearly_the_same(settings):
    exact = zero_shot(settings, LABELS["prefixes"])
    coarse = zero_shot(settings, LABELS["prefixes"], dtype="bfloat16")
    rows = pd.DataFrame({"text": RAGGED})
    np.testing.assert_allclose(coarse.predict_log_proba(rows), exact.predict_log_proba(rows), atol=0.5)
