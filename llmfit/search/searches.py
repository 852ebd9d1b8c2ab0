"""The searches of scikit-learn and Optuna, with rows as frames and with records.

Takes what the library's own class takes, and `checkpoint_dir`; gives that class's attributes. `fit(df)` finds the
target in the frame and hands it on as `y`, so that folds are stratified and scorers by name measure.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    HalvingRandomSearchCV,
    RandomizedSearchCV,
    check_cv,
)
from sklearn.utils.multiclass import type_of_target

from llmfit.exceptions import DataError, ParameterError
from llmfit.search.digests import digest_of
from llmfit.search.records import Recorded, RecordedScorer, Records

__all__ = ["GridSearch", "HalvingGridSearch", "HalvingRandomSearch", "RandomSearch", "Search"]

FOLDS = 5  # scikit-learn's, where cv is None


class Search:
    """Mixin before a search of another library: frames with the target inside, and records.

    Parameters
    ----------
    checkpoint_dir : path or None, default=None
        Folder where the scores of each candidate on each fold are kept; a search that was killed and is fitted again
        takes them from there.
    *args, **settings
        The library's own.
    """

    _always: ClassVar[bool] = False  # the stand-ins are needed even where nothing is recorded
    _one_score: ClassVar[bool] = False  # the library ranks by one, and would fail behind the first round
    estimator: Any
    scoring: Any
    cv: Any
    error_score: Any
    refit: Any
    best_estimator_: Any
    scorer_: Any

    def __init__(self, *args: Any, checkpoint_dir: Any = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.checkpoint_dir = checkpoint_dir

    @classmethod
    def _library(cls) -> Any:
        """Name the class that this one is mixed into: its ``__init__`` lists the parameters."""
        return next(base for base in cls.__mro__ if not issubclass(base, Search))

    @classmethod
    def _get_param_names(cls) -> list[str]:
        return sorted([*cls._library()._get_param_names(), "checkpoint_dir"])

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try the candidates, and fit the best one on all rows.

        Parameters
        ----------
        X : as for the estimator's `fit`
            ``n_rows`` rows, with the target column inside, or beside `y`.
        y : array-like of shape (n_rows,), default=None
            The target. None takes the column that the estimator's `target` names.
        **params
            As for the library's own `fit`.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If records are asked for that no later search could find, or several scores of a search that ranks by one.
        DataError
            If the target is missing, or no candidate has a score.
        """
        if self._one_score and isinstance(self.scoring, list | tuple | dict | set):
            raise ParameterError(f"{type(self).__name__} ranks by one score. Got {self.scoring!r} for 'scoring'.")
        y, classes = read_rows(self.estimator, X, y)
        self._check_measurable(y)
        with self._standing_in(X, y, classes):
            check_folds(self.cv, y, classes)
            super().fit(X, y, **params)  # type: ignore[misc]
        self._check_scored()
        return self

    def _check_measurable(self, y: Any) -> None:
        """Raise, before anything is fitted, where scorers by name would find nothing to compare answers with."""
        from llmfit.estimators.base import BaseLLM

        given = list(self.scoring.values()) if isinstance(self.scoring, dict) else self.scoring
        names = [
            name for name in (given if isinstance(given, list | tuple | set) else [given]) if isinstance(name, str)
        ]
        if names and isinstance(self.estimator, BaseLLM) and (y is None or not folds_by(y)):
            raise ParameterError(
                f"The 'scoring' parameter of {type(self).__name__} cannot be {names[0]!r} here: scikit-learn's scorers "
                "read one column of labels or numbers, not lists in cells or several targets. Leave it out, and the "
                "estimator's own score is taken, or pass a callable (estimator, X, y=None)."
            )

    def _check_scored(self) -> None:
        """Raise where no candidate has a score: the first one would be called the best."""
        found = vars(self).get("cv_results_", {})
        ranked = [f"mean_test_{self.refit}"] if isinstance(self.refit, str) else list(found)
        measured = [found[name] for name in ranked if name in found and name.startswith("mean_test_")]
        if measured and not np.isfinite(np.concatenate(measured)).any():
            raise DataError(
                f"No candidate of the search has a score: scoring={self.scoring!r} gives none for what is predicted "
                "here, on any fold. The warnings say why."
            )

    def score(self, X: Any, y: Any = None, **params: Any) -> float:
        """Measure the best estimator by the search's own score.

        Parameters
        ----------
        X, y, **params
            As for `fit`, and the library's own `score`.

        Returns
        -------
        float
        """
        if y is None and "best_estimator_" in vars(self):
            y, _ = read_rows(self.best_estimator_, X, y)
        return float(super().score(X, y, **params))  # type: ignore[misc]

    def to_config(self) -> dict[str, Any]:
        """Write the search, with the estimator that it is over, as plain values.

        Returns
        -------
        dict of str to any
            What YAML and JSON can hold, and :func:`llmfit.from_config` reads back: the estimator's keys and "hyperopt".

        Raises
        ------
        ParameterError
            If something has no plain form, such as a scorer that is a function.

        Examples
        --------
        >>> from llmfit import LLMClassifier
        >>> from llmfit.search import make_search
        >>> make_search(LLMClassifier(target="score"), {"adapter__r": [4, 8]}, cv=3).to_config()["hyperopt"]
        {'kind': 'grid', 'parameters': {'adapter.r': [4, 8]}, 'cv': 3}
        """
        from llmfit.search.describing import to_config

        return to_config(self)

    @contextmanager
    def _standing_in(self, X: Any, y: Any, classes: bool) -> Iterator[None]:
        """While the library's fit runs, put the stand-ins in the places of estimator and scorer."""
        given = {name: getattr(self, name) for name in ("estimator", "scoring", "cv")}
        try:
            if y is not None and not folds_by(y):
                self.cv = check_cv(self.cv)  # by their number alone
            elif classes and not is_classifier(self.estimator):
                self.cv = check_cv(self.cv, y, classifier=True)
            if self._always or self.checkpoint_dir is not None:
                self._stand_in(X)
            yield
        finally:
            self._put_back()
            for name, value in given.items():
                setattr(self, name, value)

    def _stand_in(self, X: Any) -> None:
        if self.checkpoint_dir is not None:
            self._check_repeats()
        scorer = RecordedScorer(self.estimator, self.scoring, self.error_score)
        records = Records(self.checkpoint_dir, self.scoring)
        whole = digest_of(X) if self.checkpoint_dir is not None else ""  # asked for where a record is found
        self.estimator = Recorded(self.estimator, records, whole, **self._stand_in_settings())
        self.scoring = scorer

    def _stand_in_settings(self) -> dict[str, Any]:
        """Say what else the stand-in of the estimator does."""
        return {"failing": "" if not self._always else "raise" if self.error_score == "raise" else "warn"}

    def _put_back(self) -> None:
        """Leave the library's own in the places of the stand-ins, also where the fit on all rows has failed."""
        found = vars(self)
        if isinstance(found.get("best_estimator_"), Recorded):
            self.best_estimator_ = self.best_estimator_.estimator
        if isinstance(found.get("scorer_"), RecordedScorer):
            self.scorer_ = self.scorer_.several or self.scorer_.scorer

    def _check_repeats(self) -> None:
        """Refuse what draws other candidates or folds each time: no record would ever be found again."""
        parts: list[tuple[str, Any]] = [(type(self).__name__, self), ("cv", self.cv)]
        if isinstance(self, HalvingGridSearchCV) and self.resource != "n_samples":
            del parts[0]  # which draws no more than the rows of a round
        for owner, part in parts:
            draws = hasattr(part, "random_state") and getattr(part, "shuffle", True)
            if draws and not isinstance(part.random_state, numbers.Integral):
                raise ParameterError(
                    f"checkpoint_dir needs an int 'random_state' of {owner}: without one, other "
                    f"{'folds' if owner == 'cv' else 'candidates'} are drawn each time."
                )


