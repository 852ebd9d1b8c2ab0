"""Answers behind packed prompts, or behind what all begin with: the same, in batches of more rows, which hold less."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from torch_side import CPU, generator, make_other, plain_model

from llmfit import inference
from llmfit.exceptions import MemoryWarning, PackingWarning, TruncationWarning
from llmfit.forward import generation, packed_prompts, read_rows
from llmfit.packing import KeptBeginning, attention, packed

TASK = "Say what kind of a thing this is, in one word. " * 5  # 235 tokens
ROOM = 12


def rows_of(count: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"thing {i:03d} of all things, {i:03d}" for i in range(count)], "label": "thing"})


def fitted(settings: dict[str, Any], **changed: Any) -> Any:
    own = {"adapter": None, "generation": {"max_new_tokens": ROOM}, "template": TASK + "{text}", **changed}
    return generator(settings, **own).fit(rows_of(3))


def texts(model: Any, rows: pd.DataFrame) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return list(model.predict(rows))


@pytest.fixture(params=["packed", "begun"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let prompts be read packed, or padded behind what all begin with, as by a model that cannot pack them."""
    if request.param == "begun":
        monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    return str(request.param)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch."""
    seen: list[int] = []
    run = inference._generate_batch

    def counting(model: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(rows))
        return run(model, rows, *rest, **named)

    monkeypatch.setattr(inference, "_generate_batch", counting)
    return seen


def test_a_row_takes_its_own_tokens_and_the_room_for_its_answer(reading, settings, sizes):
    rows = rows_of(90)
    begins = len("<") + len(TASK) + len("thing 0")  # the BOS, the task, and what the first texts begin with
    own = len("thing 000 of all things, 000") - len("thing 0")
    found = texts(fitted(settings, batch_tokens=2400), rows)
    held = {"begun": own + ROOM + begins // 2, "packed": 1 + own + ROOM}  # of two layers one has a copy at a time
    together = 2400 // held[reading]
    assert sizes == [together] * (90 // together) + [90 % together] * (90 % together > 0)
    assert 2400 // 2 // (begins + own) < together / 2  # so many they were, when the beginning was counted for each
    assert found == texts(fitted(settings, batch_tokens=1), rows)


def test_a_long_answer_is_no_reason_for_fewer_rows_than_whole_prompts_would_be(reading, settings, sizes):
    rows = pd.DataFrame({"text": [f"{i}" for i in range(10, 40)]})
    whole = len("<" + "x" * 30 + "10 is a")
    texts(
        fitted(settings, template="x" * 30 + "{text} is a", generation={"max_new_tokens": 200}, batch_tokens=800), rows
    )
    assert set(sizes) == {800 // (2 * whole)}


def test_the_beginning_is_held_once_for_all_rows_of_a_batch(settings, monkeypatch):
    monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    held: list[tuple[torch.Size, torch.Size]] = []
    real = generation.Continued.update

    def update(self: Any, *given: Any, **named: Any) -> Any:
        out = real(self, *given, **named)
        held.append((self.before[0].shape, self.keys.shape))
        assert out[0].shape[-2] == self.get_seq_length() == self.before[0].shape[-2] + self.keys.shape[-2]
        return out

    monkeypatch.setattr(generation.Continued, "update", update)
    texts(fitted(settings), rows_of(7))
    assert {before[0] for before, _ in held} == {1}
    shared = held[-1][0][-2]
    assert shared >= len(TASK)
    behind = held[-1][1]
    assert behind[0] == 7
    assert behind[-2] < 32 + ROOM  # a row's own tokens, padded, and its answer


def test_packed_rows_stand_side_by_side_behind_one_beginning(settings, monkeypatch):
    held: list[tuple[torch.Size, int]] = []
    real = packed_prompts.SideBySide.update

    def update(self: Any, *given: Any) -> Any:
        keys, values = real(self, *given)
        assert keys.shape == values.shape
        assert keys.transpose(0, 1).is_contiguous()  # nothing is copied to attend to them
        held.append((keys.shape, self.get_seq_length()))
        return keys, values

    monkeypatch.setattr(packed_prompts.SideBySide, "update", update)
    texts(fitted(settings), rows_of(7))
    held = [(shape, tokens) for shape, tokens in held if shape[0] == 7]  # others are looked at
    assert len(held) == 2 * ROOM  # of two layers
    assert {shape[2] % 16 for shape, _ in held} == {0}
    assert held[-1][0][2] <= 32 + ROOM + 4  # own tokens, padded, and the answer, in steps of 16
    assert held[-1][1] - held[0][1] == ROOM - 1


def test_a_long_row_takes_room_beside_short_ones(settings, sizes, monkeypatch):
    """What is kept of each row is as wide as that of the longest one of its batch."""
    cells, real = [], packed_prompts.SideBySide.update

    def update(self: Any, *given: Any) -> Any:
        cells.append(self.own[0].shape[1] * self.own[0].shape[2])
        return real(self, *given)

    monkeypatch.setattr(packed_prompts.SideBySide, "update", update)
    rows = pd.DataFrame({"text": ["x" * 200, *(f"thing {i}" for i in range(40))]})
    texts(fitted(settings, batch_tokens=1000), rows)
    assert sizes[0] == 1000 // (200 + ROOM + len(" "))
    assert sum(sizes) == 41
    assert max(cells) <= 1000 + 41 * 15  # places are taken by steps of 16


def test_a_long_beginning_is_read_by_itself(settings, monkeypatch):
    model = fitted(settings, template=TASK * 3 + "{text}", max_length=None)
    texts(model, rows_of(3))
    seen: list[int] = []
    watching = model._fitted_base().model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        texts(model, rows_of(40))
    finally:
        watching.remove()
    begins, own = len("<" + TASK * 3 + "thing 0"), len("00 of all things, 000")
    assert begins - 1 <= seen[0] <= begins + 16
    assert 40 * own <= seen[1] <= 40 * own + 16


def test_packed_prompts_are_computed_once_without_padding(settings, monkeypatch):
    rows = pd.DataFrame({"text": [f"{i:02d}" + "x" * (i % 9) ** 2 for i in range(30)]})
    model = fitted(settings)
    texts(model, rows[:4])  # looks at what it meets for the first time
    seen: list[int] = []
    watching = model._fitted_base().model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        texts(model, rows)
    finally:
        watching.remove()
    shared, own = 1 + len(TASK), sum(map(len, rows["text"]))  # the BOS and the task
    assert shared + own - len(rows) <= seen[0] <= shared + own + 16
    assert seen[1:] == [30] * ROOM


@pytest.mark.parametrize("drawing", [{}, {"do_sample": True, "top_k": 3}])
def test_answers_behind_a_beginning_are_those_of_whole_prompts(drawing, reading, settings, monkeypatch):
    rows = rows_of(9)
    model = fitted(settings, generation={"max_new_tokens": ROOM, **drawing}, batch_tokens=10**6)
    behind = texts(model, rows)
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    assert texts(model, rows) == behind
    assert len(set(behind)) > 1


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the prompts of each part are read."""
    real, seen = inference.begin, []

    def begin(*given: Any, **named: Any) -> Any:
        way = real(*given, **named)
        seen.append(type(way).__name__)
        return way

    monkeypatch.setattr(inference, "begin", begin)
    return seen


