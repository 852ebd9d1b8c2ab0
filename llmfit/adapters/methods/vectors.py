"""Methods that learn a few numbers, and leave the random matrices beside them as a seed has drawn them.

One small dataclass each, as in :mod:`llmfit.adapters.methods.updates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmfit.adapters.some import Biased, SomeBlocks
from llmfit.exceptions import check_choice, parameter_error

__all__ = ["METHODS", "RandLoRA", "TinyLoRA", "VeRA"]


@dataclass(frozen=True, kw_only=True, repr=False)
class VeRA(Biased, SomeBlocks):
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
    bias : {"none", "all", "vera_only"}, default="none"
        Biases trained beside.

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


@dataclass(frozen=True, kw_only=True, repr=False)
class TinyLoRA(Biased, SomeBlocks):
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
    init_weights : True or "uniform", default=True
        How the learned numbers begin; True is zero.
    init_v_bound : float, default=0.02
        Bound of those that are drawn, for "uniform".
    dropout : float, default=0.0
    bias : {"none", "all", "tinylora_only"}, default="none"
        Biases trained beside.
    """

    type: ClassVar[str] = "tinylora"
    quantizable: ClassVar[tuple[int, ...]] = ()
    peft_type: ClassVar[str] = "TINYLORA"
    learning_rate: ClassVar[float] = 1e-2
    names: ClassVar[dict[str, str]] = {"dropout": "tinylora_dropout"}
    idle: ClassVar[dict[str, tuple[str, Any]]] = {**SomeBlocks.idle, "init_v_bound": ("init_weights", True)}

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    init_weights: Any = True
    init_v_bound: float = 0.02
    dropout: float = 0.0

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        check_choice("init_weights", "TinyLoRA", self.init_weights, [True, "uniform"])
        super().check()


@dataclass(frozen=True, kw_only=True, repr=False)
class RandLoRA(Biased, SomeBlocks):
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
    bias : {"none", "all", "randlora_only"}, default="none"
        Biases trained beside.

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

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.sparse and self.very_sparse:
            raise parameter_error("sparse", "RandLoRA", "False where very_sparse is True", self.sparse)

    def settings(self) -> dict[str, Any]:
        """Spell out alpha."""
        return {"randlora_alpha": 20 * int(self.r), **super().settings()}


METHODS = {
    "vera": VeRA,
    "tinylora": TinyLoRA,
    "randlora": RandLoRA,
}
