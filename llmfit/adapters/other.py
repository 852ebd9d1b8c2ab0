"""Any other method that peft knows: a spec made of peft's own configuration.

Takes a name of peft's, in any case; gives a dataclass with peft's fields and defaults, so that keys are checked, listed
and searched as those of every other spec are.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import Named, config_class
from llmfit.adapters.rules import Rule, ranks_or_shares
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import ParameterError, parameter_error

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["OtherSpec", "other_method", "other_names"]

REFUSED = {
    "cartridge": "it begins from the cache of a text that a model has read",
    "cpt": "it needs ids and types of the tokens of its context, which no row has",
    "lily": "it mixes its experts by a mean over all tokens of a pass, by which a row's answer depends on the rows "
    "beside it, and a token on those behind it",
    "multitask_prompt_tuning": "it needs the number of a task with every row",
    "poly": "it needs the number of a task with every row",
    "xlora": "it mixes adapters that are trained already",
}
NEEDED = {"trainable_tokens": ("token_indices",)}
OWN_RULES: dict[str, dict[str, Rule]] = {"osf": {"rank_pattern": ranks_or_shares}}  # in place of the house's
WITHOUT_EFFECT: dict[str, dict[str, tuple[Any, str]]] = {
    "osf": {"target_svd_config": (None, "PEFT ignores it")},
    "shadow": {"auxiliary_loss_weight": (0, "the loss is taken of the model's logits, and the model sees no labels")},
}
AVERAGES = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")  # that AdaMSS keeps of each subspace
ASA = re.compile(r"\.adamss_[AB]\.default\.")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class OtherSpec(Named):
    """Base of the specs made of peft's configurations."""

    learning_rate: ClassVar[float] = 1e-3
    unruled: ClassVar[tuple[str, ...]] = ("bias",)  # every method has a word of its own for "only those adapted"

    def check(self) -> None:
        """Raise a ParameterError for a method that needs more than rows, or a setting that cannot be used."""
        if self.type in REFUSED:
            raise ParameterError(f"The adapter {self.type!r} cannot be used: {REFUSED[self.type]}.")
        super().check()
        for field, rule in OWN_RULES.get(self.type, {}).items():
            if getattr(self, field) is not None:
                rule(field, self.type, getattr(self, field))
        for field in NEEDED.get(self.type, ()):
            if not getattr(self, field):
                raise ParameterError(f"The adapter {self.type!r} needs {field!r}.")
        for field, (value, why) in WITHOUT_EFFECT.get(self.type, {}).items():
            if getattr(self, field) != value:
                raise parameter_error(field, self.type, f"{value!r}, as {why}", getattr(self, field))

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft change the model, on private copies of what it may write to."""
        for parameter in base.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        return super().put_in(base, config, tensors, plan)

    def end_step(self, model: Any, step: int) -> None:
        """Let a method that shares out a budget, as AdaMSS does, weigh what it has by this step's gradient."""
        share_out = getattr(model.base_model, "update_and_allocate", None)
        if share_out is not None:
            share_out(step)

    def state(self, model: Any) -> Tensors:
        """Give what such a method remembers of earlier steps, and which weights it has let go."""
        import torch

        kept = {
            f"{part}/{i}/{name}": average
            for name, module in model.named_modules()
            for part in AVERAGES
            for i, average in enumerate(getattr(module, part, {}).get("default", ()))
            if average is not None
        }
        held = [n for n, p in model.named_parameters() if ASA.search(n) and not p.requires_grad]
        return kept | {f"held//{name}": torch.zeros(()) for name in held}

    def restore(self, model: Any, state: Tensors) -> None:
        """Go on from such a state."""
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for key, tensor in state.items():
            part, i, name = key.split("/", 2)
            if part == "held":
                parameters[name].requires_grad_(False)
            else:
                getattr(modules[name], part)["default"][int(i)] = tensor.to(model.device)

    def __reduce__(self) -> Any:
        return _restored, (self.type, dataclasses.asdict(self))


def _restored(name: str, settings: dict[str, Any]) -> OtherSpec:
    return other_method(name)(**settings)


def other_names(known: Any) -> list[str]:
    """Names of the methods that peft has beside those known."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    taken = {getattr(method, "peft_type", None) for method in known}
    return sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in taken)


@lru_cache(maxsize=64)
def other_method(name: str) -> type[OtherSpec]:
    """Make a spec class of peft's configuration of that name."""
    import peft

    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    own = [f for f in dataclasses.fields(config_class(name.upper())) if f.name not in common and f.init]
    made: type[OtherSpec] = dataclasses.make_dataclass(
        name,
        [(f.name, Any, WITHOUT_EFFECT.get(name, {}).get(f.name, [_default(f)])[0]) for f in own],
        bases=(OtherSpec,),
        namespace={"type": name, "peft_type": name.upper(), "quantizable": (4, 8) if _reads_few_bits(name) else ()}
        | {"unruled": (*OtherSpec.unruled, *OWN_RULES.get(name, {}))},
        frozen=True,
        kw_only=True,
        repr=False,
    )
    return made


def _reads_few_bits(name: str) -> bool:
    """Tell a method for which peft has layers on bitsandbytes weights."""
    package = f"peft.tuners.{name}"
    return find_spec(package) is not None and find_spec(f"{package}.bnb") is not None


def _default(field: dataclasses.Field[Any]) -> Any:
    """Give a field's default: None where peft makes one anew each time, False for bars of its own."""
    if field.name == "progressbar":
        return False
    return None if field.default is dataclasses.MISSING else field.default
