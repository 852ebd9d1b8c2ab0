"""One estimator for any target: it chooses classification or generation from the target's kind."""

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
from llmfit.exceptions import DataError, ParameterError, check_keys
from llmfit.features import infer_kind, resolve_target
from llmfit.params import Nested

__all__ = ["LLMEstimator"]

BY_KIND: dict[str, type[BaseLLM]] = {
    "category": LLMClassifier,
    "binary": LLMClassifier,
    "text": LLMGenerator,
}
OWN: dict[type[BaseLLM], tuple[str, str]] = {
    LLMClassifier: ("class_weight", "the target is text"),
    LLMGenerator: ("generation", "the target is classes"),
}


def _is_classifier(self: LLMEstimator) -> bool:
    if not hasattr(self, "estimator_"):
        return True  # not known yet: check_is_fitted speaks first
    return isinstance(self.estimator_, LLMClassifier)


class LLMEstimator(BaseLLM):
    """Answer the rows of a frame with a language model, classes or text as the target wants it.

    Words and whole numbers that repeat are classes, other words are text; ``target={"column": "text"}`` (or "category",
    "binary") decides it.

    Parameters
    ----------
    class_weight
        As in :class:`LLMClassifier`; refused where the target is text.
    generation
        As in :class:`LLMGenerator`; refused where the target is classes.
    base_model, features, target, template, adapter, quantization, head, epochs, learning_rate, batch_size, \
batch_tokens, gradient_checkpointing, max_length, truncation, warmup, schedule, optimizer, weight_decay, \
max_grad_norm, validation_fraction, early_stopping, device, dtype, random_state, warm_start, checkpoint_dir, \
callbacks, verbose
        As in :class:`LLMClassifier`.

    Attributes
    ----------
    estimator_ : LLMClassifier or LLMGenerator
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
        head: str = "lm",
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
            known = self.estimator_._get_param_names()
            own = {name: value for name, value in self.get_params(deep=False).items() if name in known}
            self.estimator_.set_params(**own)
        return self

    def _choose(self, X: Any, y: Any) -> BaseLLM:
        """Make the estimator that the target's kind wants, with the parameters of this one."""
        name, kind = resolve_target(self.target, type(self).__name__)
        _, target = read_fit(self, X, y, self._default_target)
        kind = kind or infer_kind(target)
        if kind not in BY_KIND:
            raise DataError(
                f"The target {target.name!r} holds numbers, and {type(self).__name__} answers with classes or text. "
                f"Say which with target={{{target.name!r}: 'category'}} or 'text'."
            )
        chosen = BY_KIND[kind]
        for other, (parameter, reason) in OWN.items():
            if other is not chosen and getattr(self, parameter) is not None:
                raise ParameterError(f"The {parameter!r} parameter has no meaning here: {reason}.")
        params = self.get_params(deep=False)
        known = chosen._get_param_names()
        return chosen(**{key: value for key, value in params.items() if key in known} | {"target": name})

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
        """Accuracy of classes, or share of texts that are exactly the true ones.

        Parameters
        ----------
        X, y, sample_weight
            As for :meth:`LLMClassifier.score`.

        Returns
        -------
        float
            Between 0 and 1.
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
        return tags
