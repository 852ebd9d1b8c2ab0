"""What every adapter spec is: settings, checks, a way into a model and out of it, and a say in training.

Takes a model lent by :meth:`llmfit.base_model.BaseModel.attach`; gives the module to call and the adapter's tensors.
Training asks a spec for rates of its own, a penalty and what is to happen after a step. Knows no single method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.exceptions import ModelLoadError, reason

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = [
    "TASK_TYPES",
    "AdapterSpec",
    "Plan",
    "Planned",
    "Tensors",
    "adapter_from_folder",
    "check_names",
    "compute_low",
    "count_parameters",
    "is_low",
    "own_biases",
    "stay_wide",
]

Tensors = dict[str, "torch.Tensor"]
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}  # peft's


@dataclass(frozen=True)
class Plan:
    """What an adapter may know of the fit that it is put in for.

    Parameters
    ----------
    steps : int
        Optimiser steps of the whole fit.
    rows : callable () -> iterable
        Some of the rows trained on, each a batch of its own without padding.
    loss : callable (module, batch) -> Tensor
        Mean loss of such a batch, in nats.
    """

    steps: int
    rows: Callable[[], Iterable[Any]]
    loss: Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, repr=False)
class AdapterSpec:
    """Base of the adapter specs: settings of one method, checked when `fit` resolves them."""

    type: ClassVar[str]
    learning_rate: ClassVar[float]
    quantizable: ClassVar[tuple[int, ...]] = (4, 8)  # bits of the base model that it works beside
    recomputable: ClassVar[bool] = True  # works where layers are computed again for their gradients
    mergeable: ClassVar[bool] = True  # can be written into the weights of the base model

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"
        )

    @property
    def virtual_tokens(self) -> int:
        """Positions of the model's context that the adapter takes."""
        return 0

    @property
    def virtual_states(self) -> int:
        """Positions before a row's own among the hidden states that a model gives."""
        return 0

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter draws random numbers in training."""
        return any("dropout" in f.name and getattr(self, f.name) for f in fields(self))

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, plan: Plan | None = None) -> Any:
        """Put the adapter into ``base.model`` and return the module to call.

        Parameters
        ----------
        tensors : dict of str to Tensor or None
            Weights to go in; None begins anew.
        training : bool
        plan : Plan or None
            The fit to come, for adapters that begin from its rows or follow its steps.
        """
        raise AttributeError(f"{self.type} has no install")  # pragma: no cover

    def tensors(self, model: Any) -> Tensors:
        """Copy the adapter's weights to the CPU."""
        raise AttributeError(f"{self.type} has no tensors")  # pragma: no cover

    @property
    def refillable(self) -> bool:
        """Whether `load` makes of an adapter as it was put in whatever its weights say: those are all that differs."""
        return False

    def rate(self, parameter: str) -> float:
        """Factor on the learning rate of the weight of that name."""
        return 1.0

    def penalty(self, model: Any) -> torch.Tensor | None:
        """Scalar that is added to the loss of every step; None for none."""
        return None

    def end_step(self, model: Any, step: int) -> None:
        """Run after optimiser step `step`, counted from 1, while its gradients are still there."""

    def state(self, model: Any) -> Tensors:
        """Give what a checkpoint needs beside the weights that are trained."""
        return {}

    def restore(self, model: Any, state: Tensors) -> None:
        """Take back what :meth:`state` gave."""

    def holds_lost(self, tensors: Tensors) -> bool:
        """Whether weights hold what a quantized base model has lost, and are merged into what is left of it."""
        return False

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

        save_file(self.written(tensors), folder / self.file_name, metadata={"format": "pt"})

    def written(self, tensors: Tensors) -> Tensors:
        """Give the weights as a file has them."""
        return tensors

    @classmethod
    def read(cls, folder: Path, tensors: Tensors) -> Tensors:  # noqa: ARG003 - for those who override it
        """Take the weights of a folder's file as a model has them."""
        return tensors

    file_name: ClassVar[str] = "adapter_model.safetensors"


@dataclass(frozen=True)
class Planned:
    """A spec bound to the fit that it is put in for, as :meth:`llmfit.base_model.BaseModel.attach` takes it."""

    spec: AdapterSpec
    plan: Plan

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Put the adapter in, its plan known."""
        return self.spec.install(base, tensors, training=training, plan=self.plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


def count_parameters(model: Any) -> tuple[int, int]:
    """Count the weights that are trained, and all; weights packed two to a byte count as what they stand for."""
    trained = total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        number = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        total += number
        trained += number if parameter.requires_grad else 0
    return trained, total


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

    peft would cast every layer's input up to float32 instead, which costs a third of the speed. Layers that are not
    trained, and that the model keeps wider than itself, stay so: T5 overflows in float16 where they do not.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    for layer in [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]:
        stay_wide(layer, layer.weight, base.dtype)
    base.model.computes_in = base.dtype  # for those who compare what comes out
    low = torch.autocast(base.device.type, dtype=base.dtype)
    base.model.forward = low(base.model.forward)
    if hasattr(base.model, "generate"):  # it calls the encoder of an encoder-decoder by itself
        base.model.generate = low(base.model.generate)


def stay_wide(layer: Any, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Let a layer whose weight is not trained compute in that one's dtype, if it has more bytes than the model's."""
    if weight.dtype.itemsize > dtype.itemsize and not weight.requires_grad:
        layer.forward = partial(_compute_wide, layer, weight.dtype)


def _compute_wide(layer: Any, dtype: torch.dtype, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    import torch

    with torch.autocast(x.device.type, enabled=False):
        return type(layer).forward(layer, x.to(dtype), *args, **kwargs)


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
        return spec.read(folder, dict(load_file(path)))
    except Exception as error:  # safetensors raises its own error, which is not exported
        raise ModelLoadError(f"The weights {str(path)!r} cannot be read: {reason(error)}.") from error
