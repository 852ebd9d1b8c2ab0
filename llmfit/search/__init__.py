"""Searches over parameters by name: a grid, or so many random draws, as scikit-learn runs them.

Takes an estimator and a space of lists and ranges; gives a search that is not fitted yet. Knows no single parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmfit.exceptions import ParameterError, check_choice, check_keys, parameter_error

__all__ = ["KINDS", "make_search"]


def make_search(
    estimator: Any,
    space: Mapping[str, Any],
    kind: str = "grid",
    *,
    scoring: Any = None,
    cv: Any = None,
    n_iter: int = 10,
    random_state: Any = None,
    **settings: Any,
) -> Any:
    """Make a search over an estimator's parameters.

    Parameters
    ----------
    estimator : LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
    space : dict of str to list or range
        Parameters by their names, ``adapter__r`` for keys of nested ones. A range is {"low", "high", "log"},
        {"space": "uniform", "loguniform" or "randint", "lower", "upper"} or {"space": "choice", "categories"}.
    kind : {"grid", "random"}, default="grid"
    scoring, cv
        As in scikit-learn's searches.
    n_iter : int, default=10
        Draws of a random search.
    random_state : int or None, default=None
    **settings
        Whatever else the search takes.

    Returns
    -------
    GridSearchCV or RandomizedSearchCV

    Raises
    ------
    ParameterError
        If the kind is unknown, or a range cannot be read, or stands in a grid.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> make_search(LLMClassifier(), {"adapter__r": [4, 16]}, cv=3).param_grid
    {'adapter__r': [4, 16]}
    """
    check_choice("kind", "the search", kind, list(KINDS))
    candidates = {name: _candidates(name, values) for name, values in space.items()}
    drawn = {"n_iter": n_iter, "random_state": random_state} if kind == "random" else {}
    return KINDS[kind](estimator, candidates, scoring=scoring, cv=cv, **drawn, **settings)


def _candidates(name: str, values: Any) -> Any:
    """Read a list or a range; a range becomes a distribution of SciPy."""
    from scipy import stats

    if isinstance(values, list | tuple):
        return list(values)
    if not isinstance(values, Mapping):
        raise parameter_error(name, "the search", "a list or a range", values)
    if values.get("space") == "choice":
        return list(values["categories"])
    check_keys(f"The range of {name!r}", values, ["space", "low", "high", "lower", "upper", "log"])
    low, high = values.get("low", values.get("lower")), values.get("high", values.get("upper"))
    if values.get("log") or values.get("space") == "loguniform":
        return stats.loguniform(low, high)
    if values.get("space") == "randint" or (isinstance(low, int) and isinstance(high, int) and "space" not in values):
        return stats.randint(low, high + 1)
    return stats.uniform(low, high - low)


def _grid(estimator: Any, space: Any, **settings: Any) -> Any:
    from sklearn.model_selection import GridSearchCV

    for name, values in space.items():
        if not isinstance(values, list):
            raise ParameterError(f"A grid needs a list of values of {name!r}, not a range. Choose kind='random'.")
    return GridSearchCV(estimator, space, **settings)


def _random(estimator: Any, space: Any, **settings: Any) -> Any:
    from sklearn.model_selection import RandomizedSearchCV

    return RandomizedSearchCV(estimator, space, **settings)


KINDS: dict[str, Callable[..., Any]] = {"grid": _grid, "random": _random}
