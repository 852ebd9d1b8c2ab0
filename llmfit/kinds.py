"""What kind of model a configuration of transformers describes, and whether it draws numbers or lacks some.

Takes a configuration, or a model that was loaded; gives words and the class that loads such a model. Loads nothing;
what it changes is said there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llmfit.exceptions import ModelLoadError, quoted

__all__ = ["draws_numbers", "find_own", "kind_of", "missing_words", "see_both_ways"]

DRAWN = ("drop", "jitter")  # in the names of settings: what is dropped, and noise on what a router sees
BOTH_WAYS = (True, "all")  # of `use_bidirectional_attention`; "vision" is for images alone
UNTOLD = ("gemma", "gemma2")  # families that keep that flag from what makes their masks


def find_own(model: Any) -> Any:
    """Find the model of transformers in a module that holds it, such as one that an adapter was put into; or None."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def kind_of(config: Any) -> tuple[str, Any]:
    """Tell what kind of model a configuration describes, and the class that loads it.

    Families such as BERT can be built as decoders too: what the weights were saved from decides. A decoder that was
    trained to look both ways is an encoder: it would see the padding behind a row.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    beside = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or (config.model_type in beside and config.model_type not in {*causal, *masked}):
        config.is_encoder_decoder = True  # an encoder that was saved alone, as T5's, says it is none
        return "encoder-decoder", transformers.AutoModelForSeq2SeqLM
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


def missing_words(model: Any, kind: str, missing: Collection[str], name: str) -> tuple[str, ...]:
    """Name the weights that a model's files do not have, and that a linear head puts aside.

    Those are the output embeddings and, beside an encoder, the decoder. What an encoder makes of its first token is
    read by nobody here.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    kind : str
        See :class:`~llmfit.base_model.BaseModel`.
    missing : collection of str
        What transformers has filled with random numbers.
    name : str
        Of the base model.

    Raises
    ------
    ModelLoadError
        If others are missing.
    """
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    computed = [f"{place}." for place, module in model.named_modules() if "Sinusoidal" in type(module).__name__]
    known = {key for key in known if not key.startswith(tuple(computed))}  # those have no file to be missing in
    gone = sorted(key for key in missing if key in known and not (kind == "encoder" and "pooler" in key))
    if not gone:
        return ()
    aside = [model.get_output_embeddings()] if kind != "encoder" else []
    aside += [model.get_decoder()] if kind == "encoder-decoder" else []
    places = [f"{place}." for place, module in model.named_modules() if any(module is one for one in aside)]
    rest = [key for key in gone if not key.startswith(tuple(places))]
    if rest:
        raise ModelLoadError(
            f"The base model {name!r} has no weights for {quoted(rest, most=3)}: its files are incomplete, or of "
            "another model than its configuration says."
        )
    return tuple(gone)
