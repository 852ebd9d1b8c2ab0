"""Answers of a head: vectors of a model that is not trained, outputs of one that is.

Takes a base model, a head's spec and encoded rows; gives what a head answers. Knows no target and no frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from llmfit import embeddings, scoring
from llmfit.base_model import BaseModel
from llmfit.encoding import Encoded
from llmfit.exceptions import ModelLoadError, ParameterError, quoted
from llmfit.heads import LinearHead, Pooled, WithHead, split_tensors
from llmfit.templates import SAMPLE, TemplateConfig

__all__ = ["answer", "check_base", "embed", "own_template"]


def check_base(base: BaseModel, head: LinearHead | None, name: object) -> None:
    """Refuse answers in words of a model that has none, or not all of its weights, and of a head at a blind token."""
    if head is None and base.kind == "encoder":
        raise ParameterError(
            f"The base model {str(name)!r} is an encoder, which has no words to answer in. Set head='linear'."
        )
    if head is None and getattr(base, "without", None):
        raise ModelLoadError(
            f"The base model {str(name)!r} has no weights for {quoted(base.without, most=3)}, without which it has no "
            "words to answer in. Set head='linear', or name a model that has them."
        )
    if head is not None and base.kind == "decoder" and head.pooling == "first":
        raise ParameterError(
            "The 'pooling' parameter of head must be 'auto', 'last' or 'mean' for a decoder, whose first token has "
            "seen no other. Got 'first' instead."
        )


def own_template(base: BaseModel, head: LinearHead | None, config: TemplateConfig) -> TemplateConfig:
    """Take the values alone as the default prompt where a head reads all of it at once: nobody answers in words."""
    if head is None or base.kind == "decoder" or config.template is not None or config.task is not None:
        return config
    return replace(config, template=f"{{{SAMPLE}}}")


def embed(
    base: BaseModel,
    head: LinearHead,
    prompts: Sequence[tuple[int, ...]],
    *,
    batch_tokens: Any = "auto",
    progress: Callable[[int], object] = lambda _: None,
    keep: bool = True,
) -> torch.Tensor:
    """Give the vector of every prompt, computed once for as long as it is kept.

    With `keep` False none is kept in the process, nor taken from there: a folder of the head's alone counts.

    Returns
    -------
    Tensor of shape (n_prompts, hidden)
        On the CPU, in float32 or wider.
    """
    pooling = head.pooling_of(base.kind)

    def compute(missing: list[tuple[int, ...]]) -> torch.Tensor:
        with base.attach(Pooled(pooling), longest=max(map(len, missing))) as model:
            return scoring.head_outputs(
                model,
                missing,
                device=base.device,
                pad_id=base.pad_id,
                batch_tokens=batch_tokens,
                progress=progress,
            )

    stored = repr(getattr(base, "quantization", None))  # every setting of it: each gives other vectors
    space = embeddings.space_name(base.source.fingerprint, base.dtype, stored, pooling)
    return embeddings.look_up(space, prompts, compute, head.cache, in_memory=keep)


def answer(estimator: Any, base: BaseModel, rows: Sequence[Encoded]) -> Any:
    """Answer encoded rows with the head of a fitted estimator.

    Returns
    -------
    ndarray of shape (n_rows, outputs), float64
    """
    prompts, head = [row.prompt for row in rows], estimator._head
    own, _ = split_tensors(estimator._tensors)
    with estimator._bar(len(rows), "predict") as bar:
        if estimator._adapter is None:
            budget, keep = estimator.batch_tokens, estimator._keeps_vectors
            vectors = embed(base, head, prompts, batch_tokens=budget, progress=bar.update, keep=keep)
            out = functional.linear(vectors, **{name: tensor.to(vectors.dtype) for name, tensor in own.items()})
        else:
            longest = max(row.length for row in rows)
            spec = WithHead(estimator._adapter, head, len(own.get("weight", ())))
            with base.attach(spec, estimator._tensors, longest=longest) as model:
                out = scoring.head_outputs(
                    model,
                    prompts,
                    device=base.device,
                    pad_id=base.pad_id,
                    batch_tokens=estimator.batch_tokens,
                    progress=bar.update,
                )
    return out.double().numpy()
