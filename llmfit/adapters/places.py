"""Whether the places that an adapter's settings name are there in a model: layers, blocks, patterns, tokens.

Takes a spec and a model without or, for patterns, with the adapter; raises one ParameterError that names the setting to
blame, or nothing. Knows no method: a setting that a spec does not have is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llmfit.adapters.rules import as_names, is_pattern
from llmfit.exceptions import ParameterError, parameter_error, suggest

__all__ = ["check_patterns", "check_places", "matching", "no_target"]


def check_places(spec: Any, model: Any) -> None:
    """Raise a ParameterError for a setting that this model has no place for."""
    names = getattr(spec, "target_modules", None)
    for name in as_names(names) if names not in (None, "all-linear") and not is_pattern(names) else ():
        if not _layers_named(name, model):
            raise no_target(spec, model, suggest(name, _leaf_names(model)))
    for field in ("target_modules", "exclude_modules"):
        _check_expression(field, spec, model)
    for field in ("exclude_modules", "modules_to_save", "feedforward_modules"):
        value = getattr(spec, field, None) or ()
        for name in () if field == "exclude_modules" and is_pattern(value) else as_names(value):
            if not _layers_named(name, model):
                raise ParameterError(
                    f"The {field!r} parameter of {type(spec).__name__} must name layers of this model. "
                    f"Got {name!r} instead.{suggest(name, _leaf_names(model))}"
                )
    _check_parameters(spec, model)
    _check_blocks(spec, model)
    _check_tokens(spec, model)
    _check_tying(spec, model)


def _check_expression(field: str, spec: Any, model: Any) -> None:
    """Raise for a regular expression that is no whole name of a layer."""
    value: Any = getattr(spec, field, None)
    if is_pattern(value) and not any(re.fullmatch(value, layer) for layer, _ in model.named_modules()):
        raise ParameterError(
            f"The {field!r} parameter of {type(spec).__name__} must name layers of this model. The regular expression "
            f"{value!r} matches the whole name of none."
        )


def _layers_named(name: str, model: Any) -> list[Any]:
    return [m for layer, m in model.named_modules() if layer == name or layer.endswith(f".{name}")]


def _leaf_names(model: Any) -> list[str]:
    """Names of layers as users write them, without the path and without the numbers of a list."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(name for name in names if name and not name.isdigit())


def _check_parameters(spec: Any, model: Any) -> None:
    """Raise for a name that no weight of the model has."""
    wanted = getattr(spec, "target_parameters", None) or ()
    names = {name for name, _ in model.named_parameters()} if wanted else set()
    for name in wanted:
        if not any(own == name or own.endswith(f".{name}") for own in names):
            numberless = {".".join(part for part in own.split(".")[-3:] if not part.isdigit()) for own in names}
            raise ParameterError(
                f"The 'target_parameters' parameter of {type(spec).__name__} must name weights of this model. "
                f"Got {name!r} instead.{suggest(name, sorted(numberless))}"
            )


