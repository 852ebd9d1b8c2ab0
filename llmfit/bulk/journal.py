"""Two growing files and a journal of how much of them counts.

A chunk is appended to both files and brought to the disk before the journal, which is replaced as a whole, says that it
is there. Whatever stands behind the lengths in the journal, after a kill or a full disk, is cut off when the run goes
on. The journal stays beside the finished file as its manifest. Takes bytes; knows no rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from llmfit.exceptions import DataError

__all__ = ["MANIFEST", "PARTIAL", "Journal", "State"]

MANIFEST = ".manifest.json"
PARTIAL = ".partial"
VERSION = 1


@dataclass
class State:
    """How far a run is.

    Parameters
    ----------
    run : dict of str to str
        Digests and settings that decide every byte of the output.
    rows, bad : int
        Rows of the input that are done; how many of them are in the file of errors.
    length, errors_length : int
        Bytes of the two files that count.
    done : bool
    output_digest, errors_digest : str
        SHA-256 of the two files as a run that is done left them; "" where there is none.
    """

    run: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    bad: int = 0
    length: int = 0
    errors_length: int = 0
    done: bool = False
    output_digest: str = ""
    errors_digest: str = ""


class Journal:
    """The files of one run: `output`, `errors`, and beside them what they grow in.

    Parameters
    ----------
    output, errors : path
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.output, self.errors = output.absolute(), errors.absolute()
        self.manifest = _beside(self.output, MANIFEST)
        self.partial, self.errors_partial = _beside(self.output, PARTIAL), _beside(self.errors, PARTIAL)
        self.state = State()
        self._files: list[IO[bytes]] = []

    def read(self) -> State | None:
        """Read how far an earlier run came; None where there was none.

        Raises
        ------
        DataError
            If the manifest cannot be read.
        """
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            if content.pop("format_version") == VERSION:
                return State(**content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"The manifest {str(self.manifest)!r} cannot be read: {error!r}.") from error
        raise DataError(f"The manifest {str(self.manifest)!r} is of another version of llmfit.")

    def begin(self, run: dict[str, Any], head: bytes) -> None:
        """Begin anew, with what stands before the first row."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.errors.parent.mkdir(parents=True, exist_ok=True)
        with self._closed_where_it_fails():
            self._open("ab")
            self.state = State(run=run)
            self._cut()
            self.append(head)

    def go_on(self, state: State) -> None:
        """Go on where an earlier run stopped.

        Raises
        ------
        DataError
            If a file has less in it than the journal says.
        """
        self.state = state
        if self._moved(self.partial, self.output, state.length):
            return  # stopped between the last rename and the last word of the journal
        with self._closed_where_it_fails():
            self._open("r+b")
            for file, length in zip(self._files, self._lengths(), strict=True):
                if os.fstat(file.fileno()).st_size < length:
                    raise DataError(f"{file.name!r} is shorter than its manifest says. Begin anew with overwrite.")
            self._cut()

    def append(self, content: bytes, errors: bytes = b"", *, rows: int = 0, bad: int = 0) -> None:
        """Append to both files, and then say so."""
        for file, piece in zip(self._files, (content, errors), strict=True):
            rest = memoryview(piece)
            while rest:  # a disk that is nearly full takes a part
                rest = rest[file.write(rest) :]
            _to_disk(file)
        self.state.rows += rows
        self.state.bad += bad
        self.state.length += len(content)
        self.state.errors_length += len(errors)
        self._say()

    def finish(self, make: Callable[[Path, Path], None] | None = None) -> None:
        """Put the files in their places: first that of the errors, then the output, then the manifest's last word.

        Parameters
        ----------
        make : callable (partial, target) -> None, or None
            Writes the output out of what has grown, where that is not the output as it is.
        """
        self.close()
        if self.state.bad and self.errors_partial.exists():
            self.errors_partial.replace(self.errors)
        elif not self.state.bad:
            self.errors.unlink(missing_ok=True)  # of a run before, which this one replaces
            self.errors_partial.unlink(missing_ok=True)
        if make is not None:
            made = _beside(self.output, ".made")
            make(self.partial, made)
            with made.open("r+b") as file:
                _to_disk(file)
            made.replace(self.output)
        elif self.partial.exists():
            self.partial.replace(self.output)
        for folder in {self.output.parent, self.errors.parent}:
            _folder_to_disk(folder)
        self.state.done = True
        self.state.output_digest = _digest(self.output)
        self.state.errors_digest = _digest(self.errors) if self.state.bad else ""
        self._say()
        self.tidy()

    def changed(self, state: State) -> dict[Path, str]:
        """Say of the files of a run that is done which are not as it left them, and how."""
        found = {}
        for path, digest in ((self.output, state.output_digest), (self.errors, state.errors_digest)):
            if digest and not path.is_file():
                found[path] = "is gone"
            elif digest and _digest(path) != digest:
                found[path] = "was changed since"
        return found

    def tidy(self) -> None:
        """Drop what is left of a run that is done."""
        for path in (self.partial, _beside(self.output, ".made")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; another run may have them."""
        for file in self._files:
            with suppress(OSError):  # of a disk that is full: what counts is there already
                file.close()
        self._files = []

    @contextmanager
    def _closed_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _lengths(self) -> tuple[int, int]:
        return self.state.length, self.state.errors_length

    def _moved(self, partial: Path, target: Path, length: int) -> bool:
        return not partial.exists() and target.is_file() and target.stat().st_size == length

    def _open(self, mode: str) -> None:
        for path in (self.partial, self.errors_partial):
            if mode == "r+b" and not path.exists():
                self._find_again(path)
            self._files.append(path.open(mode, buffering=0))
        if not _lock(self._files[0]):
            self.close()
            raise DataError(f"Another run is writing {str(self.output)!r}.")

    def _find_again(self, path: Path) -> None:
        """Take back the errors of a run that stopped while files were put in their places."""
        if path == self.errors_partial and not self.state.bad:
            path.touch()
        elif path == self.errors_partial and self.errors.exists():
            self.errors.replace(path)
        else:
            raise DataError(f"{str(path)!r} is missing, which an earlier run wrote. Begin anew with overwrite.")

    def _cut(self) -> None:
        for file, length in zip(self._files, self._lengths(), strict=True):
            file.truncate(length)
            file.seek(length)

    def _say(self) -> None:
        """Replace the journal as a whole."""
        new = _beside(self.manifest, ".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"format_version": VERSION, **asdict(self.state)}, file, indent=1)
            _to_disk(file)
        new.replace(self.manifest)
        _folder_to_disk(self.manifest.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Bring a rename to the disk, where the system has a way."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(file: IO[bytes]) -> bool:
    """Keep other runs away until the file is closed, or the process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not on Windows
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
