"""An estimator as a configuration: its class, and the parameters that are not the defaults, as plain values.

Takes an estimator, fitted or not; gives a dict that YAML and JSON can hold. :func:`llmfit.from_config` makes the
estimator of it again.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from llmfit.callbacks import Callback
from llmfit.exceptions import DataError, ParameterError
from llmfit.params import Nested
from llmfit.persistence import to_json

__all__ = ["plain_values", "to_config"]


def to_config(estimator: Any) -> dict[str, Any]:
    """Write an estimator's class and parameters as plain values.

    Parameters
    ----------
    estimator : LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        Fitted or not.

    Returns
    -------
    dict of str to any
        "estimator", and the parameters that differ from their defaults. Specs are dicts; a dict whose keys are not all
        texts is ``{"__pairs__": [[key, value], ...]}``.

    Raises
    ------
    ParameterError
        If a parameter has no plain form: callbacks, or a random_state that is no number.

    Examples
    --------
    >>> from llmfit import LLMClassifier, LoRA
    >>> to_config(LLMClassifier(target="score", adapter=LoRA(r=8)))
    {'estimator': 'LLMClassifier', 'target': 'score', 'adapter': {'type': 'lora', 'r': 8}}
    """
    usual = type(estimator)().get_params(deep=False)
    config: dict[str, Any] = {"estimator": type(estimator).__name__}
    for name in inspect.signature(type(estimator)).parameters:  # in the order of the documentation
        value = getattr(estimator, name)
        try:
            plain = to_json(plain_values(value))
        except DataError:
            raise ParameterError(
                f"The {name!r} parameter of {type(estimator).__name__} has no plain form that a config could hold. "
                f"Got {value!r}. Set it after from_config."
            ) from None
        if not (type(plain) is type(usual[name]) and plain == usual[name]):
            config[name] = plain
    return config


def plain_values(value: Any) -> Any:
    """Turn specs into dicts, paths and devices into texts, within whatever holds them."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type | Callback):
        return plain_values(Nested("type", lambda _: {}).as_dict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if type(value).__name__ == "device" else value  # of torch
