"""How good the answers are: one function per kind of output, each from plain arrays to a dict.

Takes true and answered labels or texts, and the class probabilities; gives a dict of Python floats and
pandas frames. Knows no model, no estimator and no torch. A metric that a maintained library has is taken
from there; scikit-learn, rouge-score, sacrebleu and evaluate are imported where they are called.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import (
    DataError,
    DataWarning,
    LLMFitWarning,
    quoted,
    warn,
)

__all__ = ["classification_metrics", "text_metrics", "token_f1", "warn_unseen"]


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
        warn_unseen([label for label, ok in zip(true, known, strict=True) if not ok])
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


def warn_unseen(
    unseen: list[Any], what: str = "evaluate", tail: str = "; log_loss and roc_auc leave {them} out"
) -> None:
    """Say how many rows hold labels that no fitted row had."""
    one = len(unseen) == 1
    rows = "1 row holds a label" if one else f"{len(unseen)} rows hold labels"
    count, them = ("It counts", "it") if one else ("They count", "them")
    sentence = f"{what}: {rows} that fit never saw: {quoted(dict.fromkeys(unseen))}. {count} as wrong"
    warn(DataWarning(f"{sentence}{tail.format(them=them)}."))


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
        "token_f1": float(np.mean([token_f1(true, answer) for true, answer in pairs])),
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


def token_f1(reference: str, prediction: str) -> float:
    """Compare the bags of words of one text with those of another; see :func:`text_metrics`."""
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
    needed = f"evaluate leaves out {keys}, which need {' and '.join(libraries)}."
    warn(LLMFitWarning(f"{needed} Install with: pip install 'llmfit[text-metrics]'."))


_TEXT_LIBRARIES: dict[str, tuple[Callable[[list[str], list[str]], dict[str, float]], tuple[str, ...]]] = {
    "rouge-score": (_rouge, ("rouge1", "rouge2", "rougeL")),
    "sacrebleu": (_sacrebleu, ("bleu", "chrf")),
}
