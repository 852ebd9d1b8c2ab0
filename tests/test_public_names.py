"""What `import llmfit` offers, and what it costs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import llmfit

PUBLIC = {
    "AdaLoRA",
    "AdaptionPrompt",
    "BOFT",
    "BitFit",
    "C3A",
    "DoRA",
    "FourierFT",
    "HRA",
    "IA3",
    "LNTuning",
    "LoHa",
    "LoKr",
    "OFT",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "TinyLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "Callback",
    "Full",
    "LLMClassifier",
    "LLMEstimator",
    "LLMGenerator",
    "LLMRegressor",
    "LoRA",
    "Quantization",
    "__version__",
    "clear_cache",
    "datasets",
    "exceptions",
    "from_config",
    "load",
    "plots",
    "report",
    "search",
}
MODULES = sorted(module.name for module in pkgutil.walk_packages(llmfit.__path__, "llmfit."))


def test_public_names_are_these() -> None:
    assert set(llmfit.__all__) == PUBLIC
    assert set(dir(llmfit)) == PUBLIC
    assert all(getattr(llmfit, name) is not None for name in PUBLIC)


def test_a_name_that_is_none_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'llmfit' has no attribute 'LLMRegresor'"):
        llmfit.LLMRegresor  # noqa: B018 - reading it is the test


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert [n for n in getattr(module, "__all__", []) if not hasattr(module, n)] == []


@pytest.mark.parametrize(
    "estimator", [llmfit.LLMClassifier, llmfit.LLMRegressor, llmfit.LLMGenerator, llmfit.LLMEstimator]
)
def test_every_parameter_and_public_method_is_documented(estimator: type) -> None:
    documented = inspect.getdoc(estimator) or ""
    for parameter in estimator._get_param_names():
        assert parameter in documented, parameter
    for name, method in inspect.getmembers(estimator, inspect.isfunction):
        if not name.startswith("_") and method.__module__.startswith("llmfit"):
            assert inspect.getdoc(method), name


def test_importing_and_building_an_estimator_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, llmfit; llmfit.LLMClassifier(adapter={'r': 4}).get_params(); "
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
