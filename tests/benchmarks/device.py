"""What packing gains on a device, by the rows of a step: training, scoring and a search, all in one process.

Usage: python tests/benchmarks/device.py PATH/TO/sms_spam.csv [--turns N] [--parts scoring training search]
       [--training PROMPT:ROWS_OF_A_STEP ...] [--base-model NAME] [--device cpu|cuda]

Ways take turns: rows packed, the same rows padded, the plain way with transformers and peft, and TRL where it is
installed, of which only the training counts, as of llmfit the whole `fit`. `peak_mb` is of a GPU's memory, with the
model's; a way that runs out of it has no figures. The first turn warms up and is dropped, but of the search, which
comes last.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from alternate import table
from cases import LONG, SHORT, TWENTY, messages, options, rendered, where
from sklearn.model_selection import GridSearchCV

import llmfit
from llmfit import scoring, training
from llmfit.base_model import load_base_model
from llmfit.search import FusedGridSearchCV

sys.path.insert(0, str(Path(__file__).parent / "sides"))
import peer_train
from labels import label_scores

STEPS = 8
GRID = {"adapter__r": [4, 16], "learning_rate": [1e-4, 3e-4, 5e-4, 1e-3]}


@contextmanager
def padded() -> Iterator[None]:
    """Let nothing be packed."""
    places = [(room, name) for room in (scoring, training) for name in ("packable", "packable_answers")]
    found = {(room, name): getattr(room, name) for room, name in places if hasattr(room, name)}
    try:
        for room, name in found:
            setattr(room, name, lambda *_, **__: None)
        yield
    finally:
        for (room, name), function in found.items():
            setattr(room, name, function)


def measured(work: Callable[[], Any], device: str) -> dict[str, float] | None:
    """Seconds and peak memory of a turn, which may tell its own seconds; None where memory ran out."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        own = work()
    except torch.OutOfMemoryError:
        return None
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = own if isinstance(own, float) else time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0}


def compare(name: str, ways: dict[str, Callable[[], Any]], rows: int, given: Any, *, warm: bool = True) -> None:
    """Let ways take turns, and print what they took."""
    turns: dict[str, list[dict[str, float] | None]] = {way: [] for way in ways}
    for turn in range(-int(warm), given.turns):
        for way, work in ways.items():
            took = measured(work, given.device)
            turns[way] += [took] if turn >= 0 else []
    first = turns[next(iter(ways))]
    records = [{"way": way, **figures(first, found, rows)} for way, found in turns.items()]
    print(json.dumps({name: records}))
    print(f"{name}\n{table(records)}", flush=True)


def figures(first: list[Any], found: list[Any], rows: int) -> dict[str, Any]:
    if None in found or None in first:
        return {"rows/s": "out of memory", "times_slower": "", "peak_mb": ""}
    return {
        "rows/s": round(rows / statistics.median(turn["seconds"] for turn in found), 1),
        "times_slower": round(
            statistics.median(b["seconds"] / a["seconds"] for a, b in zip(first, found, strict=True)), 2
        ),
        "peak_mb": round(max(turn["peak_mb"] for turn in found)),
    }


def bare(model: Any) -> None:
    """Take peft's layers out of a model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)
    vars(model).pop("peft_config", None)
    model.requires_grad_(False).eval()


def model_of(given: Any, template: Any, **changed: Any) -> Any:
    own = {"features": "text", "target": "label", "template": template, "dtype": "bfloat16", "device": given.device}
    own |= {"adapter": {"r": 16, "alpha": 32}, "epochs": 1, "learning_rate": 5e-4, "random_state": 0, "verbose": 0}
    own["warmup"] = 0.0  # as the peers
    return llmfit.LLMClassifier(given.base_model, **{**own, **changed})


def train(name: str, template: Any, size: int, base: Any, given: Any) -> None:
    frame = messages(given.path)[: size * STEPS]
    pairs = rendered(frame, template, given.base_model)
    job = {"pairs": pairs, "batch_size": size, "warmup": 0.0, "mixed": given.device == "cuda", **where(given)}

    def fit() -> None:
        model_of(given, template, batch_size=size).fit(frame)

    def fit_padded() -> None:
        with padded():
            fit()

    def peer(train: Any, **changed: Any) -> float:
        try:
            _, _, (seconds, _) = train(base.model, base.tokenizer, {**job, **changed}, 0)
        finally:  # memory may have run out
            bare(base.model)
        return seconds

    ways = {"packed": fit, "padded": fit_padded, "plain loop": partial(peer, peer_train.train_loop)}
    if find_spec("trl"):
        ways["TRL"] = partial(peer, peer_train.train_trl)
        ways["TRL, padding-free"] = partial(peer, peer_train.train_trl, trl={"padding_free": True})
    compare(f"training, {name}, {size} rows a step", ways, len(frame), given)


def score(name: str, template: Any, answers: list[str], rows: int, base: Any, given: Any) -> None:
    frame = messages(given.path)[3000 : 3000 + rows]
    known = pd.DataFrame({"text": ["x"] * len(answers), "label": answers})
    model = model_of(given, template, adapter=None).fit(known)
    spread = [answers[i % len(answers)] for i in range(rows)]
    pairs = rendered(frame.assign(label=spread), template, given.base_model)
    closing = rendered(known, template, given.base_model)[0][1].removeprefix(answers[0])
    labels = [answer.removesuffix(closing) for _, answer in rendered(known, template, given.base_model)]

    def ask_padded() -> None:
        with padded():
            model.predict_proba(frame)

    ways = {
        "packed": lambda: model.predict_proba(frame),
        "padded": ask_padded,
        "naive": lambda: label_scores(base.model, base.tokenizer, [prompt for prompt, _ in pairs], labels, 64),
    }
    compare(f"scoring, {name}", ways, rows, given)


def search(given: Any) -> None:
    frame = messages(given.path)[:96]
    model = model_of(given, SHORT, batch_size=8)
    how = {"cv": 2, "scoring": "neg_log_loss", "refit": False}
    ways = {
        name: (lambda kind=kind: kind(model, GRID, **how).fit(frame, frame["label"]))
        for name, kind in {"side by side": FusedGridSearchCV, "one at a time": GridSearchCV}.items()
    }
    compare("search of 8 candidates and 2 folds, 8 rows a step", ways, 8 * 96, given, warm=False)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["scoring", "training", "search"])
    parser.add_argument("--training", nargs="+", default=["long:64", "short:64", "long:16", "short:16"])
    parser.add_argument("--rows", type=int, default=256, help="that are scored")
    given = parser.parse_args()
    base = load_base_model(given.base_model, dtype="bfloat16", device=given.device)
    if base.tokenizer.pad_token_id is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    if "scoring" in given.parts:
        score("2 classes, long prompt", LONG, ["ham", "spam"], given.rows, base, given)
        score("20 classes", {"task": "Name the kind of this SMS message."}, TWENTY, given.rows // 4, base, given)
    for case in given.training if "training" in given.parts else ():
        prompt, size = case.split(":")
        train(f"{prompt} prompt", {"long": LONG, "short": SHORT}[prompt], int(size), base, given)
    if "search" in given.parts:
        search(given)


if __name__ == "__main__":
    main()
