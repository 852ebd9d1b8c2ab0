"""An adapter written into the weights of its base model.

Takes a model with an adapter in it, in full precision; gives a plain model of transformers with the same answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfit.adapters.peft_spec import is_packed, quiet
from llmfit.adapters.spec import AdapterSpec
from llmfit.exceptions import ParameterError, reason
from llmfit.memory import is_out_of_memory

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["check_mergeable", "merge", "unpack_into"]


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


def unpack_into(base: BaseModel, quantized: BaseModel) -> None:
    """Write what the layers of a quantized model stand for into a copy of the model in full precision.

    Parameters
    ----------
    base : BaseModel
        Nobody else's: its weights change for good.
    quantized : BaseModel
        Of the same files; it stays as it is.
    """
    from llmfit.adapters.lora_starts import is_reversed, unpacked

    with quantized.attach(None) as model:
        layers = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None and is_packed(m)}
        for name, layer in layers.items():
            weight = unpacked(layer).T if is_reversed(layer) else unpacked(layer)
            base.model.get_submodule(name).weight.data = weight.to(base.device, base.dtype, copy=True).contiguous()
    base.unpacked = frozenset(layers)


def merge(model: Any) -> Any:
    """Write the adapter that is installed in a model into its weights, W' = W + B A for LoRA.

    Parameters
    ----------
    model : torch.nn.Module
        As an adapter's `install` gives it, in a base that is not quantized and nobody else's: weights change for good.

    Returns
    -------
    transformers.PreTrainedModel
        Without any adapter.

    Raises
    ------
    ParameterError
        If the method cannot be merged into this model.
    """
    if not hasattr(model, "merge_and_unload"):
        return model  # full fine-tuning put its weights there itself
    tied = _untie(model.get_base_model())
    try:
        with quiet():
            plain = model.merge_and_unload()
    except (ValueError, AttributeError, NotImplementedError, TypeError, RuntimeError) as error:  # method by method
        if is_out_of_memory(error):
            raise
        raise ParameterError(
            f"The adapter cannot be merged: {reason(error)}. Use merge=False, which writes a PEFT folder."
        ) from error
    if tied:
        _tie_again(plain)
    return plain


def _untie(model: Any) -> bool:
    """Part an output head from the embedding whose weights it shares: an adapter may change one of them only."""
    from torch import nn

    embedding, head = (_inner(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    if head is None or embedding is None or getattr(head, "weight", None) is not embedding.weight:
        return False
    if hasattr(head, "modules_to_save"):  # trained in full, as one with the embedding
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
