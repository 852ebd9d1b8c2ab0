"""Methods that add an update to a layer's weight, each of another form: one small dataclass each.

A default that would not go with every model is None and found for the model at hand (:meth:`PeftSpec.fitted`); it shows
in the shapes of the weights again (:meth:`PeftSpec.learned`), where peft needs it to read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import WRAPPED, is_packed, named_sizes, target_layers
from llmfit.adapters.some import Biased, Blocked, SomeBlocks, SomeLayers, width_of
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import ParameterError, check_choice, parameter_error

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["C3A", "METHODS", "FourierFT", "LoHa", "LoKr", "VBLoRA", "WaveFT"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LoHa(SomeLayers):
    """LoHa: an update that is the elementwise product of two low-rank matrices.

    Parameters
    ----------
    r : int, default=8
        Rank of each of the two.
    alpha : float or None, default=None
        The update is scaled by ``alpha / r``. None is `r`.
    rank_dropout, module_dropout : float, default=0.0
        Share of the ranks, and of the layers, left out in training.
    rank_pattern, alpha_pattern : dict of str to number, default=None
        Other ranks and alphas for the layers whose names match.

    References
    ----------
    .. [1] Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product. arXiv:2108.06098.
    """

    type: ClassVar[str] = "loha"
    quantizable: ClassVar[tuple[int, ...]] = (8,)
    peft_type: ClassVar[str] = "LOHA"
    learning_rate: ClassVar[float] = 1e-3

    r: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Any = None
    alpha_pattern: Any = None

    def settings(self) -> dict[str, Any]:
        """Spell out alpha."""
        return {"alpha": int(self.r), **super().settings()}


@dataclass(frozen=True, kw_only=True, repr=False)
class LoKr(LoHa):
    """LoKr: an update that is the Kronecker product of two matrices, the larger of them of low rank.

    Parameters
    ----------
    r, alpha, rank_dropout, module_dropout, rank_pattern, alpha_pattern
        As in :class:`LoHa`.
    decompose_both : bool, default=False
        Give the smaller matrix a low rank too.
    decompose_factor : int, default=-1
        Size of the smaller matrix; -1 is about the root of the layer's.
    rank_dropout_scale : bool, default=False
        Scale up what rank_dropout leaves.
    init_weights : {True, "lycoris"}, default=True
        Which of the matrices begin at zero: the smaller one, or the larger one, as in LyCORIS.

    References
    ----------
    .. [1] Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning. arXiv:2309.14859.
    """

    type: ClassVar[str] = "lokr"
    quantizable: ClassVar[tuple[int, ...]] = (8,)
    peft_type: ClassVar[str] = "LOKR"
    idle: ClassVar[dict[str, tuple[str, Any]]] = {**SomeLayers.idle, "rank_dropout_scale": ("rank_dropout", 0)}

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: Any = True

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        check_choice("init_weights", "LoKr", self.init_weights, [True, "lycoris"])


@dataclass(frozen=True, kw_only=True, repr=False)
class FourierFT(Biased, SomeLayers):
    """FourierFT: an update whose spectrum has few coefficients, at places drawn once, that are learned.

    Parameters
    ----------
    n_frequency : int or None, default=None
        Coefficients of each layer. None is 1000, or as many as the smallest layer has.
    scaling : float, default=150.0
    random_loc_seed : int, default=777
        Seed of the places.
    n_frequency_pattern : dict of str to int, default=None
        Other numbers for the layers whose names match.
    init_weights : bool, default=True
        Begin with coefficients of zero, which change nothing; False draws them, as PEFT does unless it is told
        otherwise.
    bias : {"none", "all", "fourier_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. arXiv:2405.03003.
    """

    type: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    learning_rate: ClassVar[float] = 5e-2  # the paper, for instruction tuning: 3e-2 to 1e-1
    alone: ClassVar[str] = "fourier_only"
    many: ClassVar[int] = 1000
    weight: ClassVar[str] = ".fourierft_spectrum"

    n_frequency: int | None = None
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Any = None
    init_weights: bool = True

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        check_choice("init_weights", type(self).__name__, self.init_weights, [True, False])

    def fitted(self, model: Any) -> dict[str, Any]:
        """As many coefficients as every layer has."""
        given = super().fitted(model)
        if self.n_frequency is not None:
            return given
        fewest = min((a * b for a, b in named_sizes(model, self.config("decoder", **given)).values()), default=1)
        return {**given, "n_frequency": min(self.many, fewest)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the number of coefficients off a layer that no pattern names."""
        given = super().learned(tensors)
        found = width_of(tensors, self.weight, self.n_frequency_pattern)
        return {**given, "n_frequency": found} if self.n_frequency is None and found else given


@dataclass(frozen=True, kw_only=True, repr=False)
class WaveFT(FourierFT):
    """WaveFT: as :class:`FourierFT`, with wavelets.

    Parameters
    ----------
    n_frequency : int or None, default=None
        Coefficients of each layer. None is 2592, or as many as the smallest layer has.
    scaling : float, default=25.0
    random_loc_seed : int, default=777
    n_frequency_pattern : dict of str to int, default=None
    wavelet_family : str, default="db1"
    use_idwt : bool, default=True
        Transform the coefficients back; without it they are the update.
    proportional_parameters : bool, default=False
        Share the coefficients out by the layers' sizes.
    init_weights : bool, default=True
        Begin with coefficients of zero; False draws them.
    bias : {"none", "all", "waveft_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Bilican et al. 2025, Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. arXiv:2505.12532.
    """

    type: ClassVar[str] = "waveft"
    peft_type: ClassVar[str] = "WAVEFT"
    learning_rate: ClassVar[float] = 5e-3
    alone: ClassVar[str] = "waveft_only"
    many: ClassVar[int] = 2592
    weight: ClassVar[str] = ".waveft_spectrum"
    idle: ClassVar[dict[str, tuple[str, Any]]] = {
        **FourierFT.idle,
        "n_frequency_pattern": ("proportional_parameters", True),
        "wavelet_family": ("use_idwt", False),
    }

    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Name the coefficients of each layer where they were shared out: peft would share them out again."""
        given = super().learned(tensors)
        if not self.proportional_parameters:
            return given
        shares = {
            n.removeprefix(WRAPPED).partition(self.weight)[0]: len(t) for n, t in tensors.items() if self.weight in n
        }
        pattern = {layer.replace(".", r"\."): share for layer, share in shares.items()}
        return {**given, "n_frequency_pattern": pattern, "proportional_parameters": False}


@dataclass(frozen=True, kw_only=True, repr=False)
class VBLoRA(Blocked, Biased, SomeLayers):
    """VB-LoRA: low-rank updates put together from the vectors of one bank that all layers share.

    Parameters
    ----------
    r : int, default=4
    num_vectors : int, default=256
        Vectors in the bank.
    vector_length : int or None, default=None
        Their length. None is 256, or the next smaller length that divides the inputs and outputs of every layer.
    topk : int, default=2
        Vectors that a part of an update is mixed from.
    dropout : float, default=0.0
    init_vector_bank_bound : float, default=0.02
    init_logits_std : float, default=0.1
    bias : {"none", "all", "vblora_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Li et al. 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. arXiv:2405.15179.
    """

    type: ClassVar[str] = "vblora"
    peft_type: ClassVar[str] = "VBLORA"
    learning_rate: ClassVar[float] = 1e-2  # the paper: 1e-3 for the bank, 1e-2 for the logits
    names: ClassVar[dict[str, str]] = {"dropout": "vblora_dropout"}
    size: ClassVar[str] = "vector_length"
    most: ClassVar[int] = 256
    both: ClassVar[bool] = True

    r: int = 4
    num_vectors: int = 256
    vector_length: int | None = None
    topk: int = 2
    dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.topk > self.num_vectors:
            raise parameter_error("topk", "VBLoRA", f"at most num_vectors, which is {self.num_vectors}", self.topk)

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the length of the bank's vectors."""
        bank = next(tensor for name, tensor in tensors.items() if "vblora_vector_bank" in name)
        return {**super().learned(tensors), "vector_length": bank.shape[-1]}


@dataclass(frozen=True, kw_only=True, repr=False)
class C3A(Blocked, Biased, SomeBlocks):
    """C3A: an update made of blocks that are circulant, one learned row each.

    Parameters
    ----------
    block_size : int or None, default=None
        Size of a block. None is 256, or the next smaller size that divides the inputs and outputs of every layer.
    block_size_pattern : dict of str to int, default=None
        Other sizes for the layers whose names match.
    init_weights : bool or {"gaussian", "kaiming_uniform", "xavier_uniform"}, default="xavier_uniform"
        How the rows begin; True is zero.
    bias : {"none", "all", "c3a_only"}, default="none"
        Biases trained beside.

    References
    ----------
    .. [1] Chen et al. 2024, Parameter-Efficient Fine-Tuning via Circular Convolution. arXiv:2407.19342.
    """

    type: ClassVar[str] = "c3a"
    peft_type: ClassVar[str] = "C3A"
    learning_rate: ClassVar[float] = 1e-2
    size: ClassVar[str] = "block_size"
    most: ClassVar[int] = 256
    both: ClassVar[bool] = True

    block_size: int | None = None
    block_size_pattern: Any = None
    init_weights: Any = "xavier_uniform"

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        choices = [True, "gaussian", "kaiming_uniform", "xavier_uniform"]
        check_choice("init_weights", "C3A", self.init_weights, choices)

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft wrap the layers, unless it would add to what a layer gives in place where torch forbids it."""
        for name, layer in target_layers(base.model, config).items():
            if is_packed(layer) and getattr(layer, "bias", None) is not None:
                raise ParameterError(
                    f"The adapter 'c3a' does not go with quantized layers that have a bias, as {name!r} has. Name "
                    "others in target_modules, choose another adapter, or set quantization=None."
                )
        return super().put_in(base, config, tensors, plan)

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the block off a layer that no pattern names."""
        given = super().learned(tensors)
        found = width_of(tensors, ".c3a_kernel", self.block_size_pattern)
        return {**given, "block_size": found} if self.block_size is None and found else given


METHODS = {
    "loha": LoHa,
    "lokr": LoKr,
    "fourierft": FourierFT,
    "waveft": WaveFT,
    "vblora": VBLoRA,
    "c3a": C3A,
}
