"""Halving over epochs: survivors go on from where they stand, and end as if they had been fitted alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from torch_side import classifier, furthest, no_collecting, same, weights

import llmfit
from llmfit import checkpoints, together, training
from llmfit.checkpoints import Pause
from llmfit.estimators import fitting, joining
from llmfit.exceptions import MemoryWarning, ParameterError
from llmfit.search import FusedGridSearchCV, FusedHalvingGridSearchCV, make_search, results
from llmfit.search.searches import HalvingGridSearch

# What a process imports at its first fit warns of torch.jit, and pytest.warns hands that on.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

GRID = {"adapter__r": [2, 4], "adapter__dropout": [0.0, 0.3], "learning_rate": [1e-3, 1e-2]}
SMALL = {"adapter__r": [2, 4], "learning_rate": [1e-3, 1e-2]}
FOLDS = StratifiedKFold(2, shuffle=True, random_state=0)
PER_EPOCH = 12 // 4  # steps
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


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many fits take a step together, step by step; one where a fit trains alone."""
    seen: list[int] = []
    beside, alone = together._one_step, training._one_step
    monkeypatch.setattr(
        together,
        "_one_step",
        lambda model, bank, active, room: (seen.append(len(active)), beside(model, bank, active, room))[1],
    )
    monkeypatch.setattr(training, "_one_step", lambda *args: (seen.append(1), alone(*args))[1])
    return seen


def halved(model: Any, grid: Any = GRID, **changed: Any) -> FusedHalvingGridSearchCV:
    own = {"factor": 2, "cv": FOLDS, "scoring": "neg_log_loss", "error_score": "raise"}
    return FusedHalvingGridSearchCV(model, grid, **{**own, **changed})


