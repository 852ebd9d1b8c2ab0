"""Ludwig's sections on the model: adapter, quantization, generation, prompt; as parameters of an estimator.

Takes what a config says there, and its place; gives values of the parameters adapter, quantization, generation and
template. Knows neither features nor training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmfit.config.ludwig.rows import Table, check_kind, idle, many, mapped, read_section, refused, table
from llmfit.exceptions import ParameterError, check_keys, unknown_key

__all__ = ["SECTIONS", "read_adapter", "read_generation", "read_prompt", "read_quantization"]


def read_adapter(given: Any, place: str) -> Any:
    """Read an adapter: None, a name, or a mapping in Ludwig's words or llmfit's.

    Parameters
    ----------
    given : any
    place : str

    Returns
    -------
    None, str or dict
        As the `adapter` parameter takes it.

    Raises
    ------
    ParameterError
    """
    from llmfit.adapters import adapter_defaults, resolve_adapter

    if not isinstance(given, Mapping):
        resolve_adapter(given)
        return given
    kind = given.get("type", "lora")
    check_kind(ADAPTER["type"], f"{place}.type", kind)
    own = [key for key in adapter_defaults(given) if key != "type"]
    if not own:
        resolve_adapter({"type": kind})  # says what there is
    rows = {**ADAPTER, **ADAPTERS.get(kind, {})}
    said = read_section(rows, given, place, more=own)
    if "postprocessor" in said:
        read_section(POSTPROCESSOR, said.pop("postprocessor"), f"{place}.postprocessor")
    settings = _named(said, {key: _NAMES.get((kind, key), _NAMES.get(("", key), key)) for key in said}, place)
    if settings.get("init_lora_weights") == "default":
        settings["init_lora_weights"] = True
    if settings.get("init_lora_weights") != "eva":
        settings.pop("eva_config", None)  # only that start reads it
    if settings.get("init_lora_weights") != "loftq":
        settings.pop("loftq_config", None)
    settings = {key: value for key, value in settings.items() if value is not None}
    check_keys(f"The config's {place!r}", settings, ["type", *own])
    return settings


def read_quantization(given: Any, place: str) -> Any:
    """Read quantization: None, bits, or a mapping in Ludwig's words or llmfit's; what other bits read has no effect."""
    from llmfit.quantization import quantization_defaults

    if not isinstance(given, Mapping):
        return given
    said = read_section(QUANTIZATION, given, place, more=("type", "double_quant", "compute_dtype", "threshold"))
    bits = said.get("bits", 4)
    known = quantization_defaults({"bits": bits})
    if not known:
        raise ParameterError(f"The config's '{place}.bits' must be 4 or 8. Got {bits!r} instead.")
    for key in said:
        if key not in known and key not in _QUANTIZATION_NAMES:
            raise unknown_key(key, f"The config's {place!r} of {bits} bits", known)
    named = _named(said, {key: _QUANTIZATION_NAMES.get(key, key) for key in said}, place)
    return {"bits": bits, **{name: value for name, value in named.items() if name in known and value is not None}}


def _named(said: Mapping[str, Any], names: Mapping[str, str], place: str) -> dict[str, Any]:
    """Give keys their names here; two that are one may not say different things."""
    found: dict[str, Any] = {}
    for key, value in said.items():
        name = names[key]
        if name in found and found[name] != value:
            raise ParameterError(
                f"The config's '{place}.{key}' is {name!r} here, which is given as well: {value!r} and "
                f"{found[name]!r}. Leave one out."
            )
        found[name] = value
    return found


def read_generation(given: Any, place: str) -> dict[str, Any]:
    """Read how texts are generated; Ludwig draws tokens unless it is told not to."""
    said = {key: value for key, value in read_section(GENERATION, given, place).items() if value is not None}
    drawn = [key for key in ("temperature", "top_k", "top_p") if key in said]
    if said.get("temperature") == 0:
        said["do_sample"] = False
    if drawn and said.setdefault("do_sample", True) is False:
        return {key: value for key, value in said.items() if key not in drawn}  # nothing is drawn that they could shape
    return said


def read_prompt(given: Any, place: str) -> dict[str, Any]:
    """Read the prompt: keys of the `template` parameter."""
    said = read_section(PROMPT, given, place)
    found = {key: said[key] for key in ("task", "template") if said.get(key) is not None}
    few_shot = read_retrieval(said.get("retrieval"), f"{place}.retrieval")
    if CONTEXT.search(found.get("template", "")):
        found["template"] = _without_context(found["template"], few_shot, place)
    return {**found, **({"few_shot": few_shot} if few_shot else {})}


def _without_context(template: str, few_shot: Any, place: str) -> str:
    """Take the field of Ludwig's examples out of a template: here they stand before the prompt, each as a prompt."""
    if few_shot is None:
        raise ParameterError(
            f"The config's '{place}.template' has the field {{__context__}}, but nothing finds the examples that it "
            f"stands for. Say {place}.retrieval, or take the field out."
        )
    left, before = CONTEXT.sub(FIELD, template), ""
    while left != before:  # quotes within tags
        before, left = left, ENCLOSED.sub(FIELD, left)
    last = left.rstrip().endswith(FIELD)
    for taken in (OWN_LINE, LINE_START, WITHIN_LINE):
        left = taken.sub("", left)
    if "{" not in left:
        raise ParameterError(
            f"The config's '{place}.template' shows nothing of a row beside {{__context__}}. Got {template!r} instead."
        )
    return left.rstrip() if last else left


