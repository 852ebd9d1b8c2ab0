"""What many classes cost: 2, 20 and 100 of them behind the same prompts, on SmolLM2.

Usage: python tests/benchmarks/classes.py PATH/TO/sms_spam.csv [--turns N] [--rows N] [--fit N]
       [--only words|numbers|topics] [--base-model NAME] [--device cpu|cuda]

Words are entries of the vocabulary, one token each; numbers are of one or two, topics of three to six. Behind each
prompt stand the tokens of all classes but the last ones, which are only asked for; what classes begin alike with stands
once. Prompts are messages, or eight of them joined: the longer a prompt, the less classes matter. `predict_proba` reads
all classes, `predict` where they have many tokens only those that may still be the likeliest: how many that are depends
on how sure a model is.

--fit: messages that a model is fitted on, each of which begins with its class, as those that are then scored do; 0, the
default, scores what no model has learned.
"""

from __future__ import annotations

import json
import statistics
import time
from itertools import islice
from typing import Any

import pandas as pd
from alternate import table
from cases import messages, options

from llmfit import LLMClassifier
from llmfit.base_model import load_base_model

WHAT = ["delivery", "billing", "the website", "a broken part", "plans", "work", "health", "money", "school", "travel"]
KINDS = ["question", "complaint", "thanks", "refusal", "request", "offer", "warning", "apology", "joke", "greeting"]
TOPICS = [f"{kind} about {what}" for kind in KINDS for what in WHAT]
NUMBERS = [str(i) for i in range(100)]
KINDS_OF_CLASSES = ("words", "numbers", "topics")
COUNTS = (2, 20, 100)
METHODS = ("predict_proba", "predict")


def classes_of(given: Any) -> dict[str, list[str]]:
    """A hundred classes of each kind that is asked for; words are of the model's vocabulary."""
    tokenizer = load_base_model(given.base_model, device=given.device).tokenizer
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words = (word for word in known if len(word) > 4 and word.isascii() and word.isalpha() and word.islower())
    whole = (word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1)
    every = dict(zip(KINDS_OF_CLASSES, ([*islice(whole, 100)], NUMBERS, TOPICS), strict=True))
    if any(len(labels) < 100 for labels in every.values()):
        raise SystemExit("The model's tokenizer has too few words of one token.")
    return {kind: labels for kind, labels in every.items() if given.only in (None, kind)}


def texts_of(texts: list[str], labels: list[str], *, told: int) -> list[str]:
    """The texts, each behind one of the classes in turn where these are to be told."""
    return [f"{labels[i % len(labels)]}: {text}" for i, text in enumerate(texts)] if told else texts


def fitted(given: Any, labels: list[str], texts: list[str]) -> Any:
    """A classifier over some labels, zero-shot or fitted on some rows of each."""
    n = max(given.fit, len(labels))
    known = pd.DataFrame({"text": ["x"] * n, "label": [labels[i % len(labels)] for i in range(n)]})
    if given.fit:
        known["text"] = texts_of([texts[i % len(texts)] for i in range(n)], labels, told=given.fit)
    template = {"task": "Say what this text is."}
    settings = {
        "features": "text",
        "target": "label",
        "template": template,
        "adapter": "lora" if given.fit else None,
        "verbose": 0,
    }
    return LLMClassifier(given.base_model, **settings, device=given.device, random_state=0).fit(known)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--fit", type=int, default=0)
    parser.add_argument("--only", choices=KINDS_OF_CLASSES)
    given = parser.parse_args()
    texts, classes = messages(given.path)["text"], classes_of(given)
    prompts = {
        "messages": texts[: given.rows].tolist(),
        "eight joined": [" ".join(texts[8 * i : 8 * i + 8]) for i in range(given.rows // 8)],
    }
    models = {
        (kind, n): fitted(given, labels[:n], texts[given.rows :].tolist())
        for kind, labels in classes.items()
        for n in COUNTS
    }
    for name, rows in prompts.items():
        frames = {
            case: pd.DataFrame({"text": texts_of(rows, classes[case[0]][: case[1]], told=given.fit)}) for case in models
        }
        for method in METHODS:  # apart: what one has answered would serve the other
            seconds: dict[tuple[str, int], list[float]] = {case: [] for case in models}
            busy: dict[tuple[str, int], list[float]] = {case: [] for case in models}
            for turn in range(given.turns + 1):
                for case, model in models.items():
                    started, cpu = time.perf_counter(), time.process_time()
                    getattr(model, method)(frames[case])
                    seconds[case] += [time.perf_counter() - started] if turn else []
                    busy[case] += [time.process_time() - cpu] if turn else []
            records = [
                {
                    **record(f"{method}, {name}", case, seconds, len(rows)),
                    "cpu_s": round(statistics.median(busy[case]), 2),
                }
                for case in models
            ]
            print(json.dumps({f"classes, {method}, {name}": records}))
            print(table(records), flush=True)


def record(name: str, case: tuple[str, int], seconds: Any, rows: int) -> dict[str, Any]:
    """What some classes cost, and how many times as much as two of them."""
    kind, n = case
    ratios = [own / two for own, two in zip(seconds[case], seconds[kind, 2], strict=True)]
    return {
        "prompts": name,
        "classes": f"{n} {kind}",
        "rows/s": round(statistics.median(rows / s for s in seconds[case]), 1),
        "times the cost of 2": round(statistics.median(ratios), 2),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
    }


if __name__ == "__main__":
    main()
