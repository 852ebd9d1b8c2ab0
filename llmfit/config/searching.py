"""Searches from a configuration: the axes of ``hyperopt``, in Ludwig's words or llmfit's.

Takes a config and what its hyperopt says; gives a search over the config's estimator. What an axis means is not listed:
the config is read with each of the axis's values, and the parameter that differs is what is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmfit.config.keys import own_keys
from llmfit.config.ludwig import TABLES, TOP
from llmfit.config.ludwig.features import as_list
from llmfit.config.ludwig.rows import read_section
from llmfit.config.ludwig.search_rows import HYPEROPT, LOSS_OF, PARAMETER, SCORINGS, SEARCHES
from llmfit.config.reading import with_path
from llmfit.exceptions import ParameterError, check_choice, quoted, suggest

__all__ = ["describe_search", "search_of"]

Make = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
# What llmfit's own hyperopt may say.
OWN = ("kind", "scoring", "cv", "n_iter", "random_state", "checkpoint_dir", "settings")
NAMES = ("pretrained_model_name_or_path", "base_model")
ENDS = (("lower", "upper"), ("low", "high"))


def search_of(config: Mapping[str, Any], given: Any, overrides: Mapping[str, Any], make: Make) -> Any:
    """Make a search over the estimator of a config.

    Parameters
    ----------
    config : mapping
        Without hyperopt.
    given : any
        What hyperopt says: Ludwig's or llmfit's keys; any other key of it is an axis.
    overrides : mapping
        Parameters of the estimator. One that is searched is not searched any more.
    make : callable (config, overrides) -> estimator

    Raises
    ------
    ParameterError
    """
    from llmfit.search import make_search

    if not isinstance(given, Mapping):
        raise ParameterError(f"The config's 'hyperopt' must be a mapping. Got {given!r} instead.")
    axes = {key: value for key, value in given.items() if key not in HYPEROPT and key not in OWN}
    said = read_section(HYPEROPT, {key: given[key] for key in given if key not in axes}, "hyperopt", more=OWN)
    axes = {**_axes(said.pop("parameters", None), "hyperopt.parameters"), **_axes(axes, "hyperopt")}
    if not axes:
        raise ParameterError(
            "The config's 'hyperopt' needs at least one axis, such as parameters: {adapter.r: [4, 16]}."
        )
    places = {name: _paths(name, config, where) for name, (where, _) in axes.items()}
    start = _started(config, axes, places, list(axes))
    space: dict[str, Any] = {}
    for name, (where, values) in axes.items():
        found = [make(_set(start, places[name], value), {}) for value in _probes(values)]
        if len(found) == 1:
            others = [other for other in axes if other != name]
            parameter, candidates = _fixed(found[0], make(_started(config, axes, places, others), {}))
            if parameter is None:
                continue
        else:
            parameter, candidates = _parameter(found, values, where)
        if parameter in space:
            raise ParameterError(
                f"The config's {where!r} is the parameter {parameter!r}, which another axis is already."
            )
        space[parameter] = candidates
    space = {name: values for name, values in space.items() if name not in overrides}
    estimator = make(start, overrides)  # each axis at its first value
    estimator.set_params(**{name: _probes(values)[0] for name, values in space.items()})  # overrides may lack the key
    return make_search(estimator, space, **_settings(said, estimator, space))


def _started(
    config: Mapping[str, Any], axes: Mapping[str, Any], places: Mapping[str, list[str]], names: list[str]
) -> dict[str, Any]:
    """Set axes to their first values."""
    start = dict(config)
    for name in names:
        start = _set(start, places[name], _probes(axes[name][1])[0])
    return start


def _axes(given: Any, place: str) -> dict[str, tuple[str, Any]]:
    """Read axes: where each stands, and its list of values or its range."""
    return {name: (f"{place}.{name}", _values(value, f"{place}.{name}")) for name, value in (given or {}).items()}


def _values(given: Any, where: str) -> Any:
    """Read an axis: a list, or a mapping of Ludwig's or llmfit's that is a list or a range."""
    if isinstance(given, list | tuple):
        if not given:
            raise ParameterError(f"The config's {where!r} needs at least one value.")
        return list(given)
    if not isinstance(given, Mapping):
        raise ParameterError(f"The config's {where!r} must be a list of values or a range. Got {given!r} instead.")
    said = read_section(PARAMETER, given, where, more=("low", "high", "log"))
    listed = said.get("categories", said.get("values"))
    if listed is not None:
        check_choice("space", f"the config's {where!r}", said.get("space", "choice"), ["choice", "grid_search"])
        return _values(listed, where)
    check_choice("space", f"the config's {where!r}", said.get("space", "uniform"), ["uniform", "loguniform", "randint"])
    if not any(low in said and high in said for low, high in ENDS):
        raise ParameterError(f"The config's {where!r} needs a lower and an upper end. Got {dict(given)!r} instead.")
    return {"space": "uniform", **said} if "lower" in said else said


def _probes(values: Any) -> list[Any]:
    """Values of an axis to read the config with: all of a list, the ends of a range."""
    if isinstance(values, list):
        return values
    low, high = next(ends for ends in ENDS if ends[0] in values)
    return [values[low], values[high]]


def _paths(name: str, config: Mapping[str, Any], where: str) -> list[str]:
    """Find the places in a config that an axis stands for: Ludwig's paths, names of features, llmfit's parameters."""
    head, _, rest = name.replace("__", ".").partition(".")
    columns = {}
    for section in ("input_features", "output_features"):
        for place, feature in as_list(config.get(section), section):
            columns[str(feature.get("name"))] = place.replace("[", ".").replace("]", "")
    inputs = [place for place in columns.values() if place.startswith("input")]
    outputs = [place for place in columns.values() if place.startswith("output")]
    if head in columns and rest:
        return [f"{columns[head]}.{rest}"]
    if head == "encoder" and inputs:
        return [f"{place}.{name}" for place in inputs]
    if name == "dropout" and outputs:
        return [f"{place}.trainer.dropout" for place in outputs]
    if head in TOP or head in own_keys():
        return [f"{head}.{rest}" if rest else head]
    known = [*TOP, *own_keys(), *(["encoder", "dropout"] if columns else [])]
    hint = suggest(name, [*known, *(key for key in HYPEROPT), *OWN])
    raise ParameterError(f"The config has no key {where!r}.{hint}")


def _set(config: Mapping[str, Any], paths: list[str], value: Any) -> dict[str, Any]:
    changed = dict(config)
    for path in paths:
        changed = with_path(changed, path, _encoder(changed, path, value) if path.endswith(".encoder") else value)
    return changed


def _encoder(config: Mapping[str, Any], path: str, value: Any) -> Any:
    """Put a name in the place of an encoder's own, and leave what else is said of it."""
    found: Any = config
    for part in path.split("."):
        found = (found[int(part)] if isinstance(found, list) else found.get(part)) if found is not None else None
    if not (isinstance(found, Mapping) and isinstance(value, str)):
        return value
    return {**{key: item for key, item in found.items() if key not in NAMES}, "type": value}


