"""A fitted linear head as a model of transformers for sequence classification, where there is one with its answers.

Takes a fitted estimator and its base model with the adapter in it; gives the module, or one sentence that says why
there is none. Such a model multiplies the last token's vector by one matrix: what adds a number is none.
"""

from __future__ import annotations

from typing import Any

from llmfit.exceptions import ParameterError
from llmfit.features import label_text
from llmfit.heads import Pooled, WithHead, split_tensors

__all__ = ["LOADER", "as_classifier", "check_classifier", "installed", "padded_probe"]

LOADER = "AutoModelForSequenceClassification"
LIKE = 1e-4  # of the largest answer: what two ways to compute it may differ by
PROBE = ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14))  # tokens that both are tried on


def check_classifier(estimator: Any) -> None:
    """Refuse a head that is not exactly a model for sequence classification.

    Raises
    ------
    ParameterError
    """
    kind = estimator.base_model_.get("kind", "decoder")
    why = None
    if estimator._targets is not None:
        why = "has one target, and this one has several"
    elif kind != "decoder":
        why = f"is a decoder: transformers puts layers of its own between an {kind} and the head"
    elif estimator._head.pooling_of(kind) != "last":
        why = f"reads the last token, and this one pools by {estimator._head.pooling!r}"
    elif estimator._head_task()[0] == "number":
        why = "has no place for the mean of a number's targets"
    elif estimator._head.bias:
        why = "has no bias: fit with head={'type': 'linear', 'bias': False}"
    if why is not None:
        raise _refused(why, estimator)


def _refused(why: str, estimator: Any) -> ParameterError:
    whole = getattr(estimator._adapter, "type", None) == "full"
    advice = "Use save()." if whole else "Use merge=False, which writes the head beside the adapter, or save()."
    return ParameterError(
        f"A linear head is merged into a model of transformers for sequence classification, which {why}. {advice}"
    )


def installed(estimator: Any) -> Any:
    """Say what is put into the base model: the adapter with the head, or what pools its vectors."""
    if estimator._head is None:
        return estimator._adapter
    if estimator._adapter is None:
        return Pooled("last")
    return WithHead(estimator._adapter, estimator._head, len(split_tensors(estimator._tensors)[0]["weight"]))


def as_classifier(estimator: Any, base: Any, lent: Any) -> Any:
    """Write a head and the model below it, merged, as a model for sequence classification.

    Parameters
    ----------
    estimator : BaseLLM
    base : BaseModel
        Nobody else's: its weights change.
    lent : torch.nn.Module
        What :func:`installed` is, put into it.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    ParameterError
        If transformers has no such model of the family, or one that answers otherwise.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as FAMILIES

    from llmfit.adapters.merging import merge

    pooler = getattr(lent, "backbone", lent)
    weight = split_tensors(estimator._tensors)[0]["weight"].to(base.dtype)
    expected = _probe(pooler, base.pad_id) @ weight.T
    plain, config = merge(pooler.model), base.model.config
    if type(config) not in FAMILIES:
        raise _refused(f"transformers does not have of the family {config.model_type!r}", estimator)
    _label(config, estimator, base.pad_id)
    with torch.device("meta"):  # every part is put in its place below
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, plain.base_model)
    model.score = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=base.dtype)
    model.score.weight.data = weight
    others = (*model.named_parameters(), *model.named_buffers())
    if any(tensor.is_meta for _, tensor in others) or not _alike(model.eval(), expected, base.pad_id):
        raise _refused(f"of the family {config.model_type!r} would answer otherwise", estimator)
    return model


def padded_probe(pad_id: int) -> Any:
    """Fill up two short rows: ids, and how many of each are its own."""
    import torch

    longest = max(map(len, PROBE))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in PROBE])
    return ids, torch.tensor([len(row) for row in PROBE])


def _probe(pooler: Any, pad_id: int) -> Any:
    """Pool a few tokens: (2, hidden)."""
    import torch

    with torch.no_grad():
        return pooler(*padded_probe(pad_id))


def _alike(model: Any, expected: Any, pad_id: int) -> bool:
    import torch

    ids, lengths = padded_probe(pad_id)
    known = torch.arange(ids.shape[1])[None] < lengths[:, None]
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=known.long()).logits
    return bool((found - expected).abs().max() <= LIKE * expected.abs().max().clamp(min=1.0))


def _label(config: Any, estimator: Any, pad_id: int) -> None:
    """Write down what the outputs mean, and what a row is filled up with."""
    texts = list(map(label_text, estimator.classes_))
    config.id2label, config.label2id = dict(enumerate(texts)), {text: i for i, text in enumerate(texts)}
    several = estimator._head_task()[0] == "sets"
    config.problem_type = "multi_label_classification" if several else "single_label_classification"
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
