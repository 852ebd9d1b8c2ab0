"""Regression: a head answers in the target's own units, or the model in words that are read as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from sklearn.base import RegressorMixin

from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.reading import read_target, read_weights
from llmfit.estimators.targets import holds_times
from llmfit.exceptions import DataError, DataWarning, ParameterError, counted, warn
from llmfit.features import label_text, row_name
from llmfit.heads import resolve_head

__all__ = ["LLMRegressor", "read_number"]

NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?([eE][+-]?\d+)?")


class LLMRegressor(RegressorMixin, LLMGenerator):
    """Predict a number for every row of a frame with a language model.

    By default a new linear layer answers, on the model's pooled last hidden states; ``head="lm"`` generates the number
    as text. An answer that is no number is nan, counted in a warning, and measured as if it were the mean of the
    fitted targets.

    Parameters
    ----------
    head : "linear", "lm" or dict, default="linear"
        As in :class:`LLMClassifier`.
    generation : None or dict, default=None
        As in :class:`LLMGenerator`; for ``head="lm"``.
    base_model, features, target, template, adapter, quantization, epochs, learning_rate, batch_size, batch_tokens, \
gradient_checkpointing, max_length, truncation, warmup, schedule, optimizer, weight_decay, max_grad_norm, \
validation_fraction, early_stopping, device, dtype, random_state, warm_start, checkpoint_dir, callbacks, verbose
        As in :class:`LLMClassifier`.

    Attributes
    ----------
    history_ : DataFrame
        One row an optimiser step; see :class:`LLMClassifier`. With a linear head, the loss is the squared error in
        units of `target_scale_` squared.
    target_mean_, target_scale_ : float
        Mean and standard deviation of the targets learned from, by the rows' weights: what the head answers with is
        ``target_mean_ + target_scale_ * output``.
    max_new_tokens_ : int
        With ``head="lm"``: longest answer that is generated, in tokens.
    features_, target_, feature_names_in_, n_features_in_, best_epoch_, trainable_parameters_, learning_rate_, \
