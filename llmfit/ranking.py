"""What a fitted search found, as a frame and as text: one row a candidate, the best first.

Takes a search of scikit-learn or Optuna that was fitted; gives a pandas frame or a str. Knows no estimator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import ParameterError, check_int

__all__ = ["leaderboard", "results"]

LONGEST = 32  # characters of a parameter's value in a leaderboard


def results(search: Any) -> pd.DataFrame:
    """Tell what a fitted search found.

    Parameters
    ----------
    search : GridSearchCV, RandomizedSearchCV, Halving...SearchCV or OptunaSearchCV
        A fitted one, of :func:`llmfit.search.make_search` or the library's own.

    Returns
    -------
    DataFrame of shape (n_candidates, ...)
        The best first: rank (1 is best), score and std (mean and standard deviation over the folds; of several
        measures a column ``name`` and ``name_std`` each), the parameters under their own names, fit_seconds (mean of
        the folds, near 0 where a record was read), and of a halving search iter and n_resources. A candidate that
        failed has nan, and the last rank.

    Raises
    ------
    ParameterError
        If it is no fitted search.

    Examples
    --------
    >>> from sklearn.linear_model import Ridge
    >>> from sklearn.model_selection import GridSearchCV
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], [0.0, 1.0, 2.0, 3.0]
    >>> found = results(GridSearchCV(Ridge(), {"alpha": [10.0, 0.1]}, cv=2).fit(X, y))
    >>> found[["rank", "alpha"]].values.tolist()
    [[1.0, 0.1], [2.0, 10.0]]
    """
    table = _table(search)
    measures = [key.removeprefix("mean_test_") for key in table if key.startswith("mean_test_")]
    main = search.refit if isinstance(getattr(search, "refit", None), str) else measures[0]
    columns: dict[str, Any] = {"rank": 0}
    for name in measures:
        columns[name] = np.asarray(table[f"mean_test_{name}"], dtype=float)
        columns["std" if name == "score" else f"{name}_std"] = np.asarray(table[f"std_test_{name}"], dtype=float)
    parameters = _parameters(table["params"])
    taken = {*columns, "fit_seconds", "iter", "n_resources"}
    columns |= {f"param_{name}" if name in taken else name: values for name, values in parameters.items()}
    columns["fit_seconds"] = np.asarray(table["mean_fit_time"], dtype=float)
    columns |= {name: table[name] for name in ("iter", "n_resources") if name in table}
    found = pd.DataFrame(columns)
    # The best of a halving search is among those that saw most rows, whatever others scored on few.
    order = [*(["iter"] if "iter" in table else []), main]
    found = found.sort_values(order, ascending=False, kind="stable", na_position="last", ignore_index=True)
    keys = list(found[order].itertuples(index=False))
    ranks: list[int] = []
    for place, key in enumerate(keys):
        ranks.append(ranks[-1] if place and key == keys[place - 1] else place + 1)
    return found.assign(rank=ranks)


def _table(search: Any) -> dict[str, Any]:
    """Take the results in scikit-learn's form; Optuna keeps each trial's in the trial."""
    if hasattr(search, "study_"):
        trials = search.study_.trials
        keys = ("mean_test_score", "std_test_score", "mean_fit_time")
        own = {key: [trial.user_attrs.get(key, np.nan) for trial in trials] for key in keys}
        return {"params": [trial.params for trial in trials], **own}
    found = getattr(search, "cv_results_", None)
    if found is None:
        raise ParameterError(f"results needs a search that is fitted. Got {type(search).__name__} instead.")
    return dict(found)


def _parameters(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a column of each parameter; what a candidate does not have is None."""
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate))
    columns = {}
    for name in names:
        values = [candidate.get(name) for candidate in candidates]
        plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        columns[name] = pd.Series(values, dtype=None if plain else object)
    return columns


def leaderboard(search: Any, n: int = 10) -> str:
    """Write the best candidates of a fitted search as a table of text.

    Parameters
    ----------
    search : as for :func:`results`
    n : int, default=10
        Candidates to list.

    Returns
    -------
    str
        A heading and a line for each of them.
    """
    check_int("n", "leaderboard", n, least=1)
    found = results(search)
    shown = found.head(n).drop(columns=["fit_seconds", "n_resources"], errors="ignore")
    for name in shown.columns:
        shown[name] = [_text(value) for value in shown[name].astype(object)]
    more = f", the best {n}" if len(found) > n else ""
    folds = f" on {search.n_splits_} folds" if hasattr(search, "n_splits_") else ""
    heading = f"{len(found)} candidate{'s' * (len(found) != 1)}{folds}{more}; a higher score is better"
    return f"{heading}\n{shown.to_string(index=False)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
