"""Base models whose files lack weights: random numbers are never taken for them, and a head needs not all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_side import byte_tokenizer, headed, make_encoder, make_encoder_decoder, write
from safetensors.torch import load_file, save_file
from seq2seq_side import KINDS, make_pair
from torch_side import classifier, make_other

import llmfit
from llmfit.base_model import load_base_model
from llmfit.exceptions import ModelLoadError
from llmfit.sources import quiet_loading


def without(folder: str, target: Path, *parts: str) -> str:
    """Copy a model and drop the weights in whose names one of the parts stands."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not any(part in name for part in parts)}
    save_file(kept, path, metadata={"format": "pt"})
    return str(target)


def alone(folder: str, target: Path, *, flagged: bool) -> str:
    """Write the encoder of a T5 by itself, as T5EncoderModel does now, or as it did with the flag left on."""
    from transformers import T5EncoderModel

    with quiet_loading():
        write(T5EncoderModel.from_pretrained(folder), byte_tokenizer(False), target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": flagged}), encoding="utf-8")
    return str(target)


@pytest.mark.parametrize("flagged", [False, True])
def test_an_encoder_that_was_saved_alone_has_a_head_and_no_words(
    flagged: bool, settings: Any, frame: Any, tmp_path: Path
) -> None:
    whole = make_encoder_decoder(tmp_path / "t5")
    folder = alone(whole, tmp_path / "encoder", flagged=flagged)
    for work in (classifier(settings, base_model=folder).fit, classifier(settings, base_model=folder).preview):
        with pytest.raises(ModelLoadError) as error:
            work(frame)
        assert str(error.value) == (
            f"The base model {folder!r} has no weights for 'decoder.block.0.layer.0.SelfAttention.k.weight', "
            "'decoder.block.0.layer.0.SelfAttention.o.weight', 'decoder.block.0.layer.0.SelfAttention.q.weight', ..., "
            "without which it has no words to answer in. Set head='linear', or name a model that has them."
        )
    for adapter in (None, {"r": 2}):
        given = settings | {"adapter": adapter, "epochs": 3}
        clf = headed(given | {"base_model": folder}).fit(frame)
        expected = headed(given | {"base_model": whole}).fit(frame)
        np.testing.assert_array_equal(clf.predict_proba(frame), expected.predict_proba(frame))
        clf.save(tmp_path / f"saved-{adapter is None}")
        again = llmfit.load(tmp_path / f"saved-{adapter is None}")
        np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))


def test_a_decoder_without_its_words_has_a_head(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    folder = without(tiny, tmp_path / "bare", "lm_head")
    with pytest.raises(ModelLoadError) as error:
        classifier(settings, base_model=folder).fit(frame)
    assert str(error.value) == (
        f"The base model {folder!r} has no weights for 'lm_head.weight', without which it has no words to answer in. "
        "Set head='linear', or name a model that has them."
    )
    clf = headed(settings | {"base_model": folder}).fit(frame)
    np.testing.assert_array_equal(clf.predict_proba(frame), headed(settings).fit(frame).predict_proba(frame))


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a norm": ("llama", ("layers.1.input_layernorm",)),
    "a layer": ("llama", ("layers.1.",)),
    "the embedding": ("llama", ("embed_tokens",)),
    "an encoder's layer": ("bert", ("layer.1.output",)),
    "beside an encoder": ("t5", ("encoder.block.1",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["lm", "linear"])
def test_what_every_answer_needs_is_refused(
    head: str, case: str, settings: Any, frame: Any, tiny: str, tmp_path: Path
) -> None:
    kind, parts = CASES[case]
    make = {"llama": lambda _: tiny, "bert": make_encoder, "t5": make_encoder_decoder}[kind]
    whole = make(tmp_path / "whole")
    folder = without(whole, tmp_path / "bare", *parts)
    gone = sorted(name for name in load_file(Path(whole) / "model.safetensors") if any(part in name for part in parts))
    named = ", ".join(map(repr, gone[:3])) + (", ..." if len(gone) > 3 else "")
    with pytest.raises(ModelLoadError) as error:
        headed(settings | {"base_model": folder}, head=head).fit(frame)
    assert str(error.value) == (
        f"The base model {folder!r} has no weights for {named}: its files are incomplete, or of another model than its "
        "configuration says."
    )


def test_what_nobody_reads_may_be_missing(settings: Any, frame: Any, tmp_path: Path) -> None:
    """What BERT makes of its first token, in files and in classes that cannot leave it out."""
    from transformers import BertForMaskedLM

    whole = make_encoder(tmp_path / "whole")
    expected = headed(settings | {"base_model": whole}).fit(frame).predict_proba(frame)
    bare = without(whole, tmp_path / "bare", "pooler")
    np.testing.assert_array_equal(headed(settings | {"base_model": bare}).fit(frame).predict_proba(frame), expected)
    with quiet_loading():
        masked = BertForMaskedLM.from_pretrained(whole)
    folder = write(masked, byte_tokenizer(True), tmp_path / "masked")
    np.testing.assert_array_equal(headed(settings | {"base_model": folder}).fit(frame).predict_proba(frame), expected)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma", "mamba", "opt", *KINDS])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_models_are_whole(tied: bool, kind: str, tiny: str, tmp_path: Path) -> None:
    """Tied weights, buffers and those that are made anew are not missing; in few bits no more than else."""
    make = make_pair if kind in KINDS else make_other
    folder = make(tmp_path / "m", tiny, kind, tie_word_embeddings=tied)
    for bits in (None, 8):
        base = load_base_model(folder, device="cpu", dtype="float32", quantization=bits)
        assert base.without == ()
    assert not any(parameter.is_meta for parameter in base.model.parameters())
    assert all(torch.isfinite(p).all() for p in base.model.parameters() if p.is_floating_point())


def test_places_that_are_computed_are_not_missed(tiny: str, tmp_path: Path, settings: Any, frame: Any) -> None:
    """Files of Pegasus leave the sinusoids out."""
    whole = make_pair(tmp_path / "whole", tiny, "pegasus")
    bare = without(whole, tmp_path / "bare", "embed_positions")
    answers = [
        classifier({**settings, "base_model": folder}, adapter=None).fit(frame).predict_log_proba(frame)
        for folder in (whole, bare)
    ]
    np.testing.assert_array_equal(*answers)


def test_a_model_whose_base_is_of_another_kind_now_is_refused(settings: Any, frame: Any) -> None:
    model = headed(settings, adapter=None).fit(frame)
    model.base_model_["kind"] = "encoder"  # as a version of llmfit may have had it
    with pytest.raises(ModelLoadError, match="was read as encoder by this fit, and is decoder now"):
        model.predict(frame)
