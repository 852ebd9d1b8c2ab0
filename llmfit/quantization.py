"""How the frozen base model is stored: its linear layers in 4 or 8 bits, by bitsandbytes.

Takes the `quantization` parameter in any spelling; gives a checked :class:`Quantization`, and what transformers needs
to load a model that way. Loads nothing itself. The output head, the embeddings and the norms stay as they are.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MethodType
from typing import TYPE_CHECKING, Any

from llmfit.exceptions import (
    ParameterError,
    check_choice,
    check_keys,
    check_number,
    missing_package,
    parameter_error,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULTS",
    "Quantization",
    "check_quantizable",
    "kept_layers",
    "loading_options",
    "memory_footprint",
    "quantization_defaults",
    "resolve_quantization",
    "settle",
]

# bitsandbytes tells everybody with a CPU that a kernel is not installed, and says at every product what 8 bits mean.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

BLOCK = 64  # weights that share a scale in 4 bits
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Quantization:
    """Storage of the frozen base model's linear layers in few bits.

    With 4 bits, a LoRA adapter beside it is QLoRA [1]_; with 8 bits, products are those of LLM.int8() [2]_. On a CPU,
    4-bit layers need a number of inputs that 64 divides; others stay as they are.

    Parameters
    ----------
    bits : {4, 8}, default=4
        Bits of a stored weight.
    type : {"nf4", "fp4"} or None, default=None
        The sixteen values that 4 bits stand for; None is "nf4", which suits weights that are normally distributed.
    double_quant : bool or None, default=None
        With 4 bits, store the blocks' scales in 8 bits as well; None is True.
    compute_dtype : {"auto", "float32", "bfloat16", "float16"} or None, default=None
        With 4 bits, the dtype in which weights are multiplied; None and "auto" are the dtype of the model.
    threshold : float or None, default=None
        With 8 bits, the size from which an input counts as an outlier, and its column is multiplied in 16 bits; 0 knows
        no outliers. None is 6.0. Outliers are looked for in a batch as a whole.

    References
    ----------
    .. [1] Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs. arXiv:2305.14314.
    .. [2] Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale. arXiv:2208.07339.

    Examples
    --------
    >>> from llmfit import LLMClassifier, Quantization
    >>> LLMClassifier(quantization=Quantization(bits=8)).get_params()["quantization__bits"]
    8
    """

    bits: int = 4
    type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        words = [f"{self.bits} bits", self.type or "", "double quantization" if self.double_quant else ""]
        return ", ".join(word for word in words if word)

    def config(self, dtype: torch.dtype, kept: Sequence[str] | None = None) -> Any:
        """Say the same in the words of transformers.

        Parameters
        ----------
        dtype : torch.dtype
            Of the model.
        kept : sequence of str or None
            Layers that stay as they are; None leaves the choice to transformers.
        """
        import torch
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)
        own = self.compute_dtype in (None, "auto")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype if own else getattr(torch, str(self.compute_dtype)),
            llm_int8_skip_modules=kept,
        )


def resolve_quantization(value: Any) -> Quantization | None:
    """Turn every spelling of the `quantization` parameter into a checked setting, defaults filled in.

    Parameters
    ----------
    value : None, 4, 8, dict or Quantization
        A dict without "bits" has 4 of them.

    Raises
    ------
    ParameterError
        If a key is unknown or has no meaning with so many bits, a value cannot be used, or bitsandbytes is missing.

    Examples
    --------
    >>> resolve_quantization(8)
    Quantization(bits=8, type=None, double_quant=None, compute_dtype=None, threshold=6.0)
    """
    if value is None:
        return None
    given = _as_dict(value)
    check_keys("quantization", given, [field.name for field in fields(Quantization)])
    bits = given.get("bits", 4)
    bits = int(bits) if _is_int(bits) else bits
    check_choice("bits", "quantization", bits, list(DEFAULTS))
    settings = {key: item for key, item in given.items() if item is not None and key != "bits"}
    for key in settings:
        if key not in DEFAULTS[bits]:
            raise ParameterError(f"The {key!r} parameter of quantization has no meaning with bits={bits}.")
    quantization = Quantization(bits, **{**DEFAULTS[bits], **settings})
    _check(quantization)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_package("quantization", "bitsandbytes", "quantization")
    return quantization


def _as_dict(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Quantization):
        return asdict(value)
    if isinstance(value, Mapping):
        return value
    if _is_int(value):
        return {"bits": value}
    raise parameter_error("quantization", "the estimator", "None, 4, 8, a dict or a Quantization", value)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(quantization: Quantization) -> None:
    if quantization.bits == 8:
        check_number("threshold", "quantization", quantization.threshold, least=0)
        return
    check_choice("type", "quantization", quantization.type, ["nf4", "fp4"])
    check_choice("double_quant", "quantization", quantization.double_quant, [True, False])
    check_choice("compute_dtype", "quantization", quantization.compute_dtype, COMPUTE_DTYPES)


def quantization_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a `quantization` dict with its default; {} for a number of bits that there is not."""
    bits = given.get("bits", 4)
    return {"bits": bits, **DEFAULTS[bits]} if _is_int(bits) and bits in DEFAULTS else {}


