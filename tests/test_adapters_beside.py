"""What an adapter's settings do, also those that are seldom given: none is taken and has no effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch_side import classifier, plain_model

import llmfit
from llmfit.adapters import resolve_adapter
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
