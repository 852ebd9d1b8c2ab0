"""Errors, warnings and the sentences they carry.

Takes nothing from the rest of the package and knows no library, so that every file can use it. Each
error is one sentence that names the parameter, column or row, what was wanted and what came instead.

    LLMFitError
    ├── ParameterError (ValueError)    a keyword argument or a key of a dict
    ├── DataError (ValueError)         the frame: a column, a row, a label
    │   └── TemplateError              the template, or a row that does not fit in it
    ├── ModelLoadError (ValueError)    a base model or a saved model cannot be read
    ├── TrainingError (RuntimeError)   the loss or the gradient is not finite
    └── OutOfMemoryError (RuntimeError)

scikit-learn's ``NotFittedError`` is raised where an estimator is used before ``fit``.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = [
    "DataError",
    "DataWarning",
    "LLMFitError",
    "LLMFitWarning",
    "MemoryWarning",
    "ModelLoadError",
    "OutOfMemoryError",
    "PackingWarning",
    "ParameterError",
    "TemplateError",
    "TrainingError",
    "TruncationWarning",
]


class LLMFitError(Exception):
    """Base of every error that llmfit raises on purpose."""


class ParameterError(LLMFitError, ValueError):
    """A keyword argument, or a key of one that is a dict, cannot be used."""


class DataError(LLMFitError, ValueError):
    """The data cannot be used: the sentence names the column, row or label."""


class TemplateError(DataError):
    """A template cannot be read, or does not fit the frame."""


class ModelLoadError(LLMFitError, ValueError):
    """A base model or a saved model cannot be loaded."""


class TrainingError(LLMFitError, RuntimeError):
    """Training met a loss or a gradient that is not finite."""


class OutOfMemoryError(LLMFitError, RuntimeError):
    """Not even one row fits in memory."""


class LLMFitWarning(UserWarning):
    """Base of every warning of llmfit."""

    said: tuple[str | int, ...] = ()
    examples: Sequence[object] = ()

    @property
    def about(self) -> tuple[Any, ...]:
        """What it is about: all but its counts."""
        return type(self), *(part for part in self.said if isinstance(part, str))


class DataWarning(LLMFitWarning):
    """Something about the data that changes what a result means."""


class TruncationWarning(LLMFitWarning):
    """Prompts or answers were cut; the sentence counts them."""


class MemoryWarning(LLMFitWarning):
    """Memory ran out and the token budget of a forward pass was halved."""


class PackingWarning(LLMFitWarning):
    """A base model cannot go a quick way, as packed rows are: results are the same, but take longer or more memory."""


_counting: ContextVar[bool] = ContextVar("counting", default=False)


@contextmanager
def counting() -> Iterator[None]:
    """Let :func:`warn` say inside what counts nothing as well: of how many rows there is nothing to say."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


def warn(warning: Warning) -> None:
    """Warn at the line of the user's code, however deep in llmfit or scikit-learn the cause was found.

    What counts, and has counted nothing, is not said.
    """
    if getattr(warning, "said", ())[:1] == (0,) and not _counting.get():
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("llmfit", "sklearn"):
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)


def counted(kind: type[LLMFitWarning], *said: str | int, examples: Iterable[object] = ()) -> LLMFitWarning:
    """Make a warning of which counts are a part, so that :func:`added` can sum up those of many tables.

    Parameters
    ----------
    kind : type
    *said : str or int
        The sentence in pieces, the count that it is about first: its numbers are counts, its texts say of what.
    examples : iterable
        Some of what is counted, for the end of the sentence.
    """
    shown = list(dict.fromkeys(examples))[:4]
    warning = kind("".join(map(str, said)) + (f": {quoted(shown, most=3)}." if shown else ""))
    warning.said, warning.examples = said, shown
    return warning


def added(one: LLMFitWarning, other: LLMFitWarning) -> LLMFitWarning:
    """Sum up two warnings of :func:`counted` that say the same of different rows."""
    pairs = zip(one.said, other.said, strict=True)
    said = (a + b if isinstance(a, int) and isinstance(b, int) else a for a, b in pairs)
    return counted(type(one), *said, examples=[*one.examples, *other.examples])


def quoted(names: Iterable[object], *, most: int = 12) -> str:
    """Write names as ``'a', 'b', 'c'``, with ``...`` where there are too many."""
    listed = list(names)
    tail = ", ..." if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + tail


def suggest(name: object, known: Iterable[object]) -> str:
    """End a sentence with `` Did you mean 'x'?`` where a known name is near."""
    near = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" Did you mean {near[0]!r}?" if near and near[0] != name else ""


def unknown_key(name: str, owner: str, known: Collection[str]) -> ParameterError:
    """Refuse a key that `owner` does not have, naming those it has."""
    has = f"It has {quoted(sorted(known), most=99)}." if known else "It has none."
    return ParameterError(f"{owner} has no parameter {name!r}. {has}{suggest(name, known)}")


def parameter_error(name: str, owner: str, wanted: str, value: object) -> ParameterError:
    """Say what the parameter must be, and what it is."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ParameterError(f"The {name!r} parameter of {owner} must be {wanted}. Got {shown} instead.")


def check_choice(name: str, owner: str, value: object, choices: Collection[Any]) -> None:
    """Raise unless the value is one of the choices."""
    if not any(value is choice or (isinstance(value, type(choice)) and value == choice) for choice in choices):
        error = parameter_error(name, owner, f"one of {quoted(choices, most=99)}", value)
        raise ParameterError(f"{error}{suggest(value, choices) if value is not None else ''}")


def check_int(name: str, owner: str, value: object, *, least: int, other: str = "") -> int:
    """Return the value as an int, or raise unless it is one of at least `least`; `other` names what else may stand."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise parameter_error(name, owner, f"{other}an int >= {least}", value)
    return int(value)


def check_number(
    name: str,
    owner: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    open_ends: bool = False,
    other: str = "",
) -> float:
    """Return the value as a float, or raise unless it is a finite number within the bounds.

    Parameters
    ----------
    least, most : float
        The bounds; infinite where there is none.
    open_ends : bool, default=False
        Leave the bounds themselves out.
    other : str
        What else is allowed, for the sentence.
    """
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    inside = least < number < most if open_ends else least <= number <= most
    if not (inside and math.isfinite(number)):
        raise parameter_error(name, owner, other + _range_words(least, most, open_ends), value)
    return number


def _range_words(least: float, most: float, open_ends: bool) -> str:
    above, below = (">", "<") if open_ends else (">=", "<=")
    bounds = [f"{above} {least:g}"] * math.isfinite(least) + [f"{below} {most:g}"] * math.isfinite(most)
    return " ".join(["a finite number", " and ".join(bounds)]).strip()


def check_keys(owner: str, given: Mapping[Any, Any], known: Collection[str]) -> None:
    """Raise for the first key of `given` that is not known."""
    for key in given:
        if key not in known:
            raise unknown_key(str(key), owner, known)


def reason(error: BaseException) -> str:
    """Take the first line of what another library says, without its full stop, to end a sentence with."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".:")


def missing_package(what: str, package: str, extra: str | None = None) -> ParameterError:
    """Say which optional package is needed, and how it is installed."""
    install = f"'llmfit[{extra}]'" if extra else package
    return ParameterError(f"{what} needs {package}. Install it with: pip install {install}.")
