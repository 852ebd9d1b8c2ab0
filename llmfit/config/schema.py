"""The keys of a configuration as a JSON Schema, for editors: made of what the checks read.

Takes nothing; gives a schema. Own keys come from the estimators' signatures, docstrings and specs, Ludwig's from its
tables. It says of a value's form what can be said without the other keys; :func:`llmfit.from_config` says the rest.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llmfit.config.keys import ESTIMATORS, Key, documented, own_keys
from llmfit.config.ludwig import SHARED, TABLES, TOP
from llmfit.config.ludwig.rows import IDLE, KINDS, REFUSED, Row
from llmfit.config.search_settings import SETTINGS

__all__ = ["json_schema"]

CHOICES = re.compile(r"^\{([^{}]+)\}(?: or ([\w ,]+?))?(?:, default|\.)")
ALSO = {"verbose": "boolean"}  # beside its own type: true is 1
TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "null"}


def json_schema() -> dict[str, Any]:
    """Describe the keys of a configuration as a JSON Schema, draft 2020-12.

    Returns
    -------
    dict
        Of llmfit's own keys and Ludwig's together: what may stand in one file.

    Examples
    --------
    >>> json_schema()["properties"]["epochs"]
    {'type': 'integer', 'default': 3, 'description': 'int, default=3. Passes over the rows.'}
    """
    own = {name: _of_key(key) for name, key in own_keys().items()}
    ludwig = {name: _of_row(row, name) for name, row in TOP.items() if name not in own}
    estimator = {"enum": list(ESTIMATORS), "default": "LLMEstimator", "description": "The class of the estimator."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of llmfit, in its own keys or Ludwig's",
        "type": "object",
        "properties": {"estimator": estimator, **own, **ludwig},
        "patternProperties": {r"\.": {"description": "A path: adapter.r is the key r within adapter."}},
        "additionalProperties": False,
        "if": {"not": _of_ludwig()},
        "then": {"properties": {name: _bare({"anyOf": [SHORT, *FORMS[name](both=False)]}) for name in LANGUAGES}},
        "$defs": {path: make(path) for path, make in SECTIONS.items()},
    }


def _of_ludwig() -> dict[str, Any]:
    """Describe a config that has a key which only Ludwig has: those of both languages have both languages in them."""
    heads = [name for name in TOP if name not in SHARED]
    named = {"not": {"propertyNames": {"not": {"pattern": rf"^(?:{'|'.join(heads)})(?:\.|__|$)"}}}}
    axes = {"anyOf": [named, {"properties": {"parameters": named}, "required": ["parameters"]}]}
    return {"anyOf": [named, {"properties": {"hyperopt": axes}, "required": ["hyperopt"]}]}


def _bare(form: Any) -> Any:
    """Take what a form allows, without the words that stand at the key already."""
    if isinstance(form, list):
        return [_bare(item) for item in form]
    if not isinstance(form, dict):
        return form
    named = form.get("properties", {})
    kept = {key: _bare(item) for key, item in form.items() if key not in ("description", "default", "properties")}
    return {**kept, "properties": {name: _bare(item) for name, item in named.items()}} if named else kept


# Own keys ---------------------------------------------------------------------------------------


def _of_key(key: Key) -> dict[str, Any]:
    form = _nested(key) if key.nested is not None else _of_annotation(key.annotation, key.words)
    if key.name in ALSO:
        form = {"type": [form["type"], ALSO[key.name]]}
    return {**form, "default": key.default, **({"description": key.words} if key.words else {})}


def _of_annotation(annotation: str, words: str) -> dict[str, Any]:
    """Read the types of an annotation; choices from the words, as numpydoc has them: {"a", "b"} or None."""
    choices = CHOICES.match(words)
    if choices is not None and choices[2] in (None, "None"):
        listed = [literal_eval(choice) for choice in choices[1].split(", ")]
        return {"enum": [*listed, *([None] if choices[2] else [])]}
    types = [TYPES[part.strip()] for part in annotation.split("|") if part.strip() in TYPES]
    if not types or "Any" in annotation:
        return {}
    return {"type": types[0] if len(types) == 1 else types}


def _nested(key: Key) -> dict[str, Any]:
    """Describe a value that is off, a shorthand, or a dict with keys of its own, one form for each of its types."""
    return {"anyOf": [SHORT, *FORMS[key.name]()]}


def _object(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    form: dict[str, Any] = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**form, "required": required} if required else form


def _of_fields(spec: type[Any]) -> dict[str, Any]:
    """Describe the fields of a dataclass: the types that are plain, and what its docstring says of them."""
    words: dict[str, str] = {}
    for parent in reversed(spec.__mro__):
        words |= documented(parent) if "Parameters" in (parent.__doc__ or "") else {}
    found = {}
    for field in fields(spec):
        form = _of_annotation(str(field.type), words.get(field.name, ""))
        about = {"description": words[field.name]} if field.name in words else {}
        plain = field.default is None or isinstance(field.default, str | int | float | bool)
        found[field.name] = {**form, **({"default": field.default} if plain else {}), **about}
    return found


def _in_both(ludwigs: Mapping[str, Any], own: dict[str, Any], both: bool) -> dict[str, Any]:
    """Join keys of both languages: of those that both have, Ludwig's may be null, which leaves the default."""
    if not both:
        return own
    joined = {name: {"anyOf": [form, {"type": "null"}]} if name in ludwigs else form for name, form in own.items()}
    return {**ludwigs, **joined}


def _adapters(*, both: bool = True) -> list[dict[str, Any]]:
    """List one form a method, in both languages; LoRA may go without type, what only PEFT has is not looked into."""
    from llmfit.adapters import METHODS

    common = {name: _of_row(row, f"adapter.{name}") for name, row in TABLES["adapter"].items() if name != "type"}
    forms = []
    for name, method in METHODS.items():
        rows = TABLES.get(f"adapter ({name})", {})
        ludwigs = {key: _of_row(row, "") for key, row in rows.items()} | (common if rows else {})
        properties = {"type": {"const": name}, **_in_both(ludwigs, _of_fields(method), both)}
        forms.append(_object(properties, [] if name == "lora" else ["type"]))
    other = {"type": {"type": "string", "not": {"enum": list(METHODS)}}}
    return [*forms, {"type": "object", "properties": other, "required": ["type"]}]


def _quantizations(*, both: bool = True) -> list[dict[str, Any]]:
    from llmfit.quantization import Quantization

    ludwigs = {name: _of_row(row, "") for name, row in TABLES["quantization"].items()}
    return [_object(_in_both(ludwigs, _of_fields(Quantization), both))]


def _heads() -> list[dict[str, Any]]:
    from llmfit.heads import HEADS

    known = {name: _of_fields(spec) if spec else {} for name, spec in HEADS.items()}
    return [_object({"type": {"const": name}, **form}, ["type"] if not form else None) for name, form in known.items()]


def _templates() -> list[dict[str, Any]]:
    from llmfit.templates import FewShot, TemplateConfig

    few_shot = {"anyOf": [{"type": ["null", "integer"]}, _object(_of_fields(FewShot))]}
    return [_object({**_of_fields(TemplateConfig), "few_shot": few_shot})]


def _early_stoppings() -> list[dict[str, Any]]:
    from llmfit.callbacks import EarlyStopping

    return [_object(_of_fields(EarlyStopping))]


def _generations(*, both: bool = True) -> list[dict[str, Any]]:
    from llmfit.inference import Generation

    ludwigs = {name: _of_row(row, "") for name, row in TABLES["generation"].items()}
    return [_object(_in_both(ludwigs, _of_fields(Generation), both))]


SHORT = {"type": ["null", "boolean", "string", "integer"]}  # off, or a shorthand
LANGUAGES = ("adapter", "quantization", "generation")  # of which Ludwig has sections as well
FORMS: dict[str, Any] = {
    "adapter": _adapters,
    "quantization": _quantizations,
    "head": _heads,
    "template": _templates,
    "early_stopping": _early_stoppings,
    "generation": _generations,
}

# Ludwig's keys ----------------------------------------------------------------------------------


def _of_row(row: Row, path: str) -> dict[str, Any]:
    """Describe a key of Ludwig's: its kind, or the section below it; what is refused has its neutral values only."""
    about = {"description": f"Ludwig's, {row.verdict}: {row.words}"}
    if row.verdict == REFUSED:
        return {"enum": list(row.neutral), **about}
    if row.verdict == IDLE:
        return about
    own = path.removeprefix("input_features.encoder.")
    if own in FORMS:
        return {"$ref": f"#/properties/{own}", **about}
    if path not in SECTIONS:
        form = KINDS[row.kind][2]
        return {**({"anyOf": [form, {"type": "null"}]} if form else {}), **about}
    form = {"$ref": f"#/$defs/{path}"}
    others = [{"type": "array", "items": form}] if row.kind == "several" else []
    return {"anyOf": [form, *others, {"type": ["string", "null"] if row.kind == "spec" else "null"}], **about}


def _section(path: str) -> dict[str, Any]:
    """Describe a section: a mapping of its keys."""
    return _object({name: _of_row(row, f"{path}.{name}") for name, row in TABLES[path].items()})


def _hyperopt(path: str) -> dict[str, Any]:
    """Describe hyperopt: Ludwig's keys and llmfit's; any other is an axis."""
    form = _section(path)
    about = {"description": "llmfit's own; see llmfit.search.make_search."}
    form["properties"] |= {key: {"anyOf": [of, {"type": "null"}], **about} for key, (_, _, of) in SETTINGS.items()}
    form["properties"]["parameters"] = {
        "anyOf": [{"type": "object", "additionalProperties": AXIS}, {"type": "null"}],
        "description": form["properties"]["parameters"]["description"],
    }
    return {**form, "additionalProperties": AXIS}


def _axis(_: str) -> dict[str, Any]:
    """Describe an axis: a list of values, or a mapping of Ludwig's or llmfit's that is a list or a range."""
    rows = {name: _of_row(row, "") for name, row in TABLES["hyperopt.parameters.<axis>"].items()}
    number, step = {"type": "number"}, {"type": ["number", "null"]}
    own = {"low": number, "high": number, "step": step, "log": {"type": "boolean"}}
    return {"anyOf": [{"type": "array", "minItems": 1}, _object({**rows, **own})]}


def _defaults(_: str) -> dict[str, Any]:
    """Describe defaults: sections of features, by their type."""
    return {"type": "object", "additionalProperties": _section("defaults.<type>")}


AXIS = {"$ref": "#/$defs/hyperopt.axis"}
SECTIONS: dict[str, Any] = {
    **{path: _section for path in TABLES if path and path not in FORMS and "(" not in path and "<" not in path},
    "hyperopt": _hyperopt,
    "hyperopt.axis": _axis,
    "defaults": _defaults,
}
