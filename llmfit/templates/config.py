"""The `template` parameter in every spelling, as one checked :class:`TemplateConfig`."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmfit.exceptions import check_choice, check_int, check_keys, parameter_error

__all__ = ["FewShot", "TemplateConfig", "resolve_template"]


@dataclass(frozen=True)
class FewShot:
    """How many worked examples of the fitted rows stand before each prompt, and which.

    Parameters
    ----------
    k : int
    seed : int
        Draws them, where they are drawn.
    retrieval : None, "random" or "semantic"
        None shows the same examples before every row, "random" draws others for each, "semantic" takes those most like
        it.
    model : None, str or path
        With "semantic", the model whose vectors are compared; None is the base model itself.
    """

    k: int = 3
    seed: int = 0
    retrieval: str | None = None
    model: Any = None


@dataclass(frozen=True)
class TemplateConfig:
    """The `template` parameter with every shorthand spelled out.

    Parameters
    ----------
    task : str or None
        What the model is to do; goes where the template says ``{task}``.
    template : str or None
        Text with ``{column}`` fields; None writes one ``name: value`` line a column.
    system : str or None
        System message of a chat, or text before everything else.
    chat : "auto" or bool
        Use the tokenizer's chat template; "auto" uses it where there is one.
    few_shot : FewShot or None
    na_rep : str
        Stands for a missing value.
    """

    task: str | None = None
    template: str | None = None
    system: str | None = None
    chat: str | bool = "auto"
    few_shot: FewShot | None = None
    na_rep: str = ""


def resolve_template(value: Any) -> TemplateConfig:
    """Turn every spelling of the `template` parameter into a :class:`TemplateConfig`.

    Parameters
    ----------
    value : None, str, dict or TemplateConfig

    Raises
    ------
    ParameterError
        If a key is unknown or a value is of the wrong type.
    """
    if isinstance(value, TemplateConfig):
        value = vars(value)
    if value is None or isinstance(value, str):
        return TemplateConfig(template=value)
    if not isinstance(value, Mapping):
        raise parameter_error("template", "the estimator", "None, a str or a dict", value)
    check_keys("template", value, [f.name for f in fields(TemplateConfig)])
    for name in ("task", "template", "system", "na_rep"):
        if name in value and not (isinstance(value[name], str) or (value[name] is None and name != "na_rep")):
            raise parameter_error(name, "template", "a str", value[name])
    chat = value.get("chat", "auto")
    if not (isinstance(chat, bool) or chat == "auto"):
        raise parameter_error("chat", "template", "'auto', True or False", chat)
    return TemplateConfig(**{**value, "few_shot": _resolve_few_shot(value.get("few_shot"))})


def _resolve_few_shot(value: Any) -> FewShot | None:
    if value is None:
        return None
    value = vars(value) if isinstance(value, FewShot) else value
    value = {"k": value} if isinstance(value, numbers.Integral) else value
    if not isinstance(value, Mapping):
        raise parameter_error("few_shot", "template", "None, an int or a dict of k, seed, retrieval and model", value)
    check_keys("few_shot", value, [f.name for f in fields(FewShot)])
    spec = FewShot(**value)
    check_choice("retrieval", "few_shot", spec.retrieval, RETRIEVALS)
    if not (spec.model is None or isinstance(spec.model, str | os.PathLike)):
        raise parameter_error("model", "few_shot", "None, a name or a path", spec.model)
    if spec.model is not None and spec.retrieval != "semantic":
        raise parameter_error("model", "few_shot", "None unless retrieval is 'semantic'", spec.model)
    k, seed = check_int("k", "few_shot", spec.k, least=1), check_int("seed", "few_shot", spec.seed, least=0)
    return FewShot(k, seed, spec.retrieval, spec.model)


RETRIEVALS = (None, "random", "semantic")
