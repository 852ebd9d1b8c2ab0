"""Several targets, and one, where input, settings or what came before are odd: nothing is lost in silence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import SETS
from torch_side import same

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMRegressor
from llmfit.exceptions import DataError, ParameterError, TemplateError, TruncationWarning

BOTH = {"label": "category", "price": "number"}
ENDLESS = pytest.mark.filterwarnings("ignore:.*without an end:llmfit.exceptions.TruncationWarning")


@pytest.fixture
def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Eight rows with a class, a number, a text and several labels."""
    notes = [f"{text.split()[1]}s" for text in frame["text"]]
    return frame[["text", "label"]].assign(price=[1.5, 2.0, 30.25, 4.0, 5.5, 60.0, 7.25, 8.0], note=notes, tags=SETS)


def estimator(settings: dict[str, Any], **changed: Any) -> LLMEstimator:
    """A class and a text in words behind prompts of one template."""
    given = {"target": ["label", "note"], "features": "text", "template": "{text} is a"}
    return LLMEstimator(**{**settings, **given, **changed})


# Settings ---------------------------------------------------------------------------------------------


@ENDLESS
def test_words_may_be_spelled_as_a_dict(table: pd.DataFrame, settings: Any) -> None:
    given = {"generation": {"max_new_tokens": 3}}
    plain = estimator(settings, head="lm", **given).fit(table)
    spelled = estimator(settings, head={"type": "lm"}, **given).fit(table)
    assert same(plain, spelled)
    assert spelled.predict(table).equals(plain.predict(table))


@pytest.mark.parametrize("chat", [False, True])
def test_worked_examples_of_heads_show_every_answer(
    chat: bool, table: pd.DataFrame, settings: Any, tiny_chat: str, tmp_path: Any
) -> None:
    changed: dict[str, Any] = {"base_model": tiny_chat} if chat else {}
    template = {"template": "{text} is a", "few_shot": 1}
    model = estimator(settings, head="linear", target=BOTH, template=template, **changed)
    unfitted = model.preview(table, 8)
    shown = model.fit(table).preview(table, 8)
    assert shown["prompt"].equals(unfitted["prompt"])
    between = "<|im_end|>\n<|im_start|>user\nprice:<|im_end|>\n<|im_start|>assistant\n" if chat else "\n\nprice: "
    parts = [
        f"{label}{between}{price}" for label, price in zip(table["label"], ("1.5", "2", "30.25", "4"), strict=False)
    ]
    assert any(part in shown["prompt"].iloc[4] for part in parts)
    model.save(tmp_path / "model")
    assert llmfit.load(tmp_path / "model").predict(table).equals(model.predict(table))


@ENDLESS
def test_weights_of_losses_set_after_the_fit_are_checked(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, adapter=None, generation={"max_new_tokens": 1}).fit(table)
    with pytest.raises(ParameterError) as raised:
        model.set_params(loss_weights={"lable": 2.0}).score(table)
    assert str(raised.value) == (
        "loss_weights names the target 'lable'; the targets are 'label', 'note'. Did you mean 'label'?"
    )


# Forms of y -------------------------------------------------------------------------------------------


def test_y_may_be_a_list_of_dicts(table: pd.DataFrame, settings: Any) -> None:
    names = ["label", "note"]
    framed = estimator(settings, target=None).fit(table[["text"]], table[names])
    listed = estimator(settings, target=None).fit(table[["text"]], table[names].to_dict("records"))
    assert list(listed.estimators_) == names
    assert same(framed, listed)
    one = LLMClassifier(**settings, features="text").fit(table[["text"]], table[["label"]].to_dict("records"))
    assert one.classes_.tolist() == ["fruit", "vehicle"]
    assert one.target_ == "label"


@pytest.mark.parametrize(
    ("y", "wrong"),
    [
        (np.zeros((8, 2, 2)), "ndarray of shape (8, 2, 2)"),
        ({"label": ["a"] * 8, "note": ["b"] * 8}, "dict of shape ()"),
        (3, "int of shape ()"),
        ([["a", "b"], ["c"]] * 4, "1"),
    ],
)
def test_a_y_of_other_dimensions_is_refused(y: Any, wrong: str, table: pd.DataFrame, settings: Any) -> None:
    with pytest.raises(DataError) as raised:
        estimator(settings).fit(table[["text"]], y)
    assert str(raised.value) == f"y must have a column for each of the targets 'label', 'note'. Got {wrong} instead."


@pytest.mark.parametrize("head", ["lm", "linear"])
def test_every_dtype_comes_back(head: str, table: pd.DataFrame, settings: Any, tmp_path: Any) -> None:
    columns = {
        "word": pd.Series(["a", "b"] * 4, dtype=object),
        "kind": pd.Categorical(["lo", "hi"] * 4, categories=["lo", "hi", "mid"], ordered=True),
        "short": pd.array([1, 2] * 4, dtype="Int8"),
        "flag": pd.array([True, False] * 4, dtype="boolean"),
        "whole": np.array([3.0, 4.0] * 4),
        "text_": pd.array(["p", "q"] * 4, dtype="string"),
    }
    names = list(columns)
    table = table[["text"]].reset_index(drop=True).assign(**columns).set_axis([7, 7, 1, 2, 3, 4, 5, 6])
    model = estimator(settings, target=names, head=head).fit(table)
    answers = model.predict(table)
    assert answers.dtypes.to_dict() == table[names].dtypes.to_dict()
    assert answers.index.equals(table.index)
    model.save(tmp_path / "model")
    assert llmfit.load(tmp_path / "model").predict(table).dtypes.equals(answers.dtypes)


