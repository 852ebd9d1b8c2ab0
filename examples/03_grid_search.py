"""Search LoRA settings with GridSearchCV: the base model is loaded once, memory stays flat.

Usage: python examples/03_grid_search.py [ROWS]
"""

import resource
import sys
import time
from pathlib import Path

import transformers
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from llmfit import Callback, LLMClassifier
from llmfit.datasets import load_book_reviews

loads = []
from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__


def counted(cls, *args, **kwargs):
    """Load a model, and remember it."""
    loads.append(args)
    return from_pretrained(cls, *args, **kwargs)


transformers.PreTrainedModel.from_pretrained = classmethod(counted)


def resident_mb() -> float:
    """Memory that the process holds now, where the system tells it, else its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class PrintMemory(Callback):
    """Print the memory at the end of every fit."""

    def on_fit_end(self, state):
        print(f"{state.step} steps, resident memory {resident_mb():.0f} MB", flush=True)


def main(rows: int = 120) -> None:
    reviews = load_book_reviews()[:rows]
    X, y = reviews[["title", "review"]], reviews["score"]
    model = LLMClassifier(
        "smollm2",
        template={"task": "Rate this book review from 1 (hated it) to 5 (loved it)."},
        epochs=1,
        random_state=0,
        callbacks=PrintMemory(),
        verbose=0,
    )
    grid = {"adapter__r": [4, 16], "learning_rate": [1e-4, 1e-3]}
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    started = time.perf_counter()
    search = GridSearchCV(model, grid, cv=folds, scoring="neg_log_loss", error_score="raise", refit=False, n_jobs=1)
    search.fit(X, y)
    print(f"12 fits in {time.perf_counter() - started:.0f} s, {len(loads)} load(s) of the base model")
    for settings, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"{score:8.4f}  {settings}")

    train, test = next(iter(folds.split(X, y)))
    model.set_params(**search.best_params_).fit(X.iloc[train], y.iloc[train])
    alone = -model.evaluate(X.iloc[test], y.iloc[test])["log_loss"]
    in_search = search.cv_results_["split0_test_score"][search.best_index_]
    print(f"best candidate alone on the first fold: {alone:.6f}, in the search: {in_search:.6f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
