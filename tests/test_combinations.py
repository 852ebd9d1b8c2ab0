"""What stands together: adapters with heads, few bits, bfloat16 and other kinds of models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_model
from head_side import make_encoder, make_encoder_decoder
from peft.utils.integrations import dequantize_bnb_weight
from torch_side import classifier, generator, make_other, plain_model, weights

import llmfit
from llmfit import IA3, LLMEstimator, LLMRegressor
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

BEGIN_AS_SOMETHING = {"prefix_tuning", "prompt_tuning", "p_tuning", "vblora", "c3a"}  # all others as nothing
LAYERS = [name for name, method in METHODS.items() if name not in ("full", "adaption_prompt", "bitfit")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder_decoder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_starts_where_the_quantized_base_stands_or_is_refused(name, bits, wide, settings, frame):
    own = settings | {"base_model": wide, "quantization": bits, "learning_rate": 1e-12}
    if bits not in METHODS[name].quantizable:
        sentence = f"adapter={name!r} cannot work with weights that are stored in {bits} bits. Set quantization=None, "
        with pytest.raises(ParameterError, match=f"^{re.escape(sentence)}"):
            classifier(own, adapter=name).fit(frame)
        return
    fitted = classifier(own, adapter=name).fit(frame)
    plain = classifier(own, adapter=None).fit(frame).predict_proba(frame)
    distance = np.abs(fitted.predict_proba(frame) - plain).max()
    assert distance < (5e-2 if name in BEGIN_AS_SOMETHING else 2e-3)
    assert distance > 1e-6 or name not in BEGIN_AS_SOMETHING


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "full"])
def test_an_encoder_decoder_generates_in_bfloat16(adapter, t5, settings, frame):
    model = generator(settings | {"base_model": t5, "dtype": "bfloat16"}, adapter=adapter).fit(frame)
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        assert len(model.set_params(generation={"max_new_tokens": 3}).predict(frame)) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_decoder_in_eight_bits_learns_and_answers(dtype, t5, settings, frame):
    """LoRA on q and v of a T5 in INT8: what the field does with models too large for it otherwise."""
    adapter = {"type": "lora", "r": 4, "target_modules": ["q", "v"], "dropout": 0.05}
    own = settings | {"base_model": t5, "quantization": 8, "dtype": dtype, "epochs": 15}
    clf = classifier(own, adapter=adapter).fit(frame)
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    assert np.isfinite(clf.predict_proba(frame)).all()
    words = generator(own, adapter=adapter).fit(frame).set_params(generation={"max_new_tokens": 3})
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        assert len(words.predict(frame)) == 8


def test_patterns_and_folders_that_cannot_be_are_one_sentence(settings, frame, tmp_path):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"rank_pattern": {"(": 4}}).fit(frame)
    assert str(error.value).startswith(
        "The 'rank_pattern' parameter of LoRA names layers by a pattern that cannot be read, '(': missing )"
    )
    (tmp_path / "f").write_text("x")
    with pytest.raises(ParameterError, match=r"^The 'cache' parameter of head must be a folder, not a file\. Got '"):
        classifier(settings, adapter=None, head={"cache": tmp_path / "f"}).fit(frame)


@pytest.mark.parametrize("start", ["eva", "corda"])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_starts_that_look_at_rows_go_with_a_head(kind, start, wide, bert, t5, settings, frame):
    base = {"decoder": wide, "encoder": bert, "encoder-decoder": t5}[kind]
    adapter = {"type": "lora", "r": 2, "init_lora_weights": start}
    if kind == "encoder-decoder":
        adapter["target_modules"] = ["q", "v"]
    clf = classifier(settings | {"base_model": base}, adapter=adapter, head="linear").fit(frame)
    assert np.isfinite(clf.predict_proba(frame)).all()
    if start == "eva":
        a = next(tensor for name, tensor in weights(clf).items() if "lora_A" in name)
        assert not ((a != 0).sum(1) == 1).all()  # directions of what was seen, not rows of the identity


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_adalora_goes_with_a_head_that_reads_only_part_of_a_model(kind, bert, t5, settings, frame):
    base = bert if kind == "encoder" else t5
    clf = classifier(settings | {"base_model": base, "epochs": 6}, adapter="adalora", head="linear").fit(frame)
    assert np.isfinite(clf.history_["loss"]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_an_encoder_saved_without_a_pooler_is_quantized(adapter, bits, settings, frame, tmp_path):
    folder = make_encoder(tmp_path / "mlm", masked=True, hidden=64)
    own = settings | {"base_model": folder, "quantization": bits}
    clf = classifier(own, adapter=adapter, head="linear").fit(frame)
    assert not any("pooler" in name for name in weights(clf))
    assert np.isfinite(clf.predict_proba(frame)).all()


def test_loftq_begins_from_what_eight_bits_have_lost(wide, settings, frame):
    adapter = {"type": "lora", "r": 32, "init_lora_weights": "loftq"}
    own = settings | {"base_model": wide, "learning_rate": 1e-12}
    clf = classifier(own | {"quantization": 8}, adapter=adapter).fit(frame)
    true = plain_model(wide).state_dict()
    base = load_base_model(wide, device="cpu", dtype="float32", quantization=8)
    with base.attach(clf._adapter, weights(clf)) as model:
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                packed = layer.get_base_layer()
                lost = true[f"{name}.weight"] - dequantize_bnb_weight(packed.weight, state=packed.state)
                assert (lost - layer.get_delta_weight("default")).norm() < 0.75 * lost.norm()
    with pytest.raises(ParameterError, match=r"^The 'loftq_config' parameter has no meaning beside a quantized base"):
        classifier(own | {"quantization": 8}, adapter={**adapter, "loftq_config": {"loftq_bits": 4}}).fit(frame)


def test_a_pattern_of_alpha_goes_before_that_of_ranks(tiny, settings, frame):
    adapter = {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 8}}
    adapter["alpha_pattern"] = {r"layers\.0\.self_attn\.q_proj": 1.0}
    clf = classifier(settings, adapter=adapter).fit(frame)
    with load_base_model(tiny, device="cpu", dtype="float32").attach(clf._adapter, weights(clf)) as model:
        scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scales == [1 / 8, 16 / 8]


def test_a_full_model_with_a_head_is_not_put_beside_few_bits(wide, settings, frame, tmp_path):
    classifier(settings | {"base_model": wide}, adapter="full", head="linear").fit(frame).save(tmp_path / "m")
    with pytest.raises(ParameterError, match=r"^adapter='full' trains the base model's own weights"):
        llmfit.load(tmp_path / "m", quantization=4).predict(frame)


def test_the_output_head_is_not_trained_beside_a_linear_one(settings, frame):
    with pytest.raises(ParameterError, match=r"^The adapter 'lora' trains the output embeddings, in whose place"):
        classifier(settings, adapter={"modules_to_save": ["lm_head"]}, head="linear").fit(frame)


def test_truth_values_are_numbers_in_words_too(settings, frame):
    rows = frame.assign(value=frame["label"] == "fruit")
    own = {"target": "value", "features": "text", "head": "lm", "adapter": "full", "epochs": 60}
    model = LLMRegressor(**settings | own).fit(rows)
    assert set(model.predict(rows)) <= {0.0, 1.0}


def test_keys_are_set_on_auto_and_on_a_spec_of_another_method():
    assert LLMEstimator().set_params(head__pooling="mean").head == {"pooling": "mean"}
    assert LLMEstimator(adapter=IA3()).set_params(adapter__type="lora", adapter__r=2).adapter == {
        "type": "lora",
        "r": 2,
    }


def test_a_head_alone_says_what_stands_behind_it(tiny, settings, frame, capfd):
    model = classifier(settings | {"verbose": 1}, adapter=None, head="linear").fit(frame)
    total = int(re.search(r"all params: ([\d,]+)", capfd.readouterr().err)[1].replace(",", ""))
    assert total > 20 * model.trainable_parameters_


def test_warm_start_goes_on_whatever_folder_keeps_the_vectors(settings, frame, tmp_path: Path):
    clf = classifier(settings, adapter=None, head={"cache": tmp_path / "a"}, warm_start=True).fit(frame)
    assert len(clf.set_params(head__cache=None).fit(frame).history_) == 2


def test_other_methods_of_peft_are_refused_beside_few_bits_where_peft_has_no_layers_for_them(wide, settings, frame):
    own: dict[str, Any] = settings | {"base_model": wide, "quantization": 8}
    with pytest.raises(ParameterError, match=r"^adapter='deft' cannot work with weights that are stored in 8 bits"):
        classifier(own, adapter={"type": "deft"}).fit(frame)
    assert len(classifier(own, adapter={"type": "road", "group_size": 8}).fit(frame).predict(frame)) == 8


def test_another_decoder_in_bfloat16_takes_a_head(tiny, settings, frame, tmp_path):
    folder = make_other(tmp_path / "gpt2", tiny, "gpt2")
    clf = classifier(settings | {"base_model": folder, "dtype": "bfloat16"}, head="linear").fit(frame)
    assert isinstance(clf.predict(frame), pd.Series)
