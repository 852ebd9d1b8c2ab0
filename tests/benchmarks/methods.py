"""Every method on one task with a real model: accuracy, time, memory, trained weights as a share of the base's.

Usage: python tests/benchmarks/methods.py PATH/TO/sms_spam.csv [NAME ...] [--json OUT] [--plot OUT.png]

The file has the columns text and label (the UCI SMS Spam Collection as CSV). Each method runs in a process of its own,
one after the other, so that its peak of resident memory is its own; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASK = {"task": "Classify the SMS message as ham or spam."}
TRAIN, TEST, EPOCHS = 200, 300, 2
FIELDS = ["method", "learning_rate", "accuracy", "log_loss", "fit_seconds", "peak_mb", "base_mb", "trainable", "share"]

# Parameters of each method; where a learning rate stands, the method's own default was worse or it was looked for.
METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"adapter": None},
    "full": {"adapter": "full", "learning_rate": 2e-5},
    "lora": {"adapter": "lora", "learning_rate": 5e-4},
    "dora": {"adapter": {"type": "lora", "use_dora": True}, "learning_rate": 5e-4},
    "adalora": {"adapter": "adalora", "learning_rate": 5e-3},
    "ia3": {"adapter": "ia3"},
    "adaption_prompt": {"adapter": "adaption_prompt", "learning_rate": 1e-2},
    "prefix_tuning": {"adapter": "prefix_tuning", "learning_rate": 3e-2},
    "prompt_tuning": {"adapter": "prompt_tuning", "learning_rate": 1e-1},
    "p_tuning": {"adapter": "p_tuning", "learning_rate": 1e-2},
    "qlora (4 bit)": {"adapter": "lora", "quantization": 4, "learning_rate": 5e-4},
    "lora (8 bit)": {"adapter": "lora", "quantization": 8, "learning_rate": 5e-4},
    "frozen + linear": {"adapter": None, "head": "linear"},
}


def measure(path: str, name: str) -> dict[str, Any]:
    """Fit and score one method in this process."""
    import pandas as pd

    from llmfit import LLMClassifier

    messages = pd.read_csv(path).sample(frac=1, random_state=7).reset_index(drop=True)
    train, test = messages[:TRAIN], messages[3000 : 3000 + TEST]
    model = LLMClassifier(
        "smollm2",
        features="text",
        target="label",
        **{"template": TASK, "epochs": EPOCHS, "random_state": 0, "verbose": 0, **METHODS[name]},
    )
    model.preview(train, 1)  # loads the base model, whose time is not the method's
    started = time.perf_counter()
    model.fit(train)
    seconds = time.perf_counter() - started
    scores = model.evaluate(test)
    from llmfit.base_model import load_base_model

    total = sum(p.numel() for p in load_base_model("smollm2").model.parameters())
    return {
        "method": name,
        "learning_rate": model.learning_rate_,
        "accuracy": round(scores["accuracy"], 4),
        "log_loss": round(scores["log_loss"], 4),
        "fit_seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "base_mb": round(model.memory_footprint_ / 1e6),
        "trainable": model.trainable_parameters_,
        "share": round(100 * model.trainable_parameters_ / total, 4),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Write the records as a Markdown table."""
    lines = ["| " + " | ".join(FIELDS) + " |", "|" + "---|" * len(FIELDS)]
    return "\n".join([*lines, *("| " + " | ".join(str(r.get(f, "")) for f in FIELDS) + " |" for r in records)])


def plot(records: list[dict[str, Any]], out: str) -> None:
    """Draw accuracy against the time of the fit, the share of trained weights as the size of the points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for i, record in enumerate(sorted(records, key=lambda record: (record["accuracy"], record["fit_seconds"]))):
        point = (record["fit_seconds"], record["accuracy"])
        axes.scatter(*point, s=30 + 240 * (record["share"] / 100) ** 0.25, alpha=0.7)
        axes.annotate(record["method"], point, (8, -14 if i % 2 else 6), textcoords="offset points")
    title = f"SmolLM2-135M, {TRAIN} SMS messages, {EPOCHS} epochs (larger points: more weights are trained)"
    axes.set(xlabel="seconds of the fit", ylabel=f"accuracy on {TEST} other messages", title=title)
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main() -> None:
    """Run the methods, print JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("names", nargs="*", default=list(METHODS))
    parser.add_argument("--one", action="store_true", help="run the single method named in this process")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.path, given.names[0])))
        return
    records = []
    for name in given.names:
        command = [sys.executable, __file__, given.path, name, "--one"]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            print(f"{name} failed:\n{out.stderr}", file=sys.stderr)
            continue
        records.append(json.loads(out.stdout.splitlines()[-1]))
        print(json.dumps(records[-1]), flush=True)
    print("\n" + table(records))
    if given.json:
        Path(given.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(records, given.plot)


if __name__ == "__main__":
    main()
