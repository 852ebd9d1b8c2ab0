"""Optimisers by name, from libraries; learning-rate schedules as functions of the step.

Takes names and settings; gives a ``torch.optim.Optimizer`` and numbers. Knows no model and no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from llmfit.exceptions import ParameterError, check_choice, missing_package, parameter_error, reason
from llmfit.memory import is_out_of_memory

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "by_rate",
    "learning_rate_at",
    "make_optimizer",
    "resolve_optimizer",
    "set_rate",
]


def resolve_optimizer(value: Any) -> tuple[str, dict[str, Any]]:
    """Turn a name, or a dict of "type" and settings, into both.

    Raises
    ------
    ParameterError
        If the name is unknown, the learning rate is among the settings, or a setting is none of the optimiser's.
    """
    given = {"type": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "type" not in given:
        raise parameter_error("optimizer", "the estimator", "a name or a dict with a 'type'", value)
    check_choice("optimizer", "the estimator", given["type"], list(OPTIMIZERS))
    if "lr" in given:
        raise ParameterError("The 'optimizer' parameter has no 'lr'. Set the 'learning_rate' parameter instead.")
    name, settings = given["type"], {key: item for key, item in given.items() if key != "type"}
    if settings and (name in OF_TORCH or find_spec("bitsandbytes") is not None):
        _try_step(name, settings)
    return name, settings


def make_optimizer(
    value: Any,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build an optimiser by name, for weights or for groups of weights (see :func:`by_rate`).

    Raises
    ------
    ParameterError
        If the name is unknown, its library is missing, or a setting is none of the optimiser's.
    """
    name, settings = resolve_optimizer(value)
    return _build(name, settings, list(parameters), lr=learning_rate, weight_decay=weight_decay)


def _build(
    name: str, settings: dict[str, Any], parameters: list[Any], *, lr: float = 1e-3, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    with _taking(name, settings):
        return OPTIMIZERS[name](parameters, lr=lr, **{"weight_decay": weight_decay, **settings})


@contextmanager
def _taking(name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Say in one sentence that an optimiser cannot use its settings."""
    try:
        yield
    except ParameterError:
        raise
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ParameterError(f"The optimizer {name!r} cannot take {settings!r}: {reason(error)}.") from error


def by_rate(
    parameters: Mapping[str, torch.nn.Parameter], rate: Callable[[str], float]
) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """Group weights by the factor on their learning rate; where all have one rate, they need no groups.

    Parameters
    ----------
    parameters : dict of str to Parameter
    rate : callable (name) -> factor
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(rate(name), []).append(parameter)
    if set(groups) <= {1.0}:
        return list(parameters.values())
    return [{"params": weights, "factor": factor} for factor, weights in groups.items()]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step, each group's factor kept."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def _try_step(name: str, settings: dict[str, Any]) -> None:
    """Take a step with settings, of which some are only looked at then."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = _build(name, settings, [weight])
    if name in OF_TORCH and not settings.get("capturable"):  # which no CPU steps with
        weight.grad = torch.ones(1)
        with _taking(name, settings):
            optimizer.step()


def _of_torch(name: str, *, whole: bool = False, **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    """Make optimisers of torch; with `whole`, by its one kernel for all of a step's operations where that can be."""

    def make(parameters: list[Any], **settings: Any) -> torch.optim.Optimizer:
        chosen = {**fixed, **settings}
        if whole and WAYS.isdisjoint(settings) and all(_is_plain(weight) for weight in _weights(parameters)):
            chosen["fused"] = True
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, **chosen)
        return optimizer

    return make


def _weights(parameters: list[Any]) -> Iterator[torch.nn.Parameter]:
    for one in parameters:
        yield from one["params"] if isinstance(one, dict) else [one]


def _is_plain(weight: torch.nn.Parameter) -> bool:
    return weight.device.type in ("cpu", "cuda") and weight.is_floating_point()


def _of_bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
        try:
            import bitsandbytes
        except ImportError:
            raise missing_package(f"The optimizer {name}", "bitsandbytes") from None
        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(parameters, **settings)
        return optimizer

    return make


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(_: float) -> float:
    return 1.0


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Count the steps of warm-up: a share of all steps below 1, a number of steps from 1 on."""
    return min(total_steps, math.ceil(warmup * total_steps) if warmup < 1 else int(warmup))


def learning_rate_at(step: int, total_steps: int, *, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of one optimiser step.

    Parameters
    ----------
    step : int
        From 0 on.
    total_steps : int
    peak : float
        Reached at the end of the warm-up.
    schedule : str
        A name in `SCHEDULES`: how the rate falls after the warm-up.
    warmup : float
        Share of all steps (< 1), or steps (>= 1), over which the rate rises linearly.

    Examples
    --------
    >>> [learning_rate_at(s, 4, peak=1.0, schedule="linear", warmup=0) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    rising = warmup_steps(warmup, total_steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * SCHEDULES[schedule]((step - rising) / max(total_steps - rising, 1))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}

WAYS = {"fused", "foreach", "capturable", "differentiable"}  # of computing a step, which a user may have chosen

OF_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _of_torch("AdamW", whole=True),
    "adam": _of_torch("Adam", whole=True),
    "sgd": _of_torch("SGD"),
    "adafactor": _of_torch("Adafactor"),
    "adagrad": _of_torch("Adagrad"),
    "nadam": _of_torch("NAdam", decoupled_weight_decay=True),
    "radam": _of_torch("RAdam", decoupled_weight_decay=True),
    "rmsprop": _of_torch("RMSprop"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **OF_TORCH,
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
    "lion": _of_bitsandbytes("Lion"),
    "lion_8bit": _of_bitsandbytes("Lion8bit"),
}