def read_retrieval(given: Any, place: str) -> dict[str, Any] | None:
    """Read which fitted rows stand before a prompt as examples."""
    said = read_section(RETRIEVAL, given, place)
    kind, k = said.get("type"), said.get("k")
    if kind is None:
        if k:
            raise ParameterError(f"The config's '{place}.k' needs '{place}.type'. Got k={k!r} without it.")
        return None
    if kind not in ("random", "semantic"):
        raise ParameterError(f"The config's '{place}.type' must be 'random' or 'semantic'. Got {kind!r} instead.")
    return {"k": k or 1, "retrieval": kind, **({"model": said["model_name"]} if said.get("model_name") else {})}


CONTEXT = re.compile(r"(?<!\{)\{__context__(?:![rsa])?(?::[^{}]*)?\}(?!\})")
FIELD = "{__context__}"
# What goes with the field: quotes, brackets and tags around it alone, the line that it has to itself with its label
# there or above, a few words of which one says that it is one, or else white space and the separator on one side.
ENCLOSED = re.compile(
    rf"""(["'`]){FIELD}\1|("{{3}}|'{{3}}|`{{3}})\s*{FIELD}\s*\2"""
    rf"""|\(\s*{FIELD}\s*\)|\[\s*{FIELD}\s*\]|<(\w+)>\s*{FIELD}\s*</\3>"""
)
_WORD = r"[^\s{}:]+[ \t]+"
_SAYS = (
    r"(?:context|examples?|samples?|demonstrations?|shots?|retriev\w*|similar\w*|related|references?|neighbou?rs?|like)"
)
_LABEL = rf"[ \t]*(?:(?:{_WORD}){{0,2}}{_SAYS}(?:[ \t]+[^\s{{}}:]+){{0,2}})[ \t]*:[ \t]*"
OWN_LINE = re.compile(
    rf"^(?:{_LABEL}\n)?(?:{_LABEL})?[ \t]*{FIELD}[ \t]*(?:\n(?:[ \t]*\n)*|\Z)", re.MULTILINE | re.IGNORECASE
)
LINE_START = re.compile(rf"^{FIELD}[ \t]*[|,;/-]?[ \t]*", re.MULTILINE)
WITHIN_LINE = re.compile(rf"[ \t]*[|,;/-]?[ \t]*{FIELD}")

MERGED = "merging is a step after fit. Call export(path, merge=True)."
COMMON = "the same key"

