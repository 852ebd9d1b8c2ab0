"""Search a grid over LoRA with llmfit: side by side, or one candidate at a time by scikit-learn alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sklearn.model_selection import GridSearchCV
from turns import serve

import llmfit
from llmfit.search import FusedGridSearchCV


def prepare(job: dict[str, Any]) -> Any:
    rows = pd.DataFrame(job["rows"])
    model = llmfit.LLMClassifier(
        job["base_model"],
        features="text",
        target="label",
        template=job["template"],
        adapter="lora",
        epochs=1,
        batch_size=job["batch_size"],
        dtype=job["dtype"],
        device=job["device"],
        random_state=0,
        verbose=0,
    )
    model.preview(rows, 1)  # loads the base model
    chosen = FusedGridSearchCV if job["fused"] else GridSearchCV

    def work(request: dict[str, Any]) -> dict[str, Any]:
        import time

        search = chosen(model, job["grid"], cv=job["folds"], scoring="neg_log_loss", refit=False)
        wall, cpu = time.perf_counter(), time.process_time()
        search.fit(rows, rows["label"])
        found = search.cv_results_
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "fit_seconds": float(found["mean_fit_time"].sum() * job["folds"]),
            "rows": len(found["params"]) * len(rows) * (job["folds"] - 1),
            "scores": found["mean_test_score"].tolist(),
        }

    return work


if __name__ == "__main__":
    serve(prepare)
