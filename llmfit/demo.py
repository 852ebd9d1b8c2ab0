"""The main job on packaged data, step by step, for someone who sees llmfit for the first time.

Takes a base model and a number of rows; prints. Uses nothing but the public API.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import pandas as pd

import llmfit
from llmfit.datasets import load_book_reviews
from llmfit.exceptions import parameter_error

__all__ = ["run_demo"]

TEMPLATE = {
    "task": "Rate this book review from 1 (hated it) to 5 (loved it).",
    "template": '{task}\n\nReview of "{title}": {review}\n\nRating:',
}
HELD_OUT = 50


def run_demo(*, base_model: Any = "smollm2", rows: int = 190) -> None:
    """Show prompts, zero-shot and fine-tuned accuracy, predictions, a grid search, a save and a load.

    Parameters
    ----------
    base_model : str or path, default="smollm2"
    rows : int, default=190
        Rows to train on, 20 to 190.

    Raises
    ------
    ParameterError
        If `rows` is out of range.
    """
    if not 20 <= rows <= 190:
        raise parameter_error("rows", "the demo", "an int from 20 to 190", rows)
    pd.set_option("display.width", 120, "display.max_colwidth", 60)
    reviews = load_book_reviews()
    test, train = reviews[:HELD_OUT], reviews[HELD_OUT : HELD_OUT + rows]
    started = time.perf_counter()
    settings: dict[str, Any] = {"base_model": base_model, "target": "score", "template": TEMPLATE, "random_state": 0}
    model = llmfit.LLMClassifier(**settings, learning_rate=5e-4, epochs=6, batch_size=8)
    _show_prompts(model, train)
    _compare(model, train, test)
    _show_predictions(model, test)
    _search(settings, train[:60])
    _save_and_load(model, test)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")


def _title(text: str) -> None:
    print(f"\n--- {text} {'-' * max(0, 96 - len(text))}\n", flush=True)


def _show_prompts(model: Any, train: pd.DataFrame) -> None:
    _title("Two rows as the model sees them (the completion is what it learns to answer)")
    for _, row in model.preview(train, 2).iterrows():
        print(row["prompt"] + f"[{row['completion']}]")
        print(f"({row['prompt_tokens']} tokens, loss on {row['loss_tokens']})\n")


def _compare(model: Any, train: pd.DataFrame, test: pd.DataFrame) -> None:
    _title(f"Zero-shot against fine-tuned, on {len(test)} rows that were held out")
    zero_shot = llmfit.LLMClassifier(model.base_model, target="score", template=TEMPLATE, adapter=None)
    before = zero_shot.fit(train).evaluate(test)
    print(f"zero-shot: accuracy {before['accuracy']:.2f}, log loss {before['log_loss']:.2f} nats", flush=True)
    model.fit(train)
    after = model.evaluate(test, per_class=True)
    print(f"fine-tuned on {len(train)} rows: accuracy {after['accuracy']:.2f}, log loss {after['log_loss']:.2f} nats\n")
    print(after["per_class"].round(2).to_string())


def _show_predictions(model: Any, test: pd.DataFrame) -> None:
    _title("Predictions, each with its probabilities")
    shown = test[:8]
    proba = pd.DataFrame(model.predict_proba(shown).round(2), shown.index, [f"p({c})" for c in model.classes_])
    table = pd.concat([shown[["review", "score"]], model.predict(shown).rename("predicted"), proba], axis=1)
    print(table.to_string(index=False, formatters={"review": lambda text: text[:48].ljust(48)}))


def _search(settings: dict[str, Any], rows: pd.DataFrame) -> None:
    from sklearn.model_selection import GridSearchCV

    _title(f"GridSearchCV over the learning rate: 2 candidates x 2 folds of {len(rows)} rows, one base model in memory")
    estimator = llmfit.LLMClassifier(**settings, adapter={"type": "lora", "r": 8}, epochs=1, verbose=0)
    search = GridSearchCV(estimator, {"learning_rate": [1e-5, 1e-3]}, cv=2, scoring="neg_log_loss", refit=False)
    search.fit(rows[["title", "review"]], rows["score"])
    columns = ["param_learning_rate", "mean_test_score", "mean_fit_time"]
    formats = dict(zip(columns, ["{:g}".format, "{:.3f}".format, "{:.1f} s".format], strict=True))
    print(pd.DataFrame(search.cv_results_)[columns].to_string(index=False, formatters=formats))


def _save_and_load(model: Any, test: pd.DataFrame) -> None:
    _title("Save and load")
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        loaded = llmfit.load(f"{folder}/model", verbose=0)
        same = (loaded.predict(test) == model.predict(test)).all()
    print(f"The loaded model predicts {'the same' if same else 'OTHER'} scores.")
