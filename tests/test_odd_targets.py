"""Targets that are no numbers, no two classes, or sets: what is promised of a target is kept, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pandas as pd
import pytest
from head_side import headed
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold

from llmfit import LLMClassifier, LLMEstimator, LLMRegressor
from llmfit.estimators.fitting import split_rows
from llmfit.exceptions import DataError
from llmfit.search import make_search

DAYS = pd.Series(pd.date_range("2020-01-01", periods=8))
TIMES = {
    "datetime64": DAYS,
    "with a zone": DAYS.dt.tz_localize("UTC"),
    "timedelta64": DAYS - DAYS[0],
    "periods": DAYS.dt.to_period("D"),
    "arrow": pd.Series(DAYS.dt.date.tolist(), dtype="date32[pyarrow]"),
    "categories": DAYS.astype("category"),
    "dates": pd.Series(DAYS.dt.date.tolist(), dtype=object),
    "datetimes": pd.Series([day.to_pydatetime() for day in DAYS], dtype=object),
    "timedeltas": pd.Series([timedelta(days=i) for i in range(8)], dtype=object),
    "of NumPy": pd.Series(list(DAYS.to_numpy()), dtype=object),
    "spans of NumPy": pd.Series(list((DAYS - DAYS[0]).to_numpy()), dtype=object),
}
NUMBERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "LLMRegressor": lambda settings: LLMRegressor(target="day", features="text", **settings),
    "in words": lambda settings: LLMRegressor(target="day", features="text", head="lm", **settings),
    "LLMEstimator": lambda settings: LLMEstimator(target={"day": "number"}, features="text", **settings),
    "several targets": lambda settings: LLMEstimator(
        target={"label": "category", "day": "number"}, features="text", **settings
    ),
}


@pytest.mark.parametrize("days", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_dates_and_times_are_no_numbers(make: Any, days: pd.Series, frame: pd.DataFrame, settings: Any) -> None:
    days = days.set_axis(frame.index)
    with pytest.raises(DataError) as error:
        make(settings).fit(frame.assign(day=days))
    assert str(error.value) == (
        f"The target 'day' holds dates or times ({days.dtype}), which are no numbers. Make them numbers first, for "
        "example the days since the first of them."
    )


def test_true_numbers_that_are_dates_are_refused(frame: pd.DataFrame, settings: Any) -> None:
    model = LLMRegressor(target="size", features="text", adapter=None, **settings).fit(frame)
    days = DAYS.set_axis(frame.index)
    for measure in (model.score, model.evaluate):
        with pytest.raises(DataError, match=r"^The target 'size' holds dates or times \("):
            measure(frame, days)
    with pytest.raises(DataError, match=r"^eval_set: The target 'size' holds dates or times \("):
        model.fit(frame, eval_set=(frame[["text"]], days))


@pytest.mark.parametrize("days", TIMES.values(), ids=TIMES)
def test_dates_and_times_are_no_classes(days: pd.Series, frame: pd.DataFrame, settings: Any) -> None:
    with pytest.raises(DataError) as error:
        LLMClassifier(**settings).fit(frame[["text"]], days.rename("day"))
    assert str(error.value) == (
        f"The labels of 'day' are dates or times ({days.dtype}). Make them text first, for example with "
        "df['day'].astype(str)."
    )


def test_one_target_declared_as_binary_has_two_classes(frame: pd.DataFrame, settings: Any) -> None:
    scores = frame.assign(score=[1, 2, 3, 4, 5, 1, 2, 3])
    model = LLMEstimator(target={"score": "binary"}, features="text", adapter=None, **settings)
    with pytest.raises(DataError, match=r"^The target 'score' is declared as 'binary', but has 5 classes\.$"):
        model.fit(scores)
    assert list(model.fit(frame.assign(score=[1, 2] * 4)).classes_) == [1, 2]
    with pytest.raises(DataError, match=r"^The target 'score' is declared as 'binary', but has 3 classes\.$"):
        model.set_params(warm_start=True).fit(frame.assign(score=[2, 3] * 4))


SETS = {
    "sets": lambda row: [{"a"}, {"b", "c"}][row % 2],
    "frozensets": lambda row: [frozenset("a"), frozenset("bc")][row % 2],
    "lists": lambda row: [["a"], ["b", "a"], ["a"], ["a", "b"]][row % 4],
}


@pytest.mark.parametrize("of_row", SETS.values(), ids=SETS)
def test_several_labels_a_row_are_held_out_in_proportion(of_row: Any, settings: Any) -> None:
    y = pd.Series([of_row(row) for row in range(20)], name="label", dtype=object)
    _, held = split_rows(20, 0.2, y, 7)
    assert sorted(len(y[row]) for row in held) == [1, 1, 2, 2]
    clf = headed(settings, adapter=None, validation_fraction=0.2, target=None)
    clf.fit(pd.DataFrame({"text": [f"t{row}" for row in range(20)]}), y)
    assert clf.history_["validation_loss"].notna().any()


def test_lists_of_labels_are_searched_where_scikit_learn_does_not_look_at_them(settings: Any) -> None:
    X = pd.DataFrame({"text": [f"t{row}" for row in range(12)]})
    y = pd.Series([["a"], ["a", "b"], []] * 4, name="mood")
    clf = headed(settings, adapter=None, target=None)
    grid: dict[str, Any] = {"param_grid": {"epochs": [1, 2]}, "error_score": "raise"}
    with pytest.raises(ValueError, match=r"^You appear to be using a legacy multi-label data representation\."):
        GridSearchCV(clf, cv=2, **grid).fit(X, y)
    found = GridSearchCV(clf, cv=KFold(2), **grid).fit(X, y).cv_results_["mean_test_score"]
    named = clone(clf).set_params(target="mood")
    assert (GridSearchCV(named, cv=2, **grid).fit(X.assign(mood=y)).cv_results_["mean_test_score"] == found).all()
    assert make_search(clf, grid["param_grid"], cv=2).fit(X, y).cv_results_["mean_test_score"].shape == (2,)


def test_sets_that_are_all_of_their_own_are_held_out_by_chance() -> None:
    y = pd.Series([{f"l{row}", "all"} for row in range(10)])
    kept, held = split_rows(10, 0.2, y, 7)
    assert sorted([*kept, *held]) == list(range(10))
