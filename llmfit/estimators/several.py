"""Several targets of one fit: answered left to right in words, or side by side by one head.

Takes targets as a frame; keeps, beside what every fit keeps, an estimator for each target, which knows its classes and
units and turns what the model says into values. They share the adapter's tensors. In words, a row is one sequence:
prompt, answer, end token, cue of the next target, answer, end token; true answers stand before an answer in training,
predicted ones in prediction. In an encoder-decoder that sequence is its decoder's, and the prompt is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from llmfit.encoding import Ids
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.classifier import LLMClassifier
from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.reading import read_target
from llmfit.estimators.regressor import LLMRegressor
from llmfit.exceptions import DataError, ParameterError, check_number, parameter_error, quoted, suggest
from llmfit.heads import resolve_head

__all__ = ["BY_KIND", "SHARED", "Several", "auto_head", "check_loss_weights"]

SHARED = ("_prompts", "_columns", "_head", "_adapter", "_tensors")  # what the estimator of a target has from the fit


def auto_head(kinds: Iterable[str]) -> str:
    """Say which head "auto" is for targets of these kinds: words, but for numbers alone and several labels a row."""
    present = set(kinds)
    return "linear" if present <= {"set", "number"} or ("set" in present and "text" not in present) else "lm"


def check_loss_weights(given: Any, targets: Collection[str], owner: str) -> None:
    """Raise unless weights of the targets' losses are None, or numbers above 0 for some of several targets."""
    if given is None:
        return
    if len(targets) < 2:
        raise ParameterError("The 'loss_weights' parameter has no meaning here: there is one target.")
    if not isinstance(given, dict):
        raise parameter_error("loss_weights", owner, "None or a dict of target to float", given)
    for name, weight in given.items():
        if name not in targets:
            raise ParameterError(
                f"loss_weights names the target {name!r}; the targets are {quoted(targets)}.{suggest(name, targets)}"
            )
        check_number(f"loss_weights[{name!r}]", owner, weight, least=0, open_ends=True)


