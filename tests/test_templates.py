"""Templates: a row becomes exactly the text that its template says; what cannot be meant is refused by one sentence."""

from __future__ import annotations

import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmfit import LLMClassifier, LLMGenerator
from llmfit.exceptions import DataWarning, LLMFitError, ParameterError, TemplateError
from llmfit.templates import FewShot, Segment, TemplateConfig, chat_frame, draw_examples, resolve_template

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
FAST = {"device": "cpu", "dtype": "float32", "verbose": 0, "random_state": 0}
quick = examples(max_examples=40, deadline=None, derandomize=True)


def shown(
    model: str, frame: Any, template: Any = None, *, y: Any = None, kind: Any = LLMGenerator, **params: Any
) -> pd.DataFrame:
    """Preview every row; answers are "w0", "w1", ... unless given."""
    frame = pd.DataFrame(frame)
    if y is None and "target" not in params:
        y = [f"w{i}" for i in range(len(frame))]
    return kind(model, template=template, **FAST, **params).preview(frame, n=len(frame), y=y)


def prompts(model: str, frame: Any, template: Any = None, **params: Any) -> list[str]:
    return shown(model, frame, template, **params)["prompt"].tolist()


def refused(model: str, frame: Any, template: Any, sentence: str, **params: Any) -> None:
    with pytest.raises(TemplateError, match=f"^{re.escape(sentence)}$"):
        shown(model, frame, template, **params)


# --- the prompts of Ludwig ------------------------------------------------------------------------------


class Case(NamedTuple):
    """Rows, a task and a template; the prompts of Ludwig 0.17.10, ours, and why ours differ ("" where equal)."""

    frame: dict[str, list[Any]]
    task: str | None
    template: str | None
    ludwig: list[str]
    ours: list[str]
    reason: str = ""
    target: str | None = None


