"""What many classes cost: 2, 20 and 100 of them behind the same prompts, on SmolLM2.

Usage: python tests/benchmarks/classes.py PATH/TO/sms_spam.csv [--turns N] [--rows N]
       [--base-model NAME] [--device cpu|cuda]

Numbers are classes of one or two tokens, topics classes of three to six. Behind each prompt stand the tokens of all
classes but the last ones, which are only asked for; what classes begin alike with stands once. Prompts are messages, or
eight of them joined: the longer a prompt, the less classes matter.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import pandas as pd
from alternate import table
from cases import messages, options

from llmfit import LLMClassifier

WHAT = ["delivery", "billing", "the website", "a broken part", "plans", "work", "health", "money", "school", "travel"]
KINDS = ["question", "complaint", "thanks", "refusal", "request", "offer", "warning", "apology", "joke", "greeting"]
TOPICS = [f"{kind} about {what}" for kind in KINDS for what in WHAT]
CLASSES = {"numbers": [str(i) for i in range(100)], "topics": TOPICS}
COUNTS = (2, 20, 100)


def fitted(given: Any, labels: list[str]) -> Any:
    """A zero-shot classifier over some labels."""
    known = pd.DataFrame({"text": ["x"] * len(labels), "label": labels})
    template = {"task": "Say what this text is."}
    settings = {"features": "text", "target": "label", "template": template, "adapter": None, "verbose": 0}
    return LLMClassifier(given.base_model, **settings, device=given.device, random_state=0).fit(known)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    texts = messages(given.path)["text"]
    prompts = {
        "messages": texts[: given.rows].tolist(),
        "eight joined": [" ".join(texts[8 * i : 8 * i + 8]) for i in range(given.rows // 4)],
    }
    models = {(kind, n): fitted(given, labels[:n]) for kind, labels in CLASSES.items() for n in COUNTS}
    for name, rows in prompts.items():
        frame = pd.DataFrame({"text": rows})
        seconds: dict[tuple[str, int], list[float]] = {case: [] for case in models}
        for turn in range(given.turns + 1):
            for case, model in models.items():
                started = time.perf_counter()
                model.predict_proba(frame)
                seconds[case] += [time.perf_counter() - started] if turn else []
        records = []
        for (kind, n), took in seconds.items():
            ratios = [own / two for own, two in zip(took, seconds[kind, 2], strict=True)]
            records.append(
                {
                    "prompts": name,
                    "classes": f"{n} {kind}",
                    "rows/s": round(statistics.median(len(rows) / s for s in took), 1),
                    "times the cost of 2": round(statistics.median(ratios), 2),
                    "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
                }
            )
        print(json.dumps({f"classes, {name}": records}))
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
