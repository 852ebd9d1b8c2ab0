"""Search a grid on one fold with llmfit."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sklearn.model_selection import GridSearchCV
from turns import serve

import llmfit


def prepare(job: dict[str, Any]) -> Any:
    frame = pd.DataFrame(job["rows"])

    def work(request: dict[str, Any]) -> dict[str, Any]:
        held = job["folds"][request["turn"] % len(job["folds"])]
        kept = [i for i in range(len(frame)) if i not in held]
        model = llmfit.LLMClassifier(
            job["base_model"],
            features="text",
            target="label",
            template=job["template"],
            adapter={"r": 16},
            epochs=1,
            batch_size=job["batch_size"],
            warmup=job["warmup"],
            dtype="bfloat16",
            device=job["device"],
            random_state=0,
            verbose=0,
        )
        how = {"scoring": ["accuracy", "neg_log_loss"], "refit": False, "error_score": "raise"}
        search = GridSearchCV(model, job["grid"], cv=[(kept, held)], **how)
        search.fit(frame, frame["label"])
        scores, losses = (search.cv_results_[f"mean_test_{name}"] for name in how["scoring"])
        return {"fits": len(scores), "accuracy": round(float(scores.mean()), 4), "losses": (-losses).tolist()}

    return work


if __name__ == "__main__":
    serve(prepare)
