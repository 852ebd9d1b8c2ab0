"""Optuna's search over the same spaces, where optuna and optuna-integration are installed.

Takes spaces that were read; gives the class ``OptunaSearch`` and Optuna's distributions. The packages are imported when
the class is first asked for.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any, ClassVar

from sklearn.utils import get_tags

from llmfit.exceptions import DataError, missing_package, parameter_error
from llmfit.search.records import EscapedError
from llmfit.search.searches import Search
from llmfit.search.spaces import Range, is_list

__all__ = ["distributions", "optuna_class"]


def distributions(space: Mapping[str, Any]) -> dict[str, Any]:
    """Write a search space as Optuna's distributions.

    Raises
    ------
    ParameterError
        If a distribution of scipy is among it, of which Optuna knows nothing.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, values in space.items():
        if is_list(values):
            with quiet():
                found[name] = CategoricalDistribution(values)
        elif not isinstance(values, Range):
            raise parameter_error(name, "the search space", "a list or a range with kind='optuna'", values)
        elif values.whole:
            found[name] = IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
        else:
            found[name] = FloatDistribution(values.low, values.high, values.log, values.step)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what Optuna warns of that is no concern here.

    Dicts and lists among the values are a trouble to a study in a database only, and the search is marked as
    experimental.
    """
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Choices for a categorical distribution", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def silent(verbose: int) -> Iterator[None]:
    """Keep Optuna from writing a line of each trial, unless the search is to be verbose."""
    from optuna import logging

    before = logging.get_verbosity()
    try:
        if not verbose:
            logging.set_verbosity(logging.ERROR)
        with warnings.catch_warnings():
            # Its integration uses a module that it has deprecated, and takes means of the scores of a failed trial.
            warnings.filterwarnings("ignore", ".*optuna.terminator", FutureWarning)
            warnings.filterwarnings("ignore", "Mean of empty slice|Degrees of freedom", RuntimeWarning)
            yield
    finally:
        logging.set_verbosity(before)


@cache
def optuna_class() -> Any:
    """Make the search over Optuna's trials.

    Raises
    ------
    ParameterError
        If Optuna or its integration is not installed.
    """
    for module, package in (("optuna", "optuna"), ("optuna_integration", "optuna-integration")):
        # optuna_integration puts a stand-in without a spec in its own place when it is imported
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            raise missing_package("kind='optuna'", package, "optuna")
    from optuna.trial import TrialState
    from optuna_integration.sklearn import OptunaSearchCV

    class OptunaSearch(Search, OptunaSearchCV):  # type: ignore[misc, unused-ignore]
        """``OptunaSearchCV`` with frames and records; see :func:`llmfit.search.make_search`."""

        __module__, __qualname__ = __name__, "OptunaSearch"
        _always: ClassVar[bool] = True  # it takes a ValueError for a bad trial, and says nothing
        _one_score: ClassVar[bool] = True

        def __init__(self, *args: Any, **settings: Any) -> None:
            with quiet():
                super().__init__(*args, **settings)

        def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
            try:
                with silent(self.verbose):
                    super().fit(X, y, **params)
            except EscapedError as escaped:
                raise escaped.__cause__ or escaped from None
            # Where no trial succeeds, Optuna's search fits the estimator as it is, and calls it the best.
            if not any(trial.state is TrialState.COMPLETE for trial in self.study_.trials):
                raise DataError("No candidate of the search could be fitted and scored: see the warnings for each.")
            return self

        fit.__doc__ = Search.fit.__doc__

        def __sklearn_tags__(self) -> Any:
            tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
            tags.estimator_type = inner.estimator_type
            tags.classifier_tags = deepcopy(inner.classifier_tags)
            tags.regressor_tags = deepcopy(inner.regressor_tags)
            return tags

    return OptunaSearch


def __getattr__(name: str) -> Any:
    if name == "OptunaSearch":  # where pickle looks for it
        return optuna_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
