"""The attention of packed rows, as transformers calls an attention.

Takes queries, keys and values of a packed sequence and its layout; gives what each token reads. Knows how one layer
attends, and no more of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmfit.exceptions import LLMFitError
from llmfit.packing.behind import Behind, DecodeStep
from llmfit.packing.layouts import Group, Layout, Layouts
from llmfit.packing.within import by_kernel, by_row, by_scores

__all__ = ["PackingError", "packed"]

NAME = "llmfit_packed"  # of the attention, among those of transformers; in groups alone it has another one
LONG = 512  # tokens of a row from which, on a CPU, a fused kernel, which keeps no scores, is worth its copies
KEPT = LONG  # tokens that a query sees up to which its scores are kept for the way back, as plain attention keeps them
TABLE = 2**24  # pairs of tokens up to which a GPU looks at all of them: 4096 tokens
REFUSED = ("softcap", "s_aux", "sinks", "position_bias")  # settings of an attention that changes more than the mask


class PackingError(LLMFitError):
    """A model that cannot attend by a layout; its rows are padded."""


@contextmanager
def packed(model: Any, *, in_groups: bool = False) -> Iterator[None]:
    """Let a lent model attend by layouts, and by nothing else, inside; `in_groups` never by a table.

    Raises
    ------
    PackingError
        If its attention cannot be replaced.
    """
    from transformers import AttentionInterface, PreTrainedModel

    name, attention = (f"{NAME}_in_groups", partial(attend, pairs=0)) if in_groups else (NAME, attend)
    AttentionInterface.register(name, attention)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        raise PackingError("its attention cannot be replaced")
    configs = list({id(part.config): part.config for part in parts}.values())
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | Layouts | Behind | DecodeStep | None = None,
    pairs: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a layout, as transformers calls an attention.

    Parameters
    ----------
    query : Tensor of shape (1, heads, length, D)
        By :class:`DecodeStep`, of shape (B, heads, 1, D).
    key, value : Tensor of shape (1, heads that queries share, length, D)
        By :class:`DecodeStep`, of shape (B, heads that queries share, W, D).
    pairs : int or None
        Pairs of tokens up to which a GPU looks at all of them; None is `TABLE`.

    Returns
    -------
    Tensor of shape (1, length, heads, D)
        By :class:`DecodeStep`, of shape (B, 1, heads, D).
    None
    """
    if layout is None:
        raise PackingError("its layers are not told of the layout")
    if attention_mask is not None:
        raise PackingError("it makes masks of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    most = TABLE if pairs is None else pairs
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    with torch.autocast(device, enabled=False):  # of one dtype by now, also on the way back
        if isinstance(layout, DecodeStep):
            return _decode(module, query, key, value, layout, scale, settings), None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # tokens first
        if isinstance(layout, Layouts):
            split = (torch.split(x, [part.length for part in layout.parts]) for x in (q, k, v))
            each = [
                _by_layout(module, one, two, three, part, scale, dropout, settings, most)
                for one, two, three, part in zip(*split, layout.parts, strict=True)
            ]
            return torch.cat(each)[None], None
        if isinstance(layout, Behind):
            return _go_on(module, q, k, v, layout, scale, settings)[None], None
        return _by_layout(module, q, k, v, layout, scale, dropout, settings, most)[None], None


def _decode(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: DecodeStep,
    scale: float,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Attend from a token each of rows side by side, in evaluation: (B, 1, heads, D)."""
    _check_settings(module, layout, settings)
    if query.shape[2] != 1 or key.shape[2] != layout.known.shape[1]:
        raise PackingError("it keeps other keys and values than those of each token")
    before = layout.before[module.layer_idx] if layout.before else None
    return by_row(query * scale, key, value, before, layout.known)


def _go_on(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Behind,
    scale: float,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Attend from tokens that go on from rows which were read, in evaluation: (length, heads, D)."""
    _check_settings(module, layout, settings)
    layout.met.add(module.layer_idx)
    read = layout.before.read if layout.before.read is not None else {}
    keys, values = (
        torch.cat([old[: layout.offset], new]) for old, new in zip(read[module.layer_idx], (key, value), strict=True)
    )
    read[module.layer_idx] = keys, values
    before = _shared(module, layout.before, keys, values)
    query, out = query * scale, value.new_zeros(*query.shape[:2], value.shape[-1])
    for queries, places, group in layout.parts:
        out[queries] = by_scores(query[queries], keys[places], values[places], before, group.visible)
    return out


def _by_layout(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    settings: dict[str, Any],
    most: int,
) -> torch.Tensor:
    """Attend within one packed sequence, its tokens in the first dimension."""
    _check_settings(module, layout, settings)
    layout.met.add(module.layer_idx)
    query = query * scale
    if layout.read is not None:
        layout.read[module.layer_idx] = _alone(key), _alone(value)
    if _fits_a_table(layout, query.device, query.dtype, most):
        return _by_table(query, key, value, _shared(module, layout, key, value), layout, dropout)
    take, put, groups = layout.groups
    queries, keys, values = (_move(x, take, put) for x in (query, key, value))
    before = _shared(module, layout, keys, values)
    long = LONG if query.device.type == "cpu" else query.shape[-1]  # elsewhere, where copies take less than scores
    sizes = [group.rows * group.width for group in groups]
    sizes.append(len(queries) - sum(sizes))
    split = [torch.split(x, sizes) for x in (queries, keys, values)]  # whose gradients are put together, and not added
    learns = any(x.requires_grad for x in (query, key, value))
    parts = []
    for group, q, k, v in zip(groups, *split, strict=False):  # what is left over is the place aside
        work = by_kernel if group.width > long else by_scores
        given = q, k, v, before if group.shared else None, group.visible, dropout
        parts.append(_again(work, *given) if learns and _sees_far(layout, group) else work(*given))
    parts.append(torch.zeros_like(parts[-1][:1]))  # the place aside: no row's overflow reaches it
    return _move(torch.cat(parts), put, take)


def _alone(x: torch.Tensor) -> torch.Tensor:
    """Copy what is cut out of something larger, which it would keep: one projection of queries, keys and values."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()


def _sees_far(layout: Layout, group: Group) -> bool:
    """Tell rows behind a beginning so long that their scores, or its copies, would outweigh all else that is kept."""
    return group.shared and layout.shared + group.width > KEPT


def _again(work: Any, *given: Any) -> torch.Tensor:
    """Attend within a group, and once more on the way back, instead of keeping what that takes; drop the same then."""
    dropout = given[-1]
    out: torch.Tensor = checkpoint(work, *given, use_reentrant=False, preserve_rng_state=dropout > 0)
    return out


def _fits_a_table(layout: Layout, device: torch.device, dtype: torch.dtype, most: int) -> bool:
    """Tell where one table is quicker; in float16, where rows may overflow, one that has would spoil the others."""
    return device.type != "cpu" and dtype != torch.float16 and layout.length * layout.seen <= most


def _by_table(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    layout: Layout,
    dropout: float,
) -> torch.Tensor:
    """Attend at once within the whole sequence, most of whose pairs see nothing of each other: (length, heads, D).

    A device that is quicker than it can be told what to do has one thing to do, and multiplies in vain at no cost.
    """
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    if before is not None and not layout.inline:
        k, v = (torch.cat([x, y], dim=1) for x, y in zip(before, (k, v), strict=True))
    k, v = (x.repeat_interleave(repeats, dim=0) for x in (k, v))
    mask = layout.mask(query.dtype)
    out = functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, dropout_p=dropout, scale=1.0
    )
    return out[0].transpose(0, 1)


def _check_settings(module: Any, layout: Layout | Behind | DecodeStep, settings: dict[str, Any]) -> None:
    if any(settings.get(name) is not None for name in REFUSED) or not getattr(module, "is_causal", True):
        raise PackingError("its attention is of another kind")
    window = settings.get("sliding_window")
    if window is not None and 0 < window < layout.longest:
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
        layout.kept[module.layer_idx] = _alone(own[0].contiguous()), _alone(own[1].contiguous())
    return own
