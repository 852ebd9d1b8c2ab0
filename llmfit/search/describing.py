"""A search as a configuration: the estimator's own, and ``hyperopt``, which says how and over what it is searched.

Takes a search of any kind; gives a dict that YAML and JSON can hold. :func:`llmfit.from_config` makes the search of it
again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from llmfit.exceptions import DataError, ParameterError, quoted

__all__ = ["KEYS", "to_config"]

ESTIMATORS = ("LLMClassifier", "LLMRegressor", "LLMGenerator", "LLMEstimator")

# What llmfit's own hyperopt may say beside its axes.
KEYS = ("kind", "scoring", "cv", "n_iter", "random_state", "checkpoint_dir", "settings")


def to_config(search: Any) -> dict[str, Any]:
    """Write a search as a configuration: whatever :func:`llmfit.from_config` makes, and scikit-learn's own of its like.

    Raises
    ------
    ParameterError
        If it is no search, or something in it has no plain form.
    """
    from llmfit.estimators.describing import plain_values
    from llmfit.estimators.describing import to_config as describe
    from llmfit.persistence import to_json

    kind, names = next(((kind, names) for base, kind, names in _bases(search) if isinstance(search, base)), ("", {}))
    space = getattr(search, names.get("space", ""), None)
    if not isinstance(space, Mapping):
        raise ParameterError(
            "to_config writes estimators, and searches of scikit-learn and Optuna over one dict of parameters. "
            f"Got {search!r} instead."
        )
    _check(search, space, drawn=names.get("n_iter") == "n_candidates")
    hyperopt = {
        "kind": kind,
        "parameters": {name.replace("__", "."): _axis(name, values) for name, values in space.items()},
        **_written(search, {own: key for key, own in names.items()}),
    }
    found: dict[str, Any] = {}
    for key, value in hyperopt.items():
        try:
            found[key] = to_json(plain_values(value))
        except DataError:
            raise ParameterError(
                f"The search's {key!r} has no plain form that a config could hold. Got {value!r}. Set it after "
                "from_config."
            ) from None
    return {**describe(search.estimator), "hyperopt": found}


def _check(search: Any, space: Mapping[str, Any], *, drawn: bool) -> None:
    """Refuse what no config says: other estimators, and halving that draws otherwise."""
    if type(search.estimator).__name__ not in ESTIMATORS:
        raise ParameterError(
            f"to_config writes searches over {quoted(ESTIMATORS)}. Got one over {search.estimator!r} instead."
        )
    if drawn and (search.n_candidates == "exhaust" or all(isinstance(values, list) for values in space.values())):
        raise ParameterError(
            "A config that halves draws a number of candidates, from one range at least. Got "
            f"n_candidates={search.n_candidates!r} and {dict(space)!r} instead."
        )


def _bases(search: Any) -> Iterator[tuple[type[Any], str, dict[str, str]]]:
    """List the classes of searches, the kind of each, and its names for what has another name here."""
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
    from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, HalvingRandomSearchCV, RandomizedSearchCV

    from llmfit.search import FusedGridSearchCV, FusedHalvingGridSearchCV

    drawn = {"space": "param_distributions"}
    yield FusedGridSearchCV, "fused", {"space": "param_grid"}
    yield FusedHalvingGridSearchCV, "fused_halving", {"space": "param_grid"}
    yield GridSearchCV, "grid", {"space": "param_grid"}
    yield RandomizedSearchCV, "random", {**drawn, "n_iter": "n_iter"}
    yield HalvingGridSearchCV, "halving", {"space": "param_grid"}
    yield HalvingRandomSearchCV, "halving", {**drawn, "n_iter": "n_candidates"}
    if type(search).__name__ == "OptunaSearch":  # its class is made when it is first asked for
        yield type(search), "optuna", {**drawn, "n_iter": "n_trials"}


def _written(search: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """Write the parameters of a search under their keys of hyperopt; those of its class alone where they are set."""
    space = next(getattr(search, name) for name, key in keys.items() if key == "space")
    usual = type(search)(search.estimator, space).get_params(deep=False)
    written: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in search.get_params(deep=False).items():
        key = keys.get(name, name)
        if key in KEYS and value is not None:
            written[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
        elif key not in (*KEYS, "space", "estimator") and not _same(value, usual.get(name)):
            settings[key] = value
    return {**written, **({"settings": settings} if settings else {})}


def _same(value: Any, usual: Any) -> bool:
    """Tell a default: of the same type, so that True is not 1; one NaN is another."""
    return type(value) is type(usual) and (value == usual or (value != value and usual != usual))


def _axis(name: str, values: Any) -> Any:
    """Write what is searched for a parameter: a list, or a range of llmfit's or Optuna's."""
    if isinstance(values, list | tuple):
        return list(values)
    if hasattr(values, "choices"):  # Optuna's
        return list(values.choices)
    if not (hasattr(values, "low") and hasattr(values, "high")):
        raise ParameterError(
            f"The search's values of {name!r} have no plain form that a config could hold: they must be a list or a "
            f"range. Got {values!r} instead."
        )
    more = {"step": values.step, "log": values.log}
    if values.step == 1 and type(values).__name__ == "IntDistribution":
        del more["step"]
    return {"low": values.low, "high": values.high, **{key: value for key, value in more.items() if value}}
