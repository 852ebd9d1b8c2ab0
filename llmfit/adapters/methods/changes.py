"""Methods that turn or scale what is there, or stand beside it: rotations, vectors, norms, biases, gated prompts.

One small dataclass each. A default that would not go with every model is None and found for the model at hand, as in
:mod:`llmfit.adapters.methods.updates`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import LayerSpec, PeftSpec, named_sizes
from llmfit.adapters.rules import as_names, is_pattern
from llmfit.adapters.some import Biased, Blocked, SomeLayers, width_of
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import ParameterError, parameter_error, quoted

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["BOFT", "HRA", "IA3", "METHODS", "OFT", "AdaptionPrompt", "BitFit", "LNTuning"]


@dataclass(frozen=True, kw_only=True, repr=False)
class IA3(LayerSpec):
    """(IA)3: keys, values and the inner activations of the feed-forward layers are scaled by learned vectors.

    Parameters
    ----------
    target_modules, feedforward_modules : str or list of str, default=None
        Layers scaled; those of them whose inputs are scaled rather than their outputs. None is peft's choice for the
        model's family.
    exclude_modules, modules_to_save : str or list of str, default=None

    References
    ----------
    .. [1] Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper. arXiv:2205.05638.
    """

    type: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    learning_rate: ClassVar[float] = 5e-3  # the paper: 3e-3 with Adafactor

    target_modules: Any = None
    feedforward_modules: Any = None
    exclude_modules: Any = None

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ParameterError(
                "The 'target_modules' and 'feedforward_modules' parameters of IA3 belong together: give both, or none."
            )
        if self.target_modules not in (None, "all-linear") and not is_pattern(self.target_modules):
            self._check_feedforward(as_names(self.target_modules))

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, plan: Plan | None = None) -> Any:
        """Wrap the layers; of those that a regular expression names, the feed-forward ones have to be some."""
        if is_pattern(self.target_modules):
            layers = (name for name, _ in base.model.named_modules())
            self._check_feedforward([name for name in layers if re.fullmatch(self.target_modules, name)])
        return super().install(base, tensors, training=training, plan=plan)

    def _check_feedforward(self, targets: list[str]) -> None:
        for name in as_names(self.feedforward_modules):
            if not any(target == name or target.endswith(f".{name}") for target in targets):
                raise parameter_error("feedforward_modules", "IA3", "among target_modules", name)


@dataclass(frozen=True, kw_only=True, repr=False)
class LNTuning(LayerSpec):
    """LayerNorm tuning: the weights of the norms are trained, and nothing else.

    Parameters
    ----------
    target_modules : str or list of str, default=None
        The norms. None is peft's choice for the model's family, or all of them where it has none.
    exclude_modules, modules_to_save : str or list of str, default=None

    References
    ----------
    .. [1] Zhao et al. 2023, Tuning LayerNorm in Attention. arXiv:2312.11420.
    """

    type: ClassVar[str] = "ln_tuning"
    peft_type: ClassVar[str] = "LN_TUNING"
    learning_rate: ClassVar[float] = 1e-3

    target_modules: Any = None
    exclude_modules: Any = None

    def fitted(self, model: Any) -> dict[str, Any]:
        """All norms, in a family for which peft has no choice."""
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as FAMILIES

        if self.target_modules is not None or model.config.model_type in FAMILIES:
            return {}
        norms = (name for name, module in model.named_modules() if "norm" in type(module).__name__.lower())
        return {"target_modules": sorted(norms)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Name the layers that have weights, where nobody has named any."""
        return {} if self.target_modules is not None else {"target_modules": self.layers_of(tensors)}


@dataclass(frozen=True, kw_only=True, repr=False)
class BitFit(LayerSpec):
    """Bias tuning: a vector is learned that is added to the outputs of each layer, as its bias or beside it.

    peft's BEFT, on every linear layer. It can be merged where the layers have biases.

    Parameters
    ----------
    target_modules : str or list of str, default="all-linear"
    modules_to_save : str or list of str, default=None

    References
    ----------
    .. [1] Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning. arXiv:2106.10199.
    """

    type: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BEFT"
    learning_rate: ClassVar[float] = 1e-3  # the paper: 1e-4 to 1e-3


