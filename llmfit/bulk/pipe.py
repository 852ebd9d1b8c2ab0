"""Standard output in the place of a file: rows go there as they come.

Has the methods of a journal that a run calls, and keeps nothing to go on with. Takes bytes; knows no rows.
"""

from __future__ import annotations

import sys
from typing import IO, Any

from llmfit.bulk.journal import State
from llmfit.files import Place

__all__ = ["Pipe"]


class Pipe:
    """Standard output and a file of errors.

    Parameters
    ----------
    errors : Place or None
        None where such rows stop the run.
    """

    def __init__(self, errors: Place | None) -> None:
        self.state = State()
        self._place = errors
        self._errors: IO[bytes] | None = None
        if errors is not None:
            errors.path.parent.mkdir(parents=True, exist_ok=True)
            errors.path.unlink(missing_ok=True)  # of a run before; it is there only if there are such rows

    def append(self, content: bytes, errors: bytes = b"", *, rows: int = 0, bad: int = 0, whole: bool = True) -> None:
        """Write rows."""
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        if errors and self._place is not None:
            self._errors = self._errors or self._place.path.open("wb")
            self._errors.write(errors)
            self._errors.flush()
        self.state.rows += rows
        self.state.bad += bad
        self.state.errors_length += len(errors)

    def finish(self, make: Any = None) -> None:
        """There is nothing to put in its place."""

    def close(self) -> None:
        """Let go of the file of errors."""
        if self._errors is not None:
            self._errors.close()
