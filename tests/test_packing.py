"""Rows packed behind what they all begin with: the same losses, gradients and answers as padded ones."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional
from torch_side import CPU, classifier, furthest, make_other, plain_model, token_losses, weights
from transformers import PreTrainedModel

import llmfit
from llmfit import inference, scoring, selfcheck, training
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.exceptions import PackingWarning
from llmfit.forward import begin, checking, collate, completion_logits, generation, packable, same_words, words
from llmfit.objectives import supervised
from llmfit.packing import Tree, attention, common_prefix, lay_out, packed

TASK = "Tell fruit from vehicles, however odd the text may be that somebody wrote about them. " * 3
ADAPTERS: dict[str, Any] = {
    "lora": {"type": "lora", "r": 4},
    "dora": {"type": "dora", "r": 4},
    "adalora": {"type": "adalora", "init_r": 4, "target_r": 2},
    "ia3": "ia3",
    "adaption_prompt": "adaption_prompt",
    "full": "full",
}


@pytest.fixture
def ragged(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose lengths are far apart."""
    return frame.assign(
        text=[text * times for text, times in zip(frame["text"], (1, 9, 2, 1, 4, 30, 1, 2), strict=True)]
    )


def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (scoring, training):
        for name in ("packable", "packable_answers"):
            monkeypatch.setattr(room, name, lambda *_, **__: None)


def packs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Look at what is said of the rows of each fit and prediction, so that padded ones are not compared with padded."""
    said: list[Any] = []
    for room in (scoring, training):
        for name in ("packable", "packable_answers"):
            real = getattr(room, name)

            def spy(model: Any, rows: Any, real: Any = real, **named: Any) -> Any:
                shared = real(model, rows, **named)
                said.extend([shared] * bool(rows))
                return shared

            monkeypatch.setattr(room, name, spy)
    return said


def assert_packed(said: list[Any], at_least: int = len(TASK)) -> None:
    assert said
    assert all(isinstance(shared, int) and shared >= at_least for shared in said)


def with_task(settings: dict[str, Any], **changed: Any) -> llmfit.LLMClassifier:
    """An estimator whose prompts have 250 tokens in common."""
    own = {"template": {"task": TASK, "template": "{task}\n{text} is a"}, "epochs": 2, "batch_size": 4, **changed}
    return llmfit.LLMClassifier(**{**settings, "target": "label", **own})


@pytest.fixture(params=["in groups", "in a table"])
def attending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend as on a CPU, or as on a GPU."""
    if request.param == "in a table":
        monkeypatch.setattr(attention, "_fits_a_table", lambda *_: True)


@pytest.mark.usefixtures("attending")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("batch_tokens", [400, "auto"])
def test_a_fit_is_that_of_padded_rows(adapter, batch_tokens, settings, ragged, monkeypatch):
    own = {"adapter": adapter, "batch_tokens": batch_tokens, "learning_rate": 1e-3, "dtype": "float64"}
    said = packs(monkeypatch)
    one = with_task(settings, **own).fit(ragged, eval_set=ragged)
    found = one.predict_log_proba(ragged)
    assert_packed(said)
    padded(monkeypatch)
    other = with_task(settings, **own).fit(ragged, eval_set=ragged)
    for column in ("loss", "grad_norm", "validation_loss"):
        np.testing.assert_allclose(one.history_[column], other.history_[column], rtol=1e-5)
    assert furthest(one, other) < 1e-5
    np.testing.assert_allclose(found, other.predict_log_proba(ragged), atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_checkpointing": True},
        {"class_weight": "balanced"},
        {"quantization": 4},
        {"max_length": 340, "truncation": "prompt"},
    ],
    ids=["checkpointing", "weights", "4 bits", "truncation"],
)
@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")
def test_whatever_else_is_set(changed, settings, ragged, monkeypatch):
    said = packs(monkeypatch)
    one = with_task(settings, **changed).fit(ragged)
    assert_packed(said)
    padded(monkeypatch)
    other = with_task(settings, **changed).fit(ragged)
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(one.history_[column], other.history_[column], rtol=1e-3)


