"""Encoding: cells stay text, completions end, and a prompt that is too long loses only what it must."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors

from llmfit import LLMClassifier, LLMGenerator
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded, Encoder, Limit, cut_text
from llmfit.exceptions import TemplateError, TruncationWarning
from llmfit.objectives import collate
from llmfit.templates import PLAIN, Segment, segments_text

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
BOS, EOS, START, END = 1, 2, 3, 4
FAST = {"device": "cpu", "dtype": "float32", "verbose": 0, "random_state": 0}
quick = examples(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tiny: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, chat=True, closing="<|im_end|>\n")


@pytest.fixture(scope="module")
def spell(tokenizer: Any) -> Any:
    """Spell a text as the ids of its bytes: the tokenizer has one token a byte."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = tokenizer.get_vocab()
    return lambda text: tuple(vocab[char] for piece, _ in alphabet.pre_tokenize_str(text) for char in piece)


def row(*parts: str | tuple[str, str]) -> list[Segment]:
    """Make segments: a str is the template's own text, a pair (text, column) a cell."""
    return [Segment(*part) if isinstance(part, tuple) else Segment(part) for part in parts]


# --- special tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", SPECIAL)
@pytest.mark.parametrize("column", ["a", PLAIN])
def test_a_special_token_in_a_cell_is_text_and_in_the_template_a_token(
    mark: str, column: str, chat: Encoder, spell: Any
) -> None:
    cell = f"x{mark}{mark}y"
    [ids] = chat.prompts([row(mark, (cell, column), mark, "z")])
    assert ids == (SPECIAL[mark], *spell(cell), SPECIAL[mark], *spell("z"))


@pytest.mark.parametrize("mark", SPECIAL)
def test_a_special_token_in_an_answer_is_text(mark: str, plain: Encoder, spell: Any) -> None:
    answers = [mark, f" {mark}", f"a{mark}b{mark}"]
    assert plain.completions(answers) == [spell(answer) for answer in answers]


@pytest.mark.parametrize("mark", SPECIAL)
def test_a_special_token_across_a_seam_is_text(mark: str, chat: Encoder, spell: Any) -> None:
    for i in range(1, len(mark)):
        left, right = mark[:i], mark[i:]
        split: list[list[Segment]] = [
            row((left, "a"), right),
            row(left, (right, "a")),
            row((left, "a"), (right, "b")),
            row("<", (left, "a"), right, ">"),
            row((left, PLAIN), right),
            row(*[(char, "a") for char in mark]),
            row(left[:-1], (left[-1], "a"), right),
        ]
        expected = [spell("".join(segment.text for segment in segments)) for segments in split]
        assert chat.prompts(split) == expected


def test_text_of_two_template_parts_with_an_empty_cell_between_is_no_token(chat: Encoder, spell: Any) -> None:
    assert chat.prompts([row("</", ("", "a"), "s>")]) == [spell("</s>")]


def test_a_token_of_the_template_stays_one_beside_cells_that_look_alike(chat: Encoder, spell: Any) -> None:
    for before, after in (("<", ">"), ("<s", "s>"), ("</s>", "</s>"), ("<|im_", "|>"), ("", "")):
        [ids] = chat.prompts([row((before, "a"), "</s>", (after, "b"))])
        assert ids == (*spell(before), EOS, *spell(after))


def test_a_prompt_without_any_token_begins_from_the_end_of_text(chat: Encoder) -> None:
    assert chat.prompts([()]) == [(chat.end_id,)]


PIECES = [*SPECIAL, "<", ">", "|", "<|", "|>", "im_end", "/s", "s>", "é", "日", " ", "\n", "a"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join)


@quick
@given(st.lists(TEXT, min_size=1, max_size=4).filter(any))
def test_no_text_of_cells_ever_becomes_a_control_token(chat: Encoder, plain: Encoder, cells: list[str]) -> None:
    segments = row(*[(cell, "a") for cell in cells])
    [ids] = chat.prompts([segments])
    assert not set(ids) & set(SPECIAL.values())
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == "".join(cells)
    assert chat.decode(chat.completions(["".join(cells)])[0]) == "".join(cells)
    assert plain.prompts([segments]) == [(BOS, *ids)]


@quick
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_decoding_what_was_encoded_gives_the_text_back(plain: Encoder, pairs: list[tuple[str, str]]) -> None:
    segments = row(*[part for own, cell in pairs for part in (own, (cell, "a"))])
    [ids] = plain.prompts([segments])
    text = "".join(segment.text for segment in segments)
    decoded = plain.tokenizer.decode(ids, skip_special_tokens=False)
    first = next((segment for segment in segments if segment.text), Segment(""))
    opened = first.column is None and first.text.startswith("<s>")
    assert decoded == (text if opened else f"<s>{text}")


