"""Low-rank adaptation, in all of its variants."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.spec import TASK_TYPES, AdapterSpec, Tensors, compute_low, is_low, own_biases
from llmfit.exceptions import ParameterError, check_choice, check_int, check_number, parameter_error, suggest
from llmfit.sources import public_name

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["LoRA"]

LORA_INITS = ("gaussian", "orthogonal")
HARMLESS = ("tie_word_embeddings", "is_gradient_checkpointing", "fan_in_fan_out")  # what peft warns of and sets right


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

    def _peft_config(self, kind: str, base_name: str | None = None) -> Any:
        from peft import LoraConfig

        base_id, revision = public_name(base_name) if base_name else (None, None)
        names = self.target_modules
        return LoraConfig(
            task_type=TASK_TYPES[kind],
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
                model = peft.get_peft_model(base.model, self._peft_config(base.kind))
        except ValueError as error:
            if "target module" not in str(error).lower():
                raise
            raise ParameterError(
                "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
                f"Got {self.target_modules!r} instead."
            ) from error
        own_biases(base.model)
        if tensors is not None:
            peft.set_peft_model_state_dict(model, tensors)
        if is_low(base.dtype):
            compute_low(base, model)
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

    def save(self, folder: Path, tensors: Tensors, base_name: str, kind: str = "decoder") -> None:
        """Write a PEFT adapter folder."""
        super().save(folder, tensors, base_name, kind)
        config = self._peft_config(kind, base_name)
        config.inference_mode = True
        config.save_pretrained(str(folder))
