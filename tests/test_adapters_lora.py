"""LoRA with all that peft gives it: where it begins, which layers it takes, and that it ends as plain LoRA."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from benchmarks.adapters import IDS, merged_distance
from torch_side import classifier, furthest, plain_model, same, weights

import llmfit
from llmfit import LoRA, checkpoints
from llmfit.adapters import Plan, Planned, resolve_adapter
from llmfit.base_model import BaseModel, load_base_model
from llmfit.exceptions import ParameterError
from llmfit.sources import find_source

MOVING = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
STARTS = ["gaussian", "orthogonal", "mica", "eva", *MOVING]
Q = "model.layers.0.self_attn.q_proj"
FIRST = f"base_model.model.{Q}"


def lora(**settings: Any) -> dict[str, Any]:
    return {"type": "lora", "r": 4, **settings}


@torch.no_grad()
def logits_of(clf: Any) -> torch.Tensor:
    base = load_base_model(clf.base_model, device="cpu", dtype=clf.dtype)
    with base.attach(clf._adapter, weights(clf)) as model:
        return model(input_ids=IDS).logits


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Logits that the trained model itself gives, before its weights are taken out."""
    seen, take = SimpleNamespace(), LoRA.tensors

    @torch.no_grad()
    def tensors(self: LoRA, model: Any) -> Any:
        seen.logits = model.eval()(input_ids=IDS).logits
        return take(self, model)

    monkeypatch.setattr(LoRA, "tensors", tensors)
    return seen


@pytest.fixture
def plan() -> Plan:
    """Three rows of a fit of ten steps."""
    rows = [SimpleNamespace(ids=torch.randint(5, 260, (1, n), generator=torch.manual_seed(n))) for n in (9, 17, 30)]

    def loss(model: Any, row: Any) -> torch.Tensor:
        logits = model(input_ids=row.ids).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1].float(), row.ids[0, 1:])

    return Plan(10, lambda: iter(rows), loss)


def begun(folder: str, spec: LoRA, plan: Plan) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weights of a model that has just begun, and its logits."""
    base = load_base_model(folder, device="cpu", dtype="float32")
    with base.attach(Planned(spec, plan), seed=3, training=True) as model:
        state = peft.get_peft_model_state_dict(model)
        with torch.no_grad():
            return {n: t.detach().clone() for n, t in state.items()}, model.eval()(input_ids=IDS).logits


# Starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_what_is_kept_is_what_was_trained(start, settings, frame, tiny, own, tmp_path):
    before = {n: t.clone() for n, t in load_base_model(tiny, device="cpu", dtype="float32").model.state_dict().items()}
    clf = classifier(settings, adapter=lora(init_lora_weights=start), epochs=5).fit(frame)
    kept = logits_of(clf)
    torch.testing.assert_close(kept, own.logits, rtol=0, atol=2e-5)
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    after = load_base_model(tiny, device="cpu", dtype="float32").model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(plain_model(tiny), tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, kept, rtol=0, atol=1e-5)
    assert merged_distance(clf) < 1e-4


@pytest.mark.parametrize("start", MOVING)
def test_a_start_that_moves_w_begins_as_the_model_was(start, tiny, plan):
    state, logits = begun(tiny, LoRA(r=4, init_lora_weights=start), plan)
    torch.testing.assert_close(logits, plain_model(tiny)(input_ids=IDS).logits, rtol=0, atol=2e-4)
    assert float(state[f"{FIRST}.lora_B.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("start", MOVING)
def test_what_a_start_took_out_is_given_back(start, settings, frame, tiny):
    """W' = W + s (B A - B0 A0), of which each side has rank r."""
    clf = classifier(settings, adapter=lora(init_lora_weights=start), epochs=3).fit(frame)
    model, tensors = plain_model(tiny), weights(clf)
    state = model.state_dict()
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        assert (a.shape[0], b.shape[1]) == (8, 8)
        moved = 2.0 * (b[:, :4] @ a[:4] + b[:, 4:] @ a[4:])
        state[name.removeprefix("base_model.model.").replace("lora_A.", "")] += moved
    model.load_state_dict(state)
    torch.testing.assert_close(logits_of(clf), model(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert clf.trainable_parameters_ == sum(t.numel() for t in tensors.values()) / 2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "eva"])
