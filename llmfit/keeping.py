"""What a model is made of, kept before it is lent and put back afterwards.

Takes a module tree; puts back its submodules, hooks, flags, parameters and configurations, and the objects in which
bitsandbytes keeps the scales of quantized layers. Knows no adapter: whatever one has put in is gone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Kept"]

STATES = ("config", "generation_config", "state", "quant_state")  # objects of modules; the last two are bitsandbytes'


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


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() for key, value in state.items() if isinstance(value, dict)}
