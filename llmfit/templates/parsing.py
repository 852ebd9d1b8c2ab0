"""Template strings to parts: fields are exact column names, checked against the frame once.

Takes a :class:`TemplateConfig` and the names of columns; gives a :class:`Template`. No attribute, index or conversion
is ever evaluated; a cell is substituted once and never read as a template.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterator, Sequence

from llmfit.exceptions import TemplateError, quoted, suggest
from llmfit.features import Feature
from llmfit.templates.config import TemplateConfig
from llmfit.templates.rendering import DATE_SPEC, INTEGER_TYPES, PLAIN, Field, Part, Segment, Template

__all__ = ["SAMPLE", "compile_template", "field_names", "merge_parts"]

SAMPLE = "__sample__"
TASKS = ("task", "__task__")
NUMBER_SPEC = re.compile(r"(?:[^{}]?[<>=^])?[-+ ]?z?#?0?\d{0,2}[,_]?(?:\.\d{1,2})?[bdeEfFgGnoxX%]?")


def _parse(text: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield (literal, whole field text or None, field name); the braces that are text already undone."""
    try:
        for literal, name, spec, conversion in string.Formatter().parse(text):
            whole = None
            if name is not None:
                whole = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            yield literal, whole, name or ""
    except ValueError as error:
        raise TemplateError(
            f"The template {text!r} cannot be read: {error}. Write {{{{ and }}}} for braces that are text."
        ) from None


def field_names(text: str, columns: Collection[str]) -> list[str]:
    """List the columns that a template string reads, as far as the frame has them, in its order."""
    names = (_split_field(whole, columns)[0] for _, whole, _ in _parse(text) if whole is not None)
    return [name for name in dict.fromkeys(names) if name in columns or name == SAMPLE]


def _split_field(whole: str, columns: Collection[str]) -> tuple[str, str]:
    """Part ``name:spec``, unless all of it is the name of a column, or a column's name has a colon."""
    if whole in columns:
        return whole, ""
    name, _, spec = whole.rpartition(":")
    if name not in columns:
        name, _, spec = whole.partition(":")
    return name, spec


def compile_template(
    config: TemplateConfig,
    features: Sequence[Feature],
    target: str | Sequence[str],
    columns: Collection[str],
    default_task: str | None = None,
) -> Template:
    """Resolve a template against the columns of a frame.

    Parameters
    ----------
    config : TemplateConfig
    features : sequence of Feature
        The columns a prompt may use.
    target : str or sequence of str
        Names of the answers; the default template ends with the first, no template may read one.
    columns : collection of str
        Every column of the frame, for the sentences.
    default_task : str or None
        Stands in where the config has no task but its template, or the default one, wants one.

    Raises
    ------
    TemplateError
        If a field is no feature, is the target, reads an attribute or an index, or carries a format that is
        none of numbers; or if the task is given and never used.
    """
    names, targets = [feature.name for feature in features], [target] if isinstance(target, str) else target
    task: str | Segment | None = config.task
    if task is None and default_task is not None:
        task = Segment(default_task, PLAIN)  # labels are in it: they stay text, whatever they spell
    if config.template is None:
        parts = _default_parts(task, names, targets[0])
    else:
        parts = list(_compile_parts(config, task, names, targets, columns))
        _check_task_used(config, columns)
    return Template(merge_parts(parts), config.na_rep)


def _default_parts(task: str | Segment | None, names: Sequence[str], target: str) -> list[Part]:
    opening: list[Part] = [task, "\n\n"] if task else []
    return [*opening, *_sample_parts(names, label=True), "\n\n", Segment(target, PLAIN), ":"]


def _sample_parts(names: Sequence[str], *, label: bool) -> list[Part]:
    """One ``name: value`` line a column; a single column may go without its name."""
    if len(names) == 1 and not label:
        return [Field(names[0])]
    lines: list[Part] = []
    for i, name in enumerate(names):
        lines += ["\n" if i else "", Segment(name, PLAIN), ": ", Field(name)]
    return lines


def _compile_parts(
    config: TemplateConfig,
    task: str | Segment | None,
    names: Sequence[str],
    targets: Sequence[str],
    columns: Collection[str],
) -> Iterator[Part]:
    for literal, whole, _ in _parse(config.template or ""):
        yield literal
        if whole is None:
            continue
        name, spec = _split_field(whole, names)
        if name in TASKS and not (name in names and config.task is None):
            yield _task_text(name, task, names)
        elif name == SAMPLE:
            yield from _sample_parts(names, label=False)
        elif name in names:
            yield Field(name, _check_spec(name, spec))
        else:
            raise _unknown_field(name, names, targets, columns)


def _task_text(name: str, task: str | Segment | None, names: Sequence[str]) -> Part:
    if task is None:
        raise TemplateError(f"The template uses {{{name}}}, but no task is given: add 'task' to the template.")
    if name in names:
        raise TemplateError(
            f"{{{name}}} could be the task or the column {name!r}: write {{__task__}} for the task, "
            "or rename the column."
        )
    return task


def _check_spec(name: str, spec: str) -> str:
    if not spec or DATE_SPEC.search(spec):  # whether it is a date, rows tell
        return spec
    try:
        if not NUMBER_SPEC.fullmatch(spec):
            raise ValueError
        format(1 if spec[-1] in INTEGER_TYPES else 1.0, spec)
    except ValueError:
        raise TemplateError(
            f"The template formats {name!r} as {spec!r}, which is no format of a number (such as .2f or 03d) or a "
            "date (such as %d.%m.%Y)."
        ) from None
    return spec


def _unknown_field(name: str, names: Sequence[str], targets: Sequence[str], columns: Collection[str]) -> TemplateError:
    owner = re.split(r"[.\[!]", name)[0]
    if name in targets:
        return TemplateError(f"The template reads the target column {name!r}, which is what it must predict.")
    if not name:
        return TemplateError("The template has an empty {}: name a column in it, or write {{}} for text.")
    if owner in names and owner != name:
        return TemplateError(
            f"The template reads {{{name}}}, an attribute, index or conversion of {owner!r}: "
            "a field is the exact name of a column."
        )
    if name in columns:
        return TemplateError(
            f"The template uses the column {name!r}, which is not among the features {quoted(names)}. Add it."
        )
    return TemplateError(
        f"The template uses {{{name}}}, but the columns are {quoted(names)}.{suggest(name, names)} "
        "Write {{ and }} for braces that are text."
    )


def _check_task_used(config: TemplateConfig, columns: Collection[str]) -> None:
    wanted = {_split_field(whole, columns)[0] for _, whole, _ in _parse(config.template or "") if whole}
    if config.task is not None and not wanted & set(TASKS):
        raise TemplateError("The task is given, but the template never uses it: write {task} where it belongs.")


def merge_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join neighbouring texts and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    return tuple(merged) or ("",)
