"""Searches: what may be searched, what is refused before a fit, stratified folds, results, going on after a kill."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from fake_model import NAME, put_in_place
from scipy import stats
from sklearn.base import clone, is_classifier
from sklearn.dummy import DummyClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    HalvingRandomSearchCV,
    KFold,
    RandomizedSearchCV,
    ShuffleSplit,
    StratifiedKFold,
)
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.exceptions import DataError, ParameterError
from llmfit.search import KINDS, leaderboard, make_search, results
from llmfit.search.digests import digest_of
from llmfit.search.records import Records
from llmfit.search.spaces import SPACES, Range, read_space

HAS_OPTUNA = importlib.util.find_spec("optuna_integration") is not None
FAKE: dict[str, Any] = {"base_model": NAME, "adapter": "full", "target": "level", "random_state": 0, "verbose": 0}
SPACE = {"template__na_rep": ["", "1", "9"], "epochs": [1, 2]}
RANGES = {"template__na_rep": ["", "9"], "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
# For each kind: a space and the parameters that go with it.
SEARCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grid": (SPACE, {}),
    "fused": (SPACE, {}),
    "fused_halving": ({"template__na_rep": ["", "1", "9"], "batch_size": [4, 8]}, {"factor": 2, "max_resources": 2}),
    "random": (RANGES, {"n_iter": 4, "random_state": 0}),
    "halving": (SPACE, {"random_state": 0, "factor": 2, "min_resources": 24}),
    "optuna": (RANGES, {"n_iter": 4, "random_state": 0}),
}
needs_optuna = pytest.mark.skipif(not HAS_OPTUNA, reason="needs pip install 'llmfit[optuna]'")
# Halving side by side holds fits on their way, which those that are only played here have not: test_fused_halving.py.
EACH = [pytest.param(kind, marks=needs_optuna if kind == "optuna" else []) for kind in KINDS if kind != "fused_halving"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


@pytest.fixture
def gaps() -> pd.DataFrame:
    """Rows whose missing numbers mean "high", sorted by class: plain folds would hold one class each."""
    numbers = [float(a) for a in range(10) for _ in range(4)] + [np.nan] * 12
    labels = ["low" if a < 5 else "high" for a in numbers]
    return pd.DataFrame({"a": numbers, "level": labels}, index=[f"row {i}" for i in range(len(numbers))])


def searched(kind: str, estimator: Any = None, **settings: Any) -> Any:
    space, own = SEARCHES[kind]
    estimator = LLMClassifier(**FAKE) if estimator is None else estimator
    return make_search(estimator, space, kind, **{"cv": 3, "scoring": "neg_log_loss", **own, **settings})


def without_times(search: Any) -> pd.DataFrame:
    return results(search).drop(columns="fit_seconds")


def count_fits(monkeypatch: pytest.MonkeyPatch, *, stop_before: int | None = None) -> list[int]:
    """Count fits of classifiers, and stop before one of them as a user would."""
    fits: list[int] = []
    fit = LLMClassifier.fit

    def counted(self: Any, *args: Any, **params: Any) -> Any:
        if len(fits) == stop_before:
            raise KeyboardInterrupt
        fits.append(1)
        return fit(self, *args, **params)

    monkeypatch.setattr(LLMClassifier, "fit", counted)
    return fits


# 1. What may be searched ----------------------------------------------------------------------------------------


def test_there_is_a_search_here_for_every_kind() -> None:
    assert list(SEARCHES) == list(KINDS)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"low": 4, "high": 64, "step": 4}, Range(4, 64, 4)),
        ({"low": 1e-5, "high": 1e-3, "log": True}, Range(1e-5, 1e-3, None, True)),
        ({"space": "loguniform", "lower": 1e-5, "upper": 1e-3}, Range(1e-5, 1e-3, None, True)),
        ({"space": "uniform", "lower": 0, "upper": 1}, Range(0.0, 1.0)),
        ({"space": "quniform", "lower": 0, "upper": 1, "q": 0.25}, Range(0.0, 1.0, 0.25)),
        ({"space": "int", "lower": 2, "upper": 8}, Range(2, 8)),
        ({"space": "randint", "lower": 2, "upper": 8}, Range(2, 7)),
        ({"space": "qrandint", "lower": 2, "upper": 8, "q": 2}, Range(2, 8, 2)),
        ({"space": "lograndint", "lower": 1, "upper": 9}, Range(1, 8, None, True)),
        ({"space": "choice", "categories": ["lora", "ia3"]}, ["lora", "ia3"]),
        ({"space": "grid_search", "values": [1, 2]}, [1, 2]),
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
    ],
    ids=str,
)
def test_ranges_are_read_by_name(given: Any, read: Any) -> None:
    (space,) = read_space({"r": given})
    assert space == {"r": read}
    assert type(space["r"]) is type(read)
    if isinstance(read, Range):
        assert space["r"].whole == read.whole


@pytest.mark.parametrize(
    ("drawn", "allowed"),
    [
        (Range(4, 16, 4), {4, 8, 12, 16}),
        (Range(2, 4), {2, 3, 4}),
        (Range(1, 4, None, True), {1, 2, 3, 4}),
        (Range(0.0, 0.3, 0.1), {0.0, 0.1, 0.2, 0.3}),
    ],
)
def test_every_number_of_a_range_is_drawn_and_no_other(drawn: Range, allowed: set[float]) -> None:
    rng = np.random.RandomState(0)
    found = Counter(drawn.rvs(random_state=rng) for _ in range(400))
    assert set(found) == allowed
    assert {type(number) for number in found} == {int if drawn.whole else float}


def test_factors_of_a_logarithmic_range_are_equally_likely() -> None:
    rng = np.random.RandomState(0)
    drawn = np.array([Range(1e-5, 1e-1, None, True).rvs(random_state=rng) for _ in range(2000)])
    assert np.histogram(np.log10(drawn), bins=4, range=(-5, -1))[0] == pytest.approx(500, abs=75)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        (
            {},
            "The 'space' parameter of make_search must be a dict of parameter to values, or a list of such "
            "dicts. Got {} instead.",
        ),
        (
            {"epochs": 3},
            "The 'epochs' parameter of the search space must be a list of values, a range such as {'low': 1e-5, "
            "'high': 1e-3, "
            "'log': True} or a distribution of scipy. Got 3 instead.",
        ),
        (
            {"epochs": []},
            "The 'epochs' parameter of the search space must be a list with at least one value. Got [] instead.",
        ),
        ({"epochs": {"low": 1}}, "The range of 'epochs' has no 'high'. It needs 'low' and 'high'."),
        (
            {"epochs": {"low": 1, "high": 3, "setp": 1}},
            "The range of 'epochs' has no parameter 'setp'. It has 'high', 'log', 'low', 'step'. Did you mean 'step'?",
        ),
        (
            {"epochs": {"low": 3, "high": 1}},
            "The 'high' parameter of the range of 'epochs' must be greater than low, 3. Got 1 instead.",
        ),
        (
            {"learning_rate": {"low": 0.0, "high": 1.0, "log": True}},
            "The 'low' parameter of the range of 'learning_rate' must be greater than 0 with log=True. Got 0.0 "
            "instead.",
        ),
        (
            {"epochs": {"low": 1, "high": 9, "step": 2, "log": True}},
            "The range of 'epochs' has both 'step' and 'log'. Leave one out.",
        ),
        (
            {"epochs": {"space": "randn", "mean": 0}},
            "The 'space' parameter of the search space of 'epochs' must be one of 'uniform', 'loguniform', "
            "'quniform', 'int', "
            "'randint', 'qrandint', 'lograndint', 'choice', 'grid_search'. Got 'randn' instead. Did you mean "
            "'randint'?",
        ),
        ({"epochs": {"space": "randint", "lower": 1}}, "The space 'randint' of 'epochs' has no 'upper'."),
        (
            {"epochs": {"space": "randint", "lower": 1, "upper": 2.5}},
            "The space 'randint' of 'epochs' needs ints. Got [1, 2.5] instead.",
        ),
        (
            {"adapter": {"type": "lora"}},
            "The 'adapter' parameter of the search space must be a list of values, a range such as {'low': "
            "1e-5, 'high': 1e-3, "
            "'log': True} or a distribution of scipy. Got {'type': 'lora'} instead.",
        ),
    ],
    ids=str,
)
def test_a_space_that_cannot_be_read_is_refused_in_a_sentence(space: Any, sentence: str) -> None:
    with pytest.raises(ParameterError) as caught:
        make_search(LLMClassifier(), space)
    assert str(caught.value) == sentence


def test_every_named_space_is_read_in_these_tests() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"space": "{name}"' in source for name in SPACES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"space": {"learning_rat": [1]}},
            "Invalid parameter 'learning_rat' for estimator LLMClassifier. Valid parameters are: "
            f"{LLMClassifier._get_param_names()!r}. Did you mean 'learning_rate'?",
        ),
        (
            {"space": {"epochs": [1]}, "kind": "grdi"},
            "The 'kind' parameter of make_search must be one of 'grid', 'fused', 'fused_halving', 'random', "
            "'halving', 'optuna'. Got 'grdi' instead. Did you mean 'grid'?",
        ),
        (
            {"space": {"epochs": {"low": 1, "high": 3}, "learning_rate": stats.uniform(0, 1)}},
            "kind='grid' tries every value, which a range has no end of: 'epochs', 'learning_rate'. List "
            "values, or set "
            "kind='random'.",
        ),
        (
            {"space": {"epochs": [1]}, "n_iter": 3},
            "The 'n_iter' parameter has no meaning with kind='grid': nothing is drawn.",
        ),
        (
            {"space": {"epochs": [1]}, "random_state": 3},
            "The 'random_state' parameter has no meaning with kind='grid': nothing is drawn.",
        ),
        (
            {"space": {"epochs": [1]}, "kind": "halving", "n_iter": 3},
            "The 'n_iter' parameter has no meaning with kind='halving' over lists: every combination is tried.",
        ),
        (
            {"space": {"epochs": [1]}, "kind": "random", "n_iter": 0},
            "The 'n_iter' parameter of make_search must be None or an int >= 1. Got 0 instead.",
        ),
        (
            {"space": {"epochs": [1]}, "scoring": "acuracy"},
            "The 'scoring' parameter of make_search must be a name that scikit-learn has, such as 'accuracy', "
            "'f1_macro', "
            "'neg_log_loss' or 'r2'. Got 'acuracy' instead. Did you mean 'accuracy'?",
        ),
        (
            {"space": {"epochs": [1]}, "kind": "halving", "scoring": ["accuracy"]},
            "kind='halving' ranks by one score. Got ['accuracy'] for 'scoring'.",
        ),
        (
            {"space": {"epochs": [1]}, "refti": True},
            "make_search with kind='grid' has no parameter 'refti'. It has 'error_score', 'n_jobs', "
            "'pre_dispatch', 'refit', "
            "'return_train_score', 'verbose'. Did you mean 'refit'?",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_searched_is_refused_before_a_fit(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError) as caught:
        make_search(LLMClassifier(), **arguments)
    assert str(caught.value) == sentence


def test_a_key_must_suit_every_whole_value_that_is_searched_beside_it() -> None:
    make_search(LLMClassifier(), {"adapter": ["lora", {"type": "lora", "dropout": 0.1}], "adapter__r": [4]})
    with pytest.raises(ParameterError, match=r"has no parameter 'r'"):
        make_search(LLMClassifier(), {"adapter": ["lora", "ia3"], "adapter__r": [4]})
    make_search(LLMClassifier(), [{"adapter": ["lora"], "adapter__r": [4]}, {"adapter": ["ia3"]}])


@pytest.mark.skipif(HAS_OPTUNA, reason="optuna is installed")
def test_missing_optuna_is_named_with_its_extra() -> None:
    with pytest.raises(ParameterError) as caught:
        make_search(LLMClassifier(), {"epochs": [1]}, "optuna")
    assert str(caught.value) == "kind='optuna' needs optuna. Install it with: pip install 'llmfit[optuna]'."


@needs_optuna
def test_optuna_takes_no_distribution_of_scipy_and_one_space() -> None:
    with pytest.raises(ParameterError) as caught:
        make_search(LLMClassifier(), {"learning_rate": stats.uniform(0, 1)}, "optuna")
    assert str(caught.value).startswith(
        "The 'learning_rate' parameter of the search space must be a list or a range with kind='optuna'. Got "
    )
    with pytest.raises(ParameterError) as caught:
        make_search(LLMClassifier(), [{"epochs": [1]}, {"epochs": [2]}], "optuna")
    assert (
        str(caught.value)
        == "The 'space' parameter of make_search with kind='optuna' must be one dict. Got 'a list of 2' instead."
    )


# 2. The searches are scikit-learn's -------------------------------------------------------------------------------

PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "grid": (GridSearchCV, {"param_grid": SPACE}),
    "random": (RandomizedSearchCV, {"param_distributions": read_space(RANGES), "n_iter": 4, "random_state": 0}),
    "halving": (HalvingGridSearchCV, {"param_grid": SPACE, "random_state": 0, "factor": 2, "min_resources": 24}),
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_search_finds_what_scikit_learns_own_finds(
    kind: str, recorded: bool, gaps: pd.DataFrame, tmp_path: Path
) -> None:
    chosen, own = PLAIN[kind]
    plain = chosen(LLMClassifier(**FAKE), cv=3, scoring="neg_log_loss", **own).fit(gaps, gaps["level"])
    search = searched(kind, checkpoint_dir=tmp_path if recorded else None).fit(gaps)
    assert isinstance(search, chosen)
    for key, values in plain.cv_results_.items():
        if not key.endswith("_time"):
            np.testing.assert_array_equal(np.asarray(search.cv_results_[key]), np.asarray(values), err_msg=key)
    assert list(search.cv_results_) == list(plain.cv_results_)
    assert search.best_params_ == plain.best_params_ == {**plain.best_params_, "template__na_rep": "9"}
    assert search.score(gaps) == search.score(gaps, gaps["level"]) == plain.score(gaps, gaps["level"])
    assert type(search.best_estimator_) is LLMClassifier
    assert search.predict(gaps).equals(gaps["level"])
    assert repr(search.scorer_) == repr(plain.scorer_)
    assert search.classes_.tolist() == ["high", "low"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("kind", EACH)
def test_fit_leaves_the_search_as_it_was_made(kind: str, gaps: pd.DataFrame, tmp_path: Path) -> None:
    clf = LLMClassifier(**FAKE)
    search = searched(kind, clf, checkpoint_dir=tmp_path)
    before = search.get_params(deep=False)
    search.fit(gaps)
    assert all(search.get_params(deep=False)[name] is value for name, value in before.items())
    assert is_classifier(search)
    copy = clone(search)
    assert copy.checkpoint_dir == tmp_path
    assert not hasattr(copy, "best_estimator_")
    again = pickle.loads(pickle.dumps(search))
    assert again.predict(gaps).equals(search.predict(gaps))
    assert results(search)["rank"].iloc[0] == 1
    best = results(search).iloc[0]
    assert all(best[name] == value for name, value in search.best_params_.items())
    assert set(search.best_params_) == set(SEARCHES[kind][0])


@pytest.mark.usefixtures("fake")
def test_halving_over_ranges_draws_candidates(gaps: pd.DataFrame) -> None:
    search = make_search(LLMClassifier(**FAKE), RANGES, "halving", cv=2, n_iter=4, random_state=0, factor=2)
    assert isinstance(search.fit(gaps), HalvingRandomSearchCV)
    found = results(search)
    assert found["iter"].is_monotonic_decreasing
    assert found.iloc[0]["learning_rate"] == search.best_params_["learning_rate"]
    assert search.n_candidates_[0] == 4


@pytest.mark.usefixtures("fake")
def test_a_range_without_records_is_drawn_anew_each_time(gaps: pd.DataFrame) -> None:
    space = {"learning_rate": stats.loguniform(1e-5, 1e-3)}
    rates = [
        make_search(LLMClassifier(**FAKE), space, "random", n_iter=1, cv=2).fit(gaps).best_params_ for _ in range(2)
    ]
    assert rates[0] != rates[1]


# 3. Folds and targets ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_folds_of_a_frame_with_its_target_inside_are_stratified(
    kind: str, cls: Any, gaps: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are sorted by class, and LLMEstimator is told by the target alone that they are classes."""
    seen: list[float] = []
    fit = LLMClassifier.fit
    monkeypatch.setattr(
        LLMClassifier, "fit", lambda self, X, y=None, **p: seen.append(np.mean(y == "low")) or fit(self, X, y, **p)
    )
    space, own = SEARCHES[kind]
    make_search(cls(**FAKE), space, kind, cv=4, **{**own, **({"min_resources": 48} if kind == "halving" else {})}).fit(
        gaps
    )
    assert len(seen) > 8
    assert all(share == pytest.approx(20 / 52, abs=0.05) for share in seen)


