"""Searches from a configuration: the axes of ``hyperopt``, in Ludwig's words or llmfit's.

Takes a config and what its hyperopt says; gives a search over the config's estimator. What an axis means is not listed:
the config is read with each of the axis's values, and the parameter that differs is what is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sklearn.base import clone

from llmfit.config.keys import own_keys
from llmfit.config.ludwig import TOP
from llmfit.config.ludwig.features import as_list
from llmfit.config.ludwig.rows import read_section
from llmfit.config.ludwig.search_rows import HYPEROPT, PARAMETER
from llmfit.config.overriding import place_of
from llmfit.config.reading import merge, with_path
from llmfit.config.search_settings import OWN, read_settings
from llmfit.exceptions import ParameterError, check_choice, quoted, suggest

__all__ = ["search_of", "with_axis"]

Make = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
NAMES = ("pretrained_model_name_or_path", "base_model")
ENDS = (("lower", "upper"), ("low", "high"))
LISTS = ("categories", "values")
LISTED = "parameters"  # the key of hyperopt that holds axes
RANGES = ("lower", "upper", "low", "high", "step", "log")
ENDINGS = ("space", *LISTS, *RANGES)


def with_axis(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set the value at a path; below hyperopt, what is no key of its own is the name of one axis, dots and all.

    An axis that is there already is changed where it stands, and so is an end of its range.
    """
    head, _, rest = path.partition(".")
    given = config.get(head) or {}
    listed = (given.get(LISTED) or {}) if isinstance(given, Mapping) else None
    first, _, below = rest.partition(".")
    own = first in HYPEROPT or first in OWN
    if head != "hyperopt" or not rest or not isinstance(listed, Mapping) or (own and not (first == LISTED and below)):
        return with_path(config, path, value)
    name = below if own else rest
    axis, _, end = name.rpartition(".")
    axis, end = (axis, end) if axis and end in ENDINGS else (name, "")
    axis = next((key for key in map(str, (*given, *listed)) if place_of(key) == place_of(axis)), axis)
    inside = own or (axis in listed and axis not in given)
    section = dict(listed) if inside else dict(given)
    found = section.get(axis)
    if end:
        section[axis] = {**(found if isinstance(found, Mapping) else {}), end: value}
    else:
        section[axis] = merge(found, value)
    return {**config, head: {**given, LISTED: section} if inside else section}


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
    whole = [name for name, value in {**axes, **(said.get(LISTED) or {})}.items() if _is_grid(value)]
    axes = _all_axes(said.pop(LISTED, None), axes)
    if not axes:
        raise ParameterError(
            "The config's 'hyperopt' needs at least one axis, such as parameters: {adapter.r: [4, 16]}."
        )
    places = {name: _paths(name, config, where) for name, (where, _) in axes.items()}
    start = _started(config, axes, places, list(axes))
    space: dict[str, Any] = {}
    grids: dict[str, str] = {}
    for name, (where, values) in axes.items():
        found = [make(_set(start, places[name], value), {}) for value in _probes(values)]
        if len(found) == 1:
            others = [other for other in axes if other != name]
            parameter, candidates = _fixed(name, found[0], make(_started(config, axes, places, others), {}))
            if parameter is None:
                continue
        else:
            parameter, candidates = _parameter(name, found, values, where)
        if parameter in space:
            raise ParameterError(
                f"The config's {where!r} is the parameter {parameter!r}, which another axis is already."
            )
        space[parameter] = candidates
        if name in whole:
            grids[parameter] = where
    space = _without(space, overrides)
    first = make(start, overrides)  # each axis at its first value
    _set_first(first, space)
    estimator = _as_written(config, overrides, make, space, first)
    grids = {parameter: where for parameter, where in grids.items() if parameter in space}
    return make_search(estimator, space, **read_settings(said, estimator, space, grids))


def _is_grid(axis: Any) -> bool:
    return isinstance(axis, Mapping) and axis.get("space") == "grid_search"


