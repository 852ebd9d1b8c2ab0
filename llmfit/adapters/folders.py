"""A PEFT folder that was made elsewhere, as the adapter that a fit begins from.

Takes a folder with adapter_config.json and adapter_model.safetensors; gives the spec that its settings are, or one
sentence that names what no spec can be. A setting that is not peft's default is never left out in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from llmfit.adapters.other import other_method, other_names
from llmfit.adapters.peft_spec import LayerSpec, config_class
from llmfit.adapters.spec import AdapterSpec, adapter_from_folder
from llmfit.adapters.start_settings import moves_base
from llmfit.exceptions import ModelLoadError, ParameterError, reason

__all__ = ["adapter_folder", "spec_from_folder"]

CONFIG = "adapter_config.json"
COMMON = {  # what says nothing of the adapter itself
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
BEGINNING = {  # how weights began, or were trained, that are there now
    "auxiliary_loss_weight",
    "init_lora_weights",
    "init_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
DERIVED = {  # what peft finds by itself in a model, or what shows in the weights
    "fan_in_fan_out",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "token_dim",
    "total_step",
}


def adapter_folder(value: Any) -> Path | None:
    """Find the folder that a value names; None where it is no path, or a single word that is no PEFT folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return None
    folder = Path(os.fspath(value)).expanduser()
    named = isinstance(value, os.PathLike) or len(folder.parts) > 1
    return folder if named or (folder / CONFIG).is_file() else None


def spec_from_folder(folder: Path, methods: Collection[type[AdapterSpec]]) -> AdapterSpec:
    """Read the settings of a PEFT folder.

    Raises
    ------
    ParameterError
        If it has a setting that the method's spec has not.
    ModelLoadError
        If it cannot be read.
    """
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"The adapter folder {str(folder)!r} cannot be read: {reason(error)}.") from error
    named: list[Any] = [method for method in methods if getattr(method, "peft_type", None) == kind]
    method = min(named, key=lambda method: method.type != kind.lower(), default=None)  # not one that is made of it
    if method is None and kind.lower() not in other_names(methods):
        raise _refused(folder, f"is of the type {kind!r}, which this version of peft does not have")
    begun = config.get("init_lora_weights")
    if moves_base(begun):
        raise _refused(
            folder,
            f"began with init_lora_weights={begun!r} and stands beside weights that this start has changed. Let peft "
            "convert it: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    method = method or other_method(kind.lower())
    _check_covered(folder, method, config)
    spec: AdapterSpec = method(**_settings(folder, method, config))
    spec.check()
    return spec


def _refused(folder: Path, why: str) -> ParameterError:
    return ParameterError(f"The adapter folder {str(folder)!r} {why}.")


def _check_covered(folder: Path, method: Any, config: Mapping[str, Any]) -> None:
    """Raise for a setting that the spec does not have, and that is not as peft has it by default."""
    known = {method.names.get(field.name, field.name) for field in fields(method)} | set(method.fixed)
    usual = {field.name: field.default for field in fields(config_class(method.peft_type))}
    if not issubclass(method, LayerSpec):
        known |= {"target_modules"}  # of a method that has its own
    for name, value in config.items():
        if name in known | COMMON | BEGINNING | DERIVED or not value or value == usual.get(name):
            continue
        if not (method.type == "adalora" and name in ("r", "rank_pattern")):  # its ranks show in the weights
            raise _refused(folder, f"has the setting {name!r}, which {method.__name__} has not")


def _settings(folder: Path, method: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn peft's settings into a spec's fields; what is empty, begins weights or is idle is the default."""
    given = {}
    for field in fields(method):
        value = config.get(method.names.get(field.name, field.name), MISSING)
        alone = field.name == "target_modules" and config.get("target_parameters")  # which an empty list says
        empty = value is MISSING or value is None or (value in ({}, [], "") and not alone)
        shows = field.name == getattr(method, "size", None) and not value  # in the weights
        began = field.name in BEGINNING and value != "mica"  # which says what is trained, too
        if not (empty or shows or began or field.name in method.apart):
            given[field.name] = value
    for name, (other, off) in method.idle.items():
        if name in given and given.get(other, off) == off:
            del given[name]
    rules = [given.get(name) for name in ("target_modules", "exclude_modules")]
    if any(isinstance(rule, str) and rule != "all-linear" for rule in rules):
        given |= _exact_layers(folder, method)
        given = {name: value for name, value in given.items() if name not in LESS}
    return given


def _exact_layers(folder: Path, method: Any) -> dict[str, Any]:
    """Name the layers that have weights, where the folder names them by a regular expression."""
    return {"target_modules": method().layers_of(adapter_from_folder(folder, method))}


LESS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # that choose among the layers named
