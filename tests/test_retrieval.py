"""Worked examples chosen for each row: out of the fitted rows, never the row itself, never its answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator
from llmfit.exceptions import DataWarning, ModelLoadError, ParameterError

KINDS = ["random", "semantic"]
PLAIN = "Text: {text}\nLabel:"


def few(kind: str, k: int = 2, **more: Any) -> dict[str, Any]:
    return {"template": PLAIN, "few_shot": {"k": k, "retrieval": kind, **more}}


def shown(prompt: str) -> list[str]:
    """Texts in a prompt, the row's own last."""
    return re.findall(r"Text: (.*)\nLabel:", prompt)


def vectors(folder: str, texts: list[str]) -> np.ndarray:
    """Mean last hidden states, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return torch.stack(states).double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_a_fit_sees_itself_or_one_that_reads_alike(
    kind: str, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    twice = pd.concat([frame, frame.assign(label=frame["label"].to_numpy()[::-1])])
    clf = LLMClassifier(target="label", template=few(kind, 3), **settings)
    prompts = clf.preview(twice, n=16)["prompt"]  # as fit makes them
    for own, prompt in zip(twice["text"], prompts, strict=True):
        *others, last = shown(prompt)
        assert last == own
        assert own not in others
        assert len(others) == 3
        assert set(others) <= set(frame["text"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_fit_trains_on_is_what_the_preview_shows(kind: str, frame, settings, monkeypatch) -> None:
    import llmfit.estimators.fitting as fitting

    seen: list[Any] = []
    fit_adapter = fitting.fit_adapter
    monkeypatch.setattr(
        fitting, "fit_adapter", lambda c, b, rows, *a, **k: (seen.extend(rows), fit_adapter(c, b, rows, *a, **k))[1]
    )
    clf = LLMClassifier(target="label", template=few(kind), **settings)
    prompts = clf.preview(frame, n=8)["prompt"]
    clf.fit(frame)
    decode = clf._load_base().tokenizer.decode
    assert [decode(row.prompt, skip_special_tokens=True) for row in seen] == list(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_fitted_rows_with_their_own_labels(kind: str, frame, settings) -> None:
    clf = LLMClassifier(target="label", template=few(kind), **settings | {"adapter": None}).fit(frame)
    new = pd.DataFrame({"text": ["green apple", "red car"]})
    label_of = dict(zip(frame["text"], frame["label"], strict=True))
    for prompt in clf.preview(new)["prompt"]:
        pairs = re.findall(r"Text: (.*)\nLabel: (\w+)", prompt)
        assert len(pairs) == 2
        assert all(label_of[text] == label for text, label in pairs)


@pytest.mark.parametrize("other", [False, True], ids=["of the base model", "of another model"])
def test_semantic_examples_are_the_nearest_by_a_plain_computation(
    other: bool, frame, settings, tiny: str, tiny_chat: str
) -> None:
    model = {"model": tiny_chat} if other else {}
    clf = LLMClassifier(
        target="label", features="text", template=few("semantic", 3, **model), **settings | {"adapter": None}
    ).fit(frame)
    new = pd.DataFrame({"text": ["green apple", "a fast car", "boat", "pear"]})
    known = vectors(tiny_chat if other else tiny, list(frame["text"]))
    asked = vectors(tiny_chat if other else tiny, list(new["text"]))
    middle = known.mean(axis=0)
    known, asked = known - middle, asked - middle
    likeness = (asked @ known.T) / np.outer(np.linalg.norm(asked, axis=1), np.linalg.norm(known, axis=1))
    for row, prompt in zip(likeness, clf.preview(new)["prompt"], strict=True):
        nearest = frame["text"].iloc[np.argsort(-row)[:3]].tolist()
        assert shown(prompt)[:-1] == nearest[::-1]  # the most alike stands next to the row


@pytest.mark.parametrize("kind", KINDS)
def test_neither_order_nor_neighbours_nor_the_target_of_a_row_matter(kind: str, frame, settings) -> None:
    clf = LLMClassifier(target="label", features="text", template=few(kind), **settings).fit(frame)
    proba = clf.predict_proba(frame)
    mixed = frame.iloc[[3, 1, 1, 6]]
    assert np.allclose(clf.predict_proba(mixed), proba[[3, 1, 1, 6]], atol=1e-6)
    assert np.array_equal(clf.predict_proba(frame.assign(label="nothing", more=1)), proba)
    assert np.array_equal(clf.predict_proba(frame[["text"]]), proba)
    assert clf.preview(frame)["prompt"].tolist() == clf.preview(frame[["text"]])["prompt"].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_saved_model_chooses_the_same(kind: str, head: str, frame, settings, tmp_path: Path) -> None:
    clf = LLMClassifier(target="label", features="text", template=few(kind), head=head, **settings).fit(frame)
    proba = clf.predict_proba(frame)
    clf.save(tmp_path / "model")
    llmfit.clear_cache()
    loaded = llmfit.load(tmp_path / "model")
    assert np.array_equal(loaded.predict_proba(frame), proba)
    assert loaded.preview(frame)["prompt"].tolist() == clf.preview(frame)["prompt"].tolist()
    assert loaded._prompts == clf._prompts


def test_the_seed_draws_and_each_row_has_its_own(frame, settings) -> None:
    drawn = [
        LLMGenerator(target="label", features="text", template=few("random", seed=seed), **settings).preview(frame, n=8)
        for seed in (0, 0, 1)
    ]
    prompts = [[tuple(shown(prompt)[:-1]) for prompt in one["prompt"]] for one in drawn]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(set(prompts[0])) > 4


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_fitted_row_does_not_find_its_answer_afterwards(kind: Any, head: str, frame, settings) -> None:
    twice = pd.concat([frame, frame.assign(label=frame["label"].to_numpy()[::-1])])
    clf = LLMClassifier(
        target="label", features="text", template=few(kind, 3), head=head, **settings | {"adapter": None}
    )
    before = clf.preview(twice, n=16)["prompt"].tolist()
    clf.fit(twice)
    after = clf.preview(twice[["text"]], n=16)["prompt"].tolist()
    assert after == before
    for own, prompt in zip(twice["text"], after, strict=True):
        *others, last = shown(prompt)
        assert (last, len(others)) == (own, 3)
        assert own not in others


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_whose_examples_are_all_but_itself_has_the_others(kind: str, frame, settings) -> None:
    clf = LLMClassifier(target="label", features="text", template=few(kind, 7), **settings | {"adapter": None})
    clf.fit(frame)
    for own, prompt in zip(frame["text"], clf.preview(frame, n=8)["prompt"], strict=True):
        assert sorted(shown(prompt)[:-1]) == sorted(set(frame["text"]) - {own})
    (new,) = clf.preview(pd.DataFrame({"text": ["a boat"]}))["prompt"]
    assert len(shown(new)) == 8


@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")  # a random model does not end its answers
def test_rows_that_are_measured_have_the_prompts_that_they_are_predicted_with(frame, settings, monkeypatch) -> None:
    model = LLMGenerator(
        target="label", features="text", template=few("semantic", 1), generation={"max_new_tokens": 2}, **settings
    ).fit(frame)
    seen: list[Any] = []
    encode = type(model._prompts).encode
    monkeypatch.setattr(
        type(model._prompts), "encode", lambda *given, **more: seen.append(encode(*given, **more)) or seen[-1]
    )
    model.evaluate(frame)
    assert len(seen) == 2
    assert [row.prompt for row in seen[0]] == [row.prompt for row in seen[1]]


def test_rows_held_out_are_no_examples(frame, settings) -> None:
    clf = LLMClassifier(
        target="label", features="text", template=few("semantic"), validation_fraction=0.25, **settings
    ).fit(frame)
    held = set(frame["text"]) - {example.content[1].text for example in clf._prompts.template.examples}
    assert len(held) == 2
    seen = {text for prompt in clf.preview(frame, n=8)["prompt"] for text in shown(prompt)[:-1]}
    assert not seen & held


def test_several_targets_are_shown_with_all_their_answers(frame, settings) -> None:
    model = LLMEstimator(
        target=["label", "size"],
        features="text",
        template={"template": PLAIN, "few_shot": {"k": 1, "retrieval": "semantic"}},
        **settings | {"adapter": None},
    ).fit(frame.assign(size=frame["size"] % 2))
    prompt = model.preview(frame[["text"]], n=1)["prompt"].iloc[0]
    assert re.search(r"Text: green pear\nLabel: fruit\s+size:\s*1\s+Text: red apple", prompt)
    assert list(model.predict(frame[["text"]]).columns) == ["label", "size"]


def test_fewer_rows_than_examples_are_said_so(frame, settings) -> None:
    clf = LLMClassifier(target="label", features="text", template=few("random", 9), **settings | {"adapter": None})
    with pytest.warns(DataWarning, match="few_shot asks for 9 worked examples, but the rows have 8 distinct prompt"):
        clf.fit(frame)
    assert len(shown(clf.preview(frame)["prompt"].iloc[0])) == 8


def test_another_model_than_that_of_the_fit_is_refused(frame, settings, tiny_chat: str, tiny: str) -> None:
    template = few("semantic", model=tiny_chat)
    clf = LLMClassifier(target="label", features="text", template=template, **settings | {"adapter": None}).fit(frame)
    retrieval = clf._prompts.retrieval
    object.__setattr__(retrieval, "model", tiny)
    with pytest.raises(ModelLoadError) as caught:
        clf.predict(frame)
    now = clf.base_model_["fingerprint"]
    assert str(caught.value) == (
        f"The model {tiny!r} of few_shot is not the one of the fit: its fingerprint is {now}, not "
        f"{retrieval.fingerprint}."
    )


@pytest.mark.parametrize(
    ("few_shot", "sentence"),
    [
        (
            {"retrieval": "semantics"},
            "The 'retrieval' parameter of few_shot must be one of None, 'random', 'semantic'. Got 'semantics' instead. "
            "Did you mean 'semantic'?",
        ),
        (
            {"retrieval": "random", "model": "m"},
            "The 'model' parameter of few_shot must be None unless retrieval is 'semantic'. Got 'm' instead.",
        ),
        (
            {"retrieval": "semantic", "model": 3},
            "The 'model' parameter of few_shot must be None, a name or a path. Got 3 instead.",
        ),
        (
            {"retrival": "random"},
            "few_shot has no parameter 'retrival'. It has 'k', 'model', 'retrieval', 'seed'. Did you mean 'retrieval'?",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(few_shot: Any, sentence: str, frame, settings) -> None:
    with pytest.raises(ParameterError) as caught:
        LLMClassifier(target="label", template={"few_shot": few_shot}, **settings).fit(frame)
    assert str(caught.value) == sentence
