"""How near training comes to what the frozen base alone allows, on SmolLM2, and to what the machine multiplies.

Usage: python tests/benchmarks/limit.py PATH/TO/sms_spam.csv [--turns N] [--rows N] [--only short|long]
       [--dropout SHARE] [--base-model NAME] [--device cpu|cuda]

One turn of a way is forward and backward over 64 messages, or --rows of them, 8 rows a pass, gradients as far as the
embeddings. The ways take turns in one process: the frozen base on packed rows, LoRA on them, LoRA as peft computes it,
and that padded; and a whole `fit` of the same rows, from the frame on, its optimiser and all, whose rows come in
another order. --dropout: of LoRA, 0 by default.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from alternate import table
from cases import LONG, SHORT, messages, options, rendered

from llmfit import LLMClassifier
from llmfit.adapters import LoRA, fused
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.forward import collate
from llmfit.objectives import supervised
from llmfit.packing import common_prefix, packed

STEP = 8


def ways_of(dropout: float) -> dict[str, tuple[LoRA | None, bool, bool]]:
    """The ways of a turn: adapter, whether fused, whether packed."""
    own = LoRA(r=16, dropout=dropout)
    of_peft = LoRA(
        r=16, alpha=32, dropout=dropout
    )  # another spec of the same: the first one stands in the model, fused
    return {
        "frozen base, packed": (None, True, True),
        "LoRA, packed": (own, True, True),
        "LoRA of peft, packed": (of_peft, False, True),
        "LoRA of peft, padded": (of_peft, False, False),
    }


def encoded(base: Any, given: Any, template: dict[str, str]) -> list[Encoded]:
    """Token ids of the prompts and completions."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = rendered(messages(given.path)[: given.rows], template, given.base_model)
    return [Encoded(ids(prompt), ids(answer)) for prompt, answer in pairs]


@contextmanager
def unfused() -> Iterator[None]:
    """Leave LoRA layers to peft."""
    fuse = fused.fuse_lora
    fused.fuse_lora = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        fused.fuse_lora = fuse


def one_turn(base: Any, rows: list[Encoded], way: tuple[LoRA | None, bool, bool]) -> tuple[float, float]:
    """Wall and CPU seconds of a turn."""
    adapter, is_fused, is_packed = way
    shared = common_prefix([row.prompt for row in rows]) if is_packed else None
    with nullcontext() if is_fused else unfused(), base.attach(adapter, training=True, longest=400) as model:
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        with packed(model) if is_packed else nullcontext():
            wall, cpu = time.perf_counter(), time.process_time()
            for start in range(0, len(rows), STEP):
                batch = collate(rows[start : start + STEP], base.pad_id, base.device, shared=shared)
                loss = supervised(model, batch)
                loss.backward()
            if base.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - wall, time.process_time() - cpu


def one_fit(base: Any, frame: Any, given: Any, template: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a fit over the same rows."""
    settings = {"features": "text", "target": "label", "template": template, "epochs": 1}
    settings |= {"adapter": LoRA(r=16, dropout=given.dropout)}
    place = {"dtype": "bfloat16", "device": given.device}
    model = LLMClassifier(given.base_model, **settings, **place, batch_size=STEP, random_state=0, verbose=0)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(frame)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Multiply-adds counted as two, in GFLOP/s, of a product of the shape that fills most of a step's time."""
    a, b = torch.randn(512, 576).to(device, dtype), torch.randn(1536, 576).to(device, dtype)
    torch.nn.functional.linear(a, b)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(a, b)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * 2 * 512 * 576 * 1536 / (time.perf_counter() - started) / 1e9


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", choices=["short", "long"])
    parser.add_argument("--dropout", type=float, default=0.0)
    given = parser.parse_args()
    base = load_base_model(given.base_model, dtype="bfloat16", device=given.device)
    for name in [given.only] if given.only else ["short", "long"]:
        template = {"short": SHORT, "long": LONG}[name]
        rows, frame = encoded(base, given, template), messages(given.path)[: given.rows]
        tokens = sum(row.length for row in rows)
        ways = ways_of(given.dropout)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in (*ways, "whole fit")}
        for turn in range(given.turns + 1):
            for way, turns in found.items():
                took = one_turn(base, rows, ways[way]) if way in ways else one_fit(base, frame, given, template)
                turns += [took] if turn else []
        first = found["frozen base, packed"]
        records = [
            {
                "way": way,
                "tokens/s": round(statistics.median(tokens / wall for wall, _ in turns)),
                "wall_s": round(statistics.median(wall for wall, _ in turns), 2),
                "cpu_s": round(statistics.median(cpu for _, cpu in turns), 2),
                "of frozen": round(statistics.median(a[0] / b[0] for a, b in zip(first, turns, strict=True)), 3),
                "spread": " to ".join(
                    f"{edge(a[0] / b[0] for a, b in zip(first, turns, strict=True)):.2f}" for edge in (min, max)
                ),
            }
            for way, turns in found.items()
        ]
        print(json.dumps({f"limit, {name}": records}))
        print(table(records), flush=True)
    rates = {str(dtype): round(matmul_rate(dtype, base.device)) for dtype in (torch.bfloat16, torch.float32)}
    print(json.dumps({"GFLOP/s of 512 x 576 by 576 x 1536": rates}))


if __name__ == "__main__":
    main()
