"""Answers that two methods share: one pass over the model for both, and never an answer of something else."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_validate
from torch_side import classifier

from llmfit import scoring
from llmfit.estimators import recalling


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of each pass over the model for answers."""
    seen: list[int] = []
    for name in ("score_labels", "head_outputs"):
        real = getattr(scoring, name)

        def counting(model: Any, prompts: Any, *rest: Any, real: Any = real, **named: Any) -> Any:
            seen.append(len(prompts))
            return real(model, prompts, *rest, **named)

        monkeypatch.setattr(scoring, name, counting)
    recalling._last.clear()
    return seen


HEADS = [{}, {"head": "linear"}, {"adapter": None}]


@pytest.mark.parametrize("changed", HEADS, ids=["lm", "linear", "zero-shot"])
def test_one_pass_answers_two_methods(changed, settings, frame, passes):
    clf = classifier(settings, **changed).fit(frame)
    proba = clf.predict_proba(frame)
    assert passes == [8]
    np.testing.assert_array_equal(clf.predict(frame), clf.classes_[proba.argmax(axis=1)])
    assert clf.score(frame) == np.mean(clf.classes_[proba.argmax(axis=1)] == frame["label"])
    assert passes == [8]
    clf.predict_proba(frame)  # who asks the same twice, has it answered twice
    assert passes == [8, 8]


def test_two_measures_of_a_search_cost_one_pass_a_fold(settings, frame, passes):
    clf = classifier(settings)
    found = cross_validate(clf, frame, frame["label"], cv=2, scoring=["accuracy", "neg_log_loss"])
    assert passes == [4, 4]
    for name in ("accuracy", "neg_log_loss"):
        alone = cross_validate(clone(clf), frame, frame["label"], cv=2, scoring=name)
        np.testing.assert_allclose(found[f"test_{name}"], alone["test_score"])


def test_other_rows_and_other_weights_are_answered_anew(settings, frame, passes):
    clf = classifier(settings).fit(frame)
    first = clf.predict_proba(frame)
    clf.predict(frame.iloc[::-1])
    clf.predict(frame.assign(text=frame["text"] + "!"))
    assert passes == [8, 8, 8]
    clf.predict_proba(frame)
    clf.set_params(learning_rate=5e-2).fit(frame)
    other = clf.predict(frame), clf.predict_proba(frame)
    assert passes == [8] * 5
    assert not np.allclose(other[1], first)
    clf.predict(frame)
    clf.set_params(dtype="float64")
    clf.predict_proba(frame)
    assert passes == [8] * 7
    clf.set_params(dtype="float32")
    again = clf.predict_log_proba(frame)
    np.testing.assert_array_equal(np.exp(again), other[1])


def test_copies_have_nothing_to_recall_and_nothing_is_in_the_classifier(settings, frame, passes):
    clf = classifier(settings).fit(frame)
    before, held = pickle.dumps(clf), dict(vars(clf))
    clf.predict_proba(frame)
    assert pickle.dumps(clf) == before
    assert vars(clf).keys() == held.keys()
    assert all(vars(clf)[name] is value for name, value in held.items())
    passes.clear()
    pickle.loads(before).predict(frame)
    assert passes == [8]


def test_what_is_given_out_may_be_written_to(settings, frame, passes):
    clf = classifier(settings).fit(frame)
    given = clf.predict_log_proba(frame)
    expected = clf.classes_[given.argmax(axis=1)]
    given[:] = 0.0
    np.testing.assert_array_equal(clf.predict(frame), expected)
    assert passes == [8]


def test_one_classifier_is_remembered_and_only_while_it_lives(settings, frame, passes):
    one, other = (classifier(settings, adapter=None).fit(frame) for _ in range(2))
    one.predict_proba(frame)
    other.predict_proba(frame)
    one.predict(frame)
    assert passes == [8, 8, 8]
    assert len(recalling._last) == 1
    del one, other
    gc.collect()
    assert len(recalling._last) == 0


def test_many_answers_are_not_kept(settings, frame, passes, monkeypatch):
    monkeypatch.setattr(recalling, "MOST_NUMBERS", 15)
    clf = classifier(settings, adapter=None).fit(frame)
    clf.predict_proba(frame)
    clf.predict(frame)
    assert passes == [8, 8]
    clf.predict_proba(frame.iloc[:7])
    clf.predict(frame.iloc[:7])
    assert passes == [8, 8, 7]


def test_files_are_answered_by_the_model(settings, frame, passes, tmp_path):
    clf = classifier(settings, adapter=None).fit(frame)
    frame[["text"]].to_csv(tmp_path / "rows.csv", index=False)
    clf.predict_proba(frame)
    clf.predict_files(tmp_path / "rows.csv", tmp_path / "out.csv")
    assert passes == [8, 8]
    assert pd.read_csv(tmp_path / "out.csv")["label_predicted"].tolist() == clf.predict(frame).tolist()