ADAPTER: Table = table(
    mapped("type", "adapter.type; a mapping without it is LoRA", "text"),
    refused("pretrained_adapter_weights", "the settings of such a folder come with it. Say adapter: path/to/folder."),
    mapped("postprocessor", "see adapter.postprocessor", "mapping"),
)
POSTPROCESSOR: Table = table(
    refused("merge_adapter_into_base_model", MERGED, False),
    idle("progressbar", "there is no merge within fit that a bar could show", False),
)
_NO_LAYERS = "the base model is shared between estimators, so that no layers are added to it."
_LORA = (
    mapped("r", "adapter.r", "int", 8),
    mapped("alpha", "adapter.alpha; None is 2 r in both", "number"),
    mapped("dropout", "adapter.dropout", "number", 0.05),
    mapped("bias_type", "adapter.bias", "text", "none"),
    mapped("target_modules", "adapter.target_modules; all linear layers where it is not given", "names"),
    mapped("use_rslora", "adapter.use_rslora", "bool", False),
    mapped("use_dora", "adapter.use_dora", "bool", False),
    mapped("loraplus_lr_ratio", "adapter.loraplus_lr_ratio", "number"),
    mapped("init_lora_weights", "adapter.init_lora_weights; 'default' is True", "any", "default"),
    mapped("eva_config", "adapter.eva_config, where init_lora_weights is 'eva'", "mapping"),
    mapped("loftq_config", "adapter.loftq_config, where init_lora_weights is 'loftq'", "mapping"),
    mapped("rank_pattern", "adapter.rank_pattern", "mapping"),
    mapped("alpha_pattern", "adapter.alpha_pattern", "mapping"),
    refused("layer_replication", _NO_LAYERS),
)
_NOT_IN_ADALORA = "AdaLoRA has no such setting: PEFT reads it for LoRA alone."
_TARGETS = mapped("target_modules", "adapter.target_modules; all linear layers where it is not given", "names")
ADAPTERS: dict[str, Table] = {
    "lora": table(*_LORA),
    "adalora": table(
        mapped("alpha", "adapter.alpha", "number"),
        mapped("dropout", "adapter.dropout", "number", 0.05),
        _TARGETS,
        mapped("target_r", "adapter.target_r", "int", 8),
        mapped("init_r", "adapter.init_r", "int", 12),
        mapped("tinit", "adapter.tinit", "number", 0),
        mapped("tfinal", "adapter.tfinal", "number", 0),
        mapped("delta_t", "adapter.deltaT", "int", 1),
        mapped("beta1", "adapter.beta1", "number", 0.85),
        mapped("beta2", "adapter.beta2", "number", 0.85),
        mapped("orth_reg_weight", "adapter.orth_reg_weight", "number", 0.5),
        idle("total_step", "the steps of the fit are counted", 10000),
        idle("r", "AdaLoRA's ranks are init_r and target_r, in PEFT as well", 8),
        mapped("bias_type", "adapter.bias", "text", "none"),
        refused("rank_pattern", "the ranks of layers are what AdaLoRA finds."),
        many("use_rslora use_dora", refused, _NOT_IN_ADALORA, False),
        many("loraplus_lr_ratio alpha_pattern", refused, _NOT_IN_ADALORA),
        refused("layer_replication", _NO_LAYERS),
        refused("init_lora_weights", "AdaLoRA begins as a product that adds nothing.", "default", True),
        many("eva_config loftq_config", idle, "read by starts that AdaLoRA has not"),
    ),
    "ia3": table(
        mapped("target_modules", "adapter.target_modules; PEFT's choice for the model where it is not given", "names"),
        mapped("feedforward_modules", "adapter.feedforward_modules", "names"),
        idle("fan_in_fan_out", "the kind of a layer is read off the model", False),
        mapped("modules_to_save", "adapter.modules_to_save", "names"),
        refused("init_ia3_weights", "(IA)3 begins as ones, which change nothing.", True),
    ),
    "vera": table(
        mapped("r", "adapter.r", "int", 256),
        _TARGETS,
        mapped("projection_prng_key", "adapter.projection_prng_key", "int", 0),
    ),
    "loha": table(mapped("r", "adapter.r", "int", 8), mapped("alpha", "adapter.alpha", "number", 8), _TARGETS),
    "lokr": table(mapped("r", "adapter.r", "int", 8), mapped("alpha", "adapter.alpha", "number", 8), _TARGETS),
    "fourierft": table(
        mapped("n_frequency", "adapter.n_frequency", "int", 1000),
        mapped("scaling", "adapter.scaling", "number", 150.0),
        _TARGETS,
    ),
    "boft": table(
        mapped("boft_block_size", "adapter.boft_block_size", "int", 4),
        mapped("boft_n_butterfly_factor", "adapter.boft_n_butterfly_factor", "int", 1),
        mapped("boft_dropout", "adapter.dropout", "number", 0.05),
        _TARGETS,
    ),
    "tinylora": table(
        mapped("r", "adapter.r", "int", 2),
        mapped("u", "adapter.u", "int", 64),
        mapped("weight_tying", "adapter.weight_tying", "number", 0.0),
        mapped("projection_seed", "adapter.projection_seed", "int", 42),
        idle("save_projection", "the projection is made anew from its seed", True),
        mapped("tinylora_dropout", "adapter.dropout", "number", 0.0),
        _TARGETS,
    ),
    "c3a": table(
        mapped("block_size", "adapter.block_size", "int", 256),
        _TARGETS,
        mapped("bias_type", "adapter.bias", "text", "none"),
    ),
    "oft": table(
        refused("r", "the number of blocks follows from oft_block_size.", 0),
        mapped("oft_block_size", "adapter.oft_block_size", "int", 32),
        refused("module_dropout", "PEFT's OFT makes such a dropout and never applies it.", 0.0),
        _TARGETS,
        mapped("coft", "adapter.coft", "bool", False),
        mapped("eps", "adapter.eps", "number", 6e-5),
    ),
    "hra": table(mapped("r", "adapter.r", "int", 8), mapped("apply_GS", "adapter.apply_GS", "bool", False), _TARGETS),
    "waveft": table(
        mapped("n_frequency", "adapter.n_frequency", "int", 2592),
        mapped("scaling", "adapter.scaling", "number", 25.0),
        mapped("wavelet_family", "adapter.wavelet_family", "text", "db1"),
        _TARGETS,
    ),
    "ln_tuning": table(mapped("target_modules", "adapter.target_modules; every norm where it is not given", "names")),
    "vblora": table(
        mapped("r", "adapter.r", "int", 4),
        mapped("num_vectors", "adapter.num_vectors", "int", 256),
        mapped("vector_length", "adapter.vector_length", "int", 256),
        mapped("topk", "adapter.topk", "int", 2),
        mapped("vblora_dropout", "adapter.dropout", "number", 0.0),
        refused("save_only_topk_weights", "what is saved can be trained on.", False),
        _TARGETS,
    ),
}
_NAMES = {
    ("", "bias_type"): "bias",
    ("adalora", "delta_t"): "deltaT",
    ("boft", "boft_dropout"): "dropout",
    ("tinylora", "tinylora_dropout"): "dropout",
    ("vblora", "vblora_dropout"): "dropout",
}