def test_several_targets_share_their_beginning_too(settings, ragged, monkeypatch):
    rows = ragged.assign(size=["small", "big"] * 4)
    own = {**settings, "target": ["label", "size"], "loss_weights": {"label": 2.0}, "dtype": "float64"}
    said = packs(monkeypatch)
    one = llmfit.LLMEstimator(**own).fit(rows)
    found = one.predict_proba(rows)
    assert_packed(said, at_least=10)
    padded(monkeypatch)
    other = llmfit.LLMEstimator(**own).fit(rows)
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=1e-5)
    for name, own_proba in other.predict_proba(rows).items():
        np.testing.assert_allclose(found[name], own_proba, atol=1e-5)


@pytest.mark.usefixtures("attending")
@pytest.mark.parametrize("adapter", ["lora", None])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("batch_tokens", [500, "auto"])
def test_heads_read_packed_rows(adapter, pooling, batch_tokens, settings, ragged, monkeypatch):
    head = {"type": "linear", "pooling": pooling}
    own = {"adapter": adapter, "head": head, "dtype": "float64", "batch_tokens": batch_tokens, "learning_rate": 1e-3}
    said = packs(monkeypatch)
    one = with_task(settings, **own).fit(ragged)
    found = one.predict_log_proba(ragged)
    if adapter is None:  # a head on vectors is trained without the model, which makes them in packed rows
        said = [shared for shared in said if shared is not None]
    assert_packed(said)
    padded(monkeypatch)
    llmfit.clear_cache()
    other = with_task(settings, **own).fit(ragged)
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=1e-5)
    np.testing.assert_allclose(found, other.predict_log_proba(ragged), atol=1e-5)


@pytest.mark.parametrize(
    "drawing", [{}, {"repetition_penalty": 1.3}, {"num_beams": 2}, {"do_sample": True}], ids=lambda given: str(given)
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.filterwarnings("ignore:.*without an end")
def test_answers_generated_behind_a_beginning_are_those_behind_whole_prompts(
    drawing, packs, kind, tiny, tmp_path, settings, ragged, monkeypatch
):
    folder = tiny if kind == "llama" else make_other(tmp_path / kind, tiny, kind, n_positions=2048)
    own = {"base_model": folder, "target": "label", "batch_tokens": 1500, "dtype": "float64"}
    own |= {"generation": {"max_new_tokens": 6, **drawing}, "template": {"task": TASK, "template": "{task} {text}"}}
    model = llmfit.LLMGenerator(**{**settings, **own}).fit(ragged)
    if not packs:
        monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    if "do_sample" in drawing:  # what is drawn depends on which rows are together
        monkeypatch.setattr(inference, "length_batches", lambda rows, *_, **__: iter([list(range(len(rows)))]))
    real, begun = inference.begin, []
    monkeypatch.setattr(inference, "begin", lambda *given, **named: begun.append(real(*given, **named)) or begun[-1])
    found = model.predict(ragged)
    assert [len(each.ids) >= len(TASK) for each in begun] == [True] * ("num_beams" not in drawing)
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    pd.testing.assert_series_equal(found, model.predict(ragged))
    assert found.nunique() > 1


def test_a_beginning_is_read_once_for_all_that_is_generated(settings, frame, monkeypatch):
    seen: list[tuple[int, ...]] = []
    own = {"template": {"task": TASK, "template": "{task}\n{text}"}, "generation": {"max_new_tokens": 1}}
    model = llmfit.LLMGenerator(**{**settings, "target": "label", **own, "batch_tokens": 40}).fit(frame)
    with pytest.warns(UserWarning, match="without an end"):
        model.predict(frame)
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (seen.append(tuple(ids.shape)), forward(self, ids))[1]
    )
    with pytest.warns(UserWarning, match="without an end"):
        model.predict(frame)
    assert len(seen) > 3
    assert sum(width >= len(TASK) for _, width in seen) == 1


def test_what_is_shared_goes_through_the_network_once(settings, ragged, monkeypatch):
    seen: list[int] = []
    with_task(settings).fit(ragged)  # how the model reads packed rows is seen once
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (seen.append(ids.numel()), forward(self, ids))[1]
    )
    clf = with_task(settings, epochs=1).fit(ragged)
    tokens = clf.history_["tokens"].sum()
    shared = 8 * len(TASK)  # a byte-level tokenizer
    assert len(seen) == 2
    assert sum(seen) < tokens - shared + 2 * (len(TASK) + 16)
    seen.clear()
    clf.set_params(batch_tokens=200).predict(ragged)
    assert len(seen) > 2
    assert [count > len(TASK) for count in seen] == [True] + [False] * (len(seen) - 1)  # later ones find its keys


