"""What a classifier has answered last: two of its methods that are asked of the same rows cost one pass over the model.

Takes a fitted classifier and rows; gives its raw answers. Those of one classifier are kept, for as long as it lives and
is what it was, and no more of them than a few megabytes; never in the classifier. They serve its other methods alone:
who asks the same twice has it answered twice.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import pandas as pd

from llmfit.encoding import Encoded

__all__ = ["recall"]

MOST_NUMBERS = 2**21  # of answers that are kept: 16 MB


class _Answered(NamedTuple):
    """Answers to one method, and what they were made of."""

    method: str
    made_of: tuple[ref[Any], ...]
    rows: bytes
    answers: np.ndarray


_last: WeakKeyDictionary[Any, _Answered] = WeakKeyDictionary()  # of one classifier


def recall(estimator: Any, frame: pd.DataFrame, method: str, *, likeliest: bool = False) -> np.ndarray:
    """Answer rows, or give the answers that another method has had.

    Parameters
    ----------
    estimator : LLMClassifier
        A fitted one.
    frame : DataFrame of shape (n_rows, n_features)
    method : str
        The name of what asks.
    likeliest : bool
        The likeliest class is enough.

    Returns
    -------
    ndarray of shape (n_rows, n_classes), or (n_rows,)
        Logarithms of probabilities, or the places of the likeliest classes.
    """
    if not len(frame):
        return np.asarray(estimator._no_answers())
    base, rows = estimator._encoded(frame)
    made_of = (base, estimator._prompts, estimator.classes_, *(estimator._tensors or {}).values())
    digest, known = _digest(rows), _last.get(estimator)
    if known is not None and known.method != method and known.rows == digest and _is_made_of(known, made_of):
        return known.answers
    answers = np.asarray(estimator._likeliest(base, rows) if likeliest else estimator._answer(base, rows))
    if answers.ndim == 2 and answers.size <= MOST_NUMBERS:
        _last.clear()
        _last[estimator] = _Answered(method, tuple(map(ref, made_of)), digest, answers)
    return answers


def _is_made_of(known: _Answered, parts: Sequence[Any]) -> bool:
    """Tell whether answers come of these very parts: a fit makes others, and so does another device or dtype."""
    return len(known.made_of) == len(parts) and all(a() is b for a, b in zip(known.made_of, parts, strict=True))


def _digest(rows: Sequence[Encoded]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(array("q", (len(row.prompt), *row.prompt, len(row.said), *row.said)).tobytes())
    return found.digest()
