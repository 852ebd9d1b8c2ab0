"""A fitted linear head as files of its own: its numbers, and a small JSON that says what it reads and what it answers.

Takes a fitted estimator; writes to a folder, beside an adapter or alone. Whoever reads them needs torch and the base
model, and no llmfit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfit.estimators.classifying import padded_probe
from llmfit.exceptions import ParameterError
from llmfit.features import label_text
from llmfit.heads import Pooled, save_head, split_tensors

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["HEAD", "LOADERS", "check_reads", "reads", "write_head"]

HEAD = "head.json"
ROUNDING = 0.05  # of the norm of hidden states, in 16 bits
FORMAT = 1
LOADERS = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM", "encoder": "AutoModel"}
STATES = {  # what transformers calls the hidden states that are read
    "decoder": "hidden_states[-1]",
    "encoder-decoder": "encoder_last_hidden_state",
    "encoder": "last_hidden_state",
}


def check_reads(base: BaseModel) -> None:
    """Raise where a head reads something else than the hidden states that others are told of.

    Families differ in what stands between their last layer and their words.

    Raises
    ------
    ParameterError
    """
    if base.kind != "decoder":
        return
    import torch

    from llmfit.selfcheck import apart

    ids, lengths = padded_probe(base.pad_id)
    with base.attach(Pooled("last")) as pooler, torch.no_grad():
        expected = pooler(ids.to(base.device), lengths.to(base.device))
    known = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    with base.attach(None) as model, torch.no_grad():
        told = model(ids.to(base.device), attention_mask=known.to(base.device), output_hidden_states=True)
    found = told.hidden_states[-1][torch.arange(len(ids)), lengths - 1]
    if apart(found.float(), expected.float()) > ROUNDING:
        raise ParameterError(
            f"The base model {base.source.name!r} has layers of its own between its hidden states and its words, and "
            "the head reads what these make: no plain model of transformers gives that. Use save()."
        )


def write_head(estimator: Any, folder: Path) -> None:
    """Write head.safetensors and head.json.

    ``weight`` is of shape (outputs, hidden), ``bias``, where there is one, (outputs,). The JSON has the class of
    transformers that loads the base model (`loader`), which of its outputs is read (`reads`), the positions of virtual
    tokens at its beginning (`skip`), the `pooling` of the others, and for each target its outputs (`first`, `number`)
    with what makes answers of them: `classes` by a softmax, `labels` by a sigmoid each, or a number as
    ``mean + scale * output``.
    """
    save_head(folder, split_tensors(estimator._tensors)[0])
    text = json.dumps({**reads(estimator), "targets": _targets(estimator)}, indent=2, ensure_ascii=False)
    (folder / HEAD).write_text(text + "\n", encoding="utf-8")


def reads(estimator: Any) -> dict[str, Any]:
    """Say what of the base model a head reads."""
    kind = estimator.base_model_.get("kind", "decoder")
    return {
        "format": FORMAT,
        "loader": LOADERS[kind],
        "reads": STATES[kind],
        "skip": getattr(estimator._adapter, "virtual_states", 0),
        "pooling": estimator._head.pooling_of(kind),
    }


def _targets(estimator: Any) -> list[dict[str, Any]]:
    """Say which outputs answer which target, and how."""
    found, first = [], 0
    inner = estimator.estimators_.values() if estimator._targets is not None else [estimator]
    for one in inner:
        task, number = one._head_task()
        found.append({"target": one.target_, "first": first, "number": number, **MEANINGS[task](one)})
        first += number
    return found


MEANINGS: dict[str, Any] = {
    "classes": lambda one: {"classes": list(map(label_text, one.classes_))},
    "sets": lambda one: {"labels": list(map(label_text, one.classes_))},
    "number": lambda one: {"mean": one.target_mean_, "scale": one.target_scale_},
}
