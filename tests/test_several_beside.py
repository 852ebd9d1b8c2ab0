"""Several targets in words beside an encoder: the decoder's sequence, against transformers that are made to say it."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from seq2seq_side import KINDS, make_pair, pair_losses, plain_pair
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch_side import furthest, plain_tokenizer, same

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, scoring
from llmfit.base_model import load_base_model
from llmfit.batching import length_batches
from llmfit.encoding import Encoded
from llmfit.exceptions import TemplateError, TruncationWarning

TARGETS = ["label", "price", "note", "colour"]
BUDGETS = [1, 60, 400, 10**6]
LEARNING = {"epochs": 100, "learning_rate": 5e-3, "batch_size": 4}
PLAIN = "{text} is a"
ENDLESS = pytest.mark.filterwarnings("ignore:.*without an end:llmfit.exceptions.TruncationWarning")
UNREAD = pytest.mark.filterwarnings("ignore:.*are no number, and missing:llmfit.exceptions.DataWarning")


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models drawn so wide that they say something else to each prompt."""
    root = tmp_path_factory.mktemp("pairs")
    wide = {"initializer_factor": 1.7}
    return {k: make_pair(root / k.replace(" ", "-"), tiny, k, **wide if k == "t5" else {}) for k in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(settings: dict[str, Any], folders: dict[str, str], kind: str) -> dict[str, Any]:
    """Settings of a fit on each of the tiny encoder-decoders."""
    return {**settings, "base_model": folders[kind], "adapter": {"r": 4}}


@pytest.fixture
def calm(settings: dict[str, Any], kind: str, tiny: str, tmp_path: Path) -> dict[str, Any]:
    """The same, on a model that is drawn as usual, and learns."""
    return {**settings, "base_model": make_pair(tmp_path / "calm", tiny, kind)}


@pytest.fixture
def t5(settings: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    """Settings of a fit on the first of them, where one says enough."""
    return {**settings, "base_model": folders["t5"], "adapter": {"r": 4}}


@pytest.fixture
def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Eight rows with a class, a number, a text and another class; labels of two lengths."""
    notes = [f"{text.split()[1]}s" for text in frame["text"]]
    prices = [1.5, 2.0, 30.25, 4.0, 5.5, 60.0, 7.25, 8.0]
    return frame[["text", "label"]].assign(price=prices, note=notes, colour=["red", "green"] * 4)


def estimator(settings: dict[str, Any], **changed: Any) -> LLMEstimator:
    """Four targets in words behind prompts of one template."""
    given = {"target": TARGETS, "features": "text", "template": PLAIN}
    return LLMEstimator(**{**settings, **given, **changed})


class ByHand:
    """What a person would write down for the models of one folder, and what transformers alone says of it."""

    def __init__(self, folder: str, kind: str) -> None:
        self.tokenizer, self.model, self.start = plain_tokenizer(folder), plain_pair(folder), KINDS[kind][3]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        return list(self.tokenizer(f"{text} is a")["input_ids"])

    def closed(self, answer: str) -> list[int]:
        return [*self.ids(answer), self.tokenizer.eos_token_id]

    def pieces(self, row: Any) -> list[list[int]]:
        """Answer, cue, answer, ... of a row."""
        answers = [self.closed(f"{row[name]:g}" if name == "price" else row[name]) for name in TARGETS]
        cues = [self.ids(f"\n\n{name}:") for name in TARGETS[1:]]
        return [answers[0], *(piece for pair in zip(cues, answers[1:], strict=True) for piece in pair)]

    def losses(self, prompt: list[int], said: list[int], then: list[int]) -> np.ndarray:
        return pair_losses(self.model, prompt, then, (*self.start, *said))

    def log_proba(self, text: str, said: list[int], labels: list[str]) -> np.ndarray:
        scores = np.array([-self.losses(self.prompt(text), said, self.ids(label)).sum() for label in labels])
        return scores - np.logaddexp.reduce(scores)

    @torch.no_grad()
    def generated(self, text: str, said: list[int], **given: Any) -> str:
        begin = [*self.start, *said]
        out = self.model.generate(
            input_ids=torch.tensor([self.prompt(text)]),
            decoder_input_ids=torch.tensor([begin]),
            do_sample=False,
            forced_eos_token_id=None,
            **given,
        )
        return str(self.tokenizer.decode(out[0, len(begin) :], skip_special_tokens=True))


@pytest.fixture
def hand(pair: dict[str, Any], kind: str) -> ByHand:
    return ByHand(pair["base_model"], kind)


# What is learned --------------------------------------------------------------------------------------


def test_the_decoder_learns_one_sequence_of_answers_and_cues(table, pair, hand):
    model = estimator(pair, adapter=None, loss_weights={"price": 0.5}).fit(table)
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32")
    rows = model._prompts.encode(base, table[["text"]], model._answer_texts(table[TARGETS]))
    for row, (_, truth) in zip(rows, table.iterrows(), strict=True):
        pieces = hand.pieces(truth)
        assert row.prompt == tuple(hand.prompt(truth["text"]))
        assert row.completion == tuple(token for piece in pieces for token in piece)
        shares = (1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.0)
        assert row.shares == tuple(share for piece, share in zip(pieces, shares, strict=True) for _ in piece)
        assert row.said == ()
    shown = model.preview(table, 1).iloc[0]
    assert shown["completion"] == "fruit</s>\n\nprice:1.5</s>\n\nnote:apples</s>\n\ncolour:red</s>"
    assert shown["loss_tokens"][:10] == [*"fruit", "</s>", *"1.5", "</s>"]


def test_the_loss_of_a_step_is_that_of_transformers_alone(table, pair, hand):
    weights = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 0.0])
    shares = [2.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.0]
    model = estimator(pair, loss_weights={"label": 2.0, "price": 0.5}).fit(table, sample_weight=weights)
    total, mass = 0.0, 0.0
    for weight, (_, truth) in zip(weights, table.iterrows(), strict=True):
        pieces = hand.pieces(truth)
        own = np.array([share for piece, share in zip(pieces, shares, strict=True) for _ in piece])
        losses = hand.losses(hand.prompt(truth["text"]), [], [token for piece in pieces for token in piece])
        total, mass = total + weight * float(own @ losses), mass + weight * own.sum()
    assert model.history_["loss"].iloc[0] == pytest.approx(total / mass, rel=1e-5)  # LoRA begins as nothing


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_the_gradient_is_the_same_at_every_token_budget(batch_tokens, table, pair):
    given = {"optimizer": "sgd", "learning_rate": 0.1, "loss_weights": {"label": 3.0, "note": 0.25}}
    fits = [estimator(pair, batch_tokens=budget, **given).fit(table) for budget in (batch_tokens, 10**6)]
    assert furthest(*fits) < 1e-6
    assert max(float(tensor.abs().max()) for tensor in fits[0]._tensors.values()) > 1e-3


# What is answered -------------------------------------------------------------------------------------


@ENDLESS
def test_labels_behind_answers_are_scored_as_transformers_scores_them(table, calm, kind, tmp_path):
    """What was said before differs in length from row to row: labels do, and texts do."""
    targets = {"label": "category", "note": "text", "colour": "category"}
    given = {"target": targets, "adapter": "full", "generation": {"max_new_tokens": 9}, **LEARNING, "epochs": 40}
    model = estimator(calm, **given).fit(table)
    model.export(tmp_path / "merged")
    hand, lengths = ByHand(str(tmp_path / "merged"), kind), set()
    words, expected = model.predict(table), {"label": [], "colour": []}
    for text, (_, row) in zip(table["text"], words.iterrows(), strict=True):
        expected["label"].append(hand.log_proba(text, [], ["fruit", "vehicle"]))
        assert row["label"] == ("fruit", "vehicle")[int(expected["label"][-1].argmax())]
        said = [*hand.closed(row["label"]), *hand.ids("\n\nnote:")]
        assert row["note"] == hand.generated(text, said, max_new_tokens=9)
        said = [*said, *raw(hand, text, said, 9), hand.tokenizer.eos_token_id, *hand.ids("\n\ncolour:")]
        expected["colour"].append(hand.log_proba(text, said, ["green", "red"]))
        assert row["colour"] == ("green", "red")[int(expected["colour"][-1].argmax())]
        lengths.add(len(said))
    assert len(lengths) > 2
    for batch_tokens in BUDGETS:
        model.set_params(batch_tokens=batch_tokens)
        assert model.predict(table).equals(words)
        for name, proba in model.predict_proba(table).items():
            np.testing.assert_allclose(proba, np.exp(expected[name]), atol=1e-4)


@torch.no_grad()
def raw(hand: ByHand, text: str, said: list[int], most: int) -> list[int]:
    """Tokens that are generated, up to their end."""
    begin = [*hand.start, *said]
    out = hand.model.generate(
        input_ids=torch.tensor([hand.prompt(text)]),
        decoder_input_ids=torch.tensor([begin]),
        do_sample=False,
        forced_eos_token_id=None,
        max_new_tokens=most,
    )
    ids = out[0, len(begin) :].tolist()
    return ids[: ids.index(hand.tokenizer.eos_token_id)] if hand.tokenizer.eos_token_id in ids else ids


@ENDLESS
@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}], ids=str)
def test_text_behind_an_answer_is_what_transformers_generates(given, table, pair, hand):
    for batch_tokens in (1, 10**6):
        own = {"adapter": None, "generation": {"max_new_tokens": 8, **given}, "batch_tokens": batch_tokens}
        words = estimator(pair, target=["label", "note"], **own).fit(table).predict(table)
        for text, (_, row) in zip(table["text"], words.iterrows(), strict=True):
            said = [*hand.closed(row["label"]), *hand.ids("\n\nnote:")]
            assert row["note"] == hand.generated(text, said, max_new_tokens=8, **given)
    assert words["note"].nunique() > 2


@ENDLESS
def test_drawn_text_is_that_of_the_random_state(table, t5):
    own = {"adapter": None, "target": ["label", "note"], "generation": {"max_new_tokens": 8, "do_sample": True}}
    first, again, other = (estimator(t5, random_state=seed, **own).fit(table).predict(table) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first["note"].equals(other["note"])


@ENDLESS
def test_the_first_target_is_answered_as_if_it_were_the_only_one(table, pair):
    given = {"adapter": None, "template": PLAIN, "features": "text"}
    alone = LLMClassifier(**pair | given, target="label").fit(table)
    both = LLMEstimator(**pair | given, target=["label", "note"], generation={"max_new_tokens": 1}).fit(table)
    assert np.array_equal(both.predict_proba(table)["label"], alone.predict_proba(table))


def test_a_cache_that_cannot_be_shared_gives_the_same_scores(table, pair, monkeypatch):
    model = estimator(pair, target=["label", "colour"], adapter=None).fit(table)
    expected = model.predict_proba(table)["colour"]
    monkeypatch.setattr(scoring, "keeps_all", lambda *_: False)
    np.testing.assert_allclose(model.predict_proba(table)["colour"], expected, atol=1e-5)


@pytest.mark.parametrize("adapter", ["full", {"r": 16}], ids=["full", "lora"])
def test_memorised_rows_come_back(adapter, table, calm):
    learning = LEARNING if adapter == "full" else {**LEARNING, "epochs": 160}
    model = estimator(calm, adapter=adapter, **learning).fit(table)
    answers = model.predict(table)  # a row without an end would warn, which is an error
    assert answers.equals(table[TARGETS].assign(note=table["note"].astype("str"), colour=table["colour"]))
    assert model.score(table) == 1.0
    some = table[["text"]].iloc[[3, 3, 0]]
    assert model.predict(some).equals(answers.iloc[[3, 3, 0]])


@ENDLESS
@UNREAD
def test_perplexity_is_that_of_true_answers_behind_true_ones(table, pair, hand):
    model = estimator(pair, adapter=None, batch_tokens=90, generation={"max_new_tokens": 1}).fit(table)
    found = model.evaluate(table)
    losses = []
    for _, truth in table.iterrows():
        pieces = hand.pieces(truth)
        said = [token for piece in pieces[:4] for token in piece]
        losses.append(hand.losses(hand.prompt(truth["text"]), [*said], pieces[4]))
    assert found["note"]["perplexity"] == pytest.approx(float(np.exp(np.concatenate(losses).mean())), rel=1e-5)
    assert list(found) == TARGETS
    assert 0 <= found["colour"]["accuracy"] <= 1


# Everything that works for decoders -------------------------------------------------------------------


@ENDLESS
@UNREAD
def test_a_saved_fit_is_the_same_fit(table, t5, tmp_path):
    model = estimator(t5, epochs=3, generation={"max_new_tokens": 4}).fit(table)
    model.save(tmp_path / "model")
    again = llmfit.load(tmp_path / "model")
    for other in (again, pickle.loads(pickle.dumps(model))):
        assert other.predict(table).equals(model.predict(table))
        for name, proba in other.predict_proba(table).items():
            assert np.array_equal(proba, model.predict_proba(table)[name])
    assert same(model, clone(model).fit(table))


@ENDLESS
def test_a_search_finds_what_each_fit_finds_alone(table, t5):
    model = estimator(t5, target=["label", "note"], generation={"max_new_tokens": 3})
    grid = {"adapter__r": [2, 4], "loss_weights": [None, {"note": 2.0}]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(table)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    alone = clone(model).set_params(**search.best_params_).fit(table)
    assert same(alone, search.best_estimator_)


@ENDLESS
@pytest.mark.parametrize("retrieval", ["random", "semantic"])
def test_worked_examples_show_every_answer(retrieval, table, t5):
    template = {"template": PLAIN, "few_shot": {"k": 1, "retrieval": retrieval}}
    given = {"target": ["label", "note"], "template": template, "generation": {"max_new_tokens": 2}}
    model = estimator(t5, adapter=None, **given).fit(table)
    shown = model.preview(table, 8)
    examples = [f"{t} is a {lab}\n\nnote: {n}\n\n" for t, lab, n in table[["text", "label", "note"]].to_numpy()]
    assert all(any(prompt.startswith(example) for example in examples) for prompt in shown["prompt"])
    assert shown["completion"].iloc[0] == "fruit</s>\n\nnote:apples</s>"
    assert len(model.predict(table)) == 8


@ENDLESS
@UNREAD
def test_a_file_is_answered_as_a_frame_is(table, t5, tmp_path):
    model = estimator(t5, generation={"max_new_tokens": 3}).fit(table)
    table[["text"]].to_csv(tmp_path / "rows.csv", index=False)
    model.predict_files(tmp_path / "rows.csv", tmp_path / "out.csv", chunk_rows=3, proba=True)
    found, expected = pd.read_csv(tmp_path / "out.csv"), model.predict(table)
    for name in ("label", "colour"):
        assert found[f"{name}_predicted"].tolist() == expected[name].tolist()
    columns = ["colour_proba_green", "colour_proba_red"]
    np.testing.assert_allclose(found[columns], model.predict_proba(table)["colour"], atol=1e-6)


@ENDLESS
def test_the_base_model_is_as_before_to_the_last_bit(table, t5):
    base = load_base_model(t5["base_model"], device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    estimator(t5, target=["label", "note"], adapter="full", generation={"max_new_tokens": 2}).fit(table).predict(table)
    assert same_tensors(before, base.model.state_dict())


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@ENDLESS
@UNREAD
@pytest.mark.parametrize("adapter", ["dora", "ia3", "adalora", "ln_tuning"])
def test_adapters_of_every_sort_answer_alike_at_every_token_budget(adapter, table, t5):
    given = {"adapter": adapter, "epochs": 2, "generation": {"max_new_tokens": 4}}
    model = estimator(t5, **given).fit(table)
    expected, proba = model.predict(table), model.predict_proba(table)
    for budget in (1, 60):
        model.set_params(batch_tokens=budget)
        assert model.predict(table).equals(expected)
        for name, found in model.predict_proba(table).items():
            np.testing.assert_allclose(found, proba[name], atol=1e-5)


# Lengths ----------------------------------------------------------------------------------------------


def test_all_answers_of_a_row_must_fit_into_the_decoder(table, t5):
    """A row may answer the longest of each target, though none of the fit does."""
    longest = len("vehicle\n\ncolour:green") + 2  # both closed; the last token is not read, and one begins
    given = {"target": ["label", "colour"], "adapter": None}
    rows = table.assign(colour=["green", "red"] * 4, label=["fruit", "vehicle"] * 4)
    model = estimator(t5, max_length=longest, **given).fit(rows)
    assert sum(model.answer_tokens_.values()) == longest
    with pytest.raises(TemplateError) as raised:
        estimator(t5, max_length=longest - 1, **given).fit(rows)
    assert str(raised.value) == (
        f"Row 0 (index 'r0'): the answer has {longest} tokens, max_length is {longest - 1}. An answer is never cut: "
        "raise max_length."
    )


@ENDLESS
@UNREAD
def test_answers_before_others_leave_them_room_in_the_decoder(table, settings, tiny, tmp_path: Path):
    """The positions of BART's decoder end: what is generated first may not take those of what follows."""
    folder = make_pair(tmp_path / "short", tiny, "bart", max_position_embeddings=64)
    given = {"base_model": folder, "adapter": None, "generation": {"max_new_tokens": 60}}
    model = estimator(settings, target=["note", "label", "price"], **given).fit(table)
    base = model._fitted_base()
    answers, said = model._in_words(base, model._prompts.encode(base, table[["text"]]))
    assert max(map(len, said)) + 2 <= 64 + 2  # two tokens begin; the last ones of said and of its answer are not read
    assert list(answers) == ["note", "label", "price"]


def test_one_answer_beside_an_encoder_is_still_cut_alike(table, t5):
    long = table.assign(text=table["text"] + " and more" * 30)
    model = estimator(t5, target=["label", "colour"], adapter=None, truncation="prompt", max_length=30)
    with pytest.warns(TruncationWarning):
        model.fit(long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known, asked = model.preview(long), model.preview(long[["text"]])
    assert known["prompt"].tolist() == asked["prompt"].tolist()
    assert set(asked["prompt_tokens"]) == {30}


@ENDLESS
def test_a_generator_alone_is_as_it_was(table, pair, hand):
    model = LLMGenerator(**pair | {"adapter": None, "template": PLAIN, "features": "text", "target": "note"})
    model.set_params(generation={"max_new_tokens": 6}).fit(table)
    assert model.predict(table).tolist() == [hand.generated(text, [], max_new_tokens=6) for text in table["text"]]


# What goes together -----------------------------------------------------------------------------------


def test_rows_go_together_that_have_said_equally_many_tokens() -> None:
    rows = [Encoded((7,) * n, said=(5,) * said) for n, said in ((3, 2), (9, 0), (4, 2), (2, 1), (3, 0), (3, 2))]
    batches = list(length_batches(rows, 10**6))
    assert batches == [[1, 4], [3], [2, 0, 5]]
    assert [len(batch) for batch in length_batches(rows, 1)] == [1] * 6
    assert list(length_batches(rows[::-1], 10**6)) == [[4, 1], [2], [3, 0, 5]]


def test_equal_prompts_are_read_once_for_each_thing_said(t5: dict[str, Any]) -> None:
    model, read = plain_pair(t5["base_model"]), []
    hook = model.decoder.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].tolist()), with_kwargs=True
    )
    prompts, said = [(70, 80, 2), (70, 80, 2), (70, 80, 2)], [(9, 2), (8, 2), (9, 2)]
    done: list[int] = []
    given = {"device": torch.device("cpu"), "pad_id": 0, "start_ids": (0,)}
    scores = scoring.score_labels(model, prompts, [(40,), (41,)], said=said, progress=done.append, **given)
    hook.remove()
    assert read == [[[0, 8, 2], [0, 9, 2]]]
    assert sum(done) == 3
    expected = [-pair_losses(model, [70, 80, 2], [40], (0, *own))[0] for own in said]
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)


