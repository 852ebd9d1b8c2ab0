"""Generated answers against a plain greedy loop; where they end, how they are drawn, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch_side import (
    classifier,
    generator,
    make_other,
    no_collecting,
    plain_model,
    plain_tokenizer,
    same,
    with_tokenizer,
)

from llmfit import inference
from llmfit.exceptions import MemoryWarning, OutOfMemoryError, ParameterError, TruncationWarning
from llmfit.inference import Generation, resolve_generation

RAGGED = pd.DataFrame({"text": ["a", "red apple", "b" * 70, "an old car by the road", "x y", "q" * 30, "x y"]})


def untrained(settings: dict[str, Any], frame: pd.DataFrame, **changed: Any) -> Any:
    """A generator of the random base: answers that end only by chance."""
    changed = {"adapter": None, "generation": {"max_new_tokens": 12}, **changed}
    return generator(settings, **changed).fit(frame)


def answers(model: Any, rows: pd.DataFrame = RAGGED) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return list(model.predict(rows))


@torch.no_grad()
def greedy(folder: str, text: str, most: int) -> str:
    """The likeliest token, again and again, from full forward passes of one row."""
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    prompt = tokenizer(f"{text} is a")["input_ids"]
    new: list[int] = []
    while len(new) < most:
        token = int(model(input_ids=torch.tensor([prompt + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("llama", {}), ("gpt2", {}), ("qwen2", {}), ("mistral", {"sliding_window": 8})],
)
def test_an_answer_is_the_likeliest_token_again_and_again(kind, changed, settings, frame, tiny, tmp_path):
    folder = make_other(tmp_path / kind, tiny, kind, **changed)
    expected = [greedy(folder, text, 12) for text in RAGGED["text"]]
    assert answers(untrained(settings, frame, base_model=folder)) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_batches_never_matter(batch_tokens, settings, frame):
    alone = [answers(untrained(settings, frame), RAGGED.iloc[[i]])[0] for i in range(len(RAGGED))]
    assert answers(untrained(settings, frame, batch_tokens=batch_tokens)) == alone


def test_equal_prompts_are_computed_once(settings, frame, monkeypatch):
    sizes: list[int] = []
    run = inference._generate_batch

    def counting(model: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        return run(model, rows, *rest, **named)

    monkeypatch.setattr(inference, "_generate_batch", counting)
    found = answers(untrained(settings, frame))
    assert sizes == [6]
    assert found[4] == found[6]


# Ends -----------------------------------------------------------------------------------------------


@pytest.fixture
def learned(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under which the tiny model learns a few rows by heart."""
    return {**settings, "epochs": 50, "learning_rate": 2e-2, "batch_size": 4, "schedule": "constant", "adapter": "full"}


WORDS = pd.DataFrame({"text": ["red", "green", "old", "fast"], "label": ["fruit", "pear tree", "car", "a"]})


@pytest.mark.parametrize("kind", ["plain", "pad is eos", "no pad", "no bos", "chat", "lora"])
def test_rows_learned_by_heart_come_back_word_for_word_and_end(kind, learned, tiny, tiny_chat, tmp_path):
    folder = {
        "chat": lambda: tiny_chat,
        "pad is eos": lambda: with_tokenizer(tiny, tmp_path / "model", pad_token="</s>"),
        "no pad": lambda: _without_pad(with_tokenizer(tiny, tmp_path / "model", pad_token=None)),
        "no bos": lambda: make_other(tmp_path / "model", _bare(tiny, tmp_path / "bare"), "qwen2"),
    }.get(kind, lambda: tiny)()
    changed = {"adapter": "lora", "epochs": 70} if kind == "lora" else {}
    model = generator({**learned, **changed}, base_model=folder).fit(WORDS)
    assert list(model.predict(WORDS)) == WORDS["label"].tolist()  # a row without an end would warn, which is an error
    assert model.score(WORDS) == 1.0
    assert model.max_new_tokens_ == 32


def _without_pad(folder: str) -> str:
    assert plain_tokenizer(folder).pad_token is None
    return folder


def _bare(tiny: str, target: Path) -> str:
    """The tokenizer without a BOS, so that a prompt is its text alone."""
    shutil.copytree(tiny, target)
    content = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    assert plain_tokenizer(str(target))("a")["input_ids"] == [plain_tokenizer(str(target)).convert_tokens_to_ids("a")]
    return str(target)


def test_special_tokens_spelled_in_an_answer_come_back_as_text(learned):
    rows = pd.DataFrame({"text": ["one", "two"], "label": ["use </s> now", "<s>[<|im_end|>]"]})
    model = generator(learned, epochs=100).fit(rows)
    assert list(model.predict(rows)) == rows["label"].tolist()


def test_white_space_inside_and_around_an_answer_comes_back(learned):
    rows = pd.DataFrame({"text": ["one", "two"], "label": ["  two  spaces ", "a\nline\n\nor three"]})
    model = generator(learned, epochs=100).fit(rows)
    assert list(model.predict(rows)) == rows["label"].tolist()


