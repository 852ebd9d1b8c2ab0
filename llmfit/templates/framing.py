"""What stands around a row: chat templates, plain text, few-shot examples.

Takes a chat template as a function from messages to text; knows no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from llmfit.exceptions import TemplateError
from llmfit.templates.config import FewShot
from llmfit.templates.parsing import merge_parts
from llmfit.templates.rendering import Example, Frame, Segment, Template, segments_text

__all__ = ["chat_frame", "draw_examples", "plain_frame"]

SYSTEM = "\ue000system\ue001"  # stands for the system message while a chat template is rendered
RenderChat = Callable[[list[dict[str, str]], bool], str]


def plain_frame(template: Template, system: str | None, k: int) -> tuple[Template, Frame]:
    """Frame prompts without a chat template.

    White space at the template's end moves to the front of the answer, where tokenizers keep it; a template
    that ends in none keeps the frame's, which is one space unless white space was moved before.

    Returns
    -------
    Template
        Without the white space.
    Frame
    """
    *front, last = template.parts
    if isinstance(last, str):
        stripped = last.rstrip()
        lead, parts = last[len(stripped) :] or template.frame.lead, merge_parts([*front, stripped])
    else:
        lead, parts = template.frame.lead, template.parts
    before = f"{system}\n\n" if system else ""
    literals = (before, *[lead, "\n\n"] * k, "")
    return Template(parts, template.na_rep), Frame(literals, lead)


def chat_frame(render_chat: RenderChat, system: str | None, k: int) -> Frame:
    """Frame prompts with a chat template, rendered once with marks in place of the rows.

    Parameters
    ----------
    render_chat : callable (messages, add_generation_prompt) -> str
    system : str or None
    k : int
        Worked examples before each prompt.

    Raises
    ------
    TemplateError
        If the chat template cannot be rendered, or changes or repeats what is in a message.
    """
    marks = [f"\ue000{i}\ue001" for i in range(2 * k + 2)]
    turns = [{"role": ("user", "assistant")[i % 2], "content": mark} for i, mark in enumerate(marks)]
    for messages in _with_system(turns, system is not None and system != ""):
        try:
            text = render_chat(messages[:-1], True)
            closed = render_chat(messages, False)
        except Exception as error:  # jinja raises whatever the template's author chose
            failure = error
            continue
        if all(text.count(mark) == 1 for mark in (*marks[:-1], *([SYSTEM] if system else []))):
            literals = re.split("\ue000\\d+\ue001", text.replace(SYSTEM, system or ""))
            return Frame(tuple(literals), "", closed.partition(marks[-1])[2], chat=True)
        failure = TemplateError("it changes, drops or repeats the text of a message")
    raise TemplateError(f"The tokenizer's chat template cannot be used: {failure}. Set chat=False in 'template'.")


def _with_system(turns: list[dict[str, str]], wanted: bool) -> Iterator[list[dict[str, str]]]:
    """Try a system message first, then its text at the head of the first user message."""
    if not wanted:
        yield turns
        return
    yield [{"role": "system", "content": SYSTEM}, *turns]
    first = {"role": "user", "content": f"{SYSTEM}\n\n{turns[0]['content']}"}
    yield [first, *turns[1:]]


def draw_examples(
    contents: Sequence[tuple[Segment, ...]], answers: Sequence[str], few_shot: FewShot, *, balanced: bool
) -> tuple[Example, ...]:
    """Draw k worked examples and one in reserve, for the row that is among them; with retrieval, take them all.

    Parameters
    ----------
    contents, answers : sequences of length n_rows
    few_shot : FewShot
    balanced : bool
        Take the distinct answers in turn, as classes want it.

    Returns
    -------
    tuple of Example, length k + 1, or all distinct rows where there are fewer
    """
    distinct = {segments_text(content): i for i, content in reversed(list(enumerate(contents)))}
    if few_shot.retrieval is not None:  # every row has its own: all that differ stay
        pairs = dict.fromkeys((tuple(content), answer) for content, answer in zip(contents, answers, strict=True))
        return tuple(Example(*pair) for pair in pairs)
    rows = np.random.default_rng(few_shot.seed).permutation(sorted(distinct.values()))
    if balanced:
        rank = pd.Series([answers[row] for row in rows]).pipe(lambda s: s.groupby(s).cumcount())
        rows = rows[np.argsort(rank.to_numpy(), kind="stable")]
    return tuple(Example(tuple(contents[row]), answers[row]) for row in rows[: few_shot.k + 1])
