"""Halving over epochs: survivors go on from where they stand, and end as if they had been fitted alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from torch_side import classifier, furthest, weights

import llmfit
from llmfit import checkpoints, together, training
from llmfit.exceptions import ParameterError
from llmfit.search import FusedHalvingGridSearchCV, make_search, results

GRID = {"adapter__r": [2, 4], "adapter__dropout": [0.0, 0.3], "learning_rate": [1e-3, 1e-2]}
FOLDS = StratifiedKFold(2, shuffle=True, random_state=0)
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": {"type": "dora", "r": 2}},
    "adalora": {"adapter": {"type": "adalora", "init_r": 4, "target_r": 2}},
    "full": {"adapter": "full"},
    "head alone": {"adapter": None, "head": "linear"},
    "validated": {"adapter": "lora", "validation_fraction": 0.25, "early_stopping": {"patience": 1}},
}


@pytest.fixture
def rows(frame: pd.DataFrame) -> pd.DataFrame:
    again = frame.assign(text=frame["text"] + ", they say")
    return pd.concat([frame, again, frame.assign(text="a " + frame["text"])], ignore_index=True)


@pytest.fixture
def one(settings: dict[str, Any]) -> llmfit.LLMClassifier:
    return classifier(settings, adapter="lora", epochs=4, batch_size=4)


def halved(model: Any, grid: Any = GRID, **changed: Any) -> FusedHalvingGridSearchCV:
    own = {"factor": 2, "cv": FOLDS, "scoring": "neg_log_loss", "error_score": "raise", "random_state": 0}
    return FusedHalvingGridSearchCV(model, grid, **{**own, **changed})


def alone(model: Any, params: dict[str, Any], rows: pd.DataFrame, epochs: int, monkeypatch: Any) -> list[float]:
    """Scores of whole fits of a candidate on the folds, each stopped behind some epochs by a callback."""

    class Stop(llmfit.Callback):
        def on_epoch_end(self, state: Any) -> None:
            state.stop |= state.epoch >= epochs

    found = []
    for train, test in FOLDS.split(rows, rows["label"]):
        own = clone(model).set_params(**params, callbacks=[Stop()]).fit(rows.iloc[train])
        proba = own.predict_proba(rows.iloc[test])
        found.append(-log_loss(rows["label"].iloc[test], proba, labels=own.classes_))
    return found


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_every_round_scores_the_whole_fit_as_far_as_it_has_come(changed, one, rows, monkeypatch):
    model = clone(one).set_params(**changed)
    grid = GRID if not changed else {"learning_rate": [1e-3, 3e-3, 1e-2], "random_state": [0, 1]}
    search = halved(model, grid).fit(rows, rows["label"])
    found = search.cv_results_
    assert search.n_resources_ == [1, 2, 4]
    assert search.n_candidates_ == ([8, 4, 2] if not changed else [6, 3, 2])
    for i in (*np.flatnonzero(found["iter"] == 2), np.argmax(found["iter"] == 1), 0):
        params = {**found["params"][i], "epochs": 4}
        each = [found[f"split{fold}_test_score"][i] for fold in range(2)]
        np.testing.assert_allclose(each, alone(model, params, rows, found["n_resources"][i], monkeypatch), atol=1e-4)
    assert search.best_params_["epochs"] == 4
    whole = clone(model).set_params(**search.best_params_).fit(rows)
    assert furthest(weights(search.best_estimator_), weights(whole)) < 1e-6


def test_no_step_is_taken_twice(one, rows, monkeypatch):
    steps: list[int] = []
    step = together._one_step
    monkeypatch.setattr(
        together,
        "_one_step",
        lambda model, bank, active, room: (steps.append(len(active)), step(model, bank, active, room))[1],
    )
    monkeypatch.setattr(training, "_one_step", lambda *_: pytest.fail("a candidate has trained alone"))
    halved(one, refit=False).fit(rows, rows["label"])
    per_epoch = 12 // 4
    assert sum(steps) == 2 * per_epoch * (8 * 1 + 4 * 1 + 2 * 2)


def test_fits_that_are_out_are_not_kept(one, rows, monkeypatch):
    alive: list[int] = []
    announce = llmfit.search.fused.Fused.announce

    def counted(self: Any, *args: Any) -> None:
        announce(self, *args)
        alive.append(len(self._held))

    monkeypatch.setattr(llmfit.search.fused.Fused, "announce", counted)
    halved(one, refit=False).fit(rows, rows["label"])
    assert alive == [0, 2 * 4, 2 * 2]


def test_a_search_that_was_killed_goes_on(one, rows, tmp_path, monkeypatch):
    whole = halved(one).fit(rows, rows["label"])
    fits: list[int] = []
    taken = checkpoints._taken

    def killed(*args: Any) -> Any:
        fits.append(1)
        if len(fits) == 2 * 8 + 3:
            raise KeyboardInterrupt
        return taken(*args)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_taken", killed)
        with pytest.raises(KeyboardInterrupt):
            halved(one, checkpoint_dir=tmp_path).fit(rows, rows["label"])
    again = halved(one, checkpoint_dir=tmp_path).fit(rows, rows["label"])
    np.testing.assert_allclose(again.cv_results_["mean_test_score"], whole.cv_results_["mean_test_score"], atol=1e-6)
    assert again.best_params_ == whole.best_params_


def test_a_round_is_recorded_as_no_fit_of_its_epochs(one, rows, tmp_path):
    grid = {"learning_rate": [1e-3, 1e-2], "random_state": [0, 1]}
    short = halved(clone(one).set_params(epochs=2), grid, checkpoint_dir=tmp_path).fit(rows, rows["label"])
    long = halved(one, grid, checkpoint_dir=tmp_path, min_resources="smallest", refit=False).fit(rows, rows["label"])
    assert short.n_resources_ == [1, 2]
    first, other = (search.cv_results_["mean_test_score"][0] for search in (short, long))
    assert abs(first - other) > 1e-6


def test_the_same_rows_may_be_a_fold_twice(one, rows):
    folds = list(KFold(2).split(rows)) * 2
    found = halved(one, {"learning_rate": [1e-3, 1e-2]}, cv=folds, refit=False).fit(rows, rows["label"]).cv_results_
    np.testing.assert_array_equal(found["split0_test_score"], found["split2_test_score"])


@pytest.mark.filterwarnings("ignore:One or more of the t", "ignore:.torch.jit")
def test_a_candidate_that_fails_is_left_out(one, rows):
    grid = {"learning_rate": [1e-3, 1e-2], "batch_size": [4, -1]}
    with pytest.warns(FitFailedWarning, match="4 fits failed"):
        search = halved(one, grid, error_score=np.nan).fit(rows, rows["label"])
    assert search.best_params_["batch_size"] == 4
    assert np.isnan(search.cv_results_["mean_test_score"][:4]).sum() == 2


def test_it_is_made_by_name(one, rows):
    search = make_search(one, {"learning_rate": [1e-3, 1e-2, 2e-2]}, "fused_halving", cv=2, checkpoint_dir=None)
    assert isinstance(search, FusedHalvingGridSearchCV)
    assert clone(search).get_params()["resource"] == "epochs"
    search.set_params(max_resources=3).fit(rows)
    assert search.n_resources_ == [1, 3]
    assert search.max_resources == 3
    assert len(results(search)) == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "resource": (
        {"resource": "n_samples"},
        "The 'resource' parameter of FusedHalvingGridSearchCV must be one of 'epochs'. Got 'n_samples' instead.",
    ),
    "n_jobs": (
        {"n_jobs": 2},
        "The 'n_jobs' parameter of FusedHalvingGridSearchCV must be None or 1, as one process trains candidates side "
        "by side. Got 2 instead.",
    ),
}


@pytest.mark.parametrize(("changed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused(changed, sentence, one, rows):
    with pytest.raises(ParameterError) as caught:
        halved(one, **changed).fit(rows, rows["label"])
    assert str(caught.value) == sentence


def test_fits_that_cannot_be_held_are_refused(one, rows, tmp_path):
    with pytest.raises(ParameterError, match=r"must be an estimator of llmfit, whose fits can be held\. Got Pipeline"):
        halved(Pipeline([("model", one)]), {"model__epochs": [1]}).fit(rows, rows["label"])
    with pytest.raises(ParameterError, match="'checkpoint_dir' parameter of the estimator has no meaning"):
        halved(clone(one).set_params(checkpoint_dir=tmp_path)).fit(rows, rows["label"])
    with pytest.raises(ValueError, match="epochs as the resource since it is part of the searched"):
        halved(one, {"epochs": [1, 2]}).fit(rows, rows["label"])