def _flat(estimator: Any) -> dict[str, Any]:
    """Parameters of an estimator, those that are dicts by their keys."""
    params = estimator.get_params(deep=True)
    nested = {name.partition("__")[0] for name in params if "__" in name}
    return {name: value for name, value in params.items() if name not in nested}


def _parameter(found: list[Any], values: Any, where: str) -> tuple[str, Any]:
    """Name the parameter in which estimators differ, and its candidates.

    Keys of one parameter that differ together, or are there in some only, are that parameter as a whole.
    """
    flat = [_flat(estimator) for estimator in found]
    names = list(dict.fromkeys(name for one in flat for name in one))
    absent = object()
    differ = [n for n in names if any(one.get(n, absent) != flat[0].get(n, absent) for one in flat)]
    if len(differ) == 1 and all(differ[0] in one for one in flat):
        name = differ[0]
        return name, _candidates([one[name] for one in flat], values, where)
    heads = list(dict.fromkeys(name.partition("__")[0] for name in differ))
    if len(heads) == 1 and isinstance(values, list):
        return heads[0], [estimator.get_params(deep=False)[heads[0]] for estimator in found]
    if not heads:
        raise ParameterError(f"The config's {where!r} makes no difference between its values {_probes(values)!r}.")
    raise ParameterError(
        f"The config's {where!r} changes {quoted(heads)} at once: search over one of them by its name."
    )


def _fixed(estimator: Any, plain: Any) -> tuple[str | None, Any]:
    """Name the parameter in which one value differs from the config without it; None leaves it out of the search."""
    now, before = _flat(estimator), _flat(plain)
    differ = [name for name in now if name not in before or now[name] != before[name]]
    return (differ[0], [now[differ[0]]]) if len(differ) == 1 else (None, None)


def _candidates(read: list[Any], values: Any, where: str) -> Any:
    """Give the values as the estimator has them; a range must be the parameter's own."""
    if isinstance(values, list):
        return read
    if read != _probes(values):
        raise ParameterError(
            f"The config's {where!r} is no range of a parameter: its ends become {read!r}. List values."
        )
    return values


