"""What `import llmfit` costs beside pandas and scikit-learn, in processes of their own that take turns.

Usage: python tests/benchmarks/importing.py [--turns N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from alternate import table

CODE = {
    "pandas and scikit-learn": "import pandas, sklearn",
    "llmfit": "import llmfit",
    "an estimator and the searches": "from llmfit import LLMClassifier; import llmfit.search",
}
CLOCK = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started, time.process_time())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    found: dict[str, list[float]] = {name: [] for name in CODE}
    busy: dict[str, list[float]] = {name: [] for name in CODE}
    for turn in range(parser.parse_args().turns + 1):
        for name, code in CODE.items():
            done = subprocess.run(
                [sys.executable, "-c", CLOCK.format(code)], capture_output=True, text=True, check=True
            )
            wall, cpu = map(float, done.stdout.split())
            found[name] += [wall] if turn else []
            busy[name] += [cpu] if turn else []
    first = next(iter(found.values()))
    records = []
    for name, seconds in found.items():
        more = [own - before for own, before in zip(seconds, first, strict=True)]
        spread = f"{min(more):.2f} to {max(more):.2f}"
        record = {"import": name, "s": round(statistics.median(seconds), 2)}
        record |= {"cpu_s": round(statistics.median(busy[name]), 2), "more_s": round(statistics.median(more), 2)}
        records.append({**record, "spread": spread})
    print(json.dumps({"import": records}))
    print(table(records))


if __name__ == "__main__":
    main()
