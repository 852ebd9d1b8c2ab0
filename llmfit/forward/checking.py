"""Whether a model can read packed rows: seen by letting it read some both ways.

Takes a lent module and rows; gives how many tokens all of them share. The padded way is the truth here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from llmfit.encoding import Encoded, Ids
from llmfit.forward.batches import ask, collate, completion_logits
from llmfit.kinds import find_own
from llmfit.packing import Behind, KeptBeginning, Layout, Layouts, PackingError, Tree, both_ways, common_prefix, packed
from llmfit.packing.attention import LONG
from llmfit.selfcheck import Said, apart, seen_alike

__all__ = ["number_bytes", "packable", "rescales", "same_words", "some_ids", "some_rows"]

WINDOWS = ("sliding_window", "attention_chunk_size")  # tokens that a query sees back, where not all
RESCALED = ("dynamic", "longrope")  # rotary angles that depend on the longest row of a pass
COUNTING = "attn_temperature_tuning"  # of layers that do not ask for positions
SHORT = (4, 9, 17)  # own tokens of the rows that a model is looked at with
LONGER = (9, LONG + 1)
WIDER = (9, 17, 300)  # than any head, from which on a GPU attends in groups by a kernel

WAYS = {
    "packed": "read packed rows",
    "begun": "read prompts whose beginning is known",
    "beside": "read rows of several adapters at once",
    "behind": "go on from packed rows that it has read",
    "decoding": "answer packed prompts a token at a time",
    "in pieces": "make the words of padded rows a piece at a time",
}
INSTEAD = {
    "packed": "they are padded, which takes longer",
    "begun": "they are read whole, which takes longer",
    "beside": "adapters are trained one by one, which takes longer",
    "behind": "all classes are read behind each prompt, which takes longer",
    "decoding": "they are padded, which takes longer",
    "in pieces": "they are made at once, which takes more memory",
}
ROUNDING = {1: 0.05, 2: 0.03, 4: 1e-3}  # by the bytes of the smallest numbers that take part


Read = Callable[[Sequence[Encoded], int | None], tuple[torch.Tensor, Layout | Layouts | Behind | None]]


def packable(
    model: Any,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device,
    start_ids: Ids = (),
    behind: int = 0,
    read: Read | None = None,
    kind: str = "words",
) -> int | None:
    """Say how many tokens all rows share, packed, in a lent model; None where they have to be padded.

    A model that is met for the first time, or with layers that it has not had before, reads three rows both ways, and
    two of which one is long before it is given such ones; before it learns, the gradients of the attention itself are
    looked at. Where the ways disagree, rows are padded, and a warning says so.

    Parameters
    ----------
    model : torch.nn.Module
    rows : sequence of Encoded
        All that are to come, with the longest answer; each has something to be predicted from.
    behind : int, default=0
        Tokens that stand behind each row besides, as the other answers of a tree do.
    read : callable (rows, shared) -> (Tensor, Layout or None), or None
        Lets the model read rows one way or the other, and gives what is to be alike; None takes the next words' logits.
    kind : str
        Name of what `read` gives.

    Warns
    -----
    PackingWarning
        If the model reads packed rows otherwise than padded ones, and nothing in it says why.
    """
    own = find_own(model)
    if not rows or start_ids or own is None:
        return None
    longest = max(row.length for row in rows)
    if _slides(own, longest) or rescales(own, longest) or _counts(own):
        return None
    if not all(getattr(module, "packable", True) for module in model.modules()):
        return None
    if (
        torch.is_grad_enabled()
        and any(p.requires_grad for p in model.parameters())
        and not _goes_back(model, own, device)
    ):
        return None
    how = read or partial(_read_words, model, pad_id, device)
    for name, lengths, in_groups in _looks(own, kind, longest + behind, device):
        if not _sees(own, lengths):
            return None
        if not same_words(model, "packed", partial(_both_ways, model, own, how, lengths, in_groups), name):
            return None
    return common_prefix([row.prompt for row in rows])


def _goes_back(model: Any, own: Any, device: torch.device) -> bool:
    """See once whether attention goes back, in the numbers that a model computes with, as autograd would."""
    low = next((m.computes_in for m in model.modules() if getattr(m, "computes_in", None) is not None), None)
    dtype = own.dtype if low is None else low
    look = partial(both_ways, device, dtype)
    return seen_alike(own, ("back", dtype), model, look, what="learn from packed rows", instead=INSTEAD["packed"])


def _looks(own: Any, kind: str, tokens: int, device: torch.device) -> list[tuple[str, tuple[int, ...], bool]]:
    """List what a model is looked at with, before rows of so many tokens: names, own tokens of rows, whether in groups.

    A GPU attends to few tokens by a table, as it does in all looks, and to many in groups, wide ones by a kernel.
    """
    looks: list[tuple[str, tuple[int, ...], bool]] = [(kind, SHORT, False)]
    if tokens > LONG:
        looks.append((f"{kind}, long", LONGER, False))
    if device.type != "cpu":
        positions = getattr(own.config.get_text_config(), "max_position_embeddings", None) or _longest(WIDER)
        wide = _sees(own, WIDER) and _longest(WIDER) <= positions
        looks.append((f"{kind}, in groups", WIDER if wide else SHORT, True))
    return looks


def _sees(own: Any, lengths: Sequence[int]) -> bool:
    """Tell a model that reads rows with so many tokens of their own as it reads shorter ones."""
    tokens = _longest(lengths)
    return not (_slides(own, tokens) or rescales(own, tokens))


def _longest(lengths: Sequence[int]) -> int:
    """Count the tokens of the longest row that a model is looked at with."""
    return 6 + max(lengths) + 1


def same_words(
    model: Any,
    way: str,
    read: Callable[[], Sequence[torch.Tensor] | None],
    kind: Hashable = "words",
    *,
    most: float = math.inf,
) -> bool:
    """See once whether a model says the same in two ways of reading; remember it for its layers.

    Parameters
    ----------
    model : torch.nn.Module
    way : str
        Name of the quick way.
    read : callable () -> sequence of Tensor, or None
        What the model says in the plain way, in the quick way and, where that is to be known, in the plain way again,
        otherwise rounded: the quick way may be three times as far off. None is no quick way.
    kind : hashable
        What is said, or of what: the answer of one kind says nothing of another.
    most : float
        Share of the norm that the quick way may be off by, however much of it is rounding.

    Warns
    -----
    PackingWarning
        If the two differ.
    """
    own = find_own(model)
    layers = (way, kind, frozenset(type(module) for module in model.modules()))
    return seen_alike(own, layers, model, partial(_said, model, read, most), what=WAYS[way], instead=INSTEAD[way])


def number_bytes(model: Any) -> int:
    """Count the bytes of the smallest numbers that a model computes with, or has weights of."""
    sizes: set[int] = {p.dtype.itemsize for p in model.parameters()} | _sizes_within(model)
    return min(4, *sizes)


@torch.no_grad()
def _said(model: Any, read: Callable[[], Sequence[torch.Tensor] | None], most: float) -> Said | None:
    """Let a model read both ways; a second time in the plain one measures the rounding."""
    try:
        said = read()
    except PackingError:
        return None
    if said is None:
        return None
    plain, quick, *again = said
    sizes = {plain.dtype.itemsize, *(p.dtype.itemsize for p in model.parameters()), *_sizes_within(model)}
    allowed = sum(3 * apart(other, plain) for other in again) + ROUNDING[min(4, min(sizes))]
    return [(plain, quick, min(allowed, most))]


def _sizes_within(model: Any) -> set[int]:
    """Bytes of the numbers that autocast multiplies, where a model's forward pass chooses such."""
    dtypes = (getattr(module, "computes_in", None) for module in model.modules())
    return {dtype.itemsize for dtype in dtypes if dtype is not None}