@pytest.mark.usefixtures("fake")
def test_folds_of_numbers_and_texts_are_plain(gaps: pd.DataFrame) -> None:
    frame = gaps.assign(level=np.arange(52) / 3.0)
    numbers = make_search(LLMRegressor(**FAKE), {"epochs": [1]}, cv=4).fit(frame)
    folds = [LLMRegressor(**FAKE).fit(frame.iloc[a]).score(frame.iloc[b]) for a, b in KFold(4).split(frame)]
    assert results(numbers)["score"].tolist() == pytest.approx([np.mean(folds)])
    texts = make_search(LLMGenerator(**FAKE), {"epochs": [1]}, cv=4, scoring=None).fit(gaps)
    assert 0 <= texts.best_score_ <= 1
    unsure = make_search(LLMEstimator(**FAKE), {"epochs": [1]}, cv=4).fit(frame)
    assert unsure.best_score_ == pytest.approx(np.mean(folds))


def test_lists_of_labels_and_several_targets_are_searched_too(settings: dict[str, Any], frame: pd.DataFrame) -> None:
    frame["tags"] = [["a"], ["b"], ["a", "b"], []] * 2
    tags = LLMClassifier(target="tags", **settings | {"adapter": None, "head": "linear"})
    assert 0 <= make_search(tags, {"epochs": [1, 2]}, cv=2).fit(frame).best_score_ <= 1
    assert 0 <= make_search(tags, {"epochs": [1, 2]}, cv=2).fit(frame[["text"]], frame["tags"]).best_score_ <= 1
    both = LLMEstimator(
        target={"label": "category", "size": "number"}, **settings | {"adapter": None, "head": "linear"}
    )
    search = make_search(both, {"epochs": [1, 2]}, cv=2).fit(frame)
    assert list(search.predict(frame).columns) == ["label", "size"]


