"""One estimator for any target, or several: it chooses classification, regression or generation from their kinds."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any, ClassVar

import pandas as pd
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from llmfit.estimators.base import BaseLLM, all_or_nothing
from llmfit.estimators.classifier import LLMClassifier
from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.reading import read_fit
from llmfit.estimators.regressor import LLMRegressor
from llmfit.estimators.several import BY_KIND, SHARED, Several, auto_head, check_loss_weights
from llmfit.estimators.targets import indicator_form, one_column
from llmfit.exceptions import ParameterError, check_keys
from llmfit.features import infer_kind, resolve_targets
from llmfit.frames import has_names, to_table
from llmfit.params import Nested

__all__ = ["LLMEstimator"]

WORDS: dict[type[BaseLLM], str] = {LLMClassifier: "classes", LLMRegressor: "numbers", LLMGenerator: "text"}
SEVERAL = "several targets"
OWN = ("class_weight", "generation")  # parameters that not all of them have


def _is_classifier(self: LLMEstimator) -> bool:
    if not self.__sklearn_is_fitted__():
        return True  # not known yet: check_is_fitted speaks first
    return any(isinstance(inner, LLMClassifier) for inner in self._inner())


def _columns_of(y: Any) -> dict[str, str | None]:
    """Name the targets that y alone names: the columns of a frame of several, unless it says which labels a row has."""
    if not has_names(y) or indicator_form(y) is not None:
        return {}
    columns = list(to_table(y).frame.columns)
    return dict.fromkeys(columns) if len(columns) > 1 else {}


class LLMEstimator(Several):
    """Answer the rows of a frame with a language model: classes, numbers or text, as the target wants it, or targets.

    Words and whole numbers that repeat are classes, lists are several classes a row, other numbers are numbers and
    other words text; ``target={"column": "text"}`` (or "category", "binary", "set", "number") decides it.

    Several targets are one fit of one adapter. In words they are answered left to right, in one sequence a row: each
    answer is given behind the prompt and the answers before it. With ``head="linear"`` one layer answers them side by
    side.

    Parameters
    ----------
    target : None, str, list of str or dict of str to kind, default=None
        The columns to predict. None where `y` is passed, or a frame of several columns (of zeros and ones, it is one
        target: several labels a row).
    head : "auto", "lm", "linear" or dict, default="auto"
        As in :class:`LLMClassifier`; "auto" answers in words, but for numbers alone and several classes a row.
    loss_weights : None or dict of target to float, default=None
        Of several targets: what each one's loss weighs, and its part of the score; 1 where none is given. In words, it
        is the weight of each of an answer's tokens: long answers weigh more than short ones.
    class_weight
        As in :class:`LLMClassifier`; refused where the target is text or numbers, or there are several.
    generation
        As in :class:`LLMGenerator`; refused where no answer is generated.
    base_model, features, template, adapter, quantization, epochs, learning_rate, batch_size, batch_tokens, \