def _read_words(
    model: Any, pad_id: int, device: torch.device, rows: Sequence[Encoded], shared: int | None
) -> tuple[torch.Tensor, Layout | Layouts | Behind | None]:
    """Read rows whose answers begin alike, for their logits: packed, also with that token as a tree, twice."""
    batch = collate(rows, pad_id, device, shared=shared)
    logits = completion_logits(model, batch)
    if shared is None:
        return torch.stack([logits] * 3, dim=1), None
    how: dict[str, Any] = {"pad_id": pad_id, "device": device, "shared": shared, "kept": KeptBeginning()}
    prompts, first = [row.prompt for row in rows], rows[0].completion[:1]
    trees = [completion_logits(model, ask(prompts, first, Tree((0,), (1,)), **how)) for _ in range(2)]
    return torch.stack([logits, *trees], dim=1), batch.layout


def _both_ways(
    model: Any, own: Any, read: Read, lengths: Sequence[int], in_groups: bool
) -> Sequence[torch.Tensor] | None:
    """Let a model read rows, with so many tokens each of their own, padded, packed, and padded apart.

    They are the same for every fit: which rows a process met first decides nothing.
    """
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return None  # some layers look at neighbours, whichever row they are of
    rows = some_rows(own, lengths, 2)
    plain, _ = read(rows, None)
    alone = torch.cat([read([row], None)[0] for row in rows])
    with packed(model, in_groups=in_groups):
        quick, layout = read(rows, common_prefix([row.prompt for row in rows]))
    if not isinstance(layout, Layout) or len(layout.met) < own.config.get_text_config().num_hidden_layers:
        return None  # some layers carry a state instead of attending
    return plain, quick, alone


def some_ids(own: Any, count: int) -> Ids:
    """Draw ids of a model's vocabulary, always the same."""
    words = own.config.get_text_config().vocab_size
    return tuple(np.random.default_rng(0).integers(words // 10, words // 2, count).tolist())


def some_rows(own: Any, lengths: Sequence[int], answer: int) -> list[Encoded]:
    """Draw rows that begin alike, with so many tokens each of their own, and one answer of so many; always the same."""
    ids = some_ids(own, 6 + answer + sum(lengths))
    places = pairwise(accumulate(lengths, initial=6 + answer))
    return [Encoded((*ids[:6], *ids[start:stop]), ids[6 : 6 + answer]) for start, stop in places]


def _slides(model: Any, tokens: int) -> bool:
    """Tell a model whose layers do not see the whole of a row of so many tokens."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in WINDOWS)
    return any(isinstance(window, int) and 0 < window <= tokens for window in windows)


def _counts(own: Any) -> bool:
    """Tell a model that scales queries by how many tokens stand before them in the sequence, whichever row's."""
    return any(getattr(module, COUNTING, None) for module in own.modules())


def rescales(own: Any, tokens: int) -> bool:
    """Tell a model that turns all tokens by other angles where one stands so far: a row then depends on the others."""
    config = own.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):  # for all layers, or by kind
        if any(name in str(rope.get("rope_type")) for name in RESCALED):
            bounds = (rope.get("original_max_position_embeddings"), getattr(config, "max_position_embeddings", None))
            if tokens > min((bound for bound in bounds if bound is not None), default=tokens):
                return True
    return False
