"""Bases in few bits: the numbers of the papers, only where they belong, trained beside, never changed."""

from __future__ import annotations

import copy
import hashlib
import re
import sys
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch_side import CPU, classifier, furthest, generator, make_other, plain_tokenizer, same, weights

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LoRA, Quantization
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError
from llmfit.quantization import DEFAULTS, quantization_defaults, resolve_quantization
from llmfit.sources import quiet_loading

FOUR = Quantization(4, "nf4", double_quant=True, compute_dtype="auto")
EIGHT = Quantization(8, threshold=6.0)
IDS = torch.tensor([[1, 70, 80, 90, 100, 41, 42, 43]])
BITS = [4, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers have 64 inputs or more: whole blocks of 4-bit weights."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


@pytest.fixture(scope="module")
def bases(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    wide: dict[str, dict[str, int]] = {"qwen2": {"hidden_size": 64}, "gpt2": {"n_embd": 64}}
    made = {name: make_other(tmp_path_factory.mktemp(name) / name, tiny, name, **size) for name, size in wide.items()}
    return {"llama": tiny, **made}


def base_of(folder: str, quantization: Any, dtype: str = "float32") -> Any:
    return load_base_model(folder, device="cpu", dtype=dtype, quantization=quantization)


def plain_weights(module: Any) -> torch.Tensor:
    """The weights that a quantized layer stands for, (out, in)."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


def quantized_layers(model: Any) -> dict[str, Any]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def everything(model: Any) -> Any:
    """All that a fit could leave changed, with what bitsandbytes keeps beside the weights."""
    found: dict[str, Any] = {}

    def look(name: str, thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            data = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (id(thing), thing.dtype, thing.requires_grad, hashlib.sha256(data).hexdigest())
        else:
            found[name] = repr(thing) if isinstance(thing, str | int | float | bool | None) else id(thing)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
            else:
                look(f"{name}.{key}", value)
        for key, value in {**module._parameters, **module._buffers}.items():
            look(f"{name}.{key}", value)
            for state in (getattr(value, "quant_state", None), getattr(module, "state", None)):
                for part, item in getattr(state, "__dict__", {}).items():
                    look(f"{name}.{key}.{type(state).__name__}.{part}", item)
                for part, item in getattr(getattr(state, "state2", None), "__dict__", {}).items():
                    look(f"{name}.{key}.state2.{part}", item)
    return found, model.config.to_json_string(), model.config._attn_implementation


# Spellings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (4, FOUR),
        (8, EIGHT),
        (np.int64(4), FOUR),
        ({}, FOUR),
        ({"bits": 4}, FOUR),
        ({"bits": np.int64(8)}, EIGHT),
        ({"type": "fp4", "double_quant": False}, Quantization(4, "fp4", double_quant=False, compute_dtype="auto")),
        (
            {"bits": 4, "compute_dtype": "bfloat16"},
            Quantization(4, "nf4", double_quant=True, compute_dtype="bfloat16"),
        ),
        ({"bits": 8, "threshold": 0}, Quantization(8, threshold=0)),
        (Quantization(), FOUR),
        (Quantization(bits=8), EIGHT),
        (FOUR, FOUR),
        (EIGHT, EIGHT),
    ],
)
def test_every_spelling_is_one_setting(value: Any, expected: Any) -> None:
    assert resolve_quantization(value) == expected


@pytest.mark.parametrize("bits", DEFAULTS)
def test_every_number_of_bits_has_defaults_that_it_takes(bits: int) -> None:
    defaults = quantization_defaults({"bits": bits})
    assert resolve_quantization(defaults) == resolve_quantization(bits)
    assert defaults["bits"] == bits


ESTIMATOR = "The 'quantization' parameter of the estimator must be None, 4, 8, a dict or a Quantization. Got"
WRONG: dict[str, tuple[Any, str]] = {
    "bits": (3, "The 'bits' parameter of quantization must be one of 4, 8. Got 3 instead."),
    "bits in a dict": (
        {"bits": "4"},
        "The 'bits' parameter of quantization must be one of 4, 8. Got '4' instead.",
    ),
    "bits true": ({"bits": True}, "The 'bits' parameter of quantization must be one of 4, 8. Got True instead."),
    "bits list": ({"bits": [4]}, "The 'bits' parameter of quantization must be one of 4, 8. Got [4] instead."),
    "true": (True, f"{ESTIMATOR} True instead."),
    "text": ("nf4", f"{ESTIMATOR} 'nf4' instead."),
    "class": (Quantization, f"{ESTIMATOR} <class 'llmfit.quantization.Quantization'> instead."),
    "key": (
        {"bit": 4},
        "quantization has no parameter 'bit'. It has 'bits', 'compute_dtype', 'double_quant', 'threshold', 'type'. "
        "Did you mean 'bits'?",
    ),
    "key of 8 bits": ({"threshold": 5.0}, "The 'threshold' parameter of quantization has no meaning with bits=4."),
    "key of 4 bits": (
        {"bits": 8, "type": "nf4"},
        "The 'type' parameter of quantization has no meaning with bits=8.",
    ),
    "spec": (
        Quantization(8, double_quant=False),
        "The 'double_quant' parameter of quantization has no meaning with bits=8.",
    ),
    "type": (
        {"type": "nf5"},
        "The 'type' parameter of quantization must be one of 'nf4', 'fp4'. Got 'nf5' instead. Did you mean 'nf4'?",
    ),
    "double_quant": (
        {"double_quant": 1},
        "The 'double_quant' parameter of quantization must be one of True, False. Got 1 instead.",
    ),
    "compute_dtype": (
        {"compute_dtype": "int8"},
        "The 'compute_dtype' parameter of quantization must be one of 'auto', 'float32', 'bfloat16', 'float16'. "
        "Got 'int8' instead.",
    ),
    "threshold": (
        {"bits": 8, "threshold": -1},
        "The 'threshold' parameter of quantization must be a finite number >= 0. Got -1 instead.",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_refused_by_fit_in_one_sentence(value, sentence, settings, frame):
    clf = classifier(settings, quantization=value)
    clf.get_params()  # never raises
    with pytest.raises(ParameterError) as error:
        clf.fit(frame)
    assert str(error.value) == sentence


def test_a_missing_library_is_named(settings, frame, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ParameterError) as error:
        classifier(settings, quantization=4).fit(frame)
    assert str(error.value) == ("quantization needs bitsandbytes. Install it with: pip install 'llmfit[quantization]'.")
    classifier(settings).fit(frame)


@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (None, {}),
        (4, {"bits": 4, **DEFAULTS[4]}),
        (8, {"bits": 8, **DEFAULTS[8]}),
        ({"type": "fp4"}, {"bits": 4, **DEFAULTS[4], "type": "fp4"}),
        (5, {"bits": 5}),
        ({"bits": np.array([4, 8])}, {"bits": ...}),
    ],
)
def test_the_parameter_is_read_and_set_by_its_keys(cls: Any, value: Any, keys: dict[str, Any]) -> None:
    given = copy.deepcopy(value)
    estimator = cls(quantization=value)
    found = {k.partition("__")[2]: v for k, v in estimator.get_params().items() if k.startswith("quantization__")}
    assert found.keys() == keys.keys()
    assert all(found[key] == expected for key, expected in keys.items() if expected is not ...)
    assert clone(estimator).set_params(quantization__bits=8).quantization == {
        **(value if isinstance(value, dict) else {}),
        "bits": 8,
    }
    assert repr(estimator.quantization) == repr(given)


# The numbers ----------------------------------------------------------------------------------------


def test_four_bits_are_the_nearest_of_sixteen_values_of_each_block(tiny):
    layer = base_of(tiny, {"bits": 4, "double_quant": False}).model.model.layers[0].mlp.up_proj
    exact = base_of(tiny, None).model.model.layers[0].mlp.up_proj.weight
    blocks = exact.detach().double().numpy().reshape(-1, 64)
    normal = np.array(  # QLoRA, appendix E
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ]
    )
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = normal[np.abs(blocks[..., None] / largest[..., None] - normal).argmin(-1)] * largest
    np.testing.assert_allclose(plain_weights(layer).numpy().reshape(-1, 64), nearest, atol=1e-6)


def test_eight_bits_are_127ths_of_the_largest_of_each_row(tiny):
    layer = base_of(tiny, 8).model.model.layers[0].mlp.up_proj
    exact = base_of(tiny, None).model.model.layers[0].mlp.up_proj.weight.detach().half().float()
    step = exact.abs().amax(1, keepdim=True) / 127
    assert float((plain_weights(layer) - exact).abs().div(step).max()) < 0.51
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("quantization", [4, {"type": "fp4", "double_quant": False}, 8, {"bits": 8, "threshold": 0.0}])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_a_base_is_what_transformers_loads(name, quantization, bases):
    setting = resolve_quantization(quantization)
    assert setting is not None
    with quiet_loading():
        alone = transformers.AutoModelForCausalLM.from_pretrained(
            bases[name], dtype=torch.float32, quantization_config=setting.config(torch.float32), device_map={"": "cpu"}
        )
    for module in alone.modules():
        module.support_avx512bf16_for_cpu = False
    base = base_of(bases[name], quantization)
    with base.attach(None) as model:
        assert torch.equal(model(IDS).logits, alone.eval()(IDS).logits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_only_linear_layers_of_the_body_are_quantized(name, bits, bases):
    model, whole = base_of(bases[name], bits).model, base_of(bases[name], None).model
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    expected = {n for n, m in whole.named_modules() if isinstance(m, linear)} - {"lm_head"}
    assert quantized_layers(model).keys() == expected
    assert len(expected) in (8, 14)
    kept = {n: p for n, p in whole.named_parameters() if n.removesuffix(".weight") not in expected}
    assert {"lm_head.weight"} <= kept.keys() or name == "gpt2"
    own = dict(model.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in kept.items())


def test_layers_that_a_cpu_would_misread_stay_as_they_are(tmp_path):
    """With half a block of 64 inputs; bitsandbytes 0.50 would take other blocks' scales."""
    folder = make_model(tmp_path, hidden=32)
    assert {name.rpartition(".")[2] for name in quantized_layers(base_of(folder, 4).model)} == {"down_proj"}
    assert len(quantized_layers(base_of(folder, 8).model)) == 14
    exact = dict(base_of(folder, None).model.named_modules())
    for name, module in quantized_layers(base_of(folder, 4).model).items():
        weight = exact[name].weight
        assert float((plain_weights(module) - weight).abs().max()) < 0.2 * float(weight.abs().max())


def test_an_encoder_is_quantized_too(tiny, tmp_path):
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=261, max_position_embeddings=64, **size)
    plain_tokenizer(tiny).save_pretrained(tmp_path)
    with quiet_loading():
        transformers.BertModel(config).save_pretrained(tmp_path)
    base = base_of(str(tmp_path), 4)
    assert base.kind == "encoder"
    assert len(quantized_layers(base.model)) == 12  # six in each layer; the pooler is left out
    assert base.model.embeddings.word_embeddings.weight.dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
def test_training_beside_few_bits_is_training_beside_the_weights_they_stand_for(bits, tiny, settings, frame, tmp_path):
    """QLoRA's loss and gradients, computed by a plain model of the dequantized weights."""
    quantized = base_of(tiny, bits)
    plain = base_of(tiny, None).model
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    state |= {f"{n}.weight": plain_weights(m).float() for n, m in quantized_layers(quantized.model).items()}
    with quiet_loading():
        plain.save_pretrained(tmp_path, state_dict=state)
    plain_tokenizer(tiny).save_pretrained(tmp_path)
    one = classifier(settings, quantization=bits, epochs=3).fit(frame)
    other = classifier(settings, base_model=str(tmp_path), epochs=3).fit(frame)
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=2e-4)
    assert furthest(one, other) < 5e-3
    assert all(tensor.dtype == torch.float32 for tensor in weights(one).values())
    if bits == 4:  # with 8 bits, inputs are rounded too where nothing is trained
        np.testing.assert_allclose(one.predict_proba(frame), other.predict_proba(frame), atol=2e-3)


