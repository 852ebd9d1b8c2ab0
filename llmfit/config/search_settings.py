"""How a search of a configuration goes, beside its axes: its kind, its draws, its folds, what is measured.

Takes what hyperopt says, in Ludwig's words or llmfit's, and gives what :func:`llmfit.search.make_search` takes. Two
keys that say different things are refused: none of them wins in silence.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from llmfit.config.ludwig import TABLES
from llmfit.config.ludwig.rows import read_section
from llmfit.config.ludwig.search_rows import BINARY, LOSS_OF, SCORINGS, SEARCHES
from llmfit.exceptions import ParameterError, check_choice, quoted
from llmfit.features import resolve_targets
from llmfit.search.describing import KEYS as OWN

__all__ = ["OWN", "SETTINGS", "read_settings"]

LISTED = ("grid", "fused", "fused_halving")  # that try all that is listed
KINDS = (*LISTED, "random", "halving", "optuna")
SEEDS = ("random_state", "seed", "random_state_seed")
Said = Mapping[str, Any]


def read_settings(
    said: Said, estimator: Any, space: Mapping[str, Any], grids: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Read how a search goes.

    Parameters
    ----------
    said : mapping
        The keys of hyperopt that are no axes.
    estimator : estimator
        What is searched.
    space : dict of str to list or dict
        Its axes.
    grids : dict of str to str, default={}
        Those of them that are a grid_search, and where each stands.

    Returns
    -------
    dict of str to any
        As keywords of `make_search`.

    Raises
    ------
    ParameterError
        For a key that has no meaning, or contradicts another; the sentence names both places.
    """
    _check_own(said)
    spec = said.get("search_alg")
    algorithm = read_section(
        TABLES["hyperopt.search_alg"], {"type": spec} if isinstance(spec, str) else spec, "hyperopt.search_alg"
    )
    executor = read_section(TABLES["hyperopt.executor"], said.get("executor"), "hyperopt.executor")
    ranges = [name for name, values in space.items() if not isinstance(values, list)]
    place, draws = _agreeing(_given("hyperopt", said, "n_iter"), _given("hyperopt.executor", executor, "num_samples"))
    whole = bool(space) and set(space) <= set(grids)
    if whole and place == "hyperopt.executor.num_samples":
        _check("n_iter", place, draws)
        draws = None  # which would repeat the grid
    listed = not ranges and (draws is None or whole)
    kind = _kind(said.get("kind"), algorithm.get("type"), executor.get("type"), listed=listed)
    if grids and kind not in LISTED and (kind != "halving" or ranges):
        _refuse_grid(kind, grids, [name for name in space if name not in grids])
    settings: dict[str, Any] = {"kind": kind, **_more(said.get("settings"))}
    if draws is not None:
        _check("n_iter", place, draws)
        _check_drawn(place, kind, none=kind in LISTED or (kind == "halving" and not ranges))
        settings["n_iter"] = draws
    seeded, seed = _agreeing(
        _given("hyperopt", said, "random_state"), *(_given("hyperopt.search_alg", algorithm, key) for key in SEEDS)
    )
    _check("random_state", seeded, seed)
    if seed is not None and kind not in LISTED:
        settings["random_state"] = seed
    elif seeded == "hyperopt.random_state":  # Ludwig's seeds have no effect on a grid, as in Ludwig
        _check_drawn(seeded, kind, none=True)
    settings |= {name: said[name] for name in ("cv", "checkpoint_dir") if said.get(name) is not None}
    scoring = _scoring(said, estimator)
    return settings if scoring is None else {**settings, "scoring": scoring}


def _check_own(said: Said) -> None:
    """Check the form of llmfit's own keys."""
    if said.get("kind") is not None:  # whose sentence knows what was meant
        check_choice("kind", "the config's 'hyperopt'", said["kind"], list(KINDS))
    for key in SETTINGS:
        _check(key, f"hyperopt.{key}", said.get(key))


def _check(key: str, place: str, value: Any) -> None:
    """Raise unless a value, which may stand at another place, is one that a key of llmfit's own may have."""
    wanted, accepts, _ = SETTINGS[key]
    if value is not None and not accepts(value):
        raise ParameterError(f"The config's {place!r} must be {wanted}. Got {value!r} instead.")


def _given(place: str, said: Said, key: str) -> tuple[str, Any]:
    return f"{place}.{key}", said.get(key)