class Stop(llmfit.Callback):
    """Ends a fit behind some epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, state: Any) -> None:
        state.stop |= state.epoch >= self.epochs


def alone(model: Any, params: dict[str, Any], rows: pd.DataFrame, epochs: int) -> list[float]:
    """Scores of whole fits of a candidate on the folds, each stopped behind some epochs by a callback."""
    found = []
    for train, test in FOLDS.split(rows, rows["label"]):
        own = clone(model).set_params(**params, callbacks=[Stop(epochs)]).fit(rows.iloc[train])
        proba = own.predict_proba(rows.iloc[test])
        found.append(-log_loss(rows["label"].iloc[test], proba, labels=own.classes_))
    return found


def assert_as_alone(search: Any, model: Any, rows: pd.DataFrame, places: Any) -> None:
    found = search.cv_results_
    for i in places:
        each = [found[f"split{fold}_test_score"][i] for fold in range(2)]
        params = {**found["params"][i], "epochs": search.n_resources_[-1]}
        np.testing.assert_allclose(each, alone(model, params, rows, found["n_resources"][i]), atol=1e-4)


def last_round(search: Any) -> np.ndarray:
    turns = np.asarray(search.cv_results_["iter"])
    return np.flatnonzero(turns == turns.max())


# 1. Every round -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_every_round_scores_the_whole_fit_as_far_as_it_has_come(changed, one, rows):
    model = clone(one).set_params(**changed)
    grid = GRID if not changed else {"learning_rate": [1e-3, 3e-3, 1e-2], "random_state": [0, 1]}
    search = halved(model, grid).fit(rows, rows["label"])
    turns = np.asarray(search.cv_results_["iter"])
    assert search.n_resources_ == [1, 2, 4]
    assert search.n_candidates_ == ([8, 4, 2] if not changed else [6, 3, 2])
    assert_as_alone(search, model, rows, (*last_round(search), np.argmax(turns == 1), 0))
    assert search.best_params_["epochs"] == 4
    whole = clone(model).set_params(**search.best_params_).fit(rows)
    assert furthest(weights(search.best_estimator_), weights(whole)) < 1e-6


def test_no_step_is_taken_twice(one, rows, steps):
    search = halved(one, refit=False).fit(rows, rows["label"])
    rounds = list(zip(search.n_candidates_, search.n_resources_, strict=True))
    assert rounds == [(8, 1), (4, 2), (2, 4)]
    new = 8 * 1 + 4 * (2 - 1) + 2 * (4 - 2)  # epochs of one fold, where survivors go on
    assert new == 16
    assert sum(candidates * epochs for candidates, epochs in rounds) == 24  # where they begin again
    assert sum(steps) == 2 * PER_EPOCH * new
    assert min(steps) == 2  # all train together


def test_scikit_learns_own_halving_begins_again(one, rows, steps):
    own = {"factor": 2, "cv": FOLDS, "refit": False, "return_train_score": False, "max_resources": 4}
    search = HalvingGridSearch(one, SMALL, resource="epochs", **own).fit(rows, rows["label"])
    rounds = list(zip(search.n_candidates_, search.n_resources_, strict=True))
    assert rounds == [(4, 1), (2, 2), (1, 4)]
    assert sum(steps) == 2 * PER_EPOCH * sum(candidates * epochs for candidates, epochs in rounds)


def test_rounds_of_the_same_epochs_take_no_step(one, rows, steps):
    search = halved(one, SMALL, refit=False, aggressive_elimination=True, min_resources=2).fit(rows, rows["label"])
    assert search.n_resources_ == [2, 2, 4]
    assert search.n_candidates_ == [4, 2, 1]
    assert sum(steps) == 2 * PER_EPOCH * (4 * 2 + 2 * 0 + 1 * 2)
    assert_as_alone(search, one, rows, last_round(search))


@pytest.mark.parametrize("kind", ["LLMEstimator", "LLMRegressor"])
def test_other_estimators(kind, settings, rows):
    target = {"LLMEstimator": "label", "LLMRegressor": "size"}[kind]
    model = getattr(llmfit, kind)(**{**settings, "target": target, "features": "text", "epochs": 4, "batch_size": 4})
    grid, folds = {"learning_rate": [1e-3, 1e-2], "adapter__r": [2, 4]}, KFold(2)
    search = halved(model, grid, cv=folds, scoring=None).fit(rows)
    assert search.n_resources_ == [1, 2, 4]
    i = last_round(search)[0]
    for fold, (train, test) in enumerate(folds.split(rows)):
        whole = clone(model).set_params(**search.cv_results_["params"][i]).fit(rows.iloc[train])
        found = search.cv_results_[f"split{fold}_test_score"][i]
        assert found == pytest.approx(whole.score(rows.iloc[test]), abs=1e-4)


# 2. Where a fit stands ----------------------------------------------------------------------------------------


def in_rounds(model: Any, rows: pd.DataFrame, far: list[int]) -> tuple[Any, Pause]:
    """Fit behind so many epochs, one call after the other."""
    pause = Pause(far[0])
    for epochs in far:
        pause.epochs = epochs
        (outcome,) = joining.fit_together([clone(model)], rows, None, {}, [pause])
        assert outcome.error is None
    return outcome.estimator, pause


def assert_same_fit(found: Any, whole: Any) -> None:
    columns = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "validation_loss"]
    pd.testing.assert_frame_equal(found.history_[columns], whole.history_[columns])
    assert found.best_epoch_ == whole.best_epoch_
    assert same(found, whole)


HELD: dict[str, tuple[dict[str, Any], list[int]]] = {
    "whose loss rises": ({"early_stopping": {"patience": 3}, "epochs": 4}, [1, 3, 4]),
    "that stops within a round": ({"early_stopping": 1, "epochs": 9}, [1, 4, 9]),
    "that stops behind a round": ({"early_stopping": 1, "epochs": 9}, [1, 3, 9]),
}


@pytest.mark.parametrize(("changed", "far"), HELD.values(), ids=HELD)
def test_a_fit(changed, far, one, rows):
    usual = {"learning_rate": 0.03, "random_state": 1, "schedule": "constant", "warmup": 0}
    model = clone(one).set_params(validation_fraction=0.25, **usual, **changed)
    whole = clone(model).fit(rows)
    losses = whole.history_["validation_loss"].dropna().tolist()
    assert losses[1] < losses[2]
    assert len(losses) == (4 if far[-1] == 4 else 3)
    assert_same_fit(in_rounds(model, rows, far)[0], whole)


def test_what_is_held_has_memory_of_its_own(one, rows):
    _, pause = in_rounds(one, rows, [1])
    tensors, meta = pause._kept
    before = {name: tensor.clone() for name, tensor in tensors.items()}, len(meta["state"]["history"])
    whole = clone(one).fit(rows)
    for _ in range(2):  # as where memory runs out in the second round, which begins again
        pause.epochs, pause._kept = 4, (tensors, meta)
        (outcome,) = joining.fit_together([clone(one)], rows, None, {}, [pause])
        assert furthest(outcome.estimator, whole) == 0
        assert all(torch.equal(before[0][name], tensor) for name, tensor in tensors.items())
        assert len(meta["state"]["history"]) == before[1]


def test_no_moments_are_kept_of_a_fit_that_is_over(one, rows):
    held, over = (in_rounds(one, rows, [far])[1]._kept[0] for far in (2, 4))
    assert any(name.startswith("optimizer/") for name in held)
    assert over.keys() == {name for name in held if not name.startswith("optimizer/")}


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_a_fit_without_a_seed_keeps_the_one_that_it_has_drawn(fraction, one, rows):
    seen: list[tuple[Any, pd.DataFrame]] = []

    def scored(estimator: Any, X: Any, y: Any) -> float:
        seen.append((estimator, X))
        return estimator.score(X, y)

    model = clone(one).set_params(random_state=None, validation_fraction=fraction)
    halved(model, {"learning_rate": [1e-3, 1e-2]}, scoring=scored, refit=False).fit(rows)
    assert len(seen) == 2 * (2 + 1)
    seeds = [estimator.random_state for estimator, _ in seen]
    assert len(set(seeds)) == 2 * 2  # of every candidate and fold
    for estimator, X in seen[-2:]:
        assert furthest(estimator, clone(estimator).fit(rows.drop(X.index))) < 1e-4


class Count(llmfit.Callback):
    """Counts the steps of a fit."""

    steps = 0

    def on_step_end(self, state: Any) -> None:
        self.steps += 1


def test_callbacks_go_on_with_what_they_know(one, rows):
    counted: list[int] = []

    def scored(estimator: Any, X: Any, y: Any) -> float:
        counted.append(estimator.callbacks[0].steps)
        return estimator.score(X, y)

    model = clone(one).set_params(callbacks=[Count()])
    halved(model, SMALL, scoring=scored, refit=False).fit(rows)
    assert counted == [PER_EPOCH] * 8 + [2 * PER_EPOCH] * 4 + [4 * PER_EPOCH] * 2
    assert model.callbacks[0].steps == 0


# 3. Names -----------------------------------------------------------------------------------------------------


def test_a_callback_that_writes_into_a_list_changes_no_candidate(one, rows):
    taken: list[int] = []
    model = clone(one).set_params(callbacks=[lambda state: taken.append(state.step)])
    halved(model, SMALL, refit=False).fit(rows, rows["label"])
    assert len(taken) == 2 * PER_EPOCH * (4 * 1 + 2 * 1 + 1 * 2)


def test_a_callback_that_has_no_content_to_compare(one, rows, tmp_path):
    with (tmp_path / "steps").open("w") as file:
        model = clone(one).set_params(callbacks=[lambda _: file.write(".")])
        halved(model, {"learning_rate": [1e-3, 1e-2]}, refit=False).fit(rows, rows["label"])
    assert len((tmp_path / "steps").read_text()) == 2 * PER_EPOCH * (2 * 2 + 1 * 2)


class Locked(llmfit.Callback):
    """Cannot be told from another of its kind."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __deepcopy__(self, _: Any) -> Any:
        return self


