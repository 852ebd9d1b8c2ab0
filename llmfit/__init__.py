"""llmfit: fine-tune a language model on a DataFrame, the way one fits a scikit-learn model.

>>> import llmfit
>>> clf = llmfit.LLMClassifier(target="score", adapter={"type": "lora", "r": 8})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmfit import datasets, exceptions

if TYPE_CHECKING:
    from llmfit.adapters import Full, LoRA
    from llmfit.base_model import clear_cache
    from llmfit.callbacks import Callback
    from llmfit.estimators import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
    from llmfit.estimators.saving import load

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "Full",
    "LLMClassifier",
    "LLMEstimator",
    "LLMGenerator",
    "LLMRegressor",
    "LoRA",
    "__version__",
    "clear_cache",
    "datasets",
    "exceptions",
    "load",
]

# torch and transformers load when a name that needs them is first used.
_HOMES = {
    "Callback": "llmfit.callbacks",
    "Full": "llmfit.adapters",
    "LLMClassifier": "llmfit.estimators",
    "LLMEstimator": "llmfit.estimators",
    "LLMGenerator": "llmfit.estimators",
    "LLMRegressor": "llmfit.estimators",
    "LoRA": "llmfit.adapters",
    "clear_cache": "llmfit.base_model",
    "load": "llmfit.estimators.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