def _agreeing(*given: tuple[str, Any]) -> tuple[str, Any]:
    """Take the value of keys that are one; those that are given must say the same."""
    found = [(place, value) for place, value in given if value is not None]
    for place, value in found[1:]:
        if value != found[0][1]:
            raise ParameterError(
                f"The config's {found[0][0]!r} is {found[0][1]!r}, but {place!r} is {value!r}, and both mean the same. "
                "Leave one out."
            )
    return found[0] if found else ("", None)


def _check_drawn(place: str, kind: str, *, none: bool) -> None:
    if none:
        over = " over lists" if kind == "halving" else ""
        raise ParameterError(
            f"The config's {place!r} has no meaning in a search of the kind {kind!r}{over}: every combination is "
            "tried, and nothing is drawn. Leave it out."
        )


def _refuse_grid(kind: str, grids: Mapping[str, str], others: list[str]) -> NoReturn:
    """Refuse to draw from what is to be tried as a whole."""
    first = next(iter(grids.values()))
    beside = f", and {quoted(others)} beside it" if others else ""
    raise ParameterError(
        f"The config's {first!r} is a grid_search, of which every value is tried, but a search of the kind {kind!r} "
        f"draws from it{beside}. Say space: choice there, or list the values of all axes and leave the number of draws "
        "out."
    )


def _more(given: Any) -> dict[str, Any]:
    """Read settings of the library's own class; those with a key of their own have their place there."""
    for key in given or {}:
        if key in OWN:
            raise ParameterError(
                f"The config's 'hyperopt.settings.{key}' stands in the wrong place: say hyperopt.{key}."
            )
    return dict(given or {})


def _kind(kind: Any, algorithm: Any, executor: Any, *, listed: bool) -> str:
    """Name the kind of a search: what is said, else a grid where all is listed and no number of draws is given."""
    if algorithm is not None and algorithm not in SEARCHES:
        raise ParameterError(
            f"The config's 'hyperopt.search_alg.type' must be one of {quoted(SEARCHES)}. Got {algorithm!r} instead."
        )
    if executor not in (None, "ray", "optuna"):
        raise ParameterError(
            f"The config's 'hyperopt.executor.type' must be 'ray' or 'optuna'. Got {executor!r} instead."
        )
    theirs = SEARCHES[algorithm] or "random" if algorithm is not None else None
    if executor == "optuna":
        _check_same(
            "hyperopt.executor.type", "optuna", "hyperopt.search_alg.type", algorithm, theirs in (None, "optuna")
        )
        algorithm, theirs, where = "optuna", "optuna", "hyperopt.executor.type"
    else:
        where = "hyperopt.search_alg.type"
    if kind is None:
        return "optuna" if theirs == "optuna" else "grid" if listed else "random"
    _check_same("hyperopt.kind", kind, where, algorithm, theirs is None or (kind == "optuna") == (theirs == "optuna"))
    return str(kind)


def _check_same(place: str, value: Any, other: str, theirs: Any, same: bool) -> None:
    if not same:
        raise ParameterError(f"The config's {place!r} is {value!r}, but {other!r} is {theirs!r}. Leave one out.")


def _scoring(said: Said, estimator: Any) -> Any:
    """Give the scoring that is said, or the scorer of Ludwig's metric; None is the estimator's own score."""
    _check_output(said.get("output_feature"), estimator.target)
    metric, goal = said.get("metric"), said.get("goal")
    if said.get("scoring") is not None:
        for key in ("metric", "goal"):
            if said.get(key) is not None:
                raise ParameterError(
                    f"The config's 'hyperopt.scoring' and 'hyperopt.{key}' both say what is measured: "
                    f"{said['scoring']!r} and {said[key]!r}. Leave one out."
                )
        return said["scoring"]
    if metric is None:
        if goal is not None:
            raise ParameterError(f"The config's 'hyperopt.goal' needs a 'metric' beside it. Got goal={goal!r} alone.")
        return None
    scorer = _scorer_of(metric, goal, _answers(estimator), several=_is_several(estimator.target))
    return scorer if {*_kinds(estimator)} & {"category"} else BINARY.get(metric, scorer)


