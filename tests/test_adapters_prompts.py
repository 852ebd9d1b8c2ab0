"""Virtual tokens are invisible to the caller: masks, positions, caches and logits are those of real tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks.adapters import IDS
from seq2seq_side import SCALED, make_pair, plain_pair
from torch_side import classifier, generator, make_other, plain_model, plain_tokenizer, weights

from llmfit.adapters import resolve_adapter
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.exceptions import ParameterError, TruncationWarning
from llmfit.objectives import collate, completion_losses

METHODS = ["prompt_tuning", "prefix_tuning", "p_tuning"]
CPU = torch.device("cpu")
N = 5


def adapter(name: str, **settings: Any) -> dict[str, Any]:
    return {"type": name, "num_virtual_tokens": N, **settings}


@pytest.fixture(scope="module", params=[*METHODS, "gpt2", "qwen2"])
def lent(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with virtual tokens that are not nothing, and the plain model with the same computed by hand."""
    other = request.param not in METHODS
    folder = make_other(tmp_path_factory.mktemp("m") / request.param, tiny, request.param) if other else tiny
    spec = resolve_adapter(adapter("prefix_tuning" if other else request.param))
    base = load_base_model(folder, device="cpu", dtype="float32")
    with base.attach(spec, seed=1) as model:
        virtual = spec.tensors(model)["prompt_embeddings"]
        yield model, lambda ids: naive(plain_model(folder), virtual, ids, spec.prefix)


@torch.no_grad()
def naive(model: Any, virtual: torch.Tensor, ids: torch.Tensor, prefix: bool) -> torch.Tensor:
    """Logits of one row, without a cache of its own, from the definition of the method."""
    if not prefix:
        embedded = torch.cat([virtual[None], model.get_input_embeddings()(ids)], dim=1)
        return model(inputs_embeds=embedded).logits[:, N:]
    from transformers import DynamicCache

    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    layers = virtual.view(1, N, model.config.num_hidden_layers * 2, heads, -1).permute(2, 0, 3, 1, 4)
    cache = DynamicCache()
    for i in range(model.config.num_hidden_layers):
        cache.update(layers[2 * i], layers[2 * i + 1], i)
    return model(input_ids=ids, past_key_values=cache).logits


@torch.no_grad()
def test_logits_are_those_of_the_definition(lent):
    model, expected = lent
    out = model(input_ids=IDS, use_cache=False)
    assert out.logits.shape[:2] == IDS.shape
    torch.testing.assert_close(out.logits, expected(IDS), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, "mask", "indices"])
