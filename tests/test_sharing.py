"""Many adapters over one base model: loaded once, used in turn and from threads, trained further after a load."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import make_model
from sklearn.model_selection import GridSearchCV
from torch_side import classifier, generator, same, weights

import llmfit
from llmfit import LLMEstimator
from llmfit.base_model import load_base_model

CAPPED = {"generation": {"max_new_tokens": 4}}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*answers for .* reached max_new_tokens:llmfit.exceptions.TruncationWarning"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers are whole blocks of 4-bit weights."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that a model was loaded from, the cache empty at first."""
    llmfit.clear_cache()
    counted: list[str] = []
    read = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: str, **options: Any) -> Any:
        counted.append(folder)
        return read(folder, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return counted


def swapped(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=frame["label"].map({"fruit": "vehicle", "vehicle": "fruit"}))


def fitted(settings: dict[str, Any], frame: pd.DataFrame) -> list[Any]:
    """Estimators of every kind over one base."""
    return [
        classifier(settings).fit(frame),
        classifier(settings, adapter={"bias": "all", "r": 2}, epochs=2).fit(swapped(frame)),
        classifier(settings, adapter=None).fit(frame),
        generator(settings, **CAPPED).fit(frame),
    ]


def answers(model: Any, frame: pd.DataFrame) -> Any:
    return (model.predict_proba if hasattr(model, "predict_proba") else model.predict)(frame)


@pytest.mark.parametrize("quantization", [None, 4, 8])
def test_estimators_in_turn_share_one_base_in_memory(quantization, loads, settings, frame, tiny):
    own = {**settings, "quantization": quantization}
    models = [*fitted(own, frame), *([classifier(own, adapter="full").fit(frame)] if quantization is None else [])]
    base = load_base_model(tiny, device="cpu", dtype="float32", quantization=quantization)
    assert {id(model._fitted_base()) for model in models} == {id(base)}
    stored = [p.data_ptr() for p in base.model.parameters()]
    first = [answers(model, frame) for model in models]
    for _ in range(2):
        for model, expected in zip(models[::-1], first[::-1], strict=True):
            np.testing.assert_array_equal(answers(model, frame), expected)
    assert [p.data_ptr() for p in base.model.parameters()] == stored
    assert loads == [str(Path(tiny).resolve())]


def test_a_search_tokenises_every_text_once(settings, frame, tiny, monkeypatch):
    """Whatever candidates and folds are fitted, predicted and scored: those of one template meet the same texts."""
    llmfit.clear_cache()
    rows = frame.assign(text=[f"{text}, row {i} of a search" for i, text in enumerate(frame["text"])])
    seen: list[str] = []
    real = transformers.PreTrainedTokenizerBase.__call__

    def spy(self: Any, text: Any, *given: Any, **named: Any) -> Any:
        seen.extend(each for each in ([text] if isinstance(text, str) else text) if "of a search" in each)
        return real(self, text, *given, **named)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", spy)
    search = GridSearchCV(classifier(settings), {"adapter__r": [2, 4], "learning_rate": [1e-3, 1e-2]}, cv=2)
    search.fit(rows, rows["label"])
    assert len(seen) == len(set(seen)) == len(rows)


def test_what_an_estimator_keeps_is_its_adapter_alone(settings, frame, tiny):
    clf = classifier(settings, adapter={"r": 2, "target_modules": ["q_proj"]}).fit(frame)
    kept = sum(tensor.numel() for tensor in weights(clf).values())
    assert kept == clf.trainable_parameters_ == 2 * 2 * (64 + 64)
    assert kept < clf.memory_footprint_ / 100
    assert not any(isinstance(value, torch.nn.Module) for value in vars(clf).values())


@pytest.mark.parametrize("quantization", [None, 4])
def test_threads_answer_as_one_after_another(quantization, loads, settings, frame):
    models = fitted({**settings, "quantization": quantization}, frame)
    alone = [answers(model, frame) for model in models]
    asked = [i % len(models) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: answers(models[i], frame), asked))
    for i, answer in zip(asked, together, strict=True):
        np.testing.assert_array_equal(answer, alone[i])
    assert len(loads) == 1