def _check_output(name: Any, target: Any) -> None:
    """Raise unless what is measured is all that is predicted."""
    names = list(target) if isinstance(target, dict | list) else [target]
    if name not in (None, "combined", *names):
        raise ParameterError(f"The config's 'hyperopt.output_feature' must be the target. Got {name!r} instead.")
    if name not in (None, "combined") and len(names) > 1:
        raise ParameterError(
            "The config's 'hyperopt.output_feature' must be 'combined' with several targets: candidates are measured "
            f"by all of them. Got {name!r} instead."
        )


def _answers(estimator: Any) -> str:
    """Say what is answered: classes, numbers, texts, sets, or several of them; "" where nobody knows yet."""
    kinds = _kinds(estimator)
    if "set" in kinds:
        return "sets"
    if len(kinds) > 1 or (_is_several(estimator.target) and kinds - {"number"}):
        return "several targets"
    return OF_ESTIMATOR.get(type(estimator).__name__) or OF_KIND.get(next(iter(kinds), None) or "", "")


def _kinds(estimator: Any) -> set[str | None]:
    """Gather the declared kinds of the targets."""
    return set(resolve_targets(estimator.target, type(estimator).__name__).values())


def _is_several(target: Any) -> bool:
    return isinstance(target, dict | list | tuple) and len(target) > 1


def _scorer_of(metric: str, goal: Any, of: str, *, several: bool) -> str:
    """Name scikit-learn's scorer of a metric of Ludwig's, of one that measures what is answered."""
    loss = None if several else LOSS_OF.get(of)
    known = [name for name in SCORINGS if of in ("", SCORINGS[name][2])] + (["loss"] if loss else [])
    if not known:
        raise ParameterError(
            f"The config's 'hyperopt.metric' has no meaning with {of}: candidates are measured by the estimator's own "
            f"score. Leave it out. Got {metric!r} instead."
        )
    scorer, direction, _ = (loss, "minimize", of) if metric == "loss" else SCORINGS.get(metric, (None, "", ""))
    if metric not in known or scorer is None:
        raise ParameterError(
            f"The config's 'hyperopt.metric' must be one of {quoted(known, most=99)}, or 'scoring' a name of "
            f"scikit-learn's. Got {metric!r} instead."
        )
    if goal is not None and goal != direction:
        raise ParameterError(
            f"The config's 'hyperopt.goal' must be {direction!r} with metric={metric!r}. Got {goal!r}."
        )
    return scorer


def _is_scoring(value: Any) -> bool:
    """Tell names of scorers, or Python's own; that there are such names is what the search checks."""
    if isinstance(value, list | tuple | set):
        return bool(value) and all(isinstance(name, str) for name in value)
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(k, str) and _is_scorer(name) for k, name in value.items())
    return _is_scorer(value)


def _is_scorer(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


def _whole(least: int, most: float = math.inf) -> Any:
    def within(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most

    return within


OF_ESTIMATOR = {"LLMClassifier": "classes", "LLMRegressor": "numbers", "LLMGenerator": "texts"}
OF_KIND = {"category": "classes", "binary": "classes", "number": "numbers", "text": "texts"}
_NAME, _SEED = {"type": "string"}, 2**32 - 1  # numpy's greatest
# llmfit's own keys: what each may be in words, as a test, and as JSON Schema has it; beside null, which all may be.
SETTINGS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "kind": (f"null or one of {quoted(KINDS)}", lambda value: value in KINDS, {"enum": [*KINDS]}),
    "scoring": (
        "null, a name of scikit-learn's, a list of names, or a mapping of texts to names",
        _is_scoring,
        {
            "anyOf": [
                _NAME,
                {"type": "array", "items": _NAME, "minItems": 1},
                {"type": "object", "additionalProperties": _NAME, "minProperties": 1},
            ]
        },
    ),
    "cv": ("null or an int >= 2", _whole(2), {"type": "integer", "minimum": 2}),
    "n_iter": ("null or an int >= 1", _whole(1), {"type": "integer", "minimum": 1}),
    "random_state": (
        f"null or an int from 0 to {_SEED}",
        _whole(0, _SEED),
        {"type": "integer", "minimum": 0, "maximum": _SEED},
    ),
    "checkpoint_dir": ("null or a path", lambda value: isinstance(value, str | os.PathLike), {"type": "string"}),
    "settings": (
        "a mapping",
        lambda value: isinstance(value, Mapping),
        {"type": "object", "propertyNames": {"not": {"enum": [*OWN]}}},
    ),
}
