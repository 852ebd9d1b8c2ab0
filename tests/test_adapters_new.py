"""A method of one's own is one new file: put into a copy of the package, it passes what every method must pass."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import peft
import pytest

import llmfit
from llmfit.adapters import METHODS, DoRA, LoRA, methods
from llmfit.adapters.folders import spec_from_folder

NEW = '''
"""LoRA whose A stays as it was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmfit.adapters.methods.lora import LoRA

__all__ = ["METHODS", "LoRAFA"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRAFA(LoRA):
    """LoRA with A frozen: :class:`LoRA` with half of its weights trained.

    References
    ----------
    .. [1] Zhang et al. 2023, LoRA-FA. arXiv:2308.03303.
    """

    type: ClassVar[str] = "lora_fa"

    def install(self, base: Any, tensors: Any, *, training: bool, plan: Any = None) -> Any:
        """Wrap the model's layers, and freeze every A."""
        model = super().install(base, tensors, training=training, plan=plan)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return model


METHODS = {"lora_fa": LoRAFA}
'''
USE = """
import sys
from pathlib import Path

import llmfit
import pandas as pd
from benchmarks import adapters as table
from sklearn.model_selection import GridSearchCV

assert Path(llmfit.__file__).parent == Path("llmfit").resolve()
model, rows = sys.argv[1], table.ROWS
given = {"target": "label", "template": "{text} is a", "device": "cpu", "dtype": "float32"}
given |= {"epochs": 40, "learning_rate": 1e-2, "batch_size": 8, "random_state": 0, "verbose": 0}
clf = llmfit.LLMClassifier(model, adapter={"type": "lora_fa", "r": 4}, **given)
clf.fit(rows)
assert clf.get_params()["adapter__r"] == 4
assert clf.predict(rows).tolist() == rows["label"].tolist()
assert {name for name in clf._tensors if ".lora_A." in name}
every = llmfit.LLMClassifier(model, adapter={"r": 4}, **given).fit(rows)
a = sum(tensor.numel() for name, tensor in clf._tensors.items() if ".lora_A." in name)
assert clf.trainable_parameters_ == every.trainable_parameters_ - a
clf.save("saved")
again = llmfit.load("saved")
assert type(again._adapter).__name__ == "LoRAFA"
assert (again.predict_proba(rows) == clf.predict_proba(rows)).all()
search = GridSearchCV(clf.set_params(epochs=1), {"adapter__r": [2, 4]}, cv=2, error_score="raise")
search.fit(rows, rows["label"])
assert search.best_estimator_._adapter.r == search.best_params_["adapter__r"]
config = llmfit.from_config({"base_model": model, "target": "label", "adapter": {"type": "lora_fa", "r": 2}})
assert config.adapter == {"type": "lora_fa", "r": 2}
forms = llmfit.config.json_schema()["properties"]["adapter"]
assert "'const': 'lora_fa'" in str(forms)
table.main(["lora_fa"])
"""
PARAMETRISED = ["test_adapters.py", "test_adapters_methods.py", "test_head_weights.py"]


def copied(folder: Path) -> Path:
    """Copy package and tests, and add the one file."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(llmfit.__file__).parent, folder / "llmfit", ignore=ignored)
    shutil.copytree(Path(__file__).parent, folder / "tests", ignore=ignored)
    shutil.copy(Path(__file__).parents[1] / "pyproject.toml", folder)
    (folder / "llmfit/adapters/methods/lora_fa.py").write_text(NEW.lstrip(), encoding="utf-8")
    return folder


def run(folder: Path, *arguments: str) -> str:
    code = [sys.executable, *arguments]
    done = subprocess.run(code, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_methods_says_its_own_and_none_says_anothers() -> None:
    files = sorted(module.name for module in iter_modules(methods.__path__))
    found = [import_module(f"{methods.__name__}.{name}").METHODS for name in files]
    assert [name for own in found for name in own] == list(METHODS)  # none twice, in an order that is always the same
    assert all(method.type == name for name, method in METHODS.items())


def test_a_method_with_the_name_of_another_is_refused(tmp_path: Path) -> None:
    copied(tmp_path)
    twin = NEW.lstrip().replace('"lora_fa"', '"dora"')
    (tmp_path / "llmfit/adapters/methods/zora.py").write_text(twin, encoding="utf-8")
    code = [sys.executable, "-c", "import llmfit.adapters"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.splitlines()[-1:] == [
        "RuntimeError: The adapter 'dora' of methods/zora.py has the name of another one. Rename it."
    ]


def test_a_folder_of_pefts_is_the_plain_method_whatever_else_is_made_of_it(tmp_path: Path) -> None:
    peft.LoraConfig(r=3, lora_alpha=6).save_pretrained(tmp_path)
    for order in ([LoRA, DoRA], [DoRA, LoRA]):
        assert type(spec_from_folder(tmp_path, order)) is LoRA


def test_a_method_is_added_by_one_file(tiny: str, tmp_path: Path) -> None:
    folder = copied(tmp_path / "copy")
    (folder / "tests/use.py").write_text(USE, encoding="utf-8")
    line = run(folder, "-c", "import sys; sys.path[:0] = ['tests']; import use", tiny).splitlines()[-1]
    assert re.fullmatch(r"lora_fa +\d,\d{3} +5\.\d+ +[01]\.\d+ +yes +yes \(\de-\d\d\)", line)


@pytest.mark.slow
def test_the_tests_of_every_method_are_those_of_a_new_one(tmp_path: Path) -> None:
    folder = copied(tmp_path / "copy")
    files = [f"tests/{name}" for name in PARAMETRISED]
    out = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "lora_fa", *files)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 19
