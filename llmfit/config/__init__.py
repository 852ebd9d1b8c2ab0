"""A description of an estimator, in a file or a dict, becomes that estimator.

Takes llmfit's own keys: ``estimator``, the name of its class, and parameters by name. Later descriptions change earlier
ones; a key with dots reaches into what a key before it says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfit.exceptions import DataError, parameter_error, reason

__all__ = ["from_config"]


def from_config(config: Any, **overrides: Any) -> Any:
    """Make the estimator that a config describes.

    Parameters
    ----------
    config : dict, path of a YAML or JSON file, or list of them
        Later ones are merged over earlier ones.
    **overrides
        Keys that come last.

    Returns
    -------
    LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        Not fitted.

    Examples
    --------
    >>> from_config({"estimator": "LLMClassifier", "target": "label", "adapter.r": 8}).adapter
    {'type': 'lora', 'r': 8}
    """
    from llmfit.estimators.saving import ESTIMATORS
    from llmfit.exceptions import check_choice, check_keys

    merged: dict[str, Any] = {}
    for part in [*(config if isinstance(config, list | tuple) else [config]), overrides]:
        _merge(merged, _read(part))
    name = merged.pop("estimator", "LLMEstimator")
    check_choice("estimator", "a config", name, list(ESTIMATORS))
    check_keys(name, merged, ESTIMATORS[name]._get_param_names())
    return ESTIMATORS[name](**merged)


def _read(part: Any) -> Mapping[str, Any]:
    import yaml

    if isinstance(part, Mapping):
        return part
    if not isinstance(part, str | os.PathLike):
        raise parameter_error("config", "from_config", "a dict, a path or a list of them", part)
    try:
        content = yaml.safe_load(Path(part).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"The config {str(part)!r} cannot be read: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise DataError(f"The config {str(part)!r} must be a mapping of keys to values.")
    return content


def _merge(merged: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        name, _, rest = str(key).partition(".")
        before = merged.get(name)
        if isinstance(before, str):
            before = {"type": before}
        if rest:
            inner = dict(before) if isinstance(before, dict) else {"type": "lora"} if name == "adapter" else {}
            _merge(inner, {rest: value})
            merged[name] = inner
        elif isinstance(before, dict) and isinstance(value, Mapping):
            inner = dict(before)
            _merge(inner, value)
            merged[name] = inner
        else:
            merged[name] = value
