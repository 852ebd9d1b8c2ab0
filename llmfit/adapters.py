"""What of a base model is trained: one small dataclass per method, peft underneath.

Takes the `adapter` parameter in any spelling; gives a spec that can install itself in a model lent by
:meth:`llmfit.base_model.BaseModel.attach`, hand its tensors out and write them to a folder. peft is named in this
file only. A new method is one dataclass and one line in `METHODS`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.exceptions import (
    ModelLoadError,
    ParameterError,
    check_choice,
    check_int,
    check_keys,
    check_number,
    parameter_error,
    reason,
    suggest,
)
from llmfit.sources import public_name

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = ["METHODS", "AdapterSpec", "Full", "LoRA", "adapter_defaults", "adapter_from_folder", "resolve_adapter"]

# bitsandbytes, which peft imports, tells everybody with such a CPU that a kernel for 4-bit weights is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Tensors = dict[str, "torch.Tensor"]
LORA_INITS = ("gaussian", "orthogonal")
HARMLESS = ("tie_word_embeddings", "is_gradient_checkpointing", "fan_in_fan_out")  # what peft warns of and sets right


@dataclass(frozen=True)
class AdapterSpec:
    """Base of the adapter specs: settings of one method, checked when `fit` resolves them."""

    type: ClassVar[str]
    learning_rate: ClassVar[float]

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Put the adapter into ``base.model`` and return the module to call."""
        raise AttributeError(f"{self.type} has no install")  # pragma: no cover

    def tensors(self, model: Any) -> Tensors:
        """Copy the adapter's weights to the CPU."""
        raise AttributeError(f"{self.type} has no tensors")  # pragma: no cover

    def save(self, folder: Path, tensors: Tensors, base_name: str) -> None:
        """Write the adapter's weights, and what others need to read them, to a folder."""
        from safetensors.torch import save_file

        save_file(tensors, folder / self.file_name, metadata={"format": "pt"})

    file_name: ClassVar[str] = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoRA(AdapterSpec):
    """Low-rank adaptation: a frozen weight W plus a trained product B A of rank r.

    Parameters
    ----------
    r : int, default=16
        Rank.
    alpha : float or None, default=None
        The update is scaled by ``alpha / r`` (``alpha / sqrt(r)`` with `use_rslora`). None is ``2 * r``, so that a
        search over r keeps the scale.
    dropout : float, default=0.0
        Share of the inputs of A set to zero in training.
    target_modules : str or list of str, default="all-linear"
        Names of the layers adapted, or the name of one; "all-linear" is every linear layer but the output head.
    bias : {"none", "all", "lora_only"}, default="none"
        Biases trained beside.
    use_rslora, use_dora : bool, default=False
        Rank-stabilised scaling [2]_; weight decomposition [3]_.
    init_lora_weights : bool or str, default=True
        How A and B begin: True (A uniform, B zero), "gaussian" (A normal, B zero) or "orthogonal" (an even `r`).

    References
    ----------
    .. [1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models. arXiv:2106.09685.
    .. [2] Kalajdzievski 2023, rsLoRA. arXiv:2312.03732.
    .. [3] Liu et al. 2024, DoRA. arXiv:2402.09353.

    Examples
    --------
    >>> from llmfit import LLMClassifier, LoRA
    >>> LLMClassifier(adapter=LoRA(r=4)).get_params()["adapter__r"]
    4
    """

    type: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 2e-4

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        check_int("r", "LoRA", self.r, least=1)
        if self.alpha is not None:
            check_number("alpha", "LoRA", self.alpha, least=0)
        if check_number("dropout", "LoRA", self.dropout, least=0, most=1) == 1:
            raise parameter_error("dropout", "LoRA", "a number >= 0 and < 1", self.dropout)
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
            raise parameter_error("target_modules", "LoRA", "'all-linear' or a list of names", names)
        check_choice("bias", "LoRA", self.bias, ["none", "all", "lora_only"])
        check_choice("use_rslora", "LoRA", self.use_rslora, [True, False])
        check_choice("use_dora", "LoRA", self.use_dora, [True, False])
        check_choice("init_lora_weights", "LoRA", self.init_lora_weights, [True, *LORA_INITS])
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise parameter_error("r", "LoRA", "even where init_lora_weights is 'orthogonal'", self.r)

    def _peft_config(self, base_name: str | None = None) -> Any:
        from peft import LoraConfig

        base_id, revision = public_name(base_name) if base_name else (None, None)
        names = self.target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_id,
            revision=revision,
            r=int(self.r),
            lora_alpha=2 * self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=names if names == "all-linear" else [names] if isinstance(names, str) else list(names),
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
        )

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Wrap the model's layers; weights in float32 beside a base of any dtype."""
        import peft

        self._check_targets(base.model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=f".*({'|'.join(HARMLESS)}).*")
                model = peft.get_peft_model(base.model, self._peft_config())
        except ValueError as error:
            if "target module" not in str(error).lower():
                raise
            raise ParameterError(
                "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
                f"Got {self.target_modules!r} instead."
            ) from error
        _own_biases(base.model)
        if tensors is not None:
            peft.set_peft_model_state_dict(model, tensors)
        if _is_low(base.dtype):
            _compute_low(base, model)
        return model.requires_grad_(False) if not training else model

    def _check_targets(self, model: Any) -> None:
        """Raise for a name that no layer of the model has; peft would leave it out in silence."""
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        layers = [name for name, _ in model.named_modules()]
        for name in names if self.target_modules != "all-linear" else ():
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                known = sorted(
                    {layer.rpartition(".")[2] for layer in layers if not layer.endswith(tuple("0123456789"))}
                )
                raise ParameterError(
                    "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
                    f"Got {self.target_modules!r} instead.{suggest(name, known)}"
                )

    def tensors(self, model: Any) -> Tensors:
        """Copy A and B of every adapted layer, under the names that peft gives them in files."""
        import peft

        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def save(self, folder: Path, tensors: Tensors, base_name: str) -> None:
        """Write a PEFT adapter folder."""
        super().save(folder, tensors, base_name)
        config = self._peft_config(base_name)
        config.inference_mode = True
        config.save_pretrained(str(folder))