def _settings(said: Mapping[str, Any], estimator: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Say how the search goes: its kind, its draws, what is measured."""
    spec = said.get("search_alg")
    algorithm = read_section(
        TABLES["hyperopt.search_alg"], {"type": spec} if isinstance(spec, str) else spec, "hyperopt.search_alg"
    )
    executor = read_section(TABLES["hyperopt.executor"], said.get("executor"), "hyperopt.executor")
    kind, draws = said.get("kind"), said.get("n_iter", executor.get("num_samples"))
    if kind is None:
        kind = _kind(algorithm.get("type"), executor.get("type"), space, draws)
    settings: dict[str, Any] = {"kind": kind, **(said.get("settings") or {})}
    if draws is not None and kind != "grid":
        settings["n_iter"] = draws
    seeds = [said.get("random_state"), *(algorithm.get(key) for key in ("random_state", "seed", "random_state_seed"))]
    if kind != "grid" and any(seed is not None for seed in seeds):
        settings["random_state"] = next(seed for seed in seeds if seed is not None)
    settings |= {name: said[name] for name in ("cv", "checkpoint_dir") if said.get(name) is not None}
    scoring = said["scoring"] if "scoring" in said else _scoring(said, estimator)
    return settings if scoring is None else {**settings, "scoring": scoring}


def _kind(algorithm: Any, executor: Any, space: Mapping[str, Any], draws: Any) -> str:
    if algorithm is not None and algorithm not in SEARCHES:
        raise ParameterError(
            f"The config's 'hyperopt.search_alg.type' must be one of {quoted(SEARCHES)}. Got {algorithm!r} instead."
        )
    if executor not in (None, "ray", "optuna"):
        raise ParameterError(
            f"The config's 'hyperopt.executor.type' must be 'ray' or 'optuna'. Got {executor!r} instead."
        )
    if executor == "optuna" or SEARCHES.get(algorithm or "random"):
        return "optuna"
    return "grid" if draws is None and all(isinstance(values, list) for values in space.values()) else "random"


def _scoring(said: Mapping[str, Any], estimator: Any) -> str | None:
    """Name scikit-learn's scorer of Ludwig's metric; None is the estimator's own score."""
    metric, goal, target = said.get("metric"), said.get("goal"), said.get("output_feature")
    names = estimator.target if isinstance(estimator.target, dict | list) else [estimator.target]
    if target not in (None, "combined", *names):
        raise ParameterError(f"The config's 'hyperopt.output_feature' must be the target. Got {target!r} instead.")
    if metric is None:
        if goal is not None:
            raise ParameterError(f"The config's 'hyperopt.goal' needs a 'metric' beside it. Got goal={goal!r} alone.")
        return None
    if metric == "loss":
        scorer, direction = LOSS_OF.get(type(estimator).__name__), "minimize"
    else:
        scorer, direction = SCORINGS.get(metric, (None, ""))
    if scorer is None:
        known = [*SCORINGS, *(["loss"] if type(estimator).__name__ in LOSS_OF else [])]
        raise ParameterError(
            f"The config's 'hyperopt.metric' must be one of {quoted(known, most=99)}, or 'scoring' a name of "
            f"scikit-learn's. Got {metric!r} instead."
        )
    if goal is not None and goal != direction:
        raise ParameterError(
            f"The config's 'hyperopt.goal' must be {direction!r} with metric={metric!r}. Got {goal!r}."
        )
    return scorer


def describe_search(search: Any) -> dict[str, Any]:
    """Write a search over lists of values as a configuration."""
    from sklearn.model_selection import GridSearchCV, RandomizedSearchCV

    from llmfit.estimators.describing import to_config
    from llmfit.persistence import to_json

    kinds = [(GridSearchCV, "grid", "param_grid"), (RandomizedSearchCV, "random", "param_distributions")]
    kind, attribute = next(((kind, name) for known, kind, name in kinds if isinstance(search, known)), (None, ""))
    space = getattr(search, attribute, None)
    if kind is None or not (isinstance(space, Mapping) and all(isinstance(v, list) for v in space.values())):
        raise ParameterError(
            "to_config writes estimators, and GridSearchCV and RandomizedSearchCV over lists of values. "
            f"Got {search!r} instead."
        )
    settings = {"scoring": search.scoring, "cv": search.cv}
    if kind == "random":
        settings |= {"n_iter": search.n_iter, "random_state": search.random_state}
    axes = {name.replace("__", "."): values for name, values in space.items()}
    hyperopt = {"kind": kind, "parameters": axes, **{k: v for k, v in settings.items() if v is not None}}
    return {**to_config(search.estimator), "hyperopt": to_json(hyperopt)}
