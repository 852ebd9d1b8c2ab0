"""Rows packed behind one another in a single sequence, what they all begin with in it once, and the attention for that.

Takes lengths of rows and trees of answers behind them; gives a :class:`Layout`, and teaches a decoder of transformers
to attend by one: each token sees the shared beginning, and of its own row what stands before it. Nothing is padded but
inside the attention, and no key or value is copied to where it is shared. Knows no loss, no label and no estimator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from llmfit.batching import PAD_STEP
from llmfit.encoding import Ids

__all__ = ["Layout", "Layouts", "PackingError", "Tree", "common_prefix", "lay_out", "packed"]

NAME = "llmfit_packed"  # of the attention, among those of transformers
LONG = 512  # tokens of a row from which a fused kernel, which keeps no scores, is worth its copies
SCORES = 2**21  # numbers of one product of queries and keys: what a cache holds
REFUSED = ("softcap", "s_aux", "sinks", "position_bias")  # settings of an attention that changes more than the mask


class PackingError(Exception):
    """A model that cannot attend by a layout; its rows are padded."""


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Count the tokens that all sequences begin with, each keeping one of its own.

    Examples
    --------
    >>> common_prefix([(5, 6, 7), (5, 6, 8, 9)]), common_prefix([(5, 6), (5, 6)])
    (2, 1)
    """
    if not sequences:
        return 0
    first, last = min(sequences), max(sequences)
    shared = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return max(0, min(shared, *(len(sequence) - 1 for sequence in sequences)))


# Layouts --------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """Answers behind a row, tokens that they begin alike with standing once.

    Parameters
    ----------
    depths : tuple of int
        How many of the answer's tokens stand before each.
    ends : tuple of int
        Behind which place each token is seen no more: the tokens from its own place to there go on from it.
    """

    depths: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class _Group(NamedTuple):
    """Rows of like length, padded to one width inside the attention; `shared`: they see the shared beginning."""

    rows: int
    width: int
    shared: bool
    visible: torch.Tensor  # (T, T), or (B, T, T) with trees: which key a query sees


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence belong.

    Attributes
    ----------
    length : int
        Tokens of the sequence, padding at its end included: one token of padding at least.
    shared : int
        Tokens that all rows begin with.
    starts, own : tuple of int
        Where each row's own tokens begin in the sequence, and how many they are, a tree aside.
    positions : Tensor of shape (1, length)
        Of each token in its own row.
    take : Tensor of shape (M,)
        Place in the sequence of every place of the groups, the last one aside from them.
    put : Tensor of shape (length,)
        Place among those of every token of the sequence.
    kept : dict of int to (Tensor, Tensor), or None
        A layer's keys and values of the shared beginning. An empty one is filled; a filled one stands for the tokens,
        which are then not in the sequence. None where the beginning is computed in each pass, with gradients.
    met : set of int
        Layers that have attended by this layout.
    """

    length: int
    shared: int
    starts: tuple[int, ...]
    own: tuple[int, ...]
    positions: torch.Tensor
    take: torch.Tensor
    put: torch.Tensor
    groups: tuple[_Group, ...]
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    met: set[int] = field(default_factory=set)

    @property
    def inline(self) -> bool:
        """Whether the shared tokens are in the sequence."""
        return self.shared > 0 and not self.groups[0].shared

    def ids(self, rows: Sequence[Ids], pad_id: int) -> torch.Tensor:
        """Write rows, each with what all begin with and a tree behind it, into the sequence: (1, length)."""
        ids = torch.full((1, self.length), pad_id)
        if self.inline:
            ids[0, : self.shared] = torch.tensor(rows[0][: self.shared])
        for row, start in zip(rows, self.starts, strict=True):
            ids[0, start : start + len(row) - self.shared] = torch.tensor(row[self.shared :])
        return ids


class Layouts(NamedTuple):
    """Packed sequences behind one another, each of which sees itself alone."""

    parts: tuple[Layout, ...]

    @property
    def positions(self) -> torch.Tensor:
        """Of each token in its own row: (1, length of all)."""
        return torch.cat([part.positions for part in self.parts], dim=1)


