"""A look at the prompts, before anything is trained: a frame that a person can read."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sklearn.base import clone

from llmfit.estimators.reading import read_fit, read_table, read_target
from llmfit.exceptions import check_int

__all__ = ["preview"]

COLUMNS = ["prompt", "completion", "prompt_tokens", "completion_tokens", "loss_tokens", "cut"]


def preview(estimator: Any, X: Any, n: int, y: Any) -> pd.DataFrame:
    """Render and encode the first `n` rows; see :meth:`llmfit.LLMClassifier.preview`."""
    from llmfit.encoding import cut_text
    from llmfit.estimators.checks import check_parameters

    check_int("n", "preview", n, least=0)
    base = estimator._load_base()
    if not estimator.__sklearn_is_fitted__():
        targets = estimator._targets
        estimator = clone(estimator).set_params(early_stopping=None)
        estimator._targets = targets
        table, target = read_fit(estimator, X, y, estimator._default_target)
        estimator._check()
        estimator._learn_answers(target)
        checked = check_parameters(estimator)
        kept, _ = estimator._split(checked, target, None)  # few-shot examples are drawn from the rows to train on
        estimator._learn(checked, base, table, target, kept)
    else:
        table = read_table(estimator, X)
        names = [estimator.target_] if isinstance(estimator.target_, str) else estimator.target_
        there = set(names) <= set(table.frame.columns)
        given = y is not None or (there and table.frame[names].notna().all(axis=None))
        target = read_target(estimator, table, y) if given and len(table.frame) else None
    prompts = estimator._prompts
    frame = prompts.select(table.frame, type(estimator).__name__).iloc[:n]
    known = target is not None and estimator._head is None  # a head's answer is no text
    answers = estimator._answer_texts(target.iloc[:n]) if known else None
    rows = prompts.encode(base, frame, answers)
    decode = base.tokenizer.decode
    values = [
        (
            cut_text(segments, row.cut),
            decode(row.completion),
            len(row.prompt),
            len(row.completion),
            [decode([token]) for i, token in enumerate(row.completion) if row.shares is None or row.shares[i]],
            row.cut,
        )
        for segments, row in zip(prompts.segments(base, frame), rows, strict=True)
    ]
    return pd.DataFrame(values, columns=COLUMNS, index=frame.index)
