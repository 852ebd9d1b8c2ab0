"""What a configuration of transformers says of a model: what kind it is, and whether it draws numbers in training.

Takes a configuration; gives words and the class that loads such a model. Loads nothing; what it changes is said there.
"""

from __future__ import annotations

from typing import Any

__all__ = ["draws_numbers", "kind_of", "see_both_ways"]

DRAWN = ("drop", "jitter")  # in the names of settings: what is dropped, and noise on what a router sees
BOTH_WAYS = (True, "all")  # of `use_bidirectional_attention`; "vision" is for images alone
UNTOLD = ("gemma", "gemma2")  # families that keep that flag from what makes their masks


def kind_of(config: Any) -> tuple[str, Any]:
    """Tell what kind of model a configuration describes, and the class that loads it.

    Families such as BERT can be built as decoders too: what the weights were saved from decides. A decoder that was
    trained to look both ways is an encoder: it would see the padding behind a row.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return "encoder-decoder", transformers.AutoModelForSeq2SeqLM
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    saved_as_decoder = bool({*(config.architectures or ())} & {*causal.values()})
    decodes = saved_as_decoder or (config.model_type in causal and config.model_type not in masked)
    if decodes and not _looks_both_ways(config):
        return "decoder", transformers.AutoModelForCausalLM
    return "encoder", transformers.AutoModel


def see_both_ways(config: Any) -> None:
    """Let a loaded model that looks both ways do so beside padding too, where transformers would make it look back."""
    if _looks_both_ways(config) and config.model_type in UNTOLD:
        config.is_causal = False


def _looks_both_ways(config: Any) -> bool:
    return getattr(config.get_text_config(), "use_bidirectional_attention", None) in BOTH_WAYS


def draws_numbers(config: Any) -> bool:
    """Tell a model that draws random numbers in training, of its text part alone."""
    settings = {name: value for name, value in config.to_dict().items() if not isinstance(value, dict)}
    return _draws(settings | config.get_text_config().to_dict())


def _draws(settings: dict[str, Any]) -> bool:
    parts = [value for name, value in settings.items() if str(name).endswith("_config") and isinstance(value, dict)]
    amounts = [value for name, value in settings.items() if any(word in str(name) for word in DRAWN)]
    return any(map(_draws, parts)) or any(isinstance(amount, int | float) and amount > 0 for amount in amounts)
