"""Parameters of the estimators that read as dicts, with the keys that each may have.

Takes what of a dict is given; gives its keys with their defaults. Loads what knows them when it is asked.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from llmfit.params import Nested

__all__ = ["NESTED"]


def _adapter_defaults(given: Any) -> dict[str, Any]:
    from llmfit.adapters import adapter_defaults

    return adapter_defaults(given)


def _quantization_defaults(given: Any) -> dict[str, Any]:
    from llmfit.quantization import quantization_defaults

    return quantization_defaults(given)


def _head_defaults(given: Any) -> dict[str, Any]:
    from llmfit.heads import head_defaults

    return head_defaults(given)


def _template_defaults(_: Any) -> dict[str, Any]:
    from llmfit.templates import TemplateConfig

    return {field.name: field.default for field in fields(TemplateConfig)}


def _early_stopping_defaults(_: Any) -> dict[str, Any]:
    from llmfit.callbacks import EarlyStopping

    return asdict(EarlyStopping())


NESTED: dict[str, Nested] = {
    "adapter": Nested("type", _adapter_defaults, off=(None,)),
    "quantization": Nested("bits", _quantization_defaults),
    "head": Nested("type", _head_defaults),
    "template": Nested("template", _template_defaults),
    "early_stopping": Nested("patience", _early_stopping_defaults, off=(False,)),
}
