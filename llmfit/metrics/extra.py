"""The metrics that the user brings: callables, local scripts, names of the library evaluate."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import ParameterError, missing_package, parameter_error

__all__ = ["extra_metrics", "metric_list"]

_WANTED = "a callable (y_true, y_pred), a name or path of a metric, or a list of these"


def extra_metrics(specs: Any, y_true: Any, y_pred: Any, *, taken: Collection[str] = ()) -> dict[str, Any]:
    """Compute the metrics that the user brings.

    Parameters
    ----------
    specs : list
        Each entry is a callable ``(y_true, y_pred)`` that returns a number or a dict, or a str for
        ``evaluate.load``: the path of a metric script (or of the folder with a script of its name), or the
        name of a metric on the Hugging Face Hub. Such a script is code, and it is run.
    y_true, y_pred : array, Series or list of length n
        Callables get them as they are; metrics of the evaluate library get lists. If such a metric refuses
        labels that are str, it gets their codes: positions among the sorted labels of both.
    taken : collection of str, default=()
        Keys that are in use already.

    Returns
    -------
    dict
        A number under the callable's ``__name__``, a dict under its own keys.

    Raises
    ------
    ParameterError
        If an entry is neither callable nor str, a metric cannot be loaded or computed or returns something
        else, or two metrics return the same key.

    Examples
    --------
    >>> from llmfit.metrics import extra_metrics
    >>> def n_wrong(y_true, y_pred):
    ...     return sum(true != answer for true, answer in zip(y_true, y_pred))
    >>> extra_metrics([n_wrong], ["a", "b", "b"], ["a", "a", "a"])
    {'n_wrong': 2}
    """
    scores: dict[str, Any] = {}
    for spec in metric_list(specs):
        found = _one_metric(spec, y_true, y_pred)
        repeated = [key for key in found if key in scores or key in taken]
        if repeated:
            raise ParameterError(f"Two metrics of evaluate return the key {repeated[0]!r}. Rename one.")
        scores |= found
    return scores


def metric_list(specs: Any) -> list[Any]:
    """Turn None, one metric or a list of them into a list, each a callable or a str.

    Raises
    ------
    ParameterError
        If an entry is neither a callable, a name nor a path.
    """
    given = [] if specs is None else list(specs) if isinstance(specs, list | tuple) else [specs]
    given = [os.fspath(spec) if isinstance(spec, os.PathLike) else spec for spec in given]
    for spec in given:
        if not (isinstance(spec, str) or callable(spec)):
            raise parameter_error("metrics", "evaluate", _WANTED, spec)
    return given


def _one_metric(spec: Any, y_true: Any, y_pred: Any) -> dict[str, Any]:
    if isinstance(spec, str):
        return _as_scores(spec, _compute_loaded(spec, pd.Series(y_true).tolist(), pd.Series(y_pred).tolist()))
    # A functools.partial has no name of its own, and an object that is called only that of its class.
    name = getattr(getattr(spec, "func", spec), "__name__", type(spec).__name__)
    return _as_scores(name, spec(y_true, y_pred))


def _as_scores(name: str, result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return {str(key): _plain(value) for key, value in result.items()}
    number = _plain(result)
    if not isinstance(number, int | float):
        raise ParameterError(f"The metric {name!r} must return a number or a dict. Got {number!r} instead.")
    return {name: number}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _compute_loaded(name: str, true: list[Any], pred: list[Any]) -> Any:
    metric = _load_metric(name)
    inputs = [(true, pred)]
    if all(isinstance(label, str) for label in true + pred):
        code_of = {label: code for code, label in enumerate(sorted({*true, *pred}))}
        inputs.append(([code_of[label] for label in true], [code_of[label] for label in pred]))
    refusal: Exception | None = None
    for references, predictions in inputs:
        try:
            return metric.compute(references=references, predictions=predictions)
        except (TypeError, ValueError) as error:
            refusal = error
    raise ParameterError(f"The metric {name!r} cannot be computed on these answers: {refusal}") from refusal


def _load_metric(name: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise missing_package(f"The metric {name!r}", "evaluate") from error
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # whatever a script raises while it is imported
        # The library says of every name, offline too, that the Hub has no such metric: leave that out.
        why = "" if isinstance(error, OSError) else f" ({error})"
        raise ParameterError(
            f"The metric {name!r} cannot be loaded{why}. "
            "The path of a local metric script or a callable (y_true, y_pred) works too."
        ) from error


# The package on PyPI -> the function that needs it, and the keys which that function gives.
