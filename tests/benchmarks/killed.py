"""Score 20,000 rows in a process that is killed ten times at random, and compare with a run that is not.

    python tests/benchmarks/killed.py [rows] [kills]

The model is the tests' fake one: what is seen is what becomes of the files. Each run is a process of its own, which
gets SIGKILL a moment after a number of rows that is drawn, of the first nine tenths. Among the rows are some that
cannot be answered. Ends with an error where bytes differ, or a kill came too late to be one.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
NAMES = ["out.csv", "out.parquet", "out.jsonl.gz"]


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.write("id,text,size\n")
        for i in range(count):
            file.write(
                "lonely\n" if i % 997 == 5 else f'{i:07d},"row {i}, it says ""é""",{"x" if i % 499 == 7 else i % 101}\n'
            )


def score(folder: Path, name: str) -> None:
    """Run in a process of its own."""
    sys.path.insert(0, str(TESTS))
    import fake_model
    import pandas as pd
    import pytest

    import llmfit

    fake_model.put_in_place(pytest.MonkeyPatch())
    frame = pd.DataFrame({"size": range(8), "label": ["low"] * 4 + ["high"] * 4})
    clf = llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)
    print("ready", flush=True)
    clf.predict_files(folder / "in.csv", folder / name, proba=True, chunk_rows=100, resume=True)


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    """Start a run and wait until it begins to score."""
    run = subprocess.Popen([sys.executable, __file__, "--run", str(folder), name], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    return run


def rows_done(folder: Path, name: str) -> int:
    try:
        return int(json.loads((folder / f"{name}.manifest.json").read_text())["rows"])
    except FileNotFoundError:
        return 0


def is_done(folder: Path, name: str) -> bool:
    path = folder / f"{name}.manifest.json"
    return path.exists() and json.loads(path.read_text())["done"]


def kill(folder: Path, name: str, rows: int, draw: random.Random) -> int | None:
    """Kill a run a moment after it has done so many rows.

    Gives how many the next one finds done; None where the run came to its end before it could be killed.
    """
    run = start(folder, name)
    while rows_done(folder, name) < rows and run.poll() is None:
        time.sleep(0.001)
    time.sleep(0.02 * draw.random())
    run.send_signal(signal.SIGKILL)
    return rows_done(folder, name) if run.wait() == -signal.SIGKILL and not is_done(folder, name) else None


def main(count: int, kills: int) -> int:
    draw, wrong = random.Random(0), 0
    with tempfile.TemporaryDirectory() as temporary:
        plain, killed = Path(temporary, "plain"), Path(temporary, "killed")
        for folder in (plain, killed):
            folder.mkdir()
            write_rows(folder / "in.csv", count)
        for name in NAMES:
            assert start(plain, name).wait() == 0
            moments = [kill(killed, name, rows, draw) for rows in sorted(draw.sample(range(count * 9 // 10), kills))]
            assert start(killed, name).wait() == 0
            same = {f.name for f in plain.iterdir()} == {f.name for f in killed.iterdir()}
            same = same and all((killed / f.name).read_bytes() == f.read_bytes() for f in plain.iterdir())
            late = moments.count(None)
            wrong += not same or late > 0
            after = ", ".join("all (TOO LATE)" if rows is None else str(rows) for rows in moments)
            digest = hashlib.sha256((killed / name).read_bytes()).hexdigest()[:16]
            print(f"{name}: killed after {after} rows; {'the same bytes' if same else 'OTHER BYTES'}, {digest}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        score(Path(sys.argv[2]), sys.argv[3])
    else:
        given = [int(number) for number in sys.argv[1:]]
        sys.exit(main(*[*given, *[20_000, 10][len(given) :]]))
