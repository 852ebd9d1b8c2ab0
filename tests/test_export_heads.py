"""A linear head as a model for sequence classification, loaded by transformers alone; heads without bias."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import SETS, headed, make_encoder, make_encoder_decoder
from sklearn.model_selection import GridSearchCV
from torch_side import make_other, plain_model, plain_tokenizer

import llmfit
from llmfit import LLMEstimator, LLMRegressor
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError
from llmfit.sources import quiet_loading

BARE = {"type": "linear", "bias": False}
ADAPTERS: dict[str, Any] = {
    "frozen": None,
    "lora": {"r": 4},
    "dora": {"type": "dora", "r": 4},
    "full": "full",
    "ia3": "ia3",
}


@torch.no_grad()
def logits_of(folder: Any, texts: Any, side: str) -> np.ndarray:
    """What transformers alone answers to a batch of texts, padded at either side."""
    from transformers import AutoModelForSequenceClassification

    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = plain_tokenizer(str(folder))
    tokenizer.padding_side = side
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
    return model(**batch).logits.double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("kind", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("qwen2", "left")]
)
def test_transformers_alone_answers_alike(
    kind: str, adapter: str, side: str, settings: Any, frame: Any, tiny: str, tmp_path: Path
) -> None:
    folder = tiny if kind == "llama" else make_other(tmp_path / kind, tiny, kind)
    frame = frame.assign(label=["fruit", "fruit", "car", "train"] * 2)
    given = settings | {"base_model": folder, "adapter": ADAPTERS[adapter], "epochs": 6, "head": BARE}
    clf = headed(given).fit(frame)
    before = {
        n: t.clone() for n, t in load_base_model(folder, device="cpu", dtype="float32").model.state_dict().items()
    }
    clf.export(tmp_path / "plain")
    logits = logits_of(tmp_path / "plain", frame["text"] + " is a", side)
    np.testing.assert_allclose(softmax(logits), clf.predict_proba(frame), atol=1e-4)
    assert np.abs(logits).max() > 0.01
    config = json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "car", "1": "fruit", "2": "train"}
    assert config["problem_type"] == "single_label_classification"
    card = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    after = load_base_model(folder, device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_several_labels_a_row_are_exported(settings: Any, frame: Any, tmp_path: Path) -> None:
    clf = headed(settings | {"epochs": 5, "head": BARE, "target": "tags", "features": "text"}).fit(
        frame.assign(tags=SETS)
    )
    clf.export(tmp_path / "plain", dtype="bfloat16")
    clf.export(tmp_path / "plain")
    logits = logits_of(tmp_path / "plain", frame["text"] + " is a", "right")
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), clf.predict_proba(frame), atol=1e-4)
    config = json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "multi_label_classification"


def test_an_estimator_of_any_target_exports_its_head(settings: Any, frame: Any, tmp_path: Path) -> None:
    model = headed(settings | {"head": BARE, "features": "text"}, LLMEstimator).fit(frame)
    model.export(tmp_path / "plain")
    logits = logits_of(tmp_path / "plain", frame["text"] + " is a", "right")
    np.testing.assert_allclose(softmax(logits), model.predict_proba(frame), atol=1e-4)


BESIDE = "Use merge=False, which writes the head beside the adapter, or save()."


def refused(model: Any, folder: Path, why: str, advice: str = BESIDE) -> None:
    with pytest.raises(ParameterError) as error:
        model.export(folder)
    assert str(error.value) == (
        f"A linear head is merged into a model of transformers for sequence classification, which {why}. {advice}"
    )
    assert not folder.exists()


def test_what_no_such_model_answers_is_refused(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    out, bare = tmp_path / "out", settings | {"adapter": None, "head": BARE, "features": "text"}
    usual = headed(settings | {"adapter": None}).fit(frame)
    refused(usual, out, "has no bias: fit with head={'type': 'linear', 'bias': False}")
    full = headed(bare | {"adapter": "full", "head": "linear"}).fit(frame)
    refused(full, out, "has no bias: fit with head={'type': 'linear', 'bias': False}", "Use save().")
    mean = headed(bare | {"head": {**BARE, "pooling": "mean"}}).fit(frame)
    refused(mean, out, "reads the last token, and this one pools by 'mean'")
    number = headed(bare | {"target": "price"}, LLMRegressor).fit(frame.assign(price=np.arange(8.0)))
    refused(number, out, "has no place for the mean of a number's targets")
    both = headed(bare | {"target": ["label", "size"]}, LLMEstimator).fit(frame.assign(size=[0, 1] * 4))
    refused(both, out, "has one target, and this one has several")
    for make, kind in ((make_encoder, "encoder"), (make_encoder_decoder, "encoder-decoder")):
        clf = headed(bare | {"base_model": make(tmp_path / kind)}).fit(frame)
        why = f"is a decoder: transformers puts layers of its own between an {kind} and the head"
        refused(clf, out, why)
    granite = make_other(tmp_path / "granite", tiny, "granite")
    refused(
        headed(bare | {"base_model": granite}).fit(frame), out, "transformers does not have of the family 'granite'"
    )


def test_a_family_whose_model_answers_otherwise_is_refused(
    settings: Any, frame: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForSequenceClassification

    clf = headed(settings | {"head": BARE}).fit(frame)
    own = LlamaForSequenceClassification.forward

    def doubled(self: Any, **given: Any) -> Any:
        out = own(self, **given)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", doubled)
    refused(clf, tmp_path / "out", "of the family 'llama' would answer otherwise")


# Heads without bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_a_head_without_bias_is_a_matrix(adapter: Any, settings: Any, frame: Any, tmp_path: Path) -> None:
    given = settings | {"adapter": adapter, "epochs": 40, "learning_rate": 3e-2, "warm_start": True}
    clf = headed(given, head=BARE).fit(frame)
    assert clf.score(frame) == 1.0
    assert [name for name in clf._tensors if name.startswith("head/")] == ["head/weight"]
    if adapter is None:
        plain = plain_model(settings["base_model"])
        rows = [plain_tokenizer(settings["base_model"])(f"{text} is a")["input_ids"] for text in frame["text"]]
        with torch.no_grad():
            vectors = torch.cat([plain.model(torch.tensor([row])).last_hidden_state[:, -1] for row in rows])
        logits = (vectors @ clf._tensors["head/weight"].T).double().numpy()
        np.testing.assert_allclose(softmax(logits), clf.predict_proba(frame), atol=1e-5)
    clf.save(tmp_path / "saved")
    loaded = llmfit.load(tmp_path / "saved", learning_rate=1e-12, epochs=1)
    assert loaded.predict_proba(frame).tolist() == clf.predict_proba(frame).tolist()
    again = loaded.fit(frame)
    assert again.history_["loss"].iloc[-1] == pytest.approx(float(clf.history_["loss"].iloc[-1]), abs=0.05)
    np.testing.assert_allclose(again.predict_proba(frame), clf.predict_proba(frame), atol=1e-5)


def test_the_first_step_of_a_matrix_is_that_by_hand(settings: Any, frame: Any) -> None:
    """On vectors divided by their root mean squares and by the root of the width, with plain gradient descent."""
    clf = headed(settings | {"adapter": None, "optimizer": "sgd", "learning_rate": 0.5, "warmup": 0}, head=BARE)
    clf.set_params(schedule="constant", max_grad_norm=None).fit(frame)
    plain = plain_model(settings["base_model"])
    rows = [plain_tokenizer(settings["base_model"])(f"{text} is a")["input_ids"] for text in frame["text"]]
    with torch.no_grad():
        vectors = torch.cat([plain.model(torch.tensor([row])).last_hidden_state[:, -1] for row in rows]).double()
    spread = vectors.square().mean(0).sqrt() * 32**0.5
    truth = torch.tensor(pd.factorize(frame["label"])[0])
    gradient = (torch.full((8, 2), 0.5) - torch.nn.functional.one_hot(truth)).double().T @ (vectors / spread) / 8
    expected = -0.5 * gradient / spread
    torch.testing.assert_close(clf._tensors["head/weight"].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_bias_is_searched_and_checked(settings: Any, frame: Any) -> None:
    given = settings | {"adapter": None, "features": "text"}
    search = GridSearchCV(headed(given), {"head__bias": [True, False]}, cv=2).fit(frame, frame["label"])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    with pytest.raises(ParameterError) as error:
        headed(given, head={"bias": 1}).fit(frame)
    assert str(error.value) == "The 'bias' parameter of head must be one of True, False. Got 1 instead."
