"""Input that is unusual but meant: nullable arrays, indexes of texts, empty lists; what is refused has a sentence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator
from llmfit.base_model import _read, find_source
from llmfit.exceptions import DataError, LLMFitWarning, ModelLoadError, OutOfMemoryError, ParameterError

LABELS = {
    "nullable booleans": pd.array([True, False] * 4, dtype="boolean"),
    "nullable ints": pd.array([1, 2] * 4, dtype="Int64"),
    "ints beyond floats": pd.array([2**60 + 1, 2**60 + 3] * 4, dtype="Int64"),
    "categories": pd.Categorical(["u", "v"] * 4),
    "an index": pd.Index(["u", "v"] * 4),
}


@pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)
def test_labels_beside_the_frame_keep_their_dtype(y: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    model = LLMClassifier(adapter=None, **settings).fit(frame[["text"]], y)
    answer = model.predict(frame[["text"]])
    assert answer.dtype == pd.Series(y).dtype
    assert set(answer) <= set(y)
    assert model.preview(frame, 2, y=y)["completion"].str.contains(str(y[0])).any()


TEXTS = {
    "a list with a gap": ["red apple", None, "old car"],
    "an array with a gap": np.array(["red apple", None, "old car"], dtype=object),
    "an index": pd.Index(["red apple", "plum", "old car"]),
    "a nullable array": pd.array(["red apple", None, "old car"], dtype="string"),
}


@pytest.mark.parametrize("X", TEXTS.values(), ids=TEXTS)
def test_texts_without_a_column_name_are_rows(X: Any, settings: dict[str, Any], frame: pd.DataFrame) -> None:
    assert len(LLMClassifier(adapter=None, **settings).fit(X, ["u", "v", "u"]).predict(X)) == 3
    named = LLMClassifier(adapter=None, target="label", **settings).fit(frame[["text", "label"]])
    assert len(named.predict(X)) == 3  # the one column that was fitted


def test_no_row_has_no_answer(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    texts = LLMClassifier(adapter=None, **settings).fit(frame["text"].tolist(), frame["label"].tolist())
    assert texts.predict([]).shape == (0,)
    assert texts.predict_proba([]).shape == (0, 2)
    table = LLMClassifier(adapter=None, **settings).fit(np.arange(16.0).reshape(8, 2), frame["label"].tolist())
    assert table.predict(np.empty((0, 2))).shape == (0,)
    with pytest.raises(ValueError, match="0 sample"):
        table.predict(np.empty((0, 3)))


def test_a_number_reads_alike_whatever_stands_beside_it(settings: dict[str, Any]) -> None:
    frame = pd.DataFrame({"price": [1.5, 2.0, 3.25, 4.0], "label": ["u", "v"] * 2})
    model = LLMClassifier(adapter=None, target="label", **settings).fit(frame)
    alone = model.preview(pd.DataFrame({"price": [2]}))["prompt"][0]
    together = model.preview(pd.DataFrame({"price": [2, 2.5]}))["prompt"][0]
    assert alone == together
    assert "price: 2.0" in alone
    assert np.allclose(model.predict_proba([{"price": 2}]), model.predict_proba([{"price": 2}, {"price": 2.5}])[:1])


def test_what_is_no_class_label_is_refused_before_training(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    days = pd.to_datetime(["2020-01-01", "2020-01-02"] * 4)
    for y in (days, pd.Series(days.date), pd.Series(days - days[0])):
        with pytest.raises(DataError, match=r"^The labels of 'label' are dates or times \(.*\)\. Make them text first"):
            LLMClassifier(**settings).fit(frame[["text"]], y)
    with pytest.raises(DataError, match=r"^The target 'size' is declared as 'binary', but has 8 classes\.$"):
        LLMClassifier(target={"size": "binary"}, features="text", **settings).fit(frame)


def test_several_tables_are_none(settings: dict[str, Any]) -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"], "label": ["u"]})})
    with pytest.raises(DataError, match=r"^X must be a frame, .* Got DatasetDict instead\.$"):
        LLMClassifier(target="label", **settings).fit(splits)


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_that_is_none_is_refused(path: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=rf"^The 'path' parameter of load must be a str or a path\. Got {path}"):
        llmfit.load(path)
    with pytest.raises(ParameterError, match=rf"^The 'path' parameter of save must be a str or a path\. Got {path}"):
        LLMClassifier(target="label", adapter=None, **settings).fit(frame).save(path)


def test_a_device_of_torch_is_saved(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    model = LLMClassifier(target="label", adapter=None, **settings | {"device": torch.device("cpu")}).fit(frame)
    model.save(tmp_path / "m")
    assert (llmfit.load(tmp_path / "m").predict(frame) == model.predict(frame)).all()


def test_whole_numbers_are_numbers_for_generation(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    keys = {"max_new_tokens": 4, "repetition_penalty": 2, "do_sample": True, "temperature": 2, "top_p": 1}
    model = LLMGenerator(target="label", adapter=None, generation=keys, **settings).fit(frame)
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        assert len(model.predict(frame)) == 8
    short = {"min_new_tokens": 100}
    with pytest.raises(
        ParameterError, match=r"^The 'min_new_tokens' parameter of generation must be at most 32, the l"
    ):
        LLMGenerator(target="label", adapter=None, generation=short, **settings).fit(frame)


@pytest.mark.parametrize("key", [{"no_repeat_ngram_size": 1}, {"repetition_penalty": 1.5}])
def test_penalties_do_not_count_padding(
    key: dict[str, Any], frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    more = {"base_model": folder, "adapter": None, "generation": {"max_new_tokens": 12, **key}}
    model = LLMGenerator(target="label", features="text", **settings | more).fit(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", llmfit.exceptions.TruncationWarning)
        alone = [model.predict(frame[i : i + 1]).iloc[0] for i in range(8)]
        assert model.predict(frame).tolist() == alone


def test_drawn_answers_without_a_seed_differ(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    keys = {"max_new_tokens": 12, "do_sample": True}
    model = LLMGenerator(target="label", adapter=None, generation=keys, **settings | {"random_state": None}).fit(frame)
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        assert model.predict(frame).tolist() != model.predict(frame).tolist()


def test_the_best_epoch_is_one_of_the_whole_history(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    model = LLMClassifier(target="label", features="text", warm_start=True, **settings | {"epochs": 3})
    model.fit(frame, eval_set=frame).fit(frame, eval_set=frame)
    history = model.history_
    assert history["epoch"].iloc[-1] == 6
    after = history[history["epoch"] > 3]
    assert model.best_epoch_ == after.loc[after["validation_loss"].idxmin(), "epoch"]


def test_what_has_no_part_in_zero_shot_is_said(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    model = LLMClassifier(target="label", adapter=None, **settings)
    for given in ({"sample_weight": np.ones(8)}, {"eval_set": frame}):
        with pytest.warns(LLMFitWarning, match=f"^adapter=None trains nothing: {next(iter(given))} has no effect"):
            model.fit(frame, **given)


def test_the_chooser_measures_fractions_and_knows_its_options(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    model = LLMEstimator(target="label", features="text", adapter=None, **settings).fit(frame)
    assert np.allclose(np.exp(model.predict_log_proba(frame)), model.predict_proba(frame))
    texts = LLMEstimator(target={"label": "text"}, features="text", adapter=None, **settings).fit(frame)
    with pytest.raises(ParameterError, match=r"^evaluate of LLMGenerator has no parameter 'per_class'\."):
        texts.evaluate(frame, per_class=True)


def test_memory_that_does_not_hold_the_model_is_one_sentence(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    llmfit.clear_cache()
    with pytest.raises(OutOfMemoryError, match=r"^Memory does not hold the base model\. Choose a smaller base_model"):
        LLMClassifier(tiny, target="label", adapter=None).fit(pd.DataFrame({"a": ["x", "y"], "label": ["u", "v"]}))
    with pytest.raises(RuntimeError, match="can't allocate"):
        _read(find_source(tiny), torch.float32, torch.device("cpu"), None)


def test_an_alias_that_is_misspelt_is_suggested() -> None:
    with pytest.raises(ModelLoadError, match=r"Did you mean 'smollm2'\?$"):
        find_source("smolm2")


def test_a_warning_points_at_the_users_line(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    for cls in (LLMClassifier, LLMEstimator):
        with pytest.warns(llmfit.exceptions.DataWarning) as caught:
            cls(target="label", features=["text", "size"], template="{text}", adapter=None, **settings).fit(frame)
        assert [Path(w.filename).name for w in caught] == [Path(__file__).name] * len(caught)
