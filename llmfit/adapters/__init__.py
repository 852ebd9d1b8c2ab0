"""What of a base model is trained: one small dataclass per method, peft underneath.

Takes the `adapter` parameter in any spelling; gives a spec that can install itself in a model lent by
:meth:`llmfit.base_model.BaseModel.attach`, hand its tensors out and write them to a folder. peft is named in this
package only. A new method is a dataclass and its name in one file of :mod:`llmfit.adapters.methods`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmfit.adapters.folders import adapter_folder, spec_from_folder
from llmfit.adapters.left_out import check_left_out
from llmfit.adapters.methods import METHODS
from llmfit.adapters.methods.adalora import AdaLoRA
from llmfit.adapters.methods.changes import BOFT, HRA, IA3, OFT, AdaptionPrompt, BitFit, LNTuning
from llmfit.adapters.methods.full import Full
from llmfit.adapters.methods.lora import DoRA, LoRA
from llmfit.adapters.methods.prompts import PrefixTuning, PromptTuning, PTuning
from llmfit.adapters.methods.updates import C3A, FourierFT, LoHa, LoKr, VBLoRA, WaveFT
from llmfit.adapters.methods.vectors import RandLoRA, TinyLoRA, VeRA
from llmfit.adapters.other import other_method, other_names
from llmfit.adapters.spec import AdapterSpec, Plan, Planned, Tensors, adapter_from_folder, count_parameters
from llmfit.exceptions import ParameterError, check_keys, parameter_error, quoted, suggest

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterSpec",
    "AdaptionPrompt",
    "BitFit",
    "DoRA",
    "FourierFT",
    "Full",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "PTuning",
    "Plan",
    "Planned",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "Tensors",
    "TinyLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "adapter_defaults",
    "adapter_from_folder",
    "adapter_start",
    "count_parameters",
    "resolve_adapter",
]

# bitsandbytes, which peft imports, tells everybody with such a CPU that a kernel for 4-bit weights is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def resolve_adapter(value: Any) -> AdapterSpec | None:
    """Turn every spelling of the `adapter` parameter into a checked spec.

    Parameters
    ----------
    value : None, str, dict, path or AdapterSpec
        A method's name, a dict of "type" and its settings, or a spec. A dict without "type" is LoRA. The path of a PEFT
        folder stands for the method and the settings that it was made with.

    Returns
    -------
    AdapterSpec or None
        None where nothing of the base model is trained.

    Raises
    ------
    ParameterError
        If the method or a setting is unknown, or a value cannot be used.
    ModelLoadError
        If a PEFT folder cannot be read.
    """
    start = adapter_start(value)
    if start is not None:
        return spec_from_folder(start, METHODS.values())
    if value is None:
        return None
    if isinstance(value, AdapterSpec):
        value.check()
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise parameter_error("adapter", "the estimator", "None, a name, a dict or a spec", value)
    name = value.get("type", "lora")
    method = _method(name)
    if method is None:
        wanted = f"one of {quoted(METHODS, most=99)}, or another method of peft's"
        hint = suggest(name, [*METHODS, *other_names(METHODS.values())]) if name is not None else ""
        raise ParameterError(f"{parameter_error('adapter', 'the estimator', wanted, name)}{hint}")
    settings = {key: item for key, item in value.items() if key != "type"}
    check_left_out(method, settings)
    check_keys(f"The adapter {method.type!r}", settings, [f.name for f in fields(method)])
    spec = method(**settings)
    spec.check()
    return spec


def adapter_start(value: Any) -> Path | None:
    """Find the PEFT folder whose weights a fit begins from; None where it begins anew.

    Raises
    ------
    ParameterError
        If there are settings beside a folder.
    """
    given = value if isinstance(value, Mapping) else {"type": value}
    name = given.get("type", "lora")
    folder = adapter_folder(name) if _method(name) is None else None
    if folder is not None and len(given) > 1:
        (key, *_) = (key for key in given if key != "type")
        raise ParameterError(
            f"The adapter folder {str(folder)!r} takes no settings beside its own. Got {key!r} as well."
        )
    return folder


def adapter_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of an adapter's dict with its default; {} for a method that is unknown."""
    name = given.get("type", "lora")
    method = _method(name)
    return {"type": name, **{f.name: f.default for f in fields(method)}} if method else {}


def _method(name: Any) -> type[AdapterSpec] | None:
    """Find a method by its name here or in peft, in any case."""
    low = name.lower() if isinstance(name, str) else ""
    if low in METHODS:
        return METHODS[low]
    for method in METHODS.values():  # of which peft may have another name
        if low and getattr(method, "peft_type", "").lower() == low:
            return method
    return other_method(low) if low and low in other_names(METHODS.values()) else None
