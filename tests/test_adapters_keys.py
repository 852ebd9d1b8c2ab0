"""Every key of every method does something, and what it does is kept: no setting is taken and then forgotten."""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import numpy as np
import pytest
from torch_side import classifier

import llmfit
from llmfit.adapters import METHODS, adapter_defaults

Case = tuple[dict[str, Any], dict[str, Any]]  # what is given, and what it is held against beside the method's name

# By key: a value that is not the default, and what has to stand beside it.
VALUES: dict[str, Any] = {
    "adapter_layers": 1,
    "adapter_len": 3,
    "alpha": 3,
    "alpha_pattern": {"q_proj": 3},
    "apply_GS": True,
    "block_share": True,
    "block_size": 4,
    "block_size_pattern": {"q_proj": 4},
    "boft_block_num": 4,
    "boft_block_size": 2,
    "coft": True,
    "d_initial": 0.3,
    "decompose_both": True,
    "decompose_factor": 4,
    "dropout": 0.5,
    "encoder_hidden_size": 8,
    "encoder_reparameterization_type": "LSTM",
    "exclude_modules": ["q_proj"],
    "init": "random",
    "init_logits_std": 0.5,
    "init_r": 9,
    "init_text": "fruit or vehicle?",
    "init_vector_bank_bound": 0.2,
    "init_weights": "uniform",
    "layers_to_transform": 1,
    "lora_bias": True,
    "module_dropout": 0.5,
    "modules_to_save": ["lm_head"],
    "n_frequency": 20,
    "n_frequency_pattern": {"q_proj": 20},
    "num_vectors": 20,
    "num_virtual_tokens": 3,
    "oft_block_size": 8,
    "orth_reg_weight": 5.0,
    "prefix_projection": True,
    "projection_prng_key": 1,
    "projection_seed": 1,
    "proportional_parameters": True,
    "r": 4,
    "random_loc_seed": 1,
    "rank_dropout": 0.5,
    "rank_pattern": {"q_proj": 2},
    "scaling": 50.0,
    "sparse": True,
    "target_modules": ["q_proj", "v_proj"],
    "topk": 3,
    "trainable_token_indices": [69, 86],
    "u": 8,
    "use_cayley_neumann": False,
    "use_dora": True,
    "use_idwt": False,
    "use_rslora": True,
    "vector_length": 4,
    "very_sparse": True,
    "wavelet_family": "sym2",
    "weight_tying": 0.5,
}
BUDGET = {"target_r": 2, "init_r": 8, "tinit": 0, "tfinal": 1}
LATER = {"target_r": 2, "init_r": 8, "tinit": 1, "tfinal": 1}
FEED = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
STARTED = {"init_lora_weights": "eva"}
# Where a key wants others beside it, or another value: (what is given, what it is held against).
CASES: dict[tuple[str, str], Case] = {
    ("adalora", "target_r"): ({**BUDGET, "target_r": 4}, BUDGET),
    ("adalora", "tinit"): ({**BUDGET, "tinit": 2}, BUDGET),
    ("adalora", "tfinal"): ({**BUDGET, "tfinal": 3}, BUDGET),
    ("adalora", "deltaT"): ({**BUDGET, "deltaT": 3}, BUDGET),
    ("adalora", "beta1"): ({**LATER, "beta1": 0.01}, LATER),
    ("adalora", "beta2"): ({**LATER, "beta2": 0.01}, LATER),
    ("ia3", "target_modules"): (FEED, {}),
    ("ia3", "feedforward_modules"): ({**FEED, "feedforward_modules": ["q_proj"]}, FEED),
    ("ia3", "exclude_modules"): ({"exclude_modules": ["k_proj"]}, {}),
    ("ln_tuning", "target_modules"): ({"target_modules": ["input_layernorm"]}, {}),
    ("ln_tuning", "exclude_modules"): ({"exclude_modules": ["input_layernorm"]}, {}),
    ("lokr", "rank_dropout_scale"): ({"rank_dropout": 0.5, "rank_dropout_scale": True}, {"rank_dropout": 0.5}),
    ("lokr", "r"): ({"r": 1}, {}),
    ("lokr", "decompose_both"): ({"r": 1, "decompose_both": True}, {"r": 1}),
    ("vblora", "r"): ({"r": 2}, {}),
    ("oft", "eps"): ({"coft": True, "eps": 1e-7}, {"coft": True}),
    ("oft", "num_cayley_neumann_terms"): ({"num_cayley_neumann_terms": 2}, {}),
    ("prefix_tuning", "encoder_hidden_size"): (
        {"prefix_projection": True, "encoder_hidden_size": 8},
        {"prefix_projection": True},
    ),
    ("p_tuning", "encoder_num_layers"): (
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
        {"encoder_reparameterization_type": "LSTM"},
    ),
    ("p_tuning", "encoder_dropout"): (
        {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5},
        {"encoder_reparameterization_type": "LSTM"},
    ),
    ("tinylora", "init_v_bound"): ({"init_weights": "uniform", "init_v_bound": 0.5}, {"init_weights": "uniform"}),
    ("waveft", "wavelet_family"): ({"n_frequency": 100, "wavelet_family": "sym2"}, {"n_frequency": 100}),
    ("waveft", "proportional_parameters"): (
        {"n_frequency": 20, "proportional_parameters": True},
        {"n_frequency": 20},
    ),
    ("c3a", "init_weights"): ({"init_weights": "gaussian"}, {}),
    ("lokr", "init_weights"): ({"init_weights": "lycoris"}, {}),
    ("fourierft", "init_weights"): ({"init_weights": False}, {}),
    ("waveft", "init_weights"): ({"init_weights": False}, {}),
    ("prefix_tuning", "init_weights"): ({"init_weights": "zero"}, {}),
    **{(name, "layers_pattern"): ({"layers_to_transform": 0, "layers_pattern": "layers"}, {}) for name in METHODS},
    **{
        (name, key): case
        for name in ("lora", "dora")
        for key, case in {
            "init_lora_weights": ({"init_lora_weights": "gaussian"}, {}),
            "eva_config": ({**STARTED, "eva_config": {"rho": 1}}, STARTED),
            "corda_config": (
                {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
                {"init_lora_weights": "corda"},
            ),
            "loftq_config": (
                {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
                {"init_lora_weights": "loftq"},
            ),
            "lora_ga_config": (
                {"init_lora_weights": "lora_ga", "r": 4, "lora_ga_config": {"scale": "unit"}},
                {"init_lora_weights": "lora_ga", "r": 4},
            ),
            "loraplus_lr_ratio": ({"loraplus_lr_ratio": 4.0}, {}),
        }.items()
    },
    ("dora", "use_dora"): ({"use_dora": False}, {}),
}
LEFT_OUT = {("boft", "boft_n_butterfly_factor")}  # where peft has no kernel; see test_adapters_other.py
LEFT_OUT |= {("dora", key) for key in ("corda_config", "loftq_config", "lora_ga_config")}  # starts that move W
LEFT_OUT |= {  # they need experts, or ends that share their weights; see test_adapters_weights.py
    (name, key) for name in ("lora", "dora") for key in ("target_parameters", "ensure_weight_tying")
}
LEFT_OUT |= {("adalora", "ensure_weight_tying")}  # see test_adapters_settings.py
LEFT_OUT |= {("dora", "lora_bias")}  # refused beside use_dora
LEFT_OUT |= {(name, "bias") for name in METHODS}  # this model has none; see test_adapters.py, test_adapters_biases.py
PAIRS = [(name, key) for name in METHODS for key in adapter_defaults({"type": name}) if key != "type"]
FIRST = {key: name for name, key in reversed(PAIRS) if (name, key) not in LEFT_OUT}
KEYS = [  # each in the first method that has it, and in every other one where there is more time
    pytest.param(name, key, marks=[] if FIRST[key] == name else [pytest.mark.slow], id=f"{name}-{key}")
    for name, key in PAIRS
    if (name, key) not in LEFT_OUT
]


def case_of(name: str, key: str) -> Case:
    return CASES[name, key] if (name, key) in CASES else ({key: VALUES[key]}, {})


@pytest.fixture(scope="module")
def fits(tiny: str) -> Any:
    """Fit a method with settings, each pair once."""
    import pandas as pd

    texts = ["red apple", "green pear", "old car", "fast train"]
    frame = pd.DataFrame({"text": texts, "label": ["fruit", "fruit", "vehicle", "vehicle"]})
    given = {"base_model": tiny, "epochs": 4, "learning_rate": 0.05, "batch_size": 4, "random_state": 0}
    given |= {"device": "cpu", "dtype": "float32", "verbose": 0}

    @cache
    def fit(name: str, settings: str) -> tuple[Any, Any]:
        clf = classifier(given, adapter={"type": name, **ast.literal_eval(settings)}).fit(frame)
        return clf, clf.predict_proba(frame)

    return frame, lambda name, settings: fit(name, repr(settings))


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_does_something_and_is_kept(name: str, key: str, fits: Any, tmp_path: Any) -> None:
    frame, fit = fits
    given, beside = case_of(name, key)
    clf, found = fit(name, given)
    assert getattr(clf._adapter, key) == given[key]
    assert not np.array_equal(found, fit(name, beside)[1])
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), found)
    assert again._adapter == clf._adapter