def test_scales_are_kept_where_layers_differ(start, rslora, settings, frame, own, tmp_path, tiny):
    adapter = lora(init_lora_weights=start, use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3})
    clf = classifier(settings, adapter=adapter, epochs=5).fit(frame)
    torch.testing.assert_close(logits_of(clf), own.logits, rtol=0, atol=2e-5)
    clf.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(plain_model(tiny), tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, own.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_it_begins_as_peft_begins(start, tiny, plan):
    found, _ = begun(tiny, LoRA(r=4, init_lora_weights=start), plan)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start)
    expected = peft.get_peft_model_state_dict(peft.get_peft_model(plain_model(tiny), config))
    assert furthest(found, dict(expected)) < 1e-6


def test_eva_begins_with_the_directions_that_peft_finds(tiny, plan):
    """One batch of all rows, so that peft's way of adding up batch by batch is exact too."""
    rows = [SimpleNamespace(ids=torch.cat([row.ids[:, :9] for row in plan.rows()]))]
    plan = Plan(10, lambda: iter(rows), lambda model, row: model(input_ids=row.ids).logits.sum())
    spec = LoRA(r=4, init_lora_weights="eva", eva_config={"rho": 1.0, "use_label_mask": False})
    found, _ = begun(tiny, spec, plan)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.999)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain_model(tiny), config)
        batch = {"input_ids": rows[0].ids, "attention_mask": torch.ones_like(rows[0].ids)}
        peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    expected = peft.get_peft_model_state_dict(model)
    for name in [name for name in found if "lora_A" in name]:
        cosines = torch.linalg.svdvals(found[name] @ expected[name].T)  # of the angles between both spaces
        assert float(cosines.min()) > 0.99


def test_eva_shares_ranks_out_by_the_variance_that_they_explain(settings, frame):
    clf = classifier(settings, adapter=lora(init_lora_weights="eva")).fit(frame)
    ranks = [len(tensor) for name, tensor in weights(clf).items() if "lora_A" in name]
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8
    assert sum(ranks) == 14 * 4
    even = classifier(settings, adapter=lora(init_lora_weights="eva", eva_config={"rho": 1})).fit(frame)
    assert {len(tensor) for name, tensor in weights(even).items() if "lora_A" in name} == {4}


def test_eva_whitens(tiny, plan):
    plain, white = (
        begun(tiny, LoRA(r=4, init_lora_weights="eva", eva_config={"rho": 1, "whiten": on}), plan)[0]
        for on in (False, True)
    )
    a, b = plain[f"{FIRST}.lora_A.weight"], white[f"{FIRST}.lora_A.weight"]
    torch.testing.assert_close(a.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.nn.functional.normalize(b, dim=1), a, rtol=0, atol=1e-4)
    assert float(b.norm(dim=1).min()) != pytest.approx(1)


def test_eva_looks_at_positions_with_loss_only(settings, frame):
    both = [lora(init_lora_weights="eva", eva_config={"use_label_mask": on, "rho": 1}) for on in (True, False)]
    assert furthest(*(classifier(settings, adapter=adapter).fit(frame) for adapter in both)) > 1e-3


def test_lora_ga_begins_along_the_gradient(tiny, plan):
    found, _ = begun(tiny, LoRA(r=4, init_lora_weights="lora_ga"), plan)
    model = plain_model(tiny)
    for row in plan.rows():
        (plan.loss(model, row) / 3).backward()
    gradient = model.get_submodule(Q).weight.grad
    _, _, right = torch.linalg.svd(gradient)
    cosines = torch.linalg.svdvals(found[f"{FIRST}.lora_A.weight"] @ right[:4].T)
    assert float(cosines.min()) > 0.99


