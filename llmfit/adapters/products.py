"""Frozen layers with the updates of one or of several adapters, in one piece of autograd for layers that read the same.

Takes frozen layers, A and B of each update and the tokens that it is for; gives what comes out. A frozen W with float32
A and B beside it costs four products and no pass over its outputs more than W alone; layers that read the same, as
those of queries, keys and values do, share three of these, and the sum of their gradients. A token's numbers are the
same whether one adapter stands there or several side by side: each one's tokens meet W in a product of their own, as
some processors round products of more rows otherwise. Knows no peft.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llmfit.kinds import find_own

__all__ = ["Adapted", "Change", "Turn", "adapted", "draw_kept", "read_together", "reads_together", "turns_of"]

READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names within an attention, and an MLP
ALL = (slice(None),)  # tokens that are multiplied at once where one adapter has them all


class Turn(NamedTuple):
    """What an adapter adds to some tokens.

    Parameters
    ----------
    here : slice
        Where they stand.
    layers : tuple of int, length L
        To whose outputs it adds; what these read is multiplied with all their A at once.
    factors : tuple of float, length L
        Of each B A.
    kept : Tensor of shape (n, in) or None
        1 for each number that is read, 0 for those that drop out.
    """

    here: slice
    layers: tuple[int, ...]
    factors: tuple[float, ...]
    kept: torch.Tensor | None = None


class Change(NamedTuple):
    """What an adapter adds to what one layer gives.

    Parameters
    ----------
    layer : int
        Its place among those that read the same.
    a : Tensor of shape (r, in)
    b : Tensor of shape (out, r)
    factor : float
        Of B A; where numbers drop out, those that are kept stand for them.
    kept : Tensor of shape (n, in) or None
        As in a turn.
    """

    layer: int
    a: torch.Tensor
    b: torch.Tensor
    factor: float
    kept: torch.Tensor | None = None


def draw_kept(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Draw which numbers are kept: 1 for each, 0 for those that drop out."""
    return torch.empty_like(x).bernoulli_(1 - dropout)


def turns_of(here: slice, changes: Sequence[Change]) -> tuple[list[Turn], list[torch.Tensor]]:
    """Say what an adapter adds to its tokens, with A and B of each layer; by layers, where something drops out."""
    apart = any(change.kept is not None for change in changes)
    turns, weights = [], []
    for some in ([change] for change in changes) if apart else [changes] * bool(changes):
        layers, factors = tuple(change.layer for change in some), tuple(change.factor for change in some)
        turns.append(Turn(here, layers, factors, some[0].kept))
        weights += [weight for change in some for weight in (change.a, change.b)]
    return turns, weights


