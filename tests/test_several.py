"""Several targets: one sequence a row in words, one layer side by side; each against a plain computation."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import make_encoder, make_encoder_decoder
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from torch.nn import functional
from torch_side import CPU, furthest, plain_model, plain_tokenizer, same, token_losses

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.answers import Answers, several
from llmfit.answers import Part as Slice
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.exceptions import DataError, ModelLoadError, ParameterError, TemplateError, TruncationWarning
from llmfit.forward import collate
from llmfit.objectives import loss_mass, supervised

TARGETS = ["label", "price", "note"]
PLAIN = "{text} is a"
LINEAR = {"label": "category", "price": "number", "tags": "set"}


@pytest.fixture
def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Eight rows with four targets."""
    tags = [["sweet"], [], ["metal", "fast"], ["fast"], ["sweet"], ["metal"], ["sweet"], []]
    notes = [f"{text.split()[1]}s" for text in frame["text"]]
    return frame.assign(price=[1.5, 2.0, 30.25, 4.0, 5.5, 60.0, 7.25, 8.0], note=notes, tags=tags)[
        ["text", "label", "price", "note", "tags"]
    ]


def estimator(settings: dict[str, Any], **changed: Any) -> LLMEstimator:
    """Three targets in words behind prompts of one template."""
    given = {"target": TARGETS, "features": "text", "template": PLAIN}
    return LLMEstimator(**{**settings, **given, **changed})


@pytest.fixture
def learned(table: pd.DataFrame, settings: dict[str, Any]) -> LLMEstimator:
    """A fit that knows its rows by heart."""
    return estimator(settings, adapter="full", epochs=60, warmup=0).fit(table)


def pieces_by_hand(folder: str, row: pd.Series) -> tuple[list[int], list[list[int]]]:
    """Prompt, then answer, cue, answer, ... of a row as a person would write them down."""
    tokenizer = plain_tokenizer(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end, price = tokenizer.eos_token_id, f"{row['price']:g}"
    pieces = [[*ids(f" {row['label']}"), end], ids("\n\nprice:"), [*ids(f" {price}"), end]]
    return tokenizer(f"{row['text']} is a")["input_ids"], [*pieces, ids("\n\nnote:"), [*ids(f" {row['note']}"), end]]


# Token weights and losses, by hand ------------------------------------------------------------------


def test_tokens_of_share_zero_are_neither_predicted_nor_counted() -> None:
    rows = [
        Encoded((7, 8), (1, 2, 3, 4), weight=2.0, shares=(1.0, 0.0, 0.5, 0.0)),
        Encoded((9,), (5, 6)),
    ]
    batch = collate(rows, 0, CPU, step=1)
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 4], [9, 5, 6, 0, 0, 0]]
    assert batch.predicts.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 1]]
    assert batch.targets.tolist() == [1, 3, 5, 6]
    assert batch.weights.tolist() == [2.0, 1.0, 1.0, 1.0]
    assert loss_mass(rows) == 2.0 * 1.5 + 2
    apart = collate(rows, 0, CPU, (0,), step=1)  # the same beside an encoder
    assert apart.predicts.nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    assert apart.targets.tolist() == [1, 3, 5, 6]


def test_the_first_token_of_a_text_without_prompt_is_not_counted() -> None:
    assert Encoded((), (1, 2), shares=(3.0, 0.5)).mass == 0.5
    assert Encoded((), (1, 2)).mass == 1


def test_a_rows_shares_of_one_change_nothing(tiny: str) -> None:
    model = plain_model(tiny)
    plain = [Encoded((1, 50, 60), (70, 80, 2)), Encoded((1, 90), (33, 2))]
    shared = [row._replace(shares=(1.0,) * len(row.completion)) for row in plain]
    losses = [supervised(model, collate(rows, 0, CPU)) for rows in (plain, shared)]
    assert torch.equal(*losses)
    assert loss_mass(plain) == loss_mass(shared)


def test_losses_side_by_side_are_the_weighted_sum_of_each_by_hand() -> None:
    outputs = torch.tensor([[2.0, 0.0, 1.0, -1.0, 3.0], [0.0, 1.0, 0.0, 2.0, -1.0]])
    batch = Answers(
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(2, dtype=torch.long),
        torch.tensor([[1.0, 0.5, 1.0, 0.0], [0.0, -1.0, 0.0, 1.0]]),
        torch.tensor([1.0, 3.0]),
    )
    parts = (Slice("classes", 2, 1, 1.0), Slice("number", 1, 1, 2.0), Slice("sets", 2, 2, 0.5))
    classes = 1 * np.log(1 + np.e**2) + 3 * np.log(1 + np.e)
    number = 1 * 0.5**2 + 3 * 1.0**2
    first = (np.log(1 + np.e) + np.log(1 + np.e**3)) / 2  # -1 against 1, 3 against 0
    second = (np.log(1 + np.e**2) + np.log(1 + np.e)) / 2  # 2 against 0, -1 against 1
    sets = 1 * first + 3 * second
    found = several(parts)(lambda *_: outputs, batch)
    assert float(found) == pytest.approx(classes + 2 * number + 0.5 * sets, rel=1e-6)


