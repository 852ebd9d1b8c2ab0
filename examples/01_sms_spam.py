"""Classify SMS messages as ham or spam, zero-shot and fine-tuned.

Usage: python examples/01_sms_spam.py PATH/TO/sms_spam.csv [ROWS]

The file has the columns text and label: the UCI SMS Spam Collection
(https://archive.ics.uci.edu/dataset/228/sms+spam+collection) as a CSV file.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from llmfit import LLMClassifier

TASK = {"task": "Classify the SMS message as ham or spam."}
PREDICT = """
import sys, llmfit, pandas as pd
model = llmfit.load(sys.argv[1] + "/model", verbose=0)
model.predict(pd.read_csv(sys.argv[1] + "/test.csv")).to_csv(sys.argv[1] + "/predicted.csv", index=False)
"""


def main(path: str, rows: int = 400) -> None:
    messages = pd.read_csv(path).sample(frac=1, random_state=7).reset_index(drop=True)
    train, test = messages[:rows], messages[3000 : 3000 + rows].reset_index(drop=True)
    print(f"share of the larger class: {test['label'].value_counts(normalize=True).max():.4f}")

    zero_shot = LLMClassifier("smollm2", features="text", target="label", template=TASK, adapter=None).fit(train)
    print(f"zero-shot accuracy: {zero_shot.score(test):.4f}")

    model = LLMClassifier(
        "smollm2", features="text", target="label", template=TASK, epochs=2, learning_rate=5e-4, random_state=0
    )
    started = time.perf_counter()
    model.fit(train)
    print(f"fitted {len(train)} rows in {time.perf_counter() - started:.0f} s")
    started = time.perf_counter()
    predicted = model.predict(test)
    print(f"scored {len(test) / (time.perf_counter() - started):.1f} rows a second")
    print(f"fine-tuned accuracy: {(predicted == test['label']).mean():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        test.to_csv(Path(folder) / "test.csv", index=False)
        subprocess.run([sys.executable, "-c", PREDICT, folder], check=True)
        again = pd.read_csv(Path(folder) / "predicted.csv")["label"]
    print(f"same predictions after load in another process: {(again == predicted).all()}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