def test_a_score_that_no_candidate_has_makes_none_the_best(settings: dict[str, Any], frame: pd.DataFrame) -> None:
    model = LLMClassifier(target="label", **settings | {"adapter": None})
    search = make_search(model, {"epochs": [1, 2]}, cv=2, scoring="precision")  # which looks for the class 1
    with pytest.warns(UserWarning, match="Scoring failed|non-finite"), pytest.raises(DataError) as caught:
        search.fit(frame)
    assert str(caught.value) == (
        "No candidate of the search has a score: scoring='precision' gives none for what is predicted here, on any "
        "fold. The warnings say why."
    )


@pytest.mark.usefixtures("fake")
def test_a_target_that_is_missing_is_named_before_a_fit(gaps: pd.DataFrame) -> None:
    search = make_search(LLMClassifier(**FAKE), {"epochs": [1]}, cv=2)
    with pytest.raises(DataError) as caught:
        search.fit(gaps.drop(columns="level"))
    assert str(caught.value) == "LLMClassifier needs the target column 'level', but the frame has only 'a'."
    gaps.loc["row 3", "level"] = None
    with pytest.raises(DataError, match="'level' is missing, in 1 row"):
        search.fit(gaps)


@pytest.mark.usefixtures("fake")
def test_pipelines_and_other_estimators_are_searched_with_y(gaps: pd.DataFrame, tmp_path: Path) -> None:
    pipeline = Pipeline([("llm", LLMClassifier(**FAKE))])
    search = make_search(pipeline, {"llm__template__na_rep": ["", "9"]}, cv=3, checkpoint_dir=tmp_path)
    assert search.fit(gaps[["a"]], gaps["level"]).best_params_ == {"llm__template__na_rep": "9"}
    tree = make_search(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2]}, cv=3)
    assert tree.fit(gaps[["a"]].fillna(99), gaps["level"]).best_params_["max_depth"] == 1