@torch.no_grad()
def test_weights_can_be_multiplied_in_another_dtype_than_that_of_the_model(tiny):
    exact, rough = (base_of(tiny, {"compute_dtype": name}) for name in ("float32", "bfloat16"))
    assert exact is not rough
    logits = []
    for base in (exact, rough):
        with base.attach(None) as model:
            logits.append(model(IDS).logits)
    assert logits[1].dtype == torch.float32
    assert 1e-6 < float((logits[0] - logits[1]).abs().max()) < 0.2


# The shared base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("adapter", ["lora", {"bias": "all", "r": 2}, {"use_dora": True, "r": 2}, None])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_quantized_base_is_left_as_it_was(name, adapter, bits, bases, settings, frame):
    model = base_of(bases[name], bits).model
    before = everything(model)
    own = {**settings, "base_model": bases[name], "quantization": bits, "gradient_checkpointing": name == "qwen2"}
    clf = classifier(own, adapter=adapter).fit(frame, eval_set=frame if adapter is not None else None)
    assert base_of(bases[name], bits).model is model
    assert everything(model) == before
    clf.predict(frame)
    assert everything(model) == before

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    if adapter is not None:
        with pytest.raises(ZeroDivisionError):
            classifier(own, adapter=adapter, callbacks=fail).fit(frame)
        assert everything(model) == before


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_generates_and_leaves_the_base(bits, tiny, settings, frame):
    model = base_of(tiny, bits).model
    before = everything(model)
    gen = generator(settings, quantization=bits, epochs=40, learning_rate=1e-2).fit(frame)
    assert gen.score(frame) >= 0.75
    assert everything(model) == before


