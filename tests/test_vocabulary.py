"""A large vocabulary: how much of it is made at once where labels are scored, whichever way rows are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_side import CPU, token_losses

from llmfit.forward import words
from llmfit.scoring import score_labels

WORDS = 5000
FEW = 30  # positions whose logits may be made at once in these tests
PROMPTS = [(1, *range(70, 90), 5 + i) for i in range(12)]
LABELS = [(40 + i, 50, 60, 70 + i % 3, 80, 90) for i in range(20)] + [(7,), (8, 9)]


class Largest(TorchDispatchMode):
    """Counts the rows of the largest tensor that is as wide as the vocabulary, the weights and views of them aside."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.rows, self.own = 0, {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            wide = isinstance(one, torch.Tensor) and one.dim() and one.shape[-1] == WORDS
            if wide and one.untyped_storage().data_ptr() not in self.own:
                self.rows = max(self.rows, one.numel() // WORDS)
        return out


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


@pytest.mark.usefixtures("way")
def test_labels_of_several_tokens_meet_a_bounded_part_of_it_at_once(model, monkeypatch):
    expected = [[-token_losses(model, list(p), list(label)).sum() for label in LABELS] for p in PROMPTS]
    monkeypatch.setattr(words, "MOST_LOGITS", WORDS * FEW)
    score_labels(model, PROMPTS[:2], LABELS, device=CPU, pad_id=0)  # the model is looked at once
    with Largest(model.parameters()) as seen:
        found = score_labels(model, PROMPTS, LABELS, device=CPU, pad_id=0)
    assert 0 < seen.rows <= FEW
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("at_once", [{}, {"cpu": WORDS * 7}, {"cpu": 1}])
def test_log_probabilities_are_the_same_however_many_rows_are_looked_at_together(at_once, monkeypatch):
    logits = torch.randn(3, 11, WORDS, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = [[5, 9, 4000]] * 10 + [[8]]
    expected = logits.double().log_softmax(-1)
    wide, real = [], words._wide
    monkeypatch.setattr(words, "AT_ONCE", at_once)
    monkeypatch.setattr(words, "_wide", lambda some: (wide.append(len(some)), real(some))[1])
    found = words.choices(words.Words(), logits, tokens)
    torch.testing.assert_close(found[:, :10], expected[:, :10, [5, 9, 4000]].float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[:, 10, 0], expected[:, 10, 8].float(), atol=1e-4, rtol=1e-5)
    assert sum(wide) == 33
    assert max(wide) == {0: 33, WORDS * 7: 7, 1: 1}[at_once.get("cpu", 0)]


@pytest.mark.parametrize("parts", [(), (20, 25, 5), (10, 40)], ids=str)
def test_losses_of_many_positions_keep_nothing_as_wide_as_it(parts, model, monkeypatch):
    monkeypatch.setattr(words, "MOST_LOGITS", WORDS * FEW)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, wide = torch.arange(50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (wide.append(x.shape), x)[1], lambda x: x):
        losses = words.token_losses(words.Words(model.lm_head), hidden, targets, parts)
    assert not any(WORDS in shape for shape in wide)
    assert max(shape[0] for shape in wide if shape[-1:] == (16,)) <= FEW
    expected = torch.nn.functional.cross_entropy(model.lm_head(hidden).double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    found, other = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (losses, expected))
    torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)
