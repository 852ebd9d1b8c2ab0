"""Words of padded rows, made a piece at a time: the same losses and gradients, and no more of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seq2seq_side import KINDS, make_pair, plain_pair
from torch_side import CPU, classifier, make_other, plain_model

from llmfit.encoding import Encoded
from llmfit.exceptions import PackingWarning
from llmfit.forward import collate, completion_logits, pieces, words
from llmfit.objectives import supervised
from llmfit.scoring import reference_losses

ROWS = [Encoded((1, 5 + i), tuple(range(10, 90 + i))) for i in range(3)]
FEW = 10  # positions that a piece has in these tests
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mamba": {"state_size": 4},
    "gemma": {"head_dim": 8},
}


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that met the vocabulary, product by product."""
    seen: list[int] = []
    real = torch.nn.Linear.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == 261:
            seen.append(x.numel() // x.shape[-1])
        return real(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


def outcome(model: Any, start: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = supervised(model, collate(ROWS, 0, CPU, start))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_LOGITS", 261 * FEW)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_losses_and_gradients_are_those_of_words_made_at_once(kind, tiny, tmp_path, monkeypatch, met):
    if kind in KINDS:
        model, start = plain_pair(make_pair(tmp_path / "pair", tiny, kind)), KINDS[kind][3]
    else:
        changed = OTHERS[kind]
        model, start = plain_model(make_other(tmp_path / "other", tiny, kind, **changed)), ()
    if kind == "bart":
        torch.nn.init.normal_(model.final_logits_bias)
        before = model.final_logits_bias
    model = model.double().train().requires_grad_(True)
    loss, gradient = outcome(model, start)
    assert max(met) >= sum(len(row.completion) for row in ROWS)
    met.clear()
    in_pieces(monkeypatch)
    found, own = outcome(model, start)
    assert max(met) <= pieces.LOOKED_AT + 1  # a decoder that begins from two tokens says one more
    assert found == pytest.approx(loss, rel=1e-6 if kind == "mamba" else 1e-12)
    assert (own - gradient).norm() <= (1e-5 if kind == "mamba" else 1e-9) * gradient.norm()
    assert model.training
    if kind == "bart":
        assert model.final_logits_bias.shape == before.shape
        assert model.final_logits_bias.abs().sum() > 0


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning"])
def test_a_fit_beside_virtual_tokens_is_that_of_words_made_at_once(adapter, settings, frame, monkeypatch, met):
    rows = frame.assign(label=[f"{label} of some kind or other" for label in frame["label"]])
    one = classifier(settings, adapter=adapter, dtype="float64").fit(rows)
    assert max(met) > 100
    in_pieces(monkeypatch)
    met.clear()
    other = classifier(settings, adapter=adapter, dtype="float64").fit(rows)
    assert max(met) <= pieces.LOOKED_AT
    for name, tensor in one._tensors.items():
        torch.testing.assert_close(other._tensors[name], tensor, rtol=1e-6, atol=1e-9)


def test_losses_of_references_are_made_in_pieces_too(tiny, tmp_path, monkeypatch, met):
    model = plain_pair(make_pair(tmp_path / "pair", tiny, "t5"))
    expected = reference_losses(model, ROWS, device=CPU, pad_id=0, start_ids=(0,))
    in_pieces(monkeypatch)
    met.clear()
    found = reference_losses(model, ROWS, device=CPU, pad_id=0, start_ids=(0,))
    assert found == pytest.approx(expected, rel=1e-6)
    assert max(met) <= pieces.LOOKED_AT


def test_few_words_are_made_by_the_model_itself(tiny, tmp_path, monkeypatch):
    model = plain_pair(make_pair(tmp_path / "pair", tiny, "t5"))
    looks: list[Any] = []
    monkeypatch.setattr(pieces, "same_words", lambda *given: looks.append(given) or True)
    loss = supervised(model, collate(ROWS, 0, CPU, (0,)))
    assert loss.isfinite()
    assert looks == []


def test_a_model_that_makes_its_words_otherwise_makes_them_at_once_with_a_warning(tiny, tmp_path, monkeypatch, met):
    model = plain_pair(make_pair(tmp_path / "pair", tiny, "t5"))
    forward = model.forward

    def odd(**given: Any) -> Any:
        out = forward(**given)
        out.logits = out.logits.roll(1, dims=-1)
        return out

    model.forward = odd
    expected = supervised(model, collate(ROWS, 0, CPU, (0,))).item()
    in_pieces(monkeypatch)
    with pytest.warns(PackingWarning) as warned:
        found = supervised(model, collate(ROWS, 0, CPU, (0,))).item()
    assert [str(each.message) for each in warned] == [
        "This model cannot make the words of padded rows a piece at a time (its answers differ): they are made at "
        "once, which takes more memory."
    ]
    assert found == supervised(model, collate(ROWS, 0, CPU, (0,))).item() == expected  # said once


def test_what_is_looked_at_is_a_part_of_the_batch(tiny, tmp_path):
    start = KINDS["bart"][3]
    model = plain_pair(make_pair(tmp_path / "pair", tiny, "bart"))
    rows = [Encoded((1, 5), (7, 8)), Encoded((1, 5, 6, 9), tuple(range(10, 90)), said=tuple(range(100, 130)))]
    batch = collate(rows, 0, CPU, start)
    whole = completion_logits(model, batch)
    part = completion_logits(model, pieces._sample(batch))
    assert len(part) == pieces.LOOKED_AT
    torch.testing.assert_close(part, whole[2 : 2 + pieces.LOOKED_AT], atol=1e-4, rtol=1e-4)


def test_rows_without_an_answer_have_no_words(tiny):
    model = plain_model(tiny)
    states, make = pieces.completion_states(model, collate([Encoded((1, 5, 6))], 0, CPU))
    assert len(make(states)) == 0
