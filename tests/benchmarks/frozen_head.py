"""What a frozen base model saves: the first epoch, which computes every vector, against those after it.

Run it as ``python tests/benchmarks/frozen_head.py [BASE_MODEL] [ROWS]``: BASE_MODEL is "smollm2" where nothing is said.
Each repetition forgets all vectors first. Prints a line of JSON and a table of medians. The same epochs with LoRA stand
beside, in turn with the others, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import pandas as pd

import llmfit
from llmfit.datasets import load_book_reviews
from llmfit.embeddings import forget_embeddings

EPOCHS, REPEATS = 4, 3
ADAPTERS: dict[str, Any] = {"none": None, "lora": "lora"}


class Epochs(llmfit.Callback):
    """The seconds of every epoch, the first from the start of the fit on."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_epoch_end(self, state: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def fit(base_model: str, rows: pd.DataFrame, adapter: Any) -> list[float]:
    """Seconds of the epochs of one fit that knows no vector yet."""
    forget_embeddings()
    watch = Epochs()
    given = {"epochs": EPOCHS, "random_state": 0, "verbose": 0, "truncation": "prompt", "callbacks": watch}
    llmfit.LLMRegressor(base_model, target="score", adapter=adapter, **given).fit(rows)
    return watch.seconds()


def main(base_model: str = "smollm2", n_rows: str = "190") -> dict[str, dict[str, float]]:
    """Measure, in turn, and print."""
    rows = load_book_reviews()[: int(n_rows)]
    fit(base_model, rows[:8], None)  # the model is loaded
    taken: dict[str, list[list[float]]] = {name: [] for name in ADAPTERS}
    for _ in range(REPEATS):
        for name, adapter in ADAPTERS.items():
            taken[name].append(fit(base_model, rows, adapter))
    result = {}
    for name, runs in taken.items():
        first = statistics.median(run[0] for run in runs)
        later = statistics.median(seconds for run in runs for seconds in run[1:])
        result[name] = {"first_epoch_s": first, "later_epoch_s": later, "ratio": first / later}
    print(json.dumps({"base_model": base_model, "rows": len(rows), "epochs": EPOCHS, **result}))
    print(pd.DataFrame(result).T.to_string(float_format=lambda number: f"{number:.4g}"))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
