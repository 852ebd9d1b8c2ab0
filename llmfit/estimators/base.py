"""The mechanism that all estimators share: fit, the lent model, preview, save.

Takes frames; keeps what was learned: prompts, the adapter's tensors, the history. A concrete estimator says how targets
become answers (:class:`~llmfit.estimators.hooks.Hooks`) and how the model answers (`predict`).
"""

from __future__ import annotations

import numbers
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from llmfit.batching import PAD_STEP
from llmfit.estimators.exporting import Exported
from llmfit.estimators.filing import Filed
from llmfit.estimators.hooks import Hooks
from llmfit.estimators.nested import NESTED
from llmfit.estimators.reading import naming, read_eval_set, read_fit, read_table, read_weights
from llmfit.exceptions import LLMFitWarning, ModelLoadError, ParameterError, warn
from llmfit.files import kinds_of
from llmfit.frames import Table
from llmfit.params import Nested, NestedParams

__all__ = ["BaseLLM", "all_or_nothing"]


@contextmanager
def all_or_nothing(estimator: Any, *, undone: bool = False) -> Iterator[None]:
    """Undo what was set on an estimator where the block fails, or in any case: a failed fit leaves the one before."""
    kept = dict(vars(estimator))
    try:
        yield
    except BaseException:
        undone = True
        raise
    finally:
        if undone:
            vars(estimator).clear()
            vars(estimator).update(kept)


