"""Searches over the parameters of an estimator, and what they found.

Takes an estimator and what to try for each parameter; gives a search with scikit-learn's interface, a frame of its
results and a leaderboard. Fits nothing by itself: a search is fitted as an estimator is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sklearn.base import clone
from sklearn.metrics import get_scorer_names
from sklearn.model_selection import ParameterGrid

from llmfit.exceptions import ParameterError, check_choice, check_int, check_keys, parameter_error, quoted, suggest
from llmfit.ranking import leaderboard, results
from llmfit.search.fused import FusedGridSearchCV, FusedHalvingGridSearchCV
from llmfit.search.searches import GridSearch, HalvingGridSearch, HalvingRandomSearch, RandomSearch
from llmfit.search.spaces import Space, first_values, is_list, read_space

__all__ = ["FusedGridSearchCV", "FusedHalvingGridSearchCV", "leaderboard", "make_search", "results"]

OWNER = "make_search"
CANDIDATES = 10  # that are drawn where n_iter is not given, as in scikit-learn
OWN = {
    "estimator",
    "param_grid",
    "param_distributions",
    "scoring",
    "cv",
    "n_iter",
    "n_trials",
    "n_candidates",
    "random_state",
    "checkpoint_dir",
}


def make_search(
    estimator: Any,
    space: Any,
    kind: str = "grid",
    *,
    scoring: Any = None,
    cv: Any = None,
    n_iter: int | None = None,
    random_state: Any = None,
    checkpoint_dir: Any = None,
    **settings: Any,
) -> Any:
    """Make a search over parameters of an estimator.

    Parameters
    ----------
    estimator : estimator
        An estimator of llmfit, a pipeline, or any other of scikit-learn.
    space : dict of str to values, or list of such dicts
        What to try for each parameter (``adapter__r`` names a key of ``adapter``): a list of values; a range
        ``{"low": 1e-5, "high": 1e-3, "log": True}`` or ``{"low": 4, "high": 64, "step": 4}``, whose bounds may both be
        drawn, as ints where they are ints; Ludwig's ``{"space": "loguniform", "lower": 1e-5, "upper": 1e-3}``; or a
        distribution of scipy.
    kind : {"grid", "fused", "fused_halving", "random", "halving", "optuna"}, default="grid"
        "grid" tries every combination of lists; "fused" does as well, candidates with LoRA side by side over one base
        model (:class:`FusedGridSearchCV`); "fused_halving" drops the worse two thirds of them behind the first epochs
        (:class:`FusedHalvingGridSearchCV`); "random" draws `n_iter` candidates; "halving" begins with all
        (or, with ranges, `n_iter`) of them on few rows and goes on with the better third on three times as many;
        "optuna" draws each candidate where the ones before did well (``pip install 'llmfit[optuna]'``).
    scoring : None, str, callable, list or dict, default=None
        A name such as "f1_macro" or "neg_log_loss", or more, as in scikit-learn; None is the estimator's `score`.
    cv : None, int, splitter or iterable, default=None
        Folds; None makes five. Those of a classifier have the classes in proportion.
    n_iter : int, default=None
        Candidates to draw; 10 where it is not given.
    random_state : int, RandomState or None, default=None
        Seeds what is drawn.
    checkpoint_dir : path or None, default=None
        Folder for the score of each candidate on each fold: the same search, fitted again after it was killed, takes
        from there what it knows. Needs an int `random_state` where anything is drawn. (The estimator's own
        `checkpoint_dir` keeps the state of the fit that was running.)
    **settings
        More parameters of scikit-learn's or Optuna's class: refit, return_train_score, error_score, n_jobs, ...

    Returns
    -------
    search
        ``GridSearchCV``, ``FusedGridSearchCV``, ``FusedHalvingGridSearchCV``, ``RandomizedSearchCV``,
        ``HalvingGridSearchCV``, ``HalvingRandomSearchCV`` or ``OptunaSearchCV``, or a subclass, which also takes
        ``fit(df)`` with the target inside the frame.

    Raises
    ------
    ParameterError
        If a parameter of the search or of the space is none, or cannot be used: before anything is fitted.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> from llmfit.search import make_search, results
    >>> model = LLMClassifier(target="score", epochs=1, random_state=0, verbose=0)
    >>> search = make_search(model, {"adapter__r": [2, 4]}, cv=2).fit(load_book_reviews()[:40])
    >>> results(search)["adapter__r"].sort_values().tolist()
    [2, 4]
    """
    check_choice("kind", OWNER, kind, list(KINDS))
    spaces = read_space(space)
    _check_names(estimator, spaces)
    _check_scoring(scoring, kind)
    if isinstance(scoring, set):  # which scikit-learn does not take
        scoring = sorted(scoring, key=str)
    if n_iter is not None:
        check_int("n_iter", OWNER, n_iter, least=1, other="None or ")
    chosen, own = KINDS[kind](spaces, n_iter, random_state)
    check_keys(f"{OWNER} with kind={kind!r}", settings, sorted(set(chosen._get_param_names()) - OWN))
    return chosen(estimator, scoring=scoring, cv=cv, checkpoint_dir=checkpoint_dir, **own, **settings)


def _check_names(estimator: Any, spaces: list[Space]) -> None:
    """Set every combination of whole parameters, and a value of each key, on a copy."""
    for space in spaces:
        parents = {name.rpartition("__")[0] for name in space}
        tried = {
            name: values if name in parents and is_list(values) else [first_values(values)]
            for name, values in space.items()
        }
        for candidate in ParameterGrid(tried):
            clone(estimator).set_params(**clone(candidate, safe=False))


def _check_scoring(scoring: Any, kind: str) -> None:
    if isinstance(scoring, list | tuple | dict | set) and kind in ("halving", "fused_halving", "optuna"):
        raise ParameterError(f"kind={kind!r} ranks by one score. Got {scoring!r} for 'scoring'.")
    names = scoring.values() if isinstance(scoring, dict) else scoring
    for name in [names] if isinstance(names, str) or not hasattr(names, "__iter__") else names:
        known = get_scorer_names()
        if isinstance(name, str) and name not in known:
            begun = [other for other in known if name and other.startswith(name)]  # acc, mean_sq
            raise ParameterError(
                f"The 'scoring' parameter of {OWNER} must be a name that scikit-learn has, such as 'accuracy', "
                f"'f1_macro', 'neg_log_loss' or 'r2'. Got {name!r} instead."
                + (f" Did you mean {begun[0]!r}?" if begun else suggest(name, known))
            )


Made = tuple[Any, dict[str, Any]]


def _one_or_more(spaces: list[Space]) -> Any:
    return spaces[0] if len(spaces) == 1 else spaces


def _ranges(spaces: list[Space]) -> list[str]:
    return [name for space in spaces for name, values in space.items() if not is_list(values)]


def _grid(kind: str, spaces: list[Space], n_iter: int | None, random_state: Any) -> Made:
    ranges = _ranges(spaces)
    if ranges:
        raise ParameterError(
            f"kind={kind!r} tries every value, which a range has no end of: {quoted(ranges)}. List values, or set "
            "kind='random'."
        )
    for name, value in (("n_iter", n_iter), ("random_state", random_state)):
        if value is not None:
            raise ParameterError(f"The {name!r} parameter has no meaning with kind={kind!r}: nothing is drawn.")
    return GRIDS[kind], {"param_grid": _one_or_more(spaces)}


def _random(spaces: list[Space], n_iter: int | None, random_state: Any) -> Made:
    drawn = {"n_iter": n_iter or CANDIDATES, "random_state": random_state}
    return RandomSearch, {"param_distributions": _one_or_more(spaces), **drawn}


def _halving(spaces: list[Space], n_iter: int | None, random_state: Any) -> Made:
    if _ranges(spaces):
        drawn = {"n_candidates": n_iter or CANDIDATES, "random_state": random_state}
        return HalvingRandomSearch, {"param_distributions": _one_or_more(spaces), **drawn}
    if n_iter is not None:
        raise ParameterError(
            "The 'n_iter' parameter has no meaning with kind='halving' over lists: every combination is tried."
        )
    return HalvingGridSearch, {"param_grid": _one_or_more(spaces), "random_state": random_state}


def _optuna(spaces: list[Space], n_iter: int | None, random_state: Any) -> Made:
    from llmfit.search.trials import distributions, optuna_class

    chosen = optuna_class()
    if len(spaces) > 1:
        raise parameter_error("space", f"{OWNER} with kind='optuna'", "one dict", f"a list of {len(spaces)}")
    drawn = {"n_trials": n_iter or CANDIDATES, "random_state": random_state}
    return chosen, {"param_distributions": distributions(spaces[0]), **drawn}


GRIDS = {"grid": GridSearch, "fused": FusedGridSearchCV, "fused_halving": FusedHalvingGridSearchCV}
# From spaces that were read, n_iter and random_state to the class of the search and its own parameters.
KINDS: dict[str, Callable[[list[Space], int | None, Any], Made]] = {
    "grid": partial(_grid, "grid"),
    "fused": partial(_grid, "fused"),
    "fused_halving": partial(_grid, "fused_halving"),
    "random": _random,
    "halving": _halving,
    "optuna": _optuna,
}
