"""Whether memory grows over a long search: the same grid three times in one process, on SmolLM2.

Usage: python tests/benchmarks/growth.py PATH/TO/sms_spam.csv [--rows N] [--base-model NAME] [--device cpu|cuda]

Four candidates (two ranks, two learning rates) on three folds, twelve fits a round. The memory that the process holds
at the end of each fit is compared with that at the end of the same fit of the round before, as candidates of another
rank hold other amounts. It fails where the last round holds more than the one before it.
"""

from __future__ import annotations

import json
import resource
import statistics
from pathlib import Path
from typing import Any, ClassVar

from alternate import table
from cases import SHORT, messages, options
from sklearn.model_selection import GridSearchCV

from llmfit import Callback, LLMClassifier

GRID = {"adapter__r": [4, 16], "learning_rate": [1e-4, 5e-4]}
ROUNDS = 3
NOISE = 15  # MB, of 1,300, that a fit may hold more by chance


class Memory(Callback):
    """Note what the process holds at the end of every fit. A search copies it for each: all write in one list."""

    held: ClassVar[list[float]] = []

    def on_fit_end(self, state: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.held.append(pages * resource.getpagesize() / 1e6)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=96)
    given = parser.parse_args()
    rows = messages(given.path)[: given.rows]
    settings = {"features": "text", "template": SHORT, "adapter": "lora", "epochs": 1, "random_state": 0, "verbose": 0}
    model = LLMClassifier(given.base_model, **settings, device=given.device, target="label", callbacks=Memory())
    rounds = []
    for _ in range(ROUNDS):
        Memory.held.clear()
        GridSearchCV(model, GRID, cv=3, refit=False, error_score="raise").fit(rows, rows["label"])
        rounds.append(list(Memory.held))
    records = [
        {
            "round": i + 1,
            "fits": len(held),
            "median_mb": round(statistics.median(held)),
            "most_mb": round(max(held)),
            "more_than_before_mb": round(statistics.median(b - a for a, b in zip(before, held, strict=True)), 1),
        }
        for i, (before, held) in enumerate(zip([rounds[0], *rounds], rounds, strict=False))
    ]
    print(json.dumps({"memory over a search": records}))
    print(table(records), flush=True)
    if records[-1]["more_than_before_mb"] > NOISE:
        raise SystemExit(f"Memory grows: by {records[-1]['more_than_before_mb']} MB over {len(rounds[-1])} fits.")


if __name__ == "__main__":
    main()
