"""Tokenizers that write the beginning of a text in their own way: a piece in the middle of a text is none."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmfit import LLMClassifier, LLMGenerator
from llmfit.encoding import Encoder, Limit
from llmfit.templates import Segment

SPECIAL = ["<pad>", "<s>", "</s>"]


def prepending() -> Tokenizer:
    """As Llama 2 has it: a space before the text, then spaces as "▁", pieces of characters, bytes for the rest."""
    vocab = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "y"), ("▁", "n")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """As newer ones have it: the space is put there by the pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[("▁", "y"), ("▁", "n")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return tokenizer


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁y", "▁n"]
    return {piece: i for i, piece in enumerate(pieces)}


KINDS = {"prepend": prepending, "first": lambda: metaspace("first"), "always": lambda: metaspace("always")}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose tokenizer puts a space before a text."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[request.param](), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    where = tmp_path_factory.mktemp(request.param)
    make_model(where, tokenizer=wrapped)
    return str(where)


def encoder_of(folder: str) -> Encoder:
    return Encoder(PreTrainedTokenizerFast.from_pretrained(folder))


def test_an_answer_reads_as_it_does_behind_its_prompt(folder: str) -> None:
    encoder = encoder_of(folder)
    tokenizer = encoder.tokenizer
    for answer in (" yes", " no way", "yes", "  two"):
        whole = tokenizer("is it?" + answer, add_special_tokens=False)["input_ids"]
        alone = tokenizer("is it?", add_special_tokens=False)["input_ids"]
        assert alone + list(encoder.completions([answer])[0]) == whole


def test_a_cell_that_is_split_has_no_new_spaces(folder: str) -> None:
    encoder = encoder_of(folder)
    for cell in ("a </s> b", "<s>", "x<s></s>y", "  no </s>"):
        [row] = encoder.encode([[Segment("Say "), Segment(cell, "a"), Segment(".")]], None, Limit(99))
        assert not {1, 2} & set(row.prompt)
        assert encoder.tokenizer.decode(row.prompt) == f"Say {cell}."


@pytest.mark.parametrize("answer", ["yes", " two words", "  spaces  before", "no </s> b", "<s>", "line\nbreak", "ä"])
def test_an_answer_comes_back_as_it_was(answer: str, folder: str) -> None:
    encoder = encoder_of(folder)
    [ids] = encoder.completions([" " + answer])
    assert not {1, 2} & set(ids)
    assert encoder.decode(ids).removeprefix(" ") == answer


def test_answers_learned_by_heart_come_back(folder: str, settings: dict[str, Any]) -> None:
    frame = pd.DataFrame({"a": ["x", "z"], "answer": ["no </s> b", "  yes"]})
    more = {"base_model": folder, "adapter": "full", "epochs": 60, "batch_size": 2}
    model = LLMGenerator(target="answer", template="{a} is", **settings | more).fit(frame)
    assert model.predict(frame).tolist() == frame["answer"].tolist()


def test_labels_are_scored_behind_the_token_that_training_put_there(folder: str, settings: dict[str, Any]) -> None:
    frame = pd.DataFrame({"a": ["x", "z"] * 2, "label": ["yes", "no"] * 2})
    model = LLMClassifier(target="label", template="{a} is", **settings | {"base_model": folder}).fit(frame)
    tokens = model.preview(frame, 2)["loss_tokens"]
    assert tokens[0][0].strip() == "y"  # one token, its space included, not a bare space and then the letter
