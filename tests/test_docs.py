"""Every block of the README and the guide, every docstring example and every script in examples/ runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

import llmfit
import llmfit.cli

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(llmfit.__path__, "llmfit."))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")  # a random model does not end its answers
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
class TestRuns:
    @pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/from-ludwig.md"])
    def test_page(self, page: str, smollm2_is_tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        reviews = llmfit.datasets.load_book_reviews()
        monkeypatch.setattr(llmfit.datasets, "load_book_reviews", lambda: reviews[:80])  # a fifth of the time
        blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        assert blocks
        namespace: dict[str, object] = {}
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)

    @pytest.mark.parametrize("name", MODULES)
    def test_docstring_examples(self, name: str, smollm2_is_tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
        module = importlib.import_module(name)
        failed = doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed
        assert failed == 0, capsys.readouterr().out

    def test_sms_example(self, smollm2_is_tiny: None, tmp_path: Path, capsys, monkeypatch) -> None:
        """On 16 made-up messages; the example's second process cannot see this test's model, so it is left out."""
        texts = [f"message {i} {'win cash now' if i % 2 else 'see you at home'}" for i in range(3100)]
        messages = pd.DataFrame({"text": texts, "label": ["spam" if i % 2 else "ham" for i in range(3100)]})
        messages.to_csv(tmp_path / "sms.csv", index=False)
        monkeypatch.setattr("subprocess.run", lambda command, **_: predict_here(command[-1]))
        run_example("01_sms_spam.py", [str(tmp_path / "sms.csv"), "16"], monkeypatch)
        out = capsys.readouterr().out
        assert "same predictions after load in another process: True" in out
        assert re.search(r"fine-tuned accuracy: \d\.\d{4}", out)

    def test_faq_example(self, smollm2_is_tiny: None, capsys, monkeypatch) -> None:
        run_example("02_faq.py", ["4", "1"], monkeypatch)
        assert re.search(r"exact match on the pairs learned: \d\.\d{4}", capsys.readouterr().out)

    def test_grid_search_example(self, smollm2_is_tiny: None, capsys, monkeypatch) -> None:
        llmfit.clear_cache()
        import transformers

        kept = transformers.PreTrainedModel.__dict__["from_pretrained"]
        try:
            run_example("03_grid_search.py", ["30"], monkeypatch)
        finally:
            transformers.PreTrainedModel.from_pretrained = kept
        out = capsys.readouterr().out
        assert "1 load(s) of the base model" in out
        alone, in_search = re.search(r"first fold: ([-\d.]+), in the search: ([-\d.]+)", out).groups()
        assert alone == in_search

    def test_demo(self, smollm2_is_tiny: None, capsys) -> None:
        assert llmfit.cli.main(["demo", "--rows", "20"]) == 0
        out = capsys.readouterr().out
        assert "zero-shot: accuracy" in out
        assert "The loaded model predicts the same scores." in out


def predict_here(folder: str) -> None:
    model = llmfit.load(f"{folder}/model", verbose=0)
    model.predict(pd.read_csv(f"{folder}/test.csv")).to_csv(f"{folder}/predicted.csv", index=False)


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_command_line_says_what_is_wrong_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmfit.cli.main(["demo", "--rows", "3"]) == 1
    assert (
        capsys.readouterr().err
        == "llmfit: The 'rows' parameter of the demo must be an int from 20 to 190. Got 3 instead.\n"
    )
