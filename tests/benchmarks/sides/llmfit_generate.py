"""Generate an answer to every prompt with llmfit: a whole `predict` from the frame on."""

from __future__ import annotations

from typing import Any

import pandas as pd
from turns import serve

import llmfit


def prepare(job: dict[str, Any]) -> Any:
    rows = pd.DataFrame({"text": job["texts"]})
    known = pd.DataFrame({"text": ["x", "y"], "label": ["one", "another"]})
    settings = {"features": "text", "target": "label", "template": job["template"], "dtype": "bfloat16"}
    model = llmfit.LLMGenerator(
        job["base_model"],
        adapter=None,
        **settings,
        generation={"max_new_tokens": job["tokens"]},
        device=job["device"],
        random_state=0,
        verbose=0,
    )
    model.fit(known)

    def work(_: dict[str, Any]) -> dict[str, Any]:
        return {"rows": len(rows), "answers": [answer.strip() for answer in model.predict(rows)]}

    return work


if __name__ == "__main__":
    serve(prepare)
