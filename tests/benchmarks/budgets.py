"""How many tokens a pass should hold, and on how many threads, on SmolLM2: `batch_tokens` and torch's threads.

Usage: python tests/benchmarks/budgets.py PATH/TO/sms_spam.csv [--turns N] [--rows N]
       [--base-model NAME] [--device cpu|cuda]

A turn is a fit of one step over all rows, cut into passes of so many tokens, and their class probabilities.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from alternate import table
from cases import SHORT, messages, options

from llmfit import LLMClassifier

BUDGETS = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    given = parser.parse_args()
    rows = messages(given.path)[: given.rows]
    settings = {"features": "text", "target": "label", "template": SHORT, "adapter": "lora", "verbose": 0}
    settings |= {"epochs": 1, "batch_size": given.rows, "random_state": 0, "device": given.device}
    most = torch.get_num_threads()
    ways = [(budget, most) for budget in BUDGETS] + ([(2048, 1)] if given.device == "cpu" and most > 1 else [])
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {way: [] for way in ways}
    for turn in range(given.turns + 1):
        for (budget, threads), turns in found.items():
            torch.set_num_threads(threads)
            model: Any = LLMClassifier(given.base_model, **settings, batch_tokens=budget)
            started, busy = time.perf_counter(), time.process_time()
            model.fit(rows)
            between = time.perf_counter()
            model.predict_proba(rows)
            took = between - started, time.perf_counter() - between, time.process_time() - busy
            turns += [took] if turn else []
    torch.set_num_threads(most)
    records = [
        {
            "batch_tokens": budget,
            "threads": threads,
            **_rates("trained", given.rows, [fit for fit, _, _ in turns]),
            **_rates("scored", given.rows, [score for _, score, _ in turns]),
            "cpu_s of both": round(statistics.median(cpu for _, _, cpu in turns), 1),
        }
        for (budget, threads), turns in found.items()
    ]
    print(json.dumps({"token budgets": records}))
    print(table(records), flush=True)


def _rates(name: str, rows: int, seconds: list[float]) -> dict[str, Any]:
    """Rows a second, and their spread over the turns."""
    rates = [rows / each for each in seconds]
    return {
        f"{name} rows/s": round(statistics.median(rates), 1),
        f"{name}, spread": f"{min(rates):.1f} to {max(rates):.1f}",
    }


if __name__ == "__main__":
    main()
