"""Any other method that peft has: its name in any case, its keys checked against peft's own configuration."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from benchmarks.adapters import IDS, RATES
from sklearn.base import clone
from torch_side import classifier, make_other, plain_model, same, weights

import llmfit
from llmfit.adapters import METHODS, adapter_defaults, resolve_adapter
from llmfit.adapters.other import REFUSED, other_names
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

# What peft's defaults do not fit to a model of width 32, and what has no default.
SETTINGS: dict[str, dict[str, Any]] = {
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [70, 80, 90]},
}
OTHERS = [name for name in other_names(METHODS.values()) if name not in REFUSED]


def test_peft_has_methods_that_the_house_does_not_name():
    assert "miss" in OTHERS
    assert not {"lora", "beft", *METHODS} & set(OTHERS)


@pytest.mark.filterwarnings("ignore")  # what peft has to say of methods that nobody here has looked at
@pytest.mark.parametrize("name", OTHERS)
def test_it_trains_predicts_and_is_kept(name, settings, frame, tiny, tmp_path):
    before = {n: t.clone() for n, t in load_base_model(tiny, device="cpu", dtype="float32").model.state_dict().items()}
    given = {**settings, "adapter": {"type": name, **SETTINGS.get(name, {})}, "learning_rate": 5e-3}
    clf = classifier(given, epochs=3).fit(frame)
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    assert clf.trainable_parameters_ > 0
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(clf._adapter, weights(clf)) as model:
        found = model(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(plain_model(tiny), tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, found, rtol=0, atol=1e-5)
    after = base.model.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_names_are_read_in_any_case():
    specs = [resolve_adapter({"type": name, "r": 4}) for name in ("miss", "MISS", "Miss")]
    assert specs[0] == specs[1] == specs[2]
    assert resolve_adapter("LoRA") == resolve_adapter("lora")
    assert resolve_adapter("MISS").type == "miss"


def test_keys_and_defaults_are_those_of_peft(settings):
    config = peft.MissConfig()
    defaults = adapter_defaults({"type": "MISS"})
    assert defaults.pop("type") == "MISS"
    common = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    assert defaults.keys() == {f.name for f in dataclasses.fields(config)} - common
    assert {key: getattr(config, key) for key in defaults} == defaults
    clf = classifier(settings, adapter={"type": "MISS", "r": 4})
    assert clone(clf).set_params(adapter__mini_r=2).adapter == {"type": "MISS", "r": 4, "mini_r": 2}
    assert clf.get_params()["adapter__mini_r"] == 1


def test_unknown_keys_are_refused():
    with pytest.raises(ParameterError) as error:
        resolve_adapter({"type": "MISS", "mini_rr": 2})
    assert str(error.value).startswith(
        "The adapter 'miss' has no parameter 'mini_rr'. It has 'bias', 'exclude_modules', "
    )
    assert str(error.value).endswith(" Did you mean 'mini_r'?")


def test_an_unknown_name_that_is_near_one_of_peft():
    with pytest.raises(ParameterError, match=r" Did you mean 'delora'\?$"):
        resolve_adapter("delorra")


def test_a_spec_is_copied_and_pickled():
    spec = resolve_adapter({"type": "miss", "r": 4})
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_needs_more_than_rows_is_refused(name, why, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter=name).fit(frame)
    assert str(error.value) == f"The adapter {name!r} cannot be used: {why}."


def test_what_peft_says_of_settings_is_one_sentence(settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "miss", "r": 64}).fit(frame)
    assert str(error.value) == (
        "The adapter 'miss' cannot be put into this model: `r` (64) must be less than or equal to in_features (32)."
    )


def test_ranks_of_osf_may_be_shares(settings, frame, tmp_path):
    """peft: "int or float in (0, 1]"; what is not in the low rank is trained."""
    spec = {"type": "osf", "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0.25}}
    share = classifier(settings, adapter=spec).fit(frame)
    assert same(share, classifier(settings, adapter={**spec, "rank_pattern": {"q_proj": 8}}).fit(frame))
    assert not same(share, classifier(settings, adapter={**spec, "rank_pattern": None}).fit(frame))
    share.save(tmp_path / "m")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "m").predict_proba(frame), share.predict_proba(frame))


OSF: dict[str, tuple[dict[str, Any], str]] = {
    "share": (
        {"rank_pattern": {"q_proj": 1.5}},
        "The \"rank_pattern['q_proj']\" parameter of osf must be an int >= 1, or a number > 0 and <= 1. "
        "Got 1.5 instead.",
    ),
    "zero": (
        {"rank_pattern": {"q_proj": 0}},
        "The \"rank_pattern['q_proj']\" parameter of osf must be an int >= 1, or a number > 0 and <= 1. Got 0 instead.",
    ),
    "ignored": (
        {"target_svd_config": {"q_proj": 4}},
        "The 'target_svd_config' parameter of osf must be None, as PEFT ignores it. Got {'q_proj': 4} instead.",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), OSF.values(), ids=OSF)
def test_settings_of_osf_are_checked(given, sentence, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "osf", **given}).fit(frame)
    assert str(error.value) == sentence


# Methods of the house that a model may not suit -----------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "family of adaption_prompt": (
        "qwen2",
        {"type": "adaption_prompt"},
        "The adapter 'adaption_prompt' is for models of the families 'gpt2', 'llama', 'mistral'. "
        "Got a model of the family 'qwen2' instead.",
    ),
    "layers of adaption_prompt": (
        "llama",
        {"type": "adaption_prompt", "adapter_layers": 3},
        "The 'adapter_layers' parameter of AdaptionPrompt must be at most 2 in this model. Got 3 instead.",
    ),
    "vector_length": (
        "llama",
        {"type": "vblora", "vector_length": 7},
        "The 'vector_length' parameter of VBLoRA must be a divisor of the inputs and outputs of every layer adapted, "
        "and 'model.layers.0.self_attn.q_proj' has 32 and 32. Got 7 instead.",
    ),
    "butterflies": (
        "llama",
        {"type": "boft", "boft_n_butterfly_factor": 2},
        "The 'boft_n_butterfly_factor' parameter of BOFT must be 1 here, where peft cannot build its CUDA extension. "
        "Got 2 instead.",
    ),
    "reflections": ("llama", {"type": "hra", "r": 3}, "The 'r' parameter of HRA must be even. Got 3 instead."),
    "halves of ia3": (
        "llama",
        {"type": "ia3", "target_modules": ["k_proj"]},
        "The 'target_modules' and 'feedforward_modules' parameters of IA3 belong together: give both, or none.",
    ),
    "blocks": (
        "llama",
        {"type": "c3a", "block_size_pattern": {"qproj": 4}},
        "The 'block_size_pattern' parameter of C3A must name layers that are adapted. Got 'qproj' instead. "
        "Did you mean 'q_proj'?",
    ),
}


@pytest.mark.parametrize(("kind", "adapter", "sentence"), MODELS.values(), ids=MODELS)
def test_what_does_not_go_with_a_model_is_one_sentence(kind, adapter, sentence, settings, frame, tiny, tmp_path):
    folder = make_other(tmp_path / kind, tiny, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        with pytest.raises(ParameterError) as error:
            classifier(settings, base_model=folder, adapter=adapter).fit(frame)
    assert str(error.value) == sentence


# GPT-2 keeps its weights the other way round, which not every method of peft can read.
UNKNOWN = {("gpt2", name) for name in ("bitfit", "boft", "c3a", "hra", "loha", "lokr", "oft")}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("full", "adaption_prompt")])
def test_other_families(kind, name, settings, frame, tiny, tmp_path_factory):
    folder = make_other(tmp_path_factory.mktemp(kind) / "m", tiny, kind)
    clf = classifier(settings, base_model=folder, adapter=name, epochs=4, learning_rate=RATES.get(name, 1e-2))
    if (kind, name) in UNKNOWN:
        with pytest.raises(ParameterError, match=r"^The [^\n]+\.$"):
            clf.fit(frame)
    else:
        losses = clf.fit(frame).history_["loss"]
        assert losses.iloc[-1] < losses.iloc[0]


@pytest.mark.parametrize("name", sorted({m.peft_type for m in METHODS.values() if hasattr(m, "peft_type")}))
def test_a_method_of_the_house_goes_by_pefts_name_as_well(name: str) -> None:
    for spelled in (name, name.lower()):
        assert resolve_adapter(spelled).peft_type == name
        assert resolve_adapter({"type": spelled}) == resolve_adapter(spelled)


def test_beft_is_bias_tuning(settings: Any, frame: Any) -> None:
    one, other = (classifier(settings, adapter={"type": name}).fit(frame) for name in ("BEFT", "bitfit"))
    assert same(one, other)
    assert one.get_params()["adapter__target_modules"] == "all-linear"