@dataclass(frozen=True)
class Full(AdapterSpec):
    """Full fine-tuning: every weight of a private copy of the base model is trained.

    The copy is held in float32; where the base computes in bfloat16 the forward pass does too, by autocast.
    """

    type: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2e-5
    file_name: ClassVar[str] = "model.safetensors"

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Swap every weight for its own copy; the base's tensors are not written to."""
        import torch

        model = base.model
        if tensors is not None:
            _check_names(tensors, dict(model.named_parameters()))
        low = training and _is_low(base.dtype)
        dtype = torch.float32 if low else base.dtype
        for name, parameter in model.named_parameters():
            own = parameter.data if tensors is None else tensors[name]
            parameter.data = own.to(device=base.device, dtype=dtype, copy=True)
            parameter.requires_grad_(training)
        if low:
            _compute_low(base, model)
        return model

    def tensors(self, model: Any) -> Tensors:
        """Copy every weight."""
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def _own_biases(model: Any) -> None:
    """Give biases that are trained, and what stands beside them in a norm, memory of their own in float32 or wider."""
    import torch

    for module in model.modules():
        vectors = [p for p in module.parameters(recurse=False) if p.dim() == 1]
        if any(p.requires_grad for p in vectors):
            for vector in vectors:
                vector.data = vector.data.to(torch.promote_types(vector.dtype, torch.float32), copy=True)


def _is_low(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def _compute_low(base: BaseModel, model: Any) -> None:
    """Multiply float32 weights in the dtype of the base, as automatic mixed precision does.

    peft would cast every layer's input up to float32 instead, which costs a third of the speed.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    base.model.forward = torch.autocast(base.device.type, dtype=base.dtype)(base.model.forward)


def _check_names(tensors: Tensors, parameters: Mapping[str, Any]) -> None:
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise ModelLoadError(f"The saved weights do not belong to this base model: {odd!r} is in one only.")


def resolve_adapter(value: Any) -> AdapterSpec | None:
    """Turn every spelling of the `adapter` parameter into a checked spec.

    Parameters
    ----------
    value : None, str, dict or AdapterSpec
        A method's name, a dict of "type" and its settings, or a spec. A dict without "type" is LoRA.

    Returns
    -------
    AdapterSpec or None
        None where nothing of the base model is trained.

    Raises
    ------
    ParameterError
        If the method or a setting is unknown, or a value cannot be used.
    """
    if value is None:
        return None
    if isinstance(value, AdapterSpec):
        value.check()
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise parameter_error("adapter", "the estimator", "None, a name, a dict or a spec", value)
    name = value.get("type", "lora")
    check_choice("adapter", "the estimator", name, list(METHODS))
    settings = {key: item for key, item in value.items() if key != "type"}
    method = METHODS[name]
    check_keys(f"The adapter {name!r}", settings, [f.name for f in fields(method)])
    spec = method(**settings)
    spec.check()
    return spec


def adapter_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of an adapter's dict with its default; {} for a method that is unknown."""
    name = given.get("type", "lora")
    method = METHODS.get(name) if isinstance(name, str) else None
    return {"type": name, **{f.name: f.default for f in fields(method)}} if method else {}


def adapter_from_folder(folder: Path, spec: AdapterSpec) -> Tensors:
    """Read the weights that :meth:`AdapterSpec.save` wrote.

    Raises
    ------
    ModelLoadError
        If the file is missing or damaged.
    """
    from safetensors.torch import load_file

    path = folder / spec.file_name
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors raises its own error, which is not exported
        raise ModelLoadError(f"The weights {str(path)!r} cannot be read: {reason(error)}.") from error


METHODS: dict[str, type[AdapterSpec]] = {"lora": LoRA, "full": Full}