# In words: what is learned --------------------------------------------------------------------------


def test_a_row_is_one_sequence_of_answers_and_cues(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    model = estimator(settings, adapter=None, loss_weights={"price": 0.5}).fit(table)
    base = load_base_model(tiny, device="cpu", dtype="float32")
    rows = model._prompts.encode(base, table[["text"]], model._answer_texts(table[TARGETS]))
    for row, (_, truth) in zip(rows, table.iterrows(), strict=True):
        prompt, pieces = pieces_by_hand(tiny, truth)
        assert row.prompt == tuple(prompt)
        assert row.completion == tuple(token for piece in pieces for token in piece)
        shares = [share for piece, share in zip(pieces, (1.0, 0.0, 0.5, 0.0, 1.0), strict=True) for _ in piece]
        assert row.shares == tuple(shares)


def test_the_loss_of_a_step_is_that_of_transformers_alone(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    weights = np.array([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 0.0])
    shares = [2.0, 0.0, 0.5, 0.0, 1.0]
    model = estimator(settings, loss_weights={"label": 2.0, "price": 0.5})
    model.fit(table, sample_weight=weights)
    plain, total, mass = plain_model(tiny), 0.0, 0.0
    for weight, (_, truth) in zip(weights, table.iterrows(), strict=True):
        prompt, pieces = pieces_by_hand(tiny, truth)
        own = np.array([share for piece, share in zip(pieces, shares, strict=True) for _ in piece])
        losses = token_losses(plain, prompt, [token for piece in pieces for token in piece])
        total, mass = total + weight * float(own @ losses), mass + weight * own.sum()
    assert model.history_["loss"].iloc[0] == pytest.approx(total / mass, rel=1e-5)  # LoRA begins as nothing


def test_the_gradient_is_the_same_at_every_token_budget(table: pd.DataFrame, settings: Any) -> None:
    weights = {"label": 3.0, "note": 0.25}
    fits = [
        estimator(settings, adapter="full", optimizer="sgd", learning_rate=0.1, loss_weights=weights, batch_tokens=n)
        for n in (1, 4096)
    ]
    for fit in fits:
        fit.fit(table)
    assert furthest(*fits) < 1e-6


def test_one_target_in_turns_is_the_single_fit(table: pd.DataFrame, settings: Any) -> None:
    """A target of weight almost nothing behind the first leaves what the first alone would learn."""
    given = {"adapter": "full", "template": PLAIN, "features": "text", "epochs": 3, "max_grad_norm": None}
    alone = LLMClassifier(**settings | given, target="label").fit(table)
    both = LLMEstimator(**settings | given, target=["label", "note"], loss_weights={"note": 1e-12}).fit(table)
    assert furthest(alone, both) < 2e-3
    np.testing.assert_allclose(both.predict_proba(table)["label"], alone.predict_proba(table), atol=2e-3)
    assert both.predict(table)["label"].equals(alone.predict(table))


def test_the_first_target_is_scored_as_if_it_were_the_only_one(table: pd.DataFrame, settings: Any) -> None:
    given = {"adapter": None, "template": PLAIN, "features": "text"}
    alone = LLMClassifier(**settings | given, target="label").fit(table)
    both = LLMEstimator(**settings | given, target=["label", "note"]).fit(table)
    with pytest.warns(TruncationWarning, match="without an end"):  # of the note's
        scored = both.predict_proba(table)["label"]
    assert np.array_equal(scored, alone.predict_proba(table))


# In words: what is answered -------------------------------------------------------------------------


def test_memorised_rows_come_back(learned: LLMEstimator, table: pd.DataFrame) -> None:
    answers = learned.predict(table)
    assert answers.equals(table[TARGETS].assign(note=table["note"].astype("str")))
    assert learned.score(table) == 1.0
    shuffled = table[["text"]].iloc[[3, 3, 0]]
    assert learned.predict(shuffled).equals(answers.iloc[[3, 3, 0]])  # an index that repeats, too


def test_labels_behind_an_answer_are_scored_as_by_a_naive_forward(
    table: pd.DataFrame, settings: Any, tiny: str
) -> None:
    """The base model as it is, so that answers are of every kind, and predicted ones stand before the scored ones."""
    table = table.assign(colour=["red", "green"] * 4)
    model = estimator(settings, adapter=None, target=["label", "colour"]).fit(table)
    proba, answers = model.predict_proba(table), model.predict(table)
    tokenizer, plain = plain_tokenizer(tiny), plain_model(tiny)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for i, text in enumerate(table["text"]):
        prompt = tokenizer(f"{text} is a")["input_ids"]
        given = [*ids(f" {answers['label'].iloc[i]}"), tokenizer.eos_token_id, *ids("\n\ncolour:")]
        scores = -np.array([token_losses(plain, [*prompt, *given], ids(f" {c}")).sum() for c in ("green", "red")])
        np.testing.assert_allclose(proba["colour"][i], np.exp(scores - np.logaddexp.reduce(scores)), atol=1e-4)
        assert answers["colour"].iloc[i] == ("green", "red")[int(scores.argmax())]


def test_text_behind_an_answer_is_what_transformers_generates(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    model = estimator(settings, adapter=None, target=["label", "note"], generation={"max_new_tokens": 6}).fit(table)
    with pytest.warns(TruncationWarning, match="answers for 'note' reached max_new_tokens=6 without an end"):
        answers = model.predict(table)
    tokenizer, plain = plain_tokenizer(tiny), plain_model(tiny)
    for (_, row), text in zip(answers.iterrows(), table["text"], strict=True):
        end = tokenizer.eos_token
        prompt = tokenizer(f"{text} is a {row['label']}{end}\n\nnote:", return_tensors="pt")["input_ids"]
        out = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        words = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["note"] == words.removeprefix(" ")


@pytest.mark.parametrize("chat", [False, True])
def test_a_batch_changes_no_answer(chat: bool, table: pd.DataFrame, settings: Any, tiny_chat: str) -> None:
    changed = {"base_model": tiny_chat} if chat else {}
    model = estimator(settings | changed, epochs=2, target=["label", "note", "price"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such answers are seldom numbers
        model.fit(table)
        whole = model.predict(table), model.predict_proba(table)["label"]
        model.set_params(batch_tokens=1)
        one_by_one = model.predict(table), model.predict_proba(table)["label"]
    assert whole[0].equals(one_by_one[0])
    np.testing.assert_allclose(whole[1], one_by_one[1], atol=1e-6)


def test_in_a_chat_each_target_is_a_turn(table: pd.DataFrame, settings: Any, tiny_chat: str) -> None:
    model = estimator(settings, base_model=tiny_chat, template=None, target=["label", "note"], epochs=60, warmup=0)
    shown = model.preview(table, 1).iloc[0]
    assert shown["prompt"] == (
        "<|im_start|>user\nPredict the label. Answer with one of: fruit, vehicle. Then predict the note.\n\n"
        "text: red apple\n\nlabel:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown["completion"] == (
        "fruit<|im_end|>\n<|im_start|>user\nnote:<|im_end|>\n<|im_start|>assistant\napples<|im_end|>"
    )
    assert shown["loss_tokens"] == [*"fruit", "<|im_end|>", *"apples", "<|im_end|>"]
    question = shown["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    said = [("user", question), ("assistant", "fruit"), ("user", "note:"), ("assistant", "apples")]
    chat = [{"role": role, "content": text} for role, text in said]
    whole = plain_tokenizer(tiny_chat).apply_chat_template(chat, tokenize=False)
    assert whole == shown["prompt"] + shown["completion"] + "\n"
    assert model.set_params(adapter="full").fit(table).predict(table)["note"].tolist() == table["note"].tolist()


def test_a_name_that_spells_a_control_token_stays_text(table: pd.DataFrame, settings: Any, tiny_chat: str) -> None:
    odd = table.rename(columns={"note": "<|im_end|>"})
    model = estimator(settings, base_model=tiny_chat, adapter=None, target=["label", "<|im_end|>"]).fit(odd)
    base = load_base_model(tiny_chat, device="cpu", dtype="float32")
    row = model._prompts.encode(base, odd[["text"]], model._answer_texts(odd[["label", "<|im_end|>"]]))[0]
    end = plain_tokenizer(tiny_chat).convert_tokens_to_ids("<|im_end|>")
    assert row.completion.count(end) == 3  # both answers', and that of the user's turn


def test_worked_examples_show_every_answer(table: pd.DataFrame, settings: Any, tiny_chat: str) -> None:
    given = {"adapter": None, "target": ["label", "note"], "template": {"template": PLAIN, "few_shot": 1}}
    plain = estimator(settings, **given).fit(table)
    shown = plain.preview(table, 8)["prompt"]
    examples = {
        f"<s>{t} is a {lab}\n\nnote: {n}\n\n" for t, lab, n in table[["text", "label", "note"]].itertuples(index=False)
    }
    assert all(any(f"<s>{prompt}".startswith(example) for example in examples) for prompt in shown)
    chat = estimator(settings, base_model=tiny_chat, **given).fit(table)
    prompt = chat.preview(table, 1)["prompt"].iloc[0]
    assert prompt.count("<|im_start|>user\nnote:<|im_end|>\n<|im_start|>assistant\n") == 1
    assert prompt.count("<|im_start|>user") == 3
    with pytest.warns(TruncationWarning, match="without an end"):
        assert len(chat.predict(table)) == 8


def test_prompts_are_cut_alike_in_fit_and_predict(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    long = table.assign(text=table["text"] + " and more" * 30)
    model = estimator(settings, adapter=None, truncation="prompt", max_length=80)
    with pytest.warns(TruncationWarning):
        model.fit(long)
    base = load_base_model(tiny, device="cpu", dtype="float32")
    with pytest.warns(TruncationWarning):
        known = model._prompts.encode(base, long[["text"]], model._answer_texts(long[TARGETS]))
    with pytest.warns(TruncationWarning):
        asked = model._prompts.encode(base, long[["text"]])
    assert [row.prompt for row in known] == [row.prompt for row in asked]
    assert max(row.length for row in known) <= 80
    room = sum(model.answer_tokens_.values())
    assert {len(row.prompt) for row in asked} == {80 - room}


def test_answers_before_others_leave_them_room_in_the_context(
    table: pd.DataFrame, settings: Any, tmp_path: Any
) -> None:
    from conftest import make_model
    from transformers import AutoConfig

    folder = make_model(tmp_path / "short")
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 64
    config.save_pretrained(folder)
    given = {"base_model": folder, "adapter": None, "truncation": "prompt", "generation": {"max_new_tokens": 60}}
    long = table.assign(text=table["text"] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = estimator(settings, target=["note", "label", "price"], **given).fit(long)
        lengths: list[int] = []
        for inner in model.estimators_.values():
            lend = inner._lend
            inner._lend = lambda base, longest, lend=lend: lengths.append(longest) or lend(base, longest)
        answers, sequences = model._in_words(
            model._fitted_base(), model._prompts.encode(model._fitted_base(), long[["text"]])
        )
    assert len(lengths) == 3
    assert max(map(len, sequences)) <= 64 + 1  # the last token closes the answer, and is not read
    assert list(answers) == ["note", "label", "price"]


# A head ---------------------------------------------------------------------------------------------


def linear(settings: Any, **changed: Any) -> LLMEstimator:
    given = {"target": LINEAR, "features": "text", "template": PLAIN, "head": "linear"}
    return LLMEstimator(**{**settings, **given, **changed})


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_frozen_heads_side_by_side_are_those_trained_alone(
    kind: str, table: pd.DataFrame, settings: Any, tmp_path: Any
) -> None:
    make = {"encoder": make_encoder, "encoder-decoder": make_encoder_decoder}
    folder = make[kind](tmp_path / kind) if kind in make else settings["base_model"]
    given = settings | {"base_model": folder, "adapter": None, "epochs": 5, "max_grad_norm": None}
    given["optimizer"] = {"type": "adamw", "eps": 1e-3}  # the bias of standardised numbers begins with rounding alone
    both = linear(given, loss_weights={"label": 1.0}).fit(table)
    alone = {"features": "text", "template": PLAIN, "head": "linear"}
    one = {
        "label": LLMClassifier(**given | alone, target="label").fit(table),
        "price": LLMRegressor(**given | alone, target="price").fit(table),
        "tags": LLMClassifier(**given | alone, target="tags").fit(table),
    }
    stacked = torch.cat([each._tensors["head/weight"] for each in one.values()])
    torch.testing.assert_close(both._tensors["head/weight"], stacked, rtol=1e-4, atol=1e-5)
    answers = both.predict(table)
    assert answers["label"].equals(one["label"].predict(table))
    np.testing.assert_allclose(answers["price"], one["price"].predict(table), rtol=1e-4)
    assert answers["tags"].tolist() == one["tags"].predict(table).tolist()
    proba = both.predict_proba(table)
    assert list(proba) == ["label", "tags"]
    for name, values in proba.items():
        np.testing.assert_allclose(values, one[name].predict_proba(table), atol=1e-4)


def test_the_loss_of_heads_is_the_weighted_sum_by_hand(table: pd.DataFrame, settings: Any) -> None:
    shares = {"label": 2.0, "price": 0.5}
    model = linear(settings, loss_weights=shares, adapter={"r": 2}).fit(table)
    truth = table["price"]
    squares = ((truth - truth.mean()) / truth.std(ddof=0)) ** 2  # a head begins at zero: the mean, every class alike
    by_hand = 2.0 * np.log(2) + 0.5 * squares.mean() + np.log(2)
    assert model.history_["loss"].iloc[0] == pytest.approx(by_hand, rel=1e-6)


def test_heads_with_an_adapter_learn_every_target(table: pd.DataFrame, settings: Any) -> None:
    model = linear(settings, adapter={"r": 8}, epochs=60, warmup=0).fit(table)
    answers = model.predict(table)
    assert answers["label"].tolist() == table["label"].tolist()
    assert [sorted(tags) for tags in answers["tags"]] == [sorted(tags) for tags in table["tags"]]
    assert r2_score(table["price"], answers["price"]) > 0.9
    assert model.trainable_parameters_ > 5 * 33  # 2 classes, 1 number, 3 labels
    assert model._tensors["head/weight"].shape == (6, 32)


def test_each_targets_part_of_a_head_is_read_by_functional_linear(table: pd.DataFrame, settings: Any) -> None:
    model = linear(settings, adapter=None, epochs=3).fit(table)
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    plain = plain_model(settings["base_model"])
    rows = model._prompts.encode(base, table[["text"]])
    vectors = torch.stack([plain.model(torch.tensor([row.prompt])).last_hidden_state[0, -1].detach() for row in rows])
    out = functional.linear(vectors, model._tensors["head/weight"], model._tensors["head/bias"]).double().numpy()
    mean, scale = model.estimators_["price"].target_mean_, model.estimators_["price"].target_scale_
    np.testing.assert_allclose(model.predict(table)["price"], mean + scale * out[:, 2], rtol=1e-4)
    np.testing.assert_allclose(model.predict_proba(table)["tags"], 1 / (1 + np.exp(-out[:, 3:])), atol=1e-5)


# "auto" and kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "head"),
    [
        ({"label": "category", "price": "number"}, "lm"),
        ({"price": "number", "size": "number"}, "linear"),
        ({"tags": "set", "price": "number"}, "linear"),
        ({"tags": "set", "label": "binary"}, "linear"),
        ({"label": "category", "note": "text"}, "lm"),
    ],
)
def test_auto_answers_in_words_but_for_numbers_and_sets(target: Any, head: str, table: Any, settings: Any) -> None:
    table = table.assign(size=np.arange(8.0) ** 2 + 0.5)
    model = LLMEstimator(**settings | {"target": target, "features": "text", "adapter": {"r": 2}}).fit(table)
    assert ("lm" if model._head is None else "linear") == head
    assert [type(inner) for inner in model.estimators_.values()] == [
        {"number": LLMRegressor, "text": LLMGenerator}.get(kind, LLMClassifier) for kind in target.values()
    ]


def test_kinds_are_inferred_and_dtypes_kept(table: pd.DataFrame, settings: Any) -> None:
    table = table.assign(grade=pd.array([1, 2] * 4, dtype="Int64"), flag=[True, False] * 4)
    table["label"] = table["label"].astype("category")
    names = ["label", "grade", "flag"]
    model = LLMEstimator(**settings, target=names, features="text").fit(table)
    answers = model.predict(table)
    assert answers.dtypes.to_dict() == table[names].dtypes.to_dict()
    assert list(answers) == names
    assert answers.index.equals(table.index)
    assert {name: list(inner.classes_) for name, inner in model.estimators_.items()} == {
        "label": ["fruit", "vehicle"],
        "grade": [1, 2],
        "flag": [False, True],
    }
    assert model.target_ == names
    assert not hasattr(model, "estimator_")


# Forms of X and y -----------------------------------------------------------------------------------


def test_targets_may_stand_in_the_frame_or_beside_it(table: pd.DataFrame, settings: Any) -> None:
    given = {"features": "text", "template": PLAIN}
    inside = LLMEstimator(**settings, **given, target=TARGETS).fit(table)
    beside = LLMEstimator(**settings, **given).fit(table[["text"]], table[TARGETS])
    by_place = LLMEstimator(**settings, **given, target=TARGETS).fit(table[["text"]], table[TARGETS].to_numpy())
    assert same(inside, beside)
    assert same(inside, by_place)
    hidden = table.assign(label="?", price=-1.0)  # never read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert inside.predict(hidden).equals(inside.predict(table[["text"]]))
        assert len(inside.predict(table[:0])) == 0
        arrays = LLMEstimator(**settings, target=["label", "note"])
        arrays.fit(table[["text"]].to_numpy(), table[["label", "note"]].to_numpy())
        answers = arrays.predict(table[["text"]].to_numpy())
    assert isinstance(answers, np.ndarray)
    assert answers.shape == (8, 2)


def test_other_columns_are_the_features(table: pd.DataFrame, settings: Any) -> None:
    model = LLMEstimator(**settings, target=["label", "note"]).fit(table)
    assert list(model.features_) == ["text", "price", "tags"]


def test_an_indicator_without_names_is_still_one_target(table: pd.DataFrame, settings: Any) -> None:
    y = pd.DataFrame({"a": [0, 1] * 4, "b": [1, 1, 0, 0] * 2}, index=table.index)
    model = LLMEstimator(**settings, adapter=None).fit(table[["text"]], y)
    assert model.estimator_.classes_.tolist() == ["a", "b"]
    named = LLMEstimator(**settings, target=["a", "b"]).fit(table[["text"]], y)
    assert list(named.estimators_) == ["a", "b"]


def test_one_target_after_several_and_back_leaves_nothing_behind(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, target=["label", "note"]).fit(table)
    model.set_params(target="label").fit(table)
    fresh = clone(model).fit(table)
    assert same(model.estimator_, fresh.estimator_)
    assert sorted(vars(model)) == sorted(vars(fresh))
    assert model.history_ is model.estimator_.history_
    model.set_params(target=["label", "note"]).fit(table)
    assert not hasattr(model, "estimator_")
    assert list(model.estimators_) == ["label", "note"]


# Measures -------------------------------------------------------------------------------------------


def test_measures_are_those_of_each_target(learned: LLMEstimator, table: pd.DataFrame, tiny: str) -> None:
    wrong = table.assign(label=["fruit"] * 8, note=["apples", "pears"] + ["?"] * 6)
    found = learned.evaluate(wrong)
    assert list(found) == TARGETS
    assert found["label"]["accuracy"] == 0.5
    assert found["note"]["exact_match"] == 0.25
    assert found["price"]["mae"] == 0.0
    assert learned.evaluation_["rows"] == 8
    assert learned.evaluation_["label: accuracy"] == 0.5
    assert learned.score(wrong) == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    learned.set_params(loss_weights={"label": 2.0, "note": 4.0})
    assert learned.score(wrong) == pytest.approx((2 * 0.5 + 1.0 + 4 * 0.25) / 7)
    assert learned.score(wrong[["text"]], wrong[TARGETS]) == learned.score(wrong)


def test_perplexity_is_of_the_true_text_behind_the_true_answers(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    model = estimator(settings, adapter=None, generation={"max_new_tokens": 4}).fit(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.evaluate(table)["note"]["perplexity"]
    losses: list[float] = []
    for _, row in table.iterrows():
        prompt, pieces = pieces_by_hand(tiny, row)
        before = [*prompt, *(token for piece in pieces[:-1] for token in piece)]
        losses += token_losses(plain_model(tiny), before, pieces[-1]).tolist()
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_only_targets_that_are_classes_have_probabilities(learned: LLMEstimator, table: pd.DataFrame) -> None:
    proba = learned.predict_proba(table)
    assert list(proba) == ["label"]
    assert proba["label"].shape == (8, 2)
    np.testing.assert_allclose(np.exp(learned.predict_log_proba(table)["label"]), proba["label"])


def test_no_target_with_classes_has_no_probabilities(table: pd.DataFrame, settings: Any) -> None:
    table = table.assign(size=np.arange(8.0) + 0.5)
    model = LLMEstimator(**settings, target=["price", "size"], features="text", adapter=None).fit(table)
    assert not hasattr(model, "predict_proba")
    assert model.predict(table).shape == (8, 2)


# The rest of the contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lm", "linear", "frozen"])
def test_saved_pickled_and_cloned_it_answers_alike(head: str, table: Any, settings: Any, tmp_path: Any) -> None:
    given = settings | {"epochs": 3}
    if head == "lm":
        model = estimator(given, target=["label", "note"], loss_weights={"note": 0.5})
    else:
        model = linear(given, adapter=None if head == "frozen" else {"r": 2})
    model.fit(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers, found = model.predict(table), model.evaluate(table)
        model.save(tmp_path / "model")
        loaded = llmfit.load(tmp_path / "model", batch_tokens=64)
        for other in (loaded, pickle.loads(pickle.dumps(model)), clone(model).fit(table)):
            assert same(other, model)
            assert other.predict(table).equals(answers)
            assert other.evaluate(table)["label"]["log_loss"] == found["label"]["log_loss"]
    assert loaded.get_params() == model.get_params() | {"batch_tokens": 64}
    assert {inner.batch_tokens for inner in loaded.estimators_.values()} == {64}
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| target | {', '.join(model.target_)} |" in card
    assert "| classes of label | fruit, vehicle |" in card
    assert f"| label: accuracy | {model.evaluation_['label: accuracy']:.4g} |" in card
    assert (tmp_path / "model" / "adapter").is_dir() == (head != "frozen")


def test_a_saved_fit_goes_on(table: pd.DataFrame, settings: Any, tmp_path: Any) -> None:
    model = estimator(settings, target=["label", "note"], warm_start=True).fit(table)
    model.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model")
    for each in (model, loaded):
        each.fit(table)
    assert same(model, loaded)
    assert model.history_["step"].tolist() == [1, 2]


def test_a_folder_whose_base_model_moved_says_so(table: pd.DataFrame, settings: Any, tmp_path: Any) -> None:
    estimator(settings, target=["label", "note"], adapter=None).fit(table).save(tmp_path / "model")
    with pytest.raises(ModelLoadError):
        llmfit.load(tmp_path / "model", base_model=str(tmp_path / "nowhere"))


def test_a_killed_fit_goes_on_as_if_it_had_not_been(table: pd.DataFrame, settings: Any, tmp_path: Any) -> None:
    class KilledError(Exception):
        pass

    def kill(state: Any) -> None:
        if state.step == 3:
            raise KilledError

    given = {"epochs": 4, "loss_weights": {"note": 0.5}, "target": ["label", "note"]}
    whole = estimator(settings, **given).fit(table)
    part = estimator(settings, **given, checkpoint_dir=tmp_path, callbacks=kill)
    with pytest.raises(KilledError):
        part.fit(table)
    assert not part.__sklearn_is_fitted__()
    assert not hasattr(part, "estimators_")
    assert same(part.set_params(callbacks=None).fit(table), whole)


def test_weights_of_losses_are_part_of_what_a_checkpoint_belongs_to(table: Any, settings: Any, tmp_path: Any) -> None:
    for loss_weights in (None, {"label": 2.0}):
        model = linear(settings, adapter=None, loss_weights=loss_weights, checkpoint_dir=tmp_path).fit(table)
        assert same(model, linear(settings, adapter=None, loss_weights=loss_weights).fit(table))


def test_validation_rows_are_weighed_alike(table: pd.DataFrame, settings: Any, tiny: str) -> None:
    model = estimator(settings, loss_weights={"price": 0.5}, learning_rate=1e-9)
    model.fit(table[:6], eval_set=table[6:])
    total = mass = 0.0
    for _, row in table[6:].iterrows():
        prompt, pieces = pieces_by_hand(tiny, row)
        own = np.array([s for piece, s in zip(pieces, (1.0, 0.0, 0.5, 0.0, 1.0), strict=True) for _ in piece])
        losses = token_losses(plain_model(tiny), prompt, [token for piece in pieces for token in piece])
        total, mass = total + float(own @ losses), mass + own.sum()
    assert model.history_["validation_loss"].iloc[-1] == pytest.approx(total / mass, rel=1e-4)
    held = estimator(settings, validation_fraction=0.25).fit(table)
    assert held.history_["validation_loss"].notna().all()
    with pytest.raises(DataError) as raised:
        model.fit(table[:6], eval_set=table[6:].assign(label="ship"))
    assert str(raised.value).startswith("eval_set: ")
    assert "'ship'" in str(raised.value)


@pytest.mark.parametrize("beside", [False, True])
def test_a_search_scores_the_mean_of_the_targets(beside: bool, table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, target=["label", "note"], adapter="full", epochs=2)
    grid = {"learning_rate": [1e-4, 1e-2], "loss_weights": [None, {"note": 2.0}]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers without an end
        search.fit(*([table[["text"]], table[["label", "note"]]] if beside else [table]))
        assert list(search.predict(table)) == ["label", "note"]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_parameters_set_after_the_fit_reach_every_target(learned: LLMEstimator, table: pd.DataFrame) -> None:
    learned.set_params(generation={"max_new_tokens": 2}, random_state=5)
    assert {inner.random_state for inner in learned.estimators_.values()} == {5}
    with pytest.warns(TruncationWarning, match="reached max_new_tokens=2"):
        short = learned.predict(table)["note"]
    assert short.str.len().max() == 1  # one token is the blank before


def test_predicting_changes_nothing(learned: LLMEstimator, table: pd.DataFrame) -> None:
    before = pickle.dumps({name: vars(inner) for name, inner in learned.estimators_.items()})
    names = sorted(vars(learned))
    learned.predict(table)
    learned.predict_proba(table)
    learned.score(table)
    assert sorted(vars(learned)) == names
    assert pickle.dumps({name: vars(inner) for name, inner in learned.estimators_.items()}) == before


def test_the_base_model_is_as_it_was(table: pd.DataFrame, settings: Any) -> None:
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    for model in (estimator(settings, adapter="full"), linear(settings, adapter={"r": 2})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(table).score(table)
    after = base.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_failed_fit_leaves_the_one_before(learned: LLMEstimator, table: pd.DataFrame) -> None:
    answers = learned.predict(table)
    with pytest.raises(DataError):
        learned.fit(table.assign(price=np.inf))
    assert learned.predict(table).equals(answers)


def test_preview_shows_what_carries_loss_and_fits_nothing(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, target=["label", "note"])
    shown = model.preview(table, 2)
    assert shown["completion"].iloc[0] == " fruit</s>\n\nnote: apples</s>"
    assert shown["completion_tokens"].iloc[0] == 7 + 7 + 8
    assert shown["loss_tokens"].iloc[0] == [*" fruit", "</s>", *" apples", "</s>"]
    assert sorted(vars(model)) == sorted(vars(clone(model)))
    fitted = model.fit(table)
    assert fitted.preview(table, 2).equals(shown)
    assert fitted.preview(table[["text", "label"]], 1)["completion"].tolist() == [""]


def test_an_export_answers_as_the_fit_does(learned: LLMEstimator, table: pd.DataFrame, tmp_path: Any) -> None:
    learned.export(tmp_path / "merged")
    row = table.iloc[2]
    prompt, pieces = pieces_by_hand(str(tmp_path / "merged"), row)
    losses = token_losses(plain_model(str(tmp_path / "merged")), prompt, [t for piece in pieces for t in piece])
    assert losses[: len(pieces[0])].max() < 0.5  # learned by heart


def test_tags_tell_of_several_outputs(table: pd.DataFrame, settings: Any) -> None:
    for target in (["a", "b"], {"a": "text", "b": "number"}):
        assert LLMEstimator(target=target).__sklearn_tags__().target_tags.multi_output
    assert not LLMEstimator(target="a").__sklearn_tags__().target_tags.multi_output
    fitted = estimator(settings, adapter=None).set_params(target=None).fit(table[["text"]], table[["label", "note"]])
    assert fitted.__sklearn_tags__().target_tags.multi_output


# Sentences ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown target in the weights": (
        {"loss_weights": {"lable": 2.0}},
        ParameterError,
        "loss_weights names the target 'lable'; the targets are 'label', 'price', 'note'. Did you mean 'label'?",
    ),
    "a weight of nothing": (
        {"loss_weights": {"label": 0}},
        ParameterError,
        "The \"loss_weights['label']\" parameter of LLMEstimator must be a finite number > 0. Got 0 instead.",
    ),
    "weights that are no dict": (
        {"loss_weights": [1, 2, 3]},
        ParameterError,
        "The 'loss_weights' parameter of LLMEstimator must be None or a dict of target to float. "
        "Got [1, 2, 3] instead.",
    ),
    "weights of one target": (
        {"target": "label", "loss_weights": {"label": 1.0}},
        ParameterError,
        "The 'loss_weights' parameter has no meaning here: there is one target.",
    ),
    "weights of classes": (
        {"class_weight": "balanced"},
        ParameterError,
        "The 'class_weight' parameter has no meaning with several targets: a row has a class of each. Pass "
        "sample_weight to weigh rows, or set loss_weights to weigh targets.",
    ),
    "text of a head": (
        {"head": "linear"},
        ParameterError,
        "The target 'note' is text, which a linear head cannot answer. Set head='lm', or leave it out of the targets.",
    ),
    "generation where nothing is generated": (
        {"target": {"label": "category", "price": "number"}, "head": "linear", "generation": {"num_beams": 2}},
        ParameterError,
        "The 'generation' parameter has no meaning here: no target is generated.",
    ),
    "several labels in words": (
        {"target": ["label", "tags"], "head": "lm"},
        ParameterError,
        "LLMClassifier answers with one label a row in words, but 'tags' holds several. Set head='linear'.",
    ),
    "a target that is not there": (
        {"target": ["label", "stars"]},
        DataError,
        "LLMEstimator needs the target column 'stars', but the frame has only 'text', 'label', 'price', 'note', "
        "'tags'.",
    ),
    "a target among the features": (
        {"features": ["text", "note"]},
        DataError,
        "The target column 'note' is among the features. Leave it out of 'features'.",
    ),
    "a target in the template": (
        {"template": "{text} {price}:"},
        TemplateError,
        "The template reads the target column 'price', which is what it must predict.",
    ),
    "no room": (
        {"max_length": 50},
        TemplateError,
        "Row 0 (index 'r0'): the prompt has 15 tokens and 41 are for the answer, max_length is 50. Raise max_length, "
        "or set truncation='prompt'.",
    ),
    "a target named twice": (
        {"target": ["label", "label"]},
        DataError,
        "'label' is named twice in 'target' of LLMEstimator.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(case: str, table: pd.DataFrame, settings: Any) -> None:
    changed, error, sentence = REFUSED[case]
    with pytest.raises(error) as raised:
        estimator(settings, **changed).fit(table)
    assert str(raised.value) == sentence


def test_gaps_and_widths_of_targets_are_named(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings)
    with pytest.raises(DataError) as raised:
        model.fit(table.assign(price=[1.0, None] * 4))
    assert str(raised.value) == (
        "Row 1 (index 'r1'): the target 'price' is missing, in 4 row(s) in all. Drop or fill them: Input y "
        "contains NaN."
    )
    cases = [
        (table["label"], "LLMEstimator needs the target column 'price', but y has only 'label'."),
        (
            table[["label", "price"]].to_numpy(),
            "y must have a column for each of the targets 'label', 'price', 'note'. Got 2 instead.",
        ),
        (
            table[TARGETS][:3],
            "X and y must have the same length: inconsistent numbers of samples, 8 and 3.",
        ),
    ]
    for y, sentence in cases:
        with pytest.raises(DataError) as raised:
            model.fit(table[["text"]], y)
        assert str(raised.value) == sentence


def test_warm_start_keeps_to_its_targets(table: pd.DataFrame, settings: Any) -> None:
    model = estimator(settings, target=["label", "note"], warm_start=True).fit(table)
    with pytest.raises(DataError) as raised:
        model.set_params(target=["note", "label"]).fit(table)
    assert str(raised.value) == (
        "warm_start goes on with the targets 'label', 'note' as they were. Got 'note', 'label', or another kind of "
        "them, instead. Set warm_start=False to begin anew."
    )


def test_measures_of_several_targets_take_no_options(learned: LLMEstimator, table: pd.DataFrame) -> None:
    with pytest.raises(ParameterError, match=r"^evaluate of several targets has no parameter 'per_class'"):
        learned.evaluate(table, per_class=True)


@pytest.mark.parametrize("cls", [LLMClassifier, LLMRegressor, LLMGenerator])
def test_estimators_of_one_target_point_to_the_one_of_several(cls: Any, table: Any, settings: Any) -> None:
    with pytest.raises(ParameterError) as raised:
        cls(**settings, target=["label", "note"]).fit(table)
    assert str(raised.value) == (
        f"The 'target' parameter of {cls.__name__} must be one column. Got 'label', 'note'. LLMEstimator answers "
        "several."
    )