def check_quantizable(adapter: Any, quantization: Quantization | None) -> None:
    """Refuse an adapter that trains the very weights that are stored in few bits, or cannot read them.

    Raises
    ------
    ParameterError
    """
    if adapter is None or quantization is None or quantization.bits in getattr(adapter, "quantizable", (4, 8)):
        return
    why = f"cannot work with weights that are stored in {quantization.bits} bits"
    if adapter.type == "full":
        why = f"trains the base model's own weights, and weights stored in {quantization.bits} bits cannot be trained"
    raise ParameterError(f"adapter={adapter.type!r} {why}. Set quantization=None, or choose an adapter such as 'lora'.")


def loading_options(
    quantization: Quantization | None, loader: Any, config: Any, dtype: Any, device: torch.device
) -> dict[str, Any]:
    """Say how a class of transformers loads a model in few bits: what it is told besides; it places the model as well.

    Parameters
    ----------
    quantization : Quantization or None
    loader : type
        Such as ``AutoModelForCausalLM``.
    config : transformers.PretrainedConfig
    dtype : torch.dtype
    device : torch.device
    """
    import torch

    if quantization is None:
        return {}
    kept = None
    if quantization.bits == 4 and device.type == "cpu":
        with torch.device("meta"):
            kept = kept_layers(loader.from_config(copy.deepcopy(config)))
    return {"quantization_config": quantization.config(dtype, kept), "device_map": {"": device}}


def kept_layers(model: Any) -> list[str] | None:
    """Name the layers of a model that 4 bits must leave as they are on a CPU; None where there are none but the usual.

    bitsandbytes 0.50 takes the scales of other blocks there, in silence, where a row of weights is no whole number of
    blocks.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May hold no weights: its shapes are read.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _inputs(module) % BLOCK
    ]
    return sorted({*odd, *get_keys_to_not_convert(model)}) if odd else None


def _inputs(layer: Any) -> int:
    return int(getattr(layer, "in_features", layer.weight.shape[0]))


def settle(model: Any) -> None:
    """Mend what quantized layers do to themselves on a CPU.

    With bfloat16 instructions, a 4-bit layer would repack its weights when it first predicts, round their scales and
    compute in bfloat16 from then on, and fail where the number of its rows is no multiple of 32. A shared base does not
    change, and predicts as it was trained. An 8-bit layer would lose its scales to DoRA.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.init_8bit_state = MethodType(_take_scales, module)


def _take_scales(layer: Any) -> None:
    """Move an 8-bit layer's weights and scales to where it computes from.

    peft's DoRA makes the weight anew at every pass on a CPU, without the scales that have moved already.
    """
    layer.state.CB = layer.weight.CB
    if layer.weight.SCB is not None:
        layer.state.SCB = layer.weight.SCB
    layer.weight.CB = layer.weight.SCB = None


def memory_footprint(model: Any) -> int:
    """Bytes that a model's weights and buffers take as they are stored, scales included; shared ones count once."""
    seen = {}
    for tensor in _stored(model):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(seen.values())


def _stored(model: Any) -> Iterator[torch.Tensor]:
    """Weights, buffers and what bitsandbytes hangs on them: scales, and the scales of scales."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for owner in (tensor, state, getattr(state, "state2", None)):
            yield from (item for item in getattr(owner, "__dict__", {}).values() if isinstance(item, torch.Tensor))


DEFAULTS: dict[Any, dict[str, Any]] = {
    4: {"type": "nf4", "double_quant": True, "compute_dtype": "auto"},
    8: {"threshold": 6.0},
}
