"""A folder of JSON and safetensors that is written as a whole, and read back with every byte checked.

Takes a function that fills a folder; publishes it by renaming, with a manifest of versions and digests. Knows no
estimator. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfit.exceptions import DataError, ModelLoadError, parameter_error, reason

__all__ = ["FORMAT_VERSION", "MANIFEST", "from_json", "read_folder", "to_json", "write_folder"]

MANIFEST = "llmfit.json"
FORMAT_VERSION = 1
LIBRARIES = ("llmfit", "torch", "transformers", "peft", "scikit-learn", "pandas")


def write_folder(
    path: Any,
    content: dict[str, Any],
    fill: Callable[[Path], None],
    *,
    manifest: str = MANIFEST,
    what: str = "saved llmfit model",
) -> None:
    """Write a folder next to its place, then rename it there; what was there before goes last.

    A process that is killed while it replaces a folder leaves the old one or the new one whole: at `path`, or beside
    it in a hidden folder whose name begins with that of `path`.

    Parameters
    ----------
    path : str or path
    content : dict
        JSON values of the manifest.
    fill : callable (folder) -> None
        Writes the other files.
    manifest : str
        Name of the file that tells such a folder from others.
    what : str
        What such a folder is called.

    Raises
    ------
    DataError
        If `path` holds something else, or `content` has a value that JSON cannot hold.
    """
    if not isinstance(path, str | os.PathLike):
        raise parameter_error("path", "save", "a str or a path", path)
    target = Path(path).expanduser().absolute()
    if target.exists() and not _may_replace(target, manifest):
        raise DataError(f"{str(path)!r} exists and is no {what}: nothing was written. Choose another.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be written: {reason(error)}.") from error
    try:
        fill(temporary)
        written = {
            "format_version": FORMAT_VERSION,
            "versions": _versions(),
            **content,
            "files": {name: _digest(temporary / name) for name in _files(temporary)},
        }
        written["digest"] = _digest_of(written)
        text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / manifest).write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders that nobody else can read
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _may_replace(target: Path, manifest: str) -> bool:
    return target.is_dir() and ((target / manifest).is_file() or not any(target.iterdir()))


def _swap(new: Path, target: Path) -> None:
    old = new.with_name(new.name + "-old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    """Digest a manifest's own content, so that a change in it is seen as well."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_folder(path: Any) -> tuple[Path, dict[str, Any]]:
    """Read the manifest of a saved model and check every file against it.

    Raises
    ------
    ModelLoadError
        If the folder is no saved model, of a newer format, incomplete or damaged.
    """
    if not isinstance(path, str | os.PathLike):
        raise parameter_error("path", "load", "a str or a path", path)
    folder = Path(path).expanduser()
    file = folder / MANIFEST
    if not file.is_file():
        raise ModelLoadError(f"{str(path)!r} is no saved llmfit model: it has no {MANIFEST}.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, files = int(manifest["format_version"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{str(file)!r} is damaged: {error}.") from error
    if version > FORMAT_VERSION:
        made_by = manifest.get("versions", {}).get("llmfit", "a newer version")
        raise ModelLoadError(
            f"{str(path)!r} has format {version}, made by llmfit {made_by}; this llmfit reads formats up to "
            f"{FORMAT_VERSION}. Upgrade with: pip install -U llmfit."
        )
    if manifest.get("digest") != _digest_of(manifest):
        raise ModelLoadError(f"The saved model {str(path)!r} is damaged: {MANIFEST} is not as it was written.")
    for name, digest in files.items():
        _check_file(folder, name, digest)
    return folder, manifest


def _check_file(folder: Path, name: str, digest: str) -> None:
    if name == "README.md":
        return  # a card is there to be edited
    path = folder / name
    if not path.is_file():
        raise ModelLoadError(f"The saved model {str(folder)!r} is incomplete: {name} is missing.")
    if _digest(path) != digest:
        raise ModelLoadError(f"The saved model {str(folder)!r} is damaged: {name} is not as it was written.")


def to_json(value: Any) -> Any:
    """Write a value as JSON can hold it: NumPy scalars as Python's, other keys than str as pairs.

    Raises
    ------
    DataError
        If there is no faithful way.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and "__pairs__" not in value:
            return {key: to_json(item) for key, item in value.items()}
        return {"__pairs__": [[to_json(key), to_json(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    raise DataError(f"{value!r} ({type(value).__name__}) cannot be saved. Use plain values, lists and dicts.")


def from_json(value: Any) -> Any:
    """Undo :func:`to_json`; lists stay lists."""
    if isinstance(value, dict):
        if set(value) == {"__pairs__"}:
            return {from_json(key): from_json(item) for key, item in value["__pairs__"]}
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value
