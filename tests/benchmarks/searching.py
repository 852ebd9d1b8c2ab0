"""A search of 6 candidates and 3 folds against the same fits with TRL, in a loop that loads the model for each.

Usage: python tests/benchmarks/searching.py PATH/TO/sms_spam.csv [--base-model NAME] [--device cpu|cuda]

A turn is one fold: six fits of LoRA on 32 messages and their scores on 16 others. TRL trains as it is quickest on such
rows: without padding, with transformers' plain attention. It ends without a verdict on speed where llmfit's mean loss
on the other messages is higher by more than candidates and folds may differ by chance.
"""

from __future__ import annotations

import json
import statistics

from alternate import check_losses, compare, own, peer, summary, table
from cases import SHORT, bare, messages, options, rendered, where

ROWS, FOLDS = 48, 3
GRID = {"adapter__r": [4, 8, 16], "learning_rate": [2e-4, 5e-4]}


def main() -> None:
    given = options(__doc__).parse_args()
    frame = messages(given.path)[:ROWS]
    pairs = rendered(frame, SHORT, given.base_model)
    labels = bare(pairs, frame["label"].tolist())
    folds = [[i for i in range(ROWS) if i % FOLDS == fold] for fold in range(FOLDS)]
    job = {"template": SHORT, "rows": frame.to_dict("list"), "folds": folds, "grid": GRID, "batch_size": 8}
    job |= {"pairs": pairs, "labels": sorted({*labels}), "truth": [sorted({*labels}).index(label) for label in labels]}
    job |= {"mixed": False, "warmup": 0, **where(given)}  # TRL's first step of a warm-up teaches nothing
    best = {**job, "trl": {"padding_free": True}, "attention": "eager"}
    sides = {"llmfit": (own("llmfit_search.py"), job), "TRL in a loop": (peer("peer_search.py"), best)}
    found = compare(sides, turns=FOLDS)
    losses, records = check_losses(found), summary(found, "fits")
    for record in records:
        record["accuracy"] = round(statistics.mean(turn["accuracy"] for turn in found[record["side"]]), 4)
        record |= losses[record["side"]]
    print(json.dumps({"search": records}))
    print(table(records))


if __name__ == "__main__":
    main()
