"""How good the answers are: one function per kind of output, each from plain arrays to a dict.

Takes true and answered labels or texts, and the class probabilities; gives a dict of Python floats and
pandas frames. Knows no model, no estimator and no torch. A metric that a maintained library has is taken
from there; scikit-learn, rouge-score, sacrebleu and evaluate are imported where they are called.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import (
    DataError,
    DataWarning,
    LLMFitWarning,
    ParameterError,
    missing_package,
    parameter_error,
    quoted,
)

__all__ = ["classification_metrics", "extra_metrics", "text_metrics"]


def classification_metrics(
    y_true: Any, y_pred: Any, proba: Any, classes: Any, *, per_class: bool = False
) -> dict[str, Any]:
    """Compare answered labels, and their probabilities, with the true labels.

    Parameters
    ----------
    y_true, y_pred : array or Series of shape (n,)
        Labels of any type that can be hashed: str, int, bool. ``1``, ``1.0`` and ``True`` are one label.
    proba : ndarray of shape (n, k)
        Probability of each class, in the order of `classes`. Rows are rescaled to sum to 1.
    classes : ndarray of shape (k,)
        The labels that fit saw.
    per_class : bool, default=False
        Add the key ``per_class``.

    Returns
    -------
    dict
        As ``sklearn.metrics`` has them. Floats from 0 (worst) to 1 (best): ``accuracy``;
        ``balanced_accuracy`` (mean recall of the labels in `y_true`); ``f1_macro``, ``precision_macro``,
        ``recall_macro`` (mean over the labels in `y_true` or `y_pred`, 0 where a ratio is 0/0) and
        ``f1_weighted`` (by the counts in `y_true`).

        ``log_loss``: mean of -ln P(true label), in nats, 0 is best. ``roc_auc``: area under the ROC curve of
        P(classes[1]) for two classes; otherwise each class against the rest, averaged over the classes that
        some rows of `y_true` have and some have not. nan where no class is such, or no row is left.

        ``confusion_matrix``: DataFrame of counts, true labels down, predicted labels across: `classes`, then
        any other label. ``per_class``: DataFrame with these labels as its index and the columns
        precision, recall, f1 (floats) and support (number of rows of `y_true`).

    Raises
    ------
    DataError
        If there is no row, a label is missing, or the shapes do not match.

    Warns
    -----
    DataWarning
        If `y_true` has labels outside `classes`. They count as wrong; log_loss and roc_auc leave them out.

    Examples
    --------
    >>> import numpy as np
    >>> from llmfit.metrics import classification_metrics
    >>> classes = np.array(["no", "yes"])
    >>> proba = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    >>> result = classification_metrics(["no", "yes", "yes", "yes"], classes[[0, 1, 0, 1]], proba, classes)
    >>> result["accuracy"], result["roc_auc"]
    (0.75, 1.0)
    """
    true, pred = _label_list(y_true, "y_true"), _label_list(y_pred, "y_pred")
    seen = np.asarray(classes).tolist()
    _check_rows(len(true), len(pred))
    if np.shape(proba) != (shape := (len(true), len(seen))):
        raise DataError(f"evaluate: proba must have the shape {shape}. Got {np.shape(proba)} instead.")
    # Codes, since scikit-learn refuses mixed label types and sorts the labels of log_loss itself.
    labels = list(dict.fromkeys([*seen, *true, *pred]))
    code_of = {label: code for code, label in enumerate(labels)}
    true_codes, pred_codes = (np.array([code_of[label] for label in side]) for side in (true, pred))  # (n,)
    known = true_codes < len(seen)  # (n,)
    if not known.all():
        _warn_unseen([label for label, ok in zip(true, known, strict=True) if not ok])
    scores = _label_scores(true_codes, pred_codes)
    known_codes, known_proba = true_codes[known], np.asarray(proba, dtype=np.float64)[known]
    scores["log_loss"] = _log_loss(known_codes, known_proba)
    scores["roc_auc"] = _roc_auc(known_codes, known_proba)
    scores["confusion_matrix"] = _confusion(true_codes, pred_codes, labels)
    if per_class:
        scores["per_class"] = _per_class(true_codes, pred_codes, labels)
    return scores


def _label_list(y: Any, name: str) -> list[Any]:
    column = pd.Series(y).astype(object)
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(f"Row {int(missing.argmax())}: {name} has no label. Drop the rows that have none.")
    return list(column)


def _check_rows(n_true: int, n_answers: int) -> None:
    if n_true != n_answers:
        raise DataError(f"evaluate needs one answer per row. Got {n_answers} answers for {n_true} rows.")
    if n_true == 0:
        raise DataError("evaluate needs at least one row. Got none.")


def _warn_unseen(unseen: list[Any]) -> None:
    one = len(unseen) == 1
    rows = "1 row holds a label" if one else f"{len(unseen)} rows hold labels"
    count, them = ("It counts", "it") if one else ("They count", "them")
    warnings.warn(
        f"evaluate: {rows} that fit never saw: {quoted(dict.fromkeys(unseen))}. "
        f"{count} as wrong; log_loss and roc_auc leave {them} out.",
        DataWarning,
        stacklevel=3,
    )


def _label_scores(true: np.ndarray, pred: np.ndarray) -> dict[str, Any]:
    from sklearn import metrics

    scores_of = metrics.precision_recall_fscore_support
    both, own = np.union1d(true, pred), np.unique(true)
    precision, recall, f1, _ = scores_of(true, pred, labels=both, average="macro", zero_division=0)
    weighted = scores_of(true, pred, labels=both, average="weighted", zero_division=0)
    # balanced_accuracy_score is this number, but warns of predicted labels that y_true has not.
    balanced = metrics.recall_score(true, pred, labels=own, average="macro", zero_division=0)
    return {
        "accuracy": float(metrics.accuracy_score(true, pred)),
        "balanced_accuracy": float(balanced),
        "f1_macro": float(f1),
        "f1_weighted": float(weighted[2]),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
    }


def _log_loss(codes: np.ndarray, proba: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    if len(codes) == 0:
        return np.nan
    if proba.shape[1] == 1:  # one class has all the probability; scikit-learn wants two
        return 0.0
    proba = proba / proba.sum(axis=1, keepdims=True)  # float32 misses 1 by more than scikit-learn lets
    return float(log_loss(codes, proba, labels=np.arange(proba.shape[1])))


def _roc_auc(codes: np.ndarray, proba: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    k = proba.shape[1]
    areas = [
        roc_auc_score(codes == code, proba[:, code])
        for code in ([1] if k == 2 else range(k))
        if 0 < np.count_nonzero(codes == code) < len(codes)
    ]
    return float(np.mean(areas)) if areas else np.nan


def _confusion(true: np.ndarray, pred: np.ndarray, labels: list[Any]) -> pd.DataFrame:
    # Counted here, since confusion_matrix warns of a single label even where it is given all labels.
    k = len(labels)
    counts = np.bincount(true * k + pred, minlength=k * k).reshape(k, k)
    down, across = pd.Index(labels, name="true"), pd.Index(labels, name="predicted")
    return pd.DataFrame(counts, index=down, columns=across)


def _per_class(true: np.ndarray, pred: np.ndarray, labels: list[Any]) -> pd.DataFrame:
    from sklearn.metrics import precision_recall_fscore_support as scores_of

    columns = scores_of(true, pred, labels=np.arange(len(labels)), average=None, zero_division=0)
    named = zip(("precision", "recall", "f1", "support"), columns, strict=True)
    return pd.DataFrame(dict(named), index=pd.Index(labels, name="class"))


def text_metrics(references: list[str], predictions: list[str], *, perplexity: float | None = None) -> dict[str, Any]:
    """Compare generated texts with the texts that were wanted.

    Parameters
    ----------
    references, predictions : list of str, length n
        The texts that were wanted, and those that came.
    perplexity : float, optional
        Of the references, by the model; given back as it is.

    Returns
    -------
    dict of str to float
        From 0 (worst) to 1 (best), means over the rows: ``exact_match`` (but for white space around it);
        ``token_f1`` (F1 of the bags of words, without case, ASCII punctuation and English articles; 1 where
        both are empty); ``rouge1``, ``rouge2``, ``rougeL`` (F-measure, no stemmer; only a-z, 0-9 count).

        From 0 to 100, over the whole corpus, as sacrebleu gives them: ``bleu`` (0 where no prediction has
        four tokens) and ``chrf``. ``perplexity`` where given (1 is best).

    Raises
    ------
    DataError
        If there is no row, or the lengths differ.

    Warns
    -----
    LLMFitWarning
        If rouge-score or sacrebleu is not installed; their keys are left out.

    References
    ----------
    Exact match, token F1: Rajpurkar et al. 2016 (SQuAD, arXiv:1606.05250). ROUGE: Lin 2004. BLEU as in
    sacrebleu: Post 2018 (arXiv:1804.08771). chrF: Popovic 2015.

    Examples
    --------
    >>> from llmfit.metrics import text_metrics
    >>> result = text_metrics(["The cat sat.", "Paris"], ["a cat sat down", "Paris "])
    >>> result["exact_match"], result["token_f1"]
    (0.5, 0.9)
    """
    _check_rows(len(references), len(predictions))
    pairs = list(zip(references, predictions, strict=True))
    scores = {
        "exact_match": float(np.mean([true.strip() == answer.strip() for true, answer in pairs])),
        "token_f1": float(np.mean([_token_f1(true, answer) for true, answer in pairs])),
    }
    missing = []
    for library, (score, _) in _TEXT_LIBRARIES.items():
        try:
            scores |= score(references, predictions)
        except ImportError:
            missing.append(library)
    if missing:
        _warn_missing(missing)
    if perplexity is not None:
        scores["perplexity"] = float(perplexity)
    return scores


def _token_f1(reference: str, prediction: str) -> float:
    wanted, given = Counter(_words(reference)), Counter(_words(prediction))
    total = wanted.total() + given.total()
    # 2PR / (P + R) with P = common / given and R = common / wanted, written without a division by 0.
    return 2 * (wanted & given).total() / total if total else 1.0


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _rouge(references: list[str], predictions: list[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    keys = _TEXT_LIBRARIES["rouge-score"][1]
    scorer = RougeScorer(list(keys), use_stemmer=False)
    rows = [scorer.score(true, answer) for true, answer in zip(references, predictions, strict=True)]
    return {key: float(np.mean([row[key].fmeasure for row in rows])) for key in keys}


def _sacrebleu(references: list[str], predictions: list[str]) -> dict[str, float]:
    from sacrebleu import corpus_bleu, corpus_chrf

    # force only silences a hint to detokenize; the score is the same.
    bleu = min(corpus_bleu(predictions, [references], force=True).score, 100.0)  # rounding: 100 + 4e-14
    chrf = corpus_chrf(predictions, [references]).score
    return {"bleu": float(bleu), "chrf": float(chrf)}


def _warn_missing(libraries: list[str]) -> None:
    keys = quoted(key for library in libraries for key in _TEXT_LIBRARIES[library][1])
    warnings.warn(
        f"evaluate leaves out {keys}, which need {' and '.join(libraries)}. "
        "Install with: pip install 'llmfit[text-metrics]'.",
        LLMFitWarning,
        stacklevel=3,
    )


def extra_metrics(specs: Any, y_true: Any, y_pred: Any) -> dict[str, Any]:
    """Compute the metrics that the user brings.

    Parameters
    ----------
    specs : list
        Each entry is a callable ``(y_true, y_pred)`` that returns a number or a dict, or a str for
        ``evaluate.load``: the path of a metric script (or of the folder with a script of its name), or the
        name of a metric on the Hugging Face Hub. Such a script is code, and it is run.
    y_true, y_pred : array, Series or list of length n
        Callables get them as they are; metrics of the evaluate library get lists. If such a metric refuses
        labels that are str, it gets their codes: positions among the sorted labels of both.

    Returns
    -------
    dict
        A number under the callable's ``__name__``, a dict under its own keys.

    Raises
    ------
    ParameterError
        If an entry is neither callable nor str, a metric cannot be loaded or computed or returns something
        else, or two metrics return the same key.

    Examples
    --------
    >>> from llmfit.metrics import extra_metrics
    >>> def n_wrong(y_true, y_pred):
    ...     return sum(true != answer for true, answer in zip(y_true, y_pred))
    >>> extra_metrics([n_wrong], ["a", "b", "b"], ["a", "a", "a"])
    {'n_wrong': 2}
    """
    if not isinstance(specs, list | tuple):
        raise parameter_error("metrics", "evaluate", _WANTED, specs)
    scores: dict[str, Any] = {}
    for spec in specs:
        found = _one_metric(spec, y_true, y_pred)
        repeated = [key for key in found if key in scores]
        if repeated:
            raise ParameterError(f"Two metrics of evaluate return the key {repeated[0]!r}. Rename one.")
        scores |= found
    return scores


def _one_metric(spec: Any, y_true: Any, y_pred: Any) -> dict[str, Any]:
    if isinstance(spec, str):
        return _as_scores(spec, _compute_loaded(spec, pd.Series(y_true).tolist(), pd.Series(y_pred).tolist()))
    if not callable(spec):
        raise parameter_error("metrics", "evaluate", _WANTED, spec)
    # A functools.partial has no name of its own, and an object that is called only that of its class.
    name = getattr(getattr(spec, "func", spec), "__name__", type(spec).__name__)
    return _as_scores(name, spec(y_true, y_pred))


def _as_scores(name: str, result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return {str(key): _plain(value) for key, value in result.items()}
    number = _plain(result)
    if not isinstance(number, int | float):
        raise ParameterError(f"The metric {name!r} must return a number or a dict. Got {number!r} instead.")
    return {name: number}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _compute_loaded(name: str, true: list[Any], pred: list[Any]) -> Any:
    metric = _load_metric(name)
    inputs = [(true, pred)]
    if all(isinstance(label, str) for label in true + pred):
        code_of = {label: code for code, label in enumerate(sorted({*true, *pred}))}
        inputs.append(([code_of[label] for label in true], [code_of[label] for label in pred]))
    refusal: Exception | None = None
    for references, predictions in inputs:
        try:
            return metric.compute(references=references, predictions=predictions)
        except (TypeError, ValueError) as error:
            refusal = error
    raise ParameterError(f"The metric {name!r} cannot be computed on these answers: {refusal}") from refusal


def _load_metric(name: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise missing_package(f"The metric {name!r}", "evaluate") from error
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # whatever a script raises while it is imported
        # The library says of every name, offline too, that the Hub has no such metric: leave that out.
        why = "" if isinstance(error, OSError) else f" ({error})"
        raise ParameterError(
            f"The metric {name!r} cannot be loaded{why}. "
            "The path of a local metric script or a callable (y_true, y_pred) works too."
        ) from error


_WANTED = "a list of callables (y_true, y_pred) and of names or paths of metrics (str)"

# The package on PyPI -> the function that needs it, and the keys which that function gives.
_TEXT_LIBRARIES: dict[str, tuple[Callable[[list[str], list[str]], dict[str, float]], tuple[str, ...]]] = {
    "rouge-score": (_rouge, ("rouge1", "rouge2", "rougeL")),
    "sacrebleu": (_sacrebleu, ("bleu", "chrf")),
}
