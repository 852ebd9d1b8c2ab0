"""Generation of text: question to answer, row to summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from llmfit.dates import date_text, is_date
from llmfit.estimators.base import BaseLLM
from llmfit.estimators.reading import mean_hit, read_target
from llmfit.exceptions import ParameterError, TruncationWarning, counted, warn
from llmfit.features import label_text
from llmfit.files import kinds_of
from llmfit.params import Nested

__all__ = ["LLMGenerator"]

LEAST_NEW_TOKENS = 32


def _generation_defaults(_: Any) -> dict[str, Any]:
    from llmfit.inference import Generation

    return asdict(Generation())


class LLMGenerator(BaseLLM):
    """Generate a text for every row of a frame with a language model.

    Parameters
    ----------
    generation : None or dict, default=None
        How answers are generated: max_new_tokens (twice the longest answer of `fit` where not given), min_new_tokens,
        do_sample, temperature, top_k, top_p, num_beams, repetition_penalty, length_penalty,
        no_repeat_ngram_size. Greedy by default.
    base_model, features, target, template, adapter, quantization, head, epochs, learning_rate, batch_size, \
batch_tokens, gradient_checkpointing, max_length, truncation, warmup, schedule, optimizer, weight_decay, \
max_grad_norm, validation_fraction, early_stopping, device, dtype, random_state, warm_start, checkpoint_dir, \
callbacks, verbose
        As in :class:`LLMClassifier`.

    Attributes
    ----------
    history_ : DataFrame
        One row an optimiser step; see :class:`LLMClassifier`.
    max_new_tokens_ : int
        Longest answer that is generated, in tokens.
    features_, target_, feature_names_in_, n_features_in_, best_epoch_, trainable_parameters_, learning_rate_, \