class BaseLLM(Exported, Filed, NestedParams, Hooks, BaseEstimator):
    """Base of the estimators. See :class:`llmfit.LLMClassifier` for the parameters."""

    _nested: ClassVar[dict[str, Nested]] = NESTED
    _default_target: ClassVar[str] = "label"
    _heads: ClassVar[tuple[str, ...]] = ("lm", "linear")
    _head: Any = None  # the head of the fit; None where it answers in words

    # Parameters, stored untouched by __init__; attributes of a fit end in an underscore.
    base_model: Any
    features: Any
    adapter: Any
    quantization: Any
    head: Any
    max_length: Any
    random_state: Any
    truncation: Any
    validation_fraction: Any
    device: Any
    dtype: Any
    warm_start: Any
    checkpoint_dir: Any
    verbose: Any
    history_: pd.DataFrame
    evaluation_: dict[str, Any]

    def _store(self, given: dict[str, Any]) -> None:
        """Store the parameters of ``__init__`` untouched."""
        for name in self._get_param_names():
            setattr(self, name, given[name])

    # fit ----------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None, eval_set: Any = None) -> Any:
        """Learn to answer the rows of a frame.

        Parameters
        ----------
        X : pandas or polars DataFrame, Series, list of str or of dict, datasets.Dataset or ndarray
            ``n_rows`` rows; with the target column inside, or beside `y`.
        y : Series, list or ndarray of shape (n_rows,), default=None
            The target. None takes the column named by the `target` parameter.
        sample_weight : array-like of shape (n_rows,), default=None
            Weight of each row's loss.
        eval_set : DataFrame or tuple (X, y), default=None
            Rows for the validation loss, in place of `validation_fraction`.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If a parameter cannot be used.
        DataError
            If the data cannot: the sentence names the column or row.
        ModelLoadError
            If the base model cannot be loaded.
        TrainingError
            If the loss or the gradient is not finite.
        OutOfMemoryError
            If not even one row fits in memory.
        """
        with all_or_nothing(self):
            from llmfit.estimators.fitting import train_alone

            return train_alone(self._fitting(X, y, sample_weight, eval_set))

    def _fitting(self, X: Any, y: Any, sample_weight: Any, eval_set: Any) -> Generator[Any, Any, Any]:
        """Fit, but for the training: yield what is to be trained, take what was; return self."""
        from llmfit.estimators.fitting import Fitted, join_history

        jobs = [self._prepare(X, y, sample_weight, eval_set)]
        base, goes_on = jobs[0].base, jobs[0].before is not None
        fitted: Fitted = yield jobs.pop()  # while it waits, the rows are the trainer's alone
        self.memory_footprint_ = base.memory_footprint
        self._adapter, self._tensors = fitted.adapter, fitted.tensors
        self.trainable_parameters_, self.best_epoch_ = fitted.trainable, fitted.best_epoch
        self.learning_rate_, self.batch_size_ = fitted.settings.learning_rate, fitted.settings.batch_size
        earlier = self.history_ if goes_on else None
        if earlier is not None and len(earlier) and fitted.best_epoch is not None:
            self.best_epoch_ = fitted.best_epoch + int(earlier["epoch"].iloc[-1])
        self.history_ = join_history(earlier, fitted.history)
        return self

    def _prepare(self, X: Any, y: Any, sample_weight: Any, eval_set: Any) -> Any:
        """Read rows, learn all but weights from them, and say what is to be trained."""
        from llmfit.estimators.checks import check_parameters
        from llmfit.estimators.fitting import Job

        checked = check_parameters(self, validated=eval_set is not None)
        self._check()
        if not checked.trains and (sample_weight is not None or eval_set is not None):
            passed = "sample_weight" if sample_weight is not None else "eval_set"
            warn(LLMFitWarning(f"adapter=None trains nothing: {passed} has no effect."))
        before = self._tensors_to_continue(checked)
        table, target = read_fit(self, X, y, self._default_target)
        sample_weight = read_weights(table, sample_weight)
        base = self._load_base() if before is None else self._fitted_base()
        self._learn_answers(target)
        kept, held = self._split(checked, target, eval_set)
        self._learn(checked, base, table, target, kept)
        weights = self._all_weights(target, sample_weight, kept)
        checked = self._with_task(checked, target.iloc[list(kept)], weights[list(kept)])
        rows = self._encode_known(base, table, target, weights)
        validation = [rows[i] for i in held]
        if eval_set is not None:
            held_table, truth = read_eval_set(self, eval_set)
            with naming("eval_set"):
                self._check_truth(truth)
                validation = self._encode_known(base, held_table, truth)
        return Job(
            checked,
            base,
            [rows[i] for i in kept if rows[i].weight],
            [row for row in validation if row.weight],
            before=before,
            checkpoint_dir=self.checkpoint_dir,
            label=type(self).__name__ if self.verbose else "",
        )

    def _tensors_to_continue(self, checked: Any) -> dict[str, Any] | None:
        """With warm_start, the weights of the last fit; the adapter must be the one they belong to."""
        if not (self.warm_start and getattr(self, "_tensors", None)):
            return None
        heads = [replace(head, cache=None) if head is not None else None for head in (checked.head, self._head)]
        for part, now, then in (("adapter", checked.adapter, self._adapter), ("head", *heads)):
            if now != then:
                raise ParameterError(
                    f"warm_start continues the {part} of the last fit, {then!r}. Got {now!r} "
                    "instead. Set warm_start=False to begin anew."
                )
        return self._tensors

    def _learn(
        self, checked: Any, base: Any, table: Table, target: pd.Series, kept: Sequence[int] | None = None
    ) -> None:
        """Learn features, template and limits, few-shot examples from the rows at `kept` (None: all) only."""
        from llmfit.encoding import Limit
        from llmfit.estimators.heads import check_base, own_template
        from llmfit.estimators.prompts import learn_prompts, with_examples

        check_base(base, checked.head, self.base_model)
        self._head = checked.head
        config = own_template(base, checked.head, checked.template)
        self._name_target(target)
        limit = Limit(self._max_length(base, checked.adapter), self.truncation, apart=len(base.start_ids))
        prompts = learn_prompts(
            base,
            config,
            self.features,
            table.frame,
            self.target_,
            limit,
            owner=type(self).__name__,
            default_task=self._default_task(),
            shares=self._shares(),
        )
        answers, shown = self._answer_texts(target), list(range(len(target)) if kept is None else kept)
        prompts = with_examples(
            base,
            prompts,
            config,
            table.frame.iloc[shown],
            [answers[i] for i in shown],
            balanced=hasattr(self, "classes_"),
        )
        reserve = self._reserve(prompts.encoder(base), prompts, answers) if self._head is None else 0
        alike = hasattr(self, "classes_") or bool(prompts.turns)
        self._prompts = replace(prompts, limit=replace(limit, reserve=reserve, alike=alike))
        self.max_length_ = limit.max_length
        if self._head is None:
            self._check_prompts(prompts.encoder(base))
        self.base_model_ = {
            "name": str(self.base_model),
            "fingerprint": base.source.fingerprint,
            "kind": base.kind,
        }
        self.features_ = {feature.name: feature.kind for feature in prompts.features}
        self._columns = kinds_of(table.frame[list(self.features_)]) | kinds_of(
            pd.DataFrame(target).set_axis(np.atleast_1d(self.target_), axis=1)
        )
        if not table.as_array:
            self.n_features_in_ = len(self.features_)
            self.feature_names_in_ = np.array(list(self.features_), dtype=object)

    def _max_length(self, base: Any, adapter: Any) -> int:
        """Resolve `max_length`: what the adapter leaves of the model's context, and never more than that."""
        taken = adapter.virtual_tokens if adapter else 0
        most = self._context(base, adapter)
        if most < 2:
            raise ParameterError(
                f"The adapter {adapter.type!r} takes {taken} tokens of a context of {base.context_length}, which "
                "leaves no room for a prompt. Lower num_virtual_tokens."
            )
        if self.max_length is not None and self.max_length > most:
            less = f" less the {taken} virtual tokens of {adapter.type!r}, in steps of {PAD_STEP}" if taken else ""
            raise ParameterError(
                f"The 'max_length' parameter of {type(self).__name__} must be at most {most}, the "
                f"context length of {str(self.base_model)!r}{less}. Got {self.max_length} instead."
            )
        return int(self.max_length or most)

    def _context(self, base: Any, adapter: Any) -> int:
        """Tokens of context that an adapter leaves for rows, which are padded in whole steps."""
        taken = adapter.virtual_tokens if adapter else 0
        return int(base.context_length - -(-taken // PAD_STEP) * PAD_STEP)

    def _split(self, checked: Any, target: Any, eval_set: Any) -> tuple[Sequence[int], Sequence[int]]:
        """Part the positions of rows to train on from those held out for validation."""
        from llmfit.estimators.fitting import split_rows

        if eval_set is not None or not self.validation_fraction or not checked.trains:
            return range(len(target)), ()
        classes = target if hasattr(self, "classes_") else None
        return split_rows(len(target), self.validation_fraction, classes, checked.seed)

    def _all_weights(self, target: pd.Series, sample_weight: Any, kept: Sequence[int]) -> np.ndarray:
        """Weigh every row: the user's weights, times the estimator's for the rows that are trained on."""
        weights = np.ones(len(target)) if sample_weight is None else sample_weight.copy()
        own = self._row_weights(target.iloc[list(kept)], sample_weight)
        if own is not None:
            weights[list(kept)] *= own
        return weights

    def _encode_known(self, base: Any, table: Table, target: Any, weights: Any = None) -> list[Any]:
        """Encode rows with their answers."""
        frame = self._prompts.select(table.frame, type(self).__name__)
        weights = None if weights is None else weights.tolist()
        if self._head is None:
            return self._prompts.encode(base, frame, self._answer_texts(target), weights)
        rows = self._prompts.encode(base, frame, None, weights)
        return [row._replace(target=own) for row, own in zip(rows, self._head_targets(target), strict=True)]

    # prediction ---------------------------------------------------------------------------------

    def _lend(self, base: Any, longest: int) -> Any:
        """Lend the base model with the fitted adapter in it, for rows of so many tokens."""
        if isinstance(self.random_state, numbers.Integral):
            seed = int(self.random_state)
        else:  # a RandomState is not moved on by predicting; None draws other answers every time
            seed = int(check_random_state(deepcopy(self.random_state)).randint(2**31 - 1))
        return base.attach(self._adapter, self._tensors or None, seed=seed, longest=longest)

    def _load_base(self) -> Any:
        from llmfit.base_model import load_base_model

        return load_base_model(self.base_model, device=self.device, dtype=self.dtype, quantization=self.quantization)

    def _fitted_base(self) -> Any:
        base = self._load_base()
        self._check_fingerprint(base)
        return base

    def _check_fingerprint(self, base: Any) -> None:
        if base.source.fingerprint != self.base_model_["fingerprint"]:
            raise ModelLoadError(
                f"The base model {self.base_model!r} is not the one that was fitted: its fingerprint is "
                f"{base.source.fingerprint}, not {self.base_model_['fingerprint']}."
            )
        if (then := self.base_model_.get("kind", base.kind)) != base.kind:
            raise ModelLoadError(f"The base model was read as {then} by this fit, and is {base.kind} now. Fit again.")

    def _read_rows(self, X: Any) -> tuple[Table, pd.DataFrame]:
        """Read rows to answer: the table, for the form of the answers, and its feature columns."""
        check_is_fitted(self)
        table = read_table(self, X)
        return table, self._prompts.select(table.frame, type(self).__name__)

    def _bar(self, total: int, what: str) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=total, desc=what, unit="row", disable=not self.verbose, delay=2.0)

    def _evaluated(self, result: dict[str, Any], n_rows: int) -> dict[str, Any]:
        """Remember the plain numbers of an evaluation: the model card tells them."""
        numbers_alone = {name: float(value) for name, value in result.items() if isinstance(value, numbers.Real)}
        self.evaluation_ = {"rows": n_rows, **numbers_alone}
        return result

    # the rest -----------------------------------------------------------------------------------

    def preview(self, X: Any, n: int = 5, y: Any = None) -> pd.DataFrame:
        """Show how rows become prompts, before or after `fit`; nothing is trained.

        Parameters
        ----------
        X : as for `fit`
        n : int, default=5
            Rows to show.
        y : array-like of shape (n_rows,), default=None
            The target, where it is no column of `X`. After `fit` it may be missing: the completion stays empty.

        Returns
        -------
        pandas.DataFrame of shape (min(n, n_rows), 6)
            prompt, completion, prompt_tokens, completion_tokens, loss_tokens (the tokens that carry loss, one by
            one) and cut (characters that truncation took).
        """
        from llmfit.estimators.preview import preview

        return preview(self, X, n, y)

    def save(self, path: Any) -> None:
        """Save the fitted estimator to a folder of JSON and safetensors; no pickle is written.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, is empty, or holds a saved estimator, which is replaced as a whole.

        Raises
        ------
        DataError
            If the folder holds something else.
        NotFittedError
            If there is nothing to save yet.
        """
        from llmfit.estimators.saving import save

        check_is_fitted(self)
        save(self, path)

    def to_config(self) -> dict[str, Any]:
        """Write the class and the parameters that differ from their defaults as plain values.

        Returns
        -------
        dict of str to any
            What YAML and JSON can hold, and :func:`llmfit.from_config` reads back; specs are dicts.

        Raises
        ------
        ParameterError
            If a parameter has no plain form, such as callbacks.
        """
        from llmfit.estimators.describing import to_config

        return to_config(self)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "history_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags
