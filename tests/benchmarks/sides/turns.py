"""What every side does alike: read a job, get ready, take turns, measure each."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def peak_mb() -> float:
    """Peak of resident memory so far, in MB, or of a GPU's memory where one is at work.

    Of resident memory getrusage would begin with what the process had that started this one.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 1e6)
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def keep_freed() -> None:
    """Let glibc keep freed blocks of up to 32 MB, as llmfit does: which by chance some would anyway, some not."""
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8)


def serve(prepare: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Prepare for the job of the first line; then work once for each further line.

    What the work returns may hold "seconds" and "cpu_seconds" of the part that counts, where it is not all.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    job = json.loads(sys.stdin.readline())
    keep_freed()
    work = prepare(job)
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        done = work(json.loads(line))
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({**took, **done, "peak_mb": peak_mb()}), file=channel, flush=True)
