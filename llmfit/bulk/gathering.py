"""Warnings of one frame after another, said once for all of them.

Takes blocks of work; gives one warning of each kind at the end, its counts summed up. Knows no files and no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmfit.exceptions import LLMFitWarning, added, counting, warn

__all__ = ["gathering"]


@contextmanager
def gathering() -> Iterator[Callable[[], Any]]:
    """Yield what is put around each block; what all of them warn of is said at the end.

    What is said in a block that fails counts for nothing, as its rows are answered again.
    """
    seen: dict[Any, tuple[Any, int]] = {}

    @contextmanager
    def gather() -> Iterator[None]:
        with counting(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LLMFitWarning)
            yield
        for one in caught:
            now: Any = one.message
            key = now.about if isinstance(now, LLMFitWarning) else one.category
            before, count = seen.get(key, (None, 0))
            seen[key] = (now if before is None else added(before, now) if _counts(now) else before, count + 1)

    yield gather
    for warning, count in seen.values():
        if _counts(warning) or count == 1:
            warn(warning)
        else:
            warn(type(warning)(f"{warning} {count - 1} more chunk(s) of rows gave such a warning."))


def _counts(warning: Any) -> bool:
    return bool(getattr(warning, "said", ()))
