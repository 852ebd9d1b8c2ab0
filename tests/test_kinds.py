"""What a configuration says of a model: windows of no tokens, noise by other names, decoders that look both ways."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from head_side import headed
from torch_side import CPU, classifier, make_other, plain_model

from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.estimators import fitting, joining
from llmfit.exceptions import PackingWarning, ParameterError
from llmfit.forward import checking, collate, completion_logits, packable
from llmfit.kinds import draws_numbers, kind_of
from llmfit.packing import attention, packed
from llmfit.search import FusedGridSearchCV
from llmfit.sources import quiet_loading

SOME = [Encoded((1, 5, 6)), Encoded((1, 7, 8, 9))]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


# Windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
        ("qwen3_moe", EXPERTS),
    ],
)
def test_a_window_of_no_tokens_is_none(kind, changed, tiny, tmp_path):
    model = plain_model(make_other(tmp_path / kind, tiny, kind, **changed))
    if kind == "qwen2_moe":
        assert model.config.sliding_window == 0
    assert packable(model, SOME, pad_id=0, device=CPU) == 1


# Noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "drawn"),
    [
        (transformers.LlamaConfig(), False),
        (transformers.LlamaConfig(attention_dropout=0.1), True),
        (transformers.MixtralConfig(), False),
        (transformers.MixtralConfig(router_jitter_noise=0.1), True),
        (transformers.PhimoeConfig(), True),
        (transformers.PhimoeConfig(router_jitter_noise=0.0), False),
        (transformers.PhimoeConfig(router_jitter_noise=0.0, input_jitter_noise=0.01), True),
        (transformers.DbrxConfig(ffn_config={"moe_jitter_eps": 0.01}), True),
        (transformers.DbrxConfig(), False),
        (transformers.LlamaConfig(id2label={0: "drop", 1: "jitter"}), False),
        (transformers.Gemma3Config(text_config={"attention_dropout": 0.1}), True),
        (transformers.Gemma3Config(vision_config={"attention_dropout": 0.1}), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_what_is_drawn_in_training_is_read_off_the_configuration(config, drawn):
    assert draws_numbers(config) is drawn


@pytest.fixture(params=[0.0, 0.3], ids=["without noise", "with noise"])
def noisy(request, tiny, tmp_path) -> tuple[float, str]:
    own = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": request.param}
    return request.param, make_other(tmp_path / "mixtral", tiny, "mixtral", **own)


def test_the_budget_decides_a_fit_beside_a_router_with_noise(noisy, settings, frame, tmp_path, monkeypatch):
    noise, folder = noisy
    keys: list[str] = []
    real = fitting._fit_key
    monkeypatch.setattr(fitting, "_fit_key", lambda *given: keys.append(real(*given)) or keys[-1])
    for budget in (64, 128):
        own = {"base_model": folder, "batch_tokens": budget, "checkpoint_dir": tmp_path / "states"}
        classifier(settings, **own, adapter={"r": 2, "target_modules": ["q_proj"]}).fit(frame)
    assert len({*keys}) == (2 if noise else 1)


def test_a_router_with_noise_trains_alone(noisy, settings, frame, monkeypatch):
    noise, folder = noisy
    beside: list[int] = []
    real = joining.train_together
    monkeypatch.setattr(joining, "train_together", lambda *given, **how: beside.append(1) or real(*given, **how))
    model = classifier(settings, base_model=folder, adapter={"r": 2, "target_modules": ["q_proj"]})
    FusedGridSearchCV(model, {"learning_rate": [1e-3, 1e-2]}, cv=2, refit=False).fit(frame)
    assert bool(beside) == (noise == 0)


# Both ways ------------------------------------------------------------------------------------------


def make_both_ways(folder: Path, tiny: str, kind: str = "gemma3_text", **changed: Any) -> str:
    """A Gemma that looks both ways, as EmbeddingGemma is saved: without a layer that makes words."""
    shutil.copytree(tiny, folder)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        use_bidirectional_attention=True,
        **changed,
    )
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.manual_seed(3)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
    "in windows": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma": ("gemma", {}),
}


@pytest.mark.parametrize(("kind", "changed"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("length", [3, 700], ids=["short rows", "long rows"])
def test_a_decoder_that_looks_both_ways_reads_a_row_alike_beside_any(
    kind, changed, adapter, length, tiny, tmp_path, settings, frame
):
    folder = make_both_ways(tmp_path / kind, tiny, kind, **changed)
    assert load_base_model(folder, device="cpu").kind == "encoder"
    own = {**settings, "base_model": folder, "adapter": adapter, "epochs": 3, "max_length": 2048}
    rows = frame.assign(text=[text + " and so on" * (length * (i == 3) // 10) for i, text in enumerate(frame["text"])])
    clf = headed(own).fit(rows)
    together = clf.predict_proba(rows)
    clf.set_params(batch_tokens=1)
    alone = np.concatenate([clf.predict_proba(rows[i : i + 1]) for i in range(len(rows))])
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize(("kind", "changed"), WAYS.values(), ids=WAYS)
def test_its_tokens_see_those_behind_them_beside_padding_too(kind, changed, tiny, tmp_path):
    base = load_base_model(make_both_ways(tmp_path / kind, tiny, kind, **changed), device="cpu")
    found = []
    for ids, mask in (([1, 5, 6, 7], [1] * 4), ([1, 5, 6, 200], [1] * 4), ([1, 5, 6, 7, 0, 0], [1] * 4 + [0] * 2)):
        with torch.no_grad():
            out = base.model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]))
        found.append(out.last_hidden_state[0, 0])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-5)


def test_it_has_no_words(tiny, tmp_path, settings, frame):
    folder = make_both_ways(tmp_path / "both", tiny)
    with pytest.raises(ParameterError) as error:
        classifier(settings, base_model=folder).fit(frame)
    assert str(error.value) == (
        f"The base model {folder!r} is an encoder, which has no words to answer in. Set head='linear'."
    )


@pytest.mark.parametrize(("value", "kind"), [(True, "encoder"), (None, "decoder"), (False, "decoder")])
def test_the_flag_decides(value, kind):
    config = transformers.Gemma3TextConfig(architectures=["Gemma3ForCausalLM"], use_bidirectional_attention=value)
    assert kind_of(config)[0] == kind


# On a GPU, in groups too ----------------------------------------------------------------------------


def test_a_gpu_is_looked_at_in_groups_as_well(tiny, tmp_path):
    model, gpu = plain_model(tiny), torch.device("cuda")
    looks = checking._looks(model, "words", 600, gpu)
    assert looks == [
        ("words", checking.SHORT, False),
        ("words, long", checking.LONGER, False),
        ("words, in groups", checking.WIDER, True),
    ]
    assert checking._looks(model, "words", 600, CPU) == looks[:2]
    near = plain_model(make_other(tmp_path / "near", tiny, "llama", max_position_embeddings=64))
    assert checking._looks(near, "words", 30, gpu) == [
        ("words", checking.SHORT, False),
        ("words, in groups", checking.SHORT, True),
    ]
    narrow = plain_model(make_other(tmp_path / "narrow", tiny, "mistral", sliding_window=64))
    assert checking._looks(narrow, "words", 30, gpu)[1] == ("words, in groups", checking.SHORT, True)


def test_a_model_attends_in_groups_where_it_is_told_to(tiny, monkeypatch):
    """The stand-in for a GPU: few pairs are looked at in a table on this device too."""
    model, done = plain_model(tiny), []
    monkeypatch.setattr(attention, "_fits_a_table", lambda layout, _, __, most: layout.length * layout.seen <= most)
    for name in ("_by_table", "by_scores", "by_kernel"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *given, real=real, name=name: (done.append(name), real(*given))[1])
    found = []
    for in_groups in (False, True):
        with torch.no_grad(), packed(model, in_groups=in_groups):
            found.append(
                completion_logits(model, collate([row._replace(completion=(5,)) for row in SOME], 0, CPU, shared=1))
            )
    assert done[:2] == ["_by_table"] * 2
    assert {*done[2:]} == {"by_scores"}
    torch.testing.assert_close(*found)


def test_groups_that_differ_are_found_where_the_table_agrees(tiny, monkeypatch):
    model = plain_model(tiny)
    monkeypatch.setattr(attention, "_fits_a_table", lambda layout, _, __, most: layout.length * layout.seen <= most)
    real = attention.by_scores
    monkeypatch.setattr(attention, "by_scores", lambda *given: real(*given).flip(0))
    monkeypatch.setattr(checking, "_looks", lambda *_: [("words", checking.SHORT, False)])
    assert packable(model, SOME, pad_id=0, device=CPU) == 1
    monkeypatch.setattr(
        checking, "_looks", lambda *_: [("words", checking.SHORT, False), ("groups", checking.SHORT, True)]
    )
    with pytest.warns(PackingWarning, match="cannot read packed rows"):
        assert packable(model, SOME, pad_id=0, device=CPU) is None
