"""What every method of peft does alike: a config from a spec's fields, layers wrapped, tensors in and out, a folder.

Takes a frozen dataclass whose fields have peft's names, or names that `names` translates. A method says what it is by
class attributes, and what its defaults must be for a model by :meth:`PeftSpec.fitted`.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.places import check_patterns, check_places, no_target
from llmfit.adapters.rules import RULES, as_names, is_pattern
from llmfit.adapters.spec import TASK_TYPES, AdapterSpec, Plan, Tensors, compute_low, is_low, own_biases, stay_wide
from llmfit.exceptions import LLMFitError, ModelLoadError, ParameterError, parameter_error, reason
from llmfit.sources import public_name

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = [
    "WRAPPED",
    "LayerSpec",
    "Named",
    "PeftSpec",
    "config_class",
    "is_packed",
    "largest_divisor",
    "named_sizes",
    "size_of",
    "target_layers",
]

HARMLESS = (  # what peft warns of and sets right, or what is as it shall be
    "tie_word_embeddings",
    "is_gradient_checkpointing",
    "fan_in_fan_out",
    "you cannot merge the BEFT adapter",
    "Using Rank-Stabilized LoRA with rank_pattern",
    "Full backward hook is firing",
    "with eva initialization used with low_cpu_mem_usage",
    r"tensor\(s\) have invalid shape",  # a rank of zero, which AdaLoRA may come to
    "Setting boft_n_butterfly_factor to 1",
    "Failed to load the CUDA extension",
    "_pattern keys did not match",  # checked here
    "Unsupported layer type",
    "has no bias. This means that merging",
)
WRAPPED = "base_model.model."  # what peft puts before the names of a model's layers
CONSTANT = ".ranknum."  # of AdaLoRA, made anew
APART = ("prompt_embeddings",)  # peft writes them into the model by itself
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)


@dataclass(frozen=True, repr=False)
class PeftSpec(AdapterSpec):
    """Base of the specs that peft puts into a model.

    Attributes
    ----------
    peft_type : str
        peft's name of the method.
    names : dict of str to str
        What peft calls a field where it has another name.
    apart : tuple of str
        Fields that are no settings of peft's.
    fixed : dict of str to any
        Settings of peft's that the user has no say in.
    idle : dict of str to tuple of (str, any)
        Fields that have no effect while another field has a value: that field, and the value.
    unruled : tuple of str
        Fields that may be what the house's word of that name may not.
    """

    peft_type: ClassVar[str]
    names: ClassVar[Mapping[str, str]] = {}
    apart: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, Any]] = {}
    idle: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    unruled: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        for field in fields(self):
            value = getattr(self, field.name)
            ruled = field.name in RULES and field.name not in self.unruled
            if ruled and not (value is None and field.default is None):
                RULES[field.name](field.name, type(self).__name__, value)
            other, off = self.idle.get(field.name, ("", None))
            if other and value != field.default and getattr(self, other) == off:
                wanted = f"{field.default!r} where {other} is {off!r}"
                raise parameter_error(field.name, type(self).__name__, wanted, value)

    # Settings -----------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Write the fields as peft's settings; what is None is left to peft."""
        given = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in self.apart}
        return {**self.fixed, **{self.names.get(k, k): v for k, v in given.items() if v is not None}}

    def fitted(self, model: Any) -> dict[str, Any]:
        """Give settings of peft's that depend on the model, where the user has not."""
        return {}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Those settings as they show in the weights of a fitted adapter; peft needs them to read the weights."""
        return {}

    def config(self, kind: str, base_name: str | None = None, **settings: Any) -> Any:
        """Build peft's configuration."""
        base_id, revision = public_name(base_name) if base_name else (None, None)
        with quiet():
            return config_class(self.peft_type)(
                task_type=TASK_TYPES[kind],
                base_model_name_or_path=base_id,
                revision=revision,
                **{**self.settings(), **settings},
            )

    # In and out ---------------------------------------------------------------------------------

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, plan: Plan | None = None) -> Any:
        """Wrap the model's layers; weights in float32 beside a base of any dtype."""
        check_places(self, base.model)
        if is_low(base.dtype):
            compute_low(base, base.model)
        with self._one_sentence(base.model):
            settings = self.fitted(base.model) if tensors is None else self.learned(tensors)
            model = self.put_in(base, self.config(base.kind, **settings), tensors, plan)
        check_patterns(self, _adapted(model))
        own_biases(base.model)
        if tensors is not None:
            self.load(model, tensors)
        _settle(model, base.dtype)
        return model if training else model.requires_grad_(False)

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft change the model, and return its module."""
        import peft

        return peft.get_peft_model(base.model, config)

    def load(self, model: Any, tensors: Tensors) -> None:
        """Write fitted weights into the adapter.

        Raises
        ------
        ModelLoadError
            If they belong to another base model.
        """
        import peft

        from llmfit.memory import is_out_of_memory

        try:
            loaded = peft.set_peft_model_state_dict(model, tensors)
            odd = [name for name in loaded.unexpected_keys if name not in APART]
            odd += _without_weights(model, loaded.missing_keys) if not {*APART} & {*tensors} else []
        except (RuntimeError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelLoadError(f"The saved weights do not belong to this base model: {reason(error)}.") from error
        if odd:
            raise ModelLoadError(f"The saved weights do not belong to this base model: {odd[0]!r} is in one only.")

    def tensors(self, model: Any) -> Tensors:
        """Copy the adapter's weights, under the names that peft gives them in files."""
        import peft

        with quiet():
            state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def save(self, folder: Path, tensors: Tensors, base_name: str, kind: str = "decoder") -> None:
        """Write a PEFT adapter folder."""
        super().save(folder, tensors, base_name, kind)
        config = self.config(kind, base_name, **self.learned(tensors))
        config.inference_mode = True
        config.save_pretrained(str(folder))

    # Sentences ----------------------------------------------------------------------------------

    @contextmanager
    def _one_sentence(self, model: Any) -> Iterator[None]:
        """Turn what peft says of settings that do not go with a model into one sentence."""
        try:
            with quiet():
                yield
        except LLMFitError:
            raise
        except REFUSALS as error:
            from llmfit.memory import is_out_of_memory

            if is_out_of_memory(error):
                raise
            if any(words in str(error).lower() for words in ("target module", "`target_modules`")):
                raise no_target(self, model, said=str(error)) from error
            raise ParameterError(
                f"The adapter {self.type!r} cannot be put into this model: {reason(error)}."
            ) from error


