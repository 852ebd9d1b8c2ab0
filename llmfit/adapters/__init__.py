"""What of a base model is trained: one small dataclass per method, peft underneath.

Takes the `adapter` parameter in any spelling; gives a spec that can install itself in a model lent by
:meth:`llmfit.base_model.BaseModel.attach`, hand its tensors out and write them to a folder. peft is named in this
package only. A new method is one dataclass and one line in `METHODS`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llmfit.adapters.full import Full
from llmfit.adapters.lora import LoRA
from llmfit.adapters.spec import AdapterSpec, Tensors, adapter_from_folder
from llmfit.exceptions import check_choice, check_keys, parameter_error

__all__ = [
    "METHODS",
    "AdapterSpec",
    "Full",
    "LoRA",
    "Tensors",
    "adapter_defaults",
    "adapter_from_folder",
    "resolve_adapter",
]

# bitsandbytes, which peft imports, tells everybody with such a CPU that a kernel for 4-bit weights is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def resolve_adapter(value: Any) -> AdapterSpec | None:
    """Turn every spelling of the `adapter` parameter into a checked spec.

    Parameters
    ----------
    value : None, str, dict or AdapterSpec
        A method's name, a dict of "type" and its settings, or a spec. A dict without "type" is LoRA.

    Returns
    -------
    AdapterSpec or None
        None where nothing of the base model is trained.

    Raises
    ------
    ParameterError
        If the method or a setting is unknown, or a value cannot be used.
    """
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
    check_choice("adapter", "the estimator", name, list(METHODS))
    settings = {key: item for key, item in value.items() if key != "type"}
    method = METHODS[name]
    check_keys(f"The adapter {name!r}", settings, [f.name for f in fields(method)])
    spec = method(**settings)
    spec.check()
    return spec


def adapter_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of an adapter's dict with its default; {} for a method that is unknown."""
    name = given.get("type", "lora")
    method = METHODS.get(name) if isinstance(name, str) else None
    return {"type": name, **{f.name: f.default for f in fields(method)}} if method else {}


METHODS: dict[str, type[AdapterSpec]] = {"lora": LoRA, "full": Full}