batch_size_, max_length_, memory_footprint_
        As in :class:`LLMClassifier`.

    Examples
    --------
    >>> from llmfit import LLMRegressor
    >>> from llmfit.datasets import load_book_reviews
    >>> reviews = load_book_reviews()
    >>> model = LLMRegressor(target="score", adapter=None, epochs=1, random_state=0, verbose=0)
    >>> model.fit(reviews[:40]).predict(reviews[40:43]).shape
    (3,)
    """

    _default_target = "value"
    _heads: ClassVar[tuple[str, ...]] = ("lm", "linear")
    target_mean_: float
    target_scale_: float

    def __init__(
        self,
        base_model: Any = "smollm2",
        *,
        features: Any = None,
        target: Any = None,
        template: Any = None,
        adapter: Any = "lora",
        quantization: Any = None,
        head: Any = "linear",
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

    # What base.py asks for ----------------------------------------------------------------------

    def _check(self) -> None:
        super()._check()
        if self.generation is not None and resolve_head(self.head, type(self).__name__, self._heads) is not None:
            raise ParameterError("The 'generation' parameter has no meaning here: a linear head answers without words.")

    def _check_target_kind(self, kind: str | None) -> None:
        if kind not in (None, "number"):
            raise ParameterError(f"{type(self).__name__} predicts numbers; its target is declared as {kind!r}.")

    def _learn_answers(self, y: pd.Series) -> None:
        _numbers(y)

    def _check_truth(self, y: pd.Series) -> None:
        _numbers(y)

    def _learn_units(self, y: pd.Series, weights: np.ndarray) -> None:
        if self.warm_start and hasattr(self, "target_scale_"):
            return  # the head that goes on has learned in these units
        values = _numbers(y)
        weights = weights if weights.any() else np.ones(len(values))
        self.target_mean_ = float(np.average(values, weights=weights))
        spread = float(np.sqrt(np.average((values - self.target_mean_) ** 2, weights=weights)))
        rounding = 10 * np.finfo(float).eps * abs(self.target_mean_)  # of the mean of one number, many times
        self.target_scale_ = spread if spread > rounding else 1.0

    def _answer_texts(self, y: pd.Series) -> list[str]:
        values = np.asarray(y.to_numpy())  # answers are read as numbers: True is 1
        return [label_text(int(value) if isinstance(value, bool | np.bool_) else value) for value in values]

    def _head_task(self) -> tuple[str, int]:
        return "number", 1

    def _head_targets(self, y: pd.Series) -> list[tuple[float, ...]]:
        return [(value,) for value in ((_numbers(y) - self.target_mean_) / self.target_scale_).tolist()]

    def _default_task(self) -> str | None:
        return f"Predict the {self.target_}. Answer with a number."

    # Prediction ---------------------------------------------------------------------------------

    def predict(self, X: Any) -> Any:
        """Predict the number of every row.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        Series of shape (n_rows,), float
            With the index of `X`; an ndarray where `X` is an array.

        Warns
        -----
        DataWarning
            With ``head="lm"``, if answers are no number: they are nan.
        """
        table, frame = self._read_rows(X)
        return self._column(table, self._respond(frame))

    def _no_answers(self) -> np.ndarray:
        return np.empty(0)

    def _read_head(self, outputs: np.ndarray) -> np.ndarray:
        """Numbers in the target's units: (n_rows,)."""
        return np.asarray(self.target_mean_ + self.target_scale_ * outputs[:, 0])

    def _in_words(self, base: Any, rows: Sequence[Any], later: int = 0) -> tuple[Any, list[tuple[int, ...]]]:
        texts, ids = super()._in_words(base, rows, later)
        numbers = np.array([read_number(text) for text in texts])
        _warn_unread(texts, np.isnan(numbers), self.target_)
        return numbers, ids

    def _column(self, table: Any, answers: Any) -> Any:
        return table.answer(answers, self.target_, float)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """R squared of the predictions; an answer that is no number counts as the mean of the fitted targets.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True numbers; None takes the target column of `X`.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        float
            1 is best; 0 is as good as the mean of the true numbers.
        """
        table, frame = self._read_rows(X)
        return self._score(table, read_target(self, table, y), self._respond(frame), sample_weight)

    def _score(self, table: Any, target: pd.Series, answers: Any, sample_weight: Any) -> float:
        from sklearn.metrics import r2_score

        answers = np.where(np.isnan(answers), self.target_mean_, answers)
        return float(r2_score(_numbers(target), answers, sample_weight=read_weights(table, sample_weight)))

    def evaluate(self, X: Any, y: Any = None, *, metrics: Any = ()) -> dict[str, Any]:
        """Measure the predictions.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True numbers; None takes the target column of `X`.
        metrics : str, path, callable or list of them, default=()
            More metrics: callables ``(y_true, y_pred)``, local paths or names of the library evaluate.

        Returns
        -------
        dict
            r2, mae, rmse (both in units of the target), spearman, and unanswered: the number of answers that are no
            number.
        """
        from llmfit.metrics import metric_list

        metrics = metric_list(metrics)
        table, frame = self._read_rows(X)
        return self._measure(read_target(self, table, y), self._respond(frame), metrics)

    def _measure(self, target: pd.Series, answers: Any, metrics: Any = (), **_: Any) -> dict[str, Any]:
        from llmfit.metrics import extra_metrics, regression_metrics

        truth = _numbers(target)
        result = regression_metrics(truth, answers, mean=self.target_mean_)
        return self._evaluated({**result, **extra_metrics(metrics, truth, answers, taken=result)}, len(truth))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # as for the classifier: numbers read as text
        return tags


def read_number(text: str) -> float:
    """Read an answer as a number; nan where it is none.

    White space and a full stop at the end are no part of it; thousands may be set apart by commas.

    Examples
    --------
    >>> [read_number(text) for text in (" 3.5", "-1e3", "1,234.5.", "about 3", "")]
    [3.5, -1000.0, 1234.5, nan, nan]
    """
    bare = text.strip().removesuffix(".")
    if not NUMBER.fullmatch(bare) or not any(char.isdigit() for char in bare.lower().partition("e")[0]):
        return float("nan")
    number = float(bare.replace(",", ""))
    return number if np.isfinite(number) else float("nan")


def _warn_unread(texts: list[str], unread: np.ndarray, target: str) -> None:
    odd = [text for text, gone in zip(texts, unread, strict=True) if gone]
    of = f" answers for {target!r} are no number, and missing"
    warn(counted(DataWarning, int(unread.sum()), " of ", len(texts), of, examples=odd))


def _numbers(y: pd.Series) -> np.ndarray:
    """Take targets as float64.

    Raises
    ------
    DataError
        If one is no number, or infinite; the row is named. If they are dates or times, which pandas would count in
        units that depend on their dtype.
    """
    if holds_times(y):
        raise DataError(
            f"The target {y.name!r} holds dates or times ({y.dtype}), which are no numbers. Make them numbers first, "
            "for example the days since the first of them."
        )
    values = pd.to_numeric(y, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        infinite = " (Input y contains infinity)" if np.isinf(values[row]) else ""
        (cell,) = y.iloc[row : row + 1].tolist()
        raise DataError(
            f"{row_name(row, y.index)}: the target {y.name!r} must be a finite number. Got {cell!r} instead{infinite}."
        )
    return np.asarray(values)