def test_a_perplexity_reads_what_is_shared_once(settings, frame, monkeypatch):
    seen: list[int] = []
    own = {**settings, "target": "label", "template": {"task": TASK, "template": "{task}\n{text} is a"}}
    own |= {"dtype": "float64", "generation": {"max_new_tokens": 1}}
    model = llmfit.LLMGenerator(**own).fit(frame)
    with pytest.warns(UserWarning, match="without an end"):
        expected = model.evaluate(frame)["perplexity"]
    padded(monkeypatch)
    with pytest.warns(UserWarning, match="without an end"):
        assert model.evaluate(frame)["perplexity"] == pytest.approx(expected, rel=1e-9)
    monkeypatch.undo()
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (seen.append(ids.numel()), forward(self, ids))[1]
    )
    model.set_params(batch_tokens=40)
    with pytest.warns(UserWarning, match="without an end"):
        answers = model.evaluate(frame)
    assert answers["perplexity"] == pytest.approx(expected, rel=1e-9)
    assert sum(count > len(TASK) for count in seen) == 2  # the first of the answers is one
    assert len(seen) > 6


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_head_that_reads_otherwise_behind_what_is_kept_is_padded(pooling, settings, ragged, monkeypatch):
    """The first pass has the beginning in it and is right; what it leaves for the next ones is not."""
    llmfit.clear_cache()
    own = {"adapter": None, "head": {"type": "linear", "pooling": pooling}, "dtype": "float64", "batch_tokens": 400}
    real = attention._shared

    def odd(module: Any, layout: Any, *given: Any) -> Any:
        found = real(module, layout, *given)
        return found if found is None or layout.inline else (found[0], found[1] * 3)

    with monkeypatch.context() as changed:
        changed.setattr(attention, "_shared", odd)
        with pytest.warns(PackingWarning, match="its answers differ"):
            found = with_task(settings, **own).fit(ragged).predict_log_proba(ragged)
    llmfit.clear_cache()
    other = with_task(settings, **own).fit(ragged).predict_log_proba(ragged)
    np.testing.assert_allclose(found, other, atol=1e-6)


@pytest.mark.usefixtures("attending")
@pytest.mark.parametrize("shared", [0, 1, 20, 600])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "olmo2", "granite", "cohere", "phi", "mistral"])
def test_gradients_of_every_family_are_those_of_padded_rows(kind, shared, tiny, tmp_path):
    folder = tiny if kind == "llama" else make_other(tmp_path / kind, tiny, kind, max_position_embeddings=2048)
    model = plain_model(folder, attn_implementation="eager").double().train().requires_grad_(True)
    rng = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(5, 260, count).tolist())

    before = ids(shared)
    rows = [Encoded(before + ids(n), ids(k)) for n, k in [(5, 3), (30, 1), (1, 2), (17, 4), (80, 9), (700, 3)]]
    losses, gradients = [], []
    for way in (None, common_prefix([row.prompt for row in rows])):
        model.zero_grad()
        with packed(model) if way is not None else torch.enable_grad():
            loss = supervised(model, collate(rows, 0, CPU, shared=way))
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "falcon", "mamba", "gptj"])
@pytest.mark.filterwarnings("ignore::llmfit.exceptions.PackingWarning")
def test_other_families_are_padded(kind, tiny, tmp_path, settings, frame):
    changed = {"state_size": 4} if kind == "mamba" else {"rotary_dim": 4} if kind == "gptj" else {}
    folder = make_other(tmp_path / kind, tiny, kind, **changed)
    rows = [Encoded((1, *range(5, 5 + n)), (7, 8)) for n in (3, 9, 20)]
    assert packable(plain_model(folder), rows, pad_id=0, device=CPU) is None
    assert len(classifier(settings, adapter="full", base_model=folder).fit(frame).predict(frame)) == len(frame)


def test_a_window_of_less_than_a_row_is_padded(tiny, tmp_path):
    model = plain_model(make_other(tmp_path / "mistral", tiny, "mistral", sliding_window=30))
    rows = [Encoded((1, 5, 6)), Encoded((1, 7, 8, 9))]
    assert packable(model, rows, pad_id=0, device=CPU) == 1
    assert packable(model, [*rows, Encoded((1, *range(5, 45)))], pad_id=0, device=CPU) is None