@dataclass(frozen=True, kw_only=True, repr=False)
class OFT(Blocked, Biased, SomeLayers):
    """OFT: each layer's weight is turned by a block-diagonal orthogonal matrix.

    Parameters
    ----------
    oft_block_size : int or None, default=None
        Size of a block. None is 32, or the next smaller size that divides the inputs of every layer.
    coft : bool, default=False
        Keep the matrix within `eps` of the identity.
    eps : float, default=6e-5
    block_share : bool, default=False
        One block for the whole layer.
    use_cayley_neumann : bool, default=True
        Approximate the matrix by a series of `num_cayley_neumann_terms` terms.
    num_cayley_neumann_terms : int, default=5
    bias : {"none", "all", "oft_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning. arXiv:2306.07280.
    """

    type: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"
    learning_rate: ClassVar[float] = 1e-3
    fixed: ClassVar[dict[str, Any]] = {"r": 0}
    idle: ClassVar[dict[str, tuple[str, Any]]] = {
        **SomeLayers.idle,
        "eps": ("coft", False),
        "num_cayley_neumann_terms": ("use_cayley_neumann", False),
    }
    size: ClassVar[str] = "oft_block_size"
    most: ClassVar[int] = 32
    both: ClassVar[bool] = False
    fewest: ClassVar[int] = 2  # a block of one has nothing to turn

    oft_block_size: int | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the block off its b (b - 1) / 2 weights."""
        number = width_of(tensors, ".oft_R", None) or 0
        return {**super().learned(tensors), "oft_block_size": (1 + math.isqrt(1 + 8 * number)) // 2}


@dataclass(frozen=True, kw_only=True, repr=False)
class BOFT(Blocked, Biased, SomeLayers):
    """BOFT: each layer's weight is turned by a product of sparse orthogonal matrices, like a butterfly.

    Parameters
    ----------
    boft_block_size : int or None, default=None
        Size of a block. None is 4, or the next smaller size that divides the inputs of every layer.
    boft_block_num : int, default=0
        Number of blocks of every layer, whatever its size, in place of `boft_block_size`; 0 is as many as there are.
    boft_n_butterfly_factor : int, default=1
        Number of the matrices.
    dropout : float, default=0.0
    bias : {"none", "all", "boft_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. arXiv:2311.06243.
    """

    type: ClassVar[str] = "boft"
    peft_type: ClassVar[str] = "BOFT"
    learning_rate: ClassVar[float] = 1e-3
    names: ClassVar[dict[str, str]] = {"dropout": "boft_dropout"}
    size: ClassVar[str] = "boft_block_size"
    most: ClassVar[int] = 4
    both: ClassVar[bool] = False
    fewest: ClassVar[int] = 2  # a block of one has nothing to turn

    boft_block_size: int | None = None
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    dropout: float = 0.0

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.boft_block_num and self.boft_block_size is not None:
            raise parameter_error("boft_block_num", "BOFT", "0 where boft_block_size is given", self.boft_block_num)

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a size, or check that the number of blocks, where it is given, goes with every layer."""
        if not self.boft_block_num:
            return super().fitted(model)
        given = {**LayerSpec.fitted(self, model), "boft_block_size": 0}
        for layer, (inputs, _) in named_sizes(model, self.config("decoder", **given)).items():
            if inputs % self.boft_block_num or inputs < self.fewest * self.boft_block_num:
                wanted = (
                    f"a divisor of the inputs of every layer adapted and less than them, and {layer!r} has {inputs}"
                )
                raise parameter_error("boft_block_num", "BOFT", wanted, self.boft_block_num)
        return given

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft wrap the layers; without a kernel of its own it takes one matrix, whatever it is told."""
        model = super().put_in(base, config, tensors, plan)
        made = min(len(p) for n, p in model.named_parameters() if ".boft_R." in n)
        if made < self.boft_n_butterfly_factor:
            raise ParameterError(
                "The 'boft_n_butterfly_factor' parameter of BOFT must be 1 here, where peft cannot build its CUDA "
                f"extension. Got {self.boft_n_butterfly_factor} instead."
            )
        return model

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the block off its b by b weights, unless their number is given."""
        size = 0 if self.boft_block_num else width_of(tensors, ".boft_R", None)
        return {**super().learned(tensors), "boft_block_size": size}


@dataclass(frozen=True, kw_only=True, repr=False)
class HRA(Biased, SomeLayers):
    """HRA: each layer's weight is turned by a product of r Householder reflections.

    Parameters
    ----------
    r : int, default=8
        Number of reflections, an even one: pairs begin as the identity.
    apply_GS : bool, default=False
        Make their directions orthogonal to each other.
    bias : {"none", "all", "hra_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation. arXiv:2405.17484.
    """

    type: ClassVar[str] = "hra"
    quantizable: ClassVar[tuple[int, ...]] = ()
    peft_type: ClassVar[str] = "HRA"
    learning_rate: ClassVar[float] = 1e-3

    r: int = 8
    apply_GS: bool = False  # noqa: N815 - peft's name

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.r % 2:
            raise parameter_error("r", "HRA", "even", self.r)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptionPrompt(PeftSpec):
    """LLaMA-Adapter: learned prompts that the upper layers attend to, behind gates that begin closed.

    Parameters
    ----------
    adapter_len : int, default=10
        Learned tokens of a layer.
    adapter_layers : int or None, default=None
        Layers that have them, from the top. None is all.

    References
    ----------
    .. [1] Zhang et al. 2023, LLaMA-Adapter: Efficient Fine-tuning with Zero-init Attention. arXiv:2303.16199.
    """

    type: ClassVar[str] = "adaption_prompt"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    learning_rate: ClassVar[float] = 9e-3  # the paper
    mergeable: ClassVar[bool] = False

    adapter_len: int = 10
    adapter_layers: int | None = None

    def fitted(self, model: Any) -> dict[str, Any]:
        """All layers, where no number is given."""
        layers = model.config.get_text_config().num_hidden_layers
        return {} if self.adapter_layers is not None else {"adapter_layers": layers}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """As many layers as there are gates."""
        return {"adapter_layers": sum("adaption_gate" in name for name in tensors)}

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft wrap the attention of the families that it knows."""
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as FAMILIES

        family, most = base.model.config.model_type, base.model.config.get_text_config().num_hidden_layers
        if family not in FAMILIES:
            raise ParameterError(
                f"The adapter 'adaption_prompt' is for models of the families {quoted(sorted(FAMILIES))}. "
                f"Got a model of the family {family!r} instead."
            )
        if config.adapter_layers > most:
            raise parameter_error(
                "adapter_layers", "AdaptionPrompt", f"at most {most} in this model", config.adapter_layers
            )
        return super().put_in(base, config, tensors, plan)


METHODS = {
    "ia3": IA3,
    "oft": OFT,
    "boft": BOFT,
    "hra": HRA,
    "ln_tuning": LNTuning,
    "bitfit": BitFit,
    "adaption_prompt": AdaptionPrompt,
}