batch_size_, max_length_, memory_footprint_
        As in :class:`LLMClassifier`.

    Examples
    --------
    >>> from llmfit import LLMGenerator
    >>> from llmfit.datasets import load_support_faq
    >>> faq = load_support_faq()
    >>> model = LLMGenerator(features="question", target="answer", epochs=1, random_state=0, verbose=0)
    >>> model.fit(faq[:8]).predict(faq[:2]).shape
    (2,)
    """

    _nested: ClassVar[dict[str, Nested]] = {
        **BaseLLM._nested,
        "generation": Nested("max_new_tokens", _generation_defaults),
    }
    _default_target = "answer"
    _heads: ClassVar[tuple[str, ...]] = ("lm",)

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

    generation: Any
    random_state: Any
    batch_tokens: Any

    def _check(self) -> None:
        from llmfit.inference import resolve_generation

        resolve_generation(self.generation)

    def _check_target_kind(self, kind: str | None) -> None:
        if kind not in (None, "text"):
            raise ParameterError(f"{type(self).__name__} generates text; its target is declared as {kind!r}.")

    def _learn_answers(self, y: pd.Series) -> None:
        self._columns = kinds_of(y.to_frame())

    def _answer_texts(self, y: pd.Series) -> list[str]:
        timed = self._columns.get(str(y.name)) == "date"  # a time stands behind each of them then
        return [date_text(v, days=False) if timed and is_date(v) else label_text(v) for v in y.astype(object)]

    def _reserve(self, encoder: Any, prompts: Any, answers: Sequence[str]) -> int:
        from llmfit.inference import check_least, resolve_generation

        longest = max(map(len, encoder.closed([prompts.template.completion(text) for text in answers])))
        settings = resolve_generation(self.generation)
        self.max_new_tokens_ = int(settings.max_new_tokens or max(2 * longest, LEAST_NEW_TOKENS))
        check_least(settings, self.max_new_tokens_)
        return min(longest, self.max_new_tokens_)

    def _generation_config(self, base: Any) -> Any:
        from llmfit.inference import generation_config, resolve_generation

        settings = resolve_generation(self.generation)
        most = settings.max_new_tokens or self.max_new_tokens_
        return generation_config(settings, self._prompts.encoder(base).end_ids, most, base.pad_id, base.start_ids)

    def predict(self, X: Any) -> Any:
        """Generate the answer of every row.

        Parameters
        ----------
        X : as for `fit`, with or without the target column
            ``n_rows`` rows.

        Returns
        -------
        Series of shape (n_rows,), str
            With the index of `X`; an ndarray where `X` is an array.

        Warns
        -----
        TruncationWarning
            If answers reached ``max_new_tokens_`` without an end.
        """
        table, frame = self._read_rows(X)
        return self._column(table, self._respond(frame))

    def _column(self, table: Any, answers: Any) -> Any:
        return table.answer(np.array(answers, dtype=object), self.target_, "str")

    def _in_words(self, base: Any, rows: Sequence[Any], later: int = 0) -> tuple[Any, list[tuple[int, ...]]]:
        from llmfit.inference import check_least, generate, resolve_generation

        encoder = self._prompts.encoder(base)
        settings = resolve_generation(self.generation)
        most = settings.max_new_tokens or self.max_new_tokens_
        check_least(settings, most)
        longest = max(row.length for row in rows) + most
        with self._lend(base, longest) as model, self._bar(len(rows), "generate") as bar:
            answers, cut = generate(
                model,
                [row.prompt for row in rows],
                settings,
                end_ids=encoder.end_ids,
                max_new_tokens=most,
                context_length=self._context(base, self._adapter) - later,
                device=base.device,
                pad_id=base.pad_id,
                start_ids=base.start_ids,
                said=[row.said for row in rows],
                batch_tokens=self.batch_tokens,
                progress=bar.update,
            )
        lead = self._prompts.template.frame.lead
        texts = [encoder.decode(ids).removeprefix(lead) for ids in answers]
        of = f" answers for {self.target_!r} reached max_new_tokens={most} without an end."
        warn(counted(TruncationWarning, cut, " of ", len(rows), of))
        return texts, answers

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Share of the rows whose generated answer is the true one, white space at the ends aside.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True answers; None takes the target column of `X`.
        sample_weight : array-like of shape (n_rows,), default=None

        Returns
        -------
        float
            Between 0 and 1.
        """
        table, frame = self._read_rows(X)
        return self._score(table, read_target(self, table, y), self._respond(frame), sample_weight)

    def _score(self, table: Any, target: pd.Series, answers: Any, sample_weight: Any) -> float:
        pairs = zip(self._answer_texts(target), answers, strict=True)
        return mean_hit(table, [a.strip() == b.strip() for a, b in pairs], sample_weight)

    def evaluate(self, X: Any, y: Any = None, *, metrics: Any = ()) -> dict[str, Any]:
        """Measure the generated answers, and how likely the model finds the true ones.

        Parameters
        ----------
        X : as for `fit`
        y : array-like of shape (n_rows,), default=None
            True answers; None takes the target column of `X`.
        metrics : str, path, callable or list of them, default=()
            More metrics: callables ``(y_true, y_pred)``, local paths or names of the library evaluate.

        Returns
        -------
        dict
            exact_match, token_f1, rouge1, rouge2, rougeL (0 to 1), bleu, chrf (0 to 100) and perplexity of the true
            answers, per token.
        """
        from llmfit.metrics import metric_list

        metrics = metric_list(metrics)
        table, frame = self._read_rows(X)
        target, base = read_target(self, table, y), self._fitted_base()
        return self._measure(
            target, self._respond(frame), metrics, base=base, rows=self._encode_known(base, table, target)
        )

    def _measure(self, target: pd.Series, answers: Any, metrics: Any = (), **known: Any) -> dict[str, Any]:
        """Measure raw answers; `known` are the base model and the rows encoded with their true answers."""
        from llmfit.metrics import extra_metrics, text_metrics

        truth, predicted = self._answer_texts(target), list(answers)
        result = text_metrics(truth, predicted, perplexity=self._perplexity(**known))
        return self._evaluated({**result, **extra_metrics(metrics, truth, predicted, taken=result)}, len(truth))

    def _perplexity(self, base: Any, rows: Sequence[Any]) -> float:
        from llmfit.scoring import reference_losses

        with self._lend(base, max(row.length for row in rows)) as model:
            total, count = reference_losses(
                model,
                rows,
                device=base.device,
                pad_id=base.pad_id,
                start_ids=base.start_ids,
                batch_tokens=self.batch_tokens,
            )
        return float(np.exp(total / count))