def test_a_model_that_counts_the_tokens_of_a_pass_is_padded(tiny, tmp_path, settings, frame):
    """Its queries are scaled by their place in the sequence, from far on: rows beside a row would change its answer."""
    own = {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8, "floor_scale": 256}
    folder = make_other(tmp_path / "llama4", tiny, "llama4_text", no_rope_layers=[0, 0], **own)
    rows = frame.assign(text=[text * 12 for text in frame["text"]])
    clf = classifier({**settings, "max_length": None}, adapter=None, base_model=folder).fit(rows)
    together, apart = (clf.set_params(batch_tokens=budget).predict_proba(rows) for budget in (4096, 8))
    np.testing.assert_allclose(together, apart, atol=1e-5)
    some = [Encoded((1, 5, 6)), Encoded((1, 7, 8, 9))]
    assert packable(plain_model(folder), some, pad_id=0, device=CPU) is None
    without = plain_model(folder, attn_temperature_tuning=False)
    assert packable(without, some, pad_id=0, device=CPU) == 1


def test_a_model_that_reads_packed_rows_otherwise_is_padded_with_a_warning(tiny, monkeypatch):
    model, rows = plain_model(tiny), [Encoded((1, 5, 6, 7)), Encoded((1, 7, 8, 9, 10))]
    real = checking.completion_logits

    def odd(model: Any, batch: Any) -> Any:
        return real(model, batch) + (batch.layout is not None)

    monkeypatch.setattr(checking, "completion_logits", odd)
    with pytest.warns(PackingWarning) as warned:
        assert packable(model, rows, pad_id=0, device=CPU) is None
    assert str(warned[0].message) == (
        "This model cannot read packed rows (its answers differ): they are padded, which takes longer."
    )
    assert packable(model, rows, pad_id=0, device=CPU) is None  # said once
    assert not model.training


def test_a_window_counts_what_is_generated(tiny, tmp_path, monkeypatch):
    model = plain_model(make_other(tmp_path / "mistral", tiny, "mistral", sliding_window=64))
    prompts = [(*range(5, 25), 30 + i) for i in range(3)]
    packed = [begin(model, prompts, pad_id=0, device=CPU, room=room, budget=4096) for room in (10, 42, 43)]
    assert [type(way).__name__ for way in packed] == ["PackedPrompts", "PackedPrompts", "NoneType"]
    monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)  # padding counts as well
    padded = [begin(model, prompts, pad_id=0, device=CPU, room=room, budget=4096) for room in (10, 40)]
    assert [type(way).__name__ for way in padded] == ["PaddedPrompts", "NoneType"]


def test_a_window_counts_the_labels(tiny, tmp_path, settings, frame):
    folder = make_other(tmp_path / "mistral", tiny, "mistral", sliding_window=30)
    rows = frame.assign(label=["quite a long name of a class", "another name of a class"] * 4)
    clf = classifier(settings, adapter=None, base_model=folder).fit(rows)
    assert len(clf.predict(rows)) == len(rows)


def test_a_cap_on_logits_is_left_to_the_model(tiny):
    model = plain_model(tiny)
    with words.without_words(model) as plain:
        assert plain.layer is not None
    model.config.final_logit_softcapping = 30.0
    with words.without_words(model) as capped:
        assert capped.layer is None


def test_memory_that_runs_out_in_the_comparison_is_remembered_by_nobody(tiny, monkeypatch):
    model, rows = plain_model(tiny), [Encoded((1, 5, 6, 7)), Encoded((1, 7, 8, 9, 10))]

    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("oom")

    with monkeypatch.context() as full:
        full.setattr(checking, "completion_logits", never)
        assert packable(model, rows, pad_id=0, device=CPU) is None
    assert packable(model, rows, pad_id=0, device=CPU) == 1


def test_one_row_alone_decides_nothing(tiny, monkeypatch):
    met: list[int] = []
    real = checking.collate
    monkeypatch.setattr(
        checking, "collate", lambda rows, *rest, **how: (met.append(len(rows)), real(rows, *rest, **how))[1]
    )
    assert packable(plain_model(tiny), [Encoded((1, 5))], pad_id=0, device=CPU) == 1
    assert max(met) == 3