CASES = {
    "default template": Case(
        {"review": ["I am happy"]},
        "sentiment analysis",
        None,
        ["SAMPLE INPUT: I am happy\n\nUSER: Complete the following task: sentiment analysis\n\nASSISTANT:\n"],
        ["sentiment analysis\n\nreview: I am happy\n\nanswer:"],
        "columns go by their names, and the turns of a chat are left to the tokenizer's chat template",
    ),
    "several columns and a number format": Case(
        {
            "instruction": ["Name this province", "Name this city", "Name this country"],
            "country": ["Canada", "France", "UK"],
            "year": [1871, 1789, 1057],
            "answer": ["British Columbia", "Paris", "Wales"],
        },
        None,
        "You are a helpful chatbot. USER: {instruction}: {country}, {year:.2f} ASSISTANT:",
        [
            "You are a helpful chatbot. USER: Name this province: Canada, 1871.00 ASSISTANT:",
            "You are a helpful chatbot. USER: Name this city: France, 1789.00 ASSISTANT:",
            "You are a helpful chatbot. USER: Name this country: UK, 1057.00 ASSISTANT:",
        ],
        [
            "You are a helpful chatbot. USER: Name this province: Canada, 1871.00 ASSISTANT:",
            "You are a helpful chatbot. USER: Name this city: France, 1789.00 ASSISTANT:",
            "You are a helpful chatbot. USER: Name this country: UK, 1057.00 ASSISTANT:",
        ],
        target="answer",
    ),
    "sample and task, with braces in the task": Case(
        {"review": ["foo"]},
        "predict. Return only values in {true, false}",
        "Instruction: {__task__}\n###\nInput: {__sample__}\nOutput:\n",
        ["Instruction: predict. Return only values in {true, false}\n###\nInput: foo\nOutput:\n"],
        ["Instruction: predict. Return only values in {true, false}\n###\nInput: foo\nOutput:"],
        "the line break at the end opens the completion, where tokenizers join it with the answer",
    ),
    "quotes in a sample": Case(
        {"review": ['He said "hi"', '"quoted"']},
        None,
        "{__sample__}",
        ['He said \\"hi\\', '\\"quoted\\'],
        ['He said "hi"', '"quoted"'],
        "quotes are neither escaped nor cut off the end",
    ),
    "letters beyond ASCII in a sample": Case(
        {"review": ["café 日本"]},
        None,
        "{__sample__}",
        ["caf\\u00e9 \\u65e5\\u672c"],
        ["café 日本"],
        "text is not escaped",
    ),
    "a line break in a sample": Case(
        {"review": ["a\nb"]}, None, "{__sample__}", ["a\\nb"], ["a\nb"], "text is not escaped"
    ),
    "letters beyond ASCII in a column": Case({"review": ["café 日本"]}, None, "{review}", ["café 日本"], ["café 日本"]),
    "braces that are text": Case(
        {"a": ["x"]}, None, 'Return {{"k": "{a}"}}', ['Return {"k": "x"}'], ['Return {"k": "x"}']
    ),
    "braces in a cell": Case({"a": ["{b}"]}, None, "V={a}", ["V={b}"], ["V={b}"]),
    "numbers without a format": Case({"a": [1.5, 2.0]}, None, "V={a}", ["V=1.5", "V=2.0"], ["V=1.5", "V=2.0"]),
    "a number written as text, with a format": Case({"a": ["3.14159"]}, None, "V={a:.2f}", ["V=3.14"], ["V=3.14"]),
    "missing values": Case(
        {"a": ["x", float("nan"), None]},
        None,
        "V={a}",
        ["V=x", "V=nan", "V=nan"],
        ["V=x", "V=", "V="],
        "a missing value reads as na_rep, which no one has to tell from the word nan",
    ),
    "an integer format": Case(
        {"a": [5]},
        None,
        "V={a:03d}",
        ["ValueError: Unsupported template format spec: 03d"],
        ["V=005"],
        "every format of a number is understood",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prompts_are_those_of_ludwig_or_better(case: Case, tiny: str) -> None:
    config = {"task": case.task, "template": case.template}
    got = shown(tiny, case.frame, config, **({"target": case.target} if case.target else {}))
    assert got["prompt"].tolist() == case.ours
    space = re.search(r"\s*$", case.template or "").group()
    assert all(completion.startswith(space or " ") for completion in got["completion"])
    assert (case.ours == case.ludwig) is (not case.reason)


# What Ludwig refuses, with its own words, and ours.
REFUSALS = {
    "a column that is not there": (
        {"task": None, "template": "V={zzz}"},
        "Prompt template must contain either the '__sample__' field or one of the columns from the dataset",
        "The template uses {zzz}, but the columns are 'a'. Write {{ and }} for braces that are text.",
    ),
    "a column that is not there beside one that is": (
        {"task": None, "template": "V={a} {zzz}"},
        "KeyError: 'zzz'",
        "The template uses {zzz}, but the columns are 'a'. Write {{ and }} for braces that are text.",
    ),
    "a task that the template does not use": (
        {"task": "t", "template": "V={a}"},
        "Prompt template must contain the '__task__' field if a task is provided",
        "The task is given, but the template never uses it: write {task} where it belongs.",
    ),
}


@pytest.mark.parametrize(("config", "ludwig", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_what_ludwig_refuses_is_refused_by_name(config: Any, ludwig: str, sentence: str, tiny: str) -> None:
    refused(tiny, {"a": ["x"]}, config, sentence)
    assert sentence not in ludwig


def test_a_template_without_a_field_is_warned_of_where_ludwig_refuses_it(tiny: str) -> None:
    sentence = "The template does not use the features 'a': the model will not see them."
    with pytest.warns(DataWarning, match=f"^{re.escape(sentence)}$"):
        assert prompts(tiny, {"a": ["x"]}, "static") == ["static"]


def test_few_shot_examples_are_written_like_the_row_itself(tiny: str) -> None:
    # Ludwig writes {'review': 'r2', 'label': 'neg'}: another form than the prompt has, and "label" tells the answer's
    # place only there. It shows both rows; here k falls to what each of the fitted rows can see, the row itself aside.
    frame = pd.DataFrame({"review": ["r1", "r2"], "label": ["pos", "neg"]})
    clf = LLMClassifier(
        tiny, target="label", adapter=None, template={"task": "classify", "few_shot": {"k": 2, "seed": 0}}, **FAST
    )
    with pytest.warns(DataWarning, match="few_shot asks for 2 worked examples"):
        clf.fit(frame)
    [prompt] = clf.preview(pd.DataFrame({"review": ["new"]}))["prompt"]
    review, answer = re.fullmatch(
        r"classify\n\nreview: (r\d)\n\nlabel: (pos|neg)\n\nclassify\n\nreview: new\n\nlabel:", prompt
    ).groups()
    assert (review, answer) in {("r1", "pos"), ("r2", "neg")}


# --- fields ---------------------------------------------------------------------------------------------

NAMES = ["a", "a.b", "1", "with space", "a:b", "a[0]", "a!r", "é", "日本", "0.x[1]:>5", "class", " ", "", "{open"]


@pytest.mark.parametrize("name", [name for name in NAMES if "{" not in name])
def test_any_column_can_be_a_field_by_its_exact_name(name: str, tiny: str) -> None:
    assert prompts(tiny, {name: ["cell {x}"]}, f"<{{{name}}}>") == ["<cell {x}>"]
    assert prompts(tiny, {name: [2], "b": [3]}, f"{{{name}:.1f}}, {{b}}") == ["2.0, 3"]


@pytest.mark.parametrize("name", NAMES)
def test_any_column_can_stand_in_the_default_template(name: str, tiny: str) -> None:
    assert prompts(tiny, {name: ["cell {x}"]}) == [f"{name}: cell {{x}}\n\nanswer:"]


def test_the_exact_name_of_a_column_stands_above_a_format(tiny: str) -> None:
    assert prompts(tiny, {"a": [5], "a:03d": ["whole"]}, "{a:03d} {a}") == ["whole 5"]


def test_a_field_may_stand_twice_and_in_any_order(tiny: str) -> None:
    assert prompts(tiny, {"a": ["x"], "b": ["y"]}, "{b}{a}{b}{{b}}") == ["yxy{b}"]


def test_the_default_template_lists_columns_in_the_order_of_features(tiny: str) -> None:
    frame = {"a": ["x"], "b": [1]}
    assert prompts(tiny, frame) == ["a: x\nb: 1\n\nanswer:"]
    assert prompts(tiny, frame, features=["b", "a"]) == ["b: 1\na: x\n\nanswer:"]
    assert prompts(tiny, frame, {"task": "Do {a}."}) == ["Do {a}.\n\na: x\nb: 1\n\nanswer:"]


def test_sample_lists_the_features_and_a_single_one_without_its_name(tiny: str) -> None:
    frame = {"a": ["x"], "b": [1]}
    assert prompts(tiny, frame, "<{__sample__}>") == ["<a: x\nb: 1>"]
    assert prompts(tiny, frame, "<{__sample__}>", features="b") == ["<1>"]


@pytest.mark.parametrize("cell", ["{x}", "{task}", "{a}", "{{a}}", "{", "}", "{}", "%s", "{0.__class__}", "\\u00e9"])
def test_a_cell_is_never_read_as_a_template(cell: str, tiny: str) -> None:
    config = {"task": "T {a}", "template": "{task}|{a}|{{}}"}
    assert prompts(tiny, {"a": [cell]}, config) == [f"T {{a}}|{cell}|{{}}"]


PIECES = st.sampled_from(
    [*SPECIAL, "{", "}", "{a}", "{task}", "{{", "}}", "<|", "|>", "\n", "\r\n", " ", "é", "日本", "\ue0001\ue001"]
)
CELLS = st.lists(st.lists(PIECES | st.text(max_size=4), max_size=6).map("".join), min_size=1, max_size=5)


@quick
@given(CELLS)
def test_any_text_in_a_cell_stands_in_the_prompt_as_it_is(tiny: str, cells: list[str]) -> None:
    frame = {"a": pd.Series(cells, dtype=object), "b": pd.Series(cells[::-1], dtype=object)}
    config = {"template": "{{{a}}} {b}{task}.", "task": "{b}"}
    got = prompts(tiny, frame, config)
    assert got == [f"{{{a}}} {b}{{b}}." for a, b in zip(cells, cells[::-1], strict=True)]


@quick
@given(CELLS)
def test_any_text_in_a_cell_stands_in_a_chat_as_it_is(tiny_chat: str, cells: list[str]) -> None:
    got = prompts(tiny_chat, {"a": pd.Series(cells, dtype=object)}, {"template": "{a}", "system": "S {a}"})
    assert got == [
        f"<|im_start|>system\nS {{a}}<|im_end|>\n<|im_start|>user\n{cell}<|im_end|>\n<|im_start|>assistant\n"
        for cell in cells
    ]


@quick
@given(st.text(max_size=20))
def test_any_text_can_be_a_template_with_its_braces_doubled(tiny: str, text: str) -> None:
    template = text.replace("{", "{{").replace("}", "}}") + "{a}."
    assert prompts(tiny, {"a": ["x"]}, template) == [f"{text}x."]


# --- number formats -------------------------------------------------------------------------------------

FORMATS: list[tuple[Any, str, str]] = [
    (1234, ".2f", "1234.00"),
    (1234, ",", "1,234"),
    (1234, ">6", "  1234"),
    (1234, "06", "001234"),
    (1234, "+", "+1234"),
    (1234, "x", "4d2"),
    (1234, "n", "1234"),
    (1234, ".3", "1.23e+03"),
    (1234, "_d", "1_234"),
    (9007199254740993, "d", "9007199254740993"),
    (9007199254740993, ",", "9,007,199,254,740,993"),
    (1234.5, ",", "1,234.5"),
    (2.0, "03d", "002"),
    (2.0, ",", "2.0"),
    (0.256, ".1%", "25.6%"),
    (-0.001, "z.1f", "0.0"),
    ("3.14159", ".2f", "3.14"),
    ("7", "03d", "007"),
    (1.5, "*^9.2f", "**1.50***"),
    (None, ".2f", "?"),
]


@pytest.mark.parametrize(("value", "spec", "text"), FORMATS)
def test_a_number_is_formatted_as_python_does(value: Any, spec: str, text: str, tiny: str) -> None:
    column = pd.Series([value], dtype=object)
    template = {"template": f"{{a:{spec}}}|", "na_rep": "?"}
    assert prompts(tiny, {"a": column}, template) == [f"{text}|"]
    assert prompts(tiny, {"a": [value]}, template) == [f"{text}|"]


@pytest.mark.parametrize("spec", ["s", "c", "%5", ">100", ".100f", "999999999", "1000000d", "{b}", "!r", "d5", "é"])
def test_what_is_no_format_of_a_number_is_refused(spec: str, tiny: str) -> None:
    frame = {"a": [1], "b": [2]}
    sentence = (
        f"The template formats 'a' as {spec!r}, which is no format of a number (such as .2f or 03d) or a date (such as "
        "%d.%m.%Y)."
    )
    refused(tiny, frame, f"{{b}} {{a:{spec}}}", sentence)


@pytest.mark.parametrize(
    ("cell", "spec"), [("x", ".2f"), ("1.5", "d"), ("True", "d"), ("inf", "d"), ("1,5", ".1f"), ("", ".2f")]
)
def test_a_value_that_is_no_number_for_its_format_names_the_row(cell: str, spec: str, tiny: str) -> None:
    frame = pd.DataFrame({"a": ["3", cell]}, index=[7, 8])
    sentence = f"Row 1 (index 8): the template formats 'a' as {spec!r}, but its value is {cell!r}."
    refused(tiny, frame, f"{{a:{spec}}}", sentence)


# --- what a template may not do -------------------------------------------------------------------------

BRACES = "Write {{ and }} for braces that are text."
EXACT = "a field is the exact name of a column."
REFUSED = {
    "an attribute": (
        "{a.__class__}",
        f"The template reads {{a.__class__}}, an attribute, index or conversion of 'a': {EXACT}",
    ),
    "an index": ("{a[0]}", f"The template reads {{a[0]}}, an attribute, index or conversion of 'a': {EXACT}"),
    "a conversion": ("{a!r}", f"The template reads {{a!r}}, an attribute, index or conversion of 'a': {EXACT}"),
    "a conversion and a format": (
        "{a!r:>9}",
        f"The template reads {{a!r}}, an attribute, index or conversion of 'a': {EXACT}",
    ),
    "an empty field": ("{} {a}", "The template has an empty {}: name a column in it, or write {{}} for text."),
    "a position": ("{0}", f"The template uses {{0}}, but the columns are 'a', 'review'. {BRACES}"),
    "a column unknown": ("{zzz}", f"The template uses {{zzz}}, but the columns are 'a', 'review'. {BRACES}"),
    "a column misspelled": (
        "{reveiw}",
        f"The template uses {{reveiw}}, but the columns are 'a', 'review'. Did you mean 'review'? {BRACES}",
    ),
    "an open brace": ("{a", f"The template '{{a' cannot be read: expected '}}' before end of string. {BRACES}"),
    "a closing brace": (
        "{a}}",
        f"The template '{{a}}}}' cannot be read: Single '}}' encountered in format string. {BRACES}",
    ),
    "a task that is not given": (
        "{task}: {a}",
        "The template uses {task}, but no task is given: add 'task' to the template.",
    ),
    "a task that is not given, by its other name": (
        "{__task__}: {a}",
        "The template uses {__task__}, but no task is given: add 'task' to the template.",
    ),
}


@pytest.mark.parametrize(("template", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_field_that_is_no_column_is_refused(template: str, sentence: str, tiny: str) -> None:
    refused(tiny, {"a": ["x"], "review": ["y"]}, template, sentence)


@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator])
def test_a_template_may_not_read_the_target(kind: Any, tiny: str) -> None:
    sentence = "The template reads the target column 'z', which is what it must predict."
    refused(tiny, {"a": ["x", "y"], "z": ["m", "n"]}, "{a} {z}", sentence, target="z", kind=kind)


def test_a_template_may_not_read_a_column_that_is_no_feature(tiny: str) -> None:
    sentence = "The template uses the column 'b', which is not among the features 'a'. Add it."
    refused(tiny, {"a": ["x"], "b": ["y"]}, "{a} {b}", sentence, features=["a"])


CONFIGS: dict[str, tuple[Any, str]] = {
    "a number": (3, "The 'template' parameter of the estimator must be None, a str or a dict. Got 3 instead."),
    "an unknown key": (
        {"templat": "x"},
        "template has no parameter 'templat'. It has 'chat', 'few_shot', 'na_rep', 'system', 'task', 'template'. "
        "Did you mean 'template'?",
    ),
    "a task that is no text": ({"task": 1}, "The 'task' parameter of template must be a str. Got 1 instead."),
    "no na_rep": ({"na_rep": None}, "The 'na_rep' parameter of template must be a str. Got None instead."),
    "a chat of another kind": (
        {"chat": "yes"},
        "The 'chat' parameter of template must be 'auto', True or False. Got 'yes' instead.",
    ),
    "no example": ({"few_shot": 0}, "The 'k' parameter of few_shot must be an int >= 1. Got 0 instead."),
    "true examples": ({"few_shot": True}, "The 'k' parameter of few_shot must be an int >= 1. Got True instead."),
    "half an example": (
        {"few_shot": 1.5},
        "The 'few_shot' parameter of template must be None, an int or a dict of k, seed, retrieval and model. "
        "Got 1.5 instead.",
    ),
    "an unknown key of few_shot": (
        {"few_shot": {"n": 3}},
        "few_shot has no parameter 'n'. It has 'k', 'model', 'retrieval', 'seed'.",
    ),
    "a seed below zero": (
        {"few_shot": {"seed": -1}},
        "The 'seed' parameter of few_shot must be an int >= 0. Got -1 instead.",
    ),
}


@pytest.mark.parametrize(("template", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_a_template_parameter_that_cannot_be_meant_is_refused(template: Any, sentence: str, tiny: str) -> None:
    with pytest.raises(ParameterError, match=f"^{re.escape(sentence)}$"):
        shown(tiny, {"a": ["x"]}, template)


def test_every_spelling_of_the_template_parameter_is_one_config() -> None:
    full = TemplateConfig(template="{a}", few_shot=FewShot(2, 0))
    assert resolve_template({"template": "{a}", "few_shot": 2}) == full
    assert resolve_template({"template": "{a}", "few_shot": {"k": 2}}) == full
    assert resolve_template({"template": "{a}", "few_shot": FewShot(2)}) == full
    assert resolve_template(full) == full
    assert resolve_template("{a}") == TemplateConfig(template="{a}")
    assert resolve_template(None) == TemplateConfig()


# --- the task -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["{task}", "{__task__}"])
def test_the_task_goes_where_the_template_says(field: str, tiny: str) -> None:
    config = {"task": "Rate {this}.", "template": f"{field} {{a}} {field}!"}
    assert prompts(tiny, {"a": ["x"]}, config) == ["Rate {this}. x Rate {this}.!"]


def test_a_classifier_has_a_task_of_its_own_until_one_is_given(tiny: str) -> None:
    frame, y = {"a": ["x", "y"]}, ["bad", "good"]
    own = "Predict the label. Answer with one of: bad, good."
    for template, prompt in {
        None: f"{own}\n\na: x\n\nlabel:",
        "{task}|{a}": f"{own}|x",
        "{__task__}|{a}": f"{own}|x",
        "{a}": "x",
    }.items():
        assert prompts(tiny, frame, template, y=y, kind=LLMClassifier)[0] == prompt
    config = {"task": "Given.", "template": None}
    assert prompts(tiny, frame, config, y=y, kind=LLMClassifier)[0] == "Given.\n\na: x\n\nlabel:"


def test_more_than_twenty_classes_are_not_listed(tiny: str) -> None:
    frame = {"a": [f"t{i}" for i in range(42)]}
    labels = [f"c{i:02d}" for i in range(21)]
    twenty = [*labels[:20], *labels[:20], "c00", "c01"]
    listed = prompts(tiny, frame, "{task} {a}", y=twenty, kind=LLMClassifier)[0]
    assert listed == f"Predict the label. Answer with one of: {', '.join(labels[:20])}. t0"
    assert prompts(tiny, frame, "{task} {a}", y=labels * 2, kind=LLMClassifier)[0] == "Predict the label. t0"


@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator])
def test_a_column_named_task_is_read_where_no_task_is_given(kind: Any, tiny: str) -> None:
    assert prompts(tiny, {"task": ["sum", "mean"]}, "do {task}", kind=kind) == ["do sum", "do mean"]


def test_a_column_named_task_beside_a_task_must_be_told_from_it(tiny: str) -> None:
    frame = {"task": ["sum"], "b": ["y"]}
    sentence = "{task} could be the task or the column 'task': write {__task__} for the task, or rename the column."
    refused(tiny, frame, {"task": "T", "template": "{task} {b}"}, sentence)
    assert prompts(tiny, frame, {"task": "T", "template": "{__task__}\n{__sample__}."}) == ["T\ntask: sum\nb: y."]


# --- white space at the seam of prompt and completion ---------------------------------------------------


@pytest.mark.parametrize("few_shot", [None, 1, 2])
@pytest.mark.parametrize("template", ["V={a}:", "V={a}"])
@pytest.mark.parametrize("space", ["", " ", "\n", "  ", "\n\n", " \t"])
def test_white_space_at_the_end_moves_to_the_completion(
    space: str, template: str, few_shot: int | None, tiny: str
) -> None:
    config = {"template": template + space, "few_shot": few_shot}
    got = shown(tiny, {"a": ["x", "y", "z"]}, config)
    lead = space or " "
    own = [template.format(a=cell) for cell in "xyz"]
    worked = [f"{own[i]}{lead}w{i}\n\n" for i in range(3)]
    assert got["completion"].tolist() == [f"{lead}w{i}</s>" for i in range(3)]
    for i, prompt in enumerate(got["prompt"]):
        assert prompt.endswith(own[i])
        examples = [example for j, example in enumerate(worked) if j != i and example in prompt]
        assert len(examples) == (few_shot or 0)
        assert sorted(prompt) == sorted("".join([*examples, own[i]]))


def test_white_space_of_a_cell_stays_in_it(tiny: str) -> None:
    assert prompts(tiny, {"a": [" x \n"]}, "V={a}.") == ["V= x \n."]


def test_a_chat_leaves_white_space_where_it_is(tiny_chat: str) -> None:
    [row] = shown(tiny_chat, {"a": ["x"]}, "V={a}\n").itertuples()
    assert row.prompt == "<|im_start|>user\nV=x\n<|im_end|>\n<|im_start|>assistant\n"
    assert row.completion == "w0<|im_end|>"


# --- system messages and chat templates -----------------------------------------------------------------


def test_a_system_message_stands_before_a_plain_prompt(tiny: str) -> None:
    assert prompts(tiny, {"a": ["x"]}, {"template": "V={a}", "system": "Be {brief}."}) == ["Be {brief}.\n\nV=x"]


def test_a_system_message_stands_once_before_few_shot_examples(tiny: str) -> None:
    config = {"template": "V={a}", "system": "Sys", "few_shot": 2}
    for prompt in prompts(tiny, {"a": ["x", "y", "z"]}, config):
        assert re.fullmatch(r"Sys\n\nV=. w\d\n\nV=. w\d\n\nV=.", prompt)


@pytest.mark.parametrize(("chat", "marked"), [("auto", True), (True, True), (False, False)])
def test_the_chat_template_is_used_unless_turned_off(chat: Any, marked: bool, tiny_chat: str) -> None:
    [prompt] = prompts(tiny_chat, {"a": ["x"]}, {"template": "V={a}", "chat": chat})
    assert ("<|im_start|>user\nV=x<|im_end|>" in prompt) is marked
    assert marked or prompt == "V=x"


def test_few_shot_examples_are_turns_of_a_chat(tiny_chat: str) -> None:
    config = {"template": "V={a}", "system": "S", "few_shot": 1}
    user, assistant = "<|im_start|>user\nV={}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"
    head, tail = "<|im_start|>system\nS<|im_end|>\n", "<|im_start|>assistant\n"
    got = prompts(tiny_chat, {"a": ["x", "y"]}, config)
    assert got == [
        head + user.format("y") + assistant.format("w1") + user.format("x") + tail,
        head + user.format("x") + assistant.format("w0") + user.format("y") + tail,
    ]


LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
REFUSE = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)
GO = "{% if add_generation_prompt %}[assistant]{% endif %}"
CHATS = {
    "takes a system role": (LOOP + GO, "[system]Sys[/][user]V=x[/][assistant]"),
    "raises at a system role": (REFUSE + LOOP + GO, "[user]Sys\n\nV=x[/][assistant]"),
    "wants user and assistant in turn": (ALTERNATE + LOOP + GO, "[user]Sys\n\nV=x[/][assistant]"),
    "drops a system role": (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}" + GO,
        "[user]Sys\n\nV=x[/][assistant]",
    ),
    "trims every message": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}" + GO,
        "[system]Sys[/][user]V=x[/][assistant]",
    ),
    "opens with text of its own": ("<s>" + LOOP + GO, "<s>[system]Sys[/][user]V=x[/][assistant]"),
}


