"""What an adapter is: every spelling one spec, the update that the papers write down, a folder that peft reads."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import peft
import pytest
import torch
from sklearn.base import clone
from torch_side import (
    classifier,
    fit_seed,
    furthest,
    make_other,
    plain_model,
    same,
    token_losses,
    token_rows,
    weights,
)

from llmfit import Full, LoRA
from llmfit.adapters import METHODS, adapter_defaults, adapter_from_folder, resolve_adapter
from llmfit.base_model import load_base_model
from llmfit.exceptions import ModelLoadError, ParameterError

IDS = torch.tensor([[1, 70, 80, 90, 100, 41, 42, 43]])
ONE_LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def biased(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_other(tmp_path_factory.mktemp("biased") / "qwen2", tiny, "qwen2")


@torch.no_grad()
def logits_of(clf: Any, folder: str, dtype: str = "float32") -> torch.Tensor:
    """Logits of the fitted model."""
    base = load_base_model(folder, device="cpu", dtype=dtype)
    with base.attach(clf._adapter, weights(clf)) as model:
        return model(input_ids=IDS).logits


# Spellings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("lora", LoRA()),
        ({}, LoRA()),
        ({"type": "lora"}, LoRA()),
        ({"r": 4}, LoRA(r=4)),
        ({"type": "lora", "r": 4, "alpha": 3.5, "dropout": 0.1}, LoRA(r=4, alpha=3.5, dropout=0.1)),
        (LoRA(r=4, use_dora=True), LoRA(r=4, use_dora=True)),
        (LoRA(r=np.int64(4)), LoRA(r=4)),
        ("full", Full()),
        ({"type": "full"}, Full()),
        (Full(), Full()),
    ],
)
def test_every_spelling_is_one_spec(value, expected):
    assert resolve_adapter(value) == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults_that_it_takes(name):
    defaults = adapter_defaults({"type": name})
    assert resolve_adapter(defaults) == METHODS[name]() == resolve_adapter(name)
    assert METHODS[name].learning_rate > 0


KEYS = (
    "'alpha', 'alpha_pattern', 'bias', 'corda_config', 'dropout', 'ensure_weight_tying', 'eva_config', "
    "'exclude_modules', 'init_lora_weights', 'layers_pattern', 'layers_to_transform', 'loftq_config', 'lora_bias', "
    "'lora_ga_config', 'loraplus_lr_ratio', 'modules_to_save', 'r', "
    "'rank_pattern', 'target_modules', 'target_parameters', 'trainable_token_indices', 'use_dora', 'use_rslora'"
)
NAMES = ", ".join(map(repr, METHODS))
WRONG: dict[str, tuple[Any, str]] = {
    "method": (
        "lorra",
        f"The 'adapter' parameter of the estimator must be one of {NAMES}, or another method of peft's. "
        "Got 'lorra' instead. "
        "Did you mean 'lora'?",
    ),
    "method in a dict": (
        {"type": "ful"},
        f"The 'adapter' parameter of the estimator must be one of {NAMES}, or another method of peft's. "
        "Got 'ful' instead. "
        "Did you mean 'full'?",
    ),
    "no method": (
        {"type": None, "r": 4},
        f"The 'adapter' parameter of the estimator must be one of {NAMES}, or another method of peft's. "
        "Got None instead.",
    ),
    "number": (3, "The 'adapter' parameter of the estimator must be None, a name, a dict or a spec. Got 3 instead."),
    "class": (
        LoRA,
        "The 'adapter' parameter of the estimator must be None, a name, a dict or a spec. "
        "Got <class 'llmfit.adapters.methods.lora.LoRA'> instead.",
    ),
    "key": (
        {"rr": 4},
        f"The adapter 'lora' has no parameter 'rr'. It has {KEYS}. Did you mean 'r'?",
    ),
    "key of another": ({"type": "full", "r": 4}, "The adapter 'full' has no parameter 'r'. It has none."),
    "r": ({"r": 0}, "The 'r' parameter of LoRA must be an int >= 1. Got 0 instead."),
    "r true": ({"r": True}, "The 'r' parameter of LoRA must be an int >= 1. Got True instead."),
    "r in a spec": (LoRA(r="8"), "The 'r' parameter of LoRA must be an int >= 1. Got '8' instead."),
    "alpha": ({"alpha": -1}, "The 'alpha' parameter of LoRA must be a finite number >= 0. Got -1 instead."),
    "alpha nan": (
        {"alpha": math.nan},
        "The 'alpha' parameter of LoRA must be a finite number >= 0. Got nan instead.",
    ),
    "dropout": (
        {"dropout": 1.5},
        "The 'dropout' parameter of LoRA must be a finite number >= 0 and <= 1. Got 1.5 instead.",
    ),
    "dropout one": ({"dropout": 1}, "The 'dropout' parameter of LoRA must be a number >= 0 and < 1. Got 1 instead."),
    "layers": (
        {"target_modules": []},
        "The 'target_modules' parameter of LoRA must be 'all-linear' or a list of names. Got [] instead.",
    ),
    "layers of numbers": (
        {"target_modules": [1]},
        "The 'target_modules' parameter of LoRA must be 'all-linear' or a list of names. Got [1] instead.",
    ),
    "bias": (
        {"bias": "al"},
        "The 'bias' parameter of LoRA must be one of 'none', 'all', 'lora_only'. Got 'al' instead. Did you mean 'all'?",
    ),
    "rslora": (
        {"use_rslora": 1},
        "The 'use_rslora' parameter of LoRA must be one of True, False. Got 1 instead.",
    ),
    "dora": ({"use_dora": "yes"}, "The 'use_dora' parameter of LoRA must be one of True, False. Got 'yes' instead."),
    "init": (
        {"init_lora_weights": "gausian"},
        "The 'init_lora_weights' parameter of LoRA must be one of True, 'gaussian', 'orthogonal', "
        "'mica', 'eva', 'pissa', 'olora', 'corda', 'loftq', 'lora_ga'. "
        "Got 'gausian' instead. Did you mean 'gaussian'?",
    ),
    "init of an odd rank": (
        {"init_lora_weights": "orthogonal", "r": 3},
        "The 'r' parameter of LoRA must be even where init_lora_weights is 'orthogonal'. Got 3 instead.",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_one_sentence(value, sentence, settings, frame, monkeypatch):
    monkeypatch.setattr("llmfit.base_model.load_base_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter=value).fit(frame)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["input_layernorm"], ""),
        ("self_attn", ""),
        ("nowhere", ""),
        (["nowhere"], ""),
        (["q_proj", "nowhere"], ""),
        (["q_proj", "v_prj"], " Did you mean 'v_proj'?"),
    ],
)
def test_layers_that_lora_cannot_adapt_are_one_sentence(names, hint, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"target_modules": names}).fit(frame)
    assert str(error.value) == (
        "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
        f"Got {names!r} instead.{hint}"
    )


# The update -----------------------------------------------------------------------------------------


def merged(folder: str, tensors: dict[str, torch.Tensor], scale: float) -> Any:
    """The plain model with W + scale * B A in every adapted layer, and the biases that were trained."""
    model = plain_model(folder)
    state = model.state_dict()
    for name, tensor in tensors.items():
        place = name.removeprefix("base_model.model.")
        if place.endswith("lora_A.weight"):
            stem = place.removesuffix(".lora_A.weight")
            state[f"{stem}.weight"] += scale * tensors[name.replace("lora_A", "lora_B")] @ tensor
        elif place.endswith("bias"):
            state[place.replace(".base_layer", "")].copy_(tensor)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        ({"r": 4}, 2.0),
        ({"r": 8}, 2.0),
        ({"r": 4, "alpha": 4}, 1.0),
        ({"r": 4, "alpha": 0.5}, 0.125),
        ({"r": 4, "alpha": 4, "use_rslora": True}, 2.0),
        ({"r": 4, "use_rslora": True}, 4.0),
        ({"r": 4, "dropout": 0.4}, 2.0),
        ({"r": 4, "target_modules": ["q_proj", "down_proj"]}, 2.0),
        ({"r": 4, "target_modules": ["lm_head"]}, 2.0),
        ({"r": 4, "init_lora_weights": "gaussian"}, 2.0),
        ({"r": 4, "init_lora_weights": "orthogonal"}, 2.0),
    ],
)
def test_the_update_is_alpha_over_r_times_b_a(adapter, scale, settings, frame, tiny):
    clf = classifier(settings, adapter=adapter, epochs=3).fit(frame)
    expected = merged(tiny, weights(clf), scale)(input_ids=IDS).logits
    found = logits_of(clf, tiny)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - plain_model(tiny)(input_ids=IDS).logits).detach().abs().max()) > 0.02


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_beside(bias, settings, frame, biased):
    adapter = {"r": 4, "bias": bias, "target_modules": ["k_proj"]}
    clf = classifier(settings, base_model=biased, adapter=adapter, epochs=3).fit(frame)
    trained = {name.split(".")[-3 if ".base_layer." in name else -2] for name in weights(clf) if name.endswith("bias")}
    assert trained == ({"q_proj", "k_proj", "v_proj"} if bias == "all" else {"k_proj"})
    expected = merged(biased, weights(clf), 2.0)(input_ids=IDS).logits
    torch.testing.assert_close(logits_of(clf, biased), expected, rtol=0, atol=1e-5)
    without = {name: t for name, t in weights(clf).items() if not name.endswith("bias")}
    assert float((merged(biased, without, 2.0)(input_ids=IDS).logits - expected).detach().abs().max()) > 1e-3


def test_dora_scales_each_row_to_a_learned_magnitude(settings, frame, tiny):
    adapter = {"r": 4, "use_dora": True, "target_modules": ["q_proj"]}
    clf = classifier(settings, adapter=adapter, epochs=3).fit(frame)
    model, tensors = plain_model(tiny), weights(clf)
    state, moved = model.state_dict(), []
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        place = stem.removeprefix("base_model.model.") + ".weight"
        magnitude = tensors[f"{stem}.lora_magnitude_vector"]
        moved.append(float((magnitude - state[place].norm(dim=1)).abs().max()))
        directed = state[place] + 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[name]
        state[place].copy_(magnitude[:, None] * directed / directed.norm(dim=1, keepdim=True))
    model.load_state_dict(state)
    torch.testing.assert_close(logits_of(clf, tiny), model(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert min(moved) > 1e-3


def test_an_untrained_adapter_changes_nothing(tiny, settings, frame):
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with base.attach(LoRA(r=4, dropout=0.5, use_dora=True), seed=3) as model, torch.no_grad():
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, plain_model(tiny)(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_alpha_is_twice_r_where_it_is_not_given(settings, frame):
    adapters: list[Any] = [{"r": 4}, {"r": 4, "alpha": 8}, {"r": 4, "alpha": 4}]
    fits = [classifier(settings, adapter=adapter, epochs=3).fit(frame) for adapter in adapters]
    assert same(fits[0], fits[1])
    assert furthest(fits[0], fits[2]) > 1e-4


def test_one_name_of_a_layer_is_a_list_of_it(settings, frame):
    one, listed, both = (
        classifier(settings, adapter={"r": 4, "target_modules": names}).fit(frame)
        for names in ("q_proj", ["q_proj"], ("q_proj", "k_proj"))
    )
    assert same(one, listed)
    assert {name.split(".")[-3] for name in weights(one)} == {"q_proj"}
    assert {name.split(".")[-3] for name in weights(both)} == {"q_proj", "k_proj"}


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_adapted_embedding_is_kept_as_an_update_alone(name, settings, frame):
    clf = classifier(settings, adapter={"r": 4, "target_modules": [name]}).fit(frame)
    assert sum(t.numel() for t in weights(clf).values()) == 4 * (261 + 32) == clf.trainable_parameters_
    assert clf.predict_proba(frame).shape == (8, 2)


def test_all_linear_is_every_linear_layer_but_the_head(settings, frame, tiny):
    clf = classifier(settings, adapter={"r": 4}).fit(frame)
    linear = {n: m for n, m in plain_model(tiny).named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights(clf)}
    assert adapted == linear.keys()
    assert clf.trainable_parameters_ == sum(4 * (m.in_features + m.out_features) for m in linear.values())


def test_the_beginning_is_drawn_from_the_seed_as_peft_draws_it(tiny):
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with base.attach(LoRA(r=4), seed=fit_seed(), training=True) as model:
        found = LoRA(r=4).tensors(model)
    torch.manual_seed(fit_seed())
    plain = peft.get_peft_model(plain_model(tiny), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert same(found, peft.get_peft_model_state_dict(plain))


@pytest.mark.parametrize("adapter", [{"r": 4}, {"r": 4, "use_dora": True}, {"r": 4, "bias": "all"}, "full"])
def test_trained_weights_are_float32_beside_a_base_of_fewer_bits(adapter, settings, frame, biased):
    clf = classifier(settings, base_model=biased, adapter=adapter, dtype="bfloat16").fit(frame)
    assert {name: t.dtype for name, t in weights(clf).items() if t.dtype != torch.float32} == {}
    assert {t.device.type for t in weights(clf).values()} == {"cpu"}


def test_a_base_of_fewer_bits_learns_the_same(settings, frame):
    exact = classifier(settings, epochs=5).fit(frame)
    coarse = classifier(settings, epochs=5, dtype="bfloat16").fit(frame)
    np.testing.assert_allclose(coarse.history_["loss"], exact.history_["loss"], rtol=0.05)
    assert furthest(exact, coarse) > 0  # it did compute in fewer bits


def test_float16_is_for_prediction_alone(settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, dtype="float16").fit(frame)
    assert str(error.value) == (
        "The 'dtype' parameter must be 'bfloat16', 'float32' or 'float64' to train. Got 'float16', whose gradients "
        "underflow."
    )
    exact, coarse = (classifier(settings, adapter=None, dtype=d).fit(frame) for d in ("float32", "float16"))
    np.testing.assert_allclose(coarse.predict_proba(frame), exact.predict_proba(frame), atol=0.05)


def test_dropout_acts_in_training_and_not_in_prediction(settings, frame):
    without, dropped = (classifier(settings, adapter={"r": 4, "dropout": d}, epochs=3).fit(frame) for d in (0.0, 0.5))
    assert furthest(without, dropped) > 1e-4
    np.testing.assert_array_equal(dropped.predict_proba(frame), dropped.predict_proba(frame))


# Folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        {"r": 4},
        {"r": 4, "alpha": 3, "dropout": 0.2, "use_rslora": True},
        {"r": 4, "use_dora": True},
        {"r": 4, "bias": "all"},
        {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_peft_reads_the_folder_of_a_saved_adapter(adapter, settings, frame, biased, tmp_path):
    clf = classifier(settings, base_model=biased, adapter=adapter, epochs=3).fit(frame)
    clf.save(tmp_path / "saved")
    folder = tmp_path / "saved" / "adapter"
    model = peft.PeftModel.from_pretrained(plain_model(biased), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits_of(clf, biased), rtol=0, atol=1e-5)
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.base_model_name_or_path, config.inference_mode) == (biased, True)
    assert same(adapter_from_folder(folder, clf._adapter), clf)


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_a_damaged_file_of_weights_is_one_sentence(damage, settings, frame, tmp_path):
    clf = classifier(settings).fit(frame)
    clf.save(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter" / "adapter_model.safetensors"
    if damage == "half":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(ModelLoadError) as error:
        adapter_from_folder(path.parent, LoRA())
    assert re.fullmatch(f"The weights {re.escape(repr(str(path)))} cannot be read: [^\n]+\\.", str(error.value))


# Full fine-tuning -----------------------------------------------------------------------------------


def test_full_trains_every_weight(settings, frame, tiny):
    clf = classifier(settings, adapter="full", learning_rate=1e-3, epochs=3).fit(frame)
    plain = plain_model(tiny)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    assert weights(clf).keys() == before.keys()
    assert [name for name in before if torch.equal(before[name], weights(clf)[name])] == []
    assert clf.trainable_parameters_ == sum(p.numel() for p in before.values())
    plain.load_state_dict(weights(clf))
    torch.testing.assert_close(logits_of(clf, tiny), plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_tied_weights_stay_tied_in_full(settings, frame, tiny, tmp_path):
    folder = make_other(tmp_path / "tied", tiny, "llama", tie_word_embeddings=True)
    clf = classifier(settings, base_model=folder, adapter="full", learning_rate=1e-3, epochs=3).fit(frame)
    plain = plain_model(folder)
    assert weights(clf).keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights(clf), strict=False)
    torch.testing.assert_close(logits_of(clf, folder), plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_weights_of_another_model_are_refused(settings, frame, tiny, biased):
    clf = classifier(settings, base_model=biased, adapter="full").fit(frame)
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with pytest.raises(ModelLoadError) as error, base.attach(Full(), weights(clf)):
        pass
    assert str(error.value) == (
        "The saved weights do not belong to this base model: 'model.layers.0.self_attn.k_proj.bias' is in one only."
    )


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_learned_model_scores_its_rows_as_the_plain_one_does(adapter, settings, frame, tiny):
    clf = classifier(settings, adapter=adapter, epochs=3, learning_rate=3e-3).fit(frame)
    plain = merged(tiny, weights(clf), 2.0) if adapter == "lora" else plain_model(tiny)
    if adapter == "full":
        plain.load_state_dict(weights(clf))
    scores = np.array(
        [
            [-token_losses(plain, prompt, answer[:-1]).sum() for prompt, answer in token_rows(tiny, [text] * 2, labels)]
            for text in frame["text"]
            for labels in [clf.classes_]
        ]
    )
    expected = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(clf.predict_log_proba(frame), expected, atol=1e-4)


def test_specs_are_cloned_and_searched_by_their_keys(settings):
    clf = classifier(settings, adapter=LoRA(r=4))
    assert clone(clf).get_params()["adapter__r"] == 4
    assert resolve_adapter(clf.set_params(adapter__use_dora=True).adapter) == LoRA(r=4, use_dora=True)
