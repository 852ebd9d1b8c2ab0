"""Quick ways that are tried before they are trusted: gone once beside the plain way, and remembered for a model.

Takes what goes both ways; says whether the quick one gives the same. Knows no way, and of a model only that it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from llmfit.exceptions import PackingWarning, reason, warn
from llmfit.memory import is_out_of_memory, once_more

__all__ = ["Said", "apart", "seen_alike"]

Said = Sequence[tuple[torch.Tensor, torch.Tensor, float]]
_known: WeakKeyDictionary[Any, dict[Hashable, bool]] = WeakKeyDictionary()


def seen_alike(
    owner: Any, key: Hashable, module: torch.nn.Module, look: Callable[[], Said | None], *, what: str, instead: str
) -> bool:
    """See once whether a quick way gives what the plain one gives.

    Parameters
    ----------
    owner : any
        What the answer is remembered with, for as long as it lives: a base model.
    key : hashable
        What the answer is about; one for each way and kind of what goes it.
    module : torch.nn.Module
        Put into evaluation mode meanwhile.
    look : callable () -> sequence of (Tensor, Tensor, float), or None
        What both ways give, the plain one first, and how far apart they may be, as a share of the plain one's norm.
        None says that there is no quick way, and needs no warning.
    what, instead : str
        For the sentence: what cannot be done, and what is done in its place, at which price.

    Returns
    -------
    bool
        False, too, where memory ran out or nothing finite came out; that says nothing, and is not remembered.

    Warns
    -----
    PackingWarning
        If the two differ, or the quick way fails.
    """
    known = _known.setdefault(owner, {})
    if key not in known:
        training = module.training
        module.eval()
        try:
            alike = _compare(look, what, instead)
        finally:
            module.train(training)
        if alike is None:
            return False
        known[key] = alike
    return known[key]


def _compare(look: Callable[[], Said | None], what: str, instead: str) -> bool | None:
    try:
        said = once_more(look)
        if said is None:
            return False
        if not all(bool(plain.isfinite().all()) for plain, _, _ in said):
            return None  # there is nothing to compare with
        if all(apart(quick, plain) <= rounding for plain, quick, rounding in said):
            return True
        why = "its answers differ"
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            return None
        why = reason(error)
    warn(PackingWarning(f"This model cannot {what} ({why}): {instead}."))
    return False


def apart(some: torch.Tensor, others: torch.Tensor) -> float:
    """Measure how far numbers are from others, as a share of the norm of these; 0 where both are nothing."""
    one, other = some.cpu().double(), others.cpu().double()  # not every device has such numbers
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float64).tiny))
