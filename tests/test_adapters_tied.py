"""Starts of LoRA that take their product out of W, on an output head that shares its weights with the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from seq2seq_side import make_pair
from torch_side import classifier

import llmfit
from llmfit.adapters.start_settings import MOVING
from llmfit.base_model import load_base_model

HEADS = {"llama": ["q_proj", "lm_head"], "t5": ["q", "lm_head"]}


@pytest.fixture(scope="module")
def tied(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_model(tmp_path_factory.mktemp("tied") / "llama")
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return {"llama": folder, "t5": make_pair(tmp_path_factory.mktemp("pair") / "t5", tiny, "t5")}


@pytest.mark.parametrize(("start", "kind"), [*((start, "llama") for start in MOVING), ("pissa", "t5"), ("loftq", "t5")])
def test_a_start_moves_a_tied_head_alone(
    start: str, kind: str, tied: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    """What is trained is what predicts: at a rate of next to nothing, and after a fit, alone and merged."""
    base = load_base_model(tied[kind], device="cpu", dtype="float32")
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    given = settings | {"base_model": tied[kind]}
    adapter = {"r": 4, "init_lora_weights": start, "target_modules": HEADS[kind]}
    still = classifier(given, adapter=adapter, learning_rate=1e-30).fit(frame, eval_set=frame)
    plain = classifier(given, adapter=None).fit(frame)
    np.testing.assert_allclose(still.predict_proba(frame), plain.predict_proba(frame), atol=1e-5)
    began = classifier(given, adapter={"r": 4, "target_modules": HEADS[kind]}, learning_rate=1e-30)
    losses = began.fit(frame, eval_set=frame).history_
    for column in ("loss", "validation_loss"):
        np.testing.assert_allclose(still.history_[column], losses[column], rtol=1e-4)

    clf = classifier(given, adapter=adapter, epochs=3).fit(frame, eval_set=frame)
    again = clf.predict_proba(frame)
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), again)
    clf.export(tmp_path / "merged")
    merged = classifier(given, base_model=str(tmp_path / "merged"), adapter=None).fit(frame)
    np.testing.assert_allclose(merged.predict_proba(frame), again, atol=1e-4)
    after = base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
