"""One estimator for any target: it chooses classification, regression or generation from the target's kind."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pandas as pd
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from llmfit.estimators.base import BaseLLM, all_or_nothing
from llmfit.estimators.classifier import LLMClassifier
from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.reading import read_fit
from llmfit.estimators.regressor import LLMRegressor
from llmfit.estimators.targets import indicator_form, one_column
from llmfit.exceptions import ParameterError, check_keys
from llmfit.features import infer_kind, resolve_target
from llmfit.params import Nested

__all__ = ["LLMEstimator"]

BY_KIND: dict[str, type[BaseLLM]] = {
    "category": LLMClassifier,
    "binary": LLMClassifier,
    "set": LLMClassifier,
    "number": LLMRegressor,
    "text": LLMGenerator,
}
WORDS: dict[type[BaseLLM], str] = {LLMClassifier: "classes", LLMRegressor: "numbers", LLMGenerator: "text"}
OWN = ("class_weight", "generation")  # parameters that not all of them have


def _is_classifier(self: LLMEstimator) -> bool:
    if not hasattr(self, "estimator_"):
        return True  # not known yet: check_is_fitted speaks first
    return isinstance(self.estimator_, LLMClassifier)


class LLMEstimator(BaseLLM):
    """Answer the rows of a frame with a language model: classes, numbers or text, as the target wants it.

    Words and whole numbers that repeat are classes, lists are several classes a row, other numbers are numbers and
    other words text; ``target={"column": "text"}`` (or "category", "binary", "set", "number") decides it.

    Parameters
    ----------
    head : "auto", "lm", "linear" or dict, default="auto"
        As in :class:`LLMClassifier`; "auto" answers in words, but for numbers and several classes a row.
    class_weight
        As in :class:`LLMClassifier`; refused where the target is text or numbers.
    generation
        As in :class:`LLMGenerator`; refused where the target is classes.
    base_model, features, target, template, adapter, quantization, epochs, learning_rate, batch_size, batch_tokens, \
gradient_checkpointing, max_length, truncation, warmup, schedule, optimizer, weight_decay, max_grad_norm, \
validation_fraction, early_stopping, device, dtype, random_state, warm_start, checkpoint_dir, callbacks, verbose
        As in :class:`LLMClassifier`.

    Attributes
    ----------
    estimator_ : LLMClassifier, LLMRegressor or LLMGenerator
        The fitted estimator that answers. Its attributes can be read here too.

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
        X, y, sample_weight, eval_set
            As for :meth:`LLMClassifier.fit`.

        Returns
        -------
        self
        """
        with all_or_nothing(self):
            chosen = self._choose(X, y)
            before = vars(self).get("estimator_")
            if self.warm_start and type(before) is type(chosen):
                vars(chosen).update({**vars(before), **vars(chosen)})
            self.estimator_ = chosen.fit(X, y, sample_weight=sample_weight, eval_set=eval_set)
            for name in ("n_features_in_", "feature_names_in_"):
                if hasattr(chosen, name):
                    setattr(self, name, getattr(chosen, name))
        return self

    def set_params(self, **params: Any) -> Any:
        """Set parameters, of the fitted estimator inside as well. See :meth:`LLMClassifier.set_params`.

        Returns
        -------
        self
        """
        super().set_params(**params)
        if "estimator_" in vars(self):
            head = "lm" if self.estimator_._head is None else "linear"
            self.estimator_.set_params(**self._own_params(type(self.estimator_), head))
        return self

    def _own_params(self, chosen: type[BaseLLM], auto: str) -> dict[str, Any]:
        """Take the parameters that the chosen estimator has; `auto` is what "auto" means for its head."""
        params = self.get_params(deep=False)
        if isinstance(self.head, str) and self.head == "auto":
            params["head"] = auto
        return {name: value for name, value in params.items() if name in chosen._get_param_names()}

    def _one_column(self, y: Any, *, fitting: bool = False) -> Any:
        return one_column(y, indicator_form(y))

    def _choose(self, X: Any, y: Any) -> BaseLLM:
        """Make the estimator that the target's kind wants, with the parameters of this one."""
        name, kind = resolve_target(self.target, type(self).__name__)
        _, target = read_fit(self, X, y, self._default_target)
        kind = kind or infer_kind(target)
        chosen = BY_KIND[kind]
        for parameter in OWN:
            if parameter not in chosen._get_param_names() and getattr(self, parameter) is not None:
                raise ParameterError(f"The {parameter!r} parameter has no meaning here: the target is {WORDS[chosen]}.")
        auto = "linear" if kind in ("set", "number") else "lm"
        return chosen(**self._own_params(chosen, auto) | {"target": {name: kind} if name and kind == "set" else name})

    def predict(self, X: Any) -> Any:
        """Answer every row. See :meth:`LLMClassifier.predict` and :meth:`LLMGenerator.predict`.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        Series of shape (n_rows,), or ndarray where `X` is an array
        """
        check_is_fitted(self)
        return self.estimator_.predict(X)

    @available_if(_is_classifier)
    def predict_proba(self, X: Any) -> Any:
        """Predict the probability of every class; there where the target is classes.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        ndarray of shape (n_rows, n_classes)
        """
        check_is_fitted(self)
        return self.estimator_.predict_proba(X)

    @available_if(_is_classifier)
    def predict_log_proba(self, X: Any) -> Any:
        """Predict the logarithm of every class's probability; there where the target is classes.

        Parameters
        ----------
        X : as for `fit`, with or without the target column

        Returns
        -------
        ndarray of shape (n_rows, n_classes), in nats
        """
        check_is_fitted(self)
        return self.estimator_.predict_log_proba(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of classes, R squared of numbers, or share of texts that are exactly the true ones.

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
        return float(self.estimator_.score(X, y, sample_weight))

    def evaluate(self, X: Any, y: Any = None, **options: Any) -> dict[str, Any]:
        """Measure the answers. See :meth:`LLMClassifier.evaluate` and :meth:`LLMGenerator.evaluate`.

        Parameters
        ----------
        X, y, **options
            As there.

        Returns
        -------
        dict
        """
        check_is_fitted(self)
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
        chosen = self.estimator_ if hasattr(self, "estimator_") else self._choose(X, y)
        return chosen.preview(X, n, y)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_") and not name.startswith("_") and "estimator_" in vars(self):
            return getattr(self.estimator_, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __sklearn_is_fitted__(self) -> bool:
        return "estimator_" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        kinds = list(self.target.values()) if isinstance(self.target, dict) else []
        fitted = vars(self).get("estimator_")
        if isinstance(fitted, LLMClassifier) or (fitted is None and kinds in (["category"], ["binary"])):
            return LLMClassifier().__sklearn_tags__()
        if isinstance(fitted, LLMRegressor) or (fitted is None and kinds == ["number"]):
            return LLMRegressor().__sklearn_tags__()
        return tags