QUANTIZATION: Table = table(
    refused("backend", "llmfit quantizes with bitsandbytes.", "bitsandbytes"),
    refused("mode", "it is a setting of torchao, and llmfit quantizes with bitsandbytes."),
    refused("qat", "there is no training that quantizes as it goes.", False),
    mapped("bits", "quantization.bits", "int", 4),
    mapped("llm_int8_threshold", "quantization.threshold, with 8 bits", "number", 6.0),
    refused("llm_int8_has_fp16_weight", "the frozen weights are kept in 8 bits alone.", False),
    mapped("bnb_4bit_compute_dtype", "quantization.compute_dtype, with 4 bits", "text", "float16"),
    mapped("bnb_4bit_use_double_quant", "quantization.double_quant, with 4 bits", "bool", True),
    mapped("bnb_4bit_quant_type", "quantization.type, with 4 bits", "text", "nf4"),
)
_QUANTIZATION_NAMES = {
    "llm_int8_threshold": "threshold",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_quant_type": "type",
}

_NO_SUCH = "generation here has no such setting."
_DRAWN = "; with do_sample: false it has no effect, as in Ludwig"
GENERATION: Table = table(
    mapped("max_new_tokens", "generation.max_new_tokens; twice the longest answer of fit where not given", "int", 32),
    mapped("min_new_tokens", "generation.min_new_tokens", "int"),
    mapped("do_sample", "generation.do_sample; true where temperature, top_k or top_p is given", "bool", True),
    mapped("temperature", f"generation.temperature; 0 is do_sample: false{_DRAWN}", "number", 0.1),
    mapped("top_k", f"generation.top_k{_DRAWN}", "int", 50),
    mapped("top_p", f"generation.top_p{_DRAWN}", "number", 1.0),
    mapped("num_beams", "generation.num_beams", "int", 1),
    mapped("repetition_penalty", "generation.repetition_penalty", "number", 1.0),
    mapped("length_penalty", "generation.length_penalty", "number", 1.0),
    mapped("no_repeat_ngram_size", "generation.no_repeat_ngram_size", "int", 0),
    idle("max_length", "an answer's length is max_new_tokens, which wins in Ludwig as well", 32),
    refused("min_length", "say min_new_tokens.", 0),
    refused("early_stopping", _NO_SUCH, False),
    refused("num_beam_groups", _NO_SUCH, 1),
    idle("use_cache", "a matter of speed alone; keys and values are always kept", True),
    idle("prompt_lookup_num_tokens", "a matter of speed alone"),
    many("typical_p diversity_penalty", refused, _NO_SUCH, 1.0, 0.0),
    many("epsilon_cutoff eta_cutoff", refused, _NO_SUCH, 0.0),
    refused("encoder_repetition_penalty", _NO_SUCH, 1.0),
    many("renormalize_logits remove_invalid_values", refused, _NO_SUCH, False),
    many(
        "max_time penalty_alpha bad_words_ids force_words_ids forced_bos_token_id forced_eos_token_id",
        refused,
        _NO_SUCH,
    ),
    many("exponential_decay_length_penalty suppress_tokens begin_suppress_tokens", refused, _NO_SUCH),
    many("forced_decoder_ids sequence_bias guidance_scale", refused, _NO_SUCH),
    many("pad_token_id bos_token_id eos_token_id", refused, "the tokenizer of the base model says it."),
)