class Adapted(torch.autograd.Function):
    """x W' + s (x A') B' of layers that read x, each of some rows with an A, B and s of its own, in the dtype of W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, count: int, pieces: Sequence[slice], turns: Sequence[Turn], *weights: Any
    ) -> tuple[torch.Tensor, ...]:
        """Compute (N, out) of each layer.

        Parameters
        ----------
        x : Tensor of shape (..., in), of N rows
        count : int
            Number of layers.
        pieces : sequence of slice
            Rows that are multiplied with W at once; together all of them.
        turns : sequence of Turn
        *weights : Tensor or None
            All W, (out, in), all biases, then A, (r, in), and B, (out, r), of every layer of every turn. The gradients
            of A and B come in their dtypes.
        """
        given = x.reshape(-1, x.shape[-1])
        frozen, biases, low = weights[:count], weights[count : 2 * count], weights[2 * count :]
        dtype = frozen[0].dtype
        flat = given.to(dtype)  # (N, in)
        every_a, every_b, every_kept, read, inner = [], [], [], [], []
        updates: list[list[tuple[slice, torch.Tensor, torch.Tensor]]] = [[] for _ in range(count)]
        for turn, own in zip(turns, _by_turn(turns, low), strict=True):
            every_a.append(torch.cat(own[0::2]).to(dtype))  # (all r, in)
            here, kept = turn.here, None if turn.kept is None else turn.kept.to(dtype)
            every_kept.append(kept)
            read.append(flat[here] if kept is None else flat[here] * kept)  # (n, in)
            inner.append(read[-1] @ every_a[-1].t())  # (n, all r)
            parts = torch.split(inner[-1], [len(a) for a in own[0::2]], 1)
            for i, factor, part, b in zip(turn.layers, turn.factors, parts, own[1::2], strict=True):
                every_b.append(b.to(dtype))
                updates[i].append((here, part.mul_(factor), every_b[-1]))
        out = []
        for weight, bias, some in zip(frozen, biases, updates, strict=True):
            out.append(_product(flat, weight, bias, pieces))
            for here, part, b in some:
                out[-1][here].addmm_(part, b.t())
        ctx.save_for_backward(*frozen, *every_a, *read, *inner, *every_kept, *every_b)
        ctx.turns = [turn._replace(kept=None) for turn in turns]  # what is saved is let go of on the way back
        ctx.pieces, ctx.shape, ctx.given, ctx.dtypes = pieces, x.shape, x.dtype, [w.dtype for w in low]
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of x, and of A and B if they are trained."""
        count, n, saved = len(grads), len(ctx.turns), iter(ctx.saved_tensors)
        frozen, every_a, read, inner, every_kept = ([next(saved) for _ in range(k)] for k in (count, n, n, n, n))
        every = [grad.to(frozen[0].dtype) for grad in grads]  # (N, out) of each
        grad_x = _sum_of_products(every, frozen, ctx.pieces) if ctx.needs_input_grad[0] else None
        trained = any(ctx.needs_input_grad[4:])
        found: list[torch.Tensor] = []
        for turn, low_a, own_read, own_inner, kept in zip(ctx.turns, every_a, read, inner, every_kept, strict=True):
            own = [every[i][turn.here] for i in turn.layers]
            back = zip(own, turn.factors, strict=True)
            low_b = [next(saved) for _ in own]
            grad_inner = torch.cat([(g @ b).mul_(s) for (g, s), b in zip(back, low_b, strict=True)], 1)  # (n, all r)
            if grad_x is not None and kept is None:
                grad_x[turn.here].addmm_(grad_inner, low_a)
            elif grad_x is not None:
                grad_x[turn.here] += (grad_inner @ low_a) * kept
            if trained:
                ranks = [b.shape[1] for b in low_b]
                of_a = (grad_inner.t() @ own_read).split(ranks)
                for one, grad, part in zip(of_a, own, own_inner.split(ranks, 1), strict=True):
                    found += [one, grad.t() @ part]
        of_low = (
            [own.to(kind) for own, kind in zip(found, ctx.dtypes, strict=True)] if trained else [None] * len(ctx.dtypes)
        )
        of_x = None if grad_x is None else grad_x.view(ctx.shape).to(ctx.given)
        return (of_x, None, None, None, *[None] * 2 * count, *of_low)


def _by_turn(turns: Sequence[Turn], low: Sequence[Any]) -> Iterator[list[Any]]:
    """Part A and B of all turns into those of each."""
    end = 0
    for turn in turns:
        start, end = end, end + 2 * len(turn.layers)
        yield [*low[start:end]]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pieces: Sequence[slice]) -> torch.Tensor:
    """Multiply each piece of (N, in) by itself: (N, out)."""
    bias = None if bias is None else bias.to(x.dtype)  # one that was trained has more bytes
    if len(pieces) == 1:
        return functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for here in pieces:
        if bias is None:
            torch.mm(x[here], weight.t(), out=out[here])
        else:
            torch.addmm(bias, x[here], weight.t(), out=out[here])
    return out


def _sum_of_products(
    every: Sequence[torch.Tensor], frozen: Sequence[torch.Tensor], pieces: Sequence[slice]
) -> torch.Tensor:
    """Add up what goes back through frozen layers that have read the same, each piece by itself: (N, in)."""
    total = every[0].new_empty(len(every[0]), frozen[0].shape[1])
    for here in pieces:
        torch.mm(every[0][here], frozen[0], out=total[here])
        for grad, weight in zip(every[1:], frozen[1:], strict=True):
            total[here].addmm_(grad[here], weight)
    return total


