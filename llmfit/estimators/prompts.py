"""What `fit` learns of a frame before any training: features, template, answers' names, limits.

Takes frames and the resolved parameters; gives encoded rows. This is where pandas ends: beyond it there are token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from llmfit.base_model import BaseModel
from llmfit.encoding import Encoded, Encoder, Limit
from llmfit.exceptions import DataWarning, TruncationWarning, quoted, warn
from llmfit.features import Feature, check_columns, resolve_features
from llmfit.templates import (
    SAMPLE,
    Segment,
    Template,
    TemplateConfig,
    chat_frame,
    compile_template,
    draw_examples,
    field_names,
    plain_frame,
)

__all__ = ["Prompts", "learn_prompts"]


@dataclass(frozen=True)
class Prompts:
    """How the rows of a frame become token ids.

    Parameters
    ----------
    features : tuple of Feature
    target : str
        Name of the answer.
    template : Template
    limit : Limit
    """

    features: tuple[Feature, ...]
    target: str
    template: Template
    limit: Limit

    def select(self, frame: pd.DataFrame, owner: str) -> pd.DataFrame:
        """Take the feature columns of a frame; others, the target among them, are not read."""
        names = [feature.name for feature in self.features]
        check_columns(names, frame, owner)
        return frame[names]

    def segments(self, frame: pd.DataFrame) -> list[tuple[Segment, ...]]:
        """Render the prompt of every row."""
        return [self.template.prompt(row) for row in self.template.contents(frame, self.features)]

    def encoder(self, base: BaseModel) -> Encoder:
        """Make the encoder that these prompts need."""
        frame = self.template.frame
        return Encoder(base.tokenizer, chat=frame.chat, closing=frame.closing, whole=base.kind != "decoder")

    def encode(
        self,
        base: BaseModel,
        frame: pd.DataFrame,
        answers: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[Encoded]:
        """Encode the rows of a frame, and warn once where prompts were cut."""
        completions = None if answers is None else [self.template.completion(text) for text in answers]
        rows = self.encoder(base).encode(
            self.segments(frame), completions, self.limit, weights=weights, names=list(frame.index)
        )
        cut = [row for row in rows if row.cut]
        if cut:
            warn(
                TruncationWarning(
                    f"{len(cut)} of {len(rows)} prompts were cut to max_length {self.limit.max_length} tokens, "
                    f"{sum(row.cut for row in cut)} characters in all. preview() shows them."
                ),
            )
        return rows


def learn_prompts(
    base: BaseModel,
    config: TemplateConfig,
    features: Any,
    frame: pd.DataFrame,
    target: str,
    limit: Limit,
    *,
    owner: str,
    default_task: str | None = None,
) -> Prompts:
    """Resolve features and template against a frame and a base model.

    Parameters
    ----------
    base : BaseModel
    config : TemplateConfig
    features : any accepted spelling of `features`
    frame : pandas.DataFrame
        With or without the target column.
    target : str
    limit : Limit
    owner : str
        Name of the estimator, for the sentences.
    default_task : str or None
        See :func:`~llmfit.templates.compile_template`.
    """
    columns = [name for name in frame.columns if name != target]
    named = field_names(config.template, columns) if config.template is not None else []
    if features is None and named and SAMPLE not in named:
        features = named
    known = resolve_features(features, frame, target, owner)
    template = compile_template(config, known, target, columns, default_task)
    _warn_unused(known, template)
    return Prompts(known, target, _framed(base, config, template, 0), limit)


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
    answers: Sequence[str],
    *,
    balanced: bool,
) -> Prompts:
    """Draw the few-shot examples, where the template wants any, out of the fitted rows."""
    if config.few_shot is None:
        return _apart(base, prompts)
    contents = prompts.template.contents(frame, prompts.features)
    examples = draw_examples(contents, answers, config.few_shot, balanced=balanced)
    shown = max(len(examples) - 1, 0)
    if shown < config.few_shot.k:
        sentence = (
            f"few_shot asks for {config.few_shot.k} worked examples, but the rows have {len(examples)} distinct "
            f"prompt(s): {shown} can stand before each row, which is never its own example."
        )
        warn(DataWarning(sentence))
    template = _framed(base, config, prompts.template, shown)
    return _apart(base, replace(prompts, template=replace(template, examples=examples)))


def _apart(base: BaseModel, prompts: Prompts) -> Prompts:
    """Where answers are texts of their own, beside the prompt, take the white space away that leads to them."""
    if base.kind != "encoder-decoder":
        return prompts
    template = prompts.template
    return replace(prompts, template=replace(template, frame=replace(template.frame, lead="")))
