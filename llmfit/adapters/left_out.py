"""Settings of PEFT's that a method here does not have, and why: one literal table.

Takes a method and what is given to it; raises one ParameterError that says the reason, or nothing. What is in no row is
an unknown key like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmfit.exceptions import ParameterError

__all__ = ["LEFT_OUT", "check_left_out"]


def check_left_out(method: Any, given: Iterable[Any]) -> None:
    """Refuse a setting that PEFT's method of that name has, and say why it is not one here.

    Raises
    ------
    ParameterError
    """
    reasons = {**LEFT_OUT[""], **LEFT_OUT.get(getattr(method, "peft_type", ""), {})}
    for key in given:
        if key in reasons and key not in method.__dataclass_fields__:
            raise ParameterError(f"The adapter {method.type!r} has no parameter {key!r}: {reasons[key]}.")


_DRAWN_AGAIN = "the matrices are drawn again from their seed"
_FOR_TESTS = "the method begins as one that changes nothing; PEFT begins it at random in its tests"
_LORA_ALONE = "PEFT reads it for LoRA alone"
_LORA = {
    "megatron_config": "it is about the layers of another framework",
    "megatron_core": "it is about the layers of another framework",
    "use_bdlora": "its factors are in blocks for serving over several devices",
    "use_qalora": "it is for base models that GPTQ has quantized",
    "qalora_group_size": "it is for base models that GPTQ has quantized",
    "runtime_config": "it says where DoRA's start is computed, and changes nothing that is learned",
    "layer_replication": "the base model is shared between estimators, so that no layers are added to it",
    "alora_invocation_tokens": "it switches an adapter on while a text is read",
    "arrow_config": "it chooses among several adapters while a text is read",
    "kasa_config": "it writes into the base model, which is shared, and PEFT leaves its penalty to the training loop",
    "monteclora_config": "PEFT leaves its penalty to the training loop, behind private names",
    "velora_config": "its gradients are no longer exact",
}
_STARTS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")
_PROMPTS = {"modules_to_save": "virtual tokens are learned before a base model that stays as it is"}

LEFT_OUT: dict[str, dict[str, str]] = {
    "": {
        "task_type": "the kind of the base model says it",
        "inference_mode": "fit and predict say it",
        "base_model_name_or_path": "base_model says it",
        "fan_in_fan_out": "the kind of a layer is read off the model",
        "num_transformer_submodules": "the kind of the base model says it",
        "num_layers": "it is read off the model",
        "num_attention_heads": "it is read off the model",
        "token_dim": "it is read off the model",
    },
    "LORA": _LORA,
    "ADALORA": {
        **_LORA,
        **dict.fromkeys(_STARTS, "it is about starts that AdaLoRA has not"),
        **dict.fromkeys(("alpha_pattern", "lora_bias", "use_rslora", "use_dora"), _LORA_ALONE),
        "total_step": "the steps of the fit are counted",
        "r": "its ranks are init_r and target_r",
        "rank_pattern": "the ranks of layers are what it finds",
        "init_lora_weights": "it begins as a product that adds nothing",
        "target_parameters": "its triplets are of layers",
    },
    **{kind: {"init_weights": _FOR_TESTS} for kind in ("BOFT", "HRA", "BEFT")},
    "IA3": {"init_ia3_weights": _FOR_TESTS},
    "OFT": {
        "init_weights": _FOR_TESTS,
        "module_dropout": "PEFT makes such a dropout and never applies it",
        "r": "oft_block_size says it",
    },
    "LOHA": {"init_weights": _FOR_TESTS, "use_effective_conv2d": "it is about convolutions"},
    "LOKR": {"use_effective_conv2d": "it is about convolutions"},
    "VERA": {"init_weights": _FOR_TESTS, "save_projection": _DRAWN_AGAIN},
    "RANDLORA": {"init_weights": _FOR_TESTS, "save_projection": _DRAWN_AGAIN},
    "TINYLORA": {"save_projection": _DRAWN_AGAIN},
    "VBLORA": {"save_only_topk_weights": "nobody could train on from such a file"},
    "ADAPTION_PROMPT": {"target_modules": "it is the attention of the families that PEFT knows"},
    "PREFIX_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PROMPT_TUNING": {
        **_PROMPTS,
        "prompt_tuning_init": "init and init_text say it",
        "prompt_tuning_init_text": "init_text says it",
        "tokenizer_name_or_path": "the base model's tokenizer reads init_text",
        "tokenizer_kwargs": "the base model's tokenizer reads init_text",
    },
}
