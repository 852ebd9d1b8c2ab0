"""What packed rows behind a long beginning keep for the way back: tokens, not tokens times tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch_side import CPU, plain_model

from llmfit.encoding import Encoded
from llmfit.forward import collate
from llmfit.objectives import supervised
from llmfit.packing import attention, common_prefix, packed


def rows_behind(shared: int, own: int, count: int) -> list[Encoded]:
    rng = np.random.default_rng(0)
    before = tuple(rng.integers(5, 260, shared).tolist())
    return [Encoded((*before, 5 + i, *rng.integers(5, 260, own - 3).tolist()), (7, 8)) for i in range(count)]


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of the memory that autograd keeps inside, each piece of memory once."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def kept(model: Any, rows: list[Encoded], shared: int | None) -> int:
    batch = collate(rows, 0, CPU, shared=shared)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = attention._again
    with pytest.MonkeyPatch.context() as watch, kept_bytes() as found:

        def again(work: Any, *given: Any) -> torch.Tensor:  # keeps what it is given, of which autograd does not know
            tensors = [*given[:3], *(given[3] or ())]
            found.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors})
            return real(work, *given)

        watch.setattr(attention, "_again", again)
        with packed(model) if shared is not None else torch.enable_grad():
            supervised(model, batch)  # whatever is kept is kept when this ends
    return sum(size for place, size in found.items() if place not in weights)


def test_what_is_kept_does_not_grow_with_what_tokens_see(tiny, monkeypatch):
    model = plain_model(tiny).train().requires_grad_(True)
    rows = rows_behind(1200, 60, 16)
    own, seen, layers, heads = 16 * 60, 1200 + 60, 2, 4
    found = kept(model, rows, 1200)
    a_token = kept(model, rows_behind(40, 60, 16), 40) / (40 + own)
    assert found < 1.3 * a_token * (1200 + own)
    monkeypatch.setattr(attention, "KEPT", 10**9)
    whole = kept(model, rows, 1200)
    assert whole > found + 4 * own * seen * layers * heads  # what softmax gives, in float32
    assert whole > 4 * found


def test_what_is_kept_is_less_than_that_of_padded_rows(tiny):
    """Of as many tokens: 16 rows behind 1,200 tokens, and those two that padding lets into the same pass."""
    model = plain_model(tiny, attn_implementation="sdpa").train().requires_grad_(True)
    rows = rows_behind(1200, 60, 16)
    assert kept(model, rows, 1200) <= kept(model, rows[:2], None)


@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("own", [20, 530], ids=["by scores", "by torch's kernels"])
def test_gradients_are_those_of_kept_scores(own, dropout, recomputed, dtype, apart, tiny, monkeypatch):
    model = plain_model(tiny, attention_dropout=dropout).to(dtype).train().requires_grad_(True)
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    rows = rows_behind(500, own, 3)
    shared, again, gradients = common_prefix([row.prompt for row in rows]), [], []
    real = attention._again
    monkeypatch.setattr(attention, "_again", lambda *given: (again.append(1), real(*given))[1])
    for most in (10**9, attention.KEPT):
        monkeypatch.setattr(attention, "KEPT", most)
        model.zero_grad()
        torch.manual_seed(0)
        again.clear()
        with packed(model):
            loss = supervised(model, collate(rows, 0, CPU, shared=shared))
            loss.backward()
        gradients.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()))
        assert bool(again) == (most < 10**9)
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-6, atol=0)
    assert (gradients[1][1] - gradients[0][1]).norm() <= apart * gradients[0][1].norm()


def test_scores_of_short_rows_are_kept(tiny, monkeypatch):
    """They are made once, where all that a token sees is no more than plain attention of padded rows keeps."""
    model, again = plain_model(tiny).train().requires_grad_(True), []
    monkeypatch.setattr(attention, "_again", lambda work, *given: again.append(1) or work(*given))
    for shared, times in ((400, 0), (900, 2)):  # once a layer
        with packed(model):
            supervised(model, collate(rows_behind(shared, 60, 4), 0, CPU, shared=shared)).backward()
        assert len(again) == times


def test_nothing_is_made_twice_where_there_is_no_way_back(tiny, monkeypatch):
    model, again = plain_model(tiny), []
    monkeypatch.setattr(attention, "_again", lambda work, *given: again.append(1) or work(*given))
    with torch.no_grad(), packed(model):
        supervised(model, collate(rows_behind(900, 60, 4), 0, CPU, shared=900))
    assert again == []
