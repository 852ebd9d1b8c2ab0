"""What `fit` learns of a frame before any training: features, template, answers' names, limits.

Takes frames and the resolved parameters; gives encoded rows. This is where pandas ends: beyond it there are token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from llmfit.base_model import BaseModel
from llmfit.encoding import Answer, Encoded, Encoder, Ids, Limit
from llmfit.estimators.retrieval import Retrieval, learn_retrieval
from llmfit.exceptions import DataWarning, TruncationWarning, counted, quoted, warn
from llmfit.features import Feature, check_columns, resolve_features
from llmfit.templates import (
    PLAIN,
    SAMPLE,
    Example,
    Segment,
    Template,
    TemplateConfig,
    chat_frame,
    compile_template,
    draw_examples,
    field_names,
    plain_frame,
    segments_text,
)

__all__ = ["Prompts", "Turn", "learn_prompts", "with_examples"]


class Turn(NamedTuple):
    """One of several answers to a row.

    Parameters
    ----------
    cue : tuple of Segment
        What stands before the answer, and behind the one before it; () for the first.
    share : float
        What the loss of each of the answer's tokens weighs.
    """

    cue: tuple[Segment, ...]
    share: float


@dataclass(frozen=True)
class Prompts:
    """How the rows of a frame become token ids.

    Parameters
    ----------
    features : tuple of Feature
    target : str
        Name of the answer, or of the first.
    template : Template
    limit : Limit
    turns : tuple of Turn
        Of every answer, where a row has several; () where it has one.
    retrieval : Retrieval or None
        How the examples before a row are chosen, where each row has its own.
    """

    features: tuple[Feature, ...]
    target: str
    template: Template
    limit: Limit
    turns: tuple[Turn, ...] = ()
    retrieval: Retrieval | None = None

    def select(self, frame: pd.DataFrame, owner: str) -> pd.DataFrame:
        """Take the feature columns of a frame; others, the target among them, are not read."""
        names = [feature.name for feature in self.features]
        check_columns(names, frame, owner)
        return frame[names]

    def segments(self, base: BaseModel, frame: pd.DataFrame) -> list[tuple[Segment, ...]]:
        """Render the prompt of every row, which is never among its own examples."""
        contents = self.template.contents(frame, self.features)
        if self.retrieval is None:
            return [self.template.prompt(row) for row in contents]
        shown = self.retrieval.choose(base, self.template.examples, contents)
        return [self.template.prompt(row, own) for row, own in zip(contents, shown, strict=True)]

    def encoder(self, base: BaseModel) -> Encoder:
        """Make the encoder that these prompts need."""
        frame = self.template.frame
        return Encoder(base.tokenizer, chat=frame.chat, closing=frame.closing, whole=base.kind != "decoder")

    def encode(
        self,
        base: BaseModel,
        frame: pd.DataFrame,
        answers: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[Encoded]:
        """Encode the rows of a frame, and warn once where prompts were cut.

        An answer is a text, or a tuple of texts where a row has several.
        """
        encoder = self.encoder(base)
        completions: Any = None
        if answers is not None and self.turns:
            completions = [self._in_turn(pieces) for pieces in self.pieces(encoder, answers)]
        elif answers is not None:
            completions = [self.template.completion(text) for text in answers]
        prompts = self.segments(base, frame)
        rows = encoder.encode(prompts, completions, self.limit, weights=weights, names=list(frame.index))
        cut = [row for row in rows if row.cut]
        of, characters = (
            f" prompts were cut to max_length {self.limit.max_length} tokens, ",
            sum(row.cut for row in cut),
        )
        more = " characters in all. preview() shows them."
        warn(counted(TruncationWarning, len(cut), " of ", len(rows), of, characters, more))
        return rows

    def pieces(self, encoder: Encoder, answers: Sequence[tuple[str, ...]]) -> list[list[Ids]]:
        """Encode several answers a row: for each, its cue and the closed answer, one behind the other."""
        cues = [encoder.cue(turn.cue) if turn.cue else () for turn in self.turns]
        closed = iter(encoder.closed([self.template.completion(text) for row in answers for text in row]))
        return [[piece for cue in cues for piece in (cue, next(closed))] for _ in answers]

    def _in_turn(self, pieces: Sequence[Ids]) -> Answer:
        """Join cues, which carry no loss, and answers into one completion."""
        shares = [share for turn in self.turns for share in (0.0, turn.share)]
        return Answer(
            tuple(token for piece in pieces for token in piece),
            tuple(share for share, piece in zip(shares, pieces, strict=True) for _ in piece),
        )


def learn_prompts(
    base: BaseModel,
    config: TemplateConfig,
    features: Any,
    frame: pd.DataFrame,
    target: str | Sequence[str],
    limit: Limit,
    *,
    owner: str,
    default_task: str | None = None,
    shares: Sequence[float] = (),
) -> Prompts:
    """Resolve features and template against a frame and a base model.

    Parameters
    ----------
    base : BaseModel
    config : TemplateConfig
    features : any accepted spelling of `features`
    frame : pandas.DataFrame
        With or without the target column.
    target : str or sequence of str
    limit : Limit
    owner : str
        Name of the estimator, for the sentences.
    default_task : str or None
        See :func:`~llmfit.templates.compile_template`.
    shares : sequence of float
        Of the loss, for every target where several are answered in words one behind the other.
    """
    targets = [target] if isinstance(target, str) else list(target)
    columns = [name for name in frame.columns if name not in targets]
    named = field_names(config.template, columns) if config.template is not None else []
    if features is None and named and SAMPLE not in named:
        features = named
    known = resolve_features(features, frame, targets, owner)
    template = compile_template(config, known, targets, columns, default_task)
    _warn_unused(known, template)
    framed = _framed(base, config, template, 0)
    turns = _turns(base, config, framed, targets, shares) if shares else ()
    return Prompts(known, targets[0], framed, limit, turns)


def _turns(
    base: BaseModel, config: TemplateConfig, template: Template, targets: Sequence[str], shares: Sequence[float]
) -> tuple[Turn, ...]:
    """Say what asks for each target behind the answer before it: a turn of its own in a chat."""
    before, behind = Segment("\n\n"), Segment("")
    if template.frame.chat:
        _, _, *between = chat_frame(base.render_chat, config.system, 1).literals
        before, behind = map(Segment, between)
    cues = [(before, Segment(f"{name}:", PLAIN), behind) for name in targets[1:]]
    return tuple(Turn(cue, share) for cue, share in zip([(), *cues], shares, strict=True))


def _warn_unused(features: Sequence[Feature], template: Template) -> None:
    unused = [feature.name for feature in features if feature.name not in template.columns]
    if unused:
        warn(
            DataWarning(f"The template does not use the features {quoted(unused)}: the model will not see them."),
        )


def _framed(base: BaseModel, config: TemplateConfig, template: Template, k: int) -> Template:
    """Put the chat template, or plain text, around a template."""
    if config.chat is True or (config.chat == "auto" and base.has_chat_template):
        return replace(template, frame=chat_frame(base.render_chat, config.system, k))
    stripped, frame = plain_frame(template, config.system, k)
    return replace(stripped, frame=frame)


def with_examples(
    base: BaseModel,
    prompts: Prompts,
    config: TemplateConfig,
    frame: pd.DataFrame,
    answers: Sequence[Any],
    *,
    balanced: bool,
) -> Prompts:
    """Draw the few-shot examples, where the template wants any, out of the fitted rows.

    An answer is a text, or a tuple of texts where a row has several.
    """
    if config.few_shot is None:
        return _apart(base, prompts)
    contents = prompts.template.contents(frame, prompts.features)
    examples = draw_examples(contents, answers, config.few_shot, balanced=balanced)
    distinct = len({segments_text(example.content) for example in examples})
    shown = min(max(distinct - 1, 0), config.few_shot.k)
    if shown < config.few_shot.k:
        sentence = (
            f"few_shot asks for {config.few_shot.k} worked examples, but the rows have {distinct} distinct "
            f"prompt(s): {shown} can stand before each row, which is never its own example."
        )
        warn(DataWarning(sentence))
    if prompts.turns:
        examples = tuple(_with_later(example, prompts) for example in examples)
    template = _framed(base, config, prompts.template, shown)
    retrieval = learn_retrieval(config.few_shot, base, shown) if shown else None
    return _apart(base, replace(prompts, template=replace(template, examples=examples), retrieval=retrieval))


def _with_later(example: Example, prompts: Prompts) -> Example:
    """Write the answers of an example behind one another, each behind its cue."""
    answers: tuple[str, ...] = tuple(example.answer)
    lead = () if prompts.template.frame.chat else (Segment(prompts.template.frame.lead),)
    turns = zip(prompts.turns[1:], answers[1:], strict=True)
    later = [piece for turn, answer in turns for piece in (*turn.cue, *lead, Segment(answer, PLAIN))]
    return Example(example.content, answers[0], tuple(later))


def _apart(base: BaseModel, prompts: Prompts) -> Prompts:
    """Where answers are texts of their own, beside the prompt, take the white space away that leads to them."""
    if base.kind != "encoder-decoder":
        return prompts
    template = prompts.template
    return replace(prompts, template=replace(template, frame=replace(template.frame, lead="")))