def test_the_attention_is_as_it_was_afterwards(tiny):
    model = plain_model(tiny)
    before = model.config._attn_implementation
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert model.config._attn_implementation == before


@pytest.mark.usefixtures("attending")
def test_a_tree_is_every_answer_for_itself(tiny):
    """Tokens (40 50, 40 60 70, 41) as a tree behind a row: each sees the row, and what it goes on from."""
    model = plain_model(tiny)
    layout = lay_out([3], 2, CPU, tree=Tree((0, 1, 1, 2, 0), (4, 2, 4, 4, 5)))
    ids = torch.zeros(1, layout.length, dtype=torch.long)
    ids[0, :10] = torch.tensor([1, 9, 20, 21, 22, 40, 50, 60, 70, 41])
    with torch.no_grad(), packed(model):
        found = model(input_ids=ids, position_ids=layout.positions, layout=layout, use_cache=False).logits[0]
        model.config._attn_implementation = "eager"
        row = [1, 9, 20, 21, 22]
        for place, answer in ((6, [40, 50]), (8, [40, 60, 70]), (9, [41])):
            alone = model(input_ids=torch.tensor([[*row, *answer]])).logits[0, -1]
            torch.testing.assert_close(found[place], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("attending")
@pytest.mark.parametrize("most", [1, 2, 5, 512])
def test_tries_of_any_size_score_alike(most, tiny, monkeypatch):
    model, seen = plain_model(tiny), []
    labels = [(40, 50), (40, 60, 70), (41,), (42, 43, 44, 45), (42, 43, 46), (47,)]
    prompts = [(1, *range(70, 110), 80), (1, *range(70, 110), 81, 82), (1, *range(70, 110), 9)]
    expected = scoring.score_labels(model, prompts, labels, device=CPU, pad_id=0)
    tries = scoring.tries
    monkeypatch.setattr(scoring, "tries", lambda some: tries(some, most))
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    found = scoring.score_labels(model, prompts, labels, device=CPU, pad_id=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(seen) == len(list(tries(labels, most)))
    assert [count > 41 for count in seen] == [True] + [False] * (len(seen) - 1)  # what they share is read once


def test_words_are_made_a_piece_at_a_time(tiny, monkeypatch):
    model = plain_model(tiny).double().requires_grad_(True)
    rows = [Encoded((1, *range(5, 40)), tuple(range(50, 90)))]
    found = []
    for most in (2**24, 261 * 7):
        monkeypatch.setattr(words, "MOST_LOGITS", most)
        model.zero_grad()
        with packed(model):
            loss = supervised(model, collate(rows, 0, CPU, shared=0))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_what_meets_the_vocabulary_at_once_is_bounded(tiny, monkeypatch):
    """However long the answers, and however many labels there are."""
    model, met = plain_model(tiny).requires_grad_(True), []
    real = words.Words.__call__
    monkeypatch.setattr(words.Words, "__call__", lambda self, hidden: (met.append(len(hidden)), real(self, hidden))[1])
    monkeypatch.setattr(words, "MOST_LOGITS", 261 * 10)
    with packed(model):
        supervised(model, collate([Encoded((1, 5), tuple(range(10, 250)))] * 3, 0, CPU, shared=1)).backward()
    assert max(met) == 10
    assert sum(met) == 2 * 3 * 240  # once on the way forth, once on the way back
    met.clear()
    labels = [(40, 50 + i, 60 + j) for i in range(9) for j in range(9)]
    scoring.score_labels(model, [(1, 70 + i) for i in range(5)], labels, device=CPU, pad_id=0)
    assert max(met) <= 30  # the model is looked at once, with three rows


def test_logits_of_a_packed_batch_are_those_of_its_loss_tokens(tiny):
    model = plain_model(tiny)
    rows = [Encoded((1, 5, 6), (7, 8)), Encoded((1, 5, 9, 9), (10,))]
    with torch.no_grad(), packed(model):
        batch = collate(rows, 0, CPU, shared=2)
        logits = completion_logits(model, batch)
    with torch.no_grad():
        plain = completion_logits(model, collate(rows, 0, CPU))
    assert batch.targets.tolist() == [7, 8, 10]
    torch.testing.assert_close(
        functional.log_softmax(logits, -1), functional.log_softmax(plain, -1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_rows_beside_virtual_tokens_are_padded(adapter, settings, ragged, monkeypatch):
    said = packs(monkeypatch)
    with_task(settings, adapter=adapter, epochs=1).fit(ragged, eval_set=ragged).predict(ragged)
    assert len(said) == 3
    assert set(said) == {None}


STEP = {"optimizer": {"type": "sgd"}, "max_grad_norm": None, "learning_rate": 1.0, "warmup": 0, "schedule": "constant"}
ALIVE: dict[str, Any] = {
    "lora": {"type": "lora", "r": 4, "init_lora_weights": "orthogonal"},
    "dora": {"type": "dora", "r": 4, "init_lora_weights": "gaussian"},
    "full": "full",
}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("adapter", ALIVE.values(), ids=ALIVE)
def test_a_step_in_single_precision_is_that_of_padded_rows(adapter, recomputed, settings, ragged, monkeypatch):
    """One step of plain SGD at rate one: the difference of the weights is that of the gradients."""
    own = {**STEP, "adapter": adapter, "gradient_checkpointing": recomputed, "epochs": 1, "batch_size": 8}
    said = packs(monkeypatch)
    one = with_task(settings, **own).fit(ragged)
    assert_packed(said)
    padded(monkeypatch)
    other = with_task(settings, **own).fit(ragged)
    apart = sum(float((tensor - weights(other)[name]).square().sum()) for name, tensor in weights(one).items()) ** 0.5
    assert apart <= 1e-5 * other.history_["grad_norm"][0]
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=1e-6)


def test_a_row_that_overflows_spoils_no_other(tiny, monkeypatch):
    """Inside the attention short rows are padded with a place aside, which the next layer reads as well."""
    model = plain_model(tiny)
    rows = [Encoded((1, 5, 6), (7, 8)), Encoded((1, 5, 9, 9, 9), (10,)), Encoded((1, *range(5, 50)), (11,))]
    real, found = attention.by_scores, []

    def overflowing(*given: Any) -> torch.Tensor:
        out = real(*given)
        return out if given[4].shape[-1] < 32 else torch.full_like(out, torch.inf)

    with torch.no_grad(), packed(model):
        for work in (real, overflowing):
            monkeypatch.setattr(attention, "by_scores", work)
            found.append(completion_logits(model, collate(rows, 0, CPU, shared=0)))
    assert not found[1][3].isfinite().all()
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=0, atol=0)


def test_a_tree_behind_a_long_row_is_every_answer_for_itself(tiny, monkeypatch):
    """Rows that a kernel without scores reads, with labels behind them, some beginning alike."""
    model, seen = plain_model(tiny), []
    real = attention.by_kernel
    monkeypatch.setattr(attention, "by_kernel", lambda *given: (seen.append(given[4].dim()), real(*given))[1])
    rng = np.random.default_rng(0)
    before = tuple(rng.integers(5, 260, 30).tolist())
    prompts = [before + tuple(rng.integers(5, 260, n).tolist()) for n in (620, 700, 8)]
    labels = [(40, 50), (40, 60, 70), (41,), (40, 60, 71)]
    found = scoring.score_labels(model, prompts, labels, device=CPU, pad_id=0)
    assert 3 in seen
    expected = [[-token_losses(model, list(p), list(label)).sum() for label in labels] for p in prompts]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_long_rows_are_looked_at_before_they_are_trusted(tiny, monkeypatch):
    model = plain_model(tiny)
    rows = [Encoded((1, 5, 6, 7)), Encoded((1, *range(5, 250), *range(5, 250), *range(5, 250)))]
    real = attention.by_kernel
    monkeypatch.setattr(attention, "by_kernel", lambda *given: real(*given).flip(0))
    assert packable(model, rows[:1] * 2, pad_id=0, device=CPU) == 3
    with pytest.warns(PackingWarning, match="cannot read packed rows"):
        assert packable(model, rows, pad_id=0, device=CPU) is None
    assert packable(model, rows[:1] * 2, pad_id=0, device=CPU) == 3
    assert packable(model, rows, pad_id=0, device=CPU) is None  # said once


def test_a_tree_that_makes_rows_long_is_looked_at_too(tiny, monkeypatch):
    """Neither a prompt nor a label is as long as the kernel without scores is for, but all labels behind one are."""
    model, looked_at = plain_model(tiny), []
    real = checking.same_words
    monkeypatch.setattr(checking, "same_words", lambda *given: (looked_at.append(given[3]), real(*given))[1])
    prompts = [(1, *range(5, 205)), (1, *range(6, 230))]
    many = [(40 + i, *range(5 + i, 12 + i)) for i in range(50)]
    scoring.score_labels(model, prompts, many[:2], device=CPU, pad_id=0)
    assert looked_at == ["words"]
    scoring.score_labels(model, prompts, many, device=CPU, pad_id=0)
    assert looked_at == ["words", "words", "words, long"]


def test_a_beginning_is_looked_at_with_prompts_that_no_data_chooses(tiny, monkeypatch):
    monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    looked_at: list[Any] = []
    real = generation._next_words
    monkeypatch.setattr(
        generation, "_next_words", lambda model, some, *rest: (looked_at.append(some), real(model, some, *rest))[1]
    )
    for first in (70, 90):
        prompts = [(1, *range(first, first + 30), last) for last in (5, 6)]
        assert begin(plain_model(tiny), prompts, pad_id=0, device=CPU, room=4, budget=4096) is not None
    assert looked_at[:2] == looked_at[2:]
    assert len(set(map(len, looked_at[0]))) == 2  # one of them has padding behind the beginning


def test_a_model_that_begins_otherwise_reads_whole_prompts_with_a_warning(tiny, monkeypatch):
    monkeypatch.setattr(generation, "_begin_packed", lambda *_, **__: None)
    model, real = plain_model(tiny), generation._next_words
    monkeypatch.setattr(generation, "_next_words", lambda *given: real(*given).roll(int(given[4] is not None), dims=-1))
    prompts = [(1, *range(70, 100), last) for last in (5, 6)]
    with pytest.warns(PackingWarning) as warned:
        assert begin(model, prompts, pad_id=0, device=CPU, room=4, budget=4096) is None
    assert str(warned[0].message) == (
        "This model cannot read prompts whose beginning is known (its answers differ): they are read whole, which "
        "takes longer."
    )


LONG_ROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("positions", "rope"),
    [(64, {"rope_type": "dynamic", "factor": 2.0}), (256, {"rope_type": "longrope", "factor": 4.0, **LONG_ROPE})],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
)
def test_angles_that_depend_on_the_longest_row_are_not_shared(positions, rope, tiny, tmp_path):
    rope = {"rope_theta": 10000.0, **rope}
    folder = make_other(tmp_path / "other", tiny, "llama", max_position_embeddings=positions, rope_parameters=rope)
    model = plain_model(folder)
    rows = [Encoded((1, 5, 6)), Encoded((1, *range(7, 67)), (7, 8))]
    assert packable(model, rows, pad_id=0, device=CPU) == 1
    assert packable(model, [*rows, Encoded((1, *range(7, 71)), (7, 8))], pad_id=0, device=CPU) is None
    prompts = [(1, *range(70, 100), last) for last in (5, 6)]
    assert begin(model, prompts, pad_id=0, device=CPU, room=4, budget=4096) is not None
    assert begin(model, prompts, pad_id=0, device=CPU, room=40, budget=4096) is None


def test_full_fine_tuning_in_few_bytes_makes_words_in_them(settings, frame, monkeypatch):
    made: list[torch.dtype] = []
    real = words.Words.__call__
    monkeypatch.setattr(words.Words, "__call__", lambda *given: (made.append((out := real(*given)).dtype), out)[1])
    model = classifier({**settings, "dtype": "bfloat16"}, adapter="full").fit(frame)
    assert {*made} == {torch.bfloat16}
    assert np.isfinite(model.predict_proba(frame)).all()


def test_full_fine_tuning_in_few_bytes_is_packed_too(settings, frame):
    """Its weights are float32, and its products are not: ways of reading differ by the rounding of these."""
    llmfit.clear_cache()
    model = classifier({**settings, "dtype": "bfloat16"}, adapter="full", head="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(frame)
    assert any(answer for known in selfcheck._known.values() for answer in known.values())


def test_what_is_not_finite_says_nothing_of_a_model(settings, frame):
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    with base.attach(None, training=False) as model:
        gone = torch.full((2, 2), float("nan"))
        assert not same_words(model, "packed", lambda: [gone, gone], "gone")
        own = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        assert not any("gone" in key for key in selfcheck._known.get(own, {}))