def test_every_setting_is_a_base_of_its_own(tiny):
    assert base_of(tiny, 4) is base_of(tiny, {"bits": 4, "type": "nf4"})
    assert base_of(tiny, 4) is not base_of(tiny, {"type": "fp4"})
    assert len({id(base_of(tiny, q)) for q in (None, 4)}) == 2
    assert base_of(tiny, 8).quantization == EIGHT
    assert base_of(tiny, None).quantization is None


@pytest.mark.parametrize("quantization", [4, {"bits": 8, "threshold": 0.0}])
def test_answers_are_the_same_at_every_token_budget(quantization, settings, frame):
    clf = classifier(settings, quantization=quantization).fit(frame)
    whole = clf.predict_proba(frame)
    np.testing.assert_allclose(clf.set_params(batch_tokens=1).predict_proba(frame), whole, atol=1e-5)
    again = classifier(settings, quantization=quantization, batch_tokens=1).fit(frame)
    np.testing.assert_allclose(again.history_["loss"], clf.history_["loss"], rtol=1e-5)


# What can be done with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_it_is_saved_and_loaded(bits, settings, frame, tmp_path):
    clf = classifier(settings, quantization={"bits": bits}).fit(frame)
    clf.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model")
    assert loaded.quantization == {"bits": bits}
    assert loaded.memory_footprint_ == clf.memory_footprint_
    np.testing.assert_array_equal(loaded.predict_proba(frame), clf.predict_proba(frame))
    whole = llmfit.load(tmp_path / "model", quantization=None)
    assert np.abs(whole.predict_proba(frame) - clf.predict_proba(frame)).max() > 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| base model in memory | {clf.memory_footprint_ / 1e6:.1f} MB ({bits} bits" in card


def test_a_spec_is_saved_as_a_dict(settings, frame, tmp_path):
    clf = classifier(settings, quantization=Quantization(8, threshold=0.0)).fit(frame)
    clf.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model")
    assert resolve_quantization(loaded.quantization) == Quantization(8, threshold=0.0)
    np.testing.assert_array_equal(loaded.predict_proba(frame), clf.predict_proba(frame))


def test_bits_can_be_searched(settings, frame):
    search = GridSearchCV(classifier(settings, quantization=4), {"quantization__bits": [4, 8]}, cv=2)
    search.fit(frame, frame["label"])
    alone = classifier(settings, quantization={"bits": search.best_params_["quantization__bits"]})
    assert same(search.best_estimator_, alone.fit(frame, frame["label"]))


@pytest.mark.parametrize("bits", BITS)
def test_zero_shot_needs_no_adapter(bits, settings, frame):
    clf = classifier(settings, adapter=None, quantization=bits).fit(frame)
    whole = classifier(settings, adapter=None).fit(frame)
    distance = np.abs(clf.predict_proba(frame) - whole.predict_proba(frame)).max()
    assert 0 < distance < 0.6


def test_the_same_seed_gives_the_same_fit(settings, frame):
    clf = classifier(settings, quantization=4, adapter={"dropout": 0.2}, epochs=2)
    assert same(clone(clf).fit(frame), clone(clf).fit(frame))


@pytest.mark.parametrize("bits", BITS)
def test_a_killed_fit_goes_on(bits, settings, frame, tmp_path):
    def fail(state: Any) -> None:
        if state.step == 2:
            raise ZeroDivisionError

    own = {**settings, "quantization": bits, "epochs": 3}
    with pytest.raises(ZeroDivisionError):
        classifier(own, checkpoint_dir=tmp_path, callbacks=fail).fit(frame)
    another = {"bits": bits, "type": "fp4"} if bits == 4 else None
    other = classifier({**own, "quantization": another}, checkpoint_dir=tmp_path).fit(frame)
    went_on = classifier(own, checkpoint_dir=tmp_path).fit(frame)
    whole = classifier(own).fit(frame)
    assert same(went_on, whole)
    assert not same(other, whole)


FULL = (
    "adapter='full' trains the base model's own weights, and weights stored in 4 bits cannot be trained. "
    "Set quantization=None, or choose an adapter such as 'lora'."
)


def test_full_fine_tuning_of_a_quantized_base_is_refused(settings, frame):
    with pytest.raises(ParameterError, match=f"^{re.escape(FULL)}$"):
        classifier(settings, adapter="full", quantization=4).fit(frame)
    clf = classifier(settings, adapter="full").fit(frame)
    with pytest.raises(ParameterError, match=f"^{re.escape(FULL)}$"):
        clf.set_params(quantization=4).predict(frame)


@pytest.mark.parametrize("bits", BITS)
def test_double_precision_is_refused(bits, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier({**settings, "dtype": "float64"}, quantization=bits).fit(frame)
    assert str(error.value) == (
        "The 'dtype' parameter 'float64' cannot be used with quantization: bitsandbytes lacks it."
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_two_bytes_lie_beside_few_bits(dtype, tiny, settings, frame):
    clf = classifier({**settings, "dtype": dtype}, quantization=4, adapter=None).fit(frame)
    kept = {p.dtype for p in base_of(tiny, 4, dtype).model.parameters()}
    assert kept == {getattr(torch, dtype), torch.uint8}
    exact = classifier(settings, quantization=4, adapter=None).fit(frame)
    np.testing.assert_allclose(clf.predict_proba(frame), exact.predict_proba(frame), atol=0.2)


def test_a_fit_beside_bfloat16_trains_in_float32(settings, frame):
    clf = classifier({**settings, "dtype": "bfloat16"}, quantization=4, epochs=15).fit(frame)
    assert clf.score(frame) == 1.0
    assert {tensor.dtype for tensor in weights(clf).values()} == {torch.float32}


# Memory ---------------------------------------------------------------------------------------------


def test_fewer_bits_take_less_memory_as_measured(tmp_path, settings, frame):
    folder = make_model(tmp_path, hidden=128)
    own = {**settings, "base_model": folder, "adapter": None}
    ways: list[dict[str, Any]] = [
        {"quantization": 4, "dtype": "bfloat16"},
        {"quantization": 8, "dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
    ]
    bytes_of = [classifier(own, **way).fit(frame).memory_footprint_ for way in ways]
    assert bytes_of == sorted(set(bytes_of))
    parameters = sum(p.numel() for p in base_of(folder, None).model.parameters())
    assert 0 <= bytes_of[3] - 4 * parameters < 1024  # the weights, and the frequencies of the rotary positions
    assert 0 <= bytes_of[2] - 2 * parameters < 1024
    linear = sum(plain_weights(m).numel() for m in quantized_layers(base_of(folder, 8).model).values())
    rows = sum(len(m.weight.SCB) for m in quantized_layers(base_of(folder, 8).model).values())
    assert 0 <= bytes_of[1] - (2 * (parameters - linear) + linear + 4 * rows) < 1024
    # Half a byte a weight, one of 8 bits for each 64 of them, and the layers' tables of 16 and 256 values
    assert 0 <= bytes_of[0] - (2 * (parameters - linear) + linear / 2 + linear / 64) < 14 * (4 * 272 + 64) + 1024


# Gradient checkpointing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [{}, {"adapter": {"dropout": 0.3}}, {"adapter": "full"}, {"quantization": 4}, {"quantization": 8}],
    ids=["lora", "dropout", "full", "4", "8"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_are_computed_again_change_nothing(name, changed, bases, settings, frame):
    own = {**settings, "base_model": bases[name], "epochs": 2, **changed}
    plain = classifier(own).fit(frame, eval_set=frame)
    again = classifier(own, gradient_checkpointing=True).fit(frame, eval_set=frame)
    assert same(plain, again)
    columns = ["loss", "grad_norm", "validation_loss"]
    assert plain.history_[columns].equals(again.history_[columns])
    np.testing.assert_array_equal(plain.predict_proba(frame), again.predict_proba(frame))


def test_layers_are_computed_again_in_training_only(tiny, settings, frame, monkeypatch):
    layer = base_of(tiny, None).model.model.layers[0].mlp
    classifier(settings).fit(frame)  # how the model reads packed rows is seen once
    calls: list[bool] = []
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: (calls.append(self is layer), forward(self, x))[1])
    for wanted, checkpointing in ((1, False), (2, True)):
        calls.clear()
        clf = classifier(settings, gradient_checkpointing=checkpointing).fit(frame)
        assert sum(calls) == wanted
        calls.clear()
        clf.predict(frame)
        assert sum(calls) < 4
    assert not base_of(tiny, None).model.is_gradient_checkpointing


def test_less_is_kept_for_the_way_back(tiny, settings):
    """Bytes that autograd keeps between a forward and a backward pass."""
    base = base_of(tiny, None)

    def kept(checkpointing: bool) -> int:
        total = [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            total[0] += tensor.numel() * tensor.element_size()
            return tensor

        with base.attach(LoRA(), training=True, gradient_checkpointing=checkpointing) as model:
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with hooks:
                model(IDS.repeat(4, 8), use_cache=False).logits.sum()
        return total[0]

    assert kept(True) < kept(False) / 3


def test_what_cannot_be_computed_again_is_refused(settings, frame, monkeypatch, tiny):
    class Odd(LoRA):
        type = "odd"
        recomputable = False

    monkeypatch.setitem(METHODS, "odd", Odd)
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter="odd", gradient_checkpointing=True).fit(frame)
    assert str(error.value) == (
        "The 'gradient_checkpointing' parameter of LLMClassifier must be False with adapter='odd', whose vectors the "
        "layers would lose when they are computed again."
    )
    with pytest.raises(ParameterError) as error:
        classifier(settings, gradient_checkpointing="yes").fit(frame)
    assert str(error.value) == (
        "The 'gradient_checkpointing' parameter of LLMClassifier must be one of True, False. Got 'yes' instead."
    )
    model = base_of(tiny, None).model
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ParameterError) as error:
        classifier(settings, gradient_checkpointing=True).fit(frame)
    assert str(error.value) == (
        "The 'gradient_checkpointing' parameter must be False for this base model: LlamaForCausalLM does not support "
        "activation checkpointing."
    )
    assert base_of(tiny, None).device == CPU


@pytest.mark.real
def test_a_real_model_says_nearly_the_same_in_fewer_bits() -> None:
    reviews = llmfit.datasets.load_book_reviews()[:4]
    given: dict[str, Any] = {"target": "score", "adapter": None, "dtype": "bfloat16", "device": "cpu", "verbose": 0}
    models = [LLMClassifier("smollm2", quantization=bits, **given).fit(reviews) for bits in (None, 8, 4)]
    whole, *fewer = [model.predict_proba(reviews) for model in models]
    assert [round(model.memory_footprint_ / 1e6) for model in models] == [269, 163, 112]
    eight, four = (float(np.abs(proba - whole).max()) for proba in fewer)
    assert eight < 0.1
    assert four < 0.3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("adapter", [None, {"r": 4}], ids=["frozen", "lora"])
def test_a_head_learns_on_a_quantized_base(adapter, bits, tiny, settings, frame, tmp_path):
    own = {**settings, "base_model": tiny, "quantization": bits, "epochs": 20}
    own |= {"learning_rate": 0.3} if adapter is None else {}
    clf = classifier(own, adapter=adapter, head="linear").fit(frame)
    losses = clf.history_["loss"]
    assert losses.iloc[-1] < losses.iloc[0] / 2
    clf.save(tmp_path / "m")
    loaded = llmfit.load(tmp_path / "m")
    np.testing.assert_allclose(loaded.predict_proba(frame), clf.predict_proba(frame), atol=1e-6)
    whole = classifier({**own, "quantization": None}, adapter=adapter, head="linear").fit(frame)
    assert not np.array_equal(whole.predict_proba(frame), clf.predict_proba(frame))  # the few bits were really used
