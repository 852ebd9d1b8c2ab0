"""The command line: ``llmfit fit``, ``predict``, ``evaluate``, ``preview``, ``search``, ``export``, ``show``, ``demo``.

Takes arguments; gives an exit code. Standard output carries data alone, so that commands can be piped; progress,
warnings and errors go to standard error. An error is one sentence, and a traceback only with ``--debug``.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmfit.cli.parsing import make_parser
from llmfit.cli.saying import finish, in_words_of_options, say
from llmfit.exceptions import LLMFitError, reason

__all__ = ["main"]

FAILED, INTERRUPTED, CLOSED = 1, 130, 141
CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): (.+)$", re.MULTILINE)  # the last line of a traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, default=None
        None takes those of the process.

    Returns
    -------
    int
        The exit code: 0; 1 for an error; 3 where rows went to the file of errors; 130 where it was interrupted; 141
        where nobody read standard output any more. Wrong usage exits with 2.

    Examples
    --------
    >>> from llmfit.cli import main
    >>> main(["demo", "--rows", "3"])
    1
    """
    given = make_parser().parse_args(arguments)
    with _warnings_in_a_line(whole=given.debug):
        try:
            code = int(given.run(given) or 0)
            finish()
            return code
        except KeyboardInterrupt:
            say("interrupted.")
            return INTERRUPTED
        except BrokenPipeError:
            _let_go_of_output()
            return CLOSED
        except Exception as error:
            if given.debug:
                raise
            say(_sentence(error))
            _drop_output()
            return FAILED


def _sentence(error: Exception) -> str:
    if isinstance(error, LLMFitError) or type(error).__name__ == "NotFittedError":
        return in_words_of_options(str(error))
    return f"{type(error).__name__}: {_first_line(error)}. Add --debug for the traceback."


def _first_line(said: BaseException) -> str:
    """Take the first line of what a library says; where it tells of fits that failed, with what stopped the last."""
    causes = CAUSE.findall(str(said))
    return f"{reason(said)}: {causes[-1].rstrip('.')}" if causes else reason(said)


def _drop_output() -> None:
    """Let go of what is held back where it cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _let_go_of_output()


def _let_go_of_output() -> None:
    """Keep Python from writing what nobody reads when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # pragma: no cover - no file behind it
        return


@contextmanager
def _warnings_in_a_line(*, whole: bool) -> Iterator[None]:
    """Write a warning as a sentence, without the line of code that gave it; `whole` leaves those of others as is."""
    from llmfit.exceptions import LLMFitWarning

    usual = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, LLMFitWarning):
            say(f"warning: {in_words_of_options(str(message))}")
        elif whole:
            usual(message, category, *rest, **more)
        else:
            say(f"warning: {_first_line(message)}.")

    with warnings.catch_warnings():
        warnings.simplefilter("always", LLMFitWarning)
        warnings.showwarning = show
        yield
