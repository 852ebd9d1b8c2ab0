"""A grid over LoRA whose candidates train side by side, against the same grid one at a time, on SmolLM2.

Usage: python tests/benchmarks/fused_search.py PATH/TO/sms_spam.csv [--turns N] [--rows N] [--batch-size N]
       [--dtype bfloat16|float32] [--only short|long] [--base-model NAME] [--device cpu|cuda]

Six candidates and three folds. The whole search, scoring included, and the training alone are reported apart, in rows
trained on a second; `apart` is the furthest that a candidate's score is from its score alone. There is no verdict on
speed where that is more than rounding; on a GPU in bfloat16, where rounding decides what steps of training lead to,
where candidates side by side are worse than chance makes them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from alternate import check_losses, compare, own, summary, table
from cases import LONG, SHORT, messages, options, where

TEMPLATES = {"short": SHORT, "long": LONG}
GRID = {"adapter__r": [4, 16], "learning_rate": [1e-4, 5e-4, 1e-3]}
ROUNDING = 1e-4  # of a score
SIDES = {"side by side": True, "one at a time": False}


def sides(given: argparse.Namespace, template: dict[str, Any]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The same search for both sides."""
    job = {"rows": messages(given.path)[: given.rows].to_dict("list"), "template": template, "grid": GRID, "folds": 3}
    job |= {"batch_size": given.batch_size, "dtype": given.dtype, **where(given)}
    return {name: (own("llmfit_fused.py"), {**job, "fused": fused}) for name, fused in SIDES.items()}


def report(name: str, given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the search, the training in it, and how far the scores are apart."""
    training = {side: [{**turn, "seconds": turn["fit_seconds"]} for turn in turns] for side, turns in found.items()}
    one, other = (turns[-1]["scores"] for turns in found.values())
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    if given.dtype == "bfloat16" and given.device != "cpu":
        losses = {side: [{"losses": [-s for s in turn["scores"]]} for turn in turns] for side, turns in found.items()}
        check_losses(losses)
    elif not apart <= ROUNDING:
        raise SystemExit(f"Speed is not compared: scores are {apart} apart.")
    for part, turns in (("search", found), ("training", training)):
        records = summary(turns, "rows")
        print(json.dumps({f"fused search, {name}, {part}": records, "apart": apart}))
        print(table(records), flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", choices=[*TEMPLATES])
    given = parser.parse_args()
    for name in [given.only] if given.only else TEMPLATES:
        report(name, given, compare(sides(given, TEMPLATES[name]), turns=given.turns))


if __name__ == "__main__":
    main()
