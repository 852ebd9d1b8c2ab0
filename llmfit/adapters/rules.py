"""What a setting of an adapter may be, by its name: the field's words mean the same in every method.

Takes a name, a method and a value; raises one ParameterError or nothing. A setting that is new to the house is one
line in `RULES`.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llmfit.exceptions import ParameterError, check_choice, check_int, check_number, parameter_error, reason

__all__ = ["RULES", "as_names", "is_pattern"]

Rule = Callable[[str, str, Any], object]

PLAIN = re.compile(r"[\w.-]*")  # what names of layers are made of


def as_names(value: Any) -> list[str]:
    """Write one name, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def is_pattern(value: Any) -> bool:
    """Tell a regular expression, which has to match the whole name of a layer, from a name.

    Examples
    --------
    >>> [is_pattern(value) for value in ("q_proj", "all-linear", "self_attn.q_proj", ".*[qv]_proj", ["q_proj"])]
    [False, False, False, True, False]
    """
    return isinstance(value, str) and not PLAIN.fullmatch(value)


def _places(name: str, owner: str, value: Any) -> None:
    if is_pattern(value):
        _expression(name, owner, value)
    else:
        _names(name, owner, value)


def _expression(name: str, owner: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ParameterError(
            f"The {name!r} parameter of {owner} names layers by a pattern that cannot be read, {value!r}: "
            f"{reason(error)}."
        ) from error


def _names(name: str, owner: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
        wanted = "'all-linear' or a list of names" if name == "target_modules" else "a name or a list of names"
        raise parameter_error(name, owner, wanted, names)


def _list(name: str, owner: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(n, str) and n for n in value):
        raise parameter_error(name, owner, "a list of names", value)


def _number(name: str, owner: str, value: Any, *, least: float = 0, open_ends: bool = False) -> None:
    check_number(name, owner, value, least=least, open_ends=open_ends)


def _share(name: str, owner: str, value: Any) -> None:
    if check_number(name, owner, value, least=0, most=1) == 1:
        raise parameter_error(name, owner, "a number >= 0 and < 1", value)


def _between(name: str, owner: str, value: Any) -> None:
    check_number(name, owner, value, least=0, most=1, open_ends=True)


def _flag(name: str, owner: str, value: Any) -> None:
    check_choice(name, owner, value, [True, False])


def _text(name: str, owner: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise parameter_error(name, owner, "a text", value)


def _layers(name: str, owner: str, value: Any) -> None:
    numbers_ = value if isinstance(value, list | tuple) else [value]
    if not numbers_ or any(not _is_whole(n) for n in numbers_):
        raise parameter_error(name, owner, "an int >= 0 or a list of them", value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _tokens(name: str, owner: str, value: Any) -> None:
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    if not lists or not all(isinstance(ids, list | tuple) and ids and all(map(_is_whole, ids)) for ids in lists):
        raise parameter_error(name, owner, "a list of token ids, or a dict of layer to such a list", value)
    if any(len({*ids}) < len(ids) for ids in lists):
        raise parameter_error(name, owner, "distinct token ids", value)


def _pattern(name: str, owner: str, value: Any, *, whole: bool = True) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise parameter_error(name, owner, "a dict of layer to number", value)
    for key, number in value.items():
        _expression(name, owner, key)
        if whole:
            check_int(f"{name}[{key!r}]", owner, number, least=1)
        else:
            check_number(f"{name}[{key!r}]", owner, number, least=0)


def ranks_or_shares(name: str, owner: str, value: Any) -> None:
    """Check a dict of layer to rank, or to a rank's share of the layer's width."""
    _pattern(name, owner, value, whole=False)
    for key, number in value.items():
        if number == 0 or (number > 1 and number != int(number)):
            raise parameter_error(f"{name}[{key!r}]", owner, "an int >= 1, or a number > 0 and <= 1", number)


def one_of(choices: Sequence[Any]) -> Rule:
    """Make a rule of a list of choices."""
    return lambda name, owner, value: check_choice(name, owner, value, choices)


def least(number: int) -> Rule:
    """Make a rule of the least int."""
    return partial(check_int, least=number)


POSITIVE = partial(_number, open_ends=True)

# A value of None, where it is the default, says that the method decides; it is never checked.
RULES: dict[str, Rule] = {
    "adapter_layers": least(1),
    "adapter_len": least(1),
    "alpha": _number,
    "alpha_pattern": partial(_pattern, whole=False),
    "apply_GS": _flag,
    "beta1": _between,
    "beta2": _between,
    "bias": one_of(["none", "all", "lora_only"]),
    "block_share": _flag,
    "block_size": least(1),
    "block_size_pattern": _pattern,
    "boft_block_num": least(0),
    "boft_block_size": least(2),
    "boft_n_butterfly_factor": least(1),
    "coft": _flag,
    "d_initial": _number,
    "decompose_both": _flag,
    "decompose_factor": least(-1),
    "deltaT": least(1),
    "dropout": _share,
    "encoder_dropout": _share,
    "encoder_hidden_size": least(1),
    "encoder_num_layers": least(1),
    "encoder_reparameterization_type": one_of(["MLP", "LSTM"]),
    "ensure_weight_tying": _flag,
    "eps": POSITIVE,
    "exclude_modules": _places,
    "feedforward_modules": _names,
    "init": one_of(["vocabulary", "random"]),
    "init_logits_std": POSITIVE,
    "init_r": least(2),
    "init_text": _text,
    "init_v_bound": POSITIVE,
    "init_vector_bank_bound": POSITIVE,
    "layers_pattern": _names,
    "layers_to_transform": _layers,
    "lora_bias": _flag,
    "loraplus_lr_ratio": POSITIVE,
    "module_dropout": _share,
    "modules_to_save": _names,
    "n_frequency": least(1),
    "n_frequency_pattern": _pattern,
    "num_cayley_neumann_terms": least(1),
    "num_vectors": least(1),
    "num_virtual_tokens": least(1),
    "oft_block_size": least(2),
    "orth_reg_weight": _number,
    "prefix_projection": _flag,
    "projection_prng_key": least(0),
    "projection_seed": least(0),
    "proportional_parameters": _flag,
    "r": least(1),
    "random_loc_seed": least(0),
    "rank_dropout": _share,
    "rank_dropout_scale": _flag,
    "rank_pattern": _pattern,
    "scaling": POSITIVE,
    "sparse": _flag,
    "target_modules": _places,
    "target_parameters": _list,
    "target_r": least(1),
    "tfinal": _number,
    "tinit": _number,
    "topk": least(1),
    "trainable_token_indices": _tokens,
    "u": least(1),
    "use_cayley_neumann": _flag,
    "use_dora": _flag,
    "use_idwt": _flag,
    "use_rslora": _flag,
    "vector_length": least(1),
    "very_sparse": _flag,
    "wavelet_family": _text,
    "weight_tying": _share,
}
