"""What a model is made of, kept before it is lent and put back afterwards; and the adapters that stood in it last.

Takes a module tree; puts back its submodules, hooks, flags, parameters and configurations, and the objects in which
bitsandbytes keeps the scales of quantized layers; and what torch's generators draw next. Knows no kind of adapter:
whatever one has put in is gone, or there again.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from llmfit.memory import may_go

__all__ = ["Adapter", "Kept", "Standing", "cuda_in_use", "kept_draws"]

MOST = 8  # adapters that are held: each has layers of its own, and remembers those of the base
MOST_BYTES = 2**27  # of adapters' weights that are held between two uses, with what was drawn for them
SHARE = 16  # of the base model's bytes one part in so many, where that is more

STATES = ("config", "generation_config", "state", "quant_state")  # objects of modules; the last two are bitsandbytes'


def cuda_in_use() -> range:
    """Devices whose generators a seed changes."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


def kept_draws() -> Callable[[], None]:
    """Note what torch's generators draw next; give what lets them draw it again."""
    own, states = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in cuda_in_use()}

    def put_back() -> None:
        torch.set_rng_state(own)
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)

    return put_back


class Adapter(Protocol):
    """What a base model needs of an adapter."""

    def install(self, base: Any, tensors: dict[str, torch.Tensor] | None, *, training: bool) -> Any:
        """Change ``base.model`` and return the module to call."""


class Kept:
    """Everything that a module tree refers to, to be put back.

    Parameters
    ----------
    root : torch.nn.Module
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(module, dict(vars(module)), _shallow(vars(module))) for module in root.modules()]
        self.parameters = [(p, p.data, p.requires_grad, dict(vars(p))) for p in root.parameters()]
        named = [getattr(m, name, None) for m in root.modules() for name in STATES]
        configs = {id(c): c for c in named if hasattr(c, "__dict__")}
        self.configs = [(c, dict(vars(c))) for c in configs.values()]

    def restore(self) -> None:
        """Put all of it back; tensors that were written to are not noticed."""
        for module, own, contents in self.modules:  # hooks and submodules keep their dicts: handles point to them
            vars(module).clear()
            vars(module).update(own)
            for key, content in contents.items():
                own[key].clear()
                own[key].update(content)
        for parameter, data, requires_grad, own in self.parameters:
            parameter.data = data
            vars(parameter).clear()
            vars(parameter).update(own)
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for config, state in self.configs:
            vars(config).clear()
            vars(config).update(state)


@dataclass
class _Installed:
    """An adapter as it was right after it was put in, and what was drawn for it, where it was to be trained."""

    form: Any
    seed: int
    module: nn.Module
    kept: Kept
    drawn: dict[str, torch.Tensor]
    size: int  # bytes, with what was drawn


class Standing:
    """Adapters that a model had in it last, each as it stood there alone: to be put back with other weights.

    Wrapping a model's layers takes as long as reading a few dozen rows, and leaves garbage that takes Python as long
    again to find. A prediction after a fit needs none of it, nor does a fit of a search whose rank has been there.
    """

    def __init__(self) -> None:
        self._known: list[_Installed] = []  # the one that was used last comes last
        self.in_use: _Installed | None = None  # while it is lent
        may_go(self)

    def forget(self) -> bool:
        """Let go of what is held and not in use, where memory runs out; tell whether there was anything."""
        gone = [one for one in self._known if one is not self.in_use or one.drawn]
        self._known = [one for one in self._known if one is self.in_use]
        for one in self._known:
            one.drawn = {}
        return bool(gone)

    def put_in(self, base: Any, adapter: Adapter, tensors: Any, *, seed: int, training: bool) -> Any:
        """Install an adapter in a base model; or put back the same one, if it is known, and write its weights.

        Parameters
        ----------
        base : BaseModel
        adapter : Adapter
        tensors : dict of str to Tensor or None
            None begins with what is drawn from `seed`, which torch has been given.
        training : bool

        Returns
        -------
        torch.nn.Module
        """
        spec: Any = getattr(adapter, "spec", adapter)
        form = (spec, getattr(base.model.config, "_attn_implementation", None))
        known = next((one for one in self._known if one.form == form), None)
        if known is not None and not training and tensors is not None:
            known.kept.restore()
            spec.load(known.module, tensors)
            self._hold(known)
            return known.module.requires_grad_(False)
        if known is not None and training and tensors is None and known.drawn and known.seed == seed:
            known.kept.restore()
            with torch.no_grad():
                for name, parameter in _trained(known.module).items():
                    parameter.copy_(known.drawn[name])
            self._hold(known)
            return known.module
        before = {id(p) for p in base.model.parameters()}
        module = adapter.install(base, tensors, training=training)
        added = sum(p.nbytes for p in module.parameters() if id(p) not in before)
        new = training and tensors is None
        size, most = added * (1 + new), max(MOST_BYTES, base.memory_footprint // SHARE)
        lasts = not torch.is_inference_mode_enabled()  # tensors that are made there cannot be written to elsewhere
        if lasts and getattr(adapter, "refillable", False) and size <= most:
            self._make_room(form, most - size)
            drawn = {name: p.detach().clone() for name, p in _trained(module).items()} if new else {}
            form = deepcopy(form)  # lists are the user's
            self._hold(_Installed(form, seed, module, Kept(base.model), drawn, size))
        return module

    def _make_room(self, form: Any, most: int) -> None:
        """Let go of an adapter of the same form, and of those that were used longest ago until the others fit."""
        self._known = [one for one in self._known if one.form != form][1 - MOST :]
        while sum(one.size for one in self._known) > most:
            del self._known[0]

    def _hold(self, one: _Installed) -> None:
        """Let an adapter stand that is used last."""
        self._known = [*(other for other in self._known if other is not one), one]
        self.in_use = one


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() for key, value in state.items() if isinstance(value, dict)}
