"""Estimators and searches from what a configuration says: dicts, YAML or JSON, in llmfit's words or Ludwig's.

Takes configurations and parameters that take their place; gives an estimator, or a search over one where ``hyperopt``
stands. Every key is checked here, and every value as far as it can be without data; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmfit.config.keys import ESTIMATORS, check_own, own_keys
from llmfit.config.ludwig import is_ludwig, translate
from llmfit.config.overriding import place_of, set_over
from llmfit.config.reading import read_config, to_yaml
from llmfit.config.schema import json_schema
from llmfit.config.searching import search_of, with_axis
from llmfit.estimators.describing import to_config as describe
from llmfit.estimators.several import BY_KIND, auto_head
from llmfit.exceptions import check_choice, parameter_error
from llmfit.features import resolve_targets
from llmfit.persistence import from_json
from llmfit.search.describing import to_config as describe_search

__all__ = ["from_config", "json_schema", "to_config", "to_yaml"]


def from_config(config: Any, **overrides: Any) -> Any:
    """Make an estimator, or a search over one, from a configuration.

    Parameters
    ----------
    config : dict, path of a .yaml, .yml or .json file, or list of them
        Several are merged, key by key; later ones win. llmfit's own keys are "estimator" (LLMEstimator where it is
        not given) and the parameters of its constructor; Ludwig's are listed in docs/from-ludwig.md. Both may stand in
        one config, as long as they do not say different things. Top-level keys may have dots ("adapter.r").
    **overrides
        Parameters of the estimator, ``adapter__r`` and "template.few_shot.k" included: they take the place of what
        the config says, and of the axis of a search over them. Other keys of a config ("hyperopt", "trainer.epochs",
        "hyperopt.adapter.r" for an axis) are merged into it.

    Returns
    -------
    LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        As "estimator" says, or Ludwig's output features; not fitted. With "hyperopt", a search over it, in the manner
        of scikit-learn.

    Raises
    ------
    ParameterError
        If a file cannot be read, a key is unknown or refused (the sentence names its place), or a value cannot be used.

    Examples
    --------
    >>> from llmfit import from_config
    >>> from_config({"estimator": "LLMClassifier", "target": "score", "adapter": {"r": 8}}, verbose=0)
    LLMClassifier(adapter={'r': 8}, target='score', verbose=0)
    >>> from_config({
    ...     "input_features": {"name": "review", "type": "text"},
    ...     "output_features": {"name": "sentiment", "type": "category"},
    ...     "trainer": {"epochs": 2},
    ... })
    LLMClassifier(epochs=2, features={'review': 'text'},
                  target={'sentiment': 'category'})
    """
    given, params = read_config(config, with_axis), {}
    for name, value in overrides.items():
        if place_of(name).partition(".")[0] in own_keys():
            params[name] = value
        else:
            given = with_axis(given, name, value)
    given = from_json(given)
    space = given.pop("hyperopt", None)
    if space is None:
        return make_estimator(given, params)
    return search_of(given, space, params, make_estimator)


def make_estimator(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Make and check the estimator of a configuration without hyperopt."""
    own = own_keys()
    name, params = translate(config, list(own)) if is_ludwig(config) else check_own(config)
    if is_ludwig(config):
        name, params = check_own({"estimator": name, **params})
    estimator = ESTIMATORS[name](**params)
    set_over(estimator, overrides)
    check_values(estimator)
    return estimator


def check_values(estimator: Any) -> None:
    """Check an estimator's parameters as `fit` would, before there are rows."""
    from llmfit.estimators.checks import check_parameters

    probe = _probe(estimator)
    _check_place(estimator.device, estimator.dtype)
    check_parameters(probe, validated=True)
    probe._check()


def _check_place(device: Any, dtype: Any) -> None:
    """Raise where no machine could have such a device, or such numbers; whether this one has it is for `fit` to say."""
    from llmfit.base_model import DTYPES

    if not (isinstance(device, str) or type(device).__name__ == "device"):  # of torch
        raise parameter_error("device", "the estimator", "'auto' or a device of torch, like 'cpu' or 'cuda:0'", device)
    check_choice("dtype", "the estimator", dtype, ["auto", *DTYPES])


def _probe(estimator: Any) -> Any:
    """Copy an estimator to check; one that waits for the kind of its target is checked as what it would choose."""
    from sklearn.base import clone

    copied = clone(estimator)  # its random_state is drawn from
    if type(estimator) is not ESTIMATORS["LLMEstimator"]:
        return copied
    kinds = resolve_targets(estimator.target, type(estimator).__name__)
    if len(kinds) > 1 and all(kinds.values()):
        copied._targets = kinds
        return copied
    chosen: Any = BY_KIND[next(iter(kinds.values()), None) or ("text" if estimator.generation else "category")]
    head = auto_head([kind for kind in kinds.values() if kind] or ["category"])
    return chosen(**copied._own_params(chosen, head) | {"target": None})


def to_config(model: Any) -> dict[str, Any]:
    """Write an estimator, or a search over one, as a configuration of plain values.

    Parameters
    ----------
    model : LLMClassifier, LLMRegressor, LLMGenerator, LLMEstimator, or a search that :func:`from_config` makes

    Returns
    -------
    dict of str to any
        ``from_config(to_config(model))`` has the same parameters, specs written as dicts; a search the same axes.

    Raises
    ------
    ParameterError
        If something has no plain form.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> to_config(LLMClassifier(target="score", epochs=2))
    {'estimator': 'LLMClassifier', 'target': 'score', 'epochs': 2}
    """
    return describe(model) if type(model).__name__ in ESTIMATORS else describe_search(model)
