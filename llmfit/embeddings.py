"""Vectors of a frozen base model: each distinct prompt is computed once, and kept by content.

Takes prompts as token ids, the name of the space they are mapped into, and a function that computes those not known;
gives their vectors. Kept in memory up to a bound, and on request in a folder. Knows no model, no head and no estimator.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmfit.exceptions import DataWarning, reason, warn

__all__ = ["forget_embeddings", "look_up", "space_name"]

Ids = tuple[int, ...]
MOST_BYTES = 512 * 2**20
FORMAT = "1"  # of what vectors mean and how files hold them
FILES = "vectors-*.safetensors"

_known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
_size = 0
_lock = threading.Lock()


def space_name(*parts: object) -> str:
    """Name what decides a prompt's vector beside its tokens: contents of the model, dtype, pooling; never a folder.

    Examples
    --------
    >>> space_name("f00d", "float32", "mean") == space_name("f00d", "float32", "last")
    False
    """
    return hashlib.sha256(repr((FORMAT, *map(str, parts))).encode()).hexdigest()[:32]


def look_up(
    space: str,
    prompts: Sequence[Ids],
    compute: Callable[[list[Ids]], torch.Tensor],
    folder: Any = None,
    *,
    in_memory: bool = True,
) -> torch.Tensor:
    """Give a vector a prompt; compute those that are known nowhere, each once.

    Parameters
    ----------
    space : str
        See :func:`space_name`.
    prompts : sequence of tuple of int, length n
    compute : callable (list of m distinct prompts) -> Tensor of shape (m, hidden)
    folder : path or None
        Where vectors are looked for, and those that it lacks are left for other processes.
    in_memory : bool, default=True
        Look for vectors in this process and keep them there. Without, what comes out does not depend on what ran before
        in the process: a vector's last digits do on the prompts that it was computed beside.

    Returns
    -------
    Tensor of shape (n, hidden)
        On the CPU.

    Warns
    -----
    DataWarning
        If a file of the folder is damaged: it is removed and its vectors are computed again.
    """
    folder = None if folder is None else Path(folder).expanduser() / space
    keys = [_key(space, prompt) for prompt in prompts]
    prompt_of = dict(zip(keys, prompts, strict=True))
    with _lock:
        found = {key: _known[key] for key in prompt_of if in_memory and key in _known}
    if folder is not None and len(found) < len(prompt_of):
        found |= _read(folder, prompt_of.keys() - found.keys())
    missing = [key for key in prompt_of if key not in found]
    if missing:  # without the lock: what computes waits for the model, whose holder may ask for vectors here
        vectors = compute([prompt_of[key] for key in missing])
        found |= dict(zip(missing, vectors.unbind(0), strict=True))
    if folder is not None and (lacking := _lacking(folder, prompt_of)):
        _write(folder, lacking, torch.stack([found[key] for key in lacking]))
    if in_memory:
        with _lock:
            _keep(found)
    return torch.stack([found[key] for key in keys])


def _key(space: str, prompt: Ids) -> bytes:
    return hashlib.sha256(space.encode() + np.asarray(prompt, dtype="<i8").tobytes()).digest()


def _keep(found: dict[bytes, torch.Tensor]) -> None:
    """Remember vectors; those that were longest not asked for go first."""
    global _size
    for key, vector in found.items():
        if key not in _known:
            _known[key] = vector.clone()  # a view would hold the whole batch
            _size += vector.nbytes
        _known.move_to_end(key)
    while _size > MOST_BYTES:
        _, gone = _known.popitem(last=False)
        _size -= gone.nbytes


def forget_embeddings() -> None:
    """Forget the vectors in memory; those in folders stay."""
    global _size
    with _lock:
        _known.clear()
        _size = 0


def _read(folder: Path, wanted: Iterable[bytes]) -> dict[bytes, torch.Tensor]:
    """Read the wanted vectors out of a folder's files."""
    rest, found = set(wanted), {}
    for path in sorted(folder.glob(FILES)):
        for key, vector in _read_file(path).items() if rest else ():
            if key in rest:
                found[key] = vector.clone()
        rest -= found.keys()
    return found


def _lacking(folder: Path, keys: Iterable[bytes]) -> list[bytes]:
    """Tell which vectors no file of a folder names; a damaged file is seen to when it is read."""
    from safetensors import safe_open

    there: set[bytes] = set()
    for path in folder.glob(FILES):
        with suppress(Exception), safe_open(path, framework="pt") as file:  # safetensors' own error is not exported
            there |= {bytes(key) for key in file.get_tensor("keys").numpy()}
    return [key for key in keys if key not in there]


def _read_file(path: Path) -> dict[bytes, torch.Tensor]:
    """Read a whole file, every byte checked; a damaged one is removed, since it can be computed again."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys, vectors = file.get_tensor("keys"), file.get_tensor("vectors")
            if file.metadata()["digest"] != _digest(keys, vectors) or len(keys) != len(vectors):
                raise ValueError("its digest is not that of its contents")
    except Exception as error:  # safetensors raises its own error, which is not exported
        sentence = f"The file {str(path)!r} of kept vectors is damaged ({reason(error)}): they are computed again."
        warn(DataWarning(sentence))
        path.unlink(missing_ok=True)
        return {}
    return {bytes(key): vector for key, vector in zip(keys.numpy(), vectors, strict=True)}


def _write(folder: Path, keys: Sequence[bytes], vectors: torch.Tensor) -> None:
    """Write vectors to a file of their own, named by what it holds; it is there as a whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vectors-{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
    places = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1).copy())
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    tensors = {"keys": places, "vectors": vectors.contiguous()}
    save_file(tensors, temporary, metadata={"digest": _digest(places, vectors)})
    temporary.replace(path)


def _digest(keys: torch.Tensor, vectors: torch.Tensor) -> str:
    return hashlib.sha256(keys.numpy().tobytes() + vectors.contiguous().numpy().tobytes()).hexdigest()