# Rows to validate on and to measure -------------------------------------------------------------------


@pytest.mark.parametrize("target", ["digit", BOTH | {"digit": "category"}, "tags"])
def test_labels_to_validate_on_are_known_by_their_texts(target: Any, table: pd.DataFrame, settings: Any) -> None:
    """As they are everywhere in words: a file read anew may have integers where the fitted rows had strings."""
    tags = [["1"], ["2", "1"]] * 4
    known = table.assign(digit=["1", "2"] * 4, tags=tags)
    read = known.assign(digit=[1, 2] * 4, tags=[[int(tag) for tag in row] for row in tags])
    fits = [estimator(settings, target=target, head="linear").fit(known, eval_set=rows) for rows in (known, read)]
    losses = [fit.history_["validation_loss"].iloc[-1] for fit in fits]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("head", ["lm", "linear"])
def test_a_number_to_validate_on_must_be_one(head: str, table: pd.DataFrame, settings: Any) -> None:
    rows = table.assign(price=["1"] * 7 + ["dear"])
    sentence = "eval_set: Row 7 (index 'r7'): the target 'price' must be a finite number. Got 'dear' instead."
    for model in (
        estimator(settings, target=BOTH, head=head),
        LLMRegressor(**settings, target="price", features="text", head=head),
    ):
        with pytest.raises(DataError) as raised:
            model.fit(table, eval_set=rows)
        assert str(raised.value) == sentence


@ENDLESS
def test_a_true_text_that_does_not_fit_is_named(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, adapter=None, max_length=64, generation={"max_new_tokens": 1}).fit(table)
    with pytest.raises(TemplateError) as raised:
        model.evaluate(table.assign(note=["x" * 100, *table["note"][1:]]))
    # " fruit", "\n\nnote:", " xxx...", two ends
    assert str(raised.value) == (
        "Row 0 (index 'r0'): the answer has 116 tokens, max_length is 64. An answer is never cut: raise max_length."
    )


def test_room_is_kept_for_classes_of_an_earlier_fit(table: pd.DataFrame, settings: Any) -> None:
    model = LLMClassifier(**settings, target="label", features="text", template="{text}:", warm_start=True)
    model.set_params(max_length=24, truncation="prompt").fit(table)
    few = table.assign(label=["a", "b"] * 4)
    asked = table[:1].assign(text="x" * 100)
    with pytest.warns(TruncationWarning):
        proba = model.fit(few).predict_proba(asked)
    assert model.classes_.tolist() == ["a", "b", "fruit", "vehicle"]
    with pytest.warns(TruncationWarning):
        (row,) = model._prompts.encode(model._fitted_base(), asked[["text"]])
    assert len(row.prompt) + len(" vehicle") + 1 == 24
    assert proba.shape == (1, 4)


# warm_start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["label", ["label", "note"], "tags"])
def test_few_rows_more_do_not_make_another_kind_of_a_target(target: Any, table: Any, settings: Any) -> None:
    """Three rows alone would be text, where eight of the same words are classes."""
    model = estimator(settings, target=target, warm_start=True).fit(table)
    kind = {name: type(inner) for name, inner in vars(model).get("estimators_", {"": model}).items()}
    model.fit(table[:3].assign(label=["fruit", "vehicle", "fruit"], tags=[["fruit", "sweet"], ["fruit"], []]))
    assert {name: type(inner) for name, inner in vars(model).get("estimators_", {"": model}).items()} == kind
    assert model.history_["step"].tolist() == [1, 2]
    if target == "label":
        assert isinstance(model.estimator_, LLMClassifier)


TURNS: dict[str, tuple[Any, Any, str, str]] = {
    "one to several": ("label", ["label", "note"], "classes", "several targets"),
    "several to one": (["label", "note"], "label", "several targets", "classes"),
    "classes to numbers": ("label", {"price": "number"}, "classes", "numbers"),
}


@pytest.mark.parametrize("case", TURNS)
def test_weights_are_not_dropped_in_silence(case: str, table: pd.DataFrame, settings: Any) -> None:
    before, after, then, now = TURNS[case]
    model = estimator(settings, target=before, warm_start=True).fit(table)
    kept = vars(model).get("estimator_", model)._tensors
    with pytest.raises(ParameterError) as raised:
        model.set_params(target=after).fit(table)
    assert str(raised.value) == (
        f"warm_start goes on from a fit of {then}. Got {now} instead. Set warm_start=False to begin anew."
    )
    assert all(torch.equal(kept[n], t) for n, t in vars(model).get("estimator_", model)._tensors.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_params(warm_start=False).fit(table).predict(table)
