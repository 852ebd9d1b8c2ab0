"""The table over every adapter on the tiny model: ``make adapters``, or this file with names of methods.

Each method learns eight rows by heart with a learning rate that suits so small a model. A line says what is trained,
the loss of the first and of the last step, whether the predictions are the same after save and load, and how far the
logits of the merged model are from those of the adapted one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import make_model

import llmfit
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError
from llmfit.sources import quiet_loading

IDS = torch.tensor([[1, 70, 80, 90, 100, 41, 42, 43]])
ROWS = pd.DataFrame(
    {
        "text": [
            "red apple",
            "green pear",
            "old car",
            "fast train",
            "sweet plum",
            "big truck",
            "ripe fig",
            "slow boat",
        ],
        "label": ["fruit", "fruit", "vehicle", "vehicle", "fruit", "vehicle", "fruit", "vehicle"],
    }
)
# On random weights of width 32; a real model takes the methods' own rates, which are much lower.
RATES = {
    "adalora": 1e-1,
    "adaption_prompt": 3e-1,
    "bitfit": 3e-1,
    "boft": 1e-1,
    "c3a": 3e-1,
    "hra": 3e-2,
    "ia3": 3e-1,
    "ln_tuning": 3e-1,
    "loha": 3e-2,
    "lokr": 1e-1,
    "prefix_tuning": 3e-1,
    "prompt_tuning": 1e-1,
    "tinylora": 3e-2,
    "vblora": 1e-1,
    "vera": 3e-1,
    "waveft": 1e-3,
}
HEADER = f"{'adapter':<16}{'trainable':>10}{'loss before':>13}{'after':>8}  {'same after load':<17}merged"


def fit(base_model: str, name: str, **settings: Any) -> llmfit.LLMClassifier:
    """Let one method learn the rows by heart."""
    given = {"epochs": 20, "learning_rate": RATES.get(name, 1e-2), "batch_size": 8, "random_state": 0, "verbose": 0}
    given |= {"device": "cpu", "dtype": "float32", "target": "label", "template": "{text} is a", "adapter": name}
    return llmfit.LLMClassifier(base_model, **{**given, **settings}).fit(ROWS)


@torch.no_grad()
def merged_distance(clf: Any) -> float | None:
    """Largest difference of the exported model's logits; None where the method has nothing to merge into."""
    base = load_base_model(clf.base_model, device="cpu", dtype="float32")
    with base.attach(clf._adapter, clf._tensors) as model:
        adapted = model(input_ids=IDS).logits
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        try:
            clf.export(folder, dtype="float32")
        except ParameterError:
            return None
        plain = AutoModelForCausalLM.from_pretrained(folder)
        return float((plain(input_ids=IDS).logits - adapted).abs().max())


def line(base_model: str, name: str, folder: Path) -> str:
    """Measure one method."""
    clf = fit(base_model, name)
    clf.save(folder / name)
    again = llmfit.load(folder / name)
    same = (again.predict_proba(ROWS) == clf.predict_proba(ROWS)).all() and again.predict(ROWS).equals(
        clf.predict(ROWS)
    )
    losses, distance = clf.history_["loss"], merged_distance(clf)
    verdict = "not defined" if distance is None else f"{'yes' if distance < 1e-4 else 'NO'} ({distance:.0e})"
    return (
        f"{name:<16}{clf.trainable_parameters_:>10,}{losses.iloc[0]:>13.3f}{losses.iloc[-1]:>8.3f}  "
        f"{'yes' if same else 'NO':<17}{verdict}"
    )


def main(names: Iterable[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base_model = make_model(Path(folder) / "tiny")
        print(HEADER)
        for name in names or METHODS:
            print(line(base_model, name, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
