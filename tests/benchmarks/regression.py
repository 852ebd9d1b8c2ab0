"""Numbers from text with a real model: a head on frozen vectors, and a head trained together with LoRA.

Usage: python tests/benchmarks/regression.py PATH/TO/tweets_sentiment.csv [--json OUT]

The file has the columns text and sentiment (-4 to 4, the mean of 20 raters; Hutto and Gilbert 2014). Predicting the
mean has an R squared of 0 and no rank correlation: that is what the figures are to be compared with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd

from llmfit import LLMRegressor

TRAIN, TEST = 600, 600
METHODS: dict[str, dict[str, Any]] = {
    "frozen + linear": {"adapter": None, "epochs": 20},
    "lora + linear": {"adapter": "lora", "epochs": 2, "learning_rate": 5e-4, "batch_size": 8},
}


def measure(path: str, name: str) -> dict[str, Any]:
    """Fit one method and measure it on other rows."""
    tweets = pd.read_csv(path).sample(frac=1, random_state=7).reset_index(drop=True)
    train, test = tweets[:TRAIN], tweets[TRAIN : TRAIN + TEST]
    model = LLMRegressor(
        "smollm2",
        features="text",
        target="sentiment",
        template={"task": "How positive or negative is this tweet?"},
        random_state=0,
        verbose=0,
        **METHODS[name],
    )
    model.preview(train, 1)  # loads the base model, whose time is not the method's
    started = time.perf_counter()
    model.fit(train)
    seconds = time.perf_counter() - started
    scores = model.evaluate(test)
    mean = float(((test["sentiment"] - train["sentiment"].mean()) ** 2).mean() ** 0.5)
    return {
        "method": name,
        "fit_seconds": round(seconds, 1),
        **{key: round(float(scores[key]), 4) for key in ("r2", "spearman", "mae", "rmse")},
        "rmse_of_the_mean": round(mean, 4),
    }


def main() -> None:
    """Run both, print JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--json")
    given = parser.parse_args()
    records = []
    for name in METHODS:
        records.append(measure(given.path, name))
        print(json.dumps(records[-1]), flush=True)
    print("\n" + pd.DataFrame(records).to_string(index=False))
    if given.json:
        Path(given.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