def lay_out(
    lengths: Sequence[int],
    shared: int,
    device: torch.device,
    *,
    tree: Tree | None = None,
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Layout:
    """Lay rows out behind one another.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row behind the shared beginning; at least one.
    shared : int
    device : torch.device
    tree : Tree or None
        Stands behind every row.
    kept : dict or None
        See :class:`Layout`.
    """
    tree = tree or Tree()
    inline = 0 if kept else shared
    totals = [length + len(tree.depths) for length in lengths]
    starts, end = [], inline
    for total in totals:
        starts.append(end)
        end += total
    length = -(-(end + 1) // PAD_STEP) * PAD_STEP
    positions = torch.zeros(length, dtype=torch.long)
    positions[:inline] = torch.arange(inline)
    for start, own in zip(starts, lengths, strict=True):
        positions[start : start + own] = torch.arange(shared, shared + own)
        behind = torch.tensor(tree.depths, dtype=torch.long) + shared + own
        positions[start + own : start + own + len(behind)] = behind
    take, groups = _group(totals, lengths, starts, tree, inline, shared)
    places = torch.cat([*take, torch.tensor([-1])])
    places[places < 0] = length - 1
    put = torch.full((length,), len(places) - 1)
    real = places < length - 1
    put[places[real]] = torch.arange(len(places))[real]
    there, take_on, put_on = (tensor.to(device, non_blocking=True) for tensor in (positions[None], places, put))
    groups = [group._replace(visible=group.visible.to(device, non_blocking=True)) for group in groups]
    return Layout(length, shared, tuple(starts), tuple(lengths), there, take_on, put_on, tuple(groups), kept)


def _group(
    totals: Sequence[int], lengths: Sequence[int], starts: Sequence[int], tree: Tree, inline: int, shared: int
) -> tuple[list[torch.Tensor], list[_Group]]:
    """Part rows into groups of like length; -1 is a place without a token."""
    take, groups = [], []
    if inline:
        take.append(torch.arange(inline))
        groups.append(_Group(1, inline, False, _causal(inline)))
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    for _, alike in groupby(order, key=lambda i: _width_class(totals[i])):
        members = list(alike)
        width = -(-max(totals[i] for i in members) // PAD_STEP) * PAD_STEP
        most = max(1, SCORES // (width * (shared + width)))
        for some in (members[i : i + most] for i in range(0, len(members), most)):
            places = torch.full((len(some), width), -1)
            for row, i in enumerate(some):
                places[row, : totals[i]] = torch.arange(starts[i], starts[i] + totals[i])
            take.append(places.reshape(-1))
            visible = _causal(width)
            if tree.depths:
                until = torch.full((len(some), width), width)
                for row, i in enumerate(some):
                    until[row, lengths[i] : totals[i]] = torch.tensor(tree.ends) + lengths[i]
                visible = visible & (torch.arange(width)[:, None] < until[:, None, :])
            groups.append(_Group(len(some), width, shared > 0, visible))
    return take, groups


def _width_class(length: int) -> int:
    """Tell lengths apart by steps, each half as long again as the one before."""
    width, step = PAD_STEP, 0
    while width < length:
        width, step = width + max(PAD_STEP, width // 2), step + 1
    return step


def _causal(width: int) -> torch.Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()


# Attention ------------------------------------------------------------------------------------------


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Let a lent model attend by layouts, and by nothing else, inside.

    Raises
    ------
    PackingError
        If its attention cannot be replaced.
    """
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(NAME, attend)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        raise PackingError("its attention cannot be replaced")
    configs = list({id(part.config): part.config for part in parts}.values())
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | Layouts | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a layout, as transformers calls an attention.

    Parameters
    ----------
    query : Tensor of shape (1, heads, length, D)
    key, value : Tensor of shape (1, heads that queries share, length, D)

    Returns
    -------
    Tensor of shape (1, length, heads, D)
    None
    """
    if layout is None:
        raise PackingError("its layers are not told of the layout")
    if isinstance(layout, Layouts):
        tokens = [part.length for part in layout.parts]
        split = [torch.split(x, tokens, dim=2) for x in (query, key, value)]
        each = [
            attend(module, q, k, v, _, scaling, dropout, part, **settings)[0]
            for q, k, v, part in zip(*split, layout.parts, strict=True)
        ]
        return torch.cat(each, dim=1), None
    _check_settings(module, layout, settings)
    layout.met.add(module.layer_idx)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (_move(x[0].transpose(0, 1), layout.take, layout.put) for x in (query, key, value))
    before = _shared(module, layout, keys, values)
    parts, start = [], 0
    for group in layout.groups:
        here = slice(start, start + group.rows * group.width)
        own = queries[here] * scale, keys[here], values[here]
        work = _fused if group.width > LONG else _by_scores
        parts.append(work(*own, before if group.shared else None, group, dropout))
        start = here.stop
    parts.append(parts[-1][:1] * 0)  # the place aside
    return _move(torch.cat(parts), layout.put, layout.take)[None], None


def _check_settings(module: Any, layout: Layout, settings: dict[str, Any]) -> None:
    if any(settings.get(name) is not None for name in REFUSED) or not getattr(module, "is_causal", True):
        raise PackingError("its attention is of another kind")
    window = settings.get("sliding_window")
    if window is not None and window <= int(layout.positions.max()):
        raise PackingError("its attention slides over less than a row")


class _Move(torch.autograd.Function):
    """Copy rows to where they belong, and their gradients back, each just once; what is aside has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None


def _move(x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    moved: torch.Tensor = _Move.apply(x, there, back)  # type: ignore[no-untyped-call]
    return moved


def _shared(
    module: Any, layout: Layout, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find keys and values of the shared beginning, (heads, shared, D)."""
    if not layout.shared:
        return None
    if layout.kept is not None and not layout.inline:
        return layout.kept[module.layer_idx]
    own = keys[: layout.shared].transpose(0, 1), values[: layout.shared].transpose(0, 1)
    if layout.kept is not None:
        layout.kept[module.layer_idx] = own[0].contiguous(), own[1].contiguous()
    return own


def _by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    group: _Group,
    dropout: float,
) -> torch.Tensor:
    """Attend within a group by plain products: (rows * width, heads, D).

    The queries of all rows meet the shared keys in one product; heads that share keys stand side by side.
    """
    b, t, h = group.rows, group.width, key.shape[1]
    g, d = query.shape[1] // h, query.shape[2]
    q = query.view(b, t, h, g, d).permute(2, 0, 1, 3, 4).reshape(h * b, t * g, d)
    k, v = (x.view(b, t, h, -1).permute(2, 0, 1, 3).reshape(h * b, t, -1) for x in (key, value))
    scores = (q @ k.transpose(1, 2)).view(h, b, t, g, t)
    visible = group.visible if group.visible.dim() == 3 else group.visible[None]
    scores = scores.masked_fill(~visible[None, :, :, None, :], -torch.inf)
    shared = before[0].shape[1] if before is not None else 0
    if before is not None:
        outer = q.view(h, b * t * g, d) @ before[0].transpose(1, 2)
        scores = torch.cat([outer.view(h, b, t, g, shared), scores], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)
    if dropout:
        weights = functional.dropout(weights, dropout)
    out = weights[..., shared:].reshape(h * b, t * g, t) @ v
    if before is not None:
        outer = weights[..., :shared].reshape(h, b * t * g, shared) @ before[1]
        out = out + outer.view(out.shape)
    return out.view(h, b, t, g, -1).permute(1, 2, 0, 3, 4).reshape(b * t, h * g, -1)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    group: _Group,
    dropout: float,
) -> torch.Tensor:
    """Attend within a group of long rows by torch's kernels: (rows * width, heads, D)."""
    b, t = group.rows, group.width
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.view(b, t, x.shape[1], -1).transpose(1, 2) for x in (query, key, value))
    mask: torch.Tensor | None = None
    if before is not None:
        k, v = (torch.cat([x.expand(b, -1, -1, -1), y], dim=2) for x, y in zip(before, (k, v), strict=True))
    if before is not None or group.visible.dim() == 3:
        visible = group.visible if group.visible.dim() == 2 else group.visible[:, None]
        mask = functional.pad(visible, (k.shape[2] - t, 0), value=True)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0
    )
    return out.transpose(1, 2).reshape(b * t, query.shape[1], -1)