@pytest.mark.parametrize("cell", [f"a {mark} b" for mark in SPECIAL] + ["|im_end|>", "s>"])
def test_a_prompt_of_an_estimator_counts_special_text_as_text(cell: str, tiny: str, tiny_chat: str) -> None:
    frame = pd.DataFrame({"a": [cell]})
    for template, own in (("{a}.", 2), ("</s>{a}<", 3), ("<{a}|>", 4)):
        [shown] = LLMGenerator(tiny, template=template, **FAST).preview(frame, y=[cell]).itertuples()
        assert shown.prompt_tokens == own + len(cell)
        assert shown.completion_tokens == len(f" {cell}") + 1
    [shown] = LLMGenerator(tiny_chat, template="<{a}", **FAST).preview(frame, y=[cell]).itertuples()
    assert shown.prompt == f"<|im_start|>user\n<{cell}<|im_end|>\n<|im_start|>assistant\n"
    assert shown.prompt_tokens == 3 + len("user\n<") + len(cell) + len("\nassistant\n")
    assert shown.completion_tokens == len(cell) + 1


def test_special_text_in_few_shot_examples_is_text(tiny: str) -> None:
    frame = pd.DataFrame({"a": ["</s>", "x"]})
    shown = LLMGenerator(tiny, template={"template": "{a}", "few_shot": 1}, **FAST).preview(frame, y=["<s>", "</s>"])
    assert shown["prompt"].tolist() == ["x </s>\n\n</s>", "</s> <s>\n\nx"]
    assert shown["prompt_tokens"].tolist() == [1 + len(prompt) for prompt in shown["prompt"]]


# --- the beginning and the end --------------------------------------------------------------------------


def test_a_plain_prompt_has_one_opening_token(plain: Encoder, spell: Any) -> None:
    ids = plain.prompts([row("ab"), row(("ab", "a")), row("<s>ab"), row(("<s>", "a"), "b"), row()])
    own, text = (BOS, *spell("ab")), spell("<s>b")
    assert ids == [own, own, own, (BOS, *text), (BOS,)]


def test_a_chat_prompt_has_the_tokens_of_its_template_alone(chat: Encoder, spell: Any) -> None:
    assert chat.prompts([row("<|im_start|>", ("x", "a")), row("<s>", "x")]) == [
        (START, *spell("x")),
        (BOS, *spell("x")),
    ]


def test_prompts_in_a_batch_are_those_of_each_alone(plain: Encoder) -> None:
    rows = [row("a", ("</s>b", "a")), row(), row(("日本", "a"), "<|im_end|>"), row("x" * 50)]
    assert plain.prompts(rows) == [plain.prompts([one])[0] for one in rows]
    assert plain.prompts([]) == []
    assert plain.completions([]) == []


@pytest.mark.parametrize("closing", ["", "\n", "no token"])
def test_the_end_of_text_closes_where_the_chat_closes_with_none(closing: str, tokenizer: Any) -> None:
    assert Encoder(tokenizer, chat=True, closing=closing).end_ids == (EOS,)


def test_the_end_of_a_turn_closes_a_chat_and_the_end_of_text_ends_it_too(chat: Encoder, tokenizer: Any) -> None:
    assert chat.end_ids == (END, EOS)
    assert chat.end_id == END
    assert Encoder(tokenizer, chat=True, closing="</s>").end_ids == (EOS,)


def test_completions_end_with_the_closing_token_and_carry_weights(plain: Encoder, spell: Any) -> None:
    rows = plain.encode([row("a"), row("b")], [" x", " yz"], Limit(99), weights=[0.5, 2.0])
    assert rows == [
        Encoded((BOS, *spell("a")), (*spell(" x"), EOS), 0, 0.5, 0),
        Encoded((BOS, *spell("b")), (*spell(" yz"), EOS), 1, 2.0, 0),
    ]
    assert [r.length for r in rows] == [5, 6]
    unknown = plain.encode([row("a")], None, Limit(99))
    assert unknown == [Encoded((BOS, *spell("a")))]