class Several(BaseLLM):
    """What :class:`~llmfit.LLMEstimator` does where it has several targets."""

    _targets: Any
    estimators_: dict[str, Any]
    answer_tokens_: dict[str, int]
    class_weight: Any
    generation: Any
    loss_weights: Any

    # What base.py asks for ----------------------------------------------------------------------

    def _wanted_head(self) -> Any:
        return auto_head(self._targets.values()) if isinstance(self.head, str) and self.head == "auto" else self.head

    def _own_params(self, chosen: type[BaseLLM], auto: str) -> dict[str, Any]:
        """Take the parameters that the chosen estimator has; `auto` is what "auto" means for its head."""
        params = self.get_params(deep=False)
        if isinstance(self.head, str) and self.head == "auto":
            params["head"] = auto
        return {name: value for name, value in params.items() if name in chosen._get_param_names()}

    def _for_target(self, name: str) -> Any:
        """Make the estimator of one target."""
        kinds = self._targets
        chosen = BY_KIND[kinds[name]]
        return chosen(**self._own_params(chosen, auto_head(kinds.values())) | {"target": {name: kinds[name]}})

    def _check(self) -> None:
        kinds = self._targets
        check_loss_weights(self.loss_weights, kinds, type(self).__name__)
        if self.class_weight is not None:
            raise ParameterError(
                "The 'class_weight' parameter has no meaning with several targets: a row has a class of each. Pass "
                "sample_weight to weigh rows, or set loss_weights to weigh targets."
            )
        words = resolve_head(self._wanted_head(), type(self).__name__, self._heads) is None
        for name, kind in kinds.items():
            if kind == "text" and not words:
                raise ParameterError(
                    f"The target {name!r} is text, which a linear head cannot answer. Set head='lm', or leave it out "
                    "of the targets."
                )
        if self.generation is not None and not (words and {"text", "number"} & set(kinds.values())):
            raise ParameterError("The 'generation' parameter has no meaning here: no target is generated.")
        before = vars(self).get("estimators_", {}) if self.warm_start else {}
        if (before and [*before] != [*kinds]) or any(type(before[n]) is not BY_KIND[kinds[n]] for n in before):
            raise DataError(
                f"warm_start goes on with the targets {quoted(before)} as they were. Got {quoted(kinds)}, or another "
                "kind of them, instead. Set warm_start=False to begin anew."
            )

    def _learn_answers(self, y: pd.DataFrame) -> None:
        before = vars(self).get("estimators_", {}) if self.warm_start else {}
        self.estimators_, self.answer_tokens_ = {}, {}
        for name in self._targets:
            inner = self._for_target(name)
            if name in before:
                vars(inner).update({**vars(before[name]), **vars(inner)})
            inner._check()
            inner._learn_answers(y[name])
            inner._name_target(y[name])
            self.estimators_[name] = inner

    def _name_target(self, y: pd.DataFrame) -> None:
        self.target_: Any = list(self._targets)

    def _learn_units(self, y: pd.DataFrame, weights: np.ndarray) -> None:
        for name, inner in self.estimators_.items():
            inner._learn_units(y[name], weights)

    def _check_truth(self, y: pd.DataFrame) -> None:
        for name, inner in self.estimators_.items():
            inner._check_truth(y[name])

    def _shares(self) -> tuple[float, ...]:
        return tuple(float((self.loss_weights or {}).get(name, 1.0)) for name in self._targets)

    def _head_task(self) -> tuple[Any, int]:
        from llmfit.answers import Part

        tasks = [inner._head_task() for inner in self.estimators_.values()]
        parts = tuple(
            Part(loss, outputs, outputs if loss == "sets" else 1, share)
            for (loss, outputs), share in zip(tasks, self._shares(), strict=True)
        )
        return parts, sum(part.outputs for part in parts)

    def _head_targets(self, y: pd.DataFrame) -> list[tuple[float, ...]]:
        columns = [inner._head_targets(y[name]) for name, inner in self.estimators_.items()]
        return [tuple(number for part in row for number in part) for row in zip(*columns, strict=True)]

    def _answer_texts(self, y: pd.DataFrame) -> list[Any]:
        columns = [inner._answer_texts(y[name]) for name, inner in self.estimators_.items()]
        return list(zip(*columns, strict=True))

    def _default_task(self) -> str:
        tasks = [inner._default_task() or f"Predict the {name}." for name, inner in self.estimators_.items()]
        return " Then p".join([tasks[0], *(task[1:] for task in tasks[1:])])

    def _reserve(self, encoder: Any, prompts: Any, answers: Sequence[tuple[str, ...]]) -> int:
        for k, (name, inner) in enumerate(self.estimators_.items()):
            cue = encoder.cue(prompts.turns[k].cue) if k else ()
            own = inner._reserve(encoder, prompts, [row[k] for row in answers])
            unended = not isinstance(inner, LLMClassifier)  # such an answer is closed where the next one follows
            self.answer_tokens_[name] = len(cue) + own + unended
        return sum(self.answer_tokens_.values())

    def _check_prompts(self, encoder: Any) -> None:
        for inner in self.estimators_.values():
            inner._prompts = self._prompts
            inner._check_prompts(encoder)

    def _hand_down(self) -> None:
        """Give the estimators of the targets what they share."""
        for inner in self.estimators_.values():
            vars(inner).update({name: getattr(self, name) for name in SHARED})

    # Prediction ---------------------------------------------------------------------------------

    def _no_answers(self) -> dict[str, Any]:
        return {name: inner._no_answers() for name, inner in self.estimators_.items()}

    def _read_head(self, outputs: np.ndarray) -> dict[str, Any]:
        ends = np.cumsum([inner._head_task()[1] for inner in self.estimators_.values()])
        parts = np.split(outputs, ends[:-1], axis=1)
        return {name: inner._read_head(own) for (name, inner), own in zip(self.estimators_.items(), parts, strict=True)}

    def _in_words(self, base: Any, rows: Sequence[Any], later: int = 0) -> tuple[dict[str, Any], list[Ids]]:
        encoder, answers = self._prompts.encoder(base), {}
        rooms = list(self.answer_tokens_.values())
        for k, (name, inner) in enumerate(self.estimators_.items()):
            cue = encoder.cue(self._prompts.turns[k].cue) if k else ()
            rows = [_go_on(base, row, cue) for row in rows]
            behind = rooms[k + 1 :]
            answers[name], ids = inner._in_words(base, rows, sum(behind) + 1 if behind else 0)
            rows = [_go_on(base, row, (*own, encoder.end_id)) for row, own in zip(rows, ids, strict=True)]
        return answers, [row.said if base.start_ids else row.prompt for row in rows]

    def predict(self, X: Any) -> Any:
        """Answer every row: a frame with a column for each target."""
        table, frame = self._read_rows(X)
        answers = self._respond(frame)
        named = replace(table, as_array=False)
        columns = [inner._column(named, answers[name]) for name, inner in self.estimators_.items()]
        answered = pd.concat(columns, axis=1)  # each of its dtype; pandas would choose one anew for arrays of objects
        return answered.to_numpy() if table.as_array else answered

    def predict_log_proba(self, X: Any) -> Any:
        """Predict the logarithms of the classes' probabilities, for each target that is classes."""
        answers = self._respond(self._read_rows(X)[1])
        return {name: answers[name] for name, inner in self.estimators_.items() if isinstance(inner, LLMClassifier)}

    def predict_proba(self, X: Any) -> Any:
        """Predict the classes' probabilities, for each target that is classes."""
        return {name: np.exp(own) for name, own in Several.predict_log_proba(self, X).items()}

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean of the targets' scores, weighed as their losses."""
        check_loss_weights(self.loss_weights, self._targets, type(self).__name__)  # set anew since the fit, perhaps
        table, frame = self._read_rows(X)
        target, answers = read_target(self, table, y), self._respond(frame)
        scores = [
            inner._score(table, target[name], answers[name], sample_weight) for name, inner in self.estimators_.items()
        ]
        return float(np.average(scores, weights=self._shares()))

    def evaluate(self, X: Any, y: Any = None) -> dict[str, Any]:
        """Measure the answers to each target."""
        table, frame = self._read_rows(X)
        target, answers, base = read_target(self, table, y), self._respond(frame), self._fitted_base()
        known = self._known_rows(base, frame, target) if self._head is None else {}
        found = {
            name: inner._measure(target[name], answers[name], base=base, rows=known.get(name))
            for name, inner in self.estimators_.items()
        }
        self._evaluated(
            {f"{name}: {key}": value for name, own in found.items() for key, value in own.items()}, len(target)
        )
        return found

    def _known_rows(self, base: Any, frame: pd.DataFrame, y: pd.DataFrame) -> dict[str, list[Any]]:
        """Encode each target's true answers, behind the true ones before."""
        texts = self._answer_texts(y)
        rows = self._prompts.encode(base, frame, texts)
        pieces = self._prompts.pieces(self._prompts.encoder(base), texts)
        return {
            name: [
                _go_on(base, row, sum(own[: 2 * k + 1], ()))._replace(completion=own[2 * k + 1], shares=None)
                for row, own in zip(rows, pieces, strict=True)
            ]
            for k, name in enumerate(self.estimators_)
        }


def _go_on(base: Any, row: Any, tokens: Ids) -> Any:
    """Put tokens before the answer to come: behind the prompt, or in the mouth of the decoder beside an encoder."""
    return row._replace(said=row.said + tokens) if base.start_ids else row._replace(prompt=row.prompt + tokens)


BY_KIND: dict[str, type[BaseLLM]] = {
    "category": LLMClassifier,
    "binary": LLMClassifier,
    "set": LLMClassifier,
    "number": LLMRegressor,
    "text": LLMGenerator,
}
