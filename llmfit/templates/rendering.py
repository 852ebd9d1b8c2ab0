"""Rows to segments: what a resolved template does with a frame.

Takes formatted columns; gives, for each row, a tuple of :class:`Segment` that can be printed before any token exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from llmfit.dates import as_date
from llmfit.exceptions import TemplateError
from llmfit.features import Feature, row_name

__all__ = ["PLAIN", "Example", "Field", "Frame", "Segment", "Template", "segments_text"]

INTEGER_TYPES = "bdnoxX"
DATE_SPEC = re.compile(r"%[a-zA-Z]")
PLAIN = "<plain>"  # stands for a column where text of the data is no cell: answers, labels, names


class Segment(NamedTuple):
    """A piece of a prompt; `column` names the cell it comes from, None is the template's own text."""

    text: str
    column: str | None = None


@dataclass(frozen=True)
class Field:
    """A place in a template where a column's value goes, with a format spec for numbers or dates."""

    column: str
    spec: str = ""


Part = str | Segment | Field  # the template's own text, text of the data, the place of a cell


class Example(NamedTuple):
    """A worked example: a rendered prompt, its answer, and the cues and answers behind it where there are several."""

    content: tuple[Segment, ...]
    answer: str
    later: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The text around a row: what stands before, between and after examples and prompt.

    Parameters
    ----------
    literals : tuple of str
        For k examples 2k + 2 texts: example k is ``literals[2k] prompt literals[2k + 1] answer``; the row's own
        prompt stands between the last two.
    lead : str
        White space that opens the answer, as tokenizers want it there and not at the prompt's end.
    closing : str
        What the chat template puts behind an answer; "" where the end-of-text token closes it.
    chat : bool
    """

    literals: tuple[str, ...]
    lead: str
    closing: str = ""
    chat: bool = False


@dataclass(frozen=True)
class Template:
    """A template resolved against a frame: renders rows, with all that `fit` learned for it."""

    parts: tuple[Part, ...]
    na_rep: str = ""
    frame: Frame = field(default_factory=lambda: Frame(("", ""), " "))
    examples: tuple[Example, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, in its order."""
        return tuple(dict.fromkeys(part.column for part in self.parts if isinstance(part, Field)))

    def contents(self, table: pd.DataFrame, features: Sequence[Feature]) -> list[tuple[Segment, ...]]:
        """Render each row by itself, without examples or chat markup.

        Parameters
        ----------
        table : pandas.DataFrame of shape (n_rows, n_columns)
        features : sequence of Feature
            At least those that the template reads.

        Returns
        -------
        list of tuple of Segment, length n_rows

        Raises
        ------
        TemplateError
            If a format meets a value of another kind; the row is named.
        """
        by_name = {feature.name: feature for feature in features}
        columns = [self._format(part, table, by_name) for part in self.parts]
        return [tuple(row) for row in zip(*columns, strict=True)]

    def _format(self, part: Part, table: pd.DataFrame, features: Mapping[str, Feature]) -> list[Segment]:
        if not isinstance(part, Field):
            return [part if isinstance(part, Segment) else Segment(part)] * len(table)
        column, feature = table[part.column], features[part.column]
        texts = feature.format(column, self.na_rep)
        if part.spec:
            for row in map(int, np.flatnonzero(column.notna().to_numpy())):
                if feature.kind == "date":
                    texts[row] = _format_date(texts[row], part)
                else:
                    texts[row] = _format_number(texts[row], part, row, column.index)
        return [Segment(text, part.column) for text in texts]

    def prompt(self, content: tuple[Segment, ...], shown: Sequence[Example] | None = None) -> tuple[Segment, ...]:
        """Set a rendered row into its frame, behind examples: those given, or the first that are not the row itself."""
        k = (len(self.frame.literals) - 2) // 2
        own = segments_text(content)
        others = shown or [example for example in self.examples if segments_text(example.content) != own][:k]
        literals = iter(self.frame.literals)
        pieces: list[Segment] = []
        for example in others:
            pieces += [Segment(next(literals)), *example.content, Segment(next(literals))]
            pieces += [Segment(example.answer, PLAIN), *example.later]
        pieces += [Segment(next(literals)), *content, Segment(next(literals))]
        return tuple(piece for piece in pieces if piece.text)

    def completion(self, answer: str) -> str:
        """Write the completion of a row: the answer behind the white space that leads to it."""
        return self.frame.lead + answer


def segments_text(segments: Sequence[Segment]) -> str:
    """Join segments into the text that they stand for."""
    return "".join(segment.text for segment in segments)


def _format_number(text: str, part: Field, row: int, index: pd.Index) -> str:
    for read in (int, float, _whole):  # an int stays one, exactly; 2.0 is one where the format wants one
        try:
            number = read(text)
            if math.isfinite(number):
                return format(number, part.spec)
        except (ValueError, OverflowError):
            continue
    raise TemplateError(
        f"{row_name(row, index)}: the template formats {part.column!r} as {part.spec!r}, but its value is {text!r}."
        + (f" Is it a date? Say so: features={{{part.column!r}: 'date'}}." if DATE_SPEC.search(part.spec) else "")
    )


def _format_date(text: str, part: Field) -> str:
    if not DATE_SPEC.search(part.spec):
        raise TemplateError(
            f"The template formats {part.column!r} as {part.spec!r}, but it is a date, which takes a format such as "
            "%d.%m.%Y."
        )
    try:
        return format(as_date(text), part.spec)
    except ValueError:  # of a year that strftime does not know
        raise TemplateError(
            f"The template formats {part.column!r} as {part.spec!r}, which the date {text!r} cannot take."
        ) from None


def _whole(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)
