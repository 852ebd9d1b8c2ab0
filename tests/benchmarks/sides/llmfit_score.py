"""Score every label behind every prompt with llmfit: a whole `predict_proba` from the frame on."""

from __future__ import annotations

from typing import Any

import pandas as pd
from turns import serve

import llmfit


def prepare(job: dict[str, Any]) -> Any:
    rows = pd.DataFrame({"text": job["texts"]})
    labels = job["answers"]
    known = pd.DataFrame({"text": ["x"] * len(labels), "label": labels})
    settings = {"features": "text", "target": "label", "template": job["template"], "dtype": "bfloat16"}
    model = llmfit.LLMClassifier(
        job["base_model"], adapter=None, **settings, device=job["device"], random_state=0, verbose=0
    )
    model.fit(known)
    order = [list(model.classes_).index(label) for label in labels]

    def work(_: dict[str, Any]) -> dict[str, Any]:
        best = model.predict_proba(rows)[:, order].argmax(1)
        return {"rows": len(rows), "best": best.tolist()}

    return work


if __name__ == "__main__":
    serve(prepare)
