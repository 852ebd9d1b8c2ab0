"""AdaLoRA: low-rank updates as P E Q, whose ranks are shared out among the layers while training goes on.

Training steps the budget by :meth:`AdaLoRA.end_step` and adds :meth:`AdaLoRA.penalty` to the loss. A triplet whose E is
exactly zero adds nothing and is not kept, whenever the fit ended; the ranks are read off the weights again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import WRAPPED
from llmfit.adapters.some import Biased, SomeLayers
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import ParameterError, parameter_error

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = ["METHODS", "AdaLoRA"]

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what peft's allocator remembers of earlier steps


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoRA(Biased, SomeLayers):
    """Adaptive budget: ranks begin at `init_r` and fall to `target_r` in the mean, where they matter least.

    A fit that goes on with ``warm_start`` keeps the ranks that it finds.

    Parameters
    ----------
    target_r, init_r : int, default=8, 12
        Mean rank in the end; rank of every layer at the beginning, greater than that.
    tinit, tfinal : float, default=0.1, 0.3
        Steps before the budget begins to fall, and steps at the end with the final ranks: a share of all steps below
        1, a number of steps from 1 on.
    deltaT : int, default=1
        Steps between two allocations.
    beta1, beta2 : float, default=0.85
        Smoothing of the importance of a weight, and of its uncertainty.
    orth_reg_weight : float, default=0.5
        Weight of the penalty that keeps P and Q orthogonal.
    alpha : float, default=8
        Scale of the update, over the initial rank.
    dropout : float, default=0.0
    exclude_modules : str or list of str, default=None
        Layers left out of those adapted.
    layers_to_transform : int or list of int, default=None
        Adapt the blocks of these numbers only; `layers_pattern` is the name of the list of blocks, where it is unusual.
    modules_to_save : str or list of str, default=None
        Layers trained in full beside, on a private copy.
    ensure_weight_tying : bool, default=False
        Let copies of a tied embedding and output head share their weights, as in :class:`LoRA`.
    trainable_token_indices : list of int or dict of str to list of int, default=None
        Token ids whose embeddings are trained beside.
    bias : {"none", "all", "lora_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation. arXiv:2303.10512.
    """

    type: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    learning_rate: ClassVar[float] = 1e-3  # the paper: 5e-4 to 1.2e-3
    names: ClassVar[dict[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    apart: ClassVar[tuple[str, ...]] = ("tinit", "tfinal")
    fixed: ClassVar[dict[str, Any]] = {"total_step": 1}  # peft wants one; a fit sets its own
    alone: ClassVar[str] = "lora_only"
    idle: ClassVar[dict[str, tuple[str, Any]]] = {**SomeLayers.idle, "ensure_weight_tying": ("modules_to_save", None)}

    target_r: int = 8
    init_r: int = 12
    tinit: float = 0.1
    tfinal: float = 0.3
    deltaT: int = 1  # noqa: N815 - peft's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    alpha: float = 8
    dropout: float = 0.0
    ensure_weight_tying: bool = False
    trainable_token_indices: Any = None

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.init_r <= self.target_r:
            raise parameter_error("init_r", "AdaLoRA", f"greater than target_r, which is {self.target_r}", self.init_r)

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Ranks of the layers, as peft reads them."""
        ranks = {
            name.removeprefix(WRAPPED): len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_E")
        }
        pattern = {name: [True] * rank + [False] * (int(self.init_r) - rank) for name, rank in ranks.items()}
        return {**super().learned(tensors), "rank_pattern": pattern}

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Wrap the layers; a new fit lays out its budget over its steps."""
        if plan is not None and tensors is None:
            config.total_step = plan.steps
            config.tinit, config.tfinal = (_steps(share, plan.steps) for share in (self.tinit, self.tfinal))
            if config.tinit >= plan.steps - config.tfinal:
                raise ParameterError(
                    f"The 'tinit' and 'tfinal' parameters of AdaLoRA leave no step to share out ranks in: they are "
                    f"{config.tinit} and {config.tfinal} of {plan.steps} steps."
                )
        model = super().put_in(base, config, tensors, plan)
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # a constant; peft lets it be trained where it has widened it
                parameter.requires_grad_(False)
        if plan is None or tensors is not None:
            model.base_model.rankallocator = None
        return model

    def penalty(self, model: Any) -> torch.Tensor | None:
        """Mean distance of P'P and QQ' from the identity, as peft adds it to the loss of a model."""
        import torch

        weights = [(n, p) for n, p in model.named_parameters() if ("lora_A" in n or "lora_B" in n) and len(p)]
        products = [p @ p.T if "lora_A" in n else p.T @ p for n, p in weights]
        if not (self.orth_reg_weight and products):
            return None
        distances = [torch.linalg.matrix_norm(x - torch.eye(len(x), dtype=x.dtype, device=x.device)) for x in products]
        return self.orth_reg_weight * torch.stack(distances).mean()

    def end_step(self, model: Any, step: int) -> None:
        """Weigh every triplet by this step's gradient, and let the least important go."""
        allocator, config = model.base_model.rankallocator, model.peft_config["default"]
        if allocator is None:
            return
        if step == config.total_step - config.tfinal and not allocator.ipt:  # no step before, to weigh anything by
            allocator.update_ipt(model.base_model.model)
        for parameter in model.parameters():  # layers that no token came through, as experts'
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
        model.base_model.update_and_allocate(step)

    def state(self, model: Any) -> Tensors:
        """Give the importance of every weight, and which triplets are left."""
        import torch

        allocator = model.base_model.rankallocator
        if allocator is None:
            return {}
        kept = {f"{part}/{name}": t for part in AVERAGES for name, t in getattr(allocator, part).items()}
        pattern = model.peft_config["default"].rank_pattern or {}
        return {**kept, **{f"rank_pattern/{name}": torch.tensor(rows) for name, rows in pattern.items()}}

    def restore(self, model: Any, state: Tensors) -> None:
        """Go on from such a state."""
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            if part in AVERAGES:
                getattr(model.base_model.rankallocator, part)[name] = tensor.to(model.device)
            else:
                config = model.peft_config["default"]
                config.rank_pattern = {**(config.rank_pattern or {}), name: tensor.tolist()}

    def tensors(self, model: Any) -> Tensors:
        """Copy the triplets that add something."""
        config = model.peft_config["default"]
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            tensors = super().tensors(model)
        finally:
            config.rank_pattern = pattern
        for name in [name for name in tensors if name.endswith(".lora_E")]:
            left = tensors[name][:, 0] != 0
            stem = name.removesuffix(".lora_E")
            for part, rows in (("lora_E", (left,)), ("lora_A", (left,)), ("lora_B", (slice(None), left))):
                tensors[f"{stem}.{part}"] = tensors[f"{stem}.{part}"][rows].contiguous()
        return tensors


def _steps(share: float, steps: int) -> int:
    """Count steps: a share of all below 1, a number of steps from 1 on."""
    return int(share * steps) if share < 1 else int(share)


METHODS = {"adalora": AdaLoRA}