def test_one_estimator_answers_many_threads(settings, frame):
    clf = classifier(settings).fit(frame)
    alone = [clf.predict_proba(frame[i : i + 1]) for i in range(len(frame))]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: clf.predict_proba(frame[i : i + 1]), range(len(frame))))
    np.testing.assert_array_equal(together, alone)


def test_threads_fit_predict_and_export_beside_each_other(loads, settings, frame, tmp_path):
    own = {**settings, "adapter": {"r": 2, "dropout": 0.3}}
    seeds = range(3)
    alone = [classifier(own, random_state=seed).fit(frame) for seed in seeds]
    proba = alone[0].predict_proba(frame)

    def fit(seed: int) -> Callable[[], Any]:
        return lambda: classifier(own, random_state=seed).fit(frame)

    work: list[Callable[[], Any]] = []
    for seed in seeds:
        work += [
            fit(seed),
            lambda: alone[0].predict_proba(frame),
            lambda seed=seed: alone[0].export(tmp_path / str(seed)),
        ]
    with ThreadPoolExecutor(4) as pool:
        done = [future.result() for future in [pool.submit(job) for job in work]]
    for seed in seeds:
        assert same(done[3 * seed], alone[seed])
        np.testing.assert_array_equal(done[3 * seed + 1], proba)
        assert (tmp_path / str(seed) / "model.safetensors").is_file()
    assert len(loads) == 1 + len(seeds)  # each export merges into a copy of its own


# Further training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"adapter": {"r": 2}},
        {"adapter": {"r": 2, "use_dora": True, "dropout": 0.2}},
        {"adapter": {"r": 2, "bias": "all"}},
        {"adapter": "full"},
        {"adapter": {"r": 2}, "quantization": 4},
        {"adapter": {"r": 2}, "quantization": 8, "gradient_checkpointing": True},
    ],
    ids=["lora", "dora", "bias", "full", "4", "8"],
)
def test_a_loaded_model_is_trained_further_as_if_it_had_not_been_away(changed, settings, frame, tmp_path):
    clf = classifier(settings, warm_start=True, **changed).fit(frame)
    clf.save(tmp_path / "model")
    clf.fit(swapped(frame))
    llmfit.clear_cache()
    loaded = llmfit.load(tmp_path / "model", warm_start=True)
    first = {name: tensor.clone() for name, tensor in weights(loaded).items()}
    loaded.fit(swapped(frame))
    assert same(loaded, clf)
    assert not same(first, loaded)
    columns = ["step", "epoch", "loss", "grad_norm", "learning_rate"]
    pd.testing.assert_frame_equal(loaded.history_[columns], clf.history_[columns], check_exact=True)
    np.testing.assert_array_equal(loaded.predict_proba(frame), clf.predict_proba(frame))
    anew = llmfit.load(tmp_path / "model", warm_start=False).fit(swapped(frame))  # begins at the beginning
    assert len(anew.history_) == 1
    assert not same(anew, loaded)


def test_other_estimators_go_on_too(settings, frame, tmp_path):
    for i, model in enumerate(
        [
            generator(settings, warm_start=True, **CAPPED),
            LLMEstimator(target="label", features="text", warm_start=True, **settings),
        ]
    ):
        model.fit(frame).save(tmp_path / str(i))
        model.fit(frame)
        loaded = llmfit.load(tmp_path / str(i)).fit(frame)
        inner, other = (getattr(m, "estimator_", m) for m in (model, loaded))
        assert same(inner, other)
        assert len(loaded.history_) == 2


def test_an_adapter_is_trained_further_beside_another_storage_of_its_base(settings, frame, tmp_path):
    """Trained beside four bits, then beside the whole model: the same adapter goes on."""
    clf = classifier(settings, quantization=4).fit(frame)
    clf.save(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in weights(clf).items()}
    loaded = llmfit.load(tmp_path / "model", quantization=None, warm_start=True, learning_rate=1e-12)
    loaded.fit(frame)
    assert all(torch.allclose(weights(loaded)[name], tensor, atol=1e-6) for name, tensor in before.items())
    assert loaded.memory_footprint_ > clf.memory_footprint_
