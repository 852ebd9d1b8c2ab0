"""Attention within rows of one width: both ways, and their gradients, against torch's own attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch_side import CPU, plain_model

from llmfit.encoding import Encoded
from llmfit.exceptions import PackingWarning
from llmfit.forward import packable
from llmfit.packing import lay_out, within
from llmfit.packing.attention import attend
from llmfit.packing.within import by_kernel, by_scores

ROWS, WIDTH, HEADS, SHARING, D, SHARED = 3, 5, 2, 3, 4, 7


def draw(*, shared: bool, dtype: torch.dtype = torch.float64, value: int = D, keys: int = WIDTH) -> list[torch.Tensor]:
    """Queries, keys and values, those that all rows see behind them, and the gradient of what is read."""
    torch.manual_seed(0)
    shapes = [(ROWS * WIDTH, HEADS * SHARING, D), (ROWS * keys, HEADS, D), (ROWS * keys, HEADS, value)]
    shapes += [(HEADS, SHARED, D), (HEADS, SHARED, value)] if shared else []
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return [*leaves, torch.randn(ROWS * WIDTH, HEADS * SHARING, value, dtype=dtype)]


def visible(trees: bool) -> torch.Tensor:
    """Which key a query sees; with trees it is another one for each row."""
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    if not trees:
        return causal
    each = causal.repeat(ROWS, 1, 1)
    each[1, 4, 2:4] = False
    return each


def plainly(query: Any, key: Any, value: Any, before: Any, sees: torch.Tensor) -> torch.Tensor:
    """The same by torch's attention over keys that are copied for each row."""
    q, k, v = (x.view(ROWS, len(x) // ROWS, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    sees = sees if sees.dim() == 3 else sees[None].expand(ROWS, -1, -1)
    if before is not None:
        k, v = (torch.cat([x.expand(ROWS, -1, -1, -1), y], dim=2) for x, y in zip(before, (k, v), strict=True))
        sees = functional.pad(sees, (SHARED, 0), value=True)
    k, v = (x.repeat_interleave(SHARING, dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None], scale=1.0)
    return out.transpose(1, 2).reshape(ROWS * WIDTH, HEADS * SHARING, -1)


@pytest.mark.parametrize("way", [by_scores, by_kernel])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("trees", [False, True])
def test_what_is_read_and_all_gradients_are_those_of_torchs_attention(way, shared, trees):
    *leaves, grad = draw(shared=shared)
    before = tuple(leaves[3:]) or None
    found, expected = (f(*leaves[:3], before, visible(trees)) for f in (way, plainly))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("shared", [False, True])
def test_values_may_be_wider_and_keys_more_than_queries(shared):
    """Some families have other values; rows that go on see more keys than they have queries."""
    *leaves, grad = draw(shared=shared, value=6, keys=WIDTH + 4)
    sees = torch.ones(WIDTH, WIDTH + 4, dtype=torch.bool).tril(4)
    found, expected = (f(*leaves[:3], tuple(leaves[3:]) or None, sees) for f in (by_scores, plainly))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_in_bfloat16_are_as_near_as_torchs_own(shared):
    """Weights in bfloat16 on the way back: against float64, no farther off than attention that keeps float32 ones."""
    *leaves, grad = draw(shared=shared, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(plainly(*exact[:3], tuple(exact[3:]) or None, visible(True)), exact, grad.double())
    off = []
    for way in (by_scores, plainly):
        found = torch.autograd.grad(way(*leaves[:3], tuple(leaves[3:]) or None, visible(True)), leaves, grad)
        off.append([float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)])
    assert max(off[0]) < 0.01
    assert max(off[0]) < 1.5 * max(off[1])


def test_a_row_that_overflows_in_float16_spoils_no_other():
    *leaves, _ = draw(shared=True, dtype=torch.float16)
    with torch.no_grad():
        plain = read_all(leaves)
        leaves[0][:WIDTH] *= 3e4
        spoilt = read_all(leaves)
    assert not spoilt[:WIDTH].isfinite().all()
    torch.testing.assert_close(spoilt[WIDTH:], plain[WIDTH:], rtol=0, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_a_key_that_overflows_spoils_no_token_that_does_not_see_it(shared):
    query, key, value, *before, _ = draw(shared=shared)
    with torch.no_grad():
        expected = by_scores(query, key, value, tuple(before) or None, visible(trees=False))
        key.view(ROWS, WIDTH, HEADS, D)[:, -1] = torch.inf
        found = by_scores(query, key, value, tuple(before) or None, visible(trees=False))
    torch.testing.assert_close(found.view(ROWS, WIDTH, -1)[:, :-1], expected.view(ROWS, WIDTH, -1)[:, :-1])


@pytest.mark.parametrize("shared", [False, True])
def test_what_drops_out_is_left_out_of_the_gradients_too(shared):
    *leaves, _ = draw(shared=shared)

    def read(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same drops out every time
        return by_scores(*given[:3], given[3:] or None, visible(False), 0.4)

    assert torch.autograd.gradcheck(read, leaves)
    drawn = torch.stack([by_scores(*leaves[:3], tuple(leaves[3:]) or None, visible(False), 0.4) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), read_all(leaves), atol=0.15, rtol=0)


def read_all(leaves: list[torch.Tensor]) -> torch.Tensor:
    """What is read where nothing drops out."""
    return by_scores(*leaves[:3], tuple(leaves[3:]) or None, visible(False))


def test_no_score_in_bfloat16_is_kept_in_float32():
    """Scores are most of what is kept behind a long instruction; the kernels sum them up in float32 by themselves."""
    *leaves, _ = draw(shared=True, dtype=torch.bfloat16)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.dtype), x)[1], lambda x: x):
        read_all(leaves)
    assert kept
    assert set(kept) == {torch.bfloat16}


def test_numbers_of_two_dtypes_are_multiplied_in_the_one_of_autocast():
    """Models with norms of their queries give them in float32 where all is trained, and values in bfloat16."""
    layout = lay_out([4, 11], 0, CPU)
    heads = [torch.randn(1, n, layout.length, D).requires_grad_() for n in (4, 2, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = heads[0], heads[1], heads[2].bfloat16()
        out, _ = attend(SimpleNamespace(layer_idx=0, is_causal=True), *given, None, layout=layout)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), heads)
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)


def test_a_way_back_that_differs_is_found_before_rows_are_learned_from(tiny, monkeypatch):
    """What a model says may be right where its gradients are not: both are looked at, of a model that learns."""
    rows = [Encoded((1, 5, 6), (7, 8)), Encoded((1, 5, 9), (10,))]
    real = within._collect
    monkeypatch.setattr(within, "_collect", lambda *given: tuple(x if x is None else 1.2 * x for x in real(*given)))
    model = plain_model(tiny)
    with torch.no_grad():
        assert packable(model, rows, pad_id=0, device=CPU) == 2
    model.requires_grad_(True)
    with pytest.warns(PackingWarning, match=r"cannot learn from packed rows \(its answers differ\): they are padded"):
        assert packable(model, rows, pad_id=0, device=CPU) is None


def test_no_gradient_of_a_gradient_is_made_up():
    *leaves, grad = draw(shared=True)
    (first,) = torch.autograd.grad(read_all(leaves), leaves[0], grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
