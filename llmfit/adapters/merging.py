"""An adapter written into the weights of its base model.

Takes a spec, its tensors and a base model of one's own in full precision; gives a plain model of transformers whose
answers are those of the adapted one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfit.adapters.spec import AdapterSpec, Tensors
from llmfit.exceptions import ParameterError

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["check_mergeable", "merged"]


def check_mergeable(spec: AdapterSpec | None) -> None:
    """Refuse an adapter that is no change of the base model's weights.

    Raises
    ------
    ParameterError
    """
    if spec is not None and not spec.mergeable:
        raise ParameterError(
            f"The adapter {spec.type!r} cannot be merged: what it has learned is no change of the base model's "
            "weights. Use merge=False, which writes a PEFT folder."
        )


def merged(spec: AdapterSpec | None, base: BaseModel, tensors: Tensors) -> Any:
    """Write an adapter into the weights of a base model, W' = W + B A for LoRA.

    Parameters
    ----------
    spec : AdapterSpec or None
        None leaves the model as it is.
    base : BaseModel
        Not quantized, and nobody else's: it is changed for good.
    tensors : dict of str to Tensor
        What the adapter has learned.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    ParameterError
        If merging is not defined for the adapter.
    """
    import torch

    check_mergeable(spec)
    if spec is None:
        return base.model
    with torch.random.fork_rng(devices=[]):  # an adapter draws its first weights before it gets those learned
        model = spec.install(base, tensors, training=False)
    if not hasattr(model, "merge_and_unload"):
        return model  # full fine-tuning put its weights there itself
    tied = _untie(base.model)
    plain = model.merge_and_unload()
    if tied:
        _tie_again(plain)
    return plain


def _untie(model: Any) -> bool:
    """Part an output head from the embedding whose weights it shares: an adapter may change one of them only."""
    from torch import nn

    embedding, head = (_inner(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    if head is None or embedding is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    _say_tied(model.config, False)
    return True


def _inner(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _tie_again(model: Any) -> None:
    """Let embedding and head share their weights where these are still the same."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    same = torch.equal(embedding.weight, head.weight)
    _say_tied(model.config, same)
    if same:
        head.weight = embedding.weight


def _say_tied(config: Any, tied: bool) -> None:
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