def test_searched_values_that_cannot_be_told_from_one_another(one, rows):
    with pytest.raises(ParameterError) as caught:
        halved(one, {"callbacks": [None, [Locked()]], "learning_rate": [1e-3, 1e-2]}).fit(rows, rows["label"])
    assert str(caught.value) == (
        "FusedHalvingGridSearchCV finds the fits that go on by what is searched, and the values of 'callbacks' cannot "
        "be told from one another. Set it on the estimator instead."
    )


def test_searched_values_that_change(one, rows):
    taken: list[int] = []
    grid = {"callbacks": [None, lambda state: taken.append(state.step)]}
    with pytest.raises(ParameterError) as caught:
        halved(one, grid).fit(rows, rows["label"])
    assert str(caught.value) == (
        "FusedHalvingGridSearchCV finds the fits that go on by what is searched, and a value of 'callbacks' has "
        "changed meanwhile. Search only values that stay as they are."
    )


def test_rows_that_cannot_be_told_from_others(one, rows):
    locked = rows.assign(lock=[threading.Lock() for _ in range(len(rows))])
    with pytest.raises(ParameterError) as caught:
        halved(clone(one).set_params(features="text")).fit(locked, rows["label"])
    assert str(caught.value).startswith(
        "FusedHalvingGridSearchCV finds the fits that go on by their rows, and these cannot be told from others: cannot"
    )


