"""AdaLoRA: its budget is stepped and its penalty is in the loss, as in a plain loop over peft's own model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch_side import classifier, fit_seed, plain_model, same, token_rows, weights

import llmfit
from llmfit import checkpoints
from llmfit.adapters import resolve_adapter
from llmfit.exceptions import ParameterError

ADAPTER = {"type": "adalora", "init_r": 4, "target_r": 2, "tinit": 0.2, "tfinal": 0.3}
STEPS = 10


@pytest.fixture
def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Ten steps of all rows."""
    return {**settings, "adapter": ADAPTER, "epochs": STEPS, "learning_rate": 0.1, "max_grad_norm": None}


def ranks_of(clf: Any) -> list[int]:
    return [len(tensor) for name, tensor in weights(clf).items() if name.endswith("lora_E")]


def in_double(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """Mean loss of a causal model; the library's own would round to float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def plain_loop(folder: str, frame: Any, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same fit written down with peft and torch alone: peft puts the penalty into the loss of its model."""
    torch.manual_seed(fit_seed())
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=2, tfinal=3, total_step=STEPS, target_modules="all-linear"
    )
    plain = plain_model(folder, attn_implementation="eager").double()
    plain.loss_function = in_double
    model = peft.get_peft_model(plain, config).train()
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # a constant, which peft trains where it has widened it
            parameter.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0)
    rows = token_rows(folder, frame["text"], frame["label"])
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    budgets = []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * (1 - (step - 1) / STEPS)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        budgets.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.utils.warning.PeftWarning)  # of ranks that have become zero
        return dict(peft.get_peft_model_state_dict(model)), budgets


def test_a_fit_is_a_plain_loop_over_peft(given, frame, tiny):
    clf = classifier(given, schedule="linear", warmup=0, dtype="float64").fit(
        frame
    )  # Adam's first steps magnify rounding
    expected, budgets = plain_loop(tiny, frame, given)
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (14 * 4, 14 * 2)
    found = {name: t for name, t in weights(clf).items() if t.numel()}
    assert found.keys() == {name for name, t in expected.items() if t.numel()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    assert sum(ranks_of(clf)) == 14 * 2


def test_the_penalty_keeps_p_and_q_orthogonal(given, frame):
    def distance(weight: float) -> float:
        clf = classifier(given, adapter={**ADAPTER, "orth_reg_weight": weight}, epochs=30).fit(frame)
        products = [t @ t.T for name, t in weights(clf).items() if name.endswith("lora_A") and len(t)]
        return float(np.mean([float(torch.linalg.matrix_norm(p - torch.eye(len(p)))) for p in products]))

    assert distance(0.5) < 0.8 * distance(0.0)


def test_ranks_end_at_the_budget_and_differ(given, frame):
    ranks = ranks_of(classifier(given).fit(frame))
    assert sum(ranks) == 14 * 2
    assert len(set(ranks)) > 1


@pytest.mark.parametrize("changed", [{"tinit": 0, "tfinal": 0}, {"tinit": 3, "tfinal": 2}, {"deltaT": 3}])
def test_shares_and_numbers_of_steps(changed, given, frame):
    assert sum(ranks_of(classifier(given, adapter={**ADAPTER, **changed}).fit(frame))) == 14 * 2


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_short_fit_has_its_budget_too(epochs, given, frame):
    assert sum(ranks_of(classifier(given, epochs=epochs).fit(frame))) <= 14 * 4


def test_steps_that_leave_none_are_one_sentence(given, frame):
    with pytest.raises(ParameterError) as error:
        classifier(given, adapter={**ADAPTER, "tinit": 6, "tfinal": 4}).fit(frame)
    assert str(error.value) == (
        "The 'tinit' and 'tfinal' parameters of AdaLoRA leave no step to share out ranks in: they are 6 and 4 of 10 "
        "steps."
    )


def test_ranks_that_cannot_fall_are_one_sentence():
    with pytest.raises(ParameterError) as error:
        resolve_adapter({**ADAPTER, "target_r": 4})
    assert str(error.value) == (
        "The 'init_r' parameter of AdaLoRA must be greater than target_r, which is 4. Got 4 instead."
    )


class Killed(BaseException):
    """Nothing in a fit may catch it."""


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_killed_fit_goes_on_with_what_it_knew_of_importance(step, given, frame, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))

    def kill(state: Any) -> None:
        if state.step == step:
            raise Killed

    with pytest.raises(Killed):
        classifier(given, callbacks=kill, checkpoint_dir=tmp_path).fit(frame)
    assert same(classifier(given, checkpoint_dir=tmp_path).fit(frame), classifier(given).fit(frame))


def test_a_fit_that_stops_early_keeps_what_is_not_zero(given, frame, tmp_path):
    def stop(state: Any) -> None:
        state.stop = state.step == 4

    clf = classifier(given, callbacks=stop).fit(frame)
    assert 14 * 2 < sum(ranks_of(clf)) < 14 * 4
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


def test_the_best_epoch_is_restored_with_its_own_ranks(given, frame):
    clf = classifier(given, validation_fraction=0.25, early_stopping=9, learning_rate=1.0, schedule="constant").fit(
        frame
    )
    losses = clf.history_["validation_loss"].dropna()
    assert clf.best_epoch_ == int(losses.to_numpy().argmin()) + 1
    assert np.isfinite(clf.predict_proba(frame)).all()


def test_a_fit_that_goes_on_keeps_its_ranks(given, frame):
    clf = classifier(given, warm_start=True).fit(frame)
    before = ranks_of(clf)
    clf.fit(frame)
    assert len(clf.history_) == 2 * STEPS
    assert sum(ranks_of(clf)) == sum(before)
