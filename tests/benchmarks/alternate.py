"""Sides of a comparison, each in a process of its own, that take turns.

A side is a script that reads one job, a JSON line, from standard input, gets ready, and then does a unit of work for
each further line, answering with a JSON line of its own. Only one of them works at any moment; each unit's wall and CPU
seconds and the side's peak of resident memory are taken, and what is reported are medians over the turns, and medians
of the ratios of single turns with their spread.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

HERE = Path(__file__).parent
SIDES = HERE / "sides"


class Side:
    """A process that works when it is told to."""

    def __init__(self, name: str, command: Sequence[str], job: Mapping[str, Any]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready = self.ask(job)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line, wait for one that answers it; what else the side prints is passed over."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self.errors.seek(0)
        raise SystemExit(f"{self.name} ended: {self.errors.read().decode(errors='replace')[-2000:]}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def chosen(every: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Keep the first side, llmfit's, and those of these names; None keeps all."""
    first = next(iter(every))
    if unknown := sorted({*(names or ())} - {*every}):
        raise SystemExit(f"--sides: {unknown[0]!r} is none of {', '.join(map(repr, every))}.")
    return {side: job for side, job in every.items() if names is None or side in (first, *names)}


def compare(
    sides: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]],
    *,
    turns: int,
    request: Mapping[str, Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Let sides take turns; the first turn of each warms it up and is dropped."""
    running = {}
    for name, (command, job) in sides.items():
        running[name] = Side(name, command, job)
        print(f"{name}: ready", file=sys.stderr)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in running.items():
            answer = side.ask({"turn": turn, **(request or {})})
            print(f"{name}: {answer['seconds']:.2f} s", file=sys.stderr)
            if turn:
                found[name].append(answer)
    for side in running.values():
        side.close()
    return found


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]], units: str) -> list[dict[str, Any]]:
    """Medians of each side, and how many times as fast the first side is."""
    first = next(iter(found))
    records = []
    for name, turns in found.items():
        ratios = [other["seconds"] / own["seconds"] for own, other in zip(found[first], turns, strict=True)]
        records.append(
            {
                "side": name,
                f"{units}/s": round(statistics.median(turn[units] / turn["seconds"] for turn in turns), 2),
                **_tokens(turns),
                "wall_s": round(statistics.median(turn["seconds"] for turn in turns), 2),
                "cpu_s": round(statistics.median(turn["cpu_seconds"] for turn in turns), 2),
                "times_slower": round(statistics.median(ratios), 2),
                "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "peak_mb": round(max(turn["peak_mb"] for turn in turns)),
                **{key: turns[-1][key] for key in ("loss", "agree", "accuracy") if key in turns[-1]},
            }
        )
    return records


def check_quality(shares: Sequence[float], *, answers: int) -> None:
    """End where the first side's share of right answers is lower than another's by more than two standard errors."""
    first, *others = shares
    for other in others:
        noise = 2 * math.sqrt((first * (1 - first) + other * (1 - other)) / answers)
        if first < other - noise:
            raise SystemExit(f"Speed is not compared: {first} right against {other}, noise {noise:.3f}.")


def check_losses(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """End where the first side is surely worse than another; give mean losses, and what chance may do, in nats.

    Losses stand in the same order on all sides and turns, so that what differs is taken for each by itself. What turns
    differ by, each of which has a seed or rows of its own, counts as what rows do: few steps end here or there by
    chance. Where they leave every answer the same, it is losses that tell what was learned.
    """
    losses = {name: np.array([turn["losses"] for turn in turns]) for name, turns in found.items()}  # (turns, rows)
    first, *others = losses
    means = {name: {"log_loss": round(float(each.mean()), 4)} for name, each in losses.items()}
    for other in others:
        worse = losses[first] - losses[other]
        mean, noise = worse.mean(), math.hypot(_likely(worse.mean(axis=0)), _likely(worse.mean(axis=1)))
        if not mean <= noise:  # also where either is no number
            raise SystemExit(f"Speed is not compared: {first} loses {mean:.4f} more than {other}, noise {noise:.4f}.")
        means[other]["chance"] = round(noise, 4)
    return means


def _likely(numbers: NDArray[np.float64]) -> float:
    """Say how far from 0 the mean of numbers is in one of forty cases, where it should be 0."""
    if len(numbers) < 2:
        return 0.0
    return float(t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))


def _tokens(turns: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens a second, where a side counts them."""
    if "tokens" not in turns[-1]:
        return {}
    return {"tokens/s": round(statistics.median(turn["tokens"] / turn["seconds"] for turn in turns))}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Write records as a Markdown table."""
    names = list(dict.fromkeys(name for record in records for name in record))
    lines = [names, ["---"] * len(names), *([str(record.get(name, "")) for name in names] for record in records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def own(script: str) -> list[str]:
    """Command of a side that uses llmfit."""
    return [sys.executable, str(SIDES / script)]


def peer(script: str) -> list[str]:
    """Command of a side that uses the peers, which live in an environment of their own."""
    python = os.environ.get("LLMFIT_PEERS", ".venv-peers/bin/python")
    if not Path(python).exists():
        raise SystemExit(f"The peers are not installed: there is no {python}, which make bench makes.")
    return [python, str(SIDES / script)]
