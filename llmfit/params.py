"""Nested parameters of estimators: ``adapter__r`` on a dict, a name or a spec.

Takes parameters that may be None, a shorthand, a dict or a frozen dataclass; gives scikit-learn's ``get_params`` and
``set_params`` over their keys. Knows no single parameter: an estimator lists its own.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

from llmfit.exceptions import ParameterError, suggest, unknown_key

__all__ = ["Nested", "NestedParams"]


class Nested(NamedTuple):
    """How a parameter reads as a dict.

    Parameters
    ----------
    shorthand : str
        The key that a plain str, int or bool stands for.
    defaults : callable (dict) -> dict
        Every key, with its default, that such a dict may have.
    off : tuple
        Values that switch the parameter off: they have no keys, and none can be set on them.
    """

    shorthand: str
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
    off: tuple[Any, ...] = ()

    def as_dict(self, value: Any) -> dict[str, Any] | None:
        """Write a value as a dict; None where it cannot be read as one."""
        if value is None or isinstance(value, bool):
            return None if value in self.off else {}
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, str) and value == "auto":
            return {}  # what is set on it decides
        if isinstance(value, str | numbers.Integral):
            return {self.shorthand: value}
        if is_dataclass(value) and not isinstance(value, type):
            kind = getattr(value, "type", None)
            own = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
            changed = {f.name for f in fields(value) if f.init and own[f.name] != f.default}
            return {**({"type": kind} if isinstance(kind, str) else {}), **{k: own[k] for k in own if k in changed}}
        return None


class NestedParams:
    """Mixin before ``BaseEstimator``: parameters that are dicts are searched like estimators.

    ``set_params`` takes whole values first, then their keys; dicts are copied, never written to.
    """

    _nested: ClassVar[dict[str, Nested]] = {}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters, with the keys of nested ones as ``name__key``.

        Parameters
        ----------
        deep : bool, default=True
            Add the keys of parameters that are dicts, names or specs, defaults included.

        Returns
        -------
        dict of str to any
        """
        params: dict[str, Any] = super().get_params(deep=deep)  # type: ignore[misc]
        for name, nested in self._nested.items() if deep else ():
            given = nested.as_dict(params.get(name))
            for key, value in {**nested.defaults(given), **given}.items() if given else ():
                params[f"{name}__{key}"] = value
        return params

    def set_params(self, **params: Any) -> Any:
        """Set parameters by name, and keys of nested ones by ``name__key``.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If there is no such parameter or key.
        """
        parts: dict[str, dict[str, Any]] = {}
        for name in list(params):
            head, separator, key = name.partition("__")
            if separator and head in self._nested:
                parts.setdefault(head, {})[key] = params.pop(name)
        self._check_names(params)
        for name, keys in parts.items():  # all is checked before anything is set
            params[name] = self._merged(name, params.get(name, getattr(self, name)), keys)
        super().set_params(**params)  # type: ignore[misc]
        return self

    def _check_names(self, params: Mapping[str, Any]) -> None:
        known = self._get_param_names()  # type: ignore[attr-defined]
        for name in params:
            if name not in known:
                raise ParameterError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}. Valid parameters are: "
                    f"{known!r}.{suggest(name, known)}"
                )

    def _merged(self, name: str, value: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        nested = self._nested[name]
        given = nested.as_dict(value)
        if given is None:
            raise ParameterError(f"{name!r} is {value!r}, so {name}__{next(iter(keys))} cannot be set.")
        merged = {**given, **keys}
        known = nested.defaults(merged)
        for key in keys:
            if known and key not in known:
                raise unknown_key(key, f"The {name!r} parameter of {type(self).__name__}", known)
        return merged
