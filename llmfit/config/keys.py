"""llmfit's own keys of a configuration: what there is, what each means, and which values it may have.

Takes the estimators' signatures, their docstrings and the dataclasses of what reads as a dict; gives keys that the
checks and the JSON Schema both read. There is no list of keys here: a new parameter is a new key.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from llmfit.estimators import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.exceptions import ParameterError, check_choice, suggest
from llmfit.params import Nested

__all__ = ["ESTIMATORS", "Key", "check_nested", "check_own", "estimator_keys", "own_keys"]

ESTIMATORS: dict[str, type[Any]] = {
    "LLMClassifier": LLMClassifier,
    "LLMRegressor": LLMRegressor,
    "LLMGenerator": LLMGenerator,
    "LLMEstimator": LLMEstimator,
}
ENTRY = re.compile(r"^(\w[\w, ]*?) : (.+?)\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)


class Key(NamedTuple):
    """A key of a configuration.

    Parameters
    ----------
    name : str
    default : any
    annotation : str
        Of the constructor.
    words : str
        What the documentation says of it.
    nested : Nested or None
        How its value reads as a dict, where it does.
    """

    name: str
    default: Any
    annotation: str
    words: str
    nested: Nested | None


@lru_cache(maxsize=1)
def own_keys() -> dict[str, Key]:
    """List every parameter of every estimator, by its name."""
    found: dict[str, Key] = {}
    for estimator in ESTIMATORS:
        found = {**estimator_keys(estimator), **found}
    return found


@lru_cache(maxsize=8)
def estimator_keys(name: str) -> dict[str, Key]:
    """List the parameters of an estimator, by their names."""
    estimator = ESTIMATORS[name]
    words = {**documented(LLMClassifier), **documented(estimator)}
    parameters = [p for p in inspect.signature(estimator).parameters.values() if p.name != "self"]
    return {
        p.name: Key(p.name, p.default, str(p.annotation), words.get(p.name, ""), estimator._nested.get(p.name))
        for p in parameters
    }


def documented(thing: Any) -> dict[str, str]:
    """Read what a numpydoc docstring says of each parameter, as one line."""
    text = inspect.getdoc(thing) or ""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}\n|\Z)", text, re.DOTALL | re.MULTILINE)
    found: dict[str, str] = {}
    for names, kind, words in ENTRY.findall(section[1].rstrip() + "\n" if section else ""):
        for name in names.split(", "):
            found[name] = " ".join(f"{kind}. {words}".split()).replace("``", "").rstrip()
    return found


def check_own(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check a configuration in llmfit's own keys.

    Returns
    -------
    str
        Name of the estimator.
    dict of str to any
        Its parameters.

    Raises
    ------
    ParameterError
        For a key that is unknown, at any depth.
    """
    params = dict(config)
    name = params.pop("estimator", None) or "LLMEstimator"
    check_choice("estimator", "the config", name, list(ESTIMATORS))
    keys = estimator_keys(name)
    for key, value in params.items():
        if key not in keys:
            others = "" if key not in own_keys() else f" {name} has no such parameter."
            raise ParameterError(f"The config has no key {key!r}.{others}{suggest(key, ['estimator', *keys])}")
        check_nested(keys[key], value)
    return name, params


def check_nested(key: Key, value: Any, within: str | None = None) -> None:
    """Raise where a value that is a dict has a key that is unknown; `within` looks on the way to one place only."""
    for place, given, known in _nested_keys(key, value):
        path = f"{place}.{given}"
        if given not in known and (within is None or f"{within}.".startswith(f"{path}.")):
            paths = [f"{place}.{other}" for other in known]
            raise ParameterError(f"The config has no key {path!r}.{suggest(path, paths)}")


def _nested_keys(key: Key, value: Any) -> Iterator[tuple[str, str, list[str]]]:
    """List the keys of a value that is a dict: place, key, and the keys that there are."""
    if key.nested is None or not isinstance(value, Mapping):
        return
    known = list(key.nested.defaults(value))
    if known:  # none: the value's kind is unknown, which the sentence of its own check tells better
        yield from ((key.name, str(given), known) for given in value)
    few_shot = value.get("few_shot")
    if key.name == "template" and isinstance(few_shot, Mapping):
        from dataclasses import fields

        from llmfit.templates import FewShot

        yield from (("template.few_shot", str(given), [f.name for f in fields(FewShot)]) for given in few_shot)
