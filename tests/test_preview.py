"""Preview: what the model will read and learn, shown before and after a fit, and nothing else happens."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import llmfit.estimators.fitting
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator
from llmfit.base_model import load_base_model
from llmfit.exceptions import DataError, ParameterError

COLUMNS = ["prompt", "completion", "prompt_tokens", "completion_tokens", "loss_tokens", "cut"]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any training fail."""

    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(llmfit.estimators.fitting, "train", train)


def by_hand(texts: list[str], labels: list[str | None], index: list[Any]) -> pd.DataFrame:
    """The preview of the template "T={text}:" worked out with one token a character."""
    rows = [
        (
            f"T={text}:",
            f" {label}</s>" if label else "",
            len(f"T={text}:") + 1,
            len(f" {label}") + 1 if label else 0,
            [*f" {label}", "</s>"] if label else [],
            0,
        )
        for text, label in zip(texts, labels, strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS, index=index)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_preview_before_fit_shows_what_fit_would_learn(
    kind: Any, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    estimator = kind(**settings, template="T={text}:", target="label")
    expected = by_hand(frame["text"].tolist(), frame["label"].tolist(), frame.index.tolist())
    pd.testing.assert_frame_equal(estimator.preview(frame, n=8), expected)
    pd.testing.assert_frame_equal(estimator.preview(frame), expected[:5])
    estimator.set_params(target=None, features="text")
    pd.testing.assert_frame_equal(estimator.preview(frame[["text"]], 3, frame["label"]), expected[:3])


@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator])
def test_preview_after_fit_shows_rows_with_and_without_their_answers(
    kind: Any, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    estimator = kind(**settings, adapter=None, template="T={text}:", target="label").fit(frame[:4])
    texts, labels = ["new one", "日"], ["fruit", "vehicle"]
    new = pd.DataFrame({"text": ["new one", "ab"]}, index=[7, 8])
    known, unknown = by_hand(["new one", "ab"], labels, [7, 8]), by_hand(["new one", "ab"], [None, None], [7, 8])
    pd.testing.assert_frame_equal(estimator.preview(new), unknown)
    pd.testing.assert_frame_equal(estimator.preview(new, y=labels), known)
    pd.testing.assert_frame_equal(estimator.preview(new.assign(label=labels)), known)
    assert estimator.preview(pd.DataFrame({"text": texts[1:]}))["prompt_tokens"].tolist() == [1 + len("T=:") + 3]


@pytest.mark.parametrize("template", [None, "T={text}:\n", {"few_shot": 2}])
def test_preview_before_fit_is_the_one_after_it(template: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, template=template, target="label")
    before = clf.preview(frame, n=8)
    pd.testing.assert_frame_equal(clf.fit(frame).preview(frame, n=8), before)


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (5, 5), (8, 8), (99, 8)])
def test_preview_shows_the_first_n_rows(n: int, rows: int, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    shown = LLMClassifier(**settings, target="label").preview(frame, n)
    assert shown.index.tolist() == frame.index[:rows].tolist()
    assert shown.columns.tolist() == COLUMNS


def test_the_rows_shown_are_learned_from_all_rows(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, target="label", template="{task}")
    clf.set_params(template={"template": "{task} {text}"})
    [prompt] = clf.preview(frame.assign(label=[*frame["label"][:7], "zoo"]), n=1)["prompt"]
    assert prompt == "Predict the label. Answer with one of: fruit, vehicle, zoo. red apple"


def test_the_tokens_that_carry_loss_are_the_completion(tiny_chat: str, frame: pd.DataFrame) -> None:
    clf = LLMClassifier(tiny_chat, target="label", device="cpu", dtype="float32", verbose=0)
    for row in clf.preview(frame, n=8).itertuples():
        assert "".join(row.loss_tokens) == row.completion
        assert len(row.loss_tokens) == row.completion_tokens
        assert row.loss_tokens[-1] == "<|im_end|>"
        assert row.prompt.endswith("<|im_start|>assistant\n")


def test_a_cut_prompt_is_shown_as_it_was_cut(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(
        **settings, target="label", adapter=None, template="T={text}:", max_length=20, truncation="prompt"
    )
    with pytest.warns(UserWarning, match="prompts were cut to max_length 20"):
        shown = clf.preview(frame[2:6], n=4)
    room = 20 - shown["completion_tokens"] - len("<T=:")
    for row, text, most in zip(shown.itertuples(), frame["text"][2:6], room, strict=True):
        assert row.prompt == f"T={text[:most]}:" or row.prompt == f"T={text[: 20 - len('< vehicle>') - len('T=:')]}:"
        assert row.cut == len(text) - len(row.prompt) + len("T=:")
        assert row.prompt_tokens == len(row.prompt) + 1
    assert (shown["cut"] > 0).any()


# --- nothing else happens -------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_preview_leaves_an_unfitted_estimator_as_it_was(
    kind: Any, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    told: list[Any] = []
    params: dict[str, Any] = {
        "template": {"template": "{text}", "few_shot": {"k": 2}},
        "adapter": {"type": "lora", "r": 4},
        "checkpoint_dir": tmp_path / "state",
        "callbacks": told.append,
        "early_stopping": 2,
        "validation_fraction": 0.25,
    }
    given = copy.deepcopy({name: value for name, value in params.items() if name != "callbacks"})
    estimator = kind(**settings, **params, target="label")
    before = dict(vars(estimator))
    estimator.preview(frame)
    assert vars(estimator) == before
    assert {name: params[name] for name in given} == given
    assert not told
    assert not (tmp_path / "state").exists()
    with pytest.raises(NotFittedError):
        estimator.predict(frame)
    clone(estimator)


def test_preview_draws_nothing_from_the_users_random_state(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    random_state = np.random.RandomState(3)
    LLMClassifier(**{**settings, "random_state": random_state}, target="label").preview(frame)
    assert random_state.randint(10**6) == np.random.RandomState(3).randint(10**6)


def test_preview_leaves_a_fitted_estimator_as_it_was(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, target="label", features="text").fit(frame[1:3])
    before, proba = dict(vars(clf)), clf.predict_proba(frame[:1])
    tensors = {name: tensor.clone() for name, tensor in clf._tensors.items()}
    other = pd.DataFrame({"text": ["a", "b", "c"], "label": ["vehicle", "fruit", "vehicle"]})
    clf.preview(other)
    clf.preview(other.drop(columns="label"))
    assert vars(clf).keys() == before.keys()
    assert all(vars(clf)[name] is value for name, value in before.items())
    assert all(tensor.equal(tensors[name]) for name, tensor in clf._tensors.items())
    np.testing.assert_array_equal(clf.predict_proba(frame[:1]), proba)


@pytest.mark.usefixtures("no_training")
def test_preview_leaves_the_base_model_and_the_frame_as_they_were(
    frame: pd.DataFrame, settings: dict[str, Any], tiny: str
) -> None:
    base = load_base_model(tiny, device="cpu", dtype="float32")
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    rows = frame.copy(deep=True)
    LLMClassifier(**settings, target="label").preview(frame)
    assert load_base_model(tiny, device="cpu", dtype="float32") is base
    assert all(tensor.equal(weights[name]) for name, tensor in base.model.state_dict().items())
    pd.testing.assert_frame_equal(frame, rows)


# --- what preview refuses -------------------------------------------------------------------------------


def test_preview_refuses_what_fit_refuses(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    sentence = "LLMClassifier needs the target column 'stars', but the frame has only 'text', 'size', 'label'."
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        LLMClassifier(**settings, target="stars").preview(frame)
    with pytest.raises(ParameterError, match="'epochs' parameter"):
        LLMClassifier(**{**settings, "epochs": 0}, target="label").preview(frame)


def test_preview_before_fit_needs_the_target(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="requires y to be passed, but the target y is None"):
        LLMClassifier(**settings).preview(frame[["text"]])


def test_preview_after_fit_needs_the_features(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(**settings, adapter=None, target="label", features="text").fit(frame)
    sentence = "LLMClassifier needs the feature column 'text', but the frame has only 'size'."
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        clf.preview(frame[["size"]])
