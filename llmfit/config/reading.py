"""Configurations as dicts: from files of YAML or JSON, several merged, keys with dots spelled out.

Takes dicts, paths, or a list of them; gives one plain dict, and writes one as YAML. Knows no single key.
YAML is read as version 1.2 has it: ``1e-4`` is a number, and ``yes``, ``no``, ``on`` and ``off`` are words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmfit.exceptions import ParameterError, parameter_error, reason

__all__ = ["merge", "read_config", "read_value", "to_yaml", "with_path"]


Put = Callable[[Mapping[str, Any], str, Any], dict[str, Any]]


def read_config(source: Any, put: Put | None = None) -> dict[str, Any]:
    """Read one configuration, or several, of which later ones win.

    Parameters
    ----------
    source : dict, path, or list of them
        Files end in .yaml, .yml or .json. Top-level keys may have dots: ``{"adapter.r": 8}`` is
        ``{"adapter": {"r": 8}}``.
    put : callable (config, path, value) -> dict, default=None
        Says what a key with dots means; None is :func:`with_path`.

    Raises
    ------
    ParameterError
        If a file cannot be read, or holds no mapping.
    """
    merged: dict[str, Any] = {}
    for one in source if isinstance(source, list | tuple) else [source]:
        merged = _added(merged, _read_one(one), put or with_path)
    return merged


def _read_one(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        content: Any = source
    elif isinstance(source, str | os.PathLike):
        content = _read_file(Path(source).expanduser())
    else:
        raise parameter_error("config", "from_config", "a dict, the path of a file, or a list of them", source)
    for key in content:
        if not isinstance(key, str):  # YAML may have any
            raise ParameterError(f"The keys of a config must be texts. Got {key!r} instead.")
    found: Mapping[str, Any] = content
    return found


def _read_file(path: Path) -> Any:
    if path.suffix.lower() not in READERS:
        raise ParameterError(f"The config {str(path)!r} must be a file that ends in one of {', '.join(READERS)}.")
    try:
        content = READERS[path.suffix.lower()](path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ParameterError(f"The config {str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (ValueError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        said = getattr(error, "problem", None) or reason(error)
        raise ParameterError(f"The config {str(path)!r} cannot be read{line}: {said}.") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ParameterError(f"The config {str(path)!r} must hold keys and values, not a {type(content).__name__}.")
    return content


def _added(merged: dict[str, Any], config: Mapping[str, Any], put: Put) -> dict[str, Any]:
    """Merge a configuration into others: plain keys first, so that paths add to them."""
    whole: dict[str, Any] = merge(merged, {key: value for key, value in config.items() if "." not in key})
    for key, value in config.items():
        if "." in key:
            whole = put(whole, key, value)
    return whole


def with_path(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set the value at a path with dots, copying what lies on the way; a number takes an item of a list.

    A name or a number that stands where a mapping is wanted becomes its "type".
    """
    head, _, rest = path.partition(".")
    found = config.get(head)
    if not rest:
        return {**config, head: merge(found, value) if isinstance(found, Mapping) else value}
    if isinstance(found, list):
        return {**config, head: _with_item(found, rest, value, head)}
    if found is None or isinstance(found, Mapping):
        inside: Mapping[str, Any] = found or {}
    else:
        inside = {SHORTHANDS.get(head, "type"): found}
    return {**config, head: with_path(inside, rest, value)}


def _with_item(items: list[Any], path: str, value: Any, place: str) -> list[Any]:
    number, _, rest = path.partition(".")
    if not number.isdigit() or int(number) >= len(items):
        raise ParameterError(f"The config's {place!r} is a list of {len(items)}: {number!r} is none of its items.")
    changed = with_path({"item": items[int(number)]}, f"item.{rest}" if rest else "item", value)["item"]
    return [*items[: int(number)], changed, *items[int(number) + 1 :]]


def merge(first: Any, second: Any) -> Any:
    """Merge two values: mappings key by key, unless both say a "type" and not the same; else the second wins."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return second
    if "type" in first and "type" in second and first["type"] != second["type"]:
        return dict(second)
    return {key: merge(first.get(key), second[key]) if key in second else first[key] for key in {**first, **second}}


def to_yaml(config: Mapping[str, Any]) -> str:
    r"""Write a configuration as YAML that :func:`read_config` reads back exactly.

    Examples
    --------
    >>> to_yaml({"adapter": {"type": "lora", "r": 8}, "learning_rate": 0.0001})
    'adapter:\n  type: lora\n  r: 8\nlearning_rate: 0.0001\n'
    """
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_value(text: str) -> Any:
    """Read a value as it is typed, in YAML as files have it; what would surprise as YAML is the text as it stands.

    Lists and mappings stand in brackets and braces, as the one line of a text may well have a colon or a dash; each
    key of a mapping has its value, as ``{title}`` is a field of a template. What is no YAML is a text, too.

    Examples
    --------
    >>> read_value("1e-4"), read_value("yes"), read_value("[a, b]"), read_value("{type: lora}")
    (0.0001, 'yes', ['a', 'b'], {'type': 'lora'})
    >>> read_value("Message: {text}"), read_value("{title} # {text}"), read_value("'3'")
    ('Message: {text}', '{title} # {text}', '3')
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError):
        return text
    begins = text.lstrip()[:1]
    if isinstance(value, Mapping):
        as_text = begins != "{" or (bool(value) and all(inside is None for inside in value.values()))
    elif isinstance(value, list):
        as_text = begins != "["
    else:
        as_text = (isinstance(value, str) and begins not in ("'", '"')) or (value is None and begins == "#")
    return text if as_text else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words and numbers; a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as no text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_version_1_2(handler: Any) -> None:
    """Replace what YAML 1.1 takes for numbers, truth values and dates."""
    kept = {
        first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] in ("null", "merge", "value")]
        for first, rules in handler.yaml_implicit_resolvers.items()
    }
    handler.yaml_implicit_resolvers = kept
    for tag, rule, first in PLAIN:
        handler.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{rule})$"), list(first))


SHORTHANDS = {"quantization": "bits", "template": "template", "early_stopping": "patience"}  # else a name is the "type"
PLAIN = (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
for _handler in (_Loader, _Dumper):
    _as_version_1_2(_handler)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
    ),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Read an object of JSON; a key that stands twice is an error."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice")
        found[key] = value
    return found


READERS: dict[str, Any] = {
    ".yaml": lambda text: yaml.load(text, Loader=_Loader),
    ".yml": lambda text: yaml.load(text, Loader=_Loader),
    ".json": lambda text: json.loads(text, object_pairs_hook=_pairs),
}