gradient_checkpointing, max_length, truncation, warmup, schedule, optimizer, weight_decay, max_grad_norm, \
validation_fraction, early_stopping, device, dtype, random_state, warm_start, checkpoint_dir, callbacks, verbose
        As in :class:`LLMClassifier`.

    Attributes
    ----------
    estimator_ : LLMClassifier, LLMRegressor or LLMGenerator
        The fitted estimator that answers one target. Its attributes can be read here too.
    estimators_ : dict of str to LLMClassifier, LLMRegressor or LLMGenerator
        Of several targets: what was learned of each, such as ``classes_``; they answer together, not alone.
    answer_tokens_ : dict of str to int
        Of several targets in words: tokens of a row kept free for each answer, and what asks for it.

    Examples
    --------
    >>> from llmfit import LLMEstimator
    >>> from llmfit.datasets import load_book_reviews
    >>> model = LLMEstimator(target="score", epochs=1, random_state=0, verbose=0)
    >>> model.fit(load_book_reviews()[:40]).estimator_.classes_
    array([1, 2, 3, 4, 5])
    """

    _nested: ClassVar[dict[str, Nested]] = LLMGenerator._nested
    estimator_: Any

    def __init__(
        self,
        base_model: Any = "smollm2",
        *,
        features: Any = None,
        target: Any = None,
        template: Any = None,
        adapter: Any = "lora",
        quantization: Any = None,
        head: Any = "auto",
        epochs: int = 3,
        learning_rate: float | str = "auto",
        batch_size: int | str = "auto",
        batch_tokens: int | str = "auto",
        gradient_checkpointing: bool = False,
        max_length: int | None = None,
        truncation: str = "error",
        warmup: float = 0.1,
        schedule: str = "cosine",
        optimizer: Any = "adamw",
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        validation_fraction: float = 0.0,
        early_stopping: Any = None,
        loss_weights: Any = None,
        class_weight: Any = None,
        generation: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        random_state: Any = None,
        warm_start: bool = False,
        checkpoint_dir: Any = None,
        callbacks: Any = None,
        verbose: int = 1,
    ) -> None:
        self._store(locals())

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None, eval_set: Any = None) -> Any:
        """Choose an estimator from the target's kind, and fit it. See :meth:`LLMClassifier.fit`.

        Parameters
        ----------
        X, sample_weight, eval_set
            As for :meth:`LLMClassifier.fit`.
        y : as for :meth:`LLMClassifier.fit`, or DataFrame of shape (n_rows, n_targets)

        Returns
        -------
        self
        """
        from llmfit.estimators.fitting import train_alone

        with all_or_nothing(self):
            chosen = self._begin(X, y)
            if chosen is None:
                train_alone(self._fit_several(X, y, sample_weight, eval_set))
            else:
                self._adopt(chosen.fit(X, y, sample_weight=sample_weight, eval_set=eval_set))
        return self

    def _fitting(self, X: Any, y: Any, sample_weight: Any, eval_set: Any) -> Generator[Any, Any, Any]:
        chosen = self._begin(X, y)
        if chosen is None:
            yield from self._fit_several(X, y, sample_weight, eval_set)
        else:
            self._adopt((yield from chosen._fitting(X, y, sample_weight, eval_set)))
        return self

    def _begin(self, X: Any, y: Any) -> Any:
        """Choose the estimator to fit, with what it may go on from; None where this one is it."""
        before = vars(self).get("estimator_")
        chosen = self._choose(X, y)
        self._check_continued(chosen)
        if chosen is None:
            if before is not None:
                del self.estimator_
            return None
        self._forget_several()
        if self.warm_start and type(before) is type(chosen):
            vars(chosen).update({**vars(before), **vars(chosen)})
        return chosen

    def _fit_several(self, X: Any, y: Any, sample_weight: Any, eval_set: Any) -> Generator[Any, Any, None]:
        yield from super()._fitting(X, y, sample_weight, eval_set)
        self._hand_down()

    def _adopt(self, fitted: BaseLLM) -> None:
        """Take the estimator that answers one target, and what scikit-learn looks for in this one."""
        self.estimator_ = fitted
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))

    def _kinds_before(self) -> dict[str, str]:
        """Kinds of the targets of the last fit, with warm_start: few rows more must not make them others."""
        fitted = vars(self)
        if not self.warm_start or not self.__sklearn_is_fitted__():
            return {}
        if "estimator_" not in fitted:
            return dict(self._targets)
        inner = fitted["estimator_"]
        several = getattr(inner, "_form", None) is not None
        kind = "set" if several else next(kind for kind, cls in BY_KIND.items() if cls is type(inner))
        return {inner.target_: kind}

    def _check_continued(self, chosen: BaseLLM | None) -> None:
        """Refuse to go on from the weights of a fit that answered otherwise; they would be lost."""
        before = vars(self).get("estimator_", self)
        if not (self.warm_start and vars(before).get("_tensors")):
            return
        then, now = WORDS.get(type(before), SEVERAL), SEVERAL if chosen is None else WORDS[type(chosen)]
        if then != now:
            raise ParameterError(
                f"warm_start goes on from a fit of {then}. Got {now} instead. Set warm_start=False to begin anew."
            )

    def _forget_several(self) -> None:
        """Drop what a fit of several targets has left here: one target's estimator has its own."""
        if "estimators_" in vars(self):
            for name in [name for name in vars(self) if name.endswith("_") or name in SHARED]:
                delattr(self, name)

    def set_params(self, **params: Any) -> Any:
        """Set parameters, of the fitted estimator inside as well. See :meth:`LLMClassifier.set_params`.

        Returns
        -------
        self
        """
        super().set_params(**params)
        for inner in self._inner():
            own = self._own_params(type(inner), "lm" if inner._head is None else "linear")
            inner.set_params(**own | ({"target": inner.target} if "estimators_" in vars(self) else {}))
        return self

    def _inner(self) -> list[Any]:
        """List the fitted estimators inside."""
        fitted = vars(self)
        return [fitted["estimator_"]] if "estimator_" in fitted else list(fitted.get("estimators_", {}).values())

    def _one_column(self, y: Any, *, fitting: bool = False) -> Any:
        return one_column(y, indicator_form(y))

    def _choose(self, X: Any, y: Any) -> BaseLLM | None:
        """Make the estimator that the target's kind wants, with the parameters of this one; None for several."""
        named, before = resolve_targets(self.target, type(self).__name__) or _columns_of(y), self._kinds_before()
        self._targets = dict(named) if len(named) > 1 else None
        _, target = read_fit(self, X, y, self._default_target)
        if self._targets is not None:
            self._targets = {n: kind or before.get(n) or infer_kind(target[n]) for n, kind in named.items()}
            return None
        check_loss_weights(self.loss_weights, [target.name], type(self).__name__)
        name, kind = next(iter(named.items()), (None, None))
        kind = kind or (before.get(name) if name else next(iter(before.values()), None)) or infer_kind(target)
        chosen = BY_KIND[kind]
        for parameter in OWN:
            if parameter not in chosen._get_param_names() and getattr(self, parameter) is not None:
                raise ParameterError(f"The {parameter!r} parameter has no meaning here: the target is {WORDS[chosen]}.")
        own = self._own_params(chosen, auto_head([kind]))
        declared = name and (named[name] or kind == "set")  # "binary" is a promise, which the chosen one checks
        return chosen(**own | {"target": {name: kind} if declared else name})

    def predict(self, X: Any) -> Any:
        """Answer every row. See :meth:`LLMClassifier.predict` and :meth:`LLMGenerator.predict`.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        Series of shape (n_rows,), or ndarray where `X` is an array
            Of several targets, a DataFrame of shape (n_rows, n_targets), its columns in their order.
        """
        check_is_fitted(self)
        return super().predict(X) if self._targets else self.estimator_.predict(X)

    @available_if(_is_classifier)
    def predict_proba(self, X: Any) -> Any:
        """Predict the probability of every class; there where the target is classes.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        ndarray of shape (n_rows, n_classes)
            Of several targets, a dict of such arrays, of those that are classes.
        """
        check_is_fitted(self)
        return super().predict_proba(X) if self._targets else self.estimator_.predict_proba(X)

    @available_if(_is_classifier)
    def predict_log_proba(self, X: Any) -> Any:
        """Predict the logarithm of every class's probability; there where the target is classes.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        ndarray of shape (n_rows, n_classes), in nats
            Of several targets, a dict of such arrays, of those that are classes.
        """
        check_is_fitted(self)
        return super().predict_log_proba(X) if self._targets else self.estimator_.predict_log_proba(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of classes, R squared of numbers, or share of texts that are exactly the true ones.

        Of several targets, the mean of their scores, weighed by `loss_weights`.

        Parameters
        ----------
        X, y, sample_weight
            As for :meth:`LLMClassifier.score`.

        Returns
        -------
        float
            At most 1.
        """
        check_is_fitted(self)
        return (
            super().score(X, y, sample_weight) if self._targets else float(self.estimator_.score(X, y, sample_weight))
        )

    def evaluate(self, X: Any, y: Any = None, **options: Any) -> dict[str, Any]:
        """Measure the answers. See :meth:`LLMClassifier.evaluate` and :meth:`LLMGenerator.evaluate`.

        Parameters
        ----------
        X, y, **options
            As there.

        Returns
        -------
        dict
            Of several targets, a dict for each of them; there are no options then.
        """
        check_is_fitted(self)
        if self._targets:
            check_keys("evaluate of several targets", options, [])
            return super().evaluate(X, y)
        known = [*inspect.signature(self.estimator_.evaluate).parameters][2:]
        check_keys(f"evaluate of {type(self.estimator_).__name__}", options, known)
        return dict(self.estimator_.evaluate(X, y, **options))

    def preview(self, X: Any, n: int = 5, y: Any = None) -> pd.DataFrame:
        """Show how rows become prompts. See :meth:`LLMClassifier.preview`.

        Parameters
        ----------
        X, n, y
            As there.

        Returns
        -------
        DataFrame
        """
        if self.__sklearn_is_fitted__():
            return super().preview(X, n, y) if self._targets else self.estimator_.preview(X, n, y)
        with all_or_nothing(self, undone=True):
            chosen = self._choose(X, y)
            return super().preview(X, n, y) if chosen is None else chosen.preview(X, n, y)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_") and not name.startswith("_") and "estimator_" in vars(self):
            return getattr(self.estimator_, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __sklearn_is_fitted__(self) -> bool:
        return "estimator_" in vars(self) or "history_" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        kinds = list(self.target.values()) if isinstance(self.target, dict) else []
        fitted = vars(self).get("estimator_")
        if self._targets or len(kinds) > 1 or (isinstance(self.target, list | tuple) and len(self.target) > 1):
            tags.target_tags.multi_output = True
            return tags
        if isinstance(fitted, LLMClassifier) or (fitted is None and kinds in (["category"], ["binary"])):
            return LLMClassifier().__sklearn_tags__()
        if isinstance(fitted, LLMRegressor) or (fitted is None and kinds == ["number"]):
            return LLMRegressor().__sklearn_tags__()
        return tags