def _check_tying(spec: Any, model: Any) -> None:
    """Raise where nothing that is trained in full could be shared."""
    if not getattr(spec, "ensure_weight_tying", False):
        return
    owner, ends = type(spec).__name__, [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or ends[0].weight is not ends[1].weight:
        wanted = "False for this model, whose embedding and output head share no weights"
    elif not any(
        m is end for name in as_names(spec.modules_to_save) for m in _layers_named(name, model) for end in ends
    ):
        wanted = "False where modules_to_save names neither the embedding nor the output head"
    else:
        return
    raise parameter_error("ensure_weight_tying", owner, wanted, True)


def _check_blocks(spec: Any, model: Any) -> None:
    """Raise for a list of blocks, or the number of one, that the model does not have."""
    chosen, patterns = getattr(spec, "layers_to_transform", None), getattr(spec, "layers_pattern", None)
    if chosen is None:
        return
    owner, found = type(spec).__name__, {name: _blocks(name, model) for name in as_names(patterns or [""])}
    for name, blocks in found.items():
        if name and not blocks:
            lists = {layer.split(".")[-2] for layer, _ in model.named_modules() if layer.split(".")[-1].isdigit()}
            raise ParameterError(
                f"The 'layers_pattern' parameter of {owner} must name a list of blocks of this model. "
                f"Got {name!r} instead.{suggest(name, sorted(lists))}"
            )
    most = max((block for blocks in found.values() for block in blocks), default=-1)
    for number in chosen if isinstance(chosen, list | tuple) else [chosen]:
        if number > most:
            raise parameter_error("layers_to_transform", owner, f"at most {most} in this model", number)


def _blocks(pattern: str, model: Any) -> set[int]:
    """Find the numbers of the blocks in a list, as peft does; "" is the first list in a layer's name."""
    try:
        rule = re.compile(rf"(?:^|.*?\.){pattern}\.(\d+)\." if pattern else r".*?\.[^.]*\.(\d+)\.")
    except re.error:
        return set()
    return {int(match[1]) for layer, _ in model.named_modules() if (match := rule.match(layer))}


def _check_tokens(spec: Any, model: Any) -> None:
    """Raise for a token that an embedding does not have."""
    given = getattr(spec, "trainable_token_indices", None)
    if given is None:
        return
    owner, usual = type(spec).__name__, model.get_input_embeddings()
    embeddings = [usual, model.get_output_embeddings()]
    for name, ids in given.items() if isinstance(given, Mapping) else [("", given)]:
        layers = [m for m in _layers_named(name, model) if any(m is e for e in embeddings)] if name else [usual]
        if not layers:
            raise ParameterError(
                f"The 'trainable_token_indices' parameter of {owner} must name embeddings of this model. "
                f"Got {name!r} instead."
            )
        most = min(len(layer.weight) for layer in layers)
        odd = [i for i in ids if i >= most]
        if odd:
            raise parameter_error("trainable_token_indices", owner, f"token ids below {most} in this model", odd[0])


def check_patterns(spec: Any, adapted: list[str]) -> None:
    """Raise for a name in a pattern that no adapted layer has; peft would leave it out."""
    from peft.utils.other import get_pattern_key

    for field in (f.name for f in fields(spec) if f.name.endswith("_pattern") and f.name != "layers_pattern"):
        for key in getattr(spec, field) or ():
            if not any(get_pattern_key([key], layer) == key for layer in adapted):
                raise ParameterError(
                    f"The {field!r} parameter of {type(spec).__name__} must name layers that are adapted. "
                    f"Got {key!r} instead.{suggest(key, [layer.rpartition('.')[2] for layer in adapted])}"
                )


def matching(pattern: Any, layer: str, otherwise: Any) -> Any:
    """Look a layer up among names that are regular expressions, as peft does."""
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key((pattern or {}).keys(), layer), otherwise)


def no_target(spec: Any, model: Any, hint: str = "", said: str = "") -> ParameterError:
    """Say why the layers that are to be adapted cannot be; `said` is what peft says."""
    owner, names = type(spec).__name__, getattr(spec, "target_modules", None)
    if names is None:
        family = model.config.model_type
        wanted = f"given for this model, as peft has no choice of its own for the family {family!r}"
        return parameter_error("target_modules", owner, wanted, None)
    if "nn.Parameter" in said:
        wanted = "weights outside the layers that target_modules names"
        return ParameterError(
            f"The 'target_parameters' parameter of {owner} must name {wanted}. Got {spec.target_parameters!r} instead."
        )
    for field in ("exclude_modules", "modules_to_save"):
        if "exclude" in said and getattr(spec, field, None):
            return parameter_error(field, owner, "names that leave a layer to adapt", getattr(spec, field))
    reversed_ = None if hint else _reversed_layer(names, model)
    if reversed_ is not None:
        return ParameterError(
            f"The adapter {spec.type!r} cannot be put into this model: it adapts layers of the kind Linear only, and "
            f"{reversed_!r} is of the kind Conv1D here, which keeps its weights the other way round."
        )
    return ParameterError(
        f"The 'target_modules' parameter of {owner} must name layers of this model that {owner} can adapt. "
        f"Got {names!r} instead.{hint}"
    )


def _reversed_layer(names: Any, model: Any) -> str | None:
    """Find a layer of transformers' Conv1D among those that are to be adapted."""
    from transformers.pytorch_utils import Conv1D

    if is_pattern(names):
        found = (layer for layer, module in model.named_modules() if isinstance(module, Conv1D))
        return next((layer.rpartition(".")[2] for layer in found if re.fullmatch(names, layer)), None)
    leaves = (layer.rpartition(".")[2] for layer, module in model.named_modules() if isinstance(module, Conv1D))
    return next((leaf for leaf in leaves if names == "all-linear" or leaf in as_names(names)), None)