def _without(space: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the axes over parameters that are given."""
    places = {place_of(name) for name in overrides}
    left = {name: values for name, values in space.items() if place_of(name) not in places}
    for name, value in overrides.items():
        whole = next((place for place in map(place_of, left) if place_of(name).startswith(f"{place}.")), None)
        if whole is not None:
            raise ParameterError(
                f"The config's 'hyperopt' searches over {whole!r} as a whole, in which {name}={value!r} would be lost. "
                f"Give {whole!r} itself, which takes the place of the axis."
            )
    if not left:
        raise ParameterError(
            f"The config's 'hyperopt' has no axis left to search: {quoted(space)} is given. Leave 'hyperopt' out."
            if space
            else "The config's 'hyperopt' has no axis left to search: none differs from the config. List more values."
        )
    return left


def _as_written(config: Mapping[str, Any], overrides: Mapping[str, Any], make: Any, space: Any, first: Any) -> Any:
    """Make the estimator of a config as it stands, where its axes can be set on that; else with each at its first."""
    try:
        estimator = make(config, overrides)
        tried = clone(estimator).set_params(**{name: _probes(values)[0] for name, values in space.items()})
    except ParameterError:
        return first
    return estimator if type(tried) is type(first) and _leaves(tried) == _leaves(first) else first


def _leaves(estimator: Any) -> dict[str, Any]:
    """Parameters with the keys of nested ones in their place, so that two spellings of one spec are equal."""
    params = estimator.get_params()
    whole = {name.partition("__")[0] for name in params if "__" in name}
    return {name: value for name, value in params.items() if name not in whole}


def _set_first(estimator: Any, space: Mapping[str, Any]) -> None:
    """Set each axis to its first value: what is given in the place of a whole parameter may lack the key."""
    for name, values in space.items():
        try:
            estimator.set_params(**{name: _probes(values)[0]})
        except ParameterError as error:
            whole, _, key = name.partition("__")
            if not key:
                raise
            raise ParameterError(
                f"The config's 'hyperopt' searches over '{whole}.{key}', which "
                f"{whole}={getattr(estimator, whole)!r} does not have. Leave one of them out."
            ) from error


def _started(
    config: Mapping[str, Any], axes: Mapping[str, Any], places: Mapping[str, list[str]], names: list[str]
) -> dict[str, Any]:
    """Set axes to their first values."""
    start = dict(config)
    for name in names:
        start = _set(start, places[name], _probes(axes[name][1])[0])
    return start


def _all_axes(listed: Any, direct: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Read the axes under "parameters", and those directly under "hyperopt"."""
    for name in listed or {}:
        if name in direct:
            raise ParameterError(
                f"The config's 'hyperopt.parameters.{name}' and 'hyperopt.{name}' are one axis. Leave one out."
            )
    return {**_axes(listed, "hyperopt.parameters"), **_axes(direct, "hyperopt")}


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
    if given and not any(key in PARAMETER or key in ENDINGS for key in given):
        raise ParameterError(
            f"The config's {where!r} must be a list of values or a range. Got {dict(given)!r} instead. An axis over a "
            f"key inside has it in its name: '{where}.{next(iter(given))}'."
        )
    said = read_section(PARAMETER, given, where, more=("low", "high", "log", "step"))
    lists, ends = ([key for key in keys if key in said] for keys in (LISTS, RANGES))
    if len(lists) > 1 or (lists and ends):
        one, other = [*lists, *ends][:2]
        raise ParameterError(
            f"The config's '{where}.{one}' and '{where}.{other}' cannot stand together: an axis is one list of values, "
            "or one range. Leave one out."
        )
    kinds = ["choice", "grid_search"] if lists else ["uniform", "loguniform", "randint"]
    if not lists and said.get("space") in ("choice", "grid_search"):
        raise ParameterError(
            f"The config's {where!r} is a {said['space']!r}, which needs 'categories'. Got {dict(given)!r} instead."
        )
    check_choice("space", f"the config's {where!r}", said.get("space", kinds[0]), kinds)
    return _values(said[lists[0]], where) if lists else _range(said, given, where)


def _range(said: dict[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read a range: lower and upper are Ludwig's ends, low and high llmfit's."""
    theirs, mine = ([key for key in keys if key in said] for keys in (("space", "lower", "upper"), RANGES[2:]))
    if theirs and mine:
        raise ParameterError(
            f"The config's '{where}.{mine[0]}' cannot stand beside {theirs[0]!r}: a range is "
            "{low, high, step, log}, or Ludwig's {space, lower, upper}."
        )
    if not any(low in said and high in said for low, high in ENDS):
        raise ParameterError(f"The config's {where!r} needs a lower and an upper end. Got {dict(given)!r} instead.")
    return {"space": "uniform", **said} if theirs else said


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


def _parameter(axis: str, found: list[Any], values: Any, where: str) -> tuple[str, Any]:
    """Name the parameter in which estimators differ, and its candidates.

    Keys of one parameter that differ together, or are there in some only, are that parameter as a whole; and so is one
    that the axis itself names, whatever in it differs.
    """
    flat = [_flat(estimator) for estimator in found]
    names = list(dict.fromkeys(name for one in flat for name in one))
    absent = object()
    differ = [n for n in names if any(one.get(n, absent) != flat[0].get(n, absent) for one in flat)]
    heads = list(dict.fromkeys(name.partition("__")[0] for name in differ))
    whole = heads == [axis] and isinstance(values, list)
    if len(differ) == 1 and not whole and all(differ[0] in one for one in flat):
        name = differ[0]
        return name, _candidates([one[name] for one in flat], values, where)
    if len(heads) == 1 and isinstance(values, list):
        return heads[0], [estimator.get_params(deep=False)[heads[0]] for estimator in found]
    if not heads:
        raise ParameterError(f"The config's {where!r} makes no difference between its values {_probes(values)!r}.")
    raise ParameterError(
        f"The config's {where!r} changes {quoted(heads)} at once: search over one of them by its name."
    )


def _fixed(axis: str, estimator: Any, plain: Any) -> tuple[str | None, Any]:
    """Name the parameter in which one value differs from the config without it.

    An axis that names a parameter is that one, also where it says what the config says; None leaves it out of the
    search.
    """
    now, before = _flat(estimator), _flat(plain)
    differ = [name for name in now if name not in before or now[name] != before[name]]
    if len(differ) == 1 and differ[0].partition("__")[0] != axis:
        return differ[0], [now[differ[0]]]
    name, params = axis.replace(".", "__"), estimator.get_params(deep=True)
    return (name, [params[name]]) if name in params else (None, None)


def _candidates(read: list[Any], values: Any, where: str) -> Any:
    """Give the values as the estimator has them; a range must be the parameter's own."""
    if isinstance(values, list):
        return read
    if read != _probes(values):
        raise ParameterError(
            f"The config's {where!r} is no range of a parameter: its ends become {read!r}. List values."
        )
    return values
