"""What an adapter's settings do, also those that are seldom given: none is taken and has no effect."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch_side import classifier, make_other, plain_model, same

import llmfit
from llmfit import checkpoints
from llmfit.adapters import resolve_adapter
from llmfit.adapters.other import REFUSED
from llmfit.exceptions import ParameterError

# Settings that another one makes idle ---------------------------------------------------------------

IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "a bound that nothing is drawn within": (
        {"type": "tinylora", "init_v_bound": 0.5},
        "The 'init_v_bound' parameter of TinyLoRA must be 0.02 where init_weights is True. Got 0.5 instead.",
    ),
    "numbers that are shared out": (
        {"type": "waveft", "proportional_parameters": True, "n_frequency_pattern": {"q_proj": 3}},
        "The 'n_frequency_pattern' parameter of WaveFT must be None where proportional_parameters is True. "
        "Got {'q_proj': 3} instead.",
    ),
    "wavelets without a transform": (
        {"type": "waveft", "use_idwt": False, "wavelet_family": "sym2"},
        "The 'wavelet_family' parameter of WaveFT must be 'db1' where use_idwt is False. Got 'sym2' instead.",
    ),
    "a start that TinyLoRA has not": (
        {"type": "tinylora", "init_weights": "gaussian"},
        "The 'init_weights' parameter of TinyLoRA must be one of True, 'uniform'. Got 'gaussian' instead.",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), IDLE.values(), ids=IDLE)
def test_a_setting_without_effect_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError) as error:
        resolve_adapter(given)
    assert str(error.value) == sentence


def test_tinylora_begins_within_its_bound(settings: Any, frame: Any) -> None:
    adapter = {"type": "tinylora", "u": 8, "init_weights": "uniform", "init_v_bound": 0.5}
    learned = classifier(settings, adapter=adapter, learning_rate=1e-30).fit(frame)._tensors
    drawn = torch.cat([tensor.flatten() for name, tensor in learned.items() if "tinylora_v" in name])
    assert 0.3 < float(drawn.abs().max()) <= 0.5


def test_shared_out_coefficients_are_those_of_peft_and_are_kept(
    settings: Any, frame: Any, tiny: str, tmp_path: Any
) -> None:
    adapter = {"type": "waveft", "n_frequency": 40, "proportional_parameters": True}
    clf = classifier(settings, adapter=adapter, learning_rate=1e-3).fit(frame)
    config = peft.WaveFTConfig(n_frequency=40, proportional_parameters=True, target_modules="all-linear")
    own = peft.get_peft_model(plain_model(tiny), config)
    numbers = {name: len(tensor) for name, tensor in peft.get_peft_model_state_dict(own).items() if "spectrum" in name}
    assert {name: len(tensor) for name, tensor in clf._tensors.items()} == numbers
    assert len({*numbers.values()}) > 1
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    peft.PeftModel.from_pretrained(plain_model(tiny), tmp_path / "saved" / "adapter")
    classifier(settings, adapter=str(tmp_path / "saved" / "adapter")).fit(frame)
    assert len(clf.set_params(warm_start=True).fit(frame).history_) == 2


# Methods that only peft has -------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["q_proj", ["q_proj"]])
def test_one_name_is_a_list_of_one(names: Any, settings: Any, frame: Any) -> None:
    clf = classifier(settings, adapter={"type": "miss", "r": 4, "target_modules": names}).fit(frame)
    assert {name.split(".")[-2] for name in clf._tensors} == {"q_proj"}


def test_one_name_left_out_is_left_out(settings: Any, frame: Any) -> None:
    adapter = {"type": "miss", "r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": "q_proj"}
    clf = classifier(settings, adapter=adapter).fit(frame)
    assert {name.split(".")[-2] for name in clf._tensors} == {"v_proj"}


def test_one_name_trained_in_full_is_trained(settings: Any, frame: Any, tiny: str) -> None:
    adapter = {"type": "miss", "r": 4, "modules_to_save": "lm_head"}
    clf = classifier(settings, adapter=adapter).fit(frame)
    (head,) = (tensor for name, tensor in clf._tensors.items() if "lm_head" in name)
    assert not torch.equal(head, plain_model(tiny).lm_head.weight)


def test_some_blocks_of_every_linear_layer(settings: Any, frame: Any, tmp_path: Any) -> None:
    adapter = {"type": "miss", "r": 4, "target_modules": "all-linear", "layers_to_transform": 1}
    clf = classifier(settings, adapter=adapter).fit(frame)
    assert {name.split(".")[4] for name in clf._tensors} == {"1"}
    assert len(clf._tensors) == 7
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


def test_a_folder_whose_layers_are_a_pattern(settings: Any, frame: Any, tiny: str, tmp_path: Any) -> None:
    config = peft.MissConfig(r=4, target_modules=r".*\.1\..*(q|down)_proj", exclude_modules=r".*down.*")
    peft.get_peft_model(plain_model(tiny), config).save_pretrained(tmp_path / "made")
    clf = classifier(settings, adapter=str(tmp_path / "made")).fit(frame)
    assert clf._adapter.target_modules == ["model.layers.1.self_attn.q_proj"]
    assert len(clf._tensors) == 1


@pytest.mark.parametrize("bias", ["MiSS_only", "all"])
def test_biases_of_a_method_are_trained_and_kept(
    bias: str, settings: Any, frame: Any, tiny: str, tmp_path: Any
) -> None:
    folder = make_other(tmp_path / "qwen2", tiny, "qwen2")
    adapter = {"type": "miss", "r": 4, "target_modules": ["q_proj"], "bias": bias}
    clf = classifier(settings, base_model=folder, adapter=adapter).fit(frame)
    biases = {name for name in clf._tensors if name.endswith("bias")}
    assert {name.split(".")[-3 if "base_layer" in name else -2] for name in biases} == (
        {"q_proj"} if bias != "all" else {"q_proj", "k_proj", "v_proj"}
    )
    before = plain_model(folder).state_dict()["model.layers.0.self_attn.q_proj.bias"]
    (after,) = (clf._tensors[name] for name in biases if ".0." in name and "q_proj" in name)
    assert not torch.equal(before, after)
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


def test_a_bias_that_peft_does_not_know_is_one_sentence(settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "miss", "r": 4, "bias": "some"}).fit(frame)
    assert str(error.value) == (
        "The adapter 'miss' cannot be put into this model: Requested bias: some, is not implemented."
    )


SHARING = {"type": "adamss", "r": 8, "num_subspaces": 2, "target_modules": ["q_proj", "v_proj"], "use_asa": True}
SHARING |= {"asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 4, "mask_interval": 2}


def test_adamss_shares_its_subspaces_out_and_goes_on_where_it_was_killed(
    settings: Any, frame: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    given = {**settings, "adapter": SHARING, "epochs": 4, "batch_size": 4}
    whole = classifier(given).fit(frame)
    without = classifier({**given, "adapter": {**SHARING, "use_asa": False}}).fit(frame)
    assert whole.history_["loss"].iloc[-1] != without.history_["loss"].iloc[-1]
    seen: list[int] = []

    def kill(state: Any) -> None:
        seen.append(state.step)
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classifier(given, callbacks=kill, checkpoint_dir=tmp_path).fit(frame)
    again = classifier(given, callbacks=lambda state: seen.append(state.step), checkpoint_dir=tmp_path).fit(frame)
    assert seen == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert same(again, whole)


def test_a_loss_of_labels_that_the_model_does_not_see_is_refused(
    settings: Any, frame: Any, tiny: str, tmp_path: Any
) -> None:
    with pytest.raises(ParameterError) as error:
        resolve_adapter({"type": "shadow", "auxiliary_loss_weight": 0.05})
    assert str(error.value) == (
        "The 'auxiliary_loss_weight' parameter of shadow must be 0, as the loss is taken of the model's logits, and "
        "the model sees no labels. Got 0.05 instead."
    )
    assert resolve_adapter("shadow").config("decoder").auxiliary_loss_weight == 0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHADOW", "auxiliary_loss_weight": 0.05}))
    assert resolve_adapter(tmp_path) == resolve_adapter("shadow")


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_needs_more_than_rows_is_refused_before_a_fit(name: str, why: str, tiny: str) -> None:
    sentence = f"The adapter {name!r} cannot be used: {why}."
    with pytest.raises(ParameterError) as error:
        resolve_adapter(name)
    assert str(error.value) == sentence
    with pytest.raises(ParameterError) as error:
        llmfit.from_config({"base_model": tiny, "target": "label", "adapter": {"type": name}})
    assert sentence in str(error.value)


# Sizes that are found -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("oft", "oft_block_size"), ("boft", "boft_block_size")])
def test_a_block_of_one_turns_nothing(
    name: str, size: str, settings: Any, frame: Any, tiny: str, tmp_path: Any
) -> None:
    folder = make_other(tmp_path / "odd", tiny, "llama", intermediate_size=33)
    with pytest.raises(ParameterError) as error:
        classifier(settings, base_model=folder, adapter=name).fit(frame)
    assert str(error.value) == (
        f"The {size!r} parameter of {name.upper()} must be 2 or more and a divisor of the inputs of every layer "
        "adapted, and these, 32 and 33, have none in common: name fewer layers in target_modules. Got None instead."
    )
    own = {"type": name, "target_modules": ["q_proj", "up_proj"]}
    assert classifier(settings, base_model=folder, adapter=own).fit(frame).trainable_parameters_ > 0