def test_the_same_rows_may_be_a_fold_twice(one, rows):
    folds = list(KFold(2).split(rows)) * 2
    found = halved(one, {"learning_rate": [1e-3, 1e-2]}, cv=folds, refit=False).fit(rows, rows["label"]).cv_results_
    np.testing.assert_array_equal(found["split0_test_score"], found["split2_test_score"])


# 4. Memory ----------------------------------------------------------------------------------------------------


def test_fits_that_are_out_are_not_kept(one, rows, monkeypatch):
    alive: list[int] = []
    searched: list[Any] = []
    announce = llmfit.search.fused.Fused.announce

    def counted(self: Any, *args: Any) -> None:
        announce(self, *args)
        alive.append(len(self._held))
        searched.append(self)

    monkeypatch.setattr(llmfit.search.fused.Fused, "announce", counted)
    halved(one, refit=False).fit(rows, rows["label"])
    assert alive == [0, 2 * 4, 2 * 2]
    assert not searched[-1]._held


def test_fits_that_cannot_train_together_are_made_when_they_are_asked_for(one, rows, monkeypatch):
    sizes: list[int] = []
    fit = joining.fit_together
    monkeypatch.setattr(joining, "fit_together", lambda every, *args: (sizes.append(len(every)), fit(every, *args))[1])
    grid = [{"adapter": ["dora", "full"]}, {"adapter": ["lora"], "adapter__r": [2, 4]}]
    search = halved(one, grid, refit=False).fit(rows, rows["label"])
    assert search.n_candidates_ == [4, 2, 1]
    assert sizes[:4] == [3, 3, 1, 1]


def test_memory_that_runs_out_in_a_later_round(one, rows, steps, monkeypatch):
    no_collecting(monkeypatch)
    step = torch.optim.AdamW.step

    def scarce(self: Any, *args: Any) -> Any:
        done = [int(state["step"]) for state in self.state.values()]
        if steps[-1] > 1 and max(done, default=0) > PER_EPOCH:  # the second step of the second round
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", scarce)
    with pytest.warns(MemoryWarning, match="Memory does not hold 2 candidates side by side"):
        search = halved(one, SMALL, refit=False).fit(rows, rows["label"])
    monkeypatch.undo()
    assert search.n_candidates_ == [4, 2, 1]
    assert_as_alone(search, one, rows, last_round(search))


# 5. Records ---------------------------------------------------------------------------------------------------


def test_a_search_that_was_killed_goes_on(one, rows, steps, tmp_path, monkeypatch):
    given = {"factor": 2, "cv": FOLDS, "scoring": "neg_log_loss", "error_score": "raise", "refit": False}
    whole = make_search(one, SMALL, "fused_halving", **given).fit(rows, rows["label"])
    assert sum(steps) == 2 * PER_EPOCH * (4 * 1 + 2 * 1 + 1 * 2)
    fits: list[int] = []
    taken = checkpoints._taken

    def killed(*args: Any, **how: Any) -> Any:
        fits.append(1)
        if len(fits) == 2 * 4 + 3:  # in the second round, on the second fold
            raise KeyboardInterrupt
        return taken(*args, **how)

    given["checkpoint_dir"] = tmp_path
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_taken", killed)
        with pytest.raises(KeyboardInterrupt):
            make_search(one, SMALL, "fused_halving", **given).fit(rows, rows["label"])
    steps.clear()
    again = make_search(one, SMALL, "fused_halving", **given).fit(rows, rows["label"])
    # Nothing of the first round; of the second all but the first candidate's first fold; of the last, which that one's
    # first fold begins anew, two epochs or four.
    assert sum(steps) in (PER_EPOCH * (3 * 2 + 2 + 2), PER_EPOCH * (3 * 2 + 4 + 2))
    np.testing.assert_allclose(again.cv_results_["mean_test_score"], whole.cv_results_["mean_test_score"], atol=1e-6)
    assert again.best_params_ == whole.best_params_


