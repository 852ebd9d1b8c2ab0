"""Two growing files and a journal of how much of them counts.

A chunk is appended to both files and brought to the disk before the journal, which is replaced as a whole, says that it
is there. Whatever stands behind the lengths in the journal, after a kill or a full disk, is cut off when the run goes
on. The journal stays beside the finished file as its manifest. A lock file keeps other runs away from before the
journal is read until its last word is said. Takes bytes; knows no rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from llmfit.exceptions import DataError

__all__ = ["MANIFEST", "PARTIAL", "Journal", "State"]

LOCK = ".lock"
MADE = ".made"
MANIFEST = ".manifest.json"
PARTIAL = ".partial"
VERSION = 2


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
    loose_rows, loose_length : int
        How many of these rows, and bytes of the output, stand behind the last whole chunk: a run that goes on answers
        that chunk again, as a whole.
    done : bool
    output_digest, errors_digest : str
        SHA-256 of the two files as they are put in their places; "" where there is none.
    output_replaced, errors_replaced : str
        SHA-256 of what stood there when the run began, which it is to replace.
    """

    run: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    bad: int = 0
    length: int = 0
    errors_length: int = 0
    loose_rows: int = 0
    loose_length: int = 0
    done: bool = False
    output_digest: str = ""
    errors_digest: str = ""
    output_replaced: str = ""
    errors_replaced: str = ""


