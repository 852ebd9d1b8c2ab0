"""States of a fit, so that one that was killed or held goes on where it stood, bit for bit.

Takes the weights, the optimiser and the state of a run; keeps them in one folder per fit, named by a digest of all
that decides its result, so that a folder can serve a whole search, or in memory. Knows no model and no pandas.
"""

from __future__ import annotations

import json
import shutil
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmfit.callbacks import State
from llmfit.exceptions import ModelLoadError

__all__ = ["Checkpoint", "Pause"]

SHARE_OF_TIME = 0.05  # of a fit's time may go into writing states


class Checkpoint:
    """The states of one fit in ``folder / key``; a new one replaces the last by renaming, so that one is always whole.

    Parameters
    ----------
    folder : path
    key : str
        Digest of everything that decides the result of the fit.
    """

    def __init__(self, folder: Path | str, key: str) -> None:
        self.path = Path(folder) / key / "state.safetensors"
        self._wrote, self._cost = time.perf_counter(), 0.0

    def restore(self, run: Any, state: State) -> None:
        """Put weights, optimiser and state back to where the last saved step left them."""
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                meta = json.loads(file.metadata()["llmfit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:  # safetensors raises its own error, which is not exported
            raise ModelLoadError(
                f"The checkpoint {str(self.path)!r} cannot be read: {error}. Remove it to begin the fit anew."
            ) from error
        _put_back(run, state, tensors, meta)

    def save(self, run: Any, state: State) -> None:
        """Write the state, unless writing has had its share of the time."""
        now = time.perf_counter()
        if now - self._wrote < self._cost / SHARE_OF_TIME:
            return
        tensors, meta = _taken(run, state)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"llmfit": json.dumps(meta)})
        temporary.replace(self.path)
        self._wrote = time.perf_counter()
        self._cost = self._wrote - now

    def remove(self) -> None:
        """Drop the states of a fit that has ended."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


class Pause:
    """The state of one fit in memory: it stands still behind one of its epochs, and goes on from there another time.

    Attributes
    ----------
    epochs : int
        Behind which it stands still next.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._kept: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None

    def restore(self, run: Any, state: State) -> None:
        """Put weights, optimiser and state back to where the fit stands."""
        if self._kept is not None:
            tensors, meta = self._kept  # which stay as they are: where memory runs out, the round begins again
            _put_back(run, state, {name: tensor.clone() for name, tensor in tensors.items()}, deepcopy(meta))
            state.stop |= self._is_reached(state)

    def save(self, run: Any, state: State) -> None:
        """Stop behind the epoch, or where the fit ends by itself, with all that is needed to go on."""
        if self._is_reached(state) or state.stop:
            goes_on = not state.stop and state.step < state.total_steps
            self._kept = _taken(run, state, copy=True, moments=goes_on)
            state.stop = True

    def _is_reached(self, state: State) -> bool:
        return state.step >= self.epochs * (state.total_steps // state.epochs)

    def remove(self) -> None:
        """Keep what is there: a fit that has ended here is one that is held."""


def _taken(
    run: Any, state: State, *, copy: bool = False, moments: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take all that a run goes on from, moments or not: tensors by group and name, and plain values."""
    tensors = {f"weights/{name}": p.detach() for name, p in run.parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in (run.best or {}).items()}
    tensors |= {f"adapter/{name}": tensor for name, tensor in run.adapter.state(run.model).items()}
    inner, plain = _flat_optimizer(run.optimizer) if moments else ({}, {})
    tensors |= {f"optimizer/{name}": tensor for name, tensor in inner.items()}
    return _apart(tensors, copy=copy), {"state": asdict(state), "optimizer": plain}


def _put_back(run: Any, state: State, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    groups = _part(tensors)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(groups["weights"][name])
    run.best = groups.get("best")
    run.adapter.restore(run.model, groups.get("adapter", {}))
    _restore_optimizer(run.optimizer, meta["optimizer"], groups.get("optimizer", {}))
    for name, value in meta["state"].items():
        setattr(state, name, value)


def _apart(tensors: dict[str, torch.Tensor], *, copy: bool) -> dict[str, torch.Tensor]:
    """Bring tensors to the CPU, each in memory of its own, as safetensors wants them; a copy is of nobody else."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = tensor.to("cpu", copy=copy).contiguous()
        apart[name] = own.clone() if own.data_ptr() in taken else own
        taken.add(own.data_ptr())
    return apart


def _part(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Part an optimiser's state into tensors by name and plain values by name."""
    moments: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}

    def flatten(path: str, value: Any) -> None:
        if isinstance(value, dict):  # bitsandbytes nests the tensors that it quantizes
            for name, inner in value.items():
                flatten(f"{path}/{name}", inner)
        else:
            where = moments if isinstance(value, torch.Tensor) else plain
            where[path] = value

    for index, values in optimizer.state_dict()["state"].items():
        flatten(str(index), values)
    return moments, plain


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, plain: dict[str, Any], moments: dict[str, torch.Tensor]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*plain.items(), *moments.items()]:
        index, *path, name = key.split("/")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