def test_a_round_is_recorded_as_no_fit_of_its_epochs(one, rows, tmp_path):
    grid = {"learning_rate": [1e-3, 1e-2], "random_state": [0, 1]}
    short = halved(clone(one).set_params(epochs=2), grid, checkpoint_dir=tmp_path, refit=False).fit(rows, rows["label"])
    long = halved(one, grid, checkpoint_dir=tmp_path, min_resources="smallest", refit=False).fit(rows, rows["label"])
    assert short.n_resources_ == [1, 2]
    first, other = (search.cv_results_["mean_test_score"][0] for search in (short, long))
    assert abs(first - other) > 1e-6


def test_halving_over_rows_draws_them(one, rows, tmp_path):
    with pytest.raises(ParameterError, match="needs an int 'random_state' of HalvingGridSearch"):
        HalvingGridSearch(one, {"adapter__r": [2, 4]}, checkpoint_dir=tmp_path).fit(rows)
    own = {"resource": "epochs", "max_resources": 2, "factor": 2, "cv": 2, "refit": False}
    search = HalvingGridSearch(one, {"adapter__r": [2, 4]}, checkpoint_dir=tmp_path, **own).fit(rows)
    assert search.n_resources_ == [1, 2]


@pytest.fixture
def seven_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit takes as long."""
    fit = joining.fit_together

    def timed(*args: Any) -> list[joining.Outcome]:
        outcomes = fit(*args)
        for outcome in outcomes:
            outcome.seconds = 7.0
        return outcomes

    monkeypatch.setattr(joining, "fit_together", timed)


@pytest.mark.usefixtures("seven_seconds")
def test_times_are_those_of_each_round(one, rows):
    more = {"aggressive_elimination": True, "max_resources": 1, "refit": False}
    found = halved(one, {"learning_rate": [1e-3, 1e-2]}, **more).fit(rows, rows["label"]).cv_results_
    assert list(found["iter"]) == [0, 0, 1]
    assert found["mean_fit_time"].tolist() == [7.0] * 3
    assert found["std_fit_time"].tolist() == [0.0] * 3


@pytest.mark.usefixtures("seven_seconds")
def test_times_are_those_of_the_folds_that_were_fitted(one, rows, tmp_path):
    grid = {"learning_rate": [1e-3, 1e-2]}
    given = {"cv": 2, "checkpoint_dir": tmp_path, "refit": False}
    FusedGridSearchCV(clone(one).set_params(epochs=1), grid, **given).fit(rows)
    lost = next(path for path in sorted(tmp_path.glob("*.json")) if "0.001" in path.read_text())
    lost.unlink()
    found = FusedGridSearchCV(clone(one).set_params(epochs=1), grid, **given).fit(rows).cv_results_
    assert found["mean_fit_time"][0] == 7.0
    assert found["mean_fit_time"][1] < 1


# 6. Failures and refusals -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:One or more of the t")
def test_a_candidate_that_fails_is_left_out(one, rows):
    grid = {"learning_rate": [1e-3, 1e-2], "batch_size": [4, -1]}
    with pytest.warns(FitFailedWarning, match="4 fits failed"):
        search = halved(one, grid, error_score=np.nan).fit(rows, rows["label"])
    assert search.best_params_["batch_size"] == 4
    assert np.isnan(search.cv_results_["mean_test_score"][:4]).sum() == 2


@pytest.mark.filterwarnings("ignore:One or more of the t")
def test_a_candidate_that_fails_in_a_later_round(one, rows, monkeypatch):
    step = torch.optim.AdamW.step

    def breaking(self: Any, *args: Any) -> Any:
        done = [int(state["step"]) for state in self.state.values()]
        if self.param_groups[0]["weight_decay"] == 0.5 and max(done, default=0) > PER_EPOCH:
            raise RuntimeError("no such kernel")
        return step(self, *args)

    def rate(estimator: Any, X: Any, y: Any) -> float:
        return float(estimator.learning_rate)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    grid = {"weight_decay": [0.5, 0.0], "learning_rate": [1e-2, 1e-3]}
    with pytest.warns(FitFailedWarning, match=r"(?s)2 fits failed.*no such kernel"):
        search = halved(one, grid, error_score=np.nan, scoring=rate).fit(rows, rows["label"])
    assert np.isnan(search.cv_results_["mean_test_score"]).sum() == 1
    assert search.best_params_ == {"learning_rate": 1e-2, "weight_decay": 0.0, "epochs": 4}


def test_a_last_fit_that_is_interrupted_leaves_no_stand_in(one, rows, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "train_alone", interrupted)
    for search in (
        halved(one, {"learning_rate": [1e-3, 1e-2]}),
        FusedGridSearchCV(clone(one).set_params(epochs=1), {"learning_rate": [1e-3, 1e-2]}, cv=2),
    ):
        with pytest.raises(KeyboardInterrupt):
            search.fit(rows, rows["label"])
        assert type(search.best_estimator_) is llmfit.LLMClassifier


def test_it_is_made_by_name(one, rows):
    search = make_search(one, {"learning_rate": [1e-3, 1e-2, 2e-2]}, "fused_halving", cv=2, checkpoint_dir=None)
    assert isinstance(search, FusedHalvingGridSearchCV)
    assert clone(search).get_params()["resource"] == "epochs"
    assert clone(search).get_params()["return_train_score"] is False
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
    "random_state": (
        {"random_state": 0},
        "The 'random_state' parameter has no meaning in FusedHalvingGridSearchCV: nothing is drawn.",
    ),
    "several scores": (
        {"scoring": ["accuracy"]},
        "FusedHalvingGridSearchCV ranks by one score. Got ['accuracy'] for 'scoring'.",
    ),
    "checkpoints of candidates": (
        {"param_grid": {"checkpoint_dir": [None, "here"]}},
        "The 'checkpoint_dir' parameter of the estimator has no meaning in FusedHalvingGridSearchCV, which holds its "
        "fits itself. Set the search's.",
    ),
    "no epochs": (
        {"estimator__epochs": 0},
        "The 'epochs' parameter of LLMClassifier must be an int >= 1. Got 0 instead.",
    ),
}


@pytest.mark.parametrize(("changed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused(changed, sentence, one, rows):
    with pytest.raises(ParameterError) as caught:
        halved(one).set_params(**changed).fit(rows, rows["label"])
    assert str(caught.value) == sentence


@pytest.mark.parametrize("scoring", [["accuracy"], ("accuracy",), {"accuracy"}, {"a": "accuracy"}])
def test_halving_ranks_by_one_score(scoring, one, rows, tmp_path):
    search = HalvingGridSearch(one, GRID, scoring=scoring, random_state=0, checkpoint_dir=tmp_path)
    with pytest.raises(ParameterError) as caught:
        search.fit(rows, rows["label"])
    assert str(caught.value) == f"HalvingGridSearch ranks by one score. Got {scoring!r} for 'scoring'."


def test_fits_that_cannot_be_held_are_refused(one, rows, tmp_path):
    with pytest.raises(ParameterError, match=r"must be an estimator of llmfit, whose fits can be held\. Got Pipeline"):
        halved(Pipeline([("model", one)]), {"model__epochs": [1]}).fit(rows, rows["label"])
    with pytest.raises(ParameterError, match="'checkpoint_dir' parameter of the estimator has no meaning"):
        halved(clone(one).set_params(checkpoint_dir=tmp_path)).fit(rows, rows["label"])
    with pytest.raises(ValueError, match="epochs as the resource since it is part of the searched"):
        halved(one, {"epochs": [1, 2]}).fit(rows, rows["label"])
