"""Full fine-tuning: every weight is trained, on a private copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.spec import AdapterSpec, Plan, Tensors, check_names, compute_low, is_low

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["METHODS", "Full"]


@dataclass(frozen=True, repr=False)
class Full(AdapterSpec):
    """Full fine-tuning: every weight of a private copy of the base model is trained.

    The copy is held in float32; where the base computes in bfloat16 the forward pass does too, by autocast.
    """

    type: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2e-5
    quantizable: ClassVar[tuple[int, ...]] = ()
    file_name: ClassVar[str] = "model.safetensors"

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, plan: Plan | None = None) -> Any:
        """Swap every weight for its own copy; the base's tensors are not written to."""
        import torch

        model = base.model
        if tensors is not None:
            check_names(tensors, dict(model.named_parameters()))
        low = training and is_low(base.dtype)
        for name, parameter in model.named_parameters():
            own = parameter.data if tensors is None else tensors[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32) if low else parameter.dtype
            parameter.data = own.to(device=base.device, dtype=dtype, copy=True)
            parameter.requires_grad_(training)
        if low:
            compute_low(base, model)
        return model

    def tensors(self, model: Any) -> Tensors:
        """Copy every weight."""
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


METHODS = {"full": Full}
