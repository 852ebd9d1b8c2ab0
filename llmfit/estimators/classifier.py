"""Classification: labels are scored as answers, never guessed from generated text, or answered by a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin

from llmfit.encoding import Ids
from llmfit.estimators import labelling, targets
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.reading import mean_hit, read_target
from llmfit.estimators.recalling import recall
from llmfit.exceptions import ParameterError
from llmfit.features import infer_kind, label_text, resolve_target
from llmfit.heads import resolve_head

__all__ = ["LLMClassifier"]

MOST_NAMED = 20  # classes that the default task lists


class LLMClassifier(ClassifierMixin, BaseLLM):
    """Classify the rows of a frame with a language model.

    A row becomes a prompt, each class an answer; the answer's log-probability behind the prompt, normalised over the
    classes, is the class's probability. With ``head="linear"`` a new layer on the model's last hidden states answers.

    Parameters
    ----------
    base_model : str or path, default="smollm2"
        Pretrained weights: hub id (``org/name`` or ``org/name@revision``), local folder, ``.gguf`` file, or the alias
        "smollm2". Loaded once in a process and shared by all estimators.
    features : None, str, list of str or dict of str to kind, default=None
        Columns of the prompt; None takes those of the template, or all but the target. Kinds are "text", "category",
        "number", "binary", "set" and "date"; those not given are inferred.
    target : None, str or dict of str to kind, default=None
        The column to predict; None where `y` is passed. With ``head="linear"``, cells may be lists of labels (the
        kind "set"), and `y` may be a 2-d indicator.
    template : None, str or dict, default=None
        How a row becomes a prompt: text with ``{column}`` fields (``{price:.2f}`` for numbers, ``{{`` and ``}}`` for
        braces), or a dict of "task", "template", "system", "chat" ("auto", True, False), "few_shot" ({"k", "seed",
        "retrieval", "model"}) and "na_rep" (what a missing value reads as). None lists features as ``name: value``.
    adapter : None, str, dict or spec, default="lora"
        What is trained: "lora" (or {"type": "lora", "r": 16, ...}, or ``LoRA(r=16)``), any other method of
        ``llmfit.adapters.METHODS`` or of PEFT, the path of a PEFT folder to begin from, "full", or None for zero-shot
        and few-shot, where `fit` learns only the labels. None with a linear head trains the head alone, on vectors.
    quantization : None, 4, 8, dict or Quantization, default=None
        Bits in which the frozen base model's linear layers are stored: 4 (or {"bits": 4, "type": "nf4" or "fp4",
        "double_quant", "compute_dtype"}), 8 (or {"bits": 8, "threshold"}). Not with adapter="full".
    head : "lm", "linear" or dict, default="lm"
        Answer in words, or by a linear layer on a row's pooled hidden states: {"type": "linear", "pooling": "auto"
        ("last" for a decoder, "mean" for an encoder), "last", "mean" or "first", "dropout", "bias", "cache"}; see
        :class:`llmfit.heads.LinearHead`. Encoders such as BERT need "linear".
    epochs : int, default=3
        Passes over the rows.
    learning_rate : float or "auto", default="auto"
        Peak learning rate; "auto" is the method's: 2e-4 for LoRA, 2e-5 for "full", 3e-2 for a head alone.
    batch_size : int or "auto", default="auto"
        Rows per optimiser step; "auto" is a fiftieth of the rows that are trained on, 2 at least and 16 at most. The
        folds of a search have fewer rows than its refit: give a number where both must have the same.
    batch_tokens : int or "auto", default="auto"
        Tokens of one forward pass; half as many again behind a long beginning that all rows share. A matter of memory
        and speed only: without dropout and answers that are drawn, results do not depend on it.
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
        The labels, sorted; of a 2-d `y`, its columns.
    history_ : DataFrame
        One row an optimiser step: step, epoch, loss (nats, per token or of a head per row), learning_rate, grad_norm,
        tokens (rows, of a head alone), seconds, validation_loss.
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
    evaluation_ : dict
        The plain numbers of the last `evaluate`, and of how many rows: what the model card tells.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> reviews = load_book_reviews()
    >>> clf = LLMClassifier(target="score", epochs=1, random_state=0, verbose=0)
    >>> clf.fit(reviews[:40]).predict(reviews[40:43]).shape
    (3,)
    """

    class_weight: Any
    classes_: np.ndarray
    _default_target = "label"
    _form: dict[str, Any] | None = None  # of several labels a row; None where each has one

    def __init__(
        self,
        base_model: Any = "smollm2",
        *,
        features: Any = None,
        target: Any = None,
        template: Any = None,
        adapter: Any = "lora",
        quantization: Any = None,
        head: Any = "lm",
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

    # What base.py asks for ----------------------------------------------------------------------

    def _check(self) -> None:
        targets.check_class_weight(self.class_weight, type(self).__name__)

    def _check_target_kind(self, kind: str | None) -> None:
        if kind not in (None, "category", "binary", "set"):
            raise ParameterError(f"{type(self).__name__} predicts categories; its target is declared as {kind!r}.")

    def _one_column(self, y: Any, *, fitting: bool = False) -> Any:
        form = targets.indicator_form(y)
        if fitting:
            self._form = form
        return targets.one_column(y, form)

    def _learn_answers(self, y: pd.Series) -> None:
        owner = type(self).__name__
        if self._form is None and (infer_kind(y) == "set" or self._target_kind() == "set"):
            self._form = {}
        if self._form is not None and resolve_head(self.head, owner, self._heads) is None:
            raise ParameterError(
                f"{owner} answers with one label a row in words, but {y.name!r} holds several. Set head='linear'."
            )
        classes = targets.learn_classes(y, self._form)
        if self.warm_start and hasattr(self, "classes_"):
            classes = targets.join_classes(self.classes_, classes, y, self.target_dtype_)
        targets.check_classes(classes, y, self._form, owner, binary=self._target_kind() == "binary")
        self.classes_ = classes

    def _target_kind(self) -> str | None:
        return resolve_target(self.target, type(self).__name__)[1]

    def _answer_texts(self, y: pd.Series) -> list[str]:
        return [label_text(value) for value in targets.label_values(y)] if self._form is None else targets.set_texts(y)

    def _head_task(self) -> tuple[str, int]:
        return "classes" if self._form is None else "sets", len(self.classes_)

    def _head_targets(self, y: pd.Series) -> list[tuple[float, ...]]:
        if self._form is not None:
            return [tuple(map(float, row)) for row in targets.to_indicator(y, self.classes_)]
        place = {label_text(label): (float(i),) for i, label in enumerate(self.classes_)}
        return [place[text] for text in self._answer_texts(y)]

    def _check_truth(self, y: pd.Series) -> None:
        targets.check_known(y, self.classes_, self._form)

    def _row_weights(self, y: pd.Series, sample_weight: np.ndarray | None) -> np.ndarray | None:
        if self.class_weight is None:
            return None
        return targets.class_weights(self.class_weight, y, self.classes_, self._form)

    def _default_task(self) -> str | None:
        texts = [label_text(value) for value in self.classes_]
        named = f" Answer with one of: {', '.join(texts)}." if len(texts) <= MOST_NAMED else ""
        return f"Predict the {self.target_}.{named}"

    def _reserve(self, encoder: Any, prompts: Any, answers: Sequence[str]) -> int:
        return max(map(len, encoder.closed([prompts.template.completion(label_text(c)) for c in self.classes_])))

    def _check_prompts(self, encoder: Any) -> None:
        self._label_ids(encoder)

    # Prediction ---------------------------------------------------------------------------------

    def _label_ids(self, encoder: Any) -> list[Ids]:
        """Token ids of every class as an answer."""
        texts = list(map(label_text, self.classes_))
        return targets.check_apart(encoder.completions(list(map(self._prompts.template.completion, texts))), texts)

    def _no_answers(self) -> np.ndarray:
        return np.empty((0, len(self.classes_)))

    def _read_head(self, outputs: np.ndarray) -> np.ndarray:
        """Logarithms of the classes' probabilities: (n_rows, n_classes)."""
        return np.asarray(-np.logaddexp(0.0, -outputs)) if self._form is not None else targets.log_normalised(outputs)

    def _in_words(self, base: Any, rows: Sequence[Any], later: int = 0) -> tuple[np.ndarray, list[Ids]]:
        return labelling.scored(self, base, rows)

    def _likeliest(self, base: Any, rows: Sequence[Any]) -> np.ndarray:
        return labelling.likeliest(self, base, rows) if labelling.prunes(self, base) else self._answer(base, rows)

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
        return recall(self, self._read_rows(X)[1], "predict_log_proba").copy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of every class.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        ndarray of shape (n_rows, n_classes)
            Columns in the order of `classes_`; rows sum to 1, but for several labels a row.
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
            With the index of `X` and the dtype of the target; an ndarray where `X` is an array. Several labels a row
            come as lists, or as the indicator that `fit` was given.
        """
        table, frame = self._read_rows(X)
        return self._column(table, recall(self, frame, "predict", likeliest=True))

    def _column(self, table: Any, answers: np.ndarray) -> Any:
        if self._form is not None:
            return targets.answer_sets(table, targets.chosen_sets(answers, self.classes_), self._form, self.target_)
        best = answers if answers.ndim == 1 else answers.argmax(axis=1)
        return table.answer(self.classes_[best], self.target_, self.target_dtype_)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of the predictions; of several labels a row, the share of rows with all of them right.

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
        table, frame = self._read_rows(X)
        target, answers = read_target(self, table, y), recall(self, frame, "score", likeliest=True)
        return self._score(table, target, answers, sample_weight)

    def _score(self, table: Any, target: pd.Series, answers: np.ndarray, sample_weight: Any) -> float:
        if self._form is not None:
            pairs = zip(targets.set_values(target), targets.chosen_sets(answers, self.classes_), strict=True)
            return mean_hit(table, [set(a) == set(b) for a, b in pairs], sample_weight)
        truth = targets.label_values(target)
        targets.warn_of_unseen(truth, self.classes_)
        predicted = targets.label_values(pd.Series(self._column(table, answers)))
        return mean_hit(table, truth.astype(object) == predicted.astype(object), sample_weight)

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
            roc_auc, confusion_matrix (a DataFrame, true by predicted). Of several labels a row: subset_accuracy,
            hamming_loss, f1_micro, f1_macro, f1_samples, jaccard.
        """
        from llmfit.metrics import metric_list

        metrics = metric_list(metrics)
        table, frame = self._read_rows(X)
        return self._measure(read_target(self, table, y), self._respond(frame), metrics, per_class)

    def _measure(self, y: Any, answers: Any, metrics: Any = (), per_class: bool = False, **_: Any) -> dict[str, Any]:
        from llmfit.metrics import classification_metrics, extra_metrics, set_metrics

        if self._form is not None:
            truth: Any = targets.set_values(y)
            predicted: Any = targets.chosen_sets(answers, self.classes_)
            result = set_metrics(truth, predicted, self.classes_, per_class=per_class)
        else:
            truth, predicted = targets.label_values(y), self.classes_[answers.argmax(axis=1)]
            result = classification_metrics(truth, predicted, np.exp(answers), self.classes_, per_class=per_class)
        return self._evaluated({**result, **extra_metrics(metrics, truth, predicted, taken=result)}, len(truth))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Numbers as text are no strong point of a language model; the suite's thresholds are for models of numbers.
        tags.classifier_tags.poor_score = True
        return tags
