"""Fitted estimators to folders and back.

Takes an estimator; writes its parameters and what it learned as JSON, the adapter as a folder that peft reads, and a
model card. Names of classes come from a fixed list; nothing that is read is executed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmfit.adapters import adapter_from_folder, resolve_adapter
from llmfit.encoding import Limit
from llmfit.estimators.auto import LLMEstimator
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.card import model_card
from llmfit.estimators.classifier import LLMClassifier
from llmfit.estimators.fitting import COLUMNS
from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.prompts import Prompts, Turn
from llmfit.estimators.regressor import LLMRegressor
from llmfit.estimators.retrieval import Retrieval
from llmfit.exceptions import DataError, ModelLoadError
from llmfit.features import Feature
from llmfit.heads import head_from_folder, resolve_head, save_head, split_tensors
from llmfit.persistence import from_json, read_folder, to_json, write_folder
from llmfit.templates import PLAIN, Example, Field, Frame, Part, Segment, Template

__all__ = ["load", "save"]

ADAPTER = "adapter"
HISTORY = "history.json"
LEARNED = (
    "target_",
    "features_",
    "max_length_",
    "learning_rate_",
    "batch_size_",
    "trainable_parameters_",
    "memory_footprint_",
    "best_epoch_",
    "base_model_",
    "evaluation_",
    "n_features_in_",
    "max_new_tokens_",
    "answer_tokens_",
    "target_mean_",
    "target_scale_",
)
ESTIMATORS: dict[str, type[BaseLLM]] = {
    "LLMClassifier": LLMClassifier,
    "LLMRegressor": LLMRegressor,
    "LLMGenerator": LLMGenerator,
    "LLMEstimator": LLMEstimator,
}


def save(estimator: BaseLLM, path: Any) -> None:
    """Write a fitted estimator; see :meth:`llmfit.LLMClassifier.save`."""
    inner: Any = vars(estimator).get("estimator_", estimator)
    content = {
        "class": type(estimator).__name__,
        "fitted_class": type(inner).__name__,
        "params": _params_to_json(estimator),
        "fitted": _fitted_to_json(inner),
    }

    def fill(folder: Path) -> None:
        (folder / HISTORY).write_text(_history_to_json(inner.history_), encoding="utf-8")
        own, rest = split_tensors(inner._tensors)
        if inner._adapter is not None:
            (folder / ADAPTER).mkdir()
            kind = inner.base_model_.get("kind", "decoder")  # a fit of an earlier version knew decoders alone
            inner._adapter.save(folder / ADAPTER, rest, inner.base_model_["name"], kind)
        if own:
            save_head(folder, own)
        (folder / "README.md").write_text(model_card(inner), encoding="utf-8")

    write_folder(path, content, fill)


def load(path: Any, *, base_model: Any = None, **params: Any) -> Any:
    """Load an estimator that was saved with ``save``.

    Parameters
    ----------
    path : str or path
        The folder.
    base_model : str or path, default=None
        Where the base model lies now, if not where it lay then. Its contents must be the same.
    **params
        Parameters to change, such as ``device`` or ``verbose``.

    Returns
    -------
    LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        Fitted as it was saved.

    Raises
    ------
    ModelLoadError
        If the folder is no saved model, incomplete, damaged or of a newer format, or if the base model is
        missing or another one than then.

    Examples
    --------
    >>> import llmfit, tempfile
    >>> from llmfit.datasets import load_book_reviews
    >>> clf = llmfit.LLMClassifier(target="score", adapter=None, verbose=0).fit(load_book_reviews())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     clf.save(folder)
    ...     llmfit.load(folder).classes_
    array([1, 2, 3, 4, 5])
    """
    folder, manifest = read_folder(path)
    try:
        outer: Any = ESTIMATORS[manifest["class"]](**from_json(manifest["params"]))
        inner: Any = outer
        if manifest["fitted_class"] != manifest["class"]:
            chosen = ESTIMATORS[manifest["fitted_class"]]
            inner = chosen(**outer._own_params(chosen, "linear" if manifest["fitted"].get("head") else "lm"))
        _restore(inner, folder, from_json(manifest["fitted"]))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"The saved model {str(path)!r} cannot be read: {error!r}.") from error
    if base_model is not None:
        params["base_model"] = base_model
    for estimator in {id(outer): outer, id(inner): inner}.values():
        estimator.set_params(**params)
    if inner is not outer:
        outer._adopt(inner)
    _check_base(inner)
    return outer


def _check_base(estimator: Any) -> None:
    """Look for the base model and compare it with the one of the fit, without loading it."""
    from llmfit.sources import find_source

    try:
        now, then = find_source(estimator.base_model).fingerprint, estimator.base_model_["fingerprint"]
    except ModelLoadError as error:
        raise ModelLoadError(f"{error} Pass base_model= to say where it lies now.") from error
    if now != then:
        raise ModelLoadError(
            f"The base model {str(estimator.base_model)!r} is not the one that was fitted: its fingerprint is {now}, "
            f"the saved model wants {then}. Pass base_model= to say where that one lies."
        )


def _params_to_json(estimator: BaseLLM) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in estimator.get_params(deep=False).items():
        if name == "callbacks" or (name == "random_state" and isinstance(value, np.random.RandomState)):
            value = None  # they shaped the fit; they have no part in prediction
        if is_dataclass(value) and not isinstance(value, type):
            value = {**({"type": value.type} if hasattr(value, "type") else {}), **asdict(value)}
        if type(value).__name__ == "device":  # of torch
            value = str(value)
        try:
            params[name] = to_json(os.fspath(value) if isinstance(value, os.PathLike) else value)
        except DataError as error:
            raise DataError(f"The {name!r} parameter cannot be saved: {error}") from None
    return params


def _fitted_to_json(estimator: Any) -> dict[str, Any]:
    fitted = _learned_to_json(estimator)
    prompts = estimator._prompts
    fitted["prompts"] = to_json({**asdict(prompts), "template": _template_to_json(prompts.template)})
    if prompts.retrieval is not None:
        del fitted["prompts"]["retrieval"]["apart"]  # of a run, and of no fit
    fitted["adapter"] = _adapter_to_json(estimator._adapter)
    fitted["head"] = None if estimator._head is None else to_json(_head_to_dict(estimator._head))
    fitted["columns"] = estimator._columns
    fitted["has_names"] = hasattr(estimator, "feature_names_in_")
    if estimator._targets is not None:
        fitted["targets"] = [
            {"kind": kind, **_learned_to_json(own)}
            for kind, own in zip(estimator._targets.values(), estimator.estimators_.values(), strict=True)
        ]
    return fitted


def _learned_to_json(estimator: Any) -> dict[str, Any]:
    """Write what was learned of the answers."""
    fitted: dict[str, Any] = {name: to_json(getattr(estimator, name)) for name in LEARNED if hasattr(estimator, name)}
    fitted["form"] = getattr(estimator, "_form", None)
    if hasattr(estimator, "target_dtype_"):
        fitted["target_dtype"] = _dtype_to_json(estimator.target_dtype_)
    if hasattr(estimator, "classes_"):
        values = estimator.classes_
        fitted["classes"] = {"values": to_json(values), "dtype": values.dtype.str if values.dtype != object else "O"}
    return fitted


def _restore(estimator: Any, folder: Path, fitted: dict[str, Any]) -> None:
    """Give an estimator back what it had learned."""
    _restore_answers(estimator, fitted)
    prompts = fitted["prompts"]
    estimator._prompts = Prompts(
        tuple(Feature(**feature) for feature in prompts["features"]),
        prompts["target"],
        _template_from_json(prompts["template"]),
        Limit(**prompts["limit"]),
        tuple(Turn(tuple(Segment(*piece) for piece in cue), share) for cue, share in prompts.get("turns", ())),
        Retrieval(**prompts["retrieval"]) if prompts.get("retrieval") else None,
    )
    estimator._columns = fitted.get("columns") or {  # a fit of an earlier version did not keep them
        feature.name: "int" if feature.whole else "float"
        for feature in estimator._prompts.features
        if feature.kind == "number"
    }
    if fitted["has_names"]:
        estimator.feature_names_in_ = np.array(list(fitted["features_"]), dtype=object)
    estimator._adapter = resolve_adapter(fitted["adapter"])
    estimator._head = resolve_head(fitted.get("head") or "lm", type(estimator).__name__, ["lm", "linear"])
    estimator._tensors = (
        adapter_from_folder(folder / ADAPTER, estimator._adapter) if estimator._adapter is not None else {}
    )
    if estimator._head is not None:
        estimator._tensors |= head_from_folder(folder)
    records = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    estimator.history_ = pd.DataFrame(records, columns=COLUMNS)
    if "targets" in fitted:
        _restore_targets(estimator, fitted["targets"])


def _restore_answers(estimator: Any, fitted: dict[str, Any]) -> None:
    for name in LEARNED:
        if name in fitted:
            setattr(estimator, name, fitted[name])
    if "target_dtype" in fitted:
        estimator.target_dtype_ = _dtype_from_json(fitted["target_dtype"])
    if "classes" in fitted:
        estimator.classes_ = np.array(fitted["classes"]["values"], dtype=fitted["classes"]["dtype"])
    if hasattr(estimator, "_form"):
        estimator._form = fitted.get("form")


def _restore_targets(estimator: Any, saved: list[dict[str, Any]]) -> None:
    """Give back the estimators of several targets."""
    estimator._targets = {own["target_"]: own["kind"] for own in saved}
    estimator.estimators_ = {name: estimator._for_target(name) for name in estimator._targets}
    for inner, own in zip(estimator.estimators_.values(), saved, strict=True):
        _restore_answers(inner, own)
    estimator._hand_down()


def _history_to_json(history: pd.DataFrame) -> str:
    """Write a record a step, numbers to their last bit; what is missing is left out."""
    records = ({k: v for k, v in r.items() if not pd.isna(v)} for r in history.to_dict("records"))
    return json.dumps(list(records), indent=1) + "\n"


def _adapter_to_json(adapter: Any) -> Any:
    return None if adapter is None else to_json({"type": adapter.type, **asdict(adapter)})


def _head_to_dict(head: Any) -> dict[str, Any]:
    cache = None if head.cache is None else os.fspath(head.cache)
    return {"type": head.type, **asdict(head), "cache": cache}


def _template_to_json(template: Template) -> dict[str, Any]:
    return {
        "parts": [_part_to_json(part) for part in template.parts],
        "na_rep": template.na_rep,
        "frame": asdict(template.frame),
        "examples": [
            {
                "content": [list(segment) for segment in example.content],
                "answer": example.answer,
                "later": [list(segment) for segment in example.later],
            }
            for example in template.examples
        ],
    }


def _part_to_json(part: Part) -> Any:
    if isinstance(part, str):
        return part
    return {"text": part.text} if isinstance(part, Segment) else asdict(part)


def _part_from_json(value: Any) -> Part:
    if isinstance(value, str):
        return value
    return Segment(value["text"], PLAIN) if "text" in value else Field(**value)


def _template_from_json(value: dict[str, Any]) -> Template:
    frame = value["frame"]
    return Template(
        tuple(_part_from_json(part) for part in value["parts"]),
        value["na_rep"],
        Frame(tuple(frame["literals"]), frame["lead"], frame["closing"], frame["chat"]),
        tuple(
            Example(
                tuple(Segment(*segment) for segment in example["content"]),
                example["answer"],
                tuple(Segment(*segment) for segment in example.get("later", ())),
            )
            for example in value["examples"]
        ),
    )


def _dtype_to_json(dtype: Any) -> dict[str, Any]:
    if isinstance(dtype, pd.CategoricalDtype):
        inner = _dtype_to_json(dtype.categories.dtype)
        return {"categories": to_json(dtype.categories.to_numpy()), "of": inner, "ordered": bool(dtype.ordered)}
    return {"name": str(dtype)}


def _dtype_from_json(value: dict[str, Any]) -> Any:
    if "categories" in value:
        categories = pd.Index(value["categories"], dtype=_dtype_from_json(value["of"]))
        return pd.CategoricalDtype(categories, ordered=value["ordered"])
    return pd.api.types.pandas_dtype(value["name"])
