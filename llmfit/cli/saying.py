"""What commands say: sentences on standard error, tables on standard output.

Takes texts, frames and measures; prints.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llmfit.exceptions import DataError

__all__ = ["finish", "in_words_of_options", "put", "put_measures", "put_pairs", "say"]

# Words of the Python interface that errors advise, and those of the command line.
OPTIONS = {
    "overwrite=True": "--overwrite",
    "resume=True": "--resume",
    "overwrite.": "--overwrite.",
    "errors=": "--errors",
    "with keep.": "with --keep.",
    "keep names": "--keep names",
    "proba=True needs": "--proba needs",
    "base_model=": "--base-model",
    "merge=False": "--no-merge",
    "merge=True": "--merge",
    "save()": "llmfit fit -o",
    "preview()": "llmfit preview",
    "The 'chunk_rows' parameter of predict_files": "--chunk-rows",
    "The 'n' parameter of preview": "--rows",
    "take a sample before fit: frame.sample(frac=0.1, random_state=0).": (
        "write a sample of the rows to a file, and name that."
    ),
}
WORDS = re.compile("|".join(r"(?<![\w'])" + re.escape(word) for word in OPTIONS))


def in_words_of_options(sentence: str) -> str:
    """Turn advice for Python into advice for the command line."""
    return WORDS.sub(lambda found: OPTIONS[found.group()], sentence)


def say(sentence: str) -> None:
    """Write a sentence to standard error."""
    print(f"llmfit: {sentence}", file=sys.stderr)


def put(text: str = "") -> None:
    """Write a line of data to standard output."""
    with _writing():
        print(text)


def finish() -> None:
    """Write what is still held back: what cannot be written is met here, and not as the process ends."""
    with _writing():
        sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"Standard output cannot be written: {error.strerror}.") from error


def put_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Write names and values in two columns."""
    listed = [(name, _shown(value)) for name, value in pairs]
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        put(f"{name.ljust(width)}  {value}")


def put_measures(measures: dict[str, Any], indent: str = "") -> None:
    """Write what `evaluate` gives: numbers in two columns, then tables, and each target of several under its name."""
    plain = {name: value for name, value in measures.items() if not hasattr(value, "columns") and _is_plain(value)}
    put_pairs((f"{indent}{name}", value) for name, value in plain.items())
    for name, value in measures.items():
        if hasattr(value, "columns"):
            put(f"\n{indent}{name.replace('_', ' ')}")
            put(value.to_string(float_format=lambda number: f"{number:.4f}"))
        elif isinstance(value, dict):
            put(f"{indent}{name}")
            put_measures(value, f"{indent}  ")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