@ENDLESS
@UNREAD
@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "bfloat16"},
        {"quantization": 8},
        {"gradient_checkpointing": True},
        {"validation_fraction": 0.25, "early_stopping": 1, "epochs": 3},
    ],
    ids=str,
)
def test_it_goes_with_other_settings(changed: dict[str, Any], table: pd.DataFrame, t5: dict[str, Any]) -> None:
    given = {"adapter": {"r": 4, "target_modules": ["q", "v"]}, "generation": {"max_new_tokens": 3}}
    model = estimator(t5, **{**given, **changed}).fit(table)
    assert np.isfinite(model.history_["loss"]).all()
    assert list(model.predict(table)) == TARGETS
    assert all(np.isfinite(proba).all() for proba in model.predict_proba(table).values())


@ENDLESS
def test_recomputed_layers_learn_the_same(table: pd.DataFrame, t5: dict[str, Any]) -> None:
    given = {"target": ["label", "note"], "epochs": 2}
    plain, again = (estimator(t5, gradient_checkpointing=way, **given).fit(table) for way in (False, True))
    assert furthest(plain, again) < 1e-6


@ENDLESS
def test_a_second_fit_goes_on(table: pd.DataFrame, t5: dict[str, Any]) -> None:
    model = estimator(t5, target=["label", "note"], epochs=3, warm_start=True).fit(table)
    first = model.history_["loss"].iloc[-1]
    model.fit(table)
    assert len(model.history_) == 6
    assert model.history_["loss"].iloc[-1] < first


@ENDLESS
def test_a_config_of_two_answers_runs(table: pd.DataFrame, t5: dict[str, Any]) -> None:
    config = {
        "model_type": "llm",
        "base_model": t5["base_model"],
        "input_features": [{"name": "text", "type": "text"}],
        "output_features": [{"name": "label", "type": "category"}, {"name": "note", "type": "text"}],
        "prompt": {"template": "{text} is a"},
        "adapter": {"type": "lora", "r": 4},
        "generation": {"max_new_tokens": 3},
        "trainer": {"type": "finetune", "epochs": 1, "learning_rate": 0.01},
    }
    model = llmfit.from_config(config, device="cpu", dtype="float32", random_state=0, verbose=0).fit(table)
    assert list(model.predict(table)) == ["label", "note"]