# 4. Going on after a kill -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("stop_before", [0, 4, 7])
def test_a_search_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    kind: str, stop_before: int, gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        every = count_fits(patch)
        whole = searched(kind).fit(gaps)
    with pytest.MonkeyPatch.context() as patch:
        first = count_fits(patch, stop_before=stop_before)
        with pytest.raises(KeyboardInterrupt):
            searched(kind, checkpoint_dir=tmp_path).fit(gaps)
    assert len(list(tmp_path.glob("*.json"))) == len(first) == stop_before
    rest = count_fits(monkeypatch)
    resumed = searched(kind, checkpoint_dir=tmp_path).fit(gaps)
    assert len(first) + len(rest) == len(every)
    pd.testing.assert_frame_equal(without_times(resumed), without_times(whole))
    assert resumed.predict_proba(gaps).tolist() == whole.predict_proba(gaps).tolist()
    rest.clear()
    third = searched(kind, checkpoint_dir=tmp_path).fit(gaps)
    assert len(rest) == 1  # the refit
    pd.testing.assert_frame_equal(without_times(third), without_times(whole))


SCRIPT = """
import os, signal, sys
import pandas as pd
import pytest
from fake_model import put_in_place
from test_search import LLMClassifier, searched

put_in_place(pytest.MonkeyPatch())
fits, fit = [], LLMClassifier.fit

def killed(self, *args, **params):
    if len(fits) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    fits.append(1)
    return fit(self, *args, **params)

LLMClassifier.fit = killed
searched("grid", checkpoint_dir=sys.argv[1]).fit(pd.read_pickle(sys.argv[2]))
"""


