"""llmfit: fine-tune a language model on a DataFrame, the way one fits a scikit-learn model.

>>> import llmfit
>>> clf = llmfit.LLMClassifier(target="score", adapter={"type": "lora", "r": 8})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmfit import datasets, exceptions

if TYPE_CHECKING:
    from llmfit.adapters import (
        BOFT,
        C3A,
        HRA,
        IA3,
        OFT,
        AdaLoRA,
        AdaptionPrompt,
        BitFit,
        DoRA,
        FourierFT,
        Full,
        LNTuning,
        LoHa,
        LoKr,
        LoRA,
        PrefixTuning,
        PromptTuning,
        PTuning,
        RandLoRA,
        TinyLoRA,
        VBLoRA,
        VeRA,
        WaveFT,
    )
    from llmfit.base_model import clear_cache
    from llmfit.callbacks import Callback
    from llmfit.config import from_config
    from llmfit.estimators import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
    from llmfit.estimators.saving import load
    from llmfit.quantization import Quantization

__version__ = "0.1.0"
__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AdaptionPrompt",
    "BitFit",
    "Callback",
    "DoRA",
    "FourierFT",
    "Full",
    "LLMClassifier",
    "LLMEstimator",
    "LLMGenerator",
    "LLMRegressor",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Quantization",
    "RandLoRA",
    "TinyLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "__version__",
    "clear_cache",
    "datasets",
    "exceptions",
    "from_config",
    "load",
    "plots",
    "report",
    "search",
]

# torch and transformers load when a name that needs them is first used.
_HOMES = {
    "AdaLoRA": "llmfit.adapters",
    "AdaptionPrompt": "llmfit.adapters",
    "BOFT": "llmfit.adapters",
    "BitFit": "llmfit.adapters",
    "C3A": "llmfit.adapters",
    "DoRA": "llmfit.adapters",
    "FourierFT": "llmfit.adapters",
    "HRA": "llmfit.adapters",
    "IA3": "llmfit.adapters",
    "LNTuning": "llmfit.adapters",
    "LoHa": "llmfit.adapters",
    "LoKr": "llmfit.adapters",
    "OFT": "llmfit.adapters",
    "PTuning": "llmfit.adapters",
    "PrefixTuning": "llmfit.adapters",
    "PromptTuning": "llmfit.adapters",
    "RandLoRA": "llmfit.adapters",
    "TinyLoRA": "llmfit.adapters",
    "VBLoRA": "llmfit.adapters",
    "VeRA": "llmfit.adapters",
    "WaveFT": "llmfit.adapters",
    "Callback": "llmfit.callbacks",
    "Full": "llmfit.adapters",
    "LLMClassifier": "llmfit.estimators",
    "LLMEstimator": "llmfit.estimators",
    "LLMGenerator": "llmfit.estimators",
    "LLMRegressor": "llmfit.estimators",
    "LoRA": "llmfit.adapters",
    "Quantization": "llmfit.quantization",
    "clear_cache": "llmfit.base_model",
    "from_config": "llmfit.config",
    "load": "llmfit.estimators.saving",
}
_ROOMS = ("plots", "report", "search")  # modules whose libraries load when they are first used


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"llmfit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'llmfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
