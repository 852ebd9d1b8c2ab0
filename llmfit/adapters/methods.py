"""The methods that peft puts into layers and that need nothing else: one small dataclass each.

A default that would not go with every model is None and found for the model at hand (:meth:`PeftSpec.fitted`); it shows
in the shapes of the weights again (:meth:`PeftSpec.learned`), where peft needs it to read them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import LayerSpec, PeftSpec, largest_divisor, sizes
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import ParameterError, check_choice, parameter_error, quoted

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "AdaptionPrompt",
    "BitFit",
    "FourierFT",
    "LNTuning",
    "LoHa",
    "LoKr",
    "RandLoRA",
    "TinyLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]


@dataclass(frozen=True, kw_only=True)
class SomeLayers(LayerSpec):
    """Base of the methods that can leave layers out.

    Parameters
    ----------
    target_modules, modules_to_save : str or list of str
        Layers adapted; layers trained in full beside.
    exclude_modules : str or list of str, default=None
        Layers left out of those adapted.
    layers_to_transform : int or list of int, default=None
        Adapt the blocks of these numbers only.
    layers_pattern : str or list of str, default=None
        Name of the list of blocks, where it is unusual.
    """

    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(frozen=True, kw_only=True)
class SomeBlocks(LayerSpec):
    """Base of the methods that can leave blocks out; see :class:`SomeLayers`."""

    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class LNTuning(LayerSpec):
    """LayerNorm tuning: the weights of the norms are trained, and nothing else.

    Parameters
    ----------
    target_modules : str or list of str, default=None
        The norms. None is peft's choice for the model's family.
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


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class VeRA(SomeBlocks):
    """VeRA: two random matrices that all layers share, and learned vectors that scale them.

    Parameters
    ----------
    r : int, default=256
        Rank of the shared matrices.
    d_initial : float, default=0.1
        How the inner vector begins; the outer begins at zero.
    dropout : float, default=0.0
    projection_prng_key : int, default=0
        Seed of the shared matrices.

    References
    ----------
    .. [1] Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation. arXiv:2310.11454.
    """

    type: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    learning_rate: ClassVar[float] = 5e-3  # the paper: 2e-3 to 1e-2
    names: ClassVar[dict[str, str]] = {"dropout": "vera_dropout"}

    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_prng_key: int = 0


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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

    References
    ----------
    .. [1] Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning. arXiv:2309.14859.
    """

    type: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class FourierFT(SomeLayers):
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

    References
    ----------
    .. [1] Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. arXiv:2405.03003.
    """

    type: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    learning_rate: ClassVar[float] = 5e-2  # the paper, for instruction tuning: 3e-2 to 1e-1
    many: ClassVar[int] = 1000
    weight: ClassVar[str] = ".fourierft_spectrum"
    fixed: ClassVar[dict[str, Any]] = {"init_weights": True}  # zeros, so that the adapter begins as nothing

    n_frequency: int | None = None
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Any = None

    def fitted(self, model: Any) -> dict[str, Any]:
        """As many coefficients as every layer has."""
        given = super().fitted(model)
        if self.n_frequency is not None:
            return given
        fewest = min((a * b for a, b in sizes(model, self.config("decoder", **given))), default=1)
        return {**given, "n_frequency": min(self.many, fewest)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the number of coefficients off a layer that no pattern names."""
        given = super().learned(tensors)
        if self.n_frequency is not None:
            return given
        from peft.utils.other import get_pattern_key

        keys = list(self.n_frequency_pattern or ())
        plain = [n for n in tensors if self.weight in n and get_pattern_key(keys, n.split(self.weight)[0]) not in keys]
        return {**given, **({"n_frequency": tensors[plain[0]].shape[-1]} if plain else {})}


@dataclass(frozen=True, kw_only=True)
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

    References
    ----------
    .. [1] Bilican et al. 2025, Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. arXiv:2505.12532.
    """

    type: ClassVar[str] = "waveft"
    peft_type: ClassVar[str] = "WAVEFT"
    learning_rate: ClassVar[float] = 5e-3
    many: ClassVar[int] = 2592
    weight: ClassVar[str] = ".waveft_spectrum"

    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class OFT(SomeLayers):
    """OFT: each layer's weight is turned by a block-diagonal orthogonal matrix.

    Parameters
    ----------
    oft_block_size : int or None, default=None
        Size of a block. None is 32, or the next smaller size that divides the inputs of every layer.
    module_dropout : float, default=0.0
    coft : bool, default=False
        Keep the matrix within `eps` of the identity.
    eps : float, default=6e-5
    block_share : bool, default=False
        One block for the whole layer.
    use_cayley_neumann : bool, default=True
        Approximate the matrix by a series of `num_cayley_neumann_terms` terms.
    num_cayley_neumann_terms : int, default=5

    References
    ----------
    .. [1] Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning. arXiv:2306.07280.
    """

    type: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"
    learning_rate: ClassVar[float] = 1e-3
    fixed: ClassVar[dict[str, Any]] = {"r": 0}

    oft_block_size: int | None = None
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a block that divides the inputs of every layer."""
        given = super().fitted(model)
        if self.oft_block_size is not None:
            return given
        inputs = [inputs for inputs, _ in sizes(model, self.config("decoder", **given, oft_block_size=32))]
        return {**given, "oft_block_size": largest_divisor(inputs, most=32)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the block off its b (b - 1) / 2 weights."""
        given = super().learned(tensors)
        if self.oft_block_size is not None:
            return given
        number = next(tensor.shape[-1] for name, tensor in tensors.items() if ".oft_R" in name)
        return {**given, "oft_block_size": (1 + math.isqrt(1 + 8 * number)) // 2}


@dataclass(frozen=True, kw_only=True)
class BOFT(SomeLayers):
    """BOFT: each layer's weight is turned by a product of sparse orthogonal matrices, like a butterfly.

    Parameters
    ----------
    boft_block_size : int or None, default=None
        Size of a block. None is 4, or the next smaller size that divides the inputs of every layer.
    boft_n_butterfly_factor : int, default=1
        Number of the matrices.
    dropout : float, default=0.0

    References
    ----------
    .. [1] Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. arXiv:2311.06243.
    """

    type: ClassVar[str] = "boft"
    peft_type: ClassVar[str] = "BOFT"
    learning_rate: ClassVar[float] = 1e-3
    names: ClassVar[dict[str, str]] = {"dropout": "boft_dropout"}

    boft_block_size: int | None = None
    boft_n_butterfly_factor: int = 1
    dropout: float = 0.0

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a block that divides the inputs of every layer."""
        given = super().fitted(model)
        if self.boft_block_size is not None:
            return given
        inputs = [inputs for inputs, _ in sizes(model, self.config("decoder", **given))]
        return {**given, "boft_block_size": largest_divisor(inputs, most=4)}

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
        """Read the block off its b by b weights."""
        size = next(tensor.shape[-1] for name, tensor in tensors.items() if ".boft_R" in name)
        return {**super().learned(tensors), "boft_block_size": size}


@dataclass(frozen=True, kw_only=True)
class HRA(SomeLayers):
    """HRA: each layer's weight is turned by a product of r Householder reflections.

    Parameters
    ----------
    r : int, default=8
        Number of reflections, an even one: pairs begin as the identity.
    apply_GS : bool, default=False
        Make their directions orthogonal to each other.

    References
    ----------
    .. [1] Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation. arXiv:2405.17484.
    """

    type: ClassVar[str] = "hra"
    peft_type: ClassVar[str] = "HRA"
    learning_rate: ClassVar[float] = 1e-3

    r: int = 8
    apply_GS: bool = False  # noqa: N815 - peft's name

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.r % 2:
            raise parameter_error("r", "HRA", "even", self.r)


@dataclass(frozen=True, kw_only=True)
class VBLoRA(SomeLayers):
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

    References
    ----------
    .. [1] Li et al. 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. arXiv:2405.15179.
    """

    type: ClassVar[str] = "vblora"
    peft_type: ClassVar[str] = "VBLORA"
    learning_rate: ClassVar[float] = 1e-2  # the paper: 1e-3 for the bank, 1e-2 for the logits
    names: ClassVar[dict[str, str]] = {"dropout": "vblora_dropout"}

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

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a length that divides every layer."""
        given = super().fitted(model)
        if self.vector_length is not None:
            return given
        both = [size for pair in sizes(model, self.config("decoder", **given)) for size in pair]
        return {**given, "vector_length": largest_divisor(both, most=256)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the length of the bank's vectors."""
        bank = next(tensor for name, tensor in tensors.items() if "vblora_vector_bank" in name)
        return {**super().learned(tensors), "vector_length": bank.shape[-1]}


@dataclass(frozen=True, kw_only=True)
class C3A(SomeBlocks):
    """C3A: an update made of blocks that are circulant, one learned row each.

    Parameters
    ----------
    block_size : int or None, default=None
        Size of a block. None is 256, or the next smaller size that divides the inputs and outputs of every layer.
    block_size_pattern : dict of str to int, default=None
        Other sizes for the layers whose names match.
    init_weights : bool or {"gaussian", "kaiming_uniform", "xavier_uniform"}, default="xavier_uniform"
        How the rows begin; True is zero.

    References
    ----------
    .. [1] Chen et al. 2024, Parameter-Efficient Fine-Tuning via Circular Convolution. arXiv:2407.19342.
    """

    type: ClassVar[str] = "c3a"
    peft_type: ClassVar[str] = "C3A"
    learning_rate: ClassVar[float] = 1e-2

    block_size: int | None = None
    block_size_pattern: Any = None
    init_weights: Any = "xavier_uniform"

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        choices = [True, "gaussian", "kaiming_uniform", "xavier_uniform"]
        check_choice("init_weights", "C3A", self.init_weights, choices)

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a block that divides every layer."""
        given = super().fitted(model)
        if self.block_size is not None:
            return given
        both = [size for pair in sizes(model, self.config("decoder", **given)) for size in pair]
        return {**given, "block_size": largest_divisor(both, most=256)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read the block off a layer that no pattern names."""
        given = super().learned(tensors)
        if self.block_size is not None:
            return given
        from peft.utils.other import get_pattern_key

        keys = list(self.block_size_pattern or ())
        plain = [n for n in tensors if ".c3a_kernel" in n and get_pattern_key(keys, n.split(".c3a_")[0]) not in keys]
        return {**given, **({"block_size": tensors[plain[0]].shape[-1]} if plain else {})}


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(SomeBlocks):
    """TinyLoRA: a few learned numbers, spread over the largest directions of each weight by fixed random matrices.

    Parameters
    ----------
    r : int, default=2
        Directions of a weight.
    u : int, default=64
        Learned numbers of each group of layers.
    weight_tying : float, default=0.0
        Share of the layers that learn their numbers together.
    projection_seed : int, default=42
    init_v_bound : float, default=0.02
    dropout : float, default=0.0
    """

    type: ClassVar[str] = "tinylora"
    peft_type: ClassVar[str] = "TINYLORA"
    learning_rate: ClassVar[float] = 1e-2
    names: ClassVar[dict[str, str]] = {"dropout": "tinylora_dropout"}

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    init_v_bound: float = 0.02
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RandLoRA(SomeBlocks):
    """RandLoRA: an update of full rank, a sum of random low-rank matrices that are scaled by learned vectors.

    Parameters
    ----------
    r : int, default=32
        Rank of each of the matrices; fewer ranks are more matrices.
    alpha : float or None, default=None
        The update is scaled by ``alpha / r``. None is ``20 * r``.
    dropout : float, default=0.0
    sparse, very_sparse : bool, default=False
        Draw matrices that are mostly zero.
    projection_prng_key : int, default=0

    References
    ----------
    .. [1] Albert et al. 2025, RandLoRA: Full-rank Parameter-Efficient Fine-Tuning of Large Models. arXiv:2502.00987.
    """

    type: ClassVar[str] = "randlora"
    peft_type: ClassVar[str] = "RANDLORA"
    learning_rate: ClassVar[float] = 1e-3
    names: ClassVar[dict[str, str]] = {"alpha": "randlora_alpha", "dropout": "randlora_dropout"}

    r: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    sparse: bool = False
    very_sparse: bool = False
    projection_prng_key: int = 0

    def settings(self) -> dict[str, Any]:
        """Spell out alpha."""
        return {"randlora_alpha": 20 * int(self.r), **super().settings()}


@dataclass(frozen=True, kw_only=True)
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