def with_chat(folder: str, template: str, to: Path) -> str:
    """Copy a model with another chat template."""
    shutil.copytree(folder, to / "model")
    (to / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(to / "model")


@pytest.mark.parametrize(("jinja", "prompt"), CHATS.values(), ids=CHATS)
def test_a_system_message_arrives_in_every_chat_template(
    jinja: str, prompt: str, tiny_chat: str, tmp_path: Path
) -> None:
    model = with_chat(tiny_chat, jinja, tmp_path)
    assert prompts(model, {"a": ["x"]}, {"template": "V={a}", "system": "Sys"}) == [prompt]


CHANGED = "it changes, drops or repeats the text of a message"
BAD_CHATS = {
    "upper case": ("{% for m in messages %}{{ m.content | upper | replace('\ue000', '') }}{% endfor %}", CHANGED),
    "drops earlier turns": ("{{ messages[0].role }}", CHANGED),
    "repeats": ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", CHANGED),
    "raises": ("{{ raise_exception('not today') }}", "not today"),
}


@pytest.mark.parametrize("system", [None, "Sys"])
@pytest.mark.parametrize(("jinja", "reason"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_chat_template_that_changes_messages_is_refused(
    jinja: str, reason: str, system: str | None, tiny_chat: str, tmp_path: Path
) -> None:
    model = with_chat(tiny_chat, jinja, tmp_path)
    config = {"template": "V={a}", "system": system}
    sentence = f"The tokenizer's chat template cannot be used: {reason}. Set chat=False in 'template'."
    refused(model, {"a": ["x"]}, config, sentence)
    assert prompts(model, {"a": ["x"]}, {**config, "chat": False}) == [f"{system}\n\nV=x" if system else "V=x"]


def test_chat_asked_for_where_there_is_no_chat_template_is_refused(tiny: str) -> None:
    with pytest.raises(TemplateError, match=r"^The tokenizer's chat template cannot be used: .*Set chat=False in"):
        shown(tiny, {"a": ["x"]}, {"template": "{a}", "chat": True})


def test_a_chat_frame_holds_the_text_between_the_turns() -> None:
    def render(messages: list[dict[str, str]], go: bool) -> str:
        return "^" + "".join(f"<{m['role'][0]}>{m['content']}</>\n" for m in messages) + "<a>" * go

    frame = chat_frame(render, None, 2)
    assert frame.literals == ("^<u>", "</>\n<a>", "</>\n<u>", "</>\n<a>", "</>\n<u>", "</>\n<a>")
    assert (frame.closing, frame.lead, frame.chat) == ("</>\n", "", True)
    assert chat_frame(render, "Sys", 0).literals == ("^<s>Sys</>\n<u>", "</>\n<a>")


# --- few-shot -------------------------------------------------------------------------------------------

WORDS = [f"cell{i:02d}" for i in range(12)]
SHOTS = pd.DataFrame({"a": WORDS, "label": (["p"] * 9) + ["q"] * 3})


def shots(prompt: str) -> list[tuple[str, str]]:
    """Cells and answers of the examples that a prompt shows."""
    return re.findall(r"<(\w+)> (\w+)\n\n", prompt)


def few_shot(model: str, k: int, seed: int = 0, frame: pd.DataFrame = SHOTS, kind: Any = LLMClassifier) -> Any:
    template = {"template": "<{a}>", "few_shot": {"k": k, "seed": seed}}
    model = kind(model, target="label", template=template, adapter=None, **FAST)
    with pytest.warns(DataWarning) if len(frame.drop_duplicates("a")) <= k else nullcontext():
        return model.fit(frame)


@pytest.mark.parametrize("kind", [LLMClassifier, LLMGenerator])
@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_every_prompt_shows_k_true_examples_and_never_the_row_itself(k: int, kind: Any, tiny: str) -> None:
    truth = set(SHOTS.itertuples(index=False, name=None))
    estimator = few_shot(tiny, k, kind=kind)
    as_fitted = prompts(tiny, SHOTS, estimator.template, target="label", kind=kind)
    asked = estimator.preview(SHOTS.drop(columns="label"), n=12)["prompt"].tolist()
    assert asked == as_fitted
    for word, prompt in zip(WORDS, asked, strict=True):
        assert len(set(shots(prompt))) == k
        assert set(shots(prompt)) <= truth
        assert prompt.endswith(f"\n\n<{word}>")
        assert prompt.count(word) == 1


def test_a_row_seen_again_under_another_index_is_not_its_own_example(tiny: str) -> None:
    asked = SHOTS.drop(columns="label").set_axis([f"i{i}" for i in range(12)])[::-1]
    for prompt, word in zip(few_shot(tiny, 11).preview(asked, n=12)["prompt"], asked["a"], strict=True):
        assert prompt.count(word) == 1
        assert len(shots(prompt)) == 11


def test_examples_are_drawn_by_their_seed(tiny: str) -> None:
    new = pd.DataFrame({"a": ["new"]})
    drawn = [few_shot(tiny, 3, seed).preview(new)["prompt"][0] for seed in (0, 1, 2, 3)]
    again = [few_shot(tiny, 3, seed).preview(new)["prompt"][0] for seed in (0, 1, 2, 3)]
    assert drawn == again
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [2, 4, 6])
def test_examples_of_a_classifier_are_balanced_over_the_classes(k: int, seed: int, tiny: str) -> None:
    [prompt] = few_shot(tiny, k, seed).preview(pd.DataFrame({"a": ["new"]}))["prompt"]
    answers = [answer for _, answer in shots(prompt)]
    assert answers.count("p") == answers.count("q") == k // 2


def test_examples_of_a_generator_are_drawn_from_all_rows_alike(tiny: str) -> None:
    new = pd.DataFrame({"a": ["new"]})
    answers = [
        answer
        for seed in range(6)
        for _, answer in shots(few_shot(tiny, 4, seed, kind=LLMGenerator).preview(new)["prompt"][0])
    ]
    assert answers.count("p") > answers.count("q")


@pytest.mark.parametrize(("n_rows", "seen"), [(2, 1), (3, 2), (4, 3), (5, 3)])
def test_with_fewer_rows_than_k_and_one_all_others_are_shown(n_rows: int, seen: int, tiny: str) -> None:
    frame = SHOTS.iloc[-n_rows:] if n_rows > 3 else SHOTS.iloc[7 : 7 + n_rows].assign(label=["p", "q", "q"][:n_rows])
    estimator = few_shot(tiny, 3, frame=frame)
    for prompt in estimator.preview(frame, n=n_rows)["prompt"]:
        assert len(shots(prompt)) == seen
    [prompt] = estimator.preview(pd.DataFrame({"a": ["new"]}))["prompt"]
    assert len(shots(prompt)) == seen


def test_a_single_row_has_no_example(tiny: str) -> None:
    with pytest.warns(DataWarning, match=r"1 distinct prompt\(s\): 0 can stand before each row"):
        assert prompts(tiny, {"a": ["x"]}, {"template": "<{a}>", "few_shot": 3}) == ["<x>"]


def test_rows_of_equal_text_are_one_example() -> None:
    contents = [(Segment(text, "a"),) for text in ["x", "x", "y", "x", "z"]]
    drawn = draw_examples(contents, ["1", "2", "3", "4", "5"], FewShot(9), balanced=False)
    assert sorted((example.content[0].text, example.answer) for example in drawn) == [
        ("x", "1"),
        ("y", "3"),
        ("z", "5"),
    ]


@quick
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 9))
def test_drawn_examples_are_k_and_one_rows_as_even_as_the_classes_allow(answers: list[str], k: int, seed: int) -> None:
    contents = [(Segment(f"row {i}", "a"),) for i in range(len(answers))]
    drawn = draw_examples(contents, answers, FewShot(k, seed), balanced=True)
    assert len(drawn) == len({example.content for example in drawn}) == min(k + 1, len(answers))
    assert all(answers[int(example.content[0].text[4:])] == example.answer for example in drawn)
    counts = {answer: sum(example.answer == answer for example in drawn) for answer in set(answers)}
    for one in counts:
        for other in counts:
            assert counts[one] >= counts[other] - 1 or counts[one] == answers.count(one)


