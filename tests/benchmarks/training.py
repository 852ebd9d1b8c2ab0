"""Training against TRL and a plain loop over transformers and peft, on SmolLM2.

Usage: python tests/benchmarks/training.py PATH/TO/sms_spam.csv [--turns N] [--rows N] [--batch-size N]
       [--only short|long] [--sides NAME ...] [--quality] [--base-model NAME] [--device cpu|cuda]

Losses on rows that were not trained on are compared before speed is: a run fails where llmfit's are higher by more than
rows and seeds may differ by chance. Rates fall from the first step on, as a warm-up of one step is another one in each
library. TRL's packing fills sequences that hold the tokens of a step: some remain open, so that it takes a step or two
more than the others. With --quality: these losses and accuracies alone, after two epochs of the same steps on the same
rows, three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from alternate import Side, check_losses, chosen, compare, own, peer, summary, table
from cases import LONG, SHORT, bare, messages, options, rendered, where
from transformers import AutoTokenizer

TEMPLATES = {"short": SHORT, "long": LONG}


def sides(
    given: argparse.Namespace, template: dict[str, Any], rows: int, test: int = 0, warmup: float = 0.0
) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The same rows for every side."""
    every = messages(given.path)
    train, held = every[:rows], every[3000 : 3000 + test]
    pairs = rendered(train, template, given.base_model)
    job: dict[str, Any] = {"batch_size": given.batch_size, "pairs": pairs, "template": template, "warmup": warmup}
    job |= where(given)
    job["rows"] = train.to_dict("list")
    if test:
        shown = rendered(held, template, given.base_model)
        right = bare(shown, held["label"].tolist())
        labels = sorted({*right})
        job |= {"test": held.to_dict("list"), "test_prompts": [prompt for prompt, _ in shown], "labels": labels}
        job["truth"] = [labels.index(label) for label in right]
    trl = {**job, "peer": "trl", "mixed": False}
    loop = {**trl, "peer": "loop"}
    free, eager = {"trl": {"padding_free": True}}, {"attention": "eager"}
    full = {"packing": True, "per_device_train_batch_size": 1, "max_length": _tokens_of_a_step(job, pairs)}
    packing = {"trl": {**full, "train_sampling_strategy": "random"}}
    peers = {
        "TRL": trl,
        "TRL, eager": trl | eager,
        "TRL, padding-free": trl | free,
        "TRL, padding-free, eager": trl | free | eager,
        "TRL, packing": trl | packing,
        "TRL, packing, eager": trl | packing | eager,
        "plain loop": loop,
        "plain loop, eager": loop | eager,
    }
    command = peer("peer_train.py")
    return {"llmfit": (own("llmfit_train.py"), job), **{name: (command, job) for name, job in peers.items()}}


def _tokens_of_a_step(job: dict[str, Any], pairs: list[tuple[str, str]]) -> int:
    """Count the tokens of as many rows as a step has, of middling length."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    tokens = sum(len(tokenizer(prompt + completion)["input_ids"]) for prompt, completion in pairs)
    return round(job["batch_size"] * tokens / len(pairs))


def quality(given: argparse.Namespace, rows: int = 200, test: int = 200) -> list[dict[str, Any]]:
    """Accuracy and log loss after the same steps, three seeds; of TRL as it is quickest."""
    found = {}
    for name, (command, job) in sides(given, SHORT, rows, test, warmup=0.1).items():
        if name in ("llmfit", "TRL, padding-free, eager"):
            side = Side(name, command, {**job, "epochs": 2})
            found[name] = [side.ask({"turn": 0, "seed": seed, "evaluate": True}) for seed in range(3)]
            side.close()
    losses, records = check_losses(found), []
    for name, turns in found.items():
        scores = [turn["accuracy"] for turn in turns]
        mean = round(statistics.mean(scores), 4)
        records.append({"side": name, "accuracy": scores, "mean": mean, **losses[name]})
    return records


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", choices=[*TEMPLATES])
    parser.add_argument("--sides", nargs="+", help="peers to compare with; all live at once, so mind the memory")
    parser.add_argument("--quality", action="store_true")
    given = parser.parse_args()
    if given.quality:
        records = quality(given)
        print(json.dumps({"training quality": records}))
        print(table(records))
        return
    for name in [given.only] if given.only else TEMPLATES:
        every = sides(given, TEMPLATES[name], given.rows, test=32)
        found = compare(chosen(every, given.sides), turns=given.turns, request={"evaluate": True})
        losses, records = check_losses(found), summary(found, "rows")
        for record in records:
            record |= losses[record["side"]]
        print(json.dumps({f"training, {name}": records}))
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