@dataclass(frozen=True, repr=False)
class Named(PeftSpec):
    """Base of the methods whose settings name layers, whether the house has a spec of theirs or only peft has them."""

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        chosen = getattr(self, "layers_to_transform", None)
        if chosen is not None and is_pattern(getattr(self, "target_modules", None)):
            wanted = "None where target_modules is a regular expression"
            raise parameter_error("layers_to_transform", type(self).__name__, wanted, chosen)

    def settings(self) -> dict[str, Any]:
        """Write names as lists, where peft would take one for a regular expression; what is one stays one."""
        given = super().settings()
        for key in ("modules_to_save", "target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"):
            pattern = key in ("target_modules", "exclude_modules") and is_pattern(given.get(key))
            if given.get(key) is not None and given[key] != "all-linear" and not pattern:
                given[key] = as_names(given[key])
        return given

    def fitted(self, model: Any) -> dict[str, Any]:
        """Name the linear layers one by one where only some of the blocks are adapted: peft wants it so."""
        return {"target_modules": linear_names(model)} if self._picks_from_all() else {}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Name the layers that have weights, for the same reason."""
        if not self._picks_from_all():
            return {}
        return {"target_modules": self.layers_of(tensors), "layers_to_transform": None, "layers_pattern": None}

    def _picks_from_all(self) -> bool:
        chosen = getattr(self, "layers_to_transform", None)
        return getattr(self, "target_modules", None) == "all-linear" and chosen is not None

    def layers_of(self, tensors: Tensors) -> list[str]:
        """Names of the layers that an adapter's tensors belong to."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_type]}"
        layers = {name.partition(mark)[0] for name in tensors if mark in name}
        return sorted(n.removeprefix(WRAPPED) for n in layers if n.startswith(WRAPPED))  # not what all of them share


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerSpec(Named):
    """Base of the methods that adapt layers by name.

    Parameters
    ----------
    target_modules : str or list of str, default="all-linear"
        Names of the layers adapted, or the name of one; "all-linear" is every linear layer but the output head. A text
        with more in it than letters, digits, dots, dashes and underscores is a regular expression that matches whole
        names. Where the default is None, peft chooses by the model's family.
    modules_to_save : str or list of str, default=None
        Layers trained in full beside, on a private copy.
    """

    target_modules: Any = "all-linear"
    modules_to_save: Any = None