# --- the same prompts in fit and in predict -------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """The prompts, as token ids, that reach training and label scoring; nothing is computed."""
    import llmfit.estimators.fitting
    import llmfit.scoring
    from llmfit.callbacks import State

    reached: dict[str, list[tuple[int, ...]]] = {}

    def train(_: Any, rows: Any, *__: Any, **___: Any) -> State:
        reached["fit"] = [row.prompt for row in rows]
        return State(total_steps=1, epochs=1)

    def score_labels(_: Any, rows: Any, labels: Any, **__: Any) -> np.ndarray:
        reached["predict"] = list(rows)
        return np.zeros((len(rows), len(labels)))

    monkeypatch.setattr(llmfit.estimators.fitting, "train", train)
    monkeypatch.setattr(llmfit.scoring, "score_labels", score_labels)
    return reached


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        None,
        "V={a}:\n",
        {"template": "{task} V={a}: ", "task": "T", "system": "S"},
        {"template": "V={a}", "few_shot": 2},
    ],
)
def test_the_model_reads_the_same_prompts_in_fit_and_in_predict(
    template: Any, chat: bool, tiny: str, tiny_chat: str, seen: dict[str, Any]
) -> None:
    model = tiny_chat if chat else tiny
    clf = LLMClassifier(model, target="label", template=template, **FAST).fit(SHOTS)
    clf.predict(SHOTS.assign(label="unread", more=1)[["more", "label", "a"]])
    assert len(seen["fit"]) == len(SHOTS)
    assert seen["predict"] == seen["fit"]


def test_all_that_a_template_refuses_can_be_caught_at_once(tiny: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for template in ("{zzz}", "{a", {"template": "{a}", "task": "t"}):
            with pytest.raises(LLMFitError):
                shown(tiny, {"a": ["x"]}, template)
            with pytest.raises(ValueError, match="template"):
                shown(tiny, {"a": ["x"]}, template)
