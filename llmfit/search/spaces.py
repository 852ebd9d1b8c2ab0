"""What may be searched for each parameter: lists, ranges by name, distributions.

Takes a search space as users and configurations write it; gives dicts of name to a list, a :class:`Range` or a
distribution of scipy. Knows no estimator and no search.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from llmfit.exceptions import ParameterError, check_choice, check_keys, check_number, parameter_error

__all__ = ["Range", "Space", "first_values", "is_list", "read_space"]

Space = dict[str, Any]
OWNER = "the search space"
WANTED = "a list of values, a range such as {'low': 1e-5, 'high': 1e-3, 'log': True} or a distribution of scipy"


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both of which may be drawn.

    Parameters
    ----------
    low, high : int or float
        Whole numbers are drawn where `low`, `high` and `step` are ints.
    step : int, float or None
        Only ``low``, ``low + step``, ... are drawn.
    log : bool
        Every factor is equally likely, rather than every difference.

    Examples
    --------
    >>> Range(4, 16, step=4).rvs(random_state=0) in (4, 8, 12, 16)
    True
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether ints are drawn."""
        return all(isinstance(n, int) for n in (self.low, self.high, self.step) if n is not None)

    def rvs(self, random_state: Any = None) -> float:
        """Draw one number, as scipy's distributions do."""
        rng = check_random_state(random_state)
        step = 1 if self.whole and not self.log and self.step is None else self.step
        if step is not None:
            drawn = self.low + step * int(rng.randint(math.floor((self.high - self.low) / step + 1e-9) + 1))
            return drawn if self.whole else float(round(drawn, 12))
        if not self.log:
            return float(rng.uniform(self.low, self.high))
        margin = 0.5 if self.whole else 0.0  # each int is drawn as often as the numbers that round to it
        drawn = math.exp(rng.uniform(math.log(self.low - margin), math.log(self.high + margin)))
        return min(max(round(drawn), self.low), self.high) if self.whole else float(drawn)


def read_space(space: Any) -> list[Space]:
    """Read a search space: one dict, or a list of dicts of which one is drawn or each is gone through.

    Raises
    ------
    ParameterError
        If a parameter has no values, or a range cannot be read.
    """
    spaces = list(space) if isinstance(space, list | tuple) else [space]
    if not spaces or not all(isinstance(one, Mapping) and one for one in spaces):
        raise parameter_error("space", "make_search", "a dict of parameter to values, or a list of such dicts", space)
    return [{str(name): _read(str(name), values) for name, values in one.items()} for one in spaces]


def _read(name: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return _named(name, given) if "space" in given else _range(name, given)
    if hasattr(given, "rvs"):
        return given
    if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes) and np.ndim(given) > 0:
        return _values(name, given)
    raise parameter_error(name, OWNER, WANTED, given)


def _values(name: str, given: Any) -> list[Any]:
    listed = given.tolist() if isinstance(given, np.ndarray) else list(given)
    if not listed:
        raise parameter_error(name, OWNER, "a list with at least one value", given)
    return listed


def _range(name: str, given: Mapping[str, Any]) -> Range:
    """Read ``{"low", "high", "step", "log"}``."""
    owner = f"the range of {name!r}"
    if not {"low", "high"} & set(given):
        raise parameter_error(name, OWNER, WANTED, dict(given))
    check_keys(f"The range of {name!r}", given, ["low", "high", "step", "log"])
    for bound in ("low", "high"):
        if bound not in given:
            raise ParameterError(f"The range of {name!r} has no {bound!r}. It needs 'low' and 'high'.")
    low, high = (_number(bound, owner, given[bound]) for bound in ("low", "high"))
    log, step = given.get("log", False), given.get("step")
    check_choice("log", owner, log, [True, False])
    if low >= high:
        raise parameter_error("high", owner, f"greater than low, {low}", high)
    if log and low <= 0:
        raise parameter_error("low", owner, "greater than 0 with log=True", low)
    if log and step is not None:
        raise ParameterError(f"The range of {name!r} has both 'step' and 'log'. Leave one out.")
    if step is not None:
        check_number("step", owner, step, least=0, open_ends=True, other="None or ")
    return Range(low, high, None if step is None else _number("step", owner, step), log)


def _number(key: str, owner: str, value: Any) -> float:
    """Check a number; an int stays one."""
    check_number(key, owner, value)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _named(name: str, given: Mapping[str, Any]) -> Any:
    """Read ``{"space": "loguniform", "lower": ..., "upper": ...}``, which Ludwig and Ray Tune write."""
    owner = f"the search space of {name!r}"
    check_choice("space", owner, given["space"], list(SPACES))
    wanted, make = SPACES[given["space"]]
    if wanted == ("values",) and "categories" in given:
        wanted = ("categories",)
    check_keys(f"The space {given['space']!r} of {name!r}", given, ["space", *wanted])
    for key in wanted:
        if key not in given:
            raise ParameterError(f"The space {given['space']!r} of {name!r} has no {key!r}.")
    values = [given[key] for key in wanted]
    if wanted[0] in ("values", "categories"):
        return _read(name, make(*values))
    values = [_number(key, owner, value) for key, value in zip(wanted, values, strict=True)]
    if given["space"] in WHOLE and not all(isinstance(value, int) for value in values):
        raise ParameterError(f"The space {given['space']!r} of {name!r} needs ints. Got {values} instead.")
    return _range(name, make(*values))


def is_list(values: Any) -> bool:
    """Tell a list of values from what numbers are drawn out of."""
    return isinstance(values, list)


def first_values(values: Any) -> Any:
    """Give one value of a list, a range or a distribution, to try whether it can be set."""
    if is_list(values):
        return values[0]
    return values.low if isinstance(values, Range) else values.rvs(random_state=0)


# Bounds as in Ray Tune: the upper one is left out of randint and lograndint, and may be drawn in the others.
SPACES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "uniform": (("lower", "upper"), lambda low, high: {"low": float(low), "high": float(high)}),
    "loguniform": (("lower", "upper"), lambda low, high: {"low": float(low), "high": float(high), "log": True}),
    "quniform": (("lower", "upper", "q"), lambda low, high, q: {"low": float(low), "high": float(high), "step": q}),
    "int": (("lower", "upper"), lambda low, high: {"low": low, "high": high}),
    "randint": (("lower", "upper"), lambda low, high: {"low": low, "high": high - 1}),
    "qrandint": (("lower", "upper", "q"), lambda low, high, q: {"low": low, "high": high, "step": q}),
    "lograndint": (("lower", "upper"), lambda low, high: {"low": low, "high": high - 1, "log": True}),
    "choice": (("values",), lambda values: values),
    "grid_search": (("values",), lambda values: values),
}
WHOLE = ("int", "randint", "qrandint", "lograndint")
