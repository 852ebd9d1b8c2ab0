"""Where LoRA begins: starts that read the base model's weights or the fit's rows, and how they end as plain LoRA.

Takes a LoRA spec, a lent model and the plan of a fit. A start that takes B0 A0 out of W works on private copies of the
layers; :func:`kept` gives weights of rank 2 r, ``[B, -B0] [A; A0]``, that stand beside the W that was there before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmfit.adapters.peft_spec import WRAPPED, is_packed, size_of, target_layers
from llmfit.adapters.spec import Plan, Tensors
from llmfit.adapters.start_settings import moves_base
from llmfit.exceptions import ParameterError

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel

__all__ = ["go_on", "is_reversed", "kept", "put_in", "unpacked"]

BEGUN = "_llmfit_begun"  # attribute of an installed model: A0 and B0 by layer

Put = Callable[["BaseModel", Any, Tensors | None, Plan | None], Any]


# Beginning ------------------------------------------------------------------------------------------


def put_in(spec: Any, base: BaseModel, config: Any, plan: Plan | None, put: Put) -> Any:
    """Put LoRA into a model from the start that its settings name."""
    start = spec.init_lora_weights
    layers = target_layers(base.model, config)
    _check_sizes(spec, layers)
    if start in NEEDS_ROWS and plan is None:
        raise ParameterError(f"LoRA that begins with {start!r} needs rows to train on: it can begin in fit only.")
    if not moves_base(start):
        model = put(base, config, None, plan)
        if start == "eva" and plan is not None:
            _begin_eva(model, plan)
        return model
    packed = next((name for name, layer in layers.items() if is_packed(layer)), None)
    if packed is not None and start != "loftq":
        raise ParameterError(
            f"The 'init_lora_weights' parameter of {type(spec).__name__} cannot be {start!r} beside a quantized base "
            "model, whose weights it would change. 'loftq' begins from what they have lost."
        )
    if packed is not None and spec.loftq_config:
        raise ParameterError(
            "The 'loftq_config' parameter has no meaning beside a quantized base model, whose bits are known."
        )
    for layer in layers.values():  # a parameter of its own: an embedding tied to an output head stays where it is
        if not is_packed(layer):
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
    if plan is not None and start in NEEDS_ROWS:
        NEEDS_ROWS[start](base.model, config, plan)
    if start == "loftq":
        config.init_lora_weights, loftq = True, config.loftq_config
        model = put(base, config, None, plan)
        _begin_loftq(model, base.source.folder, loftq)
    else:
        model = put(base, config, None, plan)
    _remember(model)
    return model


def go_on(spec: Any, base: BaseModel, config: Any, tensors: Tensors, put: Put) -> Any:
    """Put fitted LoRA into a model, as the start that it had wants it.

    Raises
    ------
    ParameterError
        If it holds what a quantized base model has lost, and this one has lost nothing.
    """
    if spec.init_lora_weights == "loftq":
        for name, layer in target_layers(base.model, config).items():
            a = tensors.get(f"{WRAPPED}{name}.lora_A.weight")
            few = is_packed(layer) or name in base.unpacked
            if a is not None and len(a) == spec.rank_of(name) and not few:
                raise ParameterError(
                    "The adapter began, by init_lora_weights='loftq', as what a quantized base model has lost, and "
                    f"goes with such a one only; {name!r} is in full precision here. Set quantization as in "
                    "the fit, or fit without: what is then taken out of the weights is given back when the fit ends."
                )
    if spec.init_lora_weights == "mica":
        config.init_lora_weights = True  # without the directions, which are among the tensors
    model = put(base, config, tensors, None)
    if spec.init_lora_weights == "mica":
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_B" in name:
                parameter.requires_grad_(False)
    return model


def _check_sizes(spec: Any, layers: Mapping[str, Any]) -> None:
    """Refuse a rank for which a layer has not directions enough."""
    start = spec.init_lora_weights
    each = 2 if start == "lora_ga" else 1
    for name, layer in layers.items():
        width = min(size_of(layer))
        most = width // each
        if (moves_base(start) or start == "mica") and spec.rank_of(name) > most:
            raise ParameterError(
                f"The 'r' parameter of {type(spec).__name__} must be at most {most} where init_lora_weights is "
                f"{start!r}: the layer {name!r} is {width} wide. Got {spec.rank_of(name)} instead."
            )


def _lora_layers(model: Any) -> dict[str, Any]:
    return {n.removeprefix(WRAPPED): m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


@torch.no_grad()
def _remember(model: Any) -> None:
    """Keep A0 and B0 of every layer that they were taken out of."""
    begun = {
        name: tuple(part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
        for name, layer in _lora_layers(model).items()
        if not is_packed(layer.get_base_layer())
    }
    setattr(model, BEGUN, begun)


@torch.no_grad()
def _begin_loftq(model: Any, folder: str, settings: Mapping[str, Any]) -> None:
    """Begin B A with the best product for what a weight loses in few bits.

    A base model that is in few bits stays as it is: what it has lost is known from the weights on disk. Else the
    product is taken out of W, so that the model begins as it was found.
    """
    packed = any(is_packed(layer.get_base_layer()) for layer in _lora_layers(model).values())
    files = _files(folder) if packed else {}
    for name, layer in _lora_layers(model).items():
        own, scale = layer.get_base_layer(), layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if is_packed(own):
            full = _on_disk(files, folder, model.get_base_model(), f"{name}.weight").to(own.weight.device).float()
            full = full.T if is_reversed(own) else full
            left, right = _product(full - unpacked(own).float(), len(a))
        else:
            full = own.weight.data.float()
            full = full.T if layer.fan_in_fan_out else full
            left, right = full.new_zeros(()), full.new_zeros(())
            for step in range(settings["loftq_iter"]):
                rest = full - left @ right if step else full
                left, right = _product(full - _few_bits(rest, settings["loftq_bits"]), len(a))
        a.data, b.data = right.to(a.dtype).contiguous(), (left / scale).to(b.dtype).contiguous()
        if not is_packed(own):
            own.weight.data -= layer.get_delta_weight("default").to(own.weight.dtype)


def _files(folder: str) -> dict[str, Path]:
    """Find the files of a model's weights: the one, or the parts, by the names of the weights."""
    from safetensors import SafetensorError, safe_open

    whole = Path(folder) / "model.safetensors"
    names: dict[str, Path] = {}
    for path in [whole] if whole.exists() else sorted(Path(folder).glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:  # a file that is none names nothing
            names |= dict.fromkeys(file.keys(), path)
    if not names:
        raise ParameterError(
            "The 'init_lora_weights' parameter of LoRA cannot be 'loftq' here: it reads what the weights were in "
            f"safetensors files, and {folder!r} has none."
        )
    return names


def _on_disk(files: Mapping[str, Path], folder: str, model: Any, name: str) -> torch.Tensor:
    """Read a weight by the name that it has in a model, which in the files has the model's prefix, or has it not."""
    from safetensors import safe_open

    prefix = f"{model.base_model_prefix}."
    own = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in files), None)
    if own is None:
        raise ParameterError(
            "The 'init_lora_weights' parameter of LoRA cannot be 'loftq' here: it reads what the weights were in "
            f"safetensors files, and those of {folder!r} have none of the name {name!r}."
        )
    with safe_open(files[own], framework="pt") as file:
        weight: torch.Tensor = file.get_tensor(own)
    return weight


