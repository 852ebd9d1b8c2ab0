"""``llmfit search``: refused before it begins, or gone on with after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmfit
from llmfit.cli import main

CONFIG = """\
estimator: LLMClassifier
base_model: {tiny}
target: label
features: [text]
adapter: {{type: lora, r: 4}}
epochs: 1
device: cpu
random_state: 0
hyperopt:
  adapter.r: [1, 2, 4]
  scoring: neg_log_loss
  cv: 2
"""
KILLED = """
import os, signal, sys
from llmfit import LLMClassifier
from llmfit.cli import main
fits, fit = [], LLMClassifier.fit

def killed(self, *args, **params):
    if len(fits) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    fits.append(1)
    return fit(self, *args, **params)

LLMClassifier.fit = killed
main(sys.argv[1:])
"""


@pytest.fixture
def place(tiny: str, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.yaml").write_text(CONFIG.format(tiny=tiny))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each fit."""
    found: list[int] = []
    fit = llmfit.LLMClassifier.fit

    def counted(self: Any, *given: Any, **params: Any) -> Any:
        found.append(self.adapter["r"])
        return fit(self, *given, **params)

    monkeypatch.setattr(llmfit.LLMClassifier, "fit", counted)
    return found


def search(*more: str) -> int:
    return main(["search", "search.yaml", "rows.csv", "-q", *more])


def test_a_search_that_was_killed_goes_on(place: Path, fits: list[int], capsys: Any) -> None:
    arguments = ["--resume", "scores", "--results", "all.csv", "-o", "model"]
    command = [sys.executable, "-c", KILLED, "search", "search.yaml", "rows.csv", "-q", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(llmfit.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((place / "scores").glob("*.json"))) == 3
    assert not (place / "model").exists()
    assert search(*arguments) == 0
    assert len(fits) == 3 * 2 - 3 + 1  # what was left, and the best on all rows
    shown = capsys.readouterr().out
    assert search("--results", "undisturbed.csv") == 0
    assert capsys.readouterr().out == shown
    mine, whole = (pd.read_csv(name) for name in ("all.csv", "undisturbed.csv"))
    columns = [name for name in whole if "seconds" not in name]
    pd.testing.assert_frame_equal(mine[columns], whole[columns])


def test_a_config_may_name_the_folder_itself(place: Path, fits: list[int]) -> None:
    assert search("--set", "hyperopt.checkpoint_dir=scores") == 0
    assert len(fits) == 7
    assert search("--resume", "scores") == 0
    assert len(fits) == 8  # the best on all rows


SENTENCES: dict[str, tuple[list[str], str]] = {
    "a suffix": (
        ["--results", "all.xlsx"],
        "The results are written as CSV: 'all.xlsx' must end in .csv or .csv.gz.",
    ),
    "no folder": (["--results", "afile/all.csv"], "'afile/all.csv' cannot be written: '{place}/afile' is no folder "
        "that may be written to."),
    "a folder": (["--results", "there.csv"], "'there.csv' cannot be written: it is a folder."),
    "candidates that are drawn": (
        ["--resume", "scores", "--set", "hyperopt.n_iter=2"],
        "checkpoint_dir needs an int 'random_state' of RandomSearch: without one, other candidates are drawn each "
        "time.",
    ),
    "folds": (
        ["--set", "hyperopt.cv=20"],
        "cv=20 needs 20 rows of a class at least, one for each fold: the most frequent class has {most}. Set a "
        "smaller cv.",
    ),
    "the axis": (
        ["--set", "adapter.r=2"],
        "The config's 'hyperopt' has no axis left to search: 'adapter__r' is given. Leave 'hyperopt' out.",
    ),
    "a scorer": (
        ["--set", "hyperopt.scoring=acc"],
        "The 'scoring' parameter of make_search must be a name that scikit-learn has, such as 'accuracy', 'f1_macro', "
        "'neg_log_loss' or 'r2'. Got 'acc' instead. Did you mean 'accuracy'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_is_refused_before_a_fit(
    name: str, place: Path, fits: list[int], frame: pd.DataFrame, capsys: Any
) -> None:
    arguments, sentence = SENTENCES[name]
    (place / "there.csv").mkdir()
    (place / "afile").touch()
    assert search(*arguments) == 1
    most = frame["label"].value_counts().max()
    assert (
        capsys.readouterr().err == f"llmfit: {sentence.replace('{place}', str(place)).replace('{most}', str(most))}\n"
    )
    assert fits == []


def test_a_search_takes_several_labels_a_row(place: Path, capsys: Any) -> None:
    config = (place / "search.yaml").read_text()
    config = config.replace("adapter: {type: lora, r: 4}", "adapter: null\nhead: linear")
    config = config.replace("adapter.r: [1, 2, 4]", "learning_rate: [0.01, 0.1]").replace("neg_log_loss", "null")
    (place / "search.yaml").write_text(config)
    rows = [{"text": f"row {i}", "label": [["a"], ["b"], ["a", "b"]][i % 3]} for i in range(9)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["search", "search.yaml", "rows.jsonl", "-o", "model", "-q"]) == 0, capsys.readouterr().err
    assert llmfit.load(place / "model").classes_.tolist() == ["a", "b"]