def test_corda_begins_along_the_inputs(tiny, plan):
    """U of the svd of W C, with the covariance C of the layer's inputs: B spans the first r columns."""
    found, _ = begun(tiny, LoRA(r=4, init_lora_weights="corda"), plan)
    model, products = plain_model(tiny), []
    layer = model.get_submodule(Q)

    def look(_: Any, inputs: Any) -> None:
        values = inputs[0][0] / inputs[0].max().abs()
        products.append(values.T @ values)

    with layer.register_forward_pre_hook(look), torch.no_grad():
        for row in plan.rows():
            model(input_ids=row.ids)
    covariance = sum(products) / 3
    covariance = covariance + torch.eye(32) * covariance.diag().mean() * 0.01
    left, _, _ = torch.linalg.svd(layer.weight.detach() @ covariance)
    b = torch.nn.functional.normalize(found[f"{FIRST}.lora_B.weight"], dim=0)
    assert float(torch.linalg.svdvals(b.T @ left[:, :4]).min()) > 0.99


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 5), (8, 1)])
def test_loftq_begins_with_what_few_bits_lose(bits, iterations, tiny, plan):
    config = {"loftq_bits": bits, "loftq_iter": iterations}
    found, _ = begun(tiny, LoRA(r=4, init_lora_weights="loftq", loftq_config=config), plan)
    weight = plain_model(tiny).get_submodule(Q).weight.detach()
    product = 2.0 * found[f"{FIRST}.lora_B.weight"] @ found[f"{FIRST}.lora_A.weight"]
    from bitsandbytes import functional

    if bits == 4:
        coarse = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    else:
        scale = weight.abs().amax(1, keepdim=True) / 127
        coarse = (weight / scale).round() * scale
    left, values, right = torch.linalg.svd(weight - coarse)
    if iterations == 1:
        torch.testing.assert_close(product, left[:, :4] * values[:4] @ right[:4], rtol=0, atol=1e-5)
    else:
        again = functional.dequantize_4bit(*functional.quantize_4bit(weight - product, quant_type="nf4"))
        assert float((weight - again - product).norm()) < float(values.norm())