@pytest.mark.usefixtures("fake")
def test_a_process_that_was_killed_leaves_whole_records_which_another_reads(
    gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    gaps.to_pickle(tmp_path / "gaps.pkl")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "gaps.pkl")]
    paths = [str(Path(__file__).parent), str(Path(llmfit.__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(list(folder.glob("*.json"))) == 5
    fits = count_fits(monkeypatch)
    resumed = searched("grid", checkpoint_dir=folder).fit(gaps)
    assert len(fits) == 6 * 3 - 5 + 1
    pd.testing.assert_frame_equal(without_times(resumed), without_times(searched("grid").fit(gaps)))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "change",
    [
        {"X": lambda frame: frame.assign(a=frame["a"] + 1)},
        {"X": lambda frame: frame.set_axis([f"r{i}" for i in range(len(frame))])},
        {"cv": 4},
        {"scoring": "accuracy"},
        {"estimator": LLMClassifier(**FAKE, learning_rate=1e-9)},
        {"estimator": LLMEstimator(**FAKE)},
    ],
    ids=["data", "index", "folds", "scoring", "parameters", "class"],
)
def test_records_of_another_search_are_not_taken(
    change: dict[str, Any], gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"estimator": LLMClassifier(**FAKE), "cv": 3, "scoring": "neg_log_loss"}
    make_search(space={"epochs": [1]}, checkpoint_dir=tmp_path, **settings).fit(gaps)
    fits = count_fits(monkeypatch)
    make_search(space={"epochs": [1]}, checkpoint_dir=tmp_path, **settings).fit(gaps)
    assert len(fits) == 1
    changed = change.get("X", lambda frame: frame)(gaps)
    settings |= {name: value for name, value in change.items() if name != "X"}
    fits.clear()
    make_search(space={"epochs": [1]}, checkpoint_dir=tmp_path, **settings).fit(changed)
    assert len(fits) == settings["cv"] + 1


@pytest.mark.parametrize("part", ["adapter", "few_shot"])
def test_other_weights_in_the_same_place_are_another_search(part: str, gaps: pd.DataFrame, tmp_path: Path) -> None:
    """An adapter to begin from, and the model whose vectors choose examples."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / ("config.json" if part == "few_shot" else "adapter_config.json")).write_text("{}")
    few_shot = {"k": 1, "retrieval": "semantic", "model": str(folder)}
    own = {"adapter": folder} if part == "adapter" else {"template": {"few_shot": few_shot}}
    records, keys = Records(tmp_path / "records", None), set()
    for content in (b"one", b"two", b"two"):
        (folder / "adapter_model.safetensors").write_bytes(content)
        keys.add(records.key(LLMClassifier(**{**FAKE, **own}), gaps, None, {}))
    assert len(keys) == 2


def test_another_file_of_a_base_model_is_another_search(
    gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfit.sources.find_source", lambda path: SimpleNamespace(fingerprint=path.read_bytes().hex()))
    records, keys = Records(tmp_path / "records", None), set()
    for content in (b"GGUF one", b"GGUF two"):
        (tmp_path / "m.gguf").write_bytes(content)
        keys.add(records.key(LLMClassifier(**{**FAKE, "base_model": tmp_path / "m.gguf"}), gaps, None, {}))
    assert len(keys) == 2


@pytest.mark.usefixtures("fake")
def test_what_decides_no_score_finds_the_records_again(
    gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched("grid", checkpoint_dir=tmp_path).fit(gaps)
    fits = count_fits(monkeypatch)
    own = LLMClassifier(**FAKE | {"verbose": 1}, checkpoint_dir=tmp_path / "states")
    searched("grid", own, checkpoint_dir=tmp_path, refit=False).fit(gaps)
    assert fits == []


@pytest.mark.usefixtures("fake")
def test_a_damaged_record_is_measured_again(gaps: pd.DataFrame, tmp_path: Path) -> None:
    whole = searched("grid", checkpoint_dir=tmp_path).fit(gaps)
    for place, path in enumerate(sorted(tmp_path.glob("*.json"))):
        text = path.read_text()
        path.write_text([text[:-9], "", "[]", '{"scores": 3}', '{"scores": {"x": "y"}}'][place % 5])
    pd.testing.assert_frame_equal(
        without_times(searched("grid", checkpoint_dir=tmp_path).fit(gaps)), without_times(whole)
    )
    assert all(json.loads(path.read_text())["scores"] for path in tmp_path.glob("*.json"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("fake")
def test_several_scores_and_those_of_training_are_recorded(gaps: pd.DataFrame, tmp_path: Path) -> None:
    own = {"scoring": ["accuracy", "neg_log_loss"], "refit": "neg_log_loss", "return_train_score": True}
    plain = searched("grid", **own).fit(gaps)
    for _ in range(2):
        search = searched("grid", checkpoint_dir=tmp_path, **own).fit(gaps)
        pd.testing.assert_frame_equal(without_times(search), without_times(plain))
        for key in ("split0_train_accuracy", "mean_train_neg_log_loss"):
            assert search.cv_results_[key].tolist() == plain.cv_results_[key].tolist()
        assert search.score(gaps) == plain.score(gaps)
        assert list(search.scorer_) == ["accuracy", "neg_log_loss"]
    named = {"hits": "accuracy", "own": lambda model, X, y: float(model.score(X, y))}
    found = results(searched("grid", checkpoint_dir=tmp_path, scoring=named, refit="own").fit(gaps))
    assert found["hits"].tolist() == found["own"].tolist()
    assert found.columns[:5].tolist() == ["rank", "hits", "hits_std", "own", "own_std"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.FitFailedWarning", "ignore:One or more of the test scores:UserWarning"
)
def test_a_candidate_that_fails_is_ranked_last_and_tried_again(
    recorded: bool, gaps: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"epochs": [1, 0]}
    folder = tmp_path if recorded else None
    found = results(make_search(LLMClassifier(**FAKE), space, cv=2, checkpoint_dir=folder).fit(gaps))
    assert found["epochs"].tolist() == [1, 0]
    assert found["score"].isna().tolist() == [False, True]
    assert "nan" in leaderboard(make_search(LLMClassifier(**FAKE), space, cv=2, checkpoint_dir=folder).fit(gaps))
    with pytest.raises(ParameterError, match="'epochs' parameter of LLMClassifier must be an int >= 1"):
        make_search(LLMClassifier(**FAKE), space, cv=2, checkpoint_dir=folder, error_score="raise").fit(gaps)
    assert len(list(tmp_path.iterdir())) == 2 * recorded


@pytest.mark.usefixtures("fake")
@pytest.mark.filterwarnings("ignore:Scoring failed:sklearn.exceptions.FitFailedWarning")
@pytest.mark.filterwarnings("ignore:Scoring failed:UserWarning", "ignore:One or more of the test scores:UserWarning")
def test_a_score_that_fails_is_missing_and_the_others_are_not(gaps: pd.DataFrame, tmp_path: Path) -> None:
    def broken(model: Any, X: Any, y: Any) -> float:
        raise ValueError("no such score")

    own = {"scoring": {"hits": "accuracy", "odd": broken}, "refit": "hits"}
    plain, recorded = (searched("grid", **own, checkpoint_dir=folder).fit(gaps) for folder in (None, tmp_path))
    pd.testing.assert_frame_equal(without_times(recorded), without_times(plain))
    assert results(recorded)["odd"].isna().all()
    assert list(tmp_path.iterdir()) == []


@needs_optuna
@pytest.mark.usefixtures("fake")
def test_optuna_hides_no_failure(gaps: pd.DataFrame) -> None:
    clf, space = LLMClassifier(**FAKE), {"epochs": [0]}
    with pytest.raises(ParameterError, match="'epochs' parameter of LLMClassifier must be an int >= 1"):
        make_search(clf, space, "optuna", n_iter=2, cv=2, random_state=0, error_score="raise").fit(gaps)
    with (
        pytest.warns(llmfit.exceptions.LLMFitWarning, match=r"A candidate failed, \{'epochs': 0\}: The 'epochs'"),
        pytest.raises((DataError, ParameterError)),
    ):
        make_search(clf, space, "optuna", n_iter=2, cv=2, random_state=0).fit(gaps)


@needs_optuna
@pytest.mark.usefixtures("fake")
def test_optuna_searches_dicts_and_numbers_of_their_kind(gaps: pd.DataFrame) -> None:
    space = {
        "template": [None, {"na_rep": "9"}],
        "epochs": {"low": 1, "high": 3},
        "learning_rate": {"low": 0.25, "high": 0.5, "step": 0.25},
    }
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    search = make_search(LLMClassifier(**FAKE), space, "optuna", cv=folds, n_iter=6, random_state=0).fit(gaps)
    assert search.best_params_["template"] == {"na_rep": "9"}
    assert {type(trial.params["epochs"]) for trial in search.trials_} == {int}
    assert {trial.params["learning_rate"] for trial in search.trials_} <= {0.25, 0.5}
    assert search.best_score_ == 1.0


def test_records_that_no_later_search_could_find_are_refused(tmp_path: Path) -> None:
    X, y = [[0.0], [1.0]] * 4, [0, 1] * 4
    search = make_search(DummyClassifier(), {"strategy": ["prior"]}, "random", n_iter=1, checkpoint_dir=tmp_path)
    with pytest.raises(ParameterError) as caught:
        search.fit(X, y)
    assert str(caught.value) == (
        "checkpoint_dir needs an int 'random_state' of RandomSearch: without one, other candidates are drawn each time."
    )
    for cv, refused in (
        (StratifiedKFold(2, shuffle=True), True),
        (ShuffleSplit(2), True),
        (StratifiedKFold(2), False),
        (ShuffleSplit(2, random_state=0), False),
    ):
        search = make_search(DummyClassifier(), {"strategy": ["prior"]}, cv=cv, checkpoint_dir=tmp_path)
        if not refused:
            search.fit(X, y)
            continue
        with pytest.raises(ParameterError) as caught:
            search.fit(X, y)
        assert (
            str(caught.value)
            == "checkpoint_dir needs an int 'random_state' of cv: without one, other folds are drawn each time."
        )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    search = make_search(DummyClassifier(), {"strategy": ["prior"]}, cv=2, checkpoint_dir=tmp_path / "file" / "in")
    with pytest.raises(DataError, match=r"^checkpoint_dir '.*in' cannot be written: "):
        search.fit([[0.0], [1.0]] * 4, [0, 1] * 4)
    with pytest.raises(ParameterError) as caught:
        make_search(DummyClassifier(), {"strategy": ["prior"]}, cv=2, checkpoint_dir=3).fit([[0.0]] * 4, [0, 1] * 2)
    assert (
        str(caught.value)
        == "The 'checkpoint_dir' parameter of make_search must be None, a str or a path. Got 3 instead."
    )


# 5. Digests ----------------------------------------------------------------------------------------------------------


def adder(n: int) -> Any:
    return lambda x: x + n


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


DIFFERENT: list[Any] = [
    None,
    1,
    1.0,
    True,
    "1",
    b"1",
    [1],
    (1,),
    {1},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    ["ab", "c"],
    ["a", "bc"],
    np.array([1, 2]),
    np.array([1.0, 2.0]),
    np.array([[1, 2]]),
    np.array(["a", None], dtype=object),
    pd.Series([1, 2], name="a"),
    pd.Series([1, 2], name="b"),
    pd.Series([1, 2], name="a", index=[1, 0]),
    pd.DataFrame({"a": [1, 2]}),
    pd.DataFrame({"b": [1, 2]}),
    pd.DataFrame({"a": ["x", None]}),
    pd.DataFrame({"a": [["x"], ["y", "z"]]}),
    pd.DataFrame({"a": [["x"], ["y, z"]]}),
    pd.Series([1, None], dtype="Int64"),
    pd.Series(["x"], dtype="category"),
    pd.Timestamp("2024-01-01"),
    Path("a"),
    LLMClassifier,
    Thing(1),
    Thing(2),
    llmfit.LoRA(r=4),
    llmfit.LoRA(r=8),
    adder(1),
    adder(2),
    partial(adder, 1),
    partial(adder, 2),
    np.random.RandomState(0),
    np.random.RandomState(1),
    len,
    "\ud800",
]


def test_digests_tell_values_apart_and_know_them_again() -> None:
    digests = [digest_of(value) for value in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    copies = [pickle.loads(pickle.dumps(value)) for value in DIFFERENT if getattr(value, "__name__", "") != "<lambda>"]
    assert {digest_of(value) for value in copies} <= set(digests)
    assert digest_of(adder(1)) == digest_of(adder(1))
    assert digest_of(np.float64(1.0)) == digest_of(1.0)
    assert digest_of({"a", "b", "c"}) == digest_of({"c", "b", "a"})
    assert digest_of(np.asfortranarray(np.eye(3)[:2])) == digest_of(np.eye(3)[:2])


def test_what_holds_itself_ends_and_what_has_no_content_is_refused() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert len(digest_of(loop)) == 32
    with pytest.raises(ParameterError) as caught:
        digest_of({"callbacks": (i for i in range(3))})
    assert str(caught.value) == (
        "checkpoint_dir cannot tell one generator from another: cannot pickle 'generator' object. Leave it out of the "
        "parameters, or search without checkpoint_dir."
    )


# 6. Results ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trees() -> GridSearchCV:
    """A search of scikit-learn's own over plain numbers."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 2))
    space = {"max_depth": [1, 3], "criterion": ["gini", "entropy"], "min_impurity_decrease": [0.0]}
    return GridSearchCV(DecisionTreeClassifier(random_state=0), space, cv=3).fit(X, X.sum(axis=1) > 0)


def test_results_are_ranked_with_parameters_under_their_own_names(trees: GridSearchCV) -> None:
    found = results(trees)
    assert list(found.columns) == [
        *("rank", "score", "std"),
        *("criterion", "max_depth", "min_impurity_decrease", "fit_seconds"),
    ]
    assert found["rank"].tolist() == sorted(trees.cv_results_["rank_test_score"].tolist())
    assert found["score"].is_monotonic_decreasing
    assert found["max_depth"].dtype == np.int64
    for row in found.to_dict("records"):
        place = trees.cv_results_["params"].index({name: row[name] for name in trees.best_params_})
        assert row["score"] == trees.cv_results_["mean_test_score"][place]
        assert row["std"] == trees.cv_results_["std_test_score"][place]


def test_a_leaderboard_reads_as_a_table(trees: GridSearchCV) -> None:
    lines = leaderboard(trees, 2).splitlines()
    assert lines[0] == "4 candidates on 3 folds, the best 2; a higher score is better"
    assert lines[1].split() == ["rank", "score", "std", "criterion", "max_depth", "min_impurity_decrease"]
    assert len(lines) == 4
    assert lines[2].split()[0] == "1"


@pytest.mark.usefixtures("fake")
def test_parameters_that_not_every_candidate_has_are_none_elsewhere(gaps: pd.DataFrame) -> None:
    space = [{"template__na_rep": ["9"]}, {"epochs": [2], "template": [{"task": "A very long task " * 9}]}]
    search = make_search(LLMClassifier(**FAKE), space, cv=2).fit(gaps)
    found = results(search)
    assert found["epochs"].tolist() == [None, 2]
    assert max(map(len, leaderboard(search).splitlines())) < 100


def test_results_of_what_was_not_fitted_are_refused() -> None:
    with pytest.raises(ParameterError) as caught:
        results(make_search(DummyClassifier(), {"strategy": ["prior"]}))
    assert str(caught.value) == "results needs a search that is fitted. Got GridSearch instead."


def test_importing_the_search_loads_no_torch() -> None:
    code = (
        "import sys, llmfit; llmfit.search.make_search(llmfit.LLMClassifier(), {'adapter__r': [1, 2]}); llmfit.plots; "
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib', 'optuna'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore:.*does not support sample_weight:UserWarning")
@pytest.mark.parametrize("routing", [False, True])
@pytest.mark.parametrize("scoring", [None, "accuracy", ["accuracy", "f1"]])
def test_weights_reach_fit_and_scores_of_a_recorded_search(routing: bool, scoring: Any, tmp_path: Path) -> None:
    X, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    weights = np.where(y == 1, 5.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=routing):
        tree = DecisionTreeClassifier(max_depth=1, random_state=0)
        if routing:
            tree = tree.set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        if routing and scoring is not None:
            own = {name: get_scorer(name).set_score_request(sample_weight=False) for name in np.atleast_1d(scoring)}
            scoring = own if isinstance(scoring, list) else own[scoring]
        refit = "f1" if isinstance(scoring, list | dict) else True
        space = {"max_depth": [1, 2]}
        plain = GridSearchCV(tree, space, cv=2, scoring=scoring, refit=refit).fit(X, y, sample_weight=weights)
        for _ in range(2):
            search = make_search(tree, space, cv=2, scoring=scoring, refit=refit, checkpoint_dir=tmp_path)
            search.fit(X, y, sample_weight=weights)
            pd.testing.assert_frame_equal(without_times(search), without_times(plain))
        files = len(list(tmp_path.glob("*.json")))
        make_search(tree, space, cv=2, scoring=scoring, refit=refit, checkpoint_dir=tmp_path).fit(
            X, y, sample_weight=weights + 1
        )
        assert len(list(tmp_path.glob("*.json"))) == 2 * files == 8


def test_records_of_parallel_processes_are_whole(tmp_path: Path) -> None:
    X, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    space = {"max_depth": [1, 2, 3]}
    tree = DecisionTreeClassifier(random_state=0)
    plain = GridSearchCV(tree, space, cv=2).fit(X, y)
    search = make_search(tree, space, cv=2, n_jobs=2, checkpoint_dir=tmp_path).fit(X, y)
    pd.testing.assert_frame_equal(without_times(search), without_times(plain))
    assert len(list(tmp_path.iterdir())) == 6
