"""Token budgets of a forward pass, and what happens when memory runs out.

Takes sizes and errors; gives smaller sizes and one kind of error. Lets those go who hold something in spare; knows no
model and no data.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from llmfit.exceptions import MemoryWarning, OutOfMemoryError, check_int
from llmfit.exceptions import warn as tell

__all__ = [
    "auto_budget",
    "bare",
    "enough",
    "free",
    "give_up",
    "halved",
    "is_out_of_memory",
    "keep_freed",
    "may_go",
    "once_more",
    "one_memory_error",
    "runs_out",
]

T = TypeVar("T")
WORDS = ("can't allocate memory", "out of memory")  # of allocators that raise a plain RuntimeError
ADVICE = "Choose a smaller base_model or adapter rank, or a dtype of fewer bytes."
AUTO_TOKENS = {"cpu": 4096, "mps": 4096, "cuda": 16384}
BLOCK = 31 * 2**20  # bytes: just below the most that glibc learns to keep
ENOUGH = {"cpu": 2048}  # tokens of a pass from which a device gains nothing by more of them


def auto_budget(batch_tokens: Any, device: torch.device) -> int:
    """Resolve the token budget of a forward pass: a number, or "auto" by device."""
    if batch_tokens == "auto":
        return AUTO_TOKENS.get(device.type, 4096)
    return check_int("batch_tokens", "the estimator", batch_tokens, least=1, other="'auto' or ")


def enough(batch_tokens: Any, device: torch.device) -> int:
    """Say how many tokens are worth to be brought together in a pass: the budget, or fewer where "auto" leaves it."""
    budget = auto_budget(batch_tokens, device)
    return min(budget, ENOUGH.get(device.type, budget)) if batch_tokens == "auto" else budget


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on any device, from other errors."""
    own = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return own or (isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS))


def runs_out(error: BaseException) -> bool:
    """Tell an allocation that failed, also where it is llmfit's own error by now: less at once may do."""
    return isinstance(error, OutOfMemoryError) or is_out_of_memory(error)


@contextmanager
def one_memory_error(what: str) -> Iterator[None]:
    """Turn an allocation that failed, where no smaller batch could help, into llmfit's own error.

    Parameters
    ----------
    what : str
        What memory does not hold, for the sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        give_up()  # for what is tried next
        raise OutOfMemoryError(f"Memory does not hold {what}. {ADVICE}") from error


def bare(error: Exception) -> Exception:
    """Take from an error the frames that it holds, and the errors behind it: what stands in them is kept with it."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class Spare(Protocol):
    """What holds memory only so that something need not be made again."""

    def forget(self) -> bool:
        """Let go of all of it; tell whether there was any."""


_spare: WeakSet[Spare] = WeakSet()


def may_go(holder: Spare) -> None:
    """Let what this holds be given up where memory runs out."""
    _spare.add(holder)


def give_up() -> bool:
    """Let go of all that is held in spare, and free it; tell whether there was anything, so that a second try may do.

    Is called while a base model is lent or loaded, which happens in one thread at a time.
    """
    given_up = sum(holder.forget() for holder in [*_spare]) > 0
    if given_up:
        free()
    return given_up


def once_more(work: Callable[[], T], undo: Callable[[], Any] = lambda: None) -> T:
    """Do some work; where memory runs out while something is held in spare, undo it, give that up and do it again."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not runs_out(error):
            raise
        error.__traceback__ = None  # its frames hold what there was memory for
        undo()
        if not give_up():
            raise
    return work()


def free() -> None:
    """Give memory back that nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed() -> None:
    """Let the C library of this process keep the memory of tensors that are gone, for those of the next layer.

    glibc hands a freed block back to the system, which fills it with zeros before it gives it out again, page by page,
    unless one as large was freed before; and what is free at the end of a thread's heap beyond two such blocks. A pass
    that scores may never free a large one. So one is freed here, in which nothing is ever written: from then on up to
    62 MB stay at the end of each heap. With other allocators, and where MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES says what to keep, it does nothing.
    """
    torch.empty(BLOCK, dtype=torch.uint8, device="cpu")


def halved(size: int, unit: str, *, least: int = 1, warn: bool = True) -> int:
    """Free what can be freed and return half of a batch's size, with a warning where it is the first time.

    Parameters
    ----------
    size : int
    unit : str
        What the size counts, for the warning.
    least : int, default=1
        The size of one row: nothing smaller helps.
    warn : bool, default=True

    Raises
    ------
    OutOfMemoryError
        If there is nothing left to halve.
    """
    free()
    if size <= least:
        raise OutOfMemoryError(f"Memory does not hold one row. Lower max_length. {ADVICE}")
    if warn:
        sentence = f"Memory ran out: going on with batches of {size // 2} {unit}, smaller ones if it runs out again."
        tell(MemoryWarning(sentence))
    return size // 2
