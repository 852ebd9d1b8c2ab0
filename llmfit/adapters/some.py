"""What many methods of peft can do alike: leave layers out by name or number, train biases, find a size that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmfit.adapters.peft_spec import LayerSpec, largest_divisor, named_sizes
from llmfit.adapters.places import matching
from llmfit.adapters.spec import Tensors
from llmfit.exceptions import check_choice, parameter_error

__all__ = ["Biased", "Blocked", "SomeBlocks", "SomeLayers", "width_of"]

IDLE = {"layers_pattern": ("layers_to_transform", None)}


@dataclass(frozen=True, kw_only=True, repr=False)
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

    idle: ClassVar[dict[str, tuple[str, Any]]] = IDLE

    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(frozen=True, kw_only=True, repr=False)
class SomeBlocks(LayerSpec):
    """Base of the methods that can leave blocks out; see :class:`SomeLayers`."""

    idle: ClassVar[dict[str, tuple[str, Any]]] = IDLE

    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Biased(LayerSpec):
    """Base of the methods that can train the model's biases beside.

    Parameters
    ----------
    bias : str, default="none"
        Biases trained beside: "none", "all", or those of the adapted layers alone, in the method's own word.
    """

    alone: ClassVar[str] = ""  # that word, where it is not the method's name
    unruled: ClassVar[tuple[str, ...]] = ("bias",)

    bias: str = "none"

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        check_choice("bias", type(self).__name__, self.bias, ["none", "all", self.alone or f"{self.type}_only"])


@dataclass(frozen=True, kw_only=True, repr=False)
class Blocked(LayerSpec):
    """Base of the methods with a size that must divide those of every adapted layer; one is found where none is given.

    Attributes
    ----------
    size : str
        The field; another one, ``<size>_pattern``, may give some layers other sizes.
    most : int
        Largest size that is found.
    both : bool
        Divide the layers' outputs as well as their inputs.
    fewest : int
        Smallest size with which anything is learned.
    """

    size: ClassVar[str]
    most: ClassVar[int]
    both: ClassVar[bool]
    fewest: ClassVar[int] = 1

    def fitted(self, model: Any) -> dict[str, Any]:
        """Find a size that divides every layer, or raise a ParameterError where one that is given does not."""
        given, chosen = super().fitted(model), getattr(self, self.size)
        found = named_sizes(model, self.config("decoder", **{**given, self.size: chosen or self.most}))
        sides = {name: size[: 1 + self.both] for name, size in found.items()}
        field = f"{self.size}_pattern"
        free: list[int] = []
        for layer, numbers in sides.items():
            own = matching(getattr(self, field, None), layer, None)
            if own is not None:
                self._check_divides(field, own, layer, numbers)
            elif chosen is not None:
                self._check_divides(self.size, chosen, layer, numbers)
            else:
                free += numbers
        if chosen is not None:
            return given
        size = largest_divisor(free, most=self.most)
        if free and size < self.fewest:
            raise parameter_error(self.size, type(self).__name__, self._wanted(free), None)
        return {**given, self.size: size}

    def _wanted(self, numbers: list[int]) -> str:
        """Say that no size goes with these layers."""
        sides, has = "inputs and outputs" if self.both else "inputs", " and ".join(map(str, sorted({*numbers})))
        return (
            f"{self.fewest} or more and a divisor of the {sides} of every layer adapted, and these, {has}, have none "
            "in common: name fewer layers in target_modules"
        )

    def _check_divides(self, field: str, size: int, layer: str, numbers: tuple[int, ...]) -> None:
        if any(number % size for number in numbers):
            sides, has = "inputs and outputs" if self.both else "inputs", " and ".join(map(str, numbers))
            wanted = f"a divisor of the {sides} of every layer adapted, and {layer!r} has {has}"
            raise parameter_error(field, type(self).__name__, wanted, size)


def width_of(tensors: Tensors, mark: str, pattern: Any) -> int | None:
    """Read how wide weights of that name are in a layer that no pattern names; None where there is no such layer."""
    plain = (n for n in tensors if mark in n and matching(pattern, n.split(mark)[0], None) is None)
    return next((tensors[name].shape[-1] for name in plain), None)
