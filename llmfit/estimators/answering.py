"""All that a fitted estimator says of known rows, from one pass over them: answers, measures, what each row cost.

Takes a fitted estimator and rows with their target; gives an :class:`Answered` for each target. `evaluate` gives the
measures alone, and `predict` the answers alone; who wants both asks here, so that the model is asked once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmfit.estimators import targets
from llmfit.estimators.reading import read_target
from llmfit.exceptions import ParameterError
from llmfit.metrics import metric_list, token_f1

__all__ = ["Answered", "answered"]


@dataclass(frozen=True)
class Answered:
    """What was answered to one target.

    Parameters
    ----------
    target : str
    kind : {"classes", "sets", "number", "text"}
    classes : ndarray of shape (n_classes,) or None
        The labels, of classes and sets.
    truth, predicted : Series of shape (n_rows,)
        With the index of the rows.
    proba : ndarray of shape (n_rows, n_classes) or None
        Probabilities, of classes and sets.
    measures : dict
        As `evaluate` gives them.
    """

    target: str
    kind: str
    classes: np.ndarray | None
    truth: pd.Series
    predicted: pd.Series
    proba: np.ndarray | None
    measures: dict[str, Any]

    def costs(self) -> tuple[str, np.ndarray]:
        """Say how bad each answer is, and in what: (n_rows,), larger is worse.

        Of classes, -ln of the probability of the true one, infinite for one that `fit` never saw; of sets, the sum of
        that over the labels; of numbers, the distance, infinite where the answer is none; of texts, 1 less the F1 of
        the words.
        """
        if self.kind == "number":
            gone = np.abs(self.truth.to_numpy(dtype=float) - self.predicted.to_numpy(dtype=float))
            return "distance", np.where(np.isnan(gone), np.inf, gone)
        if self.kind == "text":
            pairs = zip(self.truth, self.predicted, strict=True)
            return "1 - token F1", np.array([1 - token_f1(true, answer) for true, answer in pairs])
        return "loss (nats)", self._surprise()

    def _surprise(self) -> np.ndarray:
        classes = np.array([]) if self.classes is None else self.classes
        proba = np.asarray(self.proba).clip(1e-300, 1.0)
        if self.kind == "sets":
            has = targets.to_indicator(self.truth, classes)
            return np.asarray(-np.where(has, np.log(proba), np.log1p(-proba.clip(0, 1 - 1e-16))).sum(axis=1))
        place = {label: i for i, label in enumerate(classes.tolist())}
        labels = targets.label_values(self.truth).tolist()
        return np.array(
            [-np.log(row[place[label]]) if label in place else np.inf for row, label in zip(proba, labels, strict=True)]
        )


def answered(estimator: Any, X: Any, y: Any = None, *, metrics: Any = ()) -> tuple[pd.DataFrame, list[Answered]]:
    """Answer rows and measure the answers, to every target.

    Parameters
    ----------
    estimator : LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        A fitted one.
    X, y, metrics
        As for its `evaluate`.

    Returns
    -------
    frame : DataFrame of shape (n_rows, n_features)
        The columns that the prompts are made of.
    answers : list of Answered
        One for each target.
    """
    estimator = vars(estimator).get("estimator_", estimator)
    metrics = metric_list(metrics)
    if metrics and estimator._targets is not None:
        raise ParameterError("The 'metrics' parameter has no meaning with several targets: each has its own.")
    table, frame = estimator._read_rows(X)
    target, answers = read_target(estimator, table, y), estimator._respond(frame)
    if estimator._targets is not None:
        each, known = estimator.estimators_, _behind(estimator, frame, target)
    else:
        each, known = {target.name: estimator}, {}
        target, answers = target.to_frame(), {target.name: answers}
    found = []
    for name, inner in each.items():
        options = {"per_class": True} if hasattr(inner, "classes_") else {}
        if _kind(inner) == "text":
            base = estimator._fitted_base()
            rows = known.get(name) or estimator._encode_known(base, table, target[name])
            options = {"base": base, "rows": rows}
        measures = inner._measure(target[name], answers[name], metrics, **options)
        found.append(_answered(inner, table, str(name), target[name], answers[name], measures))
    if estimator._targets is not None:
        every = {f"{one.target}: {key}": value for one in found for key, value in one.measures.items()}
        estimator._evaluated(every, len(target))
    return frame, found


def _behind(estimator: Any, frame: pd.DataFrame, target: pd.DataFrame) -> dict[str, Any]:
    """Encode true answers behind the true ones before, for the perplexity of texts."""
    return {} if estimator._head is not None else dict(estimator._known_rows(estimator._fitted_base(), frame, target))


def _kind(inner: Any) -> str:
    if hasattr(inner, "classes_"):
        return "classes" if inner._form is None else "sets"
    return "number" if hasattr(inner, "target_mean_") else "text"


def _answered(inner: Any, table: Any, name: str, truth: pd.Series, answers: Any, measures: dict[str, Any]) -> Answered:
    kind, index = _kind(inner), table.frame.index
    if kind == "sets":
        values: Any = targets.chosen_sets(answers, inner.classes_)
        predicted = pd.Series([tuple(row) for row in values], index=index, dtype=object)
    else:
        predicted = pd.Series(np.asarray(inner._column(table, answers), dtype=object), index=index)
    if kind == "text":
        truth = pd.Series(inner._answer_texts(truth), index=truth.index, dtype=object)  # as they are measured
    classes = inner.classes_ if kind in ("classes", "sets") else None
    return Answered(name, kind, classes, truth, predicted, None if classes is None else np.exp(answers), measures)