def test_positions_whose_logits_are_kept(lent, keep):
    model, expected = lent
    chosen = {"mask": torch.arange(8)[None] % 3 == 1, "indices": torch.tensor([[2]])}.get(keep, keep)
    found = model(input_ids=IDS, logits_to_keep=chosen, use_cache=False).logits.reshape(-1, 261)
    where = {"mask": [1, 4, 7], "indices": [2], 1: [7], 3: [5, 6, 7]}[keep]
    torch.testing.assert_close(found, expected(IDS)[0, where], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_are_padded_at_either_side(lent):
    model, expected = lent
    short = IDS[:, :5]
    right = torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    found = model(input_ids=torch.cat([right, IDS])).logits
    torch.testing.assert_close(found[:1, :5], expected(short), rtol=0, atol=1e-5)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    mask = torch.cat([(left != 0).long(), torch.ones_like(IDS)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(input_ids=torch.cat([left, IDS]), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:1, 3:], expected(short), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], expected(IDS), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_filled_cache_holds_the_virtual_tokens(lent):
    model, expected = lent
    out = model(input_ids=IDS[:, :5], use_cache=True)
    assert out.past_key_values.get_seq_length() == N + 5
    positions, mask = torch.arange(5, 8)[None], torch.ones(1, 8, dtype=torch.long)
    found = model(
        input_ids=IDS[:, 5:],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    torch.testing.assert_close(found.logits, expected(IDS)[:, 5:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_losses_are_those_of_the_definition(lent):
    model, expected = lent
    rows = [Encoded((1, 70, 80), (90, 100, 2)), Encoded((1, 41), (42, 2)), Encoded((1, 60, 61, 62, 63), (64, 2))]
    found = completion_losses(model, collate(rows, 0, CPU))
    by_hand = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        log_probs = expected(ids)[0].log_softmax(-1)
        by_hand += [-log_probs[len(row.prompt) - 1 + i, token] for i, token in enumerate(row.completion)]
    torch.testing.assert_close(found, torch.stack(by_hand), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_likeliest_token_again_and_again(lent, beams):
    model, expected = lent
    ids = torch.cat([torch.tensor([[0, 0, 0, 1, 70, 80, 90, 100]]), IDS])  # padded at the left
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    common: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    out = model.generate(input_ids=ids, num_beams=beams, eos_token_id=2, **common)
    assert torch.equal(out[:, :8], ids)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(
            input_ids=ids[row : row + 1, start:],
            num_beams=beams,
            eos_token_id=2,
            **{**common, "attention_mask": mask[row : row + 1, start:]},
        )
        assert alone[0, 8 - start :].tolist() == out[row, 8 : 8 + alone.shape[1] - 8 + start].tolist()
        if beams == 1:
            grown = ids[row : row + 1, start:]
            for token in alone[0, 8 - start :].tolist():
                assert int(expected(grown)[0, -1].argmax()) == token
                grown = torch.cat([grown, torch.tensor([[token]])], dim=1)


@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")  # so few steps teach no end of an answer
@pytest.mark.parametrize("name", METHODS)
def test_answers_are_the_same_alone(name, settings, frame):
    gen = generator(settings, learning_rate=0.3, epochs=5, adapter=adapter(name)).fit(frame)
    one, many = (list(gen.set_params(batch_tokens=n).predict(frame)) for n in (1, 4096))
    assert one == many
    assert len(set(one)) > 1


def test_text_to_begin_with(settings, frame, tiny):
    clf = classifier(settings, adapter=adapter("prompt_tuning", init_text="fruit"), learning_rate=1e-30).fit(frame)
    ids = plain_tokenizer(tiny)("fruit", add_special_tokens=False)["input_ids"]
    expected = plain_model(tiny).get_input_embeddings().weight[torch.tensor(ids * 2)[:N]]
    torch.testing.assert_close(weights(clf)["prompt_embeddings"], expected.detach())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "falcon_h1", *SCALED])
def test_virtual_tokens_begin_as_the_tokens_of_a_text_are_read(kind, tiny, tmp_path):
    """Also where a model scales what it embeds: in its embedding, or outside it."""
    make, load = (make_pair, plain_pair) if kind in SCALED else (make_other, plain_model)
    folder = make(tmp_path / kind, tiny, kind, **({} if kind in SCALED else {"head_dim": 8}))
    spec = resolve_adapter(adapter("prompt_tuning", init_text="fruit"))
    text = plain_tokenizer(tiny)("fruit", add_special_tokens=False)["input_ids"][:N]
    said = {"decoder_input_ids": torch.tensor([[2, 5, 6]])} if kind in SCALED else {}
    whole = torch.cat([torch.tensor([text * N])[:, :N], IDS[:1]], dim=1)
    expected = load(folder)(input_ids=whole, use_cache=False, **said).logits
    base = load_base_model(folder, device="cpu", dtype="float32")
    with base.attach(spec, seed=1) as model:
        model.eval()
        found = model(input_ids=IDS[:1], use_cache=False, **said).logits
    torch.testing.assert_close(found, expected if said else expected[:, N:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 8}),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_hidden_size": 8}),
    ],
)
def test_what_computes_virtual_tokens_is_needed_in_fit_only(changed, settings, frame):
    name, keys = changed
    clf = classifier(settings, adapter=adapter(name, **keys), epochs=3).fit(frame)
    kept = weights(clf)
    assert list(kept) == ["prompt_embeddings"]
    assert clf.trainable_parameters_ != kept["prompt_embeddings"].numel()
    before = clf.predict_proba(frame)
    clf.set_params(warm_start=True, learning_rate=1e-30).fit(frame)
    assert clf.trainable_parameters_ == kept["prompt_embeddings"].numel()  # the virtual tokens themselves go on
    np.testing.assert_allclose(clf.predict_proba(frame), before, atol=1e-5)


# The room that is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_virtual_tokens_take_room_of_the_context(name, settings, frame):
    clf = classifier(settings, adapter=adapter(name)).fit(frame)
    assert clf.max_length_ == 2032  # rows are padded in steps of 16
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter=adapter(name), max_length=2044).fit(frame)
    assert str(error.value) == (
        f"The 'max_length' parameter of LLMClassifier must be at most 2032, the context length of "
        f"{settings['base_model']!r} less the {N} virtual tokens of {name!r}, in steps of 16. Got 2044 instead."
    )
    assert classifier(settings, adapter=adapter(name), max_length=2032).fit(frame).max_length_ == 2032


def test_no_room_is_one_sentence(settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": "prompt_tuning", "num_virtual_tokens": 2047}).fit(frame)
    assert str(error.value) == (
        "The adapter 'prompt_tuning' takes 2047 tokens of a context of 2048, which leaves no room for a prompt. "
        "Lower num_virtual_tokens."
    )


def test_a_row_as_long_as_the_room_is_answered(settings, tiny, tmp_path):
    """On a model with learned positions, which has none beyond its context."""
    folder = make_other(tmp_path / "gpt2", tiny, "gpt2")
    rows = pd.DataFrame({"text": ["a" * 600, "b" * 600], "label": ["x", "y"]})
    gen = generator(
        settings,
        base_model=folder,
        adapter=adapter("prompt_tuning"),
        truncation="prompt",
        generation={"max_new_tokens": 4},
    )
    with pytest.warns(TruncationWarning):
        gen.fit(rows)
    assert gen.max_length_ == 496
    with pytest.warns(TruncationWarning):
        assert len(gen.predict(rows)) == 2


WRONG = {
    "tokens": (
        {"type": "prompt_tuning", "num_virtual_tokens": 0},
        "The 'num_virtual_tokens' parameter of PromptTuning must be an int >= 1. Got 0 instead.",
    ),
    "text": (
        {"type": "prompt_tuning", "init_text": ""},
        "The 'init_text' parameter of PromptTuning must be a text. Got '' instead.",
    ),
    "layers of an MLP": (
        {"type": "p_tuning", "encoder_num_layers": 3},
        "The 'encoder_num_layers' and 'encoder_dropout' parameters of PTuning are the LSTM's. "
        "Set encoder_reparameterization_type='LSTM' with them.",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_one_sentence(value, sentence):
    with pytest.raises(ParameterError) as error:
        resolve_adapter(value)
    assert str(error.value) == sentence
