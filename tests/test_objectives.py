"""Losses by hand: NumPy's log-softmax over the full logits of single rows, weighted and summed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch_side import CPU, classifier, generator, make_other, plain_model, token_losses, token_rows

from llmfit.answers import LOSSES
from llmfit.encoding import Encoded
from llmfit.objectives import OBJECTIVES, collate, completion_losses, loss_mass, supervised

ROWS = [
    Encoded((1, 70, 80), (90, 100, 2), 0, 1.0),
    Encoded((1, 70, 80, 90, 91, 92, 93), (2,), 1, 0.5),
    Encoded((1,), (60, 61, 62, 63, 64, 2), 2, 3.0),
    Encoded((), (1, 70, 71, 2), 3, 2.0),  # the first token has nothing to be predicted from
]


def by_hand(model: Any, row: Encoded) -> np.ndarray:
    prompt, completion = row.prompt or row.completion[:1], row.completion if row.prompt else row.completion[1:]
    return token_losses(model, list(prompt), list(completion))


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def model(request: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "llama":
        return plain_model(tiny)
    return plain_model(make_other(tmp_path_factory.mktemp("o") / request.param, tiny, request.param))


@pytest.mark.parametrize("chosen", [[0], [3], [0, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
def test_losses_are_those_by_hand_whatever_stands_beside_a_row(model, chosen):
    rows = [ROWS[i] for i in chosen]
    found = completion_losses(model, collate(rows, 0, CPU)).detach().numpy()
    np.testing.assert_allclose(found, np.concatenate([by_hand(model, row) for row in rows]), atol=1e-5)


def test_supervised_is_the_sum_weighted_by_row(model):
    found = float(supervised(model, collate(ROWS, 0, CPU)).detach())
    expected = sum(row.weight * by_hand(model, row).sum() for row in ROWS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES.keys() - LOSSES.keys())
@pytest.mark.parametrize("pad_id", [0, 2, 70])
def test_padding_never_matters(name, pad_id, tiny):
    model = plain_model(tiny)
    whole = float(OBJECTIVES[name](model, collate(ROWS, pad_id, CPU)).detach())
    alone = sum(float(OBJECTIVES[name](model, collate([row], 0, CPU)).detach()) for row in ROWS)
    np.testing.assert_allclose(whole, alone, rtol=1e-6)


def test_mass_is_the_weights_summed_over_the_loss_tokens():
    assert loss_mass(ROWS) == 1.0 * 3 + 0.5 * 1 + 3.0 * 6 + 2.0 * 3


def test_a_model_that_gives_all_logits_has_the_same_losses(tiny):
    model, batch = plain_model(tiny), collate(ROWS, 0, CPU)

    class GivesAll(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return model(input_ids=input_ids)

    torch.testing.assert_close(completion_losses(GivesAll(), batch), completion_losses(model, batch))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_computed_in_float32_or_wider(dtype, expected, tiny):
    model = plain_model(tiny).to(dtype)
    losses = completion_losses(model, collate(ROWS, 0, CPU))
    assert losses.dtype == expected
    assert len(losses.unique()) == len(losses)  # no rounding to a few values


@pytest.mark.parametrize("make", [classifier, generator])
def test_the_loss_of_a_step_is_that_of_its_rows_by_hand(make, settings, frame, tiny):
    history = make(settings, batch_size=8).fit(frame).history_
    model = plain_model(tiny)
    rows = token_rows(tiny, frame["text"], frame["label"])
    losses = np.concatenate([token_losses(model, *row) for row in rows])
    np.testing.assert_allclose(history["loss"].iloc[0], losses.mean(), rtol=1e-6)
    assert history["tokens"].iloc[0] == sum(len(prompt) + len(answer) for prompt, answer in rows)


def test_the_loss_of_a_step_weighs_tokens_by_their_rows(settings, frame, tiny):
    weight = np.linspace(0.2, 3.0, len(frame))
    history = classifier(settings, batch_size=8).fit(frame, sample_weight=weight).history_
    model = plain_model(tiny)
    rows = token_rows(tiny, frame["text"], frame["label"])
    losses = [token_losses(model, *row) for row in rows]
    expected = sum(w * row.sum() for w, row in zip(weight, losses, strict=True)) / sum(
        w * len(row) for w, row in zip(weight, losses, strict=True)
    )
    np.testing.assert_allclose(history["loss"].iloc[0], expected, rtol=1e-6)