def test_answers_without_an_end_are_counted_in_one_warning(settings, frame):
    model = untrained(settings, frame, generation={"max_new_tokens": 3})
    with pytest.warns(TruncationWarning) as warned:
        found = model.predict(RAGGED)
    assert [str(w.message) for w in warned] == ["7 of 7 answers for 'label' reached max_new_tokens=3 without an end."]
    assert Path(warned[0].filename).name == Path(__file__).name
    assert all(len(text) <= 3 for text in found)


def test_an_end_at_once_is_an_empty_answer(settings, frame, monkeypatch):
    monkeypatch.setattr(inference, "_generate_batch", lambda _, rows, *__, **___: [(2, 70, 71)] * len(rows))
    assert answers(untrained(settings, frame)) == [""] * len(RAGGED)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [((5, 6, 2, 7), ((5, 6), True)), ((5, 4, 2), ((5,), True)), ((5, 6), ((5, 6), False)), ((), ((), False))],
)
def test_an_answer_is_cut_at_the_first_of_the_ends(answer, expected):
    assert inference._until_end(answer, [2, 4]) == expected


@pytest.mark.parametrize(
    ("generation", "longest", "expected"),
    [(None, 5, 32), (None, 30, 2 * (1 + 30 + 1)), ({"max_new_tokens": 7}, 30, 7), ({"max_new_tokens": None}, 5, 32)],
)
def test_answers_may_be_twice_as_long_as_the_longest_seen(generation, longest, expected, settings):
    rows = pd.DataFrame({"text": ["a", "b"], "label": ["x", "y" * longest]})
    assert untrained(settings, rows, generation=generation).max_new_tokens_ == expected


def test_a_prompt_near_the_end_of_the_context_does_not_shorten_the_answers_of_others(settings, frame, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 55})
    )  # 48 in whole steps of padding
    rows = pd.DataFrame({"text": ["a", "b" * 28]})  # prompts of 7 and 34 tokens
    model = untrained(settings, frame, base_model=folder, generation={"max_new_tokens": 14})
    assert answers(model, rows) == answers(untrained(settings, frame, generation={"max_new_tokens": 14}), rows)


def test_least_new_tokens_hold_back_the_end(learned):
    model = generator(learned).fit(WORDS)
    model.set_params(generation__min_new_tokens=20)
    assert min(map(len, answers(model, WORDS))) >= 10  # the longest of them has nine characters


# Drawing --------------------------------------------------------------------------------------------


def test_drawn_answers_are_those_of_the_random_state(settings, frame):
    drawing = {"max_new_tokens": 8, "do_sample": True}
    model = untrained(settings, frame, generation=drawing)
    first = answers(model)
    torch.manual_seed(99)
    assert answers(model) == first
    assert answers(untrained(settings, frame, generation=drawing)) == first
    assert answers(untrained(settings, frame, generation=drawing, random_state=1)) != first
    assert first != answers(untrained(settings, frame, generation={"max_new_tokens": 8}))
    assert first[4] != first[6]  # equal prompts are drawn for each alone


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-4}])
def test_a_narrow_draw_is_the_likeliest(narrow, settings, frame):
    drawn = untrained(settings, frame, generation={"max_new_tokens": 8, "do_sample": True, **narrow})
    assert answers(drawn) == answers(untrained(settings, frame, generation={"max_new_tokens": 8}))