class Journal:
    """The files of one run: `output`, `errors`, and beside them what they grow in.

    Parameters
    ----------
    output, errors : path
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.output, self.errors = output.absolute(), errors.absolute()
        self.manifest, self.partial = _beside(self.output, MANIFEST), _beside(self.output, PARTIAL)
        # Several outputs may be told to share a file of errors: what it grows in belongs to one of them, wherever both
        # are moved together.
        own = os.path.relpath(self.output, self.errors.parent).encode("utf-8", "surrogateescape")
        self.errors_partial = _beside(self.errors, f".{hashlib.sha256(own).hexdigest()[:8]}{PARTIAL}")
        self.state = State()
        self._files: list[IO[bytes]] = []
        self._lock: IO[bytes] | None = None

    def lock(self) -> None:
        """Keep other runs away until :meth:`close`, or until the process ends in whatever way.

        Raises
        ------
        DataError
            If another run is writing the output.
        """
        path = _beside(self.output, LOCK)
        while self._lock is None:
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("ab")
            except OSError:
                if self.manifest.is_file() and not os.access(self.output.parent, os.W_OK):
                    return  # where nobody can write, a run that is done may be looked at
                raise
            if not _lock(file):
                file.close()
                raise DataError(f"Another run is writing {str(self.output)!r}.")
            if _is_at(file, path):
                self._lock = file
            else:
                file.close()  # who had it took it away in between

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

    def begin(self, run: dict[str, Any], head: bytes, before: State | None = None) -> None:
        """Begin anew, with what stands before the first row.

        Parameters
        ----------
        run : dict of str to JSON value
        head : bytes
        before : State or None
            Of the same run, which did no row.
        """
        self.errors.parent.mkdir(parents=True, exist_ok=True)
        there = before or State(output_replaced=_digest(self.output), errors_replaced=_digest(self.errors))
        self.state = State(run, output_replaced=there.output_replaced, errors_replaced=there.errors_replaced)
        self._say()  # of a run that has no row yet: whatever an earlier one said of the files no longer holds
        self._open("ab")
        self._cut()
        self.append(head)

    def go_on(self, state: State) -> None:
        """Go on where an earlier run stopped, from its last whole chunk.

        Raises
        ------
        DataError
            If a file has less in it than the journal says.
        """
        rows, length = state.rows - state.loose_rows, state.length - state.loose_length
        self.state = replace(state, rows=rows, length=length, loose_rows=0, loose_length=0)
        if not self.partial.exists() and self._is_own(self.output, state.output_digest):
            return  # stopped between the last rename and the last word of the journal
        self._open("r+b")
        for file, length in zip(self._files, self._lengths(), strict=True):
            if os.fstat(file.fileno()).st_size < length:
                raise DataError(f"{file.name!r} is shorter than its manifest says. Begin anew with overwrite.")
        self._cut()

    def append(self, content: bytes, errors: bytes = b"", *, rows: int = 0, bad: int = 0, whole: bool = True) -> None:
        """Append to both files, and then say so; what is no whole chunk is the last that a run appends."""
        for file, piece in zip(self._files, (content, errors), strict=True):
            rest = memoryview(piece)
            while rest:  # a disk that is nearly full takes a part
                rest = rest[file.write(rest) :]
            _to_disk(file)
        self.state.rows += rows
        self.state.bad += bad
        self.state.length += len(content)
        self.state.errors_length += len(errors)
        if not whole:
            self.state.loose_rows, self.state.loose_length = rows, len(content)
        self._say()

    def finish(self, make: Callable[[Path, Path], None] | None = None) -> None:
        """Put the files in their places: first that of the errors, then the output, then the manifest's last word.

        Parameters
        ----------
        make : callable (partial, target) -> None, or None
            Writes the output out of what has grown, where that is not the output as it is.

        Raises
        ------
        DataError
            If something stands in a place that was not there when the run began.
        """
        self._let_go()
        made = self.partial if make is None else _beside(self.output, MADE)
        if make is not None and self.partial.exists():
            make(self.partial, made)
            with made.open("r+b") as file:
                _to_disk(file)
        # A file that is missing is in its place already, and its digest in the journal.
        self.state.output_digest = _digest(made) or self.state.output_digest
        self.state.errors_digest = (_digest(self.errors_partial) or self.state.errors_digest) if self.state.bad else ""
        self._check_places()
        self._say()
        self._put(made)
        self.state.done, self.state.output_replaced, self.state.errors_replaced = True, "", ""
        self._say()
        self.tidy()

    def _check_places(self) -> None:
        """Refuse to write over what others have put there since the run began."""
        for path, *own in (
            (self.output, self.state.output_digest, self.state.output_replaced),
            (self.errors, self.state.errors_digest, self.state.errors_replaced),
        ):
            if (path == self.output or self.state.bad) and path.exists() and _digest(path) not in own:
                raise DataError(
                    f"{str(path)!r} was written by others since this run began. Move it elsewhere, and pass "
                    "resume=True."
                )

    def _put(self, made: Path) -> None:
        if self.state.bad and self.errors_partial.exists():
            self.errors_partial.replace(self.errors)
        elif not self.state.bad:
            self.errors_partial.unlink(missing_ok=True)
            if self._is_own(self.errors, self.state.errors_replaced):
                self.errors.unlink()  # of a run before, which this one replaces
        if made.exists():
            made.replace(self.output)
        for folder in {self.output.parent, self.errors.parent}:
            _folder_to_disk(folder)

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
        for path in (self.partial, _beside(self.output, MADE)):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; another run may have them."""
        self._let_go()
        if self._lock is not None:
            with suppress(OSError):
                _beside(self.output, LOCK).unlink()  # while it is held: who waits for it looks again
            self._lock.close()
            self._lock = None

    def _let_go(self) -> None:
        for file in self._files:
            with suppress(OSError):  # of a disk that is full: what counts is there already
                file.close()
        self._files = []

    def _lengths(self) -> tuple[int, int]:
        return self.state.length, self.state.errors_length

    def _is_own(self, path: Path, digest: str) -> bool:
        return digest != "" and _digest(path) == digest

    def _open(self, mode: str) -> None:
        for path in (self.partial, self.errors_partial):
            if mode == "r+b" and not path.exists():
                self._find_again(path)
            self._files.append(path.open(mode, buffering=0))

    def _find_again(self, path: Path) -> None:
        """Take back the errors of a run that stopped while files were put in their places."""
        if path == self.errors_partial and not self.state.bad:
            path.touch()
        elif path == self.errors_partial and self._is_own(self.errors, self.state.errors_digest):
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
    """SHA-256 of a file; "" where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


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


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed, or the process ends in whatever way; says whether nobody has it."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not on Windows
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
