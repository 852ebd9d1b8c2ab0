"""Attention within rows of one width: by plain products, whose way back is written out, or by torch's kernels.

Takes queries, keys and values of rows side by side, and of what stands before all of them; gives what each query reads.
Knows which key a query sees, and no layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["both_ways", "by_kernel", "by_row", "by_scores"]

ROUNDING = {1: 0.03, 2: 0.03, 4: 1e-3}  # by the bytes of a number

Before = tuple[torch.Tensor, torch.Tensor] | None


def by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: Before,
    visible: torch.Tensor,
    dropout: float = 0.0,
    *,
    recorded: bool = False,
) -> torch.Tensor:
    """Attend within rows of T queries and W keys.

    Queries of all rows meet the shared keys in one product; heads that share keys stand side by side.

    Parameters
    ----------
    query : Tensor of shape (B * T, heads, D)
        Scaled.
    key, value : Tensor of shape (B * W, heads that queries share, D)
    before : (Tensor, Tensor) of shape (heads that queries share, S, D), or None
        Keys and values that stand before every row, and that all of its queries see.
    visible : Tensor of bool, of shape (T, W) or (B, T, W)
        Which of its own keys a query sees.
    dropout : float, default=0.0
    recorded : bool, default=False
        Leave the way back to autograd.

    Returns
    -------
    Tensor of shape (B * T, heads, D)
    """
    keys_before, values_before = (None, None) if before is None else before
    given = query, key, value, keys_before, values_before, visible if visible.dim() == 3 else visible[None], dropout
    read: torch.Tensor = _attend(*given)[0] if recorded else _ByScores.apply(*given)  # type: ignore[no-untyped-call]
    return read


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: Before,
    visible: torch.Tensor,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Do what :func:`by_scores` does, without scores that are kept: for long rows, of as many queries as keys."""
    t = visible.shape[-1]
    b, repeats = len(query) // t, query.shape[1] // key.shape[1]
    q, k, v = (x.view(b, t, x.shape[1], -1).transpose(1, 2) for x in (query, key, value))
    mask: torch.Tensor | None = None
    if before is not None:
        k, v = (torch.cat([x.expand(b, -1, -1, -1), y], dim=2) for x, y in zip(before, (k, v), strict=True))
    if before is not None or visible.dim() == 3:
        mask = functional.pad(visible if visible.dim() == 2 else visible[:, None], (k.shape[2] - t, 0), value=True)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0
    )
    return out.transpose(1, 2).reshape(b * t, query.shape[1], -1)