RAGGED = ["a", "bb " * 9, "c" * 70, "dd", "e e e", "f" * 33, "gg " * 21, "h", "ii" * 8, "j" * 17, "k" * 16]
OF_ALL_KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a task": ({"template": TASK + "{text}"}, ["PackedPrompts"]),
    "nothing shared": ({"template": "{text} is a"}, ["PackedPrompts"]),
    "LoRA": ({"adapter": {"r": 4}}, ["PackedPrompts"]),
    "DoRA": ({"adapter": {"r": 4, "use_dora": True}}, ["PackedPrompts"]),
    "prefix tuning": ({"adapter": "prefix_tuning"}, ["NoneType"]),
    "INT8": ({"quantization": {"bits": 8}, "adapter": {"r": 4}}, ["PackedPrompts"]),
    "penalties": ({"generation": {"max_new_tokens": ROOM, "repetition_penalty": 1.5}}, ["PackedPrompts"]),
    "short answers": ({"generation": {"max_new_tokens": 1}}, ["PackedPrompts"]),
    "long answers": ({"generation": {"max_new_tokens": 40, "min_new_tokens": 40}}, ["PackedPrompts"]),
    "beams": ({"generation": {"max_new_tokens": 4, "num_beams": 2}}, []),
}


@pytest.mark.parametrize("kind", OF_ALL_KINDS)
def test_answers_are_the_same_in_every_way_of_reading_and_at_every_budget(kind, ways, settings, monkeypatch):
    rows = pd.DataFrame({"text": RAGGED, "label": "thing"})
    changed, expected = OF_ALL_KINDS[kind]
    model = fitted({**settings, "dtype": "float32" if kind == "INT8" else "float64"}, **changed)
    found = texts(model, rows)
    assert ways == expected
    assert len(set(found)) > 1
    assert texts(model.set_params(batch_tokens=150), rows) == found
    monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    assert texts(model, rows) == found
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    assert texts(model, rows) == found
    assert texts(model.set_params(batch_tokens="auto"), rows) == found


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"num_key_value_heads": 1}, "PackedPrompts"),
    "qwen2": ({}, "PackedPrompts"),
    "qwen3": ({"head_dim": 16}, "PackedPrompts"),
    "qwen2_moe": ({"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS}, "PackedPrompts"),
    "mistral": ({"sliding_window": 4096}, "PackedPrompts"),
    "gpt2": ({}, "PackedPrompts"),
    "phi3": ({"pad_token_id": 0}, "PackedPrompts"),
    "olmo2": ({}, "PackedPrompts"),
    "gemma2": ({"head_dim": 8}, "PaddedPrompts"),  # whose scores are capped
    "deepseek_v3": (
        {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, **EXPERTS, **LATENT},
        "PaddedPrompts",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds_answer_the_same(kind, ways, tiny, settings, tmp_path, monkeypatch):
    changed, expected = KINDS[kind]
    folder = make_other(tmp_path / kind, tiny, kind, **changed)
    dtype = "float32" if kind in ("gemma2", "qwen2_moe") else "float64"  # which they have no masks or products for
    model, rows = fitted({**settings, "base_model": folder, "dtype": dtype}), pd.DataFrame({"text": RAGGED})
    with warnings.catch_warnings():
        warnings.simplefilter("error", PackingWarning)
        found = texts(model, rows)
    assert ways == [expected]
    assert len(set(found)) > 1
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    assert texts(model, rows) == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_of_few_bits_are_read_packed_too(dtype, ways, settings, monkeypatch):
    model, rows = fitted({**settings, "dtype": dtype}), pd.DataFrame({"text": RAGGED})
    with warnings.catch_warnings():
        warnings.simplefilter("error", PackingWarning)
        found = texts(model, rows)
    assert ways == ["PackedPrompts"]
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    firsts = [(one[:1], other[:1]) for one, other in zip(found, texts(model, rows), strict=True)]
    assert sum(one == other for one, other in firsts) >= 9  # of 11: what is rounded otherwise may be said otherwise


def test_layers_that_attend_to_what_others_keep_keep_nothing(ways, tiny, settings, tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "vocab_size_per_layer_input": 261}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8}
    folder = make_other(tmp_path / "gemma4", tiny, "gemma4_text", global_head_dim=8, **sizes, **kinds)
    kept, real = [], packed_prompts.PackedPrompts.make_cache
    monkeypatch.setattr(
        packed_prompts.PackedPrompts,
        "make_cache",
        lambda *given, **named: kept.append(real(*given, **named)) or kept[-1],
    )
    model, rows = fitted({**settings, "base_model": folder}), pd.DataFrame({"text": RAGGED})
    found = texts(model, rows)
    assert ways == ["PackedPrompts"]
    each = [isinstance(layer, packed_prompts.SideBySide) for layer in kept[-1].layers]
    assert each[:2] == [True, True]
    assert not any(each[2:])  # none at all by older versions of transformers
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    assert texts(model, rows) == found


@pytest.mark.parametrize(("kind", "changed"), [("gpt2", {}), ("llama", {"num_key_value_heads": 1})])
def test_what_is_kept_of_a_packed_row_is_no_part_of_something_larger(kind, changed, tiny, tmp_path):
    """As of one projection of queries, keys and values, or of all rows of a pass, which would stay in memory."""
    model, kept = plain_model(make_other(tmp_path / kind, tiny, kind, **changed)), KeptBeginning()
    with torch.no_grad(), packed(model):
        _, _, layout = read_rows(model, [(5, 6, 7), (5, 8)], pad_id=0, device=CPU, shared=1, kept=kept)
    for each in (*layout.read.values(), *kept.values()):
        assert [x.untyped_storage().nbytes() for x in each] == [x.numel() * 4 for x in each]


def test_a_model_that_goes_on_otherwise_is_padded_with_a_warning(settings, tiny, tmp_path, monkeypatch):
    expected, real = texts(fitted(settings), rows_of(5)), attention.by_row
    monkeypatch.setattr(attention, "by_row", lambda *given: real(*given).flip(0))
    model = fitted({**settings, "base_model": shutil.copytree(tiny, tmp_path / "not_met_before")})
    with pytest.warns(PackingWarning) as warned:
        found = texts(model, rows_of(5))
    assert [str(one.message) for one in warned] == [
        "This model cannot answer packed prompts a token at a time (its answers differ): they are padded, which takes "
        "longer."
    ]
    assert found == expected


@pytest.mark.parametrize("fails", ["in the first pass", "behind a beginning that is read"])
def test_memory_that_runs_out_while_prompts_are_read_leaves_no_half_of_them(fails, settings, monkeypatch):
    """What was read before is kept, and what was half read is read again."""
    long = fails != "in the first pass"
    rows, model = rows_of(9), fitted(settings, template=TASK * (3 if long else 1) + "{text}", max_length=None)
    expected, real, passes, failed = texts(model, rows), attention._by_layout, [], []
    watching = model._fitted_base().model.register_forward_pre_hook(
        lambda _, __, given: passes.append([given["input_ids"].numel(), 0]), with_kwargs=True
    )

    def once(*given: Any) -> torch.Tensor:
        passes[-1][1] += 1
        if not failed and len(passes) == 1 + long and passes[-1][1] == 2:  # in the second layer
            failed.append(True)
            raise torch.OutOfMemoryError("oom")
        return real(*given)

    monkeypatch.setattr(attention, "_by_layout", once)
    try:
        with pytest.warns(MemoryWarning, match="Memory ran out"):
            assert texts(model, rows) == expected
    finally:
        watching.remove()
    assert failed
    assert sum(tokens > len(TASK) for tokens, _ in passes) == (1 if long else 2)


def test_the_words_weights_are_not_copied_for_each_row(settings):
    """As torch does where what they are multiplied with is cut out of longer rows."""
    model = fitted(settings)
    words, seen = model._fitted_base().model.get_output_embeddings(), []
    watching = words.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    try:
        texts(model, rows_of(8))
    finally:
        watching.remove()
    assert len(seen) > 1
    assert all(seen)
