"""What a search leaves behind: nothing but its results."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from sklearn.model_selection import GridSearchCV
from torch_side import classifier

from llmfit.search import FusedGridSearchCV, FusedHalvingGridSearchCV

GRID = {"adapter__r": [2, 4], "learning_rate": [1e-3, 1e-2]}
KINDS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "one at a time": (GridSearchCV, {}, {}),
    "frozen": (GridSearchCV, {"adapter": None, "head": "linear"}, {"learning_rate": [1e-3, 1e-2]}),
    "side by side": (FusedGridSearchCV, {}, {}),
    "halving": (FusedHalvingGridSearchCV, {"epochs": 4}, {}),
}


def held() -> tuple[int, int]:
    """Count the tensors that live, and their bytes."""
    gc.collect()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return len(found), sum(found.values())


def is_tensor(one: object) -> bool:
    return issubclass(type(one), torch.Tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_search_holds_no_more_than_the_first(kind: str, settings: Any, frame: Any) -> None:
    search, changed, grid = KINDS[kind]
    rows = frame[["text"]], frame["label"]
    found = []
    for _ in range(3):
        model = classifier(settings, **changed)
        search(model, grid or GRID, cv=2, scoring="neg_log_loss", refit=False).fit(*rows)
        found.append(held())
    assert found[1] == found[2]
