"""Encoder-decoder models, T5 of both forms and BART, against what transformers alone computes on single rows."""

from __future__ import annotations

import json
import shutil
import string
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import save_file
from seq2seq_side import KINDS, make_pair, pair_losses, pair_rows, plain_pair
from sklearn.model_selection import GridSearchCV
from test_checkpoints import assert_same_fit, killed, uninterrupted
from torch_side import CPU, classifier, furthest, generator, plain_tokenizer, same

import llmfit
from llmfit import LLMEstimator, LoRA, checkpoints, inference, scoring
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded, Encoder
from llmfit.exceptions import ModelLoadError, ParameterError, TemplateError, TruncationWarning
from llmfit.forward import collate, reading
from llmfit.objectives import OBJECTIVES, completion_losses
from llmfit.scoring import score_labels
from llmfit.templates import Segment

RAGGED = ["a", "red apple", "b" * 70, "an old car by the road", "x y", "b" * 70 + "!", "fast", "q" * 30]
LABELS: dict[str, list[str]] = {
    "one token": ["a", "b", "c"],
    "long": ["fruit", "vehicle"],
    "prefixes": ["a", "ab", "abc", "b", "bcd"],
    "hundred": [f"c{i:02d}" for i in range(100)],
}
ADAPTERS: dict[str, Any] = {
    "q and v": {"r": 8, "target_modules": ["q", "v"]},
    "all-linear": {"r": 8, "target_modules": "all-linear"},
    "full": "full",
}
WORDS = pd.DataFrame({"text": ["red", "green", "old", "fast"], "label": ["fruit", "pear tree", "car", "a"]})


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pairs")
    return {kind: make_pair(root / kind.replace(" ", "-"), tiny, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(settings: dict[str, Any], folders: dict[str, str], kind: str) -> dict[str, Any]:
    """Settings of a fit on each of the tiny encoder-decoders."""
    return {**settings, "base_model": folders[kind], "adapter": {"r": 4}}


@pytest.fixture
def t5(settings: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    """Settings of a fit on the first of them, where one says enough."""
    return {**settings, "base_model": folders["t5"], "adapter": {"r": 4, "target_modules": ["q", "v"]}}


def answers(model: Any, rows: pd.DataFrame) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return list(model.predict(rows))


def frame_of(labels: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {i}" for i in range(3 * len(labels))], "label": labels * 3})


# What is read ---------------------------------------------------------------------------------------


def test_the_kind_of_a_model_and_what_its_decoder_begins_from(pair, kind):
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32")
    assert base.kind == "encoder-decoder"
    assert base.start_ids == KINDS[kind][3]
    plain = plain_pair(pair["base_model"])
    tied = [
        model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (base.model, plain)
    ]
    assert tied == [kind != "t5 v1.1"] * 2  # a head of its own stays one


def test_a_prompt_is_a_text_of_its_own_and_an_answer_too(pair, frame, kind):
    seen = generator(pair, template="{text} is a:\n ").preview(frame.iloc[:1])
    assert seen["prompt"].tolist() == ["red apple is a:"]
    assert seen["completion"].tolist() == ["fruit</s>"]  # the white space leads to no answer here
    assert seen["prompt_tokens"].tolist() == [len("red apple is a:") + (2 if kind == "bart" else 1)]


def test_a_tokenizer_of_t5s_kind_writes_white_space_before_a_text_itself():
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in string.ascii_letters + string.punctuation]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters, ("\u2581fruit", -4.0)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=4)
    encoder = Encoder(tokenizer, whole=True)
    assert (encoder.opening, encoder.end_ids) == ((), (1,))
    assert encoder.prompts([[Segment("red is:")]]) == [tuple(tokenizer("red is:")["input_ids"])]
    [ids] = encoder.completions(["fruit"])
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["\u2581fruit"]
    assert encoder.decode((*ids, 1)) == "fruit"
    [spelled] = encoder.prompts([[Segment("red </s>", "text")]])
    assert spelled.count(1) == 1  # the one that closes the prompt


def test_worked_examples_keep_the_white_space_before_their_answers(t5, frame):
    few = classifier(t5, adapter=None, template={"template": "{text} is a: ", "few_shot": 2})
    prompt = few.preview(frame.iloc[:4])["prompt"].iloc[0]
    assert prompt.endswith("red apple is a:")
    assert prompt.count(" is a: ") == 2


def test_a_decoder_start_that_is_not_stated_is_one_sentence(t5, frame, tmp_path):
    folder = Path(shutil.copytree(t5["base_model"], tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("decoder_start_token_id", None)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError) as error:
        classifier(t5, base_model=str(folder)).fit(frame)
    assert str(error.value) == (
        f"The base model {str(folder)!r} states no decoder_start_token_id, so that no answer could begin."
    )


# Losses ---------------------------------------------------------------------------------------------

ROWS = [
    Encoded((70, 80, 2), (90, 100, 2), 0, 1.0),
    Encoded((70, 80, 90, 91, 92, 93, 2), (2,), 1, 0.5),
    Encoded((2,), (60, 61, 62, 63, 64, 2), 2, 3.0),
]


@pytest.mark.parametrize("pad_id", [0, 2, 70])
def test_losses_are_those_by_hand_whatever_stands_beside_a_row(pair, kind, pad_id):
    model, start = plain_pair(pair["base_model"]), KINDS[kind][3]
    expected = [pair_losses(model, list(row.prompt), list(row.completion), start) for row in ROWS]
    found = completion_losses(model, collate(ROWS, pad_id, CPU, start)).detach().numpy()
    np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)
    weighted = sum(row.weight * losses.sum() for row, losses in zip(ROWS, expected, strict=True))
    total = float(OBJECTIVES["supervised"](model, collate(ROWS, pad_id, CPU, start)).detach())
    np.testing.assert_allclose(total, weighted, rtol=1e-6)


@pytest.mark.parametrize("make", [classifier, generator])
def test_the_loss_of_a_step_is_that_of_its_rows_by_hand(make, pair, kind, frame):
    weight = np.linspace(0.2, 3.0, len(frame))
    history = make(pair).fit(frame, sample_weight=weight).history_
    model = plain_pair(pair["base_model"])
    losses = [
        pair_losses(model, *row, KINDS[kind][3]) for row in pair_rows(pair["base_model"], frame["text"], frame["label"])
    ]
    expected = sum(w * row.sum() for w, row in zip(weight, losses, strict=True)) / sum(
        w * len(row) for w, row in zip(weight, losses, strict=True)
    )
    np.testing.assert_allclose(history["loss"].iloc[0], expected, rtol=1e-6)


def test_the_loss_of_a_step_is_that_of_transformers(t5, frame):
    found = generator(t5).fit(frame).history_["loss"].iloc[0]
    tokenizer, model = plain_tokenizer(t5["base_model"]), plain_pair(t5["base_model"])
    given = tokenizer([f"{text} is a" for text in frame["text"]], padding=True, return_tensors="pt")
    labels = tokenizer(list(frame["label"]), padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = -100
    expected = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss
    np.testing.assert_allclose(found, float(expected.detach()), rtol=1e-6)


def test_the_gradient_is_the_same_however_a_step_is_cut(pair, kind):
    model, start = plain_pair(pair["base_model"]).double(), KINDS[kind][3]

    def gradient(parts: list[list[int]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            OBJECTIVES["supervised"](model, collate([ROWS[i] for i in part], 0, CPU, start)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradient([[0, 1, 2]])
    for parts in ([[0], [1], [2]], [[2, 0], [1]]):
        for name, found in gradient(parts).items():
            torch.testing.assert_close(found, whole[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10**6])
def test_the_token_budget_never_matters(batch_tokens, pair, frame):
    fits = [generator(pair, batch_tokens=budget, optimizer="sgd").fit(frame) for budget in (batch_tokens, "auto")]
    assert furthest(*fits) < 1e-6
    assert max(float(tensor.abs().max()) for tensor in fits[0]._tensors.values()) > 1e-3


# Labels ---------------------------------------------------------------------------------------------


def naive(folder: str, kind: str, texts: list[str], labels: list[str]) -> np.ndarray:
    """log P(label | prompt), one forward pass each; a label that begins another is closed by the end token."""
    model, start = plain_pair(folder), KINDS[kind][3]
    scores = np.empty((len(texts), len(labels)))
    for k, label in enumerate(labels):
        begins = any(other != label and other.startswith(label) for other in labels)
        for i, (prompt, ids) in enumerate(pair_rows(folder, texts, [label] * len(texts))):
            scores[i, k] = -pair_losses(model, prompt, ids if begins else ids[:-1], start).sum()
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_scores_are_those_of_a_forward_pass_for_each_label(labels, pair, kind):
    clf = classifier(pair, adapter=None).fit(frame_of(labels))
    texts = RAGGED if len(labels) < 50 else RAGGED[:2]
    expected = naive(pair["base_model"], kind, texts, clf.classes_.tolist())
    found = clf.predict_log_proba(pd.DataFrame({"text": texts}))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected, axis=1).min() > 0.1  # the labels do differ


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 10**6])
def test_scores_are_the_same_at_every_token_budget(batch_tokens, pair):
    rows, labels = pd.DataFrame({"text": RAGGED}), frame_of(LABELS["prefixes"])
    expected = classifier(pair, adapter=None).fit(labels).predict_log_proba(rows)
    found = classifier(pair, adapter=None, batch_tokens=batch_tokens).fit(labels).predict_log_proba(rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_too_long_for_plain_attention_score_the_same(pair, kind):
    if kind == "bart":
        pytest.skip("has 512 positions")
    clf = classifier(pair, adapter=None).fit(frame_of(LABELS["prefixes"]))
    texts = ["long " * 150, "a"]
    found = clf.predict_log_proba(pd.DataFrame({"text": texts}))
    np.testing.assert_allclose(found, naive(pair["base_model"], kind, texts, clf.classes_.tolist()), atol=1e-4)


def test_a_cache_that_cannot_be_shared_gives_the_same_scores(pair, monkeypatch):
    clf, rows = classifier(pair, adapter=None).fit(frame_of(LABELS["prefixes"])), pd.DataFrame({"text": RAGGED})
    expected = clf.predict_log_proba(rows)
    monkeypatch.setattr(scoring, "keeps_all", lambda *_: False)
    np.testing.assert_allclose(clf.predict_log_proba(rows), expected, atol=1e-5)


def test_the_encoder_reads_each_prompt_once_and_labels_share_what_they_begin_with(t5):
    model = plain_pair(t5["base_model"])
    read: dict[str, list[tuple[int, ...]]] = {"encoder": [], "decoder": []}
    for name, seen in read.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
    prompts, labels = [(70, 80, 2), (71, 2), (70, 80, 2)], [(40, 50, 60 + i) for i in range(20)]
    score_labels(model, prompts, labels, device=CPU, pad_id=0, start_ids=(0,))
    assert read == {"encoder": [(2, 16)], "decoder": [(2, 1), (2, 2)]}  # two prompts; the start; one head of two tokens


@pytest.mark.parametrize("budget", [10, 100, 500])
def test_copies_of_what_was_read_stay_within_the_token_budget(budget, t5, monkeypatch):
    sizes: list[tuple[int, int]] = []
    fork = reading.fork

    def counting(cache: Any, rows: torch.Tensor) -> Any:
        sizes.append((len(rows), 48 + 2))  # the prompts are padded to whole steps
        return fork(cache, rows)

    monkeypatch.setattr(reading, "fork", counting)
    prompts, labels = [(70 + i, *range(100, 138), 2) for i in range(5)], [(40, 50 + i, 60) for i in range(30)]
    score_labels(
        plain_pair(t5["base_model"]), prompts, labels, device=CPU, pad_id=0, start_ids=(0,), batch_tokens=budget
    )
    assert all(copies == 1 or copies * tokens <= budget for copies, tokens in sizes)
    assert len(sizes) > 5


# Generation -----------------------------------------------------------------------------------------


@torch.no_grad()
def plainly(folder: str, kind: str, texts: list[str], **given: Any) -> list[str]:
    """What transformers generates, row by row."""
    model, tokenizer, start = plain_pair(folder), plain_tokenizer(folder), KINDS[kind][3]
    found = []
    for text in texts:
        ids = tokenizer(f"{text} is a", return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, decoder_input_ids=torch.tensor([start]), **given)
        found.append(tokenizer.decode(out[0, len(start) :], skip_special_tokens=True))
    return found


@pytest.fixture
def talkative(settings: dict[str, Any], kind: str, tiny: str, tmp_path: Path) -> dict[str, Any]:
    """The same, drawn so wide that each prompt has another answer."""
    changed = {"initializer_factor": 1.7} if kind == "t5" else {}
    return {**settings, "base_model": make_pair(tmp_path / "model", tiny, kind, **changed), "adapter": None}


@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_answers_are_those_that_transformers_generates_row_by_row(given, talkative, kind, frame):
    rows = pd.DataFrame({"text": RAGGED})
    expected = plainly(talkative["base_model"], kind, RAGGED, max_new_tokens=12, forced_eos_token_id=None, **given)
    for budget in (1, 200, 10**6):
        model = generator(talkative, batch_tokens=budget, generation={"max_new_tokens": 12, **given}).fit(frame)
        assert answers(model, rows) == expected
    assert len(set(expected)) > 2


def test_drawn_answers_are_those_of_the_random_state(pair, frame):
    drawing = {"max_new_tokens": 8, "do_sample": True}
    first, again, other = (
        answers(generator(pair, adapter=None, generation=drawing, random_state=seed).fit(frame), frame)
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_the_models_own_generation_settings_are_not_taken(pair, frame, tmp_path):
    folder = Path(shutil.copytree(pair["base_model"], tmp_path / "model"))
    own = {"forced_eos_token_id": 2, "forced_bos_token_id": 77, "min_length": 9, "num_beams": 4, "length_penalty": 2.0}
    own |= {
        "early_stopping": True,
        "max_length": 3,
        "decoder_start_token_id": 9,
        "suppress_tokens": list(range(100, 200)),
    }
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = [
        answers(generator(pair, generation={"max_new_tokens": 8}, base_model=base).fit(frame), frame)
        for base in (folder, pair["base_model"])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_rows_learned_by_heart_come_back_word_for_word_and_end(name, pair, kind):
    if kind == "bart" and name == "q and v":
        pytest.skip("BART calls them q_proj and v_proj")
    learning = {"epochs": 100, "learning_rate": 2e-2 if name == "q and v" else 5e-3, "batch_size": 4}
    model = generator({**pair, **learning}, adapter=ADAPTERS[name]).fit(WORDS)
    assert list(model.predict(WORDS)) == WORDS["label"].tolist()  # a row without an end would warn, which is an error
    assert model.score(WORDS) == 1.0
    assert not any("lm_head" in key or "shared" in key for key in model._tensors) or name == "full"


def test_white_space_and_special_tokens_in_an_answer_come_back(t5):
    rows = pd.DataFrame({"text": ["one", "two"], "label": ["  two  spaces ", "use </s> now"]})
    learning = {"epochs": 100, "learning_rate": 2e-2, "schedule": "constant", "adapter": "full"}
    assert list(generator({**t5, **learning}).fit(rows).predict(rows)) == rows["label"].tolist()


def test_perplexity_is_that_of_the_answers_by_hand(pair, kind, frame):
    model = generator(pair, adapter=None, batch_tokens=50, generation={"max_new_tokens": 1}).fit(frame)
    with pytest.warns(TruncationWarning, match="without an end"):
        found = model.evaluate(frame)["perplexity"]
    plain = plain_pair(pair["base_model"])
    rows = pair_rows(pair["base_model"], frame["text"], frame["label"])
    losses = np.concatenate([pair_losses(plain, *row, KINDS[kind][3]) for row in rows])
    np.testing.assert_allclose(found, np.exp(losses.mean()), rtol=1e-5)


# Lengths --------------------------------------------------------------------------------------------


def test_prompt_and_answer_have_max_length_each(pair, kind):
    rows, own = pd.DataFrame({"text": ["x" * 10], "label": ["y" * 12]}), int(kind == "bart")
    prompt, answer = len("x" * 10 + " is a") + 1 + own, 13 + own  # BART opens both, and closes them like T5
    model = generator(pair, max_length=max(prompt, answer)).fit(rows)
    assert model.max_length_ < prompt + answer
    [seen] = model.preview(rows).to_dict("records")
    assert (seen["prompt_tokens"], seen["completion_tokens"], seen["cut"]) == (prompt, 13, 0)
    with pytest.raises(TemplateError, match=rf"^Row 0 \(index 0\): the prompt has {prompt} tokens, max_length is"):
        generator(pair, max_length=prompt - 1).fit(rows)
    long = pd.DataFrame({"text": ["x"], "label": ["y" * 30]})
    with pytest.raises(TemplateError) as error:
        generator(pair, max_length=20).fit(long)
    assert str(error.value) == (
        f"Row 0 (index 0): the answer has {31 + own} tokens, max_length is 20. "
        "An answer is never cut: raise max_length."
    )


def test_a_prompt_that_is_too_long_is_one_sentence(t5, frame):
    with pytest.raises(TemplateError) as error:
        classifier(t5, max_length=14).fit(frame)
    assert str(error.value) == (
        "Row 0 (index 'r0'): the prompt has 15 tokens, max_length is 14. Raise max_length, or set truncation='prompt'."
    )
    with pytest.raises(TemplateError) as error:
        classifier(t5, max_length=8, template="What is it, {text}?", truncation="prompt").fit(frame)
    assert str(error.value) == (
        "Row 0 (index 'r0'): the template without any value has 14 tokens, which is more than max_length 8. "
        "Raise max_length."
    )


def test_a_prompt_is_cut_alike_with_and_without_its_answer(t5, frame):
    model = classifier(t5, max_length=12, truncation="prompt")
    with pytest.warns(TruncationWarning, match=r"^8 of 8 prompts were cut to max_length 12 tokens"):
        model.fit(frame)
    with pytest.warns(TruncationWarning):
        known, unknown = model.preview(frame), model.preview(frame[["text"]])
    assert known["prompt"].tolist() == unknown["prompt"].tolist()
    assert known["prompt"].iloc[0] == "red ap is a"  # and the token that closes it


def test_an_answer_ends_where_the_positions_of_its_decoder_end(settings, tiny, tmp_path, frame, monkeypatch):
    folder = make_pair(tmp_path / "model", tiny, "bart", max_position_embeddings=40)  # whole steps of padding: 32
    model = generator(settings, base_model=folder, adapter=None, generation={"max_new_tokens": 60}).fit(frame)
    run, lengths = inference._generate_batch, []

    def counting(*given: Any, **named: Any) -> Any:
        out = run(*given, **named)
        lengths.extend(map(len, out))
        return out

    monkeypatch.setattr(inference, "_generate_batch", counting)
    answers(model, frame)
    assert max(lengths) == 32 + 1 - 2  # the last token is not read, and two stand before the first


# Everything that works for decoders ------------------------------------------------------------------


def snapshot(base: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_model_is_as_before_to_the_last_bit(name, t5, frame):
    base = load_base_model(t5["base_model"], device="cpu", dtype="float32")
    before, modules, own = snapshot(base), [type(m) for m in base.model.modules()], base.model.generation_config
    answers(generator(t5, adapter=ADAPTERS[name], generation={"max_new_tokens": 2}).fit(frame), frame)

    def fail(_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        classifier(t5, adapter=ADAPTERS[name], callbacks=fail).fit(frame)
    assert same(before, snapshot(base))
    assert [type(m) for m in base.model.modules()] == modules
    assert base.model.generation_config is own
    assert base.model.lm_head.weight is base.model.shared.weight


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_fit_is_the_same_fit(name, t5, frame, tmp_path):
    clf = classifier(t5, adapter=ADAPTERS[name], epochs=2).fit(frame)
    clf.save(tmp_path / "model")
    again = llmfit.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    assert again.base_model_ == clf.base_model_
    assert again.base_model_["kind"] == "encoder-decoder"


def test_peft_reads_the_adapter_folder(pair, frame, tmp_path):
    model = generator(pair, epochs=5, generation={"max_new_tokens": 9}).fit(frame)
    model.save(tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(plain_pair(pair["base_model"]), str(tmp_path / "model/adapter")).eval()
    assert isinstance(loaded, peft.PeftModelForSeq2SeqLM)
    assert loaded.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    given = {"input_ids": torch.tensor([[70, 80, 2]]), "decoder_input_ids": torch.tensor([[0, 90, 91]])}
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(model._adapter, model._tensors) as ours:
        torch.testing.assert_close(loaded(**given).logits, ours(**given).logits)


def test_a_decoder_keeps_its_own_task_type(settings, frame, tmp_path):
    classifier(settings).fit(frame).save(tmp_path / "model")
    config = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_generated_rows_are_weighed_once_and_validated_on_others(t5, frame):
    weight = np.linspace(0.5, 2.0, len(frame))
    model = generator(t5, validation_fraction=0.25).fit(frame, sample_weight=weight)
    assert model.history_["validation_loss"].notna().any()


def test_the_same_seed_is_the_same_fit_where_the_model_drops_out(t5, frame, tiny, tmp_path):
    folder = make_pair(tmp_path / "model", tiny, "t5", dropout_rate=0.3)
    one, again, other = (generator(t5, base_model=folder, random_state=seed).fit(frame) for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("make", [classifier, generator])
def test_a_fit_that_was_killed_goes_on_to_the_last_bit(make, t5, frame, tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    folder = make_pair(tmp_path / "model", tiny, "t5", dropout_rate=0.1)
    settings = {**t5, "base_model": folder, "batch_size": 3, "epochs": 2, "checkpoint_dir": tmp_path / "states"}
    expected = uninterrupted(settings, frame, make)
    killed(settings, 4, frame, make)
    [state] = settings["checkpoint_dir"].iterdir()
    killed({**settings, "batch_tokens": 20}, 2, frame, make)  # other numbers are dropped: another fit
    assert len(list(settings["checkpoint_dir"].iterdir())) == 2
    assert state.exists()
    assert_same_fit(make(settings).fit(frame), expected)


def test_early_stopping_restores_the_best_epoch(t5, frame):
    given = {"epochs": 40, "learning_rate": 1.0, "schedule": "constant", "batch_size": 2, "random_state": 0}
    model = classifier({**t5, **given}, validation_fraction=0.25, early_stopping=1).fit(frame)
    losses = model.history_["validation_loss"].dropna()
    assert model.best_epoch_ == int(losses.argmin()) + 1
    assert len(losses) < 40


def test_a_grid_search_loads_the_base_once_and_finds_what_each_fit_finds_alone(t5, frame, monkeypatch):
    import transformers

    llmfit.clear_cache()
    loads: list[str] = []
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained

    def counting(*given: Any, **named: Any) -> Any:
        loads.append(given[0])
        return load(*given, **named)

    monkeypatch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", counting)
    grid = {"adapter__r": [2, 4], "learning_rate": [1e-3, 2e-2]}
    search = GridSearchCV(classifier(t5), grid, cv=2, scoring="neg_log_loss").fit(frame[["text"]], frame["label"])
    assert len(loads) == 1
    alone = classifier(t5).set_params(**search.best_params_).fit(frame[["text"]], frame["label"])
    assert same(alone, search.best_estimator_)


def test_the_estimator_that_chooses_answers_classes_and_text(t5, frame):
    chosen = LLMEstimator(**{**t5, "template": "{text} is a", "target": "label"}).fit(frame)
    assert chosen.predict_proba(frame).shape == (8, 2)
    texts = LLMEstimator(**{**t5, "template": "{text} is a", "target": {"label": "text"}}).fit(frame)
    assert answers(texts, frame)


def test_warm_start_goes_on_from_the_last_fit(t5, frame):
    model = classifier(t5, warm_start=True, schedule="constant", epochs=3).fit(frame)
    before = model.history_["loss"].iloc[-1]
    assert model.fit(frame).history_["loss"].iloc[3] < before + 0.5
    assert len(model.history_) == 6


@pytest.mark.parametrize("adapter", [{"r": 4}, "full"])
def test_a_base_in_few_bits_learns_and_scores_nearly_the_same(adapter, t5, frame):
    exact, coarse = (
        classifier(t5, adapter=adapter, dtype=dtype, epochs=3, learning_rate=1e-3).fit(frame)
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(coarse.history_["loss"], exact.history_["loss"], rtol=0.05)
    np.testing.assert_allclose(coarse.predict_proba(frame), exact.predict_proba(frame), atol=0.1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lora_answers_in_few_bits_also_in_layers_that_stay_in_float32(dtype, t5, frame, tmp_path):
    """In float16 T5 keeps `wo` wide."""
    model = classifier(t5, adapter={"type": "lora", "r": 4}).fit(frame)
    expected = model.predict_proba(frame)
    model.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model", dtype=dtype)
    np.testing.assert_allclose(loaded.predict_proba(frame), expected, atol=0.05)
    wide = {name for name, p in loaded._fitted_base().model.named_parameters() if p.dtype == torch.float32}
    assert bool(wide) == (dtype == "float16")


@pytest.mark.parametrize(
    "adapter",
    [
        {"r": 4},
        {"target_modules": ["q", "v"]},
        {"use_dora": True},
        "adalora",
        "ia3",
        "hra",
        "boft",
        "oft",
        "vera",
        "full",
    ],
)
def test_what_overflows_in_float16_stays_in_float32(adapter, t5, frame, tmp_path):
    """As in T5s that were trained in bfloat16: what `wo` gives is more than float16 can hold."""
    shutil.copytree(t5["base_model"], tmp_path / "base")
    large = load_base_model(t5["base_model"], device="cpu", dtype="float32").model.state_dict()
    large = {name: weight * 1e6 if name.endswith(".wo.weight") else weight.clone() for name, weight in large.items()}
    save_file(large, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = classifier({**t5, "base_model": str(tmp_path / "base")}, adapter=adapter).fit(frame)
    model.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model", dtype="float16")
    np.testing.assert_allclose(loaded.predict_proba(frame), model.predict_proba(frame), atol=0.05)


def test_a_layer_that_is_not_there_is_one_sentence(t5, frame):
    with pytest.raises(ParameterError) as error:
        classifier(t5, adapter={"target_modules": ["q", "q_proj"]}).fit(frame)
    assert str(error.value) == (
        "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
        "Got ['q', 'q_proj'] instead."
    )


# A published case -----------------------------------------------------------------------------------


def test_lora_on_flan_t5_xxl_has_the_published_counts():
    """18,874,368 trainable of 11,154,206,720, 0.169213 %, with LoRA on q and v at r=16: from shapes alone."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config).requires_grad_(False)
    lora = LoRA(r=16, alpha=32, target_modules=["q", "v"], dropout=0.05, bias="none")
    base = SimpleNamespace(model=model, kind="encoder-decoder", device=torch.device("meta"), dtype=torch.float32)
    adapted = lora.install(base, None, training=True)
    assert isinstance(adapted, peft.PeftModelForSeq2SeqLM)
    trainable, total = adapted.get_nb_trainable_parameters()
    # 24 layers of the encoder attend once, 24 of the decoder twice; q and v each get A (16 x 4096) and B (4096 x 16).
    assert trainable == (24 + 2 * 24) * 2 * 2 * 16 * 4096 == 18_874_368
    # transformers 5 ties the output head to the embedding in every T5 that it builds, whatever tie_word_embeddings
    # says. Where a checkpoint holds both, as this one does, loading unties them: the published total counts the head.
    head = 32128 * 4096
    assert total == 11_154_206_720 - head == 11_022_610_432
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight), requires_grad=False)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (trainable, total) == (18_874_368, 11_154_206_720)
    assert f"{100 * trainable / total:.6f}" == "0.169213"
