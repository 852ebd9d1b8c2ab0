"""Scoring of classes against transformers' generate, naive log-likelihoods and lm-evaluation-harness, on SmolLM2.

Usage: python tests/benchmarks/scoring.py PATH/TO/sms_spam.csv [--turns N] [--only CASE] [--times N] [--sides NAME ...]
       [--base-model NAME] [--device cpu|cuda]

--times: so many times the rows of a case. --sides: few peers at a time; the longer a side waits for its turn, the more
of its memory a system may take back meanwhile, and the quickest side pays most for that.

With two classes the model is one that llmfit has fitted to 200 other messages, merged, which every side loads: what
`generate` says is a class then. Peers read 8 or 32 rows at once.

"agree" is the share of rows for which a side's best class is that of naive log-likelihoods in float32. Where it is
below 0.9, a side does not answer the question: of llmfit that ends the run, of a peer the speed means nothing, and
`valid` says so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import pandas as pd
from alternate import Side, chosen, compare, own, peer, summary, table
from cases import LONG, SHORT, TWENTY, bare, messages, options, rendered, where

from llmfit import LLMClassifier

AGREE = 0.9
BATCHES = (8, 32)  # rows at once of the peers
FITTED = 200  # messages
CASES: dict[str, tuple[dict[str, str], list[str], int]] = {
    "2 classes, short": (SHORT, ["ham", "spam"], 64),
    "2 classes, 200-token instruction": (LONG, ["ham", "spam"], 48),
    "20 classes of several tokens": ({"task": "Name the kind of this SMS message."}, TWENTY, 16),
}


def fitted(given: argparse.Namespace, case: str, folder: str) -> argparse.Namespace:
    """The options with a model that has learned the classes of a case."""
    settings: dict[str, Any] = {"adapter": {"r": 16}, "learning_rate": 5e-4, "batch_size": 8, "epochs": 1}
    settings |= {"features": "text", "target": "label", "template": CASES[case][0], "device": given.device}
    model = LLMClassifier(given.base_model, **settings, random_state=0, verbose=0)
    model.fit(messages(given.path)[:FITTED]).export(folder, merge=True)
    return argparse.Namespace(**{**vars(given), "base_model": folder})


def sides(given: argparse.Namespace, case: str) -> dict[str, Any]:
    """The same prompts and labels for every side."""
    template, answers, rows = CASES[case]
    rows *= given.times
    frame = messages(given.path)[3000 : 3000 + rows]
    texts = frame["text"].tolist()
    job: dict[str, Any] = {"template": template, "texts": texts, "answers": answers, **where(given)}
    known = frame.assign(label=[answers[i % len(answers)] for i in range(rows)])
    job["prompts"] = [prompt for prompt, _ in rendered(known, template, given.base_model)]
    written = rendered(pd.DataFrame({"text": ["x"] * len(answers), "label": answers}), template, given.base_model)
    job["labels"] = bare(written, answers)
    command = peer("peer_score.py")
    return {
        "llmfit": (own("llmfit_score.py"), job),
        **{
            f"{name}, {batch} rows": (command, {**job, "peer": name, "batch": batch})
            for name in ("generate", "naive", "harness")
            for batch in BATCHES
        },
    }


def judged(given: argparse.Namespace, case: str) -> list[dict[str, Any]]:
    """What the sides of a case took, and whether their answers are those of naive log-likelihoods."""
    every = sides(given, case)
    command, job = every["naive, 8 rows"]
    exact = Side("naive, float32", command, {**job, "dtype": "float32"})
    truth = exact.ask({"turn": 0})["best"]
    exact.close()
    found = compare(chosen(every, given.sides), turns=given.turns)
    for turns in found.values():
        for turn in turns:
            turn["agree"] = round(sum(map(int.__eq__, turn["best"], truth)) / len(truth), 3)
    records = [{**record, "valid": record["agree"] >= AGREE} for record in summary(found, "rows")]
    if not records[0]["valid"]:
        raise SystemExit(f"Speed is not compared: llmfit agrees in {records[0]['agree']} of the rows.")
    return records


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sides", nargs="+", help="peers to compare with, as the tables name them")
    parser.add_argument("--only", choices=[*CASES])
    given = parser.parse_args()
    for case in [given.only] if given.only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            records = judged(given if CASES[case][1] is TWENTY else fitted(given, case, folder), case)
        print(json.dumps({f"scoring, {case}": records}))
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
