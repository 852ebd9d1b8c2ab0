"""Fit a classifier with llmfit: a whole `fit` from the frame on, the base model loaded before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from turns import serve

import llmfit


def prepare(job: dict[str, Any]) -> Any:
    rows, test = pd.DataFrame(job["rows"]), pd.DataFrame(job.get("test", []))
    settings = {
        "features": "text",
        "target": "label",
        "template": job["template"],
        "adapter": {"r": 16, "alpha": 32},
        "epochs": job.get("epochs", 1),
        "batch_size": job["batch_size"],
        "learning_rate": 5e-4,
        "warmup": job["warmup"],
        "dtype": "bfloat16",
        "device": job["device"],
        "verbose": 0,
    }
    llmfit.LLMClassifier(job["base_model"], **settings, random_state=0).preview(rows, 1)  # loads the base model

    def work(request: dict[str, Any]) -> dict[str, Any]:
        import time

        model = llmfit.LLMClassifier(job["base_model"], **settings, random_state=request.get("seed", request["turn"]))
        wall, cpu = time.perf_counter(), time.process_time()
        model.fit(rows)
        done: dict[str, Any] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "rows": len(rows),
            "tokens": int(model.history_["tokens"].sum()),
            "loss": round(float(model.history_["loss"].mean()), 4),
        }
        if request.get("evaluate"):
            told = model.predict_proba(test)
            right = model.classes_.searchsorted(test["label"])
            done["accuracy"] = float((told.argmax(1) == right).mean())
            done["losses"] = (-np.log(told[range(len(test)), right])).tolist()
        return done

    return work


if __name__ == "__main__":
    serve(prepare)