def _product(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best product of a rank for a matrix, its scale shared out to both sides."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _few_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Write a weight in few bits, as bitsandbytes does, and read it again."""
    from bitsandbytes import functional

    if bits == 4:
        packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        read: torch.Tensor = functional.dequantize_4bit(packed, state)
        return read
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # of a row, as its int8 layers hold them
    return (weight / scale).round() * scale


def is_reversed(layer: Any) -> bool:
    """Tell a layer in few bits whose weights stand the other way round in the model's files, as those of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def unpacked(layer: Any) -> torch.Tensor:
    """Read the weights of a layer that bitsandbytes stores in few bits: (out, in)."""
    from peft.utils.integrations import dequantize_bnb_weight

    state = getattr(layer.weight, "quant_state", None)  # of 4 bits; the layer has that of 8
    weight: torch.Tensor = dequantize_bnb_weight(layer.weight, state=layer.state if state is None else state)
    return weight


def _corda(model: Any, config: Any, plan: Plan) -> None:
    """Let peft look at the covariance of the layers' inputs on the rows of the fit."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in plan.rows():
            plan.loss(model, batch)

    preprocess_corda(model, config, run_model=run)


def _lora_ga(model: Any, config: Any, plan: Plan) -> None:
    """Let peft look at the gradient of the loss on the rows of the fit."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def run() -> None:
        for batch in plan.rows():
            plan.loss(model, batch).backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(model, config, train_step=run)


# EVA ------------------------------------------------------------------------------------------------


def _begin_eva(model: Any, plan: Plan) -> None:
    """Begin A with the principal directions of a layer's inputs, ranks shared out by the variance that they explain.

    peft finds the directions batch by batch until they change no more, which they need not do on few rows; here the
    covariance is summed up over all rows, and its eigenvectors are taken once.
    """
    import peft

    config = model.peft_config["default"]
    seen = _covariances(model, plan, labelled=config.eva_config.use_label_mask)
    ranks = {name: layer.r["default"] for name, layer in seen.items()}
    state, ratios = {}, []
    for name, layer in seen.items():
        most = min(round(ranks[name] * config.eva_config.rho), layer.in_features)
        values, vectors = torch.linalg.eigh(seen[name].covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T.contiguous()
        ratios += [(float(value), name) for value in (values / values.sum().clamp(min=1e-30))[:most]]
        scale = values[:most, None].pow(0.25).clamp(min=1e-12) if config.eva_config.whiten else 1.0
        state[name] = (vectors[:most] / scale).float()
    budget = sum(ranks.values())
    counts = Counter(name for _, name in sorted(ratios, key=lambda ratio: -ratio[0])[:budget])
    peft.initialize_lora_eva_weights(model, eva_state_dict={n: w[: counts[n]] for n, w in state.items()})


class _Covariance:
    """A running covariance of a layer's inputs, in float64."""

    def __init__(self, layer: Any) -> None:
        self.r, self.in_features = layer.r, layer.in_features
        self.number = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.products = torch.zeros((), dtype=torch.float64)
        self.chosen: torch.Tensor | None = None

    def __call__(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach()
        values = (values.cpu() if values.device.type == "mps" else values).double()  # MPS has no such numbers
        if self.chosen is not None and self.chosen.shape == values.shape[:2]:
            values = values[self.chosen.to(values.device)]
        values = values.reshape(-1, values.shape[-1])
        self.number += len(values)
        self.total = self.total.to(values.device) + values.sum(0)
        self.products = self.products.to(values.device) + values.T @ values

    @property
    def covariance(self) -> torch.Tensor:
        mean = self.total / max(self.number, 1)
        return self.products - self.number * torch.outer(mean, mean)


@torch.no_grad()
def _covariances(model: Any, plan: Plan, *, labelled: bool) -> dict[str, _Covariance]:
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    seen = {name: _Covariance(layer) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(seen[name]) for name, layer in layers.items()]
    model.eval()
    for batch in plan.rows():
        for layer in seen.values():
            layer.chosen = getattr(batch, "predicts", None) if labelled else None
        plan.loss(model, batch)
    for handle in handles:
        handle.remove()
    return seen


# Ending ---------------------------------------------------------------------------------------------


def kept(spec: Any, model: Any, tensors: Tensors) -> Tensors:
    """Write trained weights as plain LoRA beside the base model's own weights.

    A layer whose rank is not that of the settings is read with the settings' scale (see ``LoRA.learned``): B carries
    what its own scale is more.
    """
    begun = getattr(model, BEGUN, {})
    own = {name: layer.scaling["default"] for name, layer in _lora_layers(model).items()}
    for name, scale in own.items():
        a, b = (f"{WRAPPED}{name}.lora_{part}.weight" for part in "AB")
        if name in begun:
            first_a, first_b = (tensor.cpu() for tensor in begun[name])
            tensors[a] = torch.cat([tensors[a], first_a])  # (2 r, in)
            tensors[b] = torch.cat([tensors[b], -first_b], dim=1)  # (out, 2 r)
        if scale != spec.scale_of(name) and tensors[a].shape[0] != spec.rank_of(name):
            tensors[b] = tensors[b] * (scale / spec.scale_of(name))
    return tensors


NEEDS_ROWS: dict[str, Any] = {"eva": _begin_eva, "corda": _corda, "lora_ga": _lora_ga}
