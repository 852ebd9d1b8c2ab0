"""A classifier's labels as answers in words: the scores of all of them, or the likeliest alone.

Takes a fitted classifier, its base model and encoded rows. Knows what a label's tokens are, and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmfit.encoding import Encoded, Ids
from llmfit.estimators import targets

__all__ = ["likeliest", "prunes", "scored"]


@contextmanager
def _asking(
    estimator: Any, base: Any, rows: Sequence[Encoded]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], list[Ids]]]:
    """Lend the model; give it with prompts and labels, how they are asked, and the tokens of every class."""
    from llmfit.scoring import label_sequences

    encoder = estimator._prompts.encoder(base)
    ids = estimator._label_ids(encoder)
    labels = label_sequences(ids, encoder.end_id)
    longest = max(row.length for row in rows) + max(map(len, labels))
    with estimator._lend(base, longest) as model, estimator._bar(len(rows), "predict") as bar:
        how = {
            "device": base.device,
            "pad_id": base.pad_id,
            "start_ids": base.start_ids,
            "said": [row.said for row in rows],
            "batch_tokens": estimator.batch_tokens,
            "progress": bar.update,
        }
        yield (model, [row.prompt for row in rows], labels), how, ids


def scored(estimator: Any, base: Any, rows: Sequence[Encoded]) -> tuple[np.ndarray, list[Ids]]:
    """Give the logarithms of all classes' probabilities, (n_rows, n_classes), and the likeliest one's tokens."""
    from llmfit import scoring

    with _asking(estimator, base, rows) as (asked, how, ids):
        answers = targets.log_normalised(scoring.score_labels(*asked, **how))
    return answers, [ids[i] for i in answers.argmax(axis=1)]


def prunes(estimator: Any, base: Any) -> bool:
    """Tell a classifier whose likeliest class costs less than the probabilities of all of them."""
    from llmfit.pruning import worth_pruning

    if estimator._head is not None:
        return False
    return worth_pruning(estimator._label_ids(estimator._prompts.encoder(base)), base.device)


def likeliest(estimator: Any, base: Any, rows: Sequence[Encoded]) -> np.ndarray:
    """Find the likeliest class alone: its places, (n_rows,)."""
    from llmfit.pruning import likeliest_labels

    with _asking(estimator, base, rows) as (asked, how, _):
        return likeliest_labels(*asked, **how)