def by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: Before, known: torch.Tensor
) -> torch.Tensor:
    """Attend from one token of each row, as :func:`by_scores` does; nothing is copied where rows follow one another.

    Parameters
    ----------
    query : Tensor of shape (B, heads, 1, D)
        Scaled.
    key, value : Tensor of shape (B, heads that queries share, W, D)
        Best with the rows of one head behind one another in memory.
    before : (Tensor, Tensor) of shape (heads that queries share, S, D), or None
    known : Tensor of bool, of shape (B, W)

    Returns
    -------
    Tensor of shape (B, 1, heads, D)
    """
    rows, every = query.shape[:2]
    heads, width = key.shape[1:3]
    keys_before, values_before = (None, None) if before is None else before
    q = _by_head(query[:, :, 0], rows, heads)
    k, v = (x.transpose(0, 1).reshape(heads * rows, width, -1) for x in (key, value))
    scores = _meet(q, k, keys_before).view(heads, rows, every // heads, -1)
    scores[..., scores.shape[-1] - width :].masked_fill_(~known[None, :, None, :], -torch.inf)
    read = _weigh(scores.flatten(0, 1).softmax(-1), v, values_before)
    return _by_token(read, rows, heads, every // heads).view(rows, 1, every, -1)


@torch.enable_grad()
def both_ways(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Read random rows, some of what is seen dropped, as autograd records it and as :func:`by_scores` goes back.

    Returns
    -------
    list of (Tensor, Tensor, float)
        What is read, of shape (B * T, heads, D), and the gradients of queries, keys, values and those before; each as
        recorded, as written out, and how far apart they may be, as a share of the recorded one's norm.
    """
    rows, width, heads, sharing, d, shared = 2, 5, 2, 3, 8, 7
    source = torch.Generator().manual_seed(0)
    shapes = [(rows * width, heads * sharing, d), *[(rows * width, heads, d)] * 2, *[(heads, shared, d)] * 2]
    leaves = [torch.randn(shape, generator=source).to(device, dtype).requires_grad_() for shape in shapes]
    query, key, value, *before = leaves
    visible = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    ways = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for recorded in (True, False):
            torch.manual_seed(0)
            read = by_scores(query, key, value, (before[0], before[1]), visible, 0.3, recorded=recorded)
            ways.append([read.detach(), *torch.autograd.grad(read.square().sum(), leaves)])
    return [(one, other, ROUNDING[min(4, dtype.itemsize)]) for one, other in zip(*ways, strict=True)]


class _ByScores(torch.autograd.Function):
    """Attention in one piece: the operations that autograd would record for it take longer than their work."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys_before: torch.Tensor | None,
        values_before: torch.Tensor | None,
        visible: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        read, used = _attend(query, key, value, keys_before, values_before, visible, dropout)
        ctx.save_for_backward(keys_before, values_before, *used)
        ctx.rows, ctx.heads, ctx.dropout = len(query) // visible.shape[1], key.shape[1], dropout
        ctx.sharing = query.shape[1] // ctx.heads
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        keys_before, values_before, q, k, v, weights, dropped, kept = ctx.saved_tensors
        grad = _by_head(grad, ctx.rows, ctx.heads)
        of_values, of_values_before = _collect(dropped, grad, values_before)
        of_weights = _meet(grad, v, values_before)
        if kept is not None:
            of_weights = of_weights * kept / (1 - ctx.dropout)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_keys, of_keys_before = _collect(of_scores, q, keys_before)
        of_queries = _by_token(_weigh(of_scores, k, keys_before), ctx.rows, ctx.heads, ctx.sharing)
        of_keys, of_values = (_by_token(x, ctx.rows, ctx.heads, 1) for x in (of_keys, of_values))
        return of_queries, of_keys, of_values, of_keys_before, of_values_before, None, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys_before: torch.Tensor | None,
    values_before: torch.Tensor | None,
    visible: torch.Tensor,
    dropout: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Attend, and give what the way back needs: queries, keys, values, weights, what is left of these, and which."""
    heads, (t, w) = key.shape[1], visible.shape[1:]
    rows = len(query) // t
    q, k, v = _by_head(query, rows, heads), _by_head(key, rows, heads), _by_head(value, rows, heads)
    scores = _meet(q, k, keys_before)
    own = scores[..., scores.shape[-1] - w :].view(heads, rows, t, -1, w)
    own.masked_fill_(~visible[None, :, :, None, :], -torch.inf)
    weights = scores.softmax(-1)  # summed up in float32 by the kernels themselves
    dropped, kept = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
    read = _by_token(_weigh(dropped, v, values_before), rows, heads, query.shape[1] // heads)
    return read, (q, k, v, weights, dropped, kept)


def _by_head(x: torch.Tensor, rows: int, heads: int) -> torch.Tensor:
    """Put side by side what shares a head, G each: (B * T, heads * G, D) becomes (heads * B, T * G, D)."""
    tokens, every, d = x.shape
    t, g = tokens // rows, every // heads
    return x.view(rows, t, heads, g, d).permute(2, 0, 1, 3, 4).reshape(heads * rows, t * g, d)


def _by_token(x: torch.Tensor, rows: int, heads: int, g: int) -> torch.Tensor:
    """Put back what :func:`_by_head` took apart."""
    t = x.shape[1] // g
    return x.view(heads, rows, t, g, -1).permute(1, 2, 0, 3, 4).reshape(rows * t, heads * g, -1)


def _meet(x: torch.Tensor, own: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Multiply (heads * B, T * G, D) by what is before all, and by the row's own: (heads * B, T * G, S + W).

    Both products are written where they belong. torch 2.13 on MPS reads there first, and 0 times nan is no 0.
    """
    if before is None:
        return x @ own.transpose(1, 2)
    shared = before.shape[1]
    new = x.new_zeros if x.device.type == "mps" else x.new_empty
    met = new(*x.shape[:2], shared + own.shape[1])
    met[..., shared:].baddbmm_(x, own.transpose(1, 2), beta=0)
    outer = met.view(len(before), -1, met.shape[-1])[..., :shared]
    outer.baddbmm_(x.view(len(before), -1, x.shape[-1]), before.transpose(1, 2), beta=0)
    return met


def _weigh(weights: torch.Tensor, own: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Sum up what is before all, and the row's own, by (heads * B, T * G, S + W) weights: (heads * B, T * G, D)."""
    if before is None:
        return weights @ own
    shared = before.shape[1]
    outer = weights.view(len(before), -1, weights.shape[-1])[..., :shared] @ before
    return outer.view(*weights.shape[:2], -1).baddbmm_(weights[..., shared:], own)


def _collect(
    weights: torch.Tensor, x: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum up x over the queries, by their weights for the row's own, (heads * B, W, D), and for what is before."""
    if before is None:
        return weights.transpose(1, 2) @ x, None
    shared = before.shape[1]
    to_before = weights.view(len(before), -1, weights.shape[-1])[..., :shared]
    of_before = to_before.transpose(1, 2) @ x.view(len(before), -1, x.shape[-1])
    return weights[..., shared:].transpose(1, 2) @ x, of_before
