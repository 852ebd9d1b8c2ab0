"""Parameters that take the place of what a configuration says, at any depth: ``template.few_shot.k``.

Takes an estimator that was made from a configuration, and values by the names that a user wrote; sets them on it as a
file would have said them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmfit.config.keys import Key, check_nested, estimator_keys
from llmfit.config.reading import with_path
from llmfit.estimators.describing import plain_values
from llmfit.exceptions import ParameterError

__all__ = ["place_of", "set_over"]


def place_of(name: str) -> str:
    """Write a name with dots: ``adapter__r`` is ``adapter.r``."""
    return name if "." in name else name.replace("__", ".")


def set_over(estimator: Any, given: Mapping[str, Any]) -> None:
    """Set parameters of an estimator: whole ones first, then what lies inside them.

    Raises
    ------
    ParameterError
        If there is no such parameter or key; the sentence names its place.
    """
    places = {place_of(name): value for name, value in given.items()}
    estimator.set_params(**{place: value for place, value in places.items() if "." not in place})
    for place, value in places.items():
        if "." in place:
            head, _, path = place.partition(".")
            estimator.set_params(**{head: _changed(estimator, head, path, value)})


def _changed(estimator: Any, head: str, path: str, value: Any) -> Any:
    """Give a parameter with the value at a path in it; what stood there before is not merged with it."""
    place, owner = f"{head}.{path}", type(estimator).__name__
    key = estimator_keys(owner).get(head)
    if key is None:
        raise ParameterError(f"The config has no key {place!r}: {owner} has no parameter {head!r}.")
    whole = {head: _inside(key, getattr(estimator, head), place)}
    for one in (None, value):
        whole = with_path(whole, place, one)
    check_nested(key, whole[head], within=place)
    return whole[head]


def _inside(key: Key, value: Any, place: str) -> Any:
    """Write a parameter's value as what has keys."""
    if "dict" not in key.words:
        raise ParameterError(f"The config has no key {place!r}: {key.name!r} has no keys.")
    if value is None or value is False:
        return {}
    if key.nested is not None:
        found = key.nested.as_dict(value)
        return {key.nested.shorthand: value} if found is None else plain_values(found)
    if isinstance(value, Mapping | list) or '{"type"' in key.words:  # with_path takes a name for the type
        return value
    raise ParameterError(f"The config has no key {place!r}: {key.name!r} is {value!r}.")
