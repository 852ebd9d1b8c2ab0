"""Answers behind what all prompts begin with: how many rows go together, and what is held of the beginning."""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from torch_side import generator

from llmfit import inference
from llmfit.exceptions import TruncationWarning
from llmfit.forward import generation

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


def test_a_row_takes_its_own_tokens_and_the_room_for_its_answer(settings, sizes):
    rows = rows_of(90)
    begins = len("<") + len(TASK) + len("thing 0")  # the BOS, the task, and what the first texts begin with
    own = len("thing 000 of all things, 000") - len("thing 0")
    found = texts(fitted(settings, batch_tokens=2400), rows)
    together = 2400 // (own + ROOM + begins // 2)  # of two layers one has a copy of the beginning at a time
    assert sizes == [together] * (90 // together) + [90 % together] * (90 % together > 0)
    assert 2400 // 2 // (begins + own) < together / 2  # so many they were, when the beginning was counted for each
    assert found == texts(fitted(settings, batch_tokens=1), rows)


def test_a_long_answer_is_no_reason_for_fewer_rows_than_whole_prompts_would_be(settings, sizes):
    rows = pd.DataFrame({"text": [f"{i}" for i in range(10, 40)]})
    whole = len("<" + "x" * 30 + "10 is a")
    texts(
        fitted(settings, template="x" * 30 + "{text} is a", generation={"max_new_tokens": 200}, batch_tokens=800), rows
    )
    assert set(sizes) == {800 // 2 // whole}


def test_the_beginning_is_held_once_for_all_rows_of_a_batch(settings, monkeypatch):
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


@pytest.mark.parametrize("drawing", [{}, {"do_sample": True, "top_k": 3}])
def test_answers_behind_a_beginning_are_those_of_whole_prompts(drawing, settings, monkeypatch):
    rows = rows_of(9)
    model = fitted(settings, generation={"max_new_tokens": ROOM, **drawing}, batch_tokens=10**6)
    behind = texts(model, rows)
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    assert texts(model, rows) == behind
    assert len(set(behind)) > 1


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