# Models ---------------------------------------------------------------------------------------------


def config_class(peft_type: str) -> Any:
    """Find peft's class of a method's configuration."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def linear_names(model: Any) -> list[str]:
    """Names of the linear layers inside the model's blocks, without the path."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return sorted({name.rpartition(".")[2] for name in linear if any(part.isdigit() for part in name.split("."))})


def target_layers(model: Any, config: Any) -> dict[str, Any]:
    """Find the layers of a plain model that a configuration names."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    _maybe_include_all_linear_layers(config, model)
    found = {name: m for name, m in model.named_modules() if check_target_module_exists(config, name)}
    return {name: module for name, module in found.items() if getattr(module, "weight", None) is not None}


def size_of(layer: Any) -> tuple[int, int]:
    """Count inputs and outputs of a layer, however its weight is stored."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    inputs, outputs = layer.weight.shape  # transformers' Conv1D, and embeddings
    return inputs, outputs


def named_sizes(model: Any, config: Any) -> dict[str, tuple[int, int]]:
    """Count inputs and outputs of the layers that a configuration names, by their names."""
    return {name: size_of(layer) for name, layer in target_layers(model, config).items() if layer.weight.dim() == 2}


def is_packed(layer: Any) -> bool:
    """Whether a layer's weight is stored in few bits."""
    return getattr(layer.weight, "quant_state", None) is not None or not layer.weight.is_floating_point()


def largest_divisor(numbers_: list[int], most: int) -> int:
    """Find the largest number up to `most` that divides all.

    Examples
    --------
    >>> largest_divisor([32, 48], most=20)
    16
    """
    common = math.gcd(*numbers_)
    return max((n for n in range(1, min(common, most) + 1) if common % n == 0), default=1)


def _adapted(model: Any) -> list[str]:
    """Names of the layers of a model that peft has wrapped, and of weights that are adapted by themselves."""
    layers = [(n.removeprefix(WRAPPED), m) for n, m in model.named_modules() if hasattr(m, "get_base_layer")]
    weights = [(name, getattr(layer, "parameter_name", "")) for name, layer in layers]
    return [f"{name.replace('.base_layer', '')}.{weight}" if weight else name for name, weight in weights]


def _settle(model: Any, dtype: torch.dtype) -> None:
    """Hold what is trained in float32 or wider; beside a base of fewer bits, let autocast choose what is multiplied."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and is_low(parameter.dtype):
            parameter.data = parameter.data.to(torch.float32)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = not is_low(dtype)
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else None
        if is_low(dtype) and isinstance(base, torch.nn.Linear):
            stay_wide(module, base.weight, dtype)


def _without_weights(model: Any, missing: Sequence[str]) -> list[str]:
    """Name what is trained and was not loaded, under any of the names that it has."""
    named = list(model.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in named if name not in set(missing)}
    learns = [(name, id(parameter)) for name, parameter in named if parameter.requires_grad and CONSTANT not in name]
    return [name for name, own in learns if own not in there]


def _plain(value: Any) -> Any:
    """Write a setting with Python's own types, as JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"(?s).*({'|'.join(HARMLESS)}).*")
        yield
