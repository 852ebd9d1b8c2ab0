"""Layers left out by name or by number: what most methods of peft can do alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmfit.adapters.peft_spec import LayerSpec

__all__ = ["SomeBlocks", "SomeLayers"]


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

    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(frozen=True, kw_only=True, repr=False)
class SomeBlocks(LayerSpec):
    """Base of the methods that can leave blocks out; see :class:`SomeLayers`."""

    layers_to_transform: Any = None
    layers_pattern: Any = None