def in_four_bits(folder: str) -> BaseModel:
    """A base model of its own whose linear layers are bitsandbytes'."""
    import bitsandbytes

    base = BaseModel(find_source(folder), torch.device("cpu"), torch.float32)
    for name, layer in list(base.model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.load_state_dict(layer.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(base.model.model.layers.get_submodule(parent), leaf, packed.to("cpu").requires_grad_(False))
    return base


def test_loftq_makes_a_base_in_few_bits_better(tiny, plan):
    base = in_four_bits(tiny)
    with torch.no_grad():
        exact = plain_model(tiny)(input_ids=IDS).logits
        coarse = base.model(input_ids=IDS).logits
    distances = [float((coarse - exact).abs().mean())]
    for r in (4, 16):
        spec = LoRA(r=r, init_lora_weights="loftq")
        with base.attach(Planned(spec, plan), training=True) as model, torch.no_grad():
            distances.append(float((model(input_ids=IDS).logits - exact).abs().mean()))
            assert (
                spec.tensors(model)[f"{FIRST}.lora_A.weight"].shape[0] == r
            )  # the base is as it was: nothing to give back
    assert distances[0] > distances[1] > distances[2]


def test_a_start_that_moves_w_is_refused_in_few_bits(tiny, plan):
    base = in_four_bits(tiny)
    with pytest.raises(ParameterError) as error, base.attach(Planned(LoRA(r=4, init_lora_weights="pissa"), plan)):
        pass
    assert str(error.value) == (
        "The 'init_lora_weights' parameter of LoRA cannot be 'pissa' beside a quantized base model, whose weights it "
        "would change. 'loftq' begins from what they have lost."
    )


def test_a_start_from_rows_is_for_fit(tiny):
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with pytest.raises(ParameterError) as error, base.attach(LoRA(r=4, init_lora_weights="eva")):
        pass
    assert str(error.value) == "LoRA that begins with 'eva' needs rows to train on: it can begin in fit only."


@pytest.mark.parametrize("start", ["pissa", "eva"])
def test_such_a_fit_goes_on_from_a_checkpoint(start, settings, frame, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    given = {**settings, "adapter": lora(init_lora_weights=start, loraplus_lr_ratio=4.0), "epochs": 2, "batch_size": 3}

    class Killed(BaseException):
        pass

    def kill(state: Any) -> None:
        if state.step == 3:
            raise Killed

    with pytest.raises(Killed):
        classifier(given, callbacks=kill, checkpoint_dir=tmp_path).fit(frame)
    assert same(classifier(given, checkpoint_dir=tmp_path).fit(frame), classifier(given).fit(frame))


# Layers ---------------------------------------------------------------------------------------------


def ranks_of(clf: Any) -> dict[str, int]:
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in weights(clf).items()
        if "lora_A" in name
    }


def test_some_blocks_are_adapted(settings, frame):
    for target in ("all-linear", ["q_proj", "down_proj"]):
        clf = classifier(settings, adapter=lora(layers_to_transform=1, target_modules=target)).fit(frame)
        assert {name.split(".")[1] for name in ranks_of(clf)} == {"1"}
        assert len(ranks_of(clf)) == (7 if target == "all-linear" else 2)
    named = classifier(settings, adapter=lora(layers_to_transform=[0, 1], layers_pattern="layers")).fit(frame)
    assert len(ranks_of(named)) == 14


def test_layers_are_left_out(settings, frame):
    clf = classifier(settings, adapter=lora(exclude_modules=["q_proj", "down_proj"])).fit(frame)
    assert len(ranks_of(clf)) == 10
    assert not any(name.endswith(("q_proj", "down_proj")) for name in ranks_of(clf))


def test_ranks_and_alphas_differ_by_layer(settings, frame, tiny):
    adapter = lora(rank_pattern={"q_proj": 2, r"layers.0.mlp.\w+": 6}, alpha_pattern={"q_proj": 5})
    clf = classifier(settings, adapter=adapter, epochs=3).fit(frame)
    assert ranks_of(clf)["layers.1.self_attn.q_proj"] == 2
    assert ranks_of(clf)["layers.0.mlp.up_proj"] == 6
    assert ranks_of(clf)["layers.1.mlp.up_proj"] == 4
    model, tensors = plain_model(tiny), weights(clf)
    state = model.state_dict()
    for name in [name for name in tensors if "lora_A" in name]:
        scale = 5 / 2 if "q_proj" in name else 2.0  # alpha is twice the rank of the layer where it is not given
        update = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        state[name.removeprefix("base_model.model.").replace("lora_A.", "")] += update
    model.load_state_dict(state)
    torch.testing.assert_close(logits_of(clf), model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_layers_are_trained_in_full_beside(settings, frame, tiny):
    clf = classifier(settings, adapter=lora(modules_to_save="lm_head", target_modules=["q_proj"]), epochs=2).fit(frame)
    assert clf.trainable_parameters_ == 261 * 32 + 2 * 4 * 64
    head = weights(clf)["base_model.model.lm_head.weight"]
    assert float((head - plain_model(tiny).lm_head.weight).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("tokens", [[70, 80], {"embed_tokens": [70, 80]}])
def test_tokens_are_trained_beside(tokens, settings, frame, tiny):
    clf = classifier(settings, adapter=lora(trainable_token_indices=tokens, target_modules=["q_proj"])).fit(frame)
    assert clf.trainable_parameters_ == 2 * 32 + 2 * 4 * 64
    assert sum(t.shape == (2, 32) for t in weights(clf).values()) == 1


# LoRA+ ----------------------------------------------------------------------------------------------


def test_lora_plus_steps_b_further(settings, frame):
    """One step of plain gradient descent: A moves as before, B by the ratio."""
    given = {**settings, "optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": None, "schedule": "constant"}
    start = {"init_lora_weights": "orthogonal"}  # where neither A nor B is zero
    nothing = weights(classifier(given, adapter=lora(**start), learning_rate=1e-30).fit(frame))
    plain = weights(classifier(given, adapter=lora(**start)).fit(frame))
    plus = weights(classifier(given, adapter=lora(**start, loraplus_lr_ratio=8)).fit(frame))
    for name, tensor in nothing.items():
        ratio = 8 if "lora_B" in name else 1
        torch.testing.assert_close(plus[name] - tensor, ratio * (plain[name] - tensor), rtol=1e-3, atol=1e-6)


def test_lora_plus_keeps_its_ratio_through_a_schedule(settings, frame):
    given = {**settings, "epochs": 4, "warmup": 0.25, "schedule": "linear", "optimizer": "adamw", "weight_decay": 0.0}
    one, many = (classifier(given, adapter=lora(loraplus_lr_ratio=ratio)).fit(frame) for ratio in (1.0, 16.0))
    np.testing.assert_array_equal(one.history_["learning_rate"], many.history_["learning_rate"])
    assert same(one, classifier(given, adapter=lora()).fit(frame))
    moved = [
        max(float(t.abs().max()) for name, t in weights(clf).items() if "lora_B" in name) for clf in (one, many)
    ]  # Adam's steps are of the size of the rate: B, which begins at zero, goes about 16 times as far
    assert 8 < moved[1] / moved[0] < 24


# Sentences ------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": (
        {"use_dora": True, "init_lora_weights": "pissa"},
        "The 'use_dora' parameter of LoRA must be False where init_lora_weights is 'pissa'. Got True instead.",
    ),
    "config of another start": (
        {"eva_config": {"rho": 1}},
        "The 'eva_config' parameter of LoRA must be None where init_lora_weights is not 'eva'. Got {'rho': 1} instead.",
    ),
    "config of no dict": (
        {"eva_config": 2.0, "init_lora_weights": "eva"},
        "The 'eva_config' parameter of LoRA must be None or a dict. Got 2.0 instead.",
    ),
    "config key": (
        {"eva_config": {"tau": 0.9}, "init_lora_weights": "eva"},
        "eva_config has no parameter 'tau'. It has 'adjust_scaling_factors', 'rho', 'use_label_mask', 'whiten'.",
    ),
    "config value": (
        {"corda_config": {"corda_method": "kmp"}, "init_lora_weights": "corda"},
        "The 'corda_method' parameter of corda_config must be one of 'ipm', 'kpm'. Got 'kmp' instead. "
        "Did you mean 'kpm'?",
    ),
    "rho": (
        {"eva_config": {"rho": 0.5}, "init_lora_weights": "eva"},
        "The 'rho' parameter of eva_config must be a finite number >= 1. Got 0.5 instead.",
    ),
    "bits": (
        {"loftq_config": {"loftq_bits": 3}, "init_lora_weights": "loftq"},
        "The 'loftq_bits' parameter of loftq_config must be one of 4, 8. Got 3 instead.",
    ),
    "pattern": (
        {"rank_pattern": {"q_proj": 0}},
        "The \"rank_pattern['q_proj']\" parameter of LoRA must be an int >= 1. Got 0 instead.",
    ),
    "pattern of no dict": (
        {"rank_pattern": 3},
        "The 'rank_pattern' parameter of LoRA must be a dict of layer to number. Got 3 instead.",
    ),
    "blocks": (
        {"layers_to_transform": -1},
        "The 'layers_to_transform' parameter of LoRA must be an int >= 0 or a list of them. Got -1 instead.",
    ),
    "blocks' pattern": (
        {"layers_pattern": "layers"},
        "The 'layers_pattern' parameter of LoRA must be None where layers_to_transform is None. Got 'layers' instead.",
    ),
    "tokens": (
        {"trainable_token_indices": ["a"]},
        "The 'trainable_token_indices' parameter of LoRA must be a list of token ids, or a dict of layer to such a "
        "list. Got ['a'] instead.",
    ),
    "ratio": (
        {"loraplus_lr_ratio": 0},
        "The 'loraplus_lr_ratio' parameter of LoRA must be a finite number > 0. Got 0 instead.",
    ),
    "left out": (
        {"exclude_modules": []},
        "The 'exclude_modules' parameter of LoRA must be a name or a list of names. Got [] instead.",
    ),
}


@pytest.mark.parametrize(("adapter", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_one_sentence(adapter, sentence):
    with pytest.raises(ParameterError) as error:
        resolve_adapter(adapter)
    assert str(error.value) == sentence


WRONG_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "pattern": (
        {"rank_pattern": {"q_prj": 2}},
        "The 'rank_pattern' parameter of LoRA must name layers that are adapted. Got 'q_prj' instead. "
        "Did you mean 'q_proj'?",
    ),
    "in full": (
        {"modules_to_save": ["lm_haed"]},
        "The 'modules_to_save' parameter of LoRA must name layers of this model. Got 'lm_haed' instead. "
        "Did you mean 'lm_head'?",
    ),
    "left out": (
        {"exclude_modules": "kproj"},
        "The 'exclude_modules' parameter of LoRA must name layers of this model. Got 'kproj' instead. "
        "Did you mean 'k_proj'?",
    ),
    "rank of a start": (
        {"r": 16, "init_lora_weights": "lora_ga"},
        "The 'r' parameter of LoRA must be at most 8 where init_lora_weights is 'lora_ga': the layer "
        "'model.layers.0.self_attn.k_proj' is 16 wide. Got 16 instead.",
    ),
    "no such block": (
        {"layers_to_transform": 7},
        "The 'layers_to_transform' parameter of LoRA must be at most 1 in this model. Got 7 instead.",
    ),
}


@pytest.mark.parametrize(("adapter", "sentence"), WRONG_HERE.values(), ids=WRONG_HERE)
def test_what_this_model_has_no_place_for_is_one_sentence(adapter, sentence, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "lora", **adapter}).fit(frame)
    assert str(error.value) == sentence


def test_scale_of_a_layer():
    spec = LoRA(r=4, use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"k_proj": 6})
    assert spec.scale_of("a.v_proj") == 8 / 2
    assert spec.scale_of("a.q_proj") == 18 / 3
    assert spec.scale_of("a.k_proj") == 6 / math.sqrt(4)