PROMPT: Table = table(
    mapped("task", "template.task", "text"),
    mapped(
        "template",
        "template.template; {__task__} and {task}, {__sample__}, and every column. {__context__} is taken out "
        "where there is retrieval: the examples stand before the prompt, each as a prompt with its answer",
        "text",
    ),
    mapped("retrieval", "template.few_shot; see prompt.retrieval", "mapping"),
)
RETRIEVAL: Table = table(
    mapped("type", "template.few_shot.retrieval", "text"),
    idle("index_name", "the examples are kept with the estimator"),
    mapped("model_name", "template.few_shot.model; the base model itself where it is not given", "text"),
    mapped("k", "template.few_shot.k; 1 where it is not given", "int", 0),
)
MODEL_PARAMETERS: Table = table(
    refused("rope_scaling", "the base model is read as its files say."),
    refused("neftune_noise_alpha", "there is no noise on embeddings.", 0),
)
SECTIONS: dict[str, Table] = {
    "prompt": PROMPT,
    "prompt.retrieval": RETRIEVAL,
    "adapter": ADAPTER,
    "adapter.postprocessor": POSTPROCESSOR,
    **{f"adapter ({kind})": rows for kind, rows in ADAPTERS.items()},
    "quantization": QUANTIZATION,
    "model_parameters": MODEL_PARAMETERS,
    "generation": GENERATION,
}
