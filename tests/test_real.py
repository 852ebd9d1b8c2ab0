"""What only a real model shows, on SmolLM2-135M: `make test-real`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import GridSearchCV, KFold

import llmfit
from llmfit import LLMClassifier, LLMGenerator, inference, together
from llmfit.base_model import load_base_model
from llmfit.datasets import load_book_reviews, load_support_faq
from llmfit.scoring import label_sequences
from llmfit.search import FusedGridSearchCV

pytestmark = pytest.mark.real

TASK = {"task": "Rate this book review from 1 (hated it) to 5 (loved it)."}


def test_the_embedded_model_knows_the_capital_of_france() -> None:
    """Tokenizer, chat template, weights and the end of the turn all have to be right for this."""
    question = pd.DataFrame({"question": ["What is the capital of France?"], "answer": ["Paris"]})
    model = LLMGenerator(
        "smollm2", features="question", target="answer", template="{question}", adapter=None, verbose=0
    ).fit(question)
    assert model.predict(question).iloc[0] == "The capital of France is Paris."


def test_the_alias_is_converted_once_and_found_again() -> None:
    first = load_base_model("smollm2")
    llmfit.clear_cache()
    second = load_base_model("smollm2")
    assert first is not second
    assert first.source == second.source


def test_labels_scored_over_the_cache_equal_a_full_forward_per_label() -> None:
    reviews = load_book_reviews()[:6]
    names = ["very bad", "bad", "so so", "good", "very good", "very"]
    reviews["label"] = names
    model = LLMClassifier("smollm2", features="review", target="label", adapter=None, dtype="float32", verbose=0).fit(
        reviews
    )
    base = load_base_model("smollm2", dtype="float32")
    encoder = model._prompts.encoder(base)
    labels = label_sequences(model._label_ids(encoder), encoder.end_id)
    rows = model._prompts.encode(base, model._prompts.select(reviews, ""))
    naive = np.empty((6, 6))
    with torch.inference_mode():
        for i, row in enumerate(rows):
            for k, label in enumerate(labels):
                ids = torch.tensor([[*row.prompt, *label]], device=base.device)
                logits = base.model(input_ids=ids).logits[0].log_softmax(-1)
                start = len(row.prompt) - 1
                naive[i, k] = sum(float(logits[start + j, token]) for j, token in enumerate(label))
    naive -= np.logaddexp.reduce(naive, axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_log_proba(reviews), naive, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*without an end")
def test_answers_of_packed_prompts_are_those_of_each_prompt_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ways = inference.begin, []
    monkeypatch.setattr(inference, "begin", lambda *given, **named: ways.append(real(*given, **named)) or ways[-1])
    reviews = load_book_reviews()[:12]
    model = LLMGenerator(
        "smollm2", features="review", target="title", template=TASK, adapter=None, dtype="float32", verbose=0
    ).set_params(generation={"max_new_tokens": 20})
    found = model.fit(reviews).predict(reviews)
    assert capfd.readouterr() == ("", "")
    assert [type(way).__name__ for way in ways] == ["PackedPrompts"]
    base = load_base_model("smollm2", dtype="float32")
    encoder, alone = model._prompts.encoder(base), []
    ends = {"eos_token_id": encoder.end_id, "pad_token_id": encoder.end_id, "do_sample": False}
    for row in model._prompts.encode(base, model._prompts.select(reviews, "")):
        prompt = torch.tensor([row.prompt], device=base.device)
        said = base.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **ends)
        alone.append(base.tokenizer.decode(said[0, len(row.prompt) :], skip_special_tokens=True).strip())
    assert found.tolist() == alone
    assert len(set(alone)) > 6


def test_fine_tuning_beats_zero_shot_on_held_out_reviews() -> None:
    reviews = load_book_reviews()
    train, test = reviews[50:130], reviews[:50]
    settings = {"target": "score", "template": TASK, "random_state": 0, "verbose": 0}
    before = LLMClassifier("smollm2", adapter=None, **settings).fit(train).evaluate(test)
    after = LLMClassifier("smollm2", epochs=1, learning_rate=5e-4, **settings).fit(train).evaluate(test)
    assert after["log_loss"] < before["log_loss"] - 0.2


def test_answers_learned_by_heart_come_back_word_for_word() -> None:
    faq = load_support_faq()[:6]
    model = LLMGenerator(
        "smollm2", features="question", target="answer", epochs=25, learning_rate=2e-3, random_state=0, verbose=0
    ).fit(faq)
    assert model.score(faq) == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="not known of a GPU")
def test_candidates_side_by_side_are_to_the_bit_what_they_are_alone_in_bfloat16(monkeypatch) -> None:
    """Some CPUs round products of more rows otherwise, if they are as large as those of a real model."""
    reviews = load_book_reviews()[:24]
    model = LLMClassifier(
        "smollm2", target="score", template=TASK, adapter="lora", dtype="bfloat16", verbose=0
    ).set_params(epochs=1, batch_size=8, random_state=0)
    grid = {"adapter__r": [4, 16], "learning_rate": [5e-4, 1e-3]}
    how = {"cv": KFold(2), "scoring": "neg_log_loss", "refit": False}
    step, seen = together._one_step, []
    monkeypatch.setattr(together, "_one_step", lambda *given: (seen.append(len(given[2])), step(*given))[1])
    one, other = (kind(model, grid, **how).fit(reviews, reviews["score"]) for kind in (FusedGridSearchCV, GridSearchCV))
    assert min(seen) > 1
    np.testing.assert_array_equal(*(search.cv_results_["mean_test_score"] for search in (one, other)))
