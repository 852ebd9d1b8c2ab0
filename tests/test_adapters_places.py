"""What adapters' settings name must be there in the model: the sentence blames the setting that is wrong."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from head_side import headed, make_encoder, make_encoder_decoder
from torch_side import classifier, make_other, plain_model

import llmfit
from llmfit import LLMClassifier
from llmfit.adapters import METHODS, resolve_adapter
from llmfit.exceptions import ParameterError

PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "a block that is not there": (
        {"layers_to_transform": [0, 5]},
        "The 'layers_to_transform' parameter of LoRA must be at most 1 in this model. Got 5 instead.",
    ),
    "a block of another method": (
        {"type": "vera", "r": 4, "layers_to_transform": 2},
        "The 'layers_to_transform' parameter of VeRA must be at most 1 in this model. Got 2 instead.",
    ),
    "a list of blocks": (
        {"layers_to_transform": 0, "layers_pattern": "layer"},
        "The 'layers_pattern' parameter of LoRA must name a list of blocks of this model. Got 'layer' instead. "
        "Did you mean 'layers'?",
    ),
    "a list of blocks among others": (
        {"type": "loha", "layers_to_transform": 0, "layers_pattern": ["layers", "blocks"]},
        "The 'layers_pattern' parameter of LoHa must name a list of blocks of this model. Got 'blocks' instead.",
    ),
    "a list that cannot be read": (
        {"layers_to_transform": 0, "layers_pattern": "("},
        "The 'layers_pattern' parameter of LoRA must name a list of blocks of this model. Got '(' instead.",
    ),
    "a token": (
        {"trainable_token_indices": [1, 261]},
        "The 'trainable_token_indices' parameter of LoRA must be token ids below 261 in this model. Got 261 instead.",
    ),
    "a token of an embedding": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [300]}},
        "The 'trainable_token_indices' parameter of LoRA must be token ids below 261 in this model. Got 300 instead.",
    ),
    "an embedding": (
        {"trainable_token_indices": {"q_proj": [1]}},
        "The 'trainable_token_indices' parameter of LoRA must name embeddings of this model. Got 'q_proj' instead.",
    ),
    "all left out": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "The 'exclude_modules' parameter of LoRA must be names that leave a layer to adapt. Got ['q_proj'] instead.",
    ),
    "all trained in full": (
        {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
        "The 'modules_to_save' parameter of LoRA must be names that leave a layer to adapt. Got ['self_attn'] instead.",
    ),
    "a size of OFT": (
        {"type": "oft", "oft_block_size": 64, "target_modules": ["down_proj", "up_proj"]},
        "The 'oft_block_size' parameter of OFT must be a divisor of the inputs of every layer adapted, and "
        "'model.layers.0.mlp.up_proj' has 32. Got 64 instead.",
    ),
    "a size of BOFT": (
        {"type": "boft", "boft_block_size": 5},
        "The 'boft_block_size' parameter of BOFT must be a divisor of the inputs of every layer adapted, and "
        "'model.layers.0.self_attn.q_proj' has 32. Got 5 instead.",
    ),
    "a size of C3A": (
        {"type": "c3a", "block_size": 32, "block_size_pattern": {"q_proj": 8}},
        "The 'block_size' parameter of C3A must be a divisor of the inputs and outputs of every layer adapted, and "
        "'model.layers.0.self_attn.k_proj' has 32 and 16. Got 32 instead.",
    ),
    "a size in a pattern of C3A": (
        {"type": "c3a", "block_size_pattern": {"q_proj": 5}},
        "The 'block_size_pattern' parameter of C3A must be a divisor of the inputs and outputs of every layer adapted, "
        "and 'model.layers.0.self_attn.q_proj' has 32 and 32. Got 5 instead.",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_setting_that_is_wrong_is_named(case: str, settings: Any, frame: Any) -> None:
    adapter, sentence = PLACES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        with pytest.raises(ParameterError) as error:
            classifier(settings, adapter=adapter).fit(frame)
    assert str(error.value) == sentence


def test_a_list_of_blocks_may_be_named_by_its_path(settings: Any, frame: Any, tmp_path: Any) -> None:
    folder = make_encoder_decoder(tmp_path / "t5")
    given = settings | {"base_model": folder, "template": "{text}"}
    for pattern, sides in (("encoder.block", {"encoder"}), ("decoder.block", {"decoder"}), ("block", None)):
        adapter = {"r": 2, "target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": pattern}
        spec = LLMClassifier(**given, target="label", adapter=adapter).fit(frame)
        layers = [layer.split(".") for layer in spec._adapter.layers_of(spec._tensors)]
        assert {layer[2] for layer in layers} == {"1"}
        assert {layer[0] for layer in layers} == (sides or {"encoder", "decoder"})


IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": (
        {"type": "prefix_tuning", "encoder_hidden_size": 8},
        "The 'encoder_hidden_size' parameter of PrefixTuning must be None where prefix_projection is False. "
        "Got 8 instead.",
    ),
    "blocks": (
        {"type": "c3a", "layers_pattern": "layers"},
        "The 'layers_pattern' parameter of C3A must be None where layers_to_transform is None. Got 'layers' instead.",
    ),
    "eps": (
        {"type": "oft", "eps": 1e-3},
        "The 'eps' parameter of OFT must be 6e-05 where coft is False. Got 0.001 instead.",
    ),
    "terms": (
        {"type": "oft", "use_cayley_neumann": False, "num_cayley_neumann_terms": 3},
        "The 'num_cayley_neumann_terms' parameter of OFT must be 5 where use_cayley_neumann is False. Got 3 instead.",
    ),
    "scale": (
        {"type": "lokr", "rank_dropout_scale": True},
        "The 'rank_dropout_scale' parameter of LoKr must be False where rank_dropout is 0. Got True instead.",
    ),
    "both sparse": (
        {"type": "randlora", "sparse": True, "very_sparse": True},
        "The 'sparse' parameter of RandLoRA must be False where very_sparse is True. Got True instead.",
    ),
    "tokens twice": (
        {"trainable_token_indices": [3, 3]},
        "The 'trainable_token_indices' parameter of LoRA must be distinct token ids. Got [3, 3] instead.",
    ),
    "ia3": (
        {"type": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": ["down_proj"]},
        "The 'feedforward_modules' parameter of IA3 must be among target_modules. Got 'down_proj' instead.",
    ),
    "no tokens": ({"type": "trainable_tokens"}, "The adapter 'trainable_tokens' needs 'token_indices'."),
}


@pytest.mark.parametrize("case", IDLE)
def test_settings_that_would_do_nothing_are_refused(case: str) -> None:
    adapter, sentence = IDLE[case]
    with pytest.raises(ParameterError) as error:
        resolve_adapter(adapter)
    assert str(error.value) == sentence


def test_settings_are_taken_where_they_do_something() -> None:
    for adapter in (
        {"type": "prefix_tuning", "encoder_hidden_size": 8, "prefix_projection": True},
        {"type": "oft", "eps": 1e-3, "coft": True},
        {"type": "lokr", "rank_dropout_scale": True, "rank_dropout": 0.5},
        {"layers_pattern": "layers", "layers_to_transform": 0},
        {"type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": "down_proj"},
    ):
        assert resolve_adapter(adapter) is not None


@pytest.mark.parametrize("target", ["all-linear", ["c_attn"]])
@pytest.mark.parametrize("name", ["bitfit", "boft", "c3a", "hra", "loha", "lokr", "oft"])
def test_what_gpt2_keeps_the_other_way_round_is_named(
    name: str, target: Any, settings: Any, frame: Any, tiny: str, tmp_path: Any
) -> None:
    folder = make_other(tmp_path / "gpt2", tiny, "gpt2")
    with pytest.raises(ParameterError) as error:
        classifier(settings, base_model=folder, adapter={"type": name, "target_modules": target}).fit(frame)
    assert str(error.value) == (
        f"The adapter {name!r} cannot be put into this model: it adapts layers of the kind Linear only, and 'c_attn' "
        "is of the kind Conv1D here, which keeps its weights the other way round."
    )


def test_a_family_without_a_choice_of_peft_is_named(settings: Any, frame: Any, tiny: str, tmp_path: Any) -> None:
    folder = make_other(tmp_path / "olmo2", tiny, "olmo2")
    with pytest.raises(ParameterError) as error:
        classifier(settings, base_model=folder, adapter="ia3").fit(frame)
    assert str(error.value) == (
        "The 'target_modules' parameter of IA3 must be given for this model, as peft has no choice of its own for the "
        "family 'olmo2'. Got None instead."
    )


def test_all_norms_are_tuned_where_peft_has_no_choice(settings: Any, frame: Any, tmp_path: Any) -> None:
    folder = make_encoder(tmp_path / "bert")
    given = settings | {"base_model": folder, "adapter": "ln_tuning", "epochs": 5}
    clf = headed(given).fit(frame)
    norms = 1 + 2 * 2  # of the embeddings, and two a block
    assert clf.trainable_parameters_ == norms * 2 * 32 + 2 * 33
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    clf.save(tmp_path / "saved")
    assert llmfit.load(tmp_path / "saved").predict(frame).equals(clf.predict(frame))


def test_peft_alone_reads_norms_of_any_family(settings: Any, frame: Any, tiny: str, tmp_path: Any) -> None:
    folder = make_other(tmp_path / "olmo2", tiny, "olmo2")
    clf = classifier(settings, base_model=folder, adapter="ln_tuning", epochs=3).fit(frame)
    clf.export(tmp_path / "adapter", merge=False)
    clf.export(tmp_path / "merged")
    plain = plain_model(folder)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = plain(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
        merged = plain_model(str(tmp_path / "merged"))(input_ids=ids).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_the_first_token_of_a_decoder_is_no_vector(adapter: Any, settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        headed(settings, LLMClassifier, adapter=adapter, head={"pooling": "first"}).fit(frame)
    assert str(error.value) == (
        "The 'pooling' parameter of head must be 'auto', 'last' or 'mean' for a decoder, whose first token has seen no "
        "other. Got 'first' instead."
    )


def test_sizes_are_found_for_every_method_that_has_one(settings: Any, frame: Any) -> None:
    sized = {name: method for name, method in METHODS.items() if hasattr(method, "size")}
    assert sorted(sized) == ["boft", "c3a", "oft", "vblora"]
    for name in sized:
        clf = classifier(settings, adapter={"type": name, "layers_to_transform": 1}).fit(frame)
        assert {layer.split(".")[2] for layer in clf._adapter.layers_of(clf._tensors)} == {"1"}
