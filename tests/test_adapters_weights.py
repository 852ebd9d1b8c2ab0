"""What LoRA adapts that is no layer of its own: experts' weights, biases, and ends that share their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.adapters import IDS
from sklearn.model_selection import GridSearchCV
from test_adapters_more import exported, logits_of
from torch_side import classifier, furthest, make_other, plain_model, same, weights

import llmfit
from llmfit.exceptions import ParameterError
from llmfit.search import FusedGridSearchCV

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "experts and layers": {"target_parameters": EXPERTS[:1]},
    "all that was linear once": {},  # peft counts such experts and their router in, the experts with twice the rank
    "biases": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "tied ends": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("bases")
    moe = make_other(place / "moe", tiny, "mixtral", **MOE)
    biased = make_other(place / "biased", tiny, "llama", attention_bias=True)
    tied = make_other(place / "tied", tiny, "llama", tie_word_embeddings=True)
    return {
        "experts": moe,
        "experts and layers": moe,
        "all that was linear once": moe,
        "biases": biased,
        "tied ends": tied,
    }


@pytest.fixture(params=OWN)
def given(request: Any, settings: Any, folders: dict[str, str]) -> dict[str, Any]:
    own = {"type": "lora", "r": 4, **OWN[request.param]}
    return {**settings, "base_model": folders[request.param], "adapter": own, "epochs": 3, "learning_rate": 5e-3}


def test_it_learns_is_saved_and_loaded(given: Any, frame: Any, tmp_path: Path) -> None:
    clf = classifier(given).fit(frame)
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    clf.save(tmp_path / "saved")
    llmfit.clear_cache()
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_allclose(again.predict_proba(frame), clf.predict_proba(frame), atol=1e-6)
    assert same(again, clf)
    assert all(len(tensor.unique()) > 1 for name, tensor in weights(clf).items() if "norm" not in name)


@pytest.mark.filterwarnings("ignore:.*pattern keys did not match")  # which peft has written itself
def test_transformers_and_peft_alone_read_what_is_exported(given: Any, frame: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    clf = classifier(given).fit(frame)
    here = logits_of(clf)
    with torch.no_grad():
        before = plain_model(given["base_model"])(input_ids=IDS).logits
    assert float((here - before).abs().max()) > 1e-2
    torch.testing.assert_close(exported(clf, tmp_path / "merged"), here, rtol=0, atol=1e-4)
    clf.export(tmp_path / "adapter", merge=False)
    beside = PeftModel.from_pretrained(plain_model(given["base_model"]), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(beside(input_ids=IDS).logits, here, rtol=0, atol=1e-5)
    begun = classifier({**given, "adapter": str(tmp_path / "adapter")}, epochs=1, learning_rate=1e-9).fit(frame)
    np.testing.assert_allclose(begun.predict_proba(frame), clf.predict_proba(frame), atol=1e-4)


def test_answers_are_the_same_at_every_budget(given: Any, frame: Any) -> None:
    found = [classifier(given, batch_tokens=budget).fit(frame) for budget in (64, 4096)]
    np.testing.assert_allclose(*(clf.predict_proba(frame) for clf in found), atol=1e-4)
    assert furthest(*map(weights, found)) < 1e-4


def test_it_is_searched(given: Any, frame: Any) -> None:
    how = {"cv": 2, "scoring": "neg_log_loss", "error_score": "raise", "refit": False}
    grid = {"adapter__alpha": [4, 32]}
    both = [kind(classifier(given), grid, **how) for kind in (GridSearchCV, FusedGridSearchCV)]
    alone, beside = (s.fit(frame[["text"]], frame["label"]).cv_results_["mean_test_score"] for s in both)
    np.testing.assert_allclose(beside, alone, atol=1e-4)
    assert alone[0] != alone[1]


def test_every_expert_has_an_a_and_a_b(settings: Any, folders: dict[str, str], frame: Any) -> None:
    own = {**settings, "base_model": folders["experts"], "adapter": {"r": 4, **OWN["experts"]}}
    clf = classifier(own).fit(frame)
    per_block = 4 * 4 * (32 + 128) + 4 * 4 * (64 + 32)  # experts x rank x (inputs + outputs)
    assert clf.trainable_parameters_ == 2 * per_block
    assert all("experts" in name for name in weights(clf))


def test_experts_may_have_a_rank_of_their_own(settings: Any, folders: dict[str, str], frame: Any) -> None:
    own = {**settings, "base_model": folders["experts"]}
    clf = classifier(own, adapter={"r": 4, **OWN["experts"], "rank_pattern": {"gate_up_proj": 2}}).fit(frame)
    assert clf.trainable_parameters_ == 2 * (4 * 2 * (32 + 128) + 4 * 4 * (64 + 32))


def test_tied_ends_are_one_in_training_and_stay_so(
    settings: Any, folders: dict[str, str], frame: Any, tmp_path
) -> None:
    own = {**settings, "base_model": folders["tied ends"], "epochs": 3, "learning_rate": 5e-3}
    adapter = {"target_modules": ["q_proj"], **OWN["tied ends"]}
    tied = classifier(own, adapter=adapter).fit(frame)
    apart = classifier(own, adapter={**adapter, "ensure_weight_tying": False}).fit(frame)
    assert same(tied, classifier(own, adapter={**adapter, "modules_to_save": ["lm_head"]}).fit(frame))
    assert not np.allclose(tied.predict_proba(frame), apart.predict_proba(frame), atol=1e-4)  # whose head stays
    tied.export(tmp_path / "merged", dtype="float32")
    merged = plain_model(str(tmp_path / "merged"))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings


def test_a_bias_has_no_place_in_a_layer_without_one(settings: Any, frame: Any, tmp_path: Path) -> None:
    clf = classifier(settings, adapter={"lora_bias": True}).fit(frame)
    sentence = (
        "The adapter cannot be merged: Impossible to merge LoRA with `lora_bias=True` because the base layer has no "
        "bias. Use merge=False, which writes a PEFT folder."
    )
    with pytest.raises(ParameterError) as found:
        clf.export(tmp_path / "merged")
    assert str(found.value) == sentence
    clf.export(tmp_path / "adapter", merge=False)


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            {"target_parameters": EXPERTS, "dropout": 0.1},
            "The 'dropout' parameter of LoRA must be 0 where target_parameters is given. Got 0.1 instead.",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "pissa"},
            "The 'init_lora_weights' parameter of LoRA must be True where lora_bias is given. Got 'pissa' instead.",
        ),
        (
            {"target_parameters": "experts"},
            "The 'target_parameters' parameter of LoRA must be a list of names. Got 'experts' instead.",
        ),
        (
            {"target_modules": []},
            "The 'target_modules' parameter of LoRA must be 'all-linear' or a list of names. Got [] instead.",
        ),
        (
            {"target_modules": [], "target_parameters": EXPERTS, "layers_to_transform": 0},
            "The 'layers_to_transform' parameter of LoRA must be None where target_modules is []. Got 0 instead.",
        ),
        (
            {"ensure_weight_tying": True},
            "The 'ensure_weight_tying' parameter of LoRA must be False where modules_to_save is None. "
            "Got True instead.",
        ),
    ],
)
def test_settings_that_do_not_go_together(adapter: Any, sentence: str, settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as found:
        classifier(settings, adapter=adapter).fit(frame)
    assert str(found.value) == sentence


@pytest.mark.parametrize(
    ("base", "adapter", "sentence"),
    [
        (
            "experts",
            {"target_parameters": ["mlp.experts.gate_up_prj"]},
            "The 'target_parameters' parameter of LoRA must name weights of this model. Got 'mlp.experts.gate_up_prj' "
            "instead. Did you mean 'mlp.experts.gate_up_proj'?",
        ),
        (
            "biases",
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "The 'ensure_weight_tying' parameter of LoRA must be False for this model, whose embedding and output head "
            "share no weights. Got True instead.",
        ),
        (
            "tied ends",
            {"modules_to_save": ["norm"], "ensure_weight_tying": True},
            "The 'ensure_weight_tying' parameter of LoRA must be False where modules_to_save names neither the "
            "embedding nor the output head. Got True instead.",
        ),
        (
            "biases",
            {"target_parameters": ["q_proj.weight"]},
            "The 'target_parameters' parameter of LoRA must name weights outside the layers that target_modules names. "
            "Got ['q_proj.weight'] instead.",
        ),
    ],
)
def test_places_that_a_model_has_not(base, adapter, sentence, settings, folders, frame) -> None:
    with pytest.raises(ParameterError) as found:
        classifier(settings, base_model=folders[base], adapter=adapter).fit(frame)
    assert str(found.value) == sentence