@pytest.fixture(scope="module")
def pad_is_eos(tokenizer: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the tiny model whose padding and end of text are one token."""
    import shutil

    folder = tmp_path_factory.mktemp("pad") / "model"
    shutil.copytree(tiny, folder)
    same = transformers.AutoTokenizer.from_pretrained(tiny)
    same.pad_token = same.eos_token
    same.save_pretrained(folder)
    return str(folder)


def test_the_end_of_text_carries_loss_even_where_it_is_the_padding(pad_is_eos: str) -> None:
    frame = pd.DataFrame({"a": ["x", "long text"]})
    shown = LLMGenerator(pad_is_eos, **FAST).preview(frame, y=["p", "qrs"])
    assert shown["loss_tokens"].tolist() == [[" ", "p", "</s>"], [" ", "q", "r", "s", "</s>"]]
    rows = [Encoded((1, 8), (9, EOS)), Encoded((1, 8, 8, 8), (9, 9, EOS))]
    batch = collate(rows, EOS, torch.device("cpu"))
    assert batch.targets.tolist() == [9, EOS, 9, 9, EOS]
    assert batch.predicts.sum(1).tolist() == [2, 3]


# --- truncation -----------------------------------------------------------------------------------------

LONG = pd.DataFrame({"a": ["x" * 30, "short"], "b": ["y" * 10, "z"]}, index=["r1", "r2"])


def cut(model: str, frame: pd.DataFrame, max_length: int, template: str = "A={a} B={b}:", **params: Any) -> Any:
    """Preview rows with an answer of three tokens, cut to a length, and the warnings that came."""
    generator = LLMGenerator(
        model, template=template, max_length=max_length, **{"truncation": "prompt", **FAST, **params}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shown = generator.preview(frame, n=len(frame), y=["w"] * len(frame))
    return shown, [str(item.message) for item in caught if item.category is TruncationWarning]


def test_a_prompt_that_is_too_long_is_an_error_that_names_it(tiny: str) -> None:
    sentence = (
        "Row 0 (index 'r1'): the prompt has 47 tokens and 3 are for the answer, max_length is 49. "
        "Raise max_length, or set truncation='prompt'."
    )
    generator = LLMGenerator(tiny, template="A={a} B={b}:", max_length=49, **FAST)
    with pytest.raises(TemplateError, match=f"^{re.escape(sentence)}$"):
        generator.preview(LONG, y=["w", "w"])
    generator.set_params(max_length=50).preview(LONG, y=["w", "w"])


@pytest.mark.parametrize("name", ["r1", 17, ("a", 3), None])
def test_a_row_that_does_not_fit_is_named_by_its_index(name: Any, plain: Encoder) -> None:
    sentence = (
        f"Row 1 (index {name!r}): the prompt has 9 tokens and 2 are for the answer, max_length is 10. "
        "Raise max_length, or set truncation='prompt'."
    )
    with pytest.raises(TemplateError, match=f"^{re.escape(sentence)}$"):
        plain.encode([row("x"), row("x" * 8)], ["", "y"], Limit(10), names=["r0", name])


def test_truncation_cuts_the_longest_values_alone_and_counts(tiny: str) -> None:
    shown, said = cut(tiny, LONG, 40)
    assert shown["prompt"].tolist() == ["A=" + "x" * 20 + " B=" + "y" * 10 + ":", "A=short B=z:"]
    assert shown["cut"].tolist() == [10, 0]
    assert shown["prompt_tokens"].tolist() == [37, 13]
    assert shown["completion"].tolist() == [" w</s>"] * 2
    assert said == ["1 of 2 prompts were cut to max_length 40 tokens, 10 characters in all. preview() shows them."]


def test_truncation_cuts_several_values_to_one_length(tiny: str) -> None:
    shown, said = cut(tiny, LONG, 24)
    assert shown["prompt"].tolist() == ["A=" + "x" * 7 + " B=" + "y" * 7 + ":", "A=short B=z:"]
    assert shown["cut"].tolist() == [26, 0]
    assert said == ["1 of 2 prompts were cut to max_length 24 tokens, 26 characters in all. preview() shows them."]


def test_what_fits_is_not_cut_and_not_warned_of(tiny: str) -> None:
    shown, said = cut(tiny, LONG, 50)
    assert shown["cut"].tolist() == [0, 0]
    assert said == []


def test_the_same_value_twice_is_cut_in_both_places(tiny: str) -> None:
    shown, _ = cut(tiny, LONG[["a"]], 20, "{a}|{a}")
    assert shown["prompt"]["r1"] == "x" * 7 + "|" + "x" * 7


LETTERS = st.text(alphabet="ab é日<|", max_size=30)


@quick
@given(LETTERS, LETTERS, st.integers(10, 70))
def test_no_cut_prompt_could_keep_one_character_more(tiny: str, a: str, b: str, max_length: int) -> None:
    shown, said = cut(
        tiny, pd.DataFrame({"a": pd.Series([a], dtype=object), "b": pd.Series([b], dtype=object)}), max_length
    )

    def tokens(most: int) -> int:
        return 1 + len(f"A={a[:most]} B={b[:most]}:".encode()) + len(" w") + 1

    most = max(kept for kept in range(31) if tokens(kept) <= max_length)
    whole = len(a) + len(b)
    [kept] = shown.itertuples()
    assert kept.prompt == f"A={a[:most]} B={b[:most]}:"
    assert kept.cut == whole - len(a[:most]) - len(b[:most])
    assert kept.prompt_tokens + kept.completion_tokens == tokens(most)
    assert len(said) == (kept.cut > 0)


@pytest.mark.parametrize(("max_length", "kept"), [(11, 0), (12, 0), (13, 1), (15, 2)])
def test_values_are_cut_down_to_nothing_before_the_template_is(max_length: int, kept: int, tiny: str) -> None:
    shown, _ = cut(tiny, LONG.iloc[:1], max_length, "A={a} B={b}::")
    assert shown["prompt"].tolist() == [f"A={'x' * kept} B={'y' * kept}::"]


@pytest.mark.parametrize("truncation", ["error", "prompt"])
def test_a_template_that_does_not_fit_by_itself_is_refused(truncation: str, tiny: str) -> None:
    sentence = {
        "error": "Row 0 (index 'r1'): the prompt has 47 tokens and 3 are for the answer, max_length is 9. "
        "Raise max_length, or set truncation='prompt'.",
        "prompt": "Row 0 (index 'r1'): the template without any value has 7 tokens, which leaves no room for an "
        "answer of 3 within max_length 9. Raise max_length.",
    }[truncation]
    with pytest.raises(TemplateError, match=f"^{re.escape(sentence)}$"):
        cut(tiny, LONG, 9, truncation=truncation)


def test_chat_markup_system_and_answers_of_examples_are_never_cut(tiny_chat: str) -> None:
    config = {"template": "V={a}", "system": "Sys", "few_shot": 1}
    frame = pd.DataFrame({"a": ["x" * 30, "y" * 20]})
    generator = LLMGenerator(tiny_chat, template=config, max_length=92, truncation="prompt", **FAST)
    with pytest.warns(TruncationWarning, match="^2 of 2 prompts were cut"):
        shown = generator.preview(frame, y=["answer one", "answer two"])
    pattern = (
        r"<\|im_start\|>system\nSys<\|im_end\|>\n<\|im_start\|>user\nV=(\w+)<\|im_end\|>\n<\|im_start\|>assistant\n"
        r"answer (one|two)<\|im_end\|>\n<\|im_start\|>user\nV=(\w+)<\|im_end\|>\n<\|im_start\|>assistant\n"
    )
    found = [re.fullmatch(pattern, prompt).groups() for prompt in shown["prompt"]]
    assert [len(example) for example, _, _ in found] == [len(own) for _, _, own in found]
    assert shown["completion"].tolist() == ["answer one<|im_end|>", "answer two<|im_end|>"]
    assert (shown["prompt_tokens"] + shown["completion_tokens"]).between(91, 92).all()


def test_fit_and_predict_warn_once_each_and_cut_to_max_length(tiny: str) -> None:
    frame = pd.DataFrame({"a": ["x" * 60, "y" * 5, "z" * 70], "label": ["p", "q", "p"]})
    clf = LLMClassifier(tiny, target="label", template="{a}:", adapter=None, max_length=30, truncation="prompt", **FAST)
    sentence = "2 of 3 prompts were cut to max_length 30 tokens, 80 characters in all. preview() shows them."
    for call in (clf.fit, clf.predict, clf.preview):
        with pytest.warns(TruncationWarning, match=f"^{re.escape(sentence)}$") as said:
            call(frame)
        assert len(said) == 1
    assert clf.max_length_ == 30


def both_prompts(clf: LLMClassifier, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The prompts of rows whose label is known, and of the same rows whose label is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        clf.fit(frame)
        known = clf.preview(frame, n=len(frame))
        unknown = clf.preview(frame.drop(columns="label"), n=len(frame))
    return known["prompt"].tolist(), unknown["prompt"].tolist()


@pytest.mark.parametrize(
    "labels",
    [
        ["p", "q"],
        ["p", "a long label"],
    ],
)
@pytest.mark.parametrize("max_length", [25, 40])
def test_a_classifiers_prompt_is_cut_alike_in_fit_and_predict(labels: list[str], max_length: int, tiny: str) -> None:
    frame = pd.DataFrame({"a": ["x" * 50, "y" * 50], "label": labels})
    clf = LLMClassifier(
        tiny, target="label", template="{a}:", adapter=None, max_length=max_length, truncation="prompt", **FAST
    )
    known, unknown = both_prompts(clf, frame)
    assert known == unknown
    answer = len(f" {max(labels, key=len)}") + 1
    assert {len(prompt) for prompt in known} == {max_length - answer - 1}  # one token opens the prompt


def test_tokens_kept_free_for_an_unknown_answer_are_not_used_by_the_prompt(plain: Encoder) -> None:
    [fits] = plain.encode([row(("x" * 20, "a"))], None, Limit(30, "prompt", reserve=9))
    assert (len(fits.prompt), fits.cut) == (21, 0)
    [kept] = plain.encode([row(("x" * 20, "a"))], None, Limit(30, "prompt", reserve=12))
    assert (len(kept.prompt), kept.cut) == (18, 3)


@quick
@given(st.lists(st.tuples(LETTERS, st.sampled_from(["a", "b", PLAIN, None])), max_size=5), st.integers(0, 30))
def test_cut_text_is_the_text_that_truncation_left(parts: list[tuple[str, str | None]], most: int) -> None:
    segments = [Segment(text, column) for text, column in parts]
    kept = "".join(s.text[:most] if s.column not in (None, PLAIN) else s.text for s in segments)
    assert cut_text(segments, sum(len(s.text) for s in segments) - len(kept)) == kept


# --- other tokenizers -----------------------------------------------------------------------------------


def variant(tiny: str, **changes: Any) -> Any:
    """A tokenizer that writes other special tokens around a text."""
    made = transformers.AutoTokenizer.from_pretrained(tiny)
    if "single" in changes:
        ids = [("<s>", BOS), ("</s>", EOS)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=changes["single"], special_tokens=ids
        )
    return made


@pytest.mark.parametrize(
    ("single", "opening"),
    [("$A", ()), ("<s> $A", (BOS,)), ("<s> $A </s>", (BOS,)), ("$A </s>", ()), ("<s> <s> $A", (BOS, BOS))],
)
def test_only_the_tokens_that_open_a_text_are_written(
    single: str, opening: tuple[int, ...], tiny: str, spell: Any
) -> None:
    encoder = Encoder(variant(tiny, single=single))
    assert encoder.prompts([row("x", ("y", "a"))]) == [(*opening, *spell("xy"))]
    assert encoder.completions([" z"]) == [spell(" z")]
    assert np.all(encoder.end_ids == (EOS,))


def test_special_tokens_that_overlap_in_a_cell_are_text(tiny: str, spell: Any) -> None:
    made = transformers.AutoTokenizer.from_pretrained(tiny)
    made.add_tokens(["<a>b", "b<c>", "<a>"], special_tokens=True)
    encoder = Encoder(made, chat=True)
    for cell in ("<a>b<c>", "<a>b<c><a>", "<a><a>b<c>"):
        assert encoder.prompts([row((cell, "a"))]) == [spell(cell)]
    assert encoder.prompts([row("<a>b")]) == [(made.convert_tokens_to_ids("<a>b"),)]


def test_special_tokens_in_labels_and_column_names_stay_text(tiny: str) -> None:
    """The default task lists the labels and the default template the columns: both come from the data."""
    frame = pd.DataFrame({"<s>": ["x", "y"], "label": ["</s>", "<|im_end|>"]})
    clf = LLMClassifier(tiny, target="label", adapter=None, **FAST).fit(frame)
    prompts = clf.preview(frame)
    assert "one of: </s>, <|im_end|>.\n\n<s>: x" in prompts["prompt"].iloc[0]
    base = load_base_model(tiny, device="cpu", dtype="float32")
    rows = clf._prompts.encode(base, frame[["<s>"]])
    assert all(row.prompt.count(BOS) == 1 and EOS not in row.prompt for row in rows)


def test_few_shot_examples_come_from_the_rows_trained_on(tiny: str) -> None:
    frame = pd.DataFrame({"a": [f"cell {i}" for i in range(12)], "label": ["p", "q"] * 6})
    clf = LLMClassifier(tiny, target="label", template={"few_shot": 8}, validation_fraction=0.25, epochs=1, **FAST).fit(
        frame
    )
    seen = {segments_text(example.content) for example in clf._prompts.template.examples}
    assert len(seen) == 9  # eight, and one in reserve: all that is trained on
