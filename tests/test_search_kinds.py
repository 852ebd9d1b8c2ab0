"""Searches in configurations: what is tried as a whole is not drawn from, and measures are of the target's kind."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GridSearchCV, ParameterGrid, RandomizedSearchCV

from llmfit import LLMClassifier, LLMEstimator
from llmfit.config import from_config, to_config
from llmfit.exceptions import ParameterError
from llmfit.search import make_search

TEXT_IN = {"name": "text", "type": "text"}


def of(kind: str) -> dict[str, Any]:
    """A config of Ludwig's with targets of some kinds."""
    outputs = [{"name": f"{one}{place}", "type": one} for place, one in enumerate(kind.split())]
    return {"input_features": [TEXT_IN], "output_features": outputs}


def refused(config: dict[str, Any], **given: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        from_config(config, **given)
    return str(caught.value)


# 1. grid_search ---------------------------------------------------------------------------------

GRID = {"space": "grid_search", "values": [1, 2]}
RANKS = {"space": "grid_search", "values": [4, 8]}
RAY = {"type": "ray", "num_samples": 10, "time_budget_s": 3600}  # as Ludwig renders it


def axes(**hyperopt: Any) -> dict[str, Any]:
    return {**of("category"), "adapter": {"type": "lora"}, "hyperopt": hyperopt}


GRIDS: dict[str, dict[str, Any]] = {
    "as Ludwig renders it": {"executor": RAY, "search_alg": {"type": "variant_generator", "random_state": 3}},
    "one sample": {"executor": {"num_samples": 1}},
    "no number": {},
    "a kind": {"kind": "grid", "executor": RAY},
    "another kind that tries all": {"kind": "fused", "executor": RAY},
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_value_of_a_grid_search_is_tried(name: str) -> None:
    search = from_config(axes(parameters={"trainer.epochs": GRID, "adapter.r": RANKS}, **GRIDS[name]))
    assert isinstance(search, GridSearchCV)
    assert len(ParameterGrid(search.param_grid)) == 4
    assert to_config(search)["hyperopt"]["parameters"] == {"epochs": [1, 2], "adapter.r": [4, 8]}


def test_a_grid_search_that_is_given_otherwise_leaves_the_others_to_be_drawn() -> None:
    rate = {"space": "uniform", "lower": 0.1, "upper": 0.2}
    parameters = {"trainer.epochs": GRID, "trainer.learning_rate": rate}
    search = from_config(axes(parameters=parameters, executor={"num_samples": 3}), epochs=5)
    assert isinstance(search, RandomizedSearchCV)
    assert (search.n_iter, search.estimator.epochs) == (3, 5)


def test_lists_beside_a_grid_search_are_a_grid_where_nothing_is_drawn() -> None:
    choice = {"space": "choice", "categories": [4, 8]}
    search = from_config(axes(parameters={"trainer.epochs": GRID, "adapter.r": choice}))
    assert search.param_grid == {"epochs": [1, 2], "adapter__r": [4, 8]}


ADVICE = "Say space: choice there, or list the values of all axes and leave the number of draws out."
MIXED: dict[str, tuple[dict[str, Any], str]] = {
    "a range": (
        {"parameters": {"trainer.epochs": GRID, "trainer.learning_rate": {"lower": 0.1, "upper": 0.2}}},
        "The config's 'hyperopt.parameters.trainer.epochs' is a grid_search, of which every value is tried, but a "
        f"search of the kind 'random' draws from it, and 'learning_rate' beside it. {ADVICE}",
    ),
    "a choice and a number of samples": (
        {
            "adapter.r": {"space": "choice", "categories": [4, 8]},
            "trainer.epochs": GRID,
            "executor": {"num_samples": 3},
        },
        "The config's 'hyperopt.trainer.epochs' is a grid_search, of which every value is tried, but a search of the "
        f"kind 'random' draws from it, and 'adapter__r' beside it. {ADVICE}",
    ),
    "a kind that draws": (
        {"parameters": {"trainer.epochs": GRID}, "kind": "random"},
        "The config's 'hyperopt.parameters.trainer.epochs' is a grid_search, of which every value is tried, but a "
        f"search of the kind 'random' draws from it. {ADVICE}",
    ),
    "an algorithm that draws": (
        {"parameters": {"trainer.epochs": GRID}, "search_alg": {"type": "optuna"}},
        "The config's 'hyperopt.parameters.trainer.epochs' is a grid_search, of which every value is tried, but a "
        f"search of the kind 'optuna' draws from it. {ADVICE}",
    ),
    "own draws": (
        {"parameters": {"trainer.epochs": GRID}, "n_iter": 3},
        "The config's 'hyperopt.n_iter' has no meaning in a search of the kind 'grid': every combination is tried, and "
        "nothing is drawn. Leave it out.",
    ),
    "no number": (
        {"parameters": {"trainer.epochs": GRID}, "executor": {"num_samples": 0}},
        "The config's 'hyperopt.executor.num_samples' must be null or an int >= 1. Got 0 instead.",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_tried_as_a_whole_is_not_drawn_from(name: str) -> None:
    hyperopt, sentence = MIXED[name]
    assert refused(axes(**hyperopt)) == sentence


# 2. What is measured ----------------------------------------------------------------------------

CLASSES = (
    "'accuracy', 'accuracy_micro', 'precision', 'recall', 'roc_auc', 'softmax_cross_entropy', "
    "'binary_weighted_cross_entropy'"
)
NUMBERS = (
    "'r2', 'mean_squared_error', 'mean_absolute_error', 'mean_absolute_percentage_error', 'root_mean_squared_error'"
)
UNFIT: dict[str, tuple[str, str, str]] = {
    "numbers of classes": ("category", "r2", f"{CLASSES}, 'loss'"),
    "numbers of two classes": ("binary", "mean_squared_error", f"{CLASSES}, 'loss'"),
    "classes of numbers": ("number", "accuracy", f"{NUMBERS}, 'loss'"),
    "classes of several numbers": ("number number", "accuracy", NUMBERS),
    "the loss of several numbers": ("number number", "loss", NUMBERS),
    "the loss of sets": ("set", "loss", ""),
    "classes of sets": ("set", "accuracy", ""),
    "the loss of texts": ("text", "loss", ""),
    "classes of several classes": ("category category", "accuracy", ""),
    "the loss of classes and numbers": ("category number", "loss", ""),
}
NAMES = {"set": "sets", "text": "texts"}


@pytest.mark.parametrize("name", UNFIT)
def test_a_metric_of_another_kind_of_target_is_refused_with_the_config(name: str) -> None:
    kind, metric, known = UNFIT[name]
    sentence = (
        f"The config's 'hyperopt.metric' must be one of {known}, or 'scoring' a name of scikit-learn's. Got {metric!r} "
        "instead."
        if known
        else f"The config's 'hyperopt.metric' has no meaning with {NAMES.get(kind, 'several targets')}: candidates are "
        f"measured by the estimator's own score. Leave it out. Got {metric!r} instead."
    )
    assert refused({**of(kind), "hyperopt": {"trainer.epochs": [1, 2], "metric": metric}}) == sentence


FIT: dict[str, tuple[dict[str, Any], str, str]] = {
    "classes": (of("category"), "loss", "neg_log_loss"),
    "two classes": (of("binary"), "roc_auc", "roc_auc_ovr"),
    "numbers": (of("number"), "loss", "neg_mean_squared_error"),
    "several numbers": (of("number number"), "r2", "r2"),
    "a kind": ({"target": {"label": "category"}}, "loss", "neg_log_loss"),
    "a number": ({"target": {"label": "number"}}, "mean_absolute_error", "neg_mean_absolute_error"),
    "a kind that nobody knows yet": ({"target": "label"}, "r2", "r2"),
}


@pytest.mark.parametrize("name", FIT)
def test_a_metric_of_the_kind_of_the_target_is_its_scorer(name: str) -> None:
    config, metric, scoring = FIT[name]
    assert from_config({**config, "hyperopt": {"epochs": [1, 2], "metric": metric}}).scoring == scoring


def test_a_set_of_scorers_is_a_list(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    hyperopt = {"max_length": [256], "cv": 2, "scoring": {"f1_macro", "accuracy"}, "settings": {"refit": False}}
    search = from_config(
        {"estimator": "LLMClassifier", "target": "label", "adapter": None, "hyperopt": hyperopt}, **settings
    )
    assert search.scoring == ["accuracy", "f1_macro"]
    search.fit(frame)
    assert np.isfinite([search.cv_results_["mean_test_accuracy"], search.cv_results_["mean_test_f1_macro"]]).all()
    assert make_search(LLMClassifier(), {"epochs": [1]}, scoring={"r2"}, refit="r2").scoring == ["r2"]


class TestScorersByName:
    """scikit-learn's read one column of labels, or an array of numbers: elsewhere nothing is fitted for them."""

    HEAD: ClassVar[dict[str, Any]] = {"features": "text", "head": "linear", "adapter": None}

    def search(self, target: Any, scoring: Any, settings: dict[str, Any], **more: Any) -> Any:
        kind = LLMEstimator if len(target) > 1 else LLMClassifier
        model = kind(**{**settings, **self.HEAD, "target": target})
        return make_search(model, {"max_length": [256]}, cv=2, scoring=scoring, **more)

    @pytest.fixture
    def rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        sets = pd.Series([["a"], ["a", "b"]] * 4, index=frame.index)
        return frame.assign(tags=sets, other=frame["label"].to_numpy()[::-1], half=frame["size"] / 2)

    @pytest.mark.parametrize(
        ("target", "scoring"),
        [
            ({"tags": "set"}, "f1_micro"),
            ({"tags": "set"}, ["f1_micro"]),
            ({"tags": "set"}, {"f": "f1_micro"}),
            ({"label": "category", "other": "category"}, "f1_micro"),
            ({"size": "number", "half": "number"}, "f1_micro"),
        ],
    )
    def test_are_refused_before_anything_is_fitted(
        self, target: Any, scoring: Any, rows: pd.DataFrame, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search = self.search(target, scoring, settings, **({} if scoring == "f1_micro" else {"refit": False}))
        monkeypatch.setattr(type(search.estimator), "fit", lambda *_, **__: pytest.fail("it was fitted"))
        with pytest.raises(ParameterError) as caught:
            search.fit(rows)
        assert str(caught.value) == (
            "The 'scoring' parameter of GridSearch cannot be 'f1_micro' here: scikit-learn's scorers read one column "
            "of labels or numbers, not lists in cells or several targets. Leave it out, and the estimator's own score "
            "is taken, or pass a callable (estimator, X, y=None)."
        )

    def test_measure_an_indicator_and_an_array_of_numbers(self, rows: pd.DataFrame, settings: dict[str, Any]) -> None:
        indicator = pd.DataFrame({"a": [1] * 8, "b": [0, 1] * 4}, index=rows.index)
        found = self.search({"tags": "set"}, "f1_micro", settings).fit(rows, indicator)
        assert np.isfinite(found.best_score_)
        two = self.search({"size": "number", "half": "number"}, "r2", settings).fit(rows, rows[["size", "half"]])
        assert np.isfinite(two.best_score_)

    @pytest.mark.parametrize("scoring", [None, lambda model, X, y=None: model.score(X, y)])
    def test_others_measure_sets(self, scoring: Any, rows: pd.DataFrame, settings: dict[str, Any]) -> None:
        assert np.isfinite(self.search({"tags": "set"}, scoring, settings).fit(rows).best_score_)