def read_rows(estimator: Any, X: Any, y: Any) -> tuple[Any, bool]:
    """Find the target as a search needs it, and whether it is classes.

    Returns
    -------
    y : Series, DataFrame or None
        None where scikit-learn cannot fold by it: lists as cells, several targets.
    classes : bool
    """
    from llmfit.estimators.base import BaseLLM
    from llmfit.estimators.reading import read_fit

    if not isinstance(estimator, BaseLLM):
        return y, is_classifier(estimator) and (y is None or folds_by(y))
    trial: Any = clone(estimator)
    chosen = trial._choose(X, y) if hasattr(trial, "_choose") else trial
    if y is None:
        y = read_fit(trial if chosen is None else chosen, X, None, estimator._default_target)[1]
        y = y if chosen is not None and folds_by(y) else None
    return y, y is not None and chosen is not None and is_classifier(chosen) and folds_by(y)


def check_folds(cv: Any, y: Any, classes: bool) -> None:
    """Raise where there are more folds than rows to put in them, of every class or at all."""
    if y is None or not folds_by(y) or not isinstance(cv, numbers.Integral | None):
        return  # scikit-learn counts the rows of X, and goes by what makes folds
    folds = FOLDS if cv is None else int(cv)
    if classes and type_of_target(y) in ("binary", "multiclass"):
        most, of = int(np.unique(np.asarray(y).astype(str), return_counts=True)[1].max()), " of a class"
        has = f"the most frequent class has {most}"
    else:
        most, of, has = len(y), "", f"there are {len(y)}"
    if most < folds:
        raise DataError(f"cv={folds} needs {folds} rows{of} at least, one for each fold: {has}. Set a smaller cv.")


def folds_by(y: Any) -> bool:
    """Tell a column that scikit-learn can look at to make folds."""
    try:
        return bool(type_of_target(y))
    except ValueError:
        return False


class GridSearch(Search, GridSearchCV):
    """``GridSearchCV`` with frames and records; see :func:`make_search`."""


class RandomSearch(Search, RandomizedSearchCV):
    """``RandomizedSearchCV`` with frames and records; see :func:`make_search`."""


class HalvingGridSearch(Search, HalvingGridSearchCV):
    """``HalvingGridSearchCV`` with frames and records; see :func:`make_search`."""

    _one_score: ClassVar[bool] = True


class HalvingRandomSearch(Search, HalvingRandomSearchCV):
    """``HalvingRandomSearchCV`` with frames and records; see :func:`make_search`."""

    _one_score: ClassVar[bool] = True
