"""Numbers: by a head in the target's own units, or in words that are read as numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import NAME, put_in_place
from head_side import headed
from scipy.stats import spearmanr
from sklearn import metrics
from sklearn.base import is_regressor
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import (
    check_class_weight_classifiers,
    check_classifiers_train,
    check_regressors_train,
    parametrize_with_checks,
)
from torch_side import furthest, same

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.estimators.regressor import read_number
from llmfit.exceptions import DataError, DataWarning, ParameterError
from llmfit.metrics import regression_metrics

FAKE: dict[str, Any] = {"base_model": NAME, "adapter": "full", "verbose": 0}
PRICES = [12.5, 3.0, 40.25, 8.0, 19.0, 1.0, 27.5, 6.0]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


@pytest.fixture
def priced(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["text"]].assign(price=PRICES)


# scikit-learn's suite ----------------------------------------------------------------------------------------------


class ProudRegressor(LLMRegressor):
    """Without the tag that lowers the suite's threshold."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = False
        return tags


class ProudClassifier(LLMClassifier):
    """The same, and with several labels a row."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = False
        tags.classifier_tags.multi_label = True
        return tags


@pytest.mark.usefixtures("fake")
# scikit-learn's own look at infinite targets warns before it refuses them
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@parametrize_with_checks(
    [
        LLMRegressor(**FAKE),
        ProudRegressor(**FAKE),
        LLMRegressor(head="lm", **FAKE),
        LLMClassifier(head="linear", **FAKE),
        ProudClassifier(head="linear", **FAKE),
    ],
    xfail_strict=True,
)
def test_whole_suite_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.usefixtures("fake")
def test_accuracy_of_the_suite_is_reached() -> None:
    check_regressors_train("regressor", ProudRegressor(**FAKE))
    check_classifiers_train("classifier", ProudClassifier(head="linear", **FAKE))
    check_class_weight_classifiers("classifier", ProudClassifier(head="linear", **FAKE))


@pytest.mark.usefixtures("fake")
def test_a_regressor_is_one_and_scores_as_scikit_learn_does() -> None:
    X = pd.DataFrame({"a": np.arange(20.0)})
    y = pd.Series(np.arange(20.0) ** 2, name="y")
    model = LLMRegressor(**FAKE).fit(X, y)
    assert is_regressor(model)
    assert is_regressor(LLMEstimator(target={"y": "number"}))
    assert is_regressor(LLMEstimator(**FAKE).fit(X, y))
    assert not is_regressor(LLMGenerator())
    noisy = y + np.arange(20) % 3
    assert model.score(X, noisy) == pytest.approx(metrics.r2_score(noisy, model.predict(X)))
    weight = np.linspace(0, 1, 20)
    expected = metrics.r2_score(noisy, model.predict(X), sample_weight=weight)
    assert model.score(X, noisy, weight) == pytest.approx(expected)
    scores = cross_val_score(model, X, y, cv=3, scoring="neg_mean_absolute_error")
    assert np.isfinite(scores).all()


# By a head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}, "full"], ids=["none", "lora", "full"])
def test_numbers_are_learned_by_heart_in_their_own_units(adapter: Any, priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"adapter": adapter, "epochs": 80, "warmup": 0}
    given |= {"learning_rate": 0.3} if adapter is None else {}
    model = headed(given, LLMRegressor, head={"pooling": "mean"}, target="price").fit(priced)
    assert model.history_["loss"].iloc[0] == pytest.approx(1.0, abs=1e-5)  # the head begins as the mean
    assert model.score(priced) > 0.9
    assert model.target_mean_ == pytest.approx(np.mean(PRICES))
    assert model.target_scale_ == pytest.approx(np.std(PRICES))
    answers = model.predict(priced)
    assert answers.dtype == float
    assert answers.name == "price"
    assert answers.index.equals(priced.index)


def test_units_do_not_matter(priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"adapter": None, "epochs": 5, "target": "price"}
    euros = headed(given, LLMRegressor).fit(priced)
    cents = headed(given, LLMRegressor).fit(priced.assign(price=100 * priced["price"] + 7))
    assert furthest(euros, cents) < 1e-5
    np.testing.assert_allclose(cents.predict(priced), 100 * euros.predict(priced) + 7, rtol=1e-4)


def test_mean_and_scale_are_weighted_and_of_the_rows_learned_from(priced: pd.DataFrame, settings: Any) -> None:
    weight = np.array([1.0, 2, 0, 1, 1, 3, 1, 1])
    model = headed(settings, LLMRegressor, target="price", adapter=None)
    model.fit(priced, sample_weight=weight, eval_set=priced.assign(price=1e6))
    mean = np.average(PRICES, weights=weight)
    assert model.target_mean_ == pytest.approx(mean)
    assert model.target_scale_ == pytest.approx(np.sqrt(np.average((PRICES - mean) ** 2, weights=weight)))
    held = headed(settings | {"validation_fraction": 0.5}, LLMRegressor, target="price", adapter=None).fit(priced)
    assert held.target_mean_ != pytest.approx(np.mean(PRICES))


def test_a_head_that_goes_on_keeps_its_units(priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"warm_start": True, "epochs": 20, "target": "price", "adapter": None}
    model = headed(given, LLMRegressor).fit(priced)
    before = model.target_mean_, model.target_scale_
    model.fit(priced.assign(price=priced["price"] + 5))
    assert (model.target_mean_, model.target_scale_) == before


def test_a_constant_target_is_answered(priced: pd.DataFrame, settings: Any) -> None:
    model = headed(settings, LLMRegressor, target="price", adapter=None).fit(priced.assign(price=4.5))
    assert model.predict(priced).tolist() == pytest.approx([4.5] * 8)


@pytest.mark.parametrize("value", [0.1, -0.1, 1e9 + 0.1, 0.0])
def test_a_constant_whose_mean_is_rounded_has_no_spread(value: float, priced: pd.DataFrame, settings: Any) -> None:
    rows = priced.iloc[:3].assign(price=value)
    model = headed(settings, LLMRegressor, target="price", adapter=None).fit(rows)
    assert model.target_scale_ == 1.0
    near = headed(settings, LLMRegressor, target="price", adapter=None).fit(rows.assign(price=[1, 1, 1 + 1e-9]))
    assert 0 < near.target_scale_ < 1e-8


def test_booleans_in_words_are_numbers_whatever_holds_them(priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"target": "n", "features": "text", "head": "lm", "epochs": 2}
    truth = pd.Series([True, False] * 4, index=priced.index)
    fits = [LLMRegressor(**given).fit(priced, truth.astype(kind)) for kind in (int, bool, "boolean", object)]
    assert all(same(fits[0], other) for other in fits[1:])


KINDS: dict[str, Any] = {
    "int": pd.Series([1, 2, 3, 4] * 2),
    "Int64": pd.Series([1, 2, 3, 4] * 2, dtype="Int64"),
    "float32": pd.Series([0.5, 2, 3, 4] * 2, dtype="float32"),
    "object": pd.Series([1, 2.5, 3, 4] * 2, dtype=object),
    "bool": pd.Series([True, False] * 4),
    "list": [1.5, 2.0, 3.0, 4.0] * 2,
}


@pytest.mark.parametrize("y", KINDS.values(), ids=KINDS)
def test_every_kind_of_number_is_a_target(y: Any, priced: pd.DataFrame, settings: Any, tmp_path: Any) -> None:
    given = settings | {"target": "n", "features": "text"}
    model = headed(given, LLMRegressor, adapter=None).fit(priced, y)
    answers = model.predict(priced)
    assert answers.dtype == float
    assert np.isfinite(model.score(priced, y))
    model.save(tmp_path / "m")
    assert llmfit.load(tmp_path / "m").predict(priced).equals(answers)


@pytest.mark.parametrize(
    ("y", "sentence"),
    [
        (
            ["1", "two", *"345678"],
            "Row 1 (index 'r1'): the target 'n' must be a finite number. Got 'two' instead.",
        ),
        (
            [1.0, 2, float("inf"), 4, 5, 6, 7, 8],
            "Row 2 (index 'r2'): the target 'n' must be a finite number. Got inf instead (Input y contains infinity).",
        ),
    ],
)
def test_a_target_that_is_no_number_is_named(y: Any, sentence: str, priced: pd.DataFrame, settings: Any) -> None:
    model = headed(settings | {"target": "n", "features": "text"}, LLMRegressor, adapter=None)
    with pytest.raises(DataError) as error:
        model.fit(priced, y)
    assert str(error.value) == sentence


def test_what_has_no_meaning_is_refused(priced: pd.DataFrame, settings: Any) -> None:
    for params, sentence in (
        (
            {"generation": {"num_beams": 2}},
            "The 'generation' parameter has no meaning here: a linear head answers without words.",
        ),
        (
            {"target": {"price": "category"}},
            "LLMRegressor predicts numbers; its target is declared as 'category'.",
        ),
    ):
        with pytest.raises(ParameterError) as error:
            headed(settings, LLMRegressor, **{"target": "price", **params}).fit(priced)
        assert str(error.value) == sentence


def test_the_chooser_predicts_numbers(priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"adapter": None, "target": "price", "template": "{text} is a"}
    chosen = LLMEstimator(**given).fit(priced)
    assert isinstance(chosen.estimator_, LLMRegressor)
    assert chosen.head == "auto"
    own = LLMRegressor(**given).fit(priced)
    assert same(chosen.estimator_, own)
    assert chosen.score(priced) == own.score(priced)
    assert chosen.evaluate(priced) == own.evaluate(priced)
    assert not hasattr(chosen, "predict_proba")
    assert chosen.set_params(verbose=0).estimator_.head == "linear"


def test_a_search_over_a_regressor(priced: pd.DataFrame, settings: Any) -> None:
    model = headed(settings | {"adapter": None, "epochs": 4}, LLMRegressor, features="text", target=None)
    grid = {"head__pooling": ["last", "mean"], "learning_rate": [1e-3, 1e-2]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(priced, priced["price"])
    assert len(set(search.cv_results_["mean_test_score"])) == 4


# In words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3.0),
        (" -2.50\n", -2.5),
        ("+7.", 7.0),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("1,234,567.5", 1234567.5),
        *((text, None) for text in ("", ".", "-", "e5", "three", "3 stars", "1,23", "1_000", "nan", "inf", "1e999")),
    ],
)
def test_an_answer_is_read_as_a_number_or_as_none(text: str, number: float | None) -> None:
    assert read_number(text) == number if number is not None else np.isnan(read_number(text))


def count_gaps(_: Any, predicted: Any) -> int:
    return int(np.isnan(predicted).sum())


def test_answers_that_are_no_numbers_are_counted_once_and_measured_as_the_mean(
    priced: pd.DataFrame, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LLMRegressor(target="price", features="text", head="lm", **settings).fit(priced)
    texts = ["12.5", "many", "40.25", "", "19", "1", "27.5", "many"]
    monkeypatch.setattr(LLMGenerator, "_in_words", lambda *_: (texts, [()] * len(texts)))
    with pytest.warns(DataWarning) as warned:
        answers = model.predict(priced)
    assert [str(w.message) for w in warned] == ["3 of 8 answers for 'price' are no number, and missing: 'many', ''."]
    assert answers.isna().tolist() == [False, True, False, True, False, False, False, True]
    assert answers.dtype == float
    filled = answers.fillna(model.target_mean_)
    with pytest.warns(DataWarning):
        found = model.evaluate(priced, metrics=count_gaps)
    assert found["unanswered"] == found["count_gaps"] == 3
    assert found["r2"] == pytest.approx(metrics.r2_score(PRICES, filled))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(PRICES, filled))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(PRICES, filled))
    assert found["spearman"] == pytest.approx(spearmanr(PRICES, filled).statistic)
    with pytest.warns(DataWarning):
        assert model.score(priced) == pytest.approx(found["r2"])


def test_numbers_are_learned_by_heart_in_words(priced: pd.DataFrame, settings: Any) -> None:
    given = settings | {"adapter": "full", "epochs": 60, "warmup": 0, "head": "lm", "template": "{text} is a"}
    model = LLMRegressor(**given, target="price").fit(priced)
    assert model.predict(priced).tolist() == PRICES
    assert model.score(priced) == 1.0
    assert model.preview(priced, 3)["completion"].str.startswith(" ").all()
    assert [text.strip(" </s>") for text in model.preview(priced, 3)["completion"]] == ["12.5", "3", "40.25"]


def test_measures_of_numbers_where_they_are_not_defined() -> None:
    one = regression_metrics([1.0], [2.0], mean=0.0)
    assert np.isnan(one["r2"])
    assert np.isnan(one["spearman"])
    assert (one["mae"], one["rmse"], one["unanswered"]) == (1.0, 1.0, 0)
    assert regression_metrics([1.0, 2.0, 3.0], [30.0, 20.0, 10.0], mean=0.0)["spearman"] == pytest.approx(-1.0)
    assert np.isnan(regression_metrics([1.0, 2.0], [1.0, 1.0], mean=0.0)["spearman"])
    for true, pred, sentence in (
        ([], [], "evaluate needs at least one row. Got none."),
        ([1.0], [1.0, 2.0], "evaluate needs one answer per row. Got 2 answers for 1 rows."),
    ):
        with pytest.raises(DataError) as error:
            regression_metrics(true, pred, mean=0.0)
        assert str(error.value) == sentence


def test_a_regressor_answers_in_the_dtype_of_its_base(priced: pd.DataFrame, settings: Any) -> None:
    """A head is float32 on a base of fewer bytes, and float64 on one of more."""
    for dtype, expected in (("bfloat16", torch.float32), ("float64", torch.float64)):
        for adapter in (None, {"r": 2}):
            given = settings | {"dtype": dtype, "adapter": adapter, "target": "price"}
            model = headed(given, LLMRegressor).fit(priced)
            assert model._tensors["head/weight"].dtype == expected
            assert np.isfinite(model.predict(priced)).all()
