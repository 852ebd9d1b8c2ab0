"""Classification: labels are scored as answers, never guessed from generated text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from llmfit.estimators.base import BaseLLM
from llmfit.estimators.reading import mean_hit, read_target
from llmfit.exceptions import DataError, ParameterError, check_number, parameter_error, quoted
from llmfit.features import label_text, resolve_target, row_name

__all__ = ["LLMClassifier"]

MOST_NAMED = 20  # classes that the default task lists


class LLMClassifier(ClassifierMixin, BaseLLM):
    """Classify the rows of a frame with a language model.

    A row becomes a prompt, each class an answer; the answer's log-probability behind the prompt, normalised over the
    classes, is the class's probability.

    Parameters
    ----------
    base_model : str or path, default="smollm2"
        Pretrained weights: hub id (``org/name`` or ``org/name@revision``), local folder, ``.gguf`` file, or the alias
        "smollm2". Loaded once in a process and shared by all estimators.
    features : None, str, list of str or dict of str to kind, default=None
        Columns of the prompt; None takes those of the template, or all but the target. Kinds are "text", "category",
        "number" and "binary"; those not given are inferred.
    target : None, str or dict of str to kind, default=None
        The column to predict; None where `y` is passed.
    template : None, str or dict, default=None
        How a row becomes a prompt: text with ``{column}`` fields (``{price:.2f}`` for numbers, ``{{`` and ``}}`` for
        braces), or a dict of "task", "template", "system", "chat" ("auto", True, False), "few_shot" ({"k", "seed"})
        and "na_rep" (what a missing value reads as). None lists the features as ``name: value``.
    adapter : None, str, dict or spec, default="lora"
        What is trained: "lora" (or {"type": "lora", "r": 16, ...}, or ``LoRA(r=16)``), "full", or None for zero-shot
        and few-shot, where `fit` only learns the labels and what concerns training has no part.
    quantization : None, 4, 8, dict or Quantization, default=None
        Bits in which the frozen base model's linear layers are stored: 4 (or {"bits": 4, "type": "nf4" or "fp4",
        "double_quant", "compute_dtype"}), 8 (or {"bits": 8, "threshold"}). Not with adapter="full".
    head : "lm", default="lm"
        Answer in words.
    epochs : int, default=3
        Passes over the rows.
    learning_rate : float or "auto", default="auto"
        Peak learning rate; "auto" is 2e-4 for LoRA, 2e-5 for full fine-tuning.
    batch_size : int or "auto", default="auto"
        Rows per optimiser step; "auto" is a fiftieth of the rows that are trained on, 2 at least and 16 at most. The
        folds of a search have fewer rows than its refit: give a number where both must have the same.
    batch_tokens : int or "auto", default="auto"
        Padded tokens of one forward pass. A matter of memory and speed only: without dropout, and without answers that
        are drawn, results do not depend on it.
    gradient_checkpointing : bool, default=False
        Keep only the inputs of each layer and compute it twice: less memory, more time, the same result.
    max_length : int or None, default=None
        Tokens of prompt and answer together; None is the model's context length.
    truncation : {"error", "prompt"}, default="error"
        What happens to a longer row: an error that names it, or its longest values are cut, with a warning that
        counts. Template and answer are never cut.
    warmup : float, default=0.1
        Share of all steps (< 1), or number of steps, over which the learning rate rises.
    schedule : {"cosine", "linear", "constant"}, default="cosine"
        How the learning rate falls after that.
    optimizer : str or dict, default="adamw"
        A name, or {"type": name, ...settings}: adamw, adam, sgd, adafactor, adagrad, nadam, radam, rmsprop, and
        from bitsandbytes adamw_8bit, paged_adamw_8bit, lion, lion_8bit.
    weight_decay : float, default=0.0
        Decoupled weight decay in adamw, adafactor, nadam, radam and those of bitsandbytes; an L2 term of the gradient
        in adam, sgd, adagrad and rmsprop, as torch has it.
    max_grad_norm : float or None, default=1.0
        Gradients are scaled down to this norm.
    validation_fraction : float, default=0.0
        Share of the rows held out for the validation loss, in the classes' proportion.
    early_stopping : None, bool, int or dict, default=None
        Epochs without a fall of the validation loss before training stops (or {"patience", "min_delta"}); the best
        epoch's weights are restored.
    class_weight : None, "balanced" or dict of label to float, default=None
        Weights of the classes; "balanced" weighs them inversely to their frequency in the rows trained on.
    device : str, default="auto"
        "auto" takes CUDA, then MPS, then the CPU.
    dtype : str, default="auto"
        "auto" takes bfloat16 where the hardware multiplies it faster, else float32.
    random_state : int, RandomState or None, default=None
        Seeds the adapter, the order of rows and dropout.
    warm_start : bool, default=False
        Go on from the weights of the last fit.
    checkpoint_dir : path or None, default=None
        Folder for states of a running fit: a fit that was killed and is started again goes on from there, and ends
        as if it had not been killed. Dropped when the fit ends. Needs an int `random_state`.
    callbacks : None, Callback, callable or list, default=None
        Told of each step; see :class:`llmfit.Callback`.
    verbose : int, default=1
        0 is silent; 1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    history_ : DataFrame
        One row an optimiser step: step, epoch, loss (nats per token), learning_rate, grad_norm, tokens, seconds,
        validation_loss.
    features_ : dict of str to str
        The columns of the prompt and their kinds.
    target_ : str
    feature_names_in_ : ndarray of str
        The columns of the prompt, where the rows came with names.
    best_epoch_ : int or None
    learning_rate_ : float
    trainable_parameters_, batch_size_, max_length_, n_features_in_ : int
    memory_footprint_ : int
        Bytes of the base model's weights as `fit` stored them.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> reviews = load_book_reviews()
    >>> clf = LLMClassifier(target="score", epochs=1, random_state=0, verbose=0)
    >>> clf.fit(reviews[:40]).predict(reviews[40:43]).shape
    (3,)
    """

    classes_: np.ndarray
    _default_target = "label"

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
        device: str = "auto",
        dtype: str = "auto",
        random_state: Any = None,
        warm_start: bool = False,
        checkpoint_dir: Any = None,
        callbacks: Any = None,
        verbose: int = 1,
    ) -> None:
        self._store(locals())

    class_weight: Any

    # What base.py asks for ----------------------------------------------------------------------

    def _check(self) -> None:
        owner, given = type(self).__name__, self.class_weight
        if not (given is None or isinstance(given, dict) or (isinstance(given, str) and given == "balanced")):
            raise parameter_error("class_weight", owner, "None, 'balanced' or a dict", given)
        for label, weight in given.items() if isinstance(given, dict) else ():
            check_number(f"class_weight[{label!r}]", owner, weight, least=0)

    def _check_target_kind(self, kind: str | None) -> None:
        if kind not in (None, "category", "binary"):
            raise ParameterError(f"{type(self).__name__} predicts categories; its target is declared as {kind!r}.")

    def _learn_answers(self, y: pd.Series) -> None:
        values = _label_values(y)
        if values.dtype.kind in "mM" or isinstance(values[0], np.datetime64 | np.timedelta64 | date | timedelta):
            raise DataError(
                f"The labels of {y.name!r} are dates or times ({y.dtype}). Make them text first, for example with "
                f"df[{y.name!r}].astype(str)."
            )
        try:
            classes = np.unique(values)
        except TypeError:
            kinds = sorted({type(value).__name__ for value in values})
            raise DataError(
                f"The labels of {y.name!r} are of kinds that cannot be sorted: {', '.join(kinds)}."
            ) from None
        try:
            check_classification_targets(values)
        except ValueError as error:
            raise DataError(f"The labels of {y.name!r} are no classes: {error}") from None
        if self.warm_start and hasattr(self, "classes_"):
            if y.dtype != self.target_dtype_:
                raise DataError(
                    f"warm_start goes on with labels of dtype {self.target_dtype_}, but {y.name!r} is {y.dtype}."
                )
            classes = np.union1d(self.classes_, classes)
        if len(classes) < 2:
            raise DataError(
                f"{type(self).__name__} needs at least two classes in {y.name!r}, but every row is {classes[0]!r}: "
                "only one class."
            )
        _, kind = resolve_target(self.target, type(self).__name__)
        if kind == "binary" and len(classes) > 2:
            raise DataError(f"The target {y.name!r} is declared as 'binary', but has {len(classes)} classes.")
        texts = [label_text(value) for value in classes]
        if len(set(texts)) < len(texts) or "" in texts:
            raise DataError(f"Each class of {y.name!r} needs a text of its own that is not empty. Got {quoted(texts)}.")
        self.classes_ = classes

    def _answer_texts(self, y: pd.Series) -> list[str]:
        return [label_text(value) for value in _label_values(y)]

    def _check_truth(self, y: pd.Series) -> None:
        known = {label_text(label) for label in self.classes_}
        for row, label in enumerate(_label_values(y).tolist()):
            if label_text(label) not in known:  # by their texts, which are what is trained on: True is no 1
                raise DataError(
                    f"{row_name(row, y.index)} has the label {label!r}, which no fitted row has. "
                    f"The classes are {quoted(self.classes_.tolist())}."
                )

    def _row_weights(self, y: pd.Series, sample_weight: np.ndarray | None) -> np.ndarray | None:
        if self.class_weight is None:
            return None
        values = _label_values(y)
        present = np.unique(values)
        if isinstance(self.class_weight, dict):
            for label in self.class_weight:
                if label not in self.classes_.tolist():
                    raise ParameterError(
                        f"class_weight names the label {label!r}; the classes are {quoted(self.classes_.tolist())}."
                    )
            weights = {label: float(self.class_weight.get(label, 1.0)) for label in present.tolist()}
        else:
            from sklearn.utils.class_weight import compute_class_weight

            balanced = compute_class_weight("balanced", classes=present, y=values)
            weights = dict(zip(present.tolist(), balanced.tolist(), strict=True))
        return np.array([weights[value] for value in values.tolist()])

    def _default_task(self) -> str | None:
        texts = [label_text(value) for value in self.classes_]
        named = f" Answer with one of: {', '.join(texts)}." if len(texts) <= MOST_NAMED else ""
        return f"Predict the {self.target_}.{named}"

    def _reserve(self, encoder: Any, answers: Sequence[str]) -> int:
        return max(map(len, encoder.completions(sorted(set(answers))))) + 1

    def _check_prompts(self, encoder: Any) -> None:
        self._label_ids(encoder)

    # Prediction ---------------------------------------------------------------------------------

    def _label_ids(self, encoder: Any) -> list[tuple[int, ...]]:
        """Token ids of every class, as they are scored."""
        from llmfit.scoring import label_sequences

        texts = [label_text(value) for value in self.classes_]
        ids = encoder.completions([self._prompts.template.completion(text) for text in texts])
        if len(set(ids)) < len(ids):
            raise DataError(f"Two of the classes {quoted(texts)} are the same tokens to this model. Rename one.")
        return label_sequences(ids, encoder.end_id)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Predict the logarithm of every class's probability.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        ndarray of shape (n_rows, n_classes), in nats
            Columns in the order of `classes_`.
        """
        from llmfit.scoring import score_labels

        _, frame = self._read_rows(X)
        if not len(frame):
            return np.empty((0, len(self.classes_)))
        base = self._fitted_base()
        rows = self._prompts.encode(base, frame)
        labels = self._label_ids(self._prompts.encoder(base))
        longest = max(row.length for row in rows) + max(map(len, labels))
        with self._lend(base, longest) as model, self._bar(len(rows), "predict") as bar:
            scores = score_labels(
                model,
                [row.prompt for row in rows],
                labels,
                device=base.device,
                pad_id=base.pad_id,
                start_ids=base.start_ids,
                batch_tokens=self.batch_tokens,
                progress=bar.update,
            )
        log_proba: np.ndarray = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return log_proba

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of every class.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        ndarray of shape (n_rows, n_classes)
            Columns in the order of `classes_`; rows sum to 1.
        """
        proba: np.ndarray = np.exp(self.predict_log_proba(X))
        return proba

    def predict(self, X: Any) -> Any:
        """Predict the likeliest class of every row.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        Series of shape (n_rows,)
            With the index of `X` and the dtype of the target; an ndarray where `X` is an array.
        """
        table, _ = self._read_rows(X)
        labels = self.classes_[self.predict_log_proba(X).argmax(axis=1)]
        return table.answer(labels, self.target_, self.target_dtype_)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of the predictions.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True labels; None takes the target column of `X`.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        float
            Between 0 and 1.
        """
        table, _ = self._read_rows(X)
        truth = _label_values(read_target(self, table, y))
        predicted = _label_values(pd.Series(self.predict(X)))
        known = set(self.classes_.tolist())
        unseen = [label for label in truth.tolist() if label not in known]
        if unseen:
            from llmfit.metrics import warn_unseen

            warn_unseen(unseen, "score", "")
        hits = truth.astype(object) == predicted.astype(object)
        return mean_hit(table, hits, sample_weight)

    def evaluate(self, X: Any, y: Any = None, *, metrics: Any = (), per_class: bool = False) -> dict[str, Any]:
        """Measure the predictions.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True labels; None takes the target column of `X`.
        metrics : str, path, callable or list of them, default=()
            More metrics: callables ``(y_true, y_pred)``, local paths or names of the library evaluate.
        per_class : bool, default=False
            Add a frame of precision, recall, f1 and support of each class.

        Returns
        -------
        dict
            accuracy, balanced_accuracy, f1_macro, f1_weighted, precision_macro, recall_macro, log_loss (nats),
            roc_auc, confusion_matrix (a DataFrame, true by predicted).
        """
        from llmfit.metrics import classification_metrics, extra_metrics, metric_list

        metrics = metric_list(metrics)
        table, _ = self._read_rows(X)
        truth = _label_values(read_target(self, table, y))
        proba = self.predict_proba(X)
        predicted = self.classes_[proba.argmax(axis=1)]
        result = classification_metrics(truth, predicted, proba, self.classes_, per_class=per_class)
        return {**result, **extra_metrics(metrics, truth, predicted, taken=result)}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Numbers written out as text are no strong point of a language model: the suite's thresholds on
        # blobs of numbers are for models of numbers.
        tags.classifier_tags.poor_score = True
        return tags


def _label_values(y: pd.Series) -> np.ndarray:
    """Take labels as NumPy values of their own kind: nullable and categorical types undone."""
    dtype = y.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return _label_values(pd.Series(y.astype(object).to_numpy()))
    if pd.api.types.is_extension_array_dtype(dtype) and hasattr(dtype, "numpy_dtype"):
        kind = dtype.numpy_dtype
        return np.asarray(y.to_numpy(dtype=kind if kind.kind in "biuf" else object))
    return np.asarray(y.infer_objects().to_numpy())