def adapted(
    x: torch.Tensor,
    layers: Sequence[Any],
    turns: Sequence[Turn],
    weights: Sequence[torch.Tensor],
    pieces: Sequence[slice] = ALL,
) -> tuple[torch.Tensor, ...]:
    """Let frozen linear layers read x, of shape (..., in), with all updates: (..., out) of each, in their order."""
    frozen, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    with torch.autocast(x.device.type, enabled=False):  # which would multiply a W of more bytes than the model's in few
        every = Adapted.apply(x, len(layers), pieces, turns, *frozen, *biases, *weights)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], -1) for out in every)  # here, so that it may be written to


class _Readers:
    """Layers that read the same: whichever is called first computes for all, and the others hand out what is theirs.

    What nobody asks for waits until their parent has done its work, or until the next time if that is interrupted. A
    layer that is given something else computes that for all, which is in vain if it alone reads it.
    """

    def __init__(
        self, layers: Sequence[Any], compute: Callable[..., tuple[torch.Tensor, ...]], able: Callable[[Any], bool]
    ) -> None:
        self.layers, self.compute, self.able = layers, compute, able
        self.forget()

    def forget(self, *_: Any) -> None:
        """Let go of what nobody has asked for."""
        self._waiting: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}  # what was read, and what comes of it

    def forward(self, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do what one of the layers does."""
        if args or kwargs or not self.able(layer):
            out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return out
        read, said = self._waiting.pop(layer, (None, None))
        if said is not None and read is x:
            return said
        if any(read is x for read, _ in self._waiting.values()):  # it has had its own
            return self.compute([layer], x)[0]
        others = [one for one in self.layers if one is not layer and self.able(one)]
        first, *rest = self.compute([layer, *others], x)
        self._waiting = {one: (x, out) for one, out in zip(others, rest, strict=True)}
        return first


def read_together(
    model: Any,
    layers: Container[Any],
    compute: Callable[[Sequence[Any], torch.Tensor], tuple[torch.Tensor, ...]],
    *,
    kind: Callable[[Any], Hashable],
    able: Callable[[Any], bool] = lambda _: True,
) -> list[list[Any]]:
    """Let layers of a model compute otherwise, those that read the same together.

    Parameters
    ----------
    model : torch.nn.Module
    layers : container of torch.nn.Module
        Which of its layers.
    compute : callable (layers, x) -> tuple of Tensor
        What some of them do.
    kind : callable (layer) -> hashable
        Layers of one kind may be computed together.
    able : callable (layer) -> bool
        Tells at each call a layer that is to compute so; another does what its class says.

    Returns
    -------
    list of list of torch.nn.Module
        Which of them are computed together.
    """
    own = find_own(model)
    crosses = own is not None and own.config.is_encoder_decoder  # there, keys are often not of what queries are of
    names = () if crosses else READ_THE_SAME
    together = []
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if child in layers}
        for group in _groups(children, names, kind):
            together.append(group)
            readers = _Readers(group, compute, able)
            for layer in group:
                layer.forward = partial(readers.forward, layer)
            if len(group) > 1:
                parent.register_forward_hook(readers.forget, always_call=True)
    return together


def reads_together(layer: Any) -> bool:
    """Tell a layer that has been let compute otherwise."""
    forward = getattr(vars(layer).get("forward"), "func", None)
    return isinstance(getattr(forward, "__self__", None), _Readers)


def _groups(
    children: dict[str, Any], every: Sequence[Sequence[str]], kind: Callable[[Any], Hashable]
) -> Iterator[list[Any]]:
    """Part the layers of one parent into those that read the same, by their names, and others, each by itself."""
    for names in every:
        group = [children[name] for name in names if name in children]
        if len(group) == len(names) and len({(kind(layer), layer.in_features) for layer in group}) == 1:
            children = {name: child for name, child in children.items() if name not in names}
            yield group
    yield from ([child] for child in children.values())
