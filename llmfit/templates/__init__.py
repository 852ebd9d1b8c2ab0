"""Rows become prompts: template strings over columns, chat frames and few-shot examples.

Takes a template as the user wrote it and columns of a frame; gives, for each row, segments of text. Knows no tokenizer
and no torch.
"""

from llmfit.templates.config import FewShot, TemplateConfig, resolve_template
from llmfit.templates.framing import chat_frame, draw_examples, plain_frame
from llmfit.templates.parsing import SAMPLE, compile_template, field_names
from llmfit.templates.rendering import PLAIN, Example, Field, Frame, Part, Segment, Template, segments_text

__all__ = [
    "PLAIN",
    "SAMPLE",
    "Example",
    "FewShot",
    "Field",
    "Frame",
    "Part",
    "Segment",
    "Template",
    "TemplateConfig",
    "chat_frame",
    "compile_template",
    "draw_examples",
    "field_names",
    "plain_frame",
    "resolve_template",
    "segments_text",
]
