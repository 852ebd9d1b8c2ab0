"""The settings of LoRA's starts: which there are, what each may be told, and what peft calls it.

Takes a LoRA spec. Knows no tensor; what the starts do is in :mod:`llmfit.adapters.lora_starts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llmfit.exceptions import check_choice, check_int, check_keys, check_number, parameter_error

__all__ = ["CONFIGS", "MOVING", "PISSA", "STARTS", "check_configs", "moves_base", "settings"]

PISSA = re.compile(r"pissa_niter_\d+")


def moves_base(start: Any) -> bool:
    """Whether a start takes its product out of the base model's weights."""
    return start in MOVING or (isinstance(start, str) and bool(PISSA.fullmatch(start)))


def check_configs(spec: Any, owner: str) -> None:
    """Check the settings of the starts; those of a start that is not chosen are refused."""
    for field, (start, rules) in CONFIGS.items():
        given = getattr(spec, field)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise parameter_error(field, owner, "None or a dict", given)
        if spec.init_lora_weights != start:
            raise parameter_error(field, owner, f"None where init_lora_weights is not {start!r}", given)
        check_keys(field, given, list(rules))
        for key, value in given.items():
            rules[key][1](key, field, value)


def settings(spec: Any) -> dict[str, Any]:
    """Give peft's settings of the start that is chosen."""
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

    field = next((f for f, (start, _) in CONFIGS.items() if start == spec.init_lora_weights), None)
    if field is None:
        return {}
    values = {key: rule[0] for key, rule in CONFIGS[field][1].items()} | dict(getattr(spec, field) or {})
    classes = {
        "eva_config": EvaConfig,
        "corda_config": CordaConfig,
        "loftq_config": dict,
        "lora_ga_config": LoraGAConfig,
    }
    return {field: classes[field](**values)}


def _ratio(name: str, owner: str, value: Any) -> None:
    check_number(name, owner, value, least=1)


def _choice(*choices: Any) -> Callable[[str, str, Any], object]:
    return lambda name, owner, value: check_choice(name, owner, value, choices)


def _whole(name: str, owner: str, value: Any) -> None:
    check_int(name, owner, value, least=1)


MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
STARTS = ("gaussian", "orthogonal", "mica", "eva", *MOVING)
CONFIGS: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "eva_config": (
        "eva",
        {
            "rho": (2.0, _ratio),
            "use_label_mask": (True, _choice(True, False)),
            "whiten": (False, _choice(True, False)),
            "adjust_scaling_factors": (True, _choice(True, False)),
        },
    ),
    "corda_config": (
        "corda",
        {
            "corda_method": ("ipm", _choice("ipm", "kpm")),
            "use_float16_for_covariance": (False, _choice(True, False)),
        },
    ),
    "loftq_config": ("loftq", {"loftq_bits": (4, _choice(4, 8)), "loftq_iter": (1, _whole)}),
    "lora_ga_config": (
        "lora_ga",
        {
            "direction": ("ArB2r", _choice("ArBr", "A2rBr", "ArB2r", "random")),
            "scale": ("stable", _choice("stable", "weight_svd", "gd_scale", "unit")),
            "stable_gamma": (16, _whole),
        },
    ),
}
