"""What every adapter spec is: settings, checks, and a way into a model and out of it.

Takes a model lent by :meth:`llmfit.base_model.BaseModel.attach`; gives the module to call and the adapter's tensors.
Knows no single method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.exceptions import ModelLoadError, reason

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = [
    "TASK_TYPES",
    "AdapterSpec",
    "Tensors",
    "adapter_from_folder",
    "check_names",
    "compute_low",
    "is_low",
    "own_biases",
]

Tensors = dict[str, "torch.Tensor"]
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}  # peft's


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

    def save(self, folder: Path, tensors: Tensors, base_name: str, kind: str = "decoder") -> None:
        """Write the adapter's weights, and what others need to read them, to a folder.

        Parameters
        ----------
        folder : Path
        tensors : dict of str to Tensor
        base_name : str
            Name or folder of the base model.
        kind : str
            What kind of model it is; see :class:`~llmfit.base_model.BaseModel`.
        """
        from safetensors.torch import save_file

        save_file(tensors, folder / self.file_name, metadata={"format": "pt"})

    file_name: ClassVar[str] = "adapter_model.safetensors"


def own_biases(model: Any) -> None:
    """Give biases that are trained, and what stands beside them in a norm, memory of their own in float32 or wider."""
    import torch

    for module in model.modules():
        vectors = [p for p in module.parameters(recurse=False) if p.dim() == 1]
        if any(p.requires_grad for p in vectors):
            for vector in vectors:
                vector.data = vector.data.to(torch.promote_types(vector.dtype, torch.float32), copy=True)


def is_low(dtype: torch.dtype) -> bool:
    """Tell a dtype of fewer than four bytes: weights that are trained are kept wider."""
    return dtype.itemsize < 4


def compute_low(base: BaseModel, model: Any) -> None:
    """Multiply float32 weights in the dtype of the base, as automatic mixed precision does.

    peft would cast every layer's input up to float32 instead, which costs a third of the speed.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    base.model.forward = torch.autocast(base.device.type, dtype=base.dtype)(base.model.forward)


def check_names(tensors: Tensors, parameters: Mapping[str, Any]) -> None:
    """Raise unless saved weights are those of a model's parameters."""
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise ModelLoadError(f"The saved weights do not belong to this base model: {odd!r} is in one only.")


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