def test_the_models_own_generation_settings_are_not_taken(settings, frame, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    own = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "max_new_tokens": 2, "num_beams": 3}
    own |= {"top_k": 3, "top_p": 0.2, "no_repeat_ngram_size": 1, "min_new_tokens": 3, "eos_token_id": [70, 71, 72]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert answers(untrained(settings, frame, base_model=folder)) == answers(untrained(settings, frame))
    drawing = {"max_new_tokens": 8, "do_sample": True}
    drawn = [answers(untrained(settings, frame, base_model=b, generation=drawing)) for b in (folder, tiny)]
    assert drawn[0] == drawn[1]


def test_beams_find_answers_at_least_as_likely(settings, frame, tiny, monkeypatch):
    ids: dict[int, list[Any]] = {}
    run = inference._generate_batch

    def keeping(model: Any, rows: Any, config: Any, *rest: Any, **named: Any) -> Any:
        out = run(model, rows, config, *rest, **named)
        ids.setdefault(config.num_beams, []).extend((row.prompt, answer) for row, answer in zip(rows, out, strict=True))
        return out

    monkeypatch.setattr(inference, "_generate_batch", keeping)
    for beams in (1, 8):
        answers(untrained(settings, frame, generation={"max_new_tokens": 2, "num_beams": beams}))
    model = plain_model(tiny)
    greedy_score, beam_score = (
        sum(_log_likelihood(model, prompt, answer) for prompt, answer in ids[beams]) for beams in (1, 8)
    )
    assert beam_score > greedy_score + 0.1


@torch.no_grad()
def _log_likelihood(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logits[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_a_penalty_of_repetition_repeats_less(settings, frame):
    plain = answers(untrained(settings, frame, generation={"max_new_tokens": 20}))
    varied = answers(untrained(settings, frame, generation={"max_new_tokens": 20, "no_repeat_ngram_size": 1}))
    assert all(len(set(text)) == len(text) for text in varied if "\ufffd" not in text)
    assert varied != plain


# Settings -------------------------------------------------------------------------------------------

KEYS = ", ".join(
    f"'{key}'"
    for key in (
        "do_sample",
        "length_penalty",
        "max_new_tokens",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    )
)
WRONG: dict[str, tuple[Any, str]] = {
    "no dict": (True, "The 'generation' parameter of the estimator must be None or a dict. Got True instead."),
    "key": (
        {"max_tokens": 4},
        f"generation has no parameter 'max_tokens'. It has {KEYS}. Did you mean 'max_new_tokens'?",
    ),
    "max": ({"max_new_tokens": 0}, "The 'max_new_tokens' parameter of generation must be an int >= 1. Got 0 instead."),
    "min": (
        {"min_new_tokens": -1},
        "The 'min_new_tokens' parameter of generation must be an int >= 0. Got -1 instead.",
    ),
    "beams": ({"num_beams": 1.5}, "The 'num_beams' parameter of generation must be an int >= 1. Got 1.5 instead."),
    "temperature": (
        {"temperature": 0, "do_sample": True},
        "The 'temperature' parameter of generation must be a finite number > 0. Got 0 instead.",
    ),
    "penalty": (
        {"repetition_penalty": "high"},
        "The 'repetition_penalty' parameter of generation must be a finite number > 0. Got 'high' instead.",
    ),
    "top_p": (
        {"top_p": 1.1, "do_sample": True},
        "The 'top_p' parameter of generation must be a finite number >= 0 and <= 1. Got 1.1 instead.",
    ),
    "top_k": (
        {"top_k": -2, "do_sample": True},
        "The 'top_k' parameter of generation must be an int >= 0. Got -2 instead.",
    ),
    "length": (
        {"length_penalty": float("inf")},
        "The 'length_penalty' parameter of generation must be a finite number. Got inf instead.",
    ),
    "sample": (
        {"do_sample": "yes"},
        "The 'do_sample' parameter of generation must be one of True, False. Got 'yes' instead.",
    ),
    "least beyond most": (
        {"max_new_tokens": 3, "min_new_tokens": 4},
        "The 'min_new_tokens' parameter of generation must be at most max_new_tokens. Got 4 instead.",
    ),
    "length without beams": (
        {"length_penalty": 2.0},
        "The 'num_beams' parameter of generation must be > 1 where length_penalty is set. Got 1 instead.",
    ),
    "draw without drawing": (
        {"temperature": 0.5},
        "The 'do_sample' parameter of generation must be True where temperature, top_p or top_k is set. "
        "Got False instead.",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), WRONG.values(), ids=WRONG)
def test_settings_that_cannot_be_used_are_one_sentence(value, sentence, settings, frame, monkeypatch):
    monkeypatch.setattr("llmfit.base_model.load_base_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ParameterError) as error:
        generator(settings, generation=value).fit(frame)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Generation()),
        ({}, Generation()),
        ({"num_beams": 2, "length_penalty": 0.5}, Generation(num_beams=2, length_penalty=0.5)),
        (Generation(max_new_tokens=3), Generation(max_new_tokens=3)),
    ],
)
def test_every_spelling_is_one_setting(value, expected):
    assert resolve_generation(value) == expected


# Memory ---------------------------------------------------------------------------------------------


def test_a_batch_that_memory_does_not_hold_is_halved(settings, frame, monkeypatch):
    no_collecting(monkeypatch)
    model = untrained(settings, frame)
    expected, run = answers(model), inference._generate_batch

    def small(lent: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("oom")
        return run(lent, rows, *rest, **named)

    monkeypatch.setattr(inference, "_generate_batch", small)
    with pytest.warns(MemoryWarning, match=re.escape("Memory ran out: going on with batches of 3 rows")):
        assert answers(model) == expected


def test_a_row_that_memory_does_not_hold_is_an_error(settings, frame, monkeypatch):
    no_collecting(monkeypatch)
    model = untrained(settings, frame)

    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("oom")

    monkeypatch.setattr(inference, "_generate_batch", never)
    with pytest.raises(OutOfMemoryError, match=r"^Memory does not hold one row\."):
        answers(model, RAGGED.iloc[:1])


def test_a_generator_and_a_classifier_learn_the_same_from_the_same_rows(settings, frame):
    assert same(generator(settings).fit(frame), classifier(settings).fit(frame))
