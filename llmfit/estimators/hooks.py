"""What a concrete estimator says of its answers, and the defaults of one that answers with any text.

Takes targets as Series; gives texts, numbers and weights. :class:`~llmfit.estimators.base.BaseLLM` asks, in this order,
while it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from llmfit.estimators.prompts import Prompts

__all__ = ["Hooks"]


class Hooks:
    """Answers of one kind: hooks that say nothing unless an estimator overrides them."""

    _targets: dict[str, Any] | None = None  # of an estimator with several: their names, and their kinds once known

    def _check(self) -> None:
        """Check the parameters that only this estimator has."""

    def _wanted_head(self) -> Any:
        """Say what the `head` parameter means here."""
        return self.head  # type: ignore[attr-defined]

    def _one_column(self, y: Any, *, fitting: bool = False) -> Any:
        """Turn a target of several columns into one, for an estimator that can have it."""
        return y

    def _check_target_kind(self, kind: str | None) -> None:
        """Refuse a declared kind of target that this estimator cannot answer."""

    def _name_target(self, y: Any) -> None:
        """Keep name and dtype of the target."""
        self.target_: Any = str(y.name)
        self.target_dtype_ = y.dtype

    def _shares(self) -> tuple[float, ...]:
        """Say what the loss of each of several targets weighs; () for one."""
        return ()

    def _learn_answers(self, y: pd.Series) -> None:
        """Learn from the target what prediction needs to know of it."""

    def _learn_units(self, y: pd.Series, weights: np.ndarray) -> None:
        """Learn from the rows trained on, and their weights, in which units answers come."""

    def _head_task(self) -> tuple[str, int]:
        """Name the objective of a head, and count its outputs."""
        raise AttributeError(f"{type(self).__name__} has no head")  # pragma: no cover

    def _head_targets(self, y: pd.Series) -> list[tuple[float, ...]]:
        """Write every target as the numbers that a head answers."""
        raise AttributeError(f"{type(self).__name__} has no head")  # pragma: no cover

    def _answer_texts(self, y: pd.Series) -> list[str]:
        """Write every target as the text to be answered."""
        return [str(value) for value in y]

    def _check_truth(self, y: pd.Series) -> None:
        """Refuse true answers, of rows to validate on, that the fitted rows do not know."""

    def _row_weights(self, y: pd.Series, sample_weight: np.ndarray | None) -> np.ndarray | None:
        """Weigh rows beside the user's weights, with which these are multiplied; None for no weights of its own."""
        return None

    def _default_task(self) -> str | None:
        """Words for the task where the user gives none."""
        return None

    def _reserve(self, encoder: Any, prompts: Any, answers: Sequence[Any]) -> int:
        """Tokens to keep free for an answer that is not known."""
        return 1

    def _generation_config(self, base: Any) -> Any:
        """How transformers generates such answers; None leaves it as the base model has it."""

    def _check_prompts(self, encoder: Any) -> None:
        """Refuse what the tokens of the answers cannot tell apart, before anything is trained."""

    # How a fitted estimator answers: raw answers, which `predict` and every measure read.

    _head: Any
    _keeps_vectors = True  # those that a head reads, from one call to the next
    _prompts: Prompts
    _fitted_base: Callable[[], Any]

    def _respond(self, frame: pd.DataFrame) -> Any:
        """Answer rows."""
        return self._answer(*self._encoded(frame)) if len(frame) else self._no_answers()

    def _decide(self, frame: pd.DataFrame) -> Any:
        """Answer rows where the likeliest answer to each is enough."""
        return self._likeliest(*self._encoded(frame)) if len(frame) else self._no_answers()

    def _encoded(self, frame: pd.DataFrame) -> tuple[Any, list[Any]]:
        """Find the base model, and encode rows for it."""
        base = self._fitted_base()
        return base, self._prompts.encode(base, frame)

    def _answer(self, base: Any, rows: Sequence[Any]) -> Any:
        """Answer encoded rows."""
        from llmfit.estimators.heads import answer

        return self._in_words(base, rows)[0] if self._head is None else self._read_head(answer(self, base, rows))

    def _likeliest(self, base: Any, rows: Sequence[Any]) -> Any:
        """Answer encoded rows where the likeliest answer to each is enough."""
        return self._answer(base, rows)

    def _no_answers(self) -> Any:
        """Answer no rows."""
        return []

    def _read_head(self, outputs: np.ndarray) -> Any:
        """Turn what a head answers, (n_rows, outputs), into raw answers."""
        raise AttributeError(f"{type(self).__name__} has no head")  # pragma: no cover

    def _in_words(self, base: Any, rows: Sequence[Any], later: int = 0) -> tuple[Any, list[tuple[int, ...]]]:
        """Answer encoded prompts in words.

        Parameters
        ----------
        base : BaseModel
        rows : sequence of Encoded, length n_rows
        later : int
            Tokens of the context to keep free for what comes behind the answers.

        Returns
        -------
        raw answers
        list of tuple of int, length n_rows
            The answers' tokens, without the one that closes them.
        """
        raise AttributeError(f"{type(self).__name__} has no words")  # pragma: no cover

    def _with_task(self, checked: Any, y: pd.Series, weights: np.ndarray) -> Any:
        """Say what a head is to learn, from the rows that it learns from."""
        self._learn_units(y, weights)
        if checked.head is None:
            return checked
        objective, outputs = self._head_task()
        return replace(checked, outputs=outputs, settings=replace(checked.settings, objective=objective))
