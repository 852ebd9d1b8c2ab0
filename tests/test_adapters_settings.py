"""Settings of PEFT's that a method has beside its own: what each does, that it is kept, and that peft reads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from benchmarks.adapters import RATES
from torch_side import classifier, make_other, plain_model, weights

import llmfit
from llmfit.adapters import METHODS
from llmfit.adapters.folders import spec_from_folder
from llmfit.exceptions import ParameterError

SETTINGS: dict[str, dict[str, Any]] = {
    "blocks of AdaLoRA": {"type": "adalora", "layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
    "blocks by their list": {
        "type": "adalora",
        "layers_to_transform": 0,
        "layers_pattern": "layers",
        "target_modules": ["q_proj", "v_proj"],
    },
    "tokens of AdaLoRA": {"type": "adalora", "trainable_token_indices": [69, 86]},
    "LyCORIS": {"type": "lokr", "init_weights": "lycoris"},
    "zero keys": {"type": "prefix_tuning", "init_weights": "zero", "num_virtual_tokens": 3},
    "a drawn spectrum": {"type": "fourierft", "init_weights": False},
    "drawn wavelets": {"type": "waveft", "init_weights": False},
    "drawn embeddings": {"type": "prompt_tuning", "init": "random", "num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_something_is_kept_and_read_by_peft(
    name: str, settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = SETTINGS[name]
    method = given["type"]
    usual = {key: value for key, value in given.items() if key in ("type", "num_virtual_tokens", "target_modules")}
    own = {"learning_rate": RATES.get(method, 1e-2), "epochs": 3}
    clf = classifier(settings, adapter=given, **own).fit(frame)
    found = clf.predict_proba(frame)
    assert not np.array_equal(found, classifier(settings, adapter=usual, **own).fit(frame).predict_proba(frame))
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), found)
    assert again._adapter == clf._adapter
    read: Any = spec_from_folder(tmp_path / "saved/adapter", METHODS.values())
    for key in given.keys() - {
        "init",
        "init_weights",
        "target_modules",
        "layers_pattern",
    }:  # how weights began is of no matter then
        assert getattr(read, key) == given[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = peft.PeftModel.from_pretrained(plain_model(settings["base_model"]), tmp_path / "saved/adapter").eval()
    ids = torch.tensor([[1, 70, 80, 105, 100]])
    base = llmfit.base_model.load_base_model(settings["base_model"], device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(clf._adapter, clf._tensors) as ours:
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits[:, -5:], rtol=0, atol=1e-5)


def begun(settings: Any, frame: Any, **adapter: Any) -> dict[str, torch.Tensor]:
    """Weights as a fit begins with them."""
    return weights(classifier(settings, adapter=adapter, learning_rate=1e-30).fit(frame))


def test_how_weights_begin(settings: Any, frame: Any) -> None:
    lokr = begun(settings, frame, type="lokr", init_weights="lycoris")
    assert not any(tensor.abs().max() > 1e-20 for name, tensor in lokr.items() if name.endswith(("w2", "w2_b")))
    assert all(tensor.std() > 0 for name, tensor in lokr.items() if name.endswith(("w1", "w1_a")))
    prefix = begun(settings, frame, type="prefix_tuning", init_weights="zero")
    assert prefix["prompt_embeddings"].abs().max() < 1e-20
    projected = begun(settings, frame, type="prefix_tuning", init_weights="zero", prefix_projection=True)
    assert projected["prompt_embeddings"].abs().max() < 1e-20
    for method in ("fourierft", "waveft"):
        drawn = torch.cat(list(begun(settings, frame, type=method, init_weights=False).values()))
        assert drawn.std() > 1e-3
        assert not any(t.abs().max() > 1e-20 for t in begun(settings, frame, type=method).values())
    random = begun(settings, frame, type="prompt_tuning", init="random")["prompt_embeddings"]
    assert 0.9 < random.std() < 1.1
    rows = plain_model(settings["base_model"]).get_input_embeddings().weight
    words = begun(settings, frame, type="prompt_tuning")["prompt_embeddings"]
    assert all(bool((rows == row).all(1).any()) for row in words)


def test_copies_of_tied_ends_share_what_adalora_trains(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    folder = make_other(tmp_path / "tied", tiny, "llama", tie_word_embeddings=True)
    adapter = {"type": "adalora", "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    given = settings | {"base_model": folder, "epochs": 3}
    shared = classifier(given, adapter={**adapter, "ensure_weight_tying": True}).fit(frame)
    alone = classifier(given, adapter=adapter).fit(frame)
    assert not np.allclose(shared.predict_proba(frame), alone.predict_proba(frame), atol=1e-4)
    shared.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), shared.predict_proba(frame))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "LoKr": (
        {"type": "lokr", "init_weights": False},
        "The 'init_weights' parameter of LoKr must be one of True, 'lycoris'. Got False instead.",
    ),
    "prefix": (
        {"type": "prefix_tuning", "init_weights": True},
        "The 'init_weights' parameter of PrefixTuning must be one of None, 'zero'. Got True instead.",
    ),
    "FourierFT": (
        {"type": "fourierft", "init_weights": "zero"},
        "The 'init_weights' parameter of FourierFT must be one of True, False. Got 'zero' instead.",
    ),
    "prompts": (
        {"type": "prompt_tuning", "init": "RANDOM"},
        "The 'init' parameter of PromptTuning must be one of 'vocabulary', 'random'. Got 'RANDOM' instead.",
    ),
    "a text": (
        {"type": "prompt_tuning", "init": "random", "init_text": "a"},
        "The 'init' parameter of PromptTuning must be 'vocabulary' where init_text is given. Got 'random' instead.",
    ),
}


@pytest.mark.parametrize(("adapter", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_one_sentence(adapter: Any, sentence: str) -> None:
    with pytest.raises(ParameterError) as error:
        llmfit.adapters.resolve_adapter(adapter)
    assert str(error.value) == sentence
