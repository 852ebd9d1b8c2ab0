"""The loop against plain PyTorch: the same gradients however a step is cut, the same weights after it.

A plain loop stands beside: peft and transformers, one row at a time, a loss by hand.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch_side import (
    classifier,
    fit_seed,
    furthest,
    generator,
    make_other,
    no_collecting,
    plain_model,
    plain_tokenizer,
    same,
    token_losses,
    token_rows,
    weights,
    with_tokenizer,
)

import llmfit
from llmfit import Callback, training
from llmfit.batching import epoch_order
from llmfit.callbacks import EarlyStopping, resolve_callbacks, resolve_early_stopping
from llmfit.estimators.fitting import split_rows
from llmfit.exceptions import DataError, MemoryWarning, ModelLoadError, OutOfMemoryError, ParameterError, TrainingError
from llmfit.objectives import OBJECTIVES
from llmfit.optim import OPTIMIZERS, SCHEDULES, learning_rate_at, make_optimizer

SGD = {"optimizer": {"type": "sgd"}, "max_grad_norm": None, "learning_rate": 1.0, "warmup": 0, "schedule": "constant"}
ALIVE = {"r": 4, "init_lora_weights": "orthogonal"}  # neither A nor B is zero: both have gradients from the first step


@pytest.fixture
def ragged(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of very different lengths."""
    return frame.assign(text=[text * (1 + 3 * i) for i, text in enumerate(frame["text"])])


def plain_loop(folder: str, frame: pd.DataFrame, optimizer: Any, *, batch: int, clip: float | None, epochs: int = 1):
    """Fine-tune with peft and transformers alone: the same seed, the same order, row by row."""
    import peft

    model = plain_model(folder)
    torch.manual_seed(fit_seed())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="orthogonal")
    lent = peft.get_peft_model(model, config)
    parameters = [p for p in lent.parameters() if p.requires_grad]
    step = optimizer(parameters)
    rows = token_rows(folder, frame["text"], frame["label"])
    losses = []
    for epoch in range(1, epochs + 1):
        order = epoch_order(len(rows), fit_seed(), epoch)
        for start in range(0, len(rows), batch):
            chosen = [rows[i] for i in order[start : start + batch]]
            total = sum(_loss(lent, *row) for row in chosen) / sum(len(completion) for _, completion in chosen)
            step.zero_grad()
            total.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            step.step()
            losses.append(float(total.detach()))
    return peft.get_peft_model_state_dict(lent), losses


def _loss(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    labels = torch.tensor([[-100] * len(prompt) + completion])
    return model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss * len(completion)


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 40, 200, 10**6])
def test_no_way_of_cutting_a_step_changes_its_gradient(batch_tokens, weighted, settings, ragged):
    weight = np.linspace(0.1, 2.0, len(ragged)) if weighted else None
    whole, cut = (
        classifier(settings, **SGD, adapter=ALIVE, batch_tokens=budget).fit(ragged, sample_weight=weight)
        for budget in ("auto", batch_tokens)
    )
    # one step of plain SGD at rate one: the difference of the weights is that of the gradients
    assert furthest(whole, cut) < 1e-5
    np.testing.assert_allclose(whole.history_["grad_norm"], cut.history_["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(whole.history_["loss"], cut.history_["loss"], rtol=1e-6)
    assert whole.history_["grad_norm"][0] > 0.1


def test_every_way_of_cutting_a_step_is_taken(settings, ragged, monkeypatch):
    sizes: dict[int, list[int]] = {}
    supervised = OBJECTIVES["supervised"]

    def objective(model: Any, batch: Any) -> Any:
        sizes[budget].append(len(batch.layout.starts))
        return supervised(model, batch)

    monkeypatch.setitem(OBJECTIVES, "supervised", objective)
    for budget in (1, 200, 10**6):
        sizes[budget] = []
        classifier(settings, batch_tokens=budget).fit(ragged)
    assert sizes[1] == [1] * 8
    assert sum(sizes[200]) == sum(sizes[10**6]) == 8
    assert len(sizes[10**6]) < len(sizes[200]) < 8


# eps keeps the first step of a method that divides by the gradient's size from being a sign, which rounding can turn
LIBRARY: dict[str, tuple[Any, Any]] = {
    "adamw": (
        {"type": "adamw", "betas": (0.8, 0.9), "eps": 1e-3},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-3),
    ),
    "own weight decay": (
        {"type": "adamw", "weight_decay": 0.3, "eps": 1e-3},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, eps=1e-3),
    ),
    "adam": ({"type": "adam", "eps": 1e-3}, lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-3)),
    "sgd": ({"type": "sgd", "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    "adafactor": ("adafactor", lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "adagrad": ({"type": "adagrad", "eps": 1e-2}, lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-2)),
    "nadam": ({"type": "nadam", "eps": 1e-3}, lambda p: torch.optim.NAdam(p, lr=1e-2, eps=1e-3)),
    "radam": ("radam", lambda p: torch.optim.RAdam(p, lr=1e-2)),
    "rmsprop": ({"type": "rmsprop", "eps": 1e-2}, lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-2)),
}


@pytest.mark.parametrize(("optimizer", "library"), LIBRARY.values(), ids=LIBRARY)
def test_three_steps_are_those_of_a_plain_loop(optimizer, library, settings, ragged, tiny):
    clf = classifier(
        settings, adapter=ALIVE, optimizer=optimizer, batch_size=3, warmup=0, schedule="constant", max_grad_norm=0.5
    ).fit(ragged)
    expected, losses = plain_loop(tiny, ragged, library, batch=3, clip=0.5)
    assert len(losses) == 3
    np.testing.assert_allclose(clf.history_["loss"], losses, rtol=1e-4)
    assert furthest(clf, expected) < 1e-5


def test_three_steps_of_the_default_optimizer_are_those_of_a_plain_loop(settings, ragged, tiny):
    clf = classifier(settings, adapter=ALIVE, batch_size=3, warmup=0, schedule="constant").fit(ragged)
    expected, losses = plain_loop(
        tiny, ragged, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), batch=3, clip=1.0
    )
    np.testing.assert_allclose(clf.history_["loss"], losses, rtol=1e-4)
    apart = torch.cat([(weights(clf)[name] - t).abs().flatten() for name, t in expected.items()])
    assert float(apart.quantile(0.999)) < 1e-5  # the first step is a sign; of a gradient near zero rounding can turn it


def test_two_epochs_are_those_of_a_plain_loop(settings, ragged, tiny):
    clf = classifier(settings, **SGD, adapter=ALIVE, batch_size=4, epochs=2).set_params(learning_rate=0.1).fit(ragged)
    expected, losses = plain_loop(tiny, ragged, lambda p: torch.optim.SGD(p, lr=0.1), batch=4, clip=None, epochs=2)
    np.testing.assert_allclose(clf.history_["loss"], losses, rtol=1e-5)
    assert furthest(clf, expected) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_an_epoch_takes_every_row_once(batch_size, settings, ragged, tiny):
    history = classifier(settings, batch_size=batch_size, epochs=2).fit(ragged).history_
    steps = math.ceil(len(ragged) / batch_size)
    assert history["step"].tolist() == list(range(1, 2 * steps + 1))
    assert history["epoch"].tolist() == [1] * steps + [2] * steps
    tokens = sum(len(prompt) + len(answer) for prompt, answer in token_rows(tiny, ragged["text"], ragged["label"]))
    assert history.groupby("epoch")["tokens"].sum().tolist() == [tokens, tokens]


# Weights of rows ------------------------------------------------------------------------------------


def fit_weighted(settings: dict[str, Any], rows: pd.DataFrame, weight: Any = None, **changed: Any) -> Any:
    return classifier(settings, **{**SGD, "adapter": ALIVE, "batch_size": 100, **changed}).fit(
        rows, sample_weight=weight
    )


def test_a_row_of_weight_two_is_the_row_twice(settings, ragged):
    twice = fit_weighted(settings, pd.concat([ragged, ragged.iloc[:3]]))
    weighed = fit_weighted(settings, ragged, [2, 2, 2, 1, 1, 1, 1, 1])
    assert furthest(twice, weighed) < 1e-5
    assert furthest(twice, fit_weighted(settings, ragged)) > 1e-3


def test_only_the_proportions_of_weights_matter(settings, ragged):
    weight = np.arange(1.0, 9.0)
    assert furthest(fit_weighted(settings, ragged, weight), fit_weighted(settings, ragged, 7.5 * weight)) < 1e-5


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_row_of_weight_zero_is_the_row_left_out(batch_size, settings, ragged):
    weight = np.array([1, 0, 1, 1, 1, 0, 1, 1.0])
    zero = fit_weighted(settings, ragged, weight, batch_size=batch_size, epochs=2)
    out = fit_weighted(settings, ragged[weight > 0], None, batch_size=batch_size, epochs=2)
    assert same(zero, out)
    assert zero.history_["loss"].tolist() == out.history_["loss"].tolist()


@pytest.fixture
def uneven(ragged: pd.DataFrame) -> pd.DataFrame:
    """Ten rows, three of them fruit."""
    rows = pd.concat([ragged, ragged.iloc[:2]], ignore_index=True)
    return rows.assign(label=["fruit", "vehicle", "vehicle", "vehicle", "fruit", "vehicle", "fruit"] + 3 * ["vehicle"])


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_balanced_classes_are_weighed_by_their_frequency_in_the_rows_trained_on(fraction, settings, uneven):
    kept, _ = split_rows(10, fraction, uneven["label"], fit_seed()) if fraction else (range(10), ())
    counts = uneven["label"].iloc[list(kept)].value_counts()
    by_hand = uneven["label"].map(len(kept) / (2 * counts)).to_numpy()
    balanced = fit_weighted(settings, uneven, class_weight="balanced", validation_fraction=fraction)
    assert same(balanced, fit_weighted(settings, uneven, by_hand, validation_fraction=fraction))
    assert furthest(balanced, fit_weighted(settings, uneven, validation_fraction=fraction)) > 1e-4
    if fraction:  # of all rows it would be other weights
        of_all = uneven["label"].map(10 / (2 * uneven["label"].value_counts())).to_numpy()
        assert furthest(balanced, fit_weighted(settings, uneven, of_all, validation_fraction=fraction)) > 1e-5


def test_a_dict_weighs_classes_and_multiplies_the_weights_of_rows(settings, uneven):
    weight = np.linspace(0.5, 2.0, 10)
    fruit = np.where(uneven["label"] == "fruit", 3.0, 1.0)
    given = {"class_weight": {"fruit": 3}}
    assert same(fit_weighted(settings, uneven, **given), fit_weighted(settings, uneven, fruit))
    assert same(fit_weighted(settings, uneven, weight, **given), fit_weighted(settings, uneven, fruit * weight))


def test_classes_of_no_weight_leave_nothing_to_train_on(settings, frame):
    with pytest.raises(DataError) as error:
        classifier(settings, class_weight={"fruit": 0, "vehicle": 0}).fit(frame)
    assert str(error.value) == "Every row to train on has weight zero: look at sample_weight and class_weight."


# Rates and norms ------------------------------------------------------------------------------------

HALF = 0.5 * (1 + math.cos(math.pi / 4))
RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant": ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1]),
    "linear": ({"schedule": "linear", "warmup": 0}, [1, 0.75, 0.5, 0.25]),
    "cosine": ({"schedule": "cosine", "warmup": 0}, [1, HALF, 0.5, 1 - HALF]),
    "one step of warmup": ({"schedule": "constant", "warmup": 1}, [0.5, 1, 1, 1]),
    "steps of warmup": ({"schedule": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.5]),
    "share of warmup": ({"schedule": "linear", "warmup": 0.5}, [1 / 3, 2 / 3, 1, 0.5]),
    "a small share is one step": ({"schedule": "constant", "warmup": 0.01}, [0.5, 1, 1, 1]),
    "nothing but warmup": ({"schedule": "linear", "warmup": 99}, [0.2, 0.4, 0.6, 0.8]),
}


@pytest.mark.parametrize(("changed", "expected"), RATES.values(), ids=RATES)
def test_learning_rates_are_those_by_hand(changed, expected, settings, frame):
    clf = classifier(settings, batch_size=2, learning_rate=1e-3, **changed).fit(frame)
    np.testing.assert_allclose(clf.history_["learning_rate"], 1e-3 * np.array(expected), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.3, 5])
def test_rates_never_pass_the_peak_and_only_fall_after_the_warmup(schedule, warmup):
    rates = [learning_rate_at(s, 20, peak=2.0, schedule=schedule, warmup=warmup) for s in range(20)]
    top = rates.index(max(rates))
    assert max(rates) == 2.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_the_rate_of_a_step_is_the_one_that_it_is_taken_with(settings, frame):
    before = classifier(settings, **{**SGD, "learning_rate": 1e-12}, adapter=ALIVE).fit(frame)
    full, half = (classifier(settings, **{**SGD, "warmup": warmup}, adapter=ALIVE).fit(frame) for warmup in (0, 1))
    for name, start in weights(before).items():
        moved, moved_half = weights(full)[name] - start, weights(half)[name] - start
        torch.testing.assert_close(moved_half, moved / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("most", [0.05, 1.0, None])
def test_gradients_are_scaled_down_to_the_norm(most, settings, frame):
    before, after = (
        classifier(settings, **{**SGD, "learning_rate": rate, "max_grad_norm": most}, adapter=ALIVE).fit(frame)
        for rate in (1e-12, 1.0)
    )
    moved = math.sqrt(sum(float(((weights(after)[n] - t) ** 2).sum()) for n, t in weights(before).items()))
    norm = after.history_["grad_norm"][0]
    assert norm > 1.0  # what is told is the norm before
    assert moved == pytest.approx(norm if most is None else most, rel=1e-3)


def test_weight_decay_shrinks_what_is_trained(settings, frame):
    plain, decayed = (
        classifier(settings, adapter=ALIVE, weight_decay=decay, learning_rate=1e-2, warmup=0).fit(frame)
        for decay in (0.0, 0.5)
    )
    start = classifier(settings, adapter=ALIVE, learning_rate=1e-12, warmup=0).fit(frame)
    for name, tensor in weights(plain).items():  # AdamW: w - rate * (decay * w + direction)
        torch.testing.assert_close(
            weights(decayed)[name], tensor - 1e-2 * 0.5 * weights(start)[name], rtol=0, atol=1e-6
        )


# Optimisers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name, adapter, settings, frame):
    rate = {"adafactor": 1e-1, "sgd": 1e-1, "radam": 1e-1}.get(name, 3e-3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        clf = classifier(settings, adapter=adapter, optimizer=name, epochs=8, learning_rate=rate, warmup=0).fit(frame)
    paged = name.startswith("paged")
    assert [w for w in warned if "Paged optimizers are not supported on CPU" not in str(w.message)] == []
    assert bool(warned) == paged  # bitsandbytes says itself that it keeps nothing in pages here
    losses = clf.history_["loss"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.05
    assert all(bool(t.isfinite().all()) for t in weights(clf).values())


WRONG_OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "name": (
        "adamwx",
        f"The 'optimizer' parameter of the estimator must be one of {', '.join(map(repr, OPTIMIZERS))}. "
        "Got 'adamwx' instead. Did you mean 'adamw'?",
    ),
    "no type": (
        {"betas": (0.9, 0.99)},
        "The 'optimizer' parameter of the estimator must be a name or a dict with a 'type'. "
        "Got {'betas': (0.9, 0.99)} instead.",
    ),
    "rate": (
        {"type": "sgd", "lr": 3},
        "The 'optimizer' parameter has no 'lr'. Set the 'learning_rate' parameter instead.",
    ),
    "setting": (
        {"type": "sgd", "betas": 3},
        "The optimizer 'sgd' cannot take {'betas': 3}: SGD.__init__() got an unexpected keyword argument 'betas'.",
    ),
    "value": (
        {"type": "sgd", "momentum": -1},
        "The optimizer 'sgd' cannot take {'momentum': -1}: Invalid momentum value: -1.",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), WRONG_OPTIMIZERS.values(), ids=WRONG_OPTIMIZERS)
def test_an_optimizer_that_cannot_be_used_is_one_sentence(value, sentence, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, optimizer=value).fit(frame)
    assert str(error.value) == sentence


def test_without_bitsandbytes_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ParameterError) as error:
        make_optimizer("lion", [torch.nn.Parameter(torch.ones(1))], learning_rate=1.0, weight_decay=0.0)
    assert str(error.value) == ("The optimizer Lion needs bitsandbytes. Install it with: pip install bitsandbytes.")


# Seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", {"dropout": 0.2}, "full"])
def test_the_same_random_state_is_the_same_fit_bit_for_bit(adapter, settings, frame):
    def fit(random_state: int) -> Any:
        return classifier(settings, adapter=adapter, epochs=2, batch_size=3, random_state=random_state).fit(frame)

    first, again, other = fit(0), fit(0), fit(1)
    assert same(first, again)
    steady = [name for name in first.history_ if name != "seconds"]
    pd.testing.assert_frame_equal(first.history_[steady], again.history_[steady], check_exact=True)
    assert furthest(first, other) > 1e-4


def test_the_order_of_rows_is_another_one_in_every_epoch():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


# History and validation -----------------------------------------------------------------------------


def test_history_is_a_row_a_step(settings, frame):
    history = classifier(settings, epochs=2, batch_size=3).fit(frame, eval_set=frame).history_
    assert list(history) == [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "seconds",
        "validation_loss",
    ]
    assert history["validation_loss"].notna().tolist() == [False, False, True] * 2
    assert (history[["loss", "learning_rate", "grad_norm", "tokens", "seconds"]] > 0).all().all()


@pytest.mark.parametrize("batch_tokens", [30, "auto"])
def test_the_validation_loss_is_that_of_the_fitted_model(batch_tokens, settings, ragged):
    model = generator(settings, epochs=2, batch_tokens=batch_tokens, adapter={"dropout": 0.3}).fit(
        ragged[:5], eval_set=ragged[5:]
    )
    found = model.history_["validation_loss"].iloc[-1]
    assert found == pytest.approx(math.log(perplexity(model, ragged[5:])), rel=1e-5)


@pytest.mark.parametrize("head", ["lm", "linear"])
def test_measuring_the_validation_loss_does_not_touch_the_training(head, settings, ragged):
    """Also where the other rows begin otherwise: dropout draws what it would have drawn."""
    dropping = {"adapter": {"r": 4, "dropout": 0.3}, "epochs": 3, "batch_size": 3, "head": head}
    rows, others = (ragged.assign(text=before + ragged["text"]) for before in ("so ", "no "))
    watched = classifier(settings, **dropping).fit(rows, eval_set=others)
    assert same(watched, classifier(settings, **dropping).fit(rows))


def test_rows_to_validate_on_are_padded_alone_where_they_alone_have_to_be(settings, frame, tiny, tmp_path, monkeypatch):
    folder = make_other(tmp_path / "mistral", tiny, "mistral", sliding_window=40)
    said: list[int | None] = []
    real = training.packable
    monkeypatch.setattr(training, "packable", lambda *given, **named: said.append(real(*given, **named)) or said[-1])
    own = {"base_model": folder, "adapter": {"r": 4, "dropout": 0.3}, "epochs": 2, "batch_size": 3}
    others = frame.assign(text="x" * 50 + frame["text"])
    watched = classifier(settings, **own).fit(frame, eval_set=others)
    assert said == [1, None]
    assert same(watched, classifier(settings, **own).fit(frame))
    monkeypatch.setattr(training, "packable", lambda *_, **__: None)
    plain = classifier(settings, **own, learning_rate=1e-12).fit(frame, eval_set=others)
    monkeypatch.undo()
    found = classifier(settings, **own, learning_rate=1e-12).fit(frame, eval_set=others)
    np.testing.assert_allclose(
        found.history_["validation_loss"].dropna(), plain.history_["validation_loss"].dropna(), rtol=1e-5
    )


def perplexity(model: Any, rows: pd.DataFrame) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(model.evaluate(rows)["perplexity"])


@pytest.mark.parametrize("spelling", ["frame", "tuple"])
def test_an_eval_set_may_be_a_frame_or_a_tuple(spelling, settings, frame, tiny):
    held = frame[4:] if spelling == "frame" else (frame[["text"]][4:], frame["label"][4:].tolist())
    clf = classifier(settings, learning_rate=1e-12).fit(frame[:4], eval_set=held)
    model = plain_model(tiny)
    rows = token_rows(tiny, frame["text"][4:], frame["label"][4:])
    expected = np.concatenate([token_losses(model, *row) for row in rows]).mean()
    assert clf.history_["validation_loss"].iloc[-1] == pytest.approx(expected, rel=1e-5)


def test_rows_held_out_are_not_trained_on(settings, frame, tiny):
    kept, held = split_rows(8, 0.25, frame["label"], fit_seed())
    assert sorted([*kept, *held]) == list(range(8))
    assert sorted(frame["label"].iloc[list(held)]) == ["fruit", "vehicle"]
    part = classifier(settings, validation_fraction=0.25).fit(frame)
    alone = classifier(settings).fit(frame.iloc[list(kept)], eval_set=frame.iloc[list(held)])
    assert same(part, alone)
    assert part.history_["validation_loss"].tolist() == alone.history_["validation_loss"].tolist()


@pytest.mark.parametrize(("rows", "fraction", "word"), [(2, 0.1, "validate"), (2, 0.9, "train")])
def test_a_part_without_rows_is_refused(rows, fraction, word, settings, frame):
    with pytest.raises(DataError) as error:
        classifier(settings, validation_fraction=fraction).fit(frame[1:3])
    assert str(error.value) == f"validation_fraction {fraction:g} of {rows} row(s) leaves no row to {word} on."


@pytest.fixture
def overfitting(settings: dict[str, Any], frame: pd.DataFrame) -> Any:
    """Settings and rows whose validation loss falls and then rises: the labels held out are the other ones."""
    held = frame.assign(label=frame["label"].map({"fruit": "vehicle", "vehicle": "fruit"}))
    return (
        {**settings, "epochs": 40, "learning_rate": 1e-2, "batch_size": 8, "warmup": 0, "adapter": "full"},
        frame,
        held,
    )


def test_early_stopping_ends_with_the_weights_of_the_best_epoch(overfitting):
    settings, rows, held = overfitting
    model = generator(settings, early_stopping=3).fit(rows, eval_set=held)
    losses = model.history_["validation_loss"]
    best = int(losses.argmin())
    assert 1 < best + 1 == model.best_epoch_ < len(losses) == best + 1 + 3 < 40
    assert math.log(perplexity(model, held)) == pytest.approx(losses.min(), rel=1e-5)
    last = generator(settings, epochs=len(losses), schedule="constant").fit(rows, eval_set=held)
    assert math.log(perplexity(last, held)) > losses.min() + 1e-4  # without it the last epoch's weights stay


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stop"),
    [
        ([3, 2, 1], 1, 0.0, False),
        ([3, 2, 2.5], 1, 0.0, True),
        ([3, 2, 2], 1, 0.0, True),
        ([3, 2, 2.5], 2, 0.0, False),
        ([3, 2, 2.5, 2.4], 2, 0.0, True),
        ([3, 2, 2.5, 1.9], 2, 0.0, False),
        ([3, 2.95], 1, 0.1, True),
        ([3, 2.85], 1, 0.1, False),
        ([3, math.nan, 2], 2, 0.0, False),
        ([3, math.nan], 1, 0.0, True),
    ],
)
def test_patience_counts_epochs_without_a_fall(losses, patience, min_delta, stop):
    from llmfit.callbacks import State

    state = State(total_steps=9, epochs=9, history=[{"validation_loss": loss} for loss in losses])
    EarlyStopping(patience, min_delta).on_epoch_end(state)
    assert state.stop is stop


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (False, None),
        (True, EarlyStopping()),
        (3, EarlyStopping(3)),
        ({"patience": 2, "min_delta": 0.1}, EarlyStopping(2, 0.1)),
        ({}, EarlyStopping()),
    ],
)
def test_every_spelling_of_early_stopping(value, expected):
    assert resolve_early_stopping(value) == expected


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"early_stopping": 2},
            "early_stopping needs validation_fraction > 0, or an eval_set passed to fit.",
        ),
        (
            {"early_stopping": "yes"},
            "The 'early_stopping' parameter of the estimator must be None, a bool, an int or a dict. "
            "Got 'yes' instead.",
        ),
        (
            {"early_stopping": {"patienc": 2}},
            "early_stopping has no parameter 'patienc'. It has 'min_delta', 'patience'. Did you mean 'patience'?",
        ),
        (
            {"early_stopping": 0},
            "The 'patience' parameter of early_stopping must be an int >= 1. Got 0 instead.",
        ),
        (
            {"callbacks": ["stop"]},
            "The 'callbacks' parameter of the estimator must be callbacks or functions of the state. "
            "Got 'stop' instead.",
        ),
        (
            {"callbacks": Callback},
            "The 'callbacks' parameter of the estimator must be callbacks or functions of the state. "
            "Got <class 'llmfit.callbacks.Callback'> instead.",
        ),
        (
            {"schedule": "cosin"},
            "The 'schedule' parameter of LLMClassifier must be one of 'cosine', 'linear', 'constant'. "
            "Got 'cosin' instead. Did you mean 'cosine'?",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(changed, sentence, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, **changed).fit(frame)
    assert str(error.value) == sentence


# warm_start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [ALIVE, "full"])
def test_a_warm_start_goes_on_from_the_weights_of_the_last_fit(adapter, settings, ragged):
    # all rows in one step at one rate: two fits of one step are one fit of two
    step = {**SGD, "adapter": adapter, "learning_rate": 0.1}
    warm = classifier(settings, **step, warm_start=True).fit(ragged).fit(ragged)
    whole = classifier(settings, **step, epochs=2).fit(ragged)
    assert furthest(warm, whole) < 1e-5
    assert warm.history_["step"].tolist() == [1, 2]
    assert warm.history_["epoch"].tolist() == [1, 2]
    np.testing.assert_allclose(warm.history_["loss"], whole.history_["loss"], rtol=1e-5)
    cold = classifier(settings, **step).fit(ragged).fit(ragged)
    assert cold.history_["step"].tolist() == [1]


def test_a_warm_start_refuses_another_adapter(settings, frame):
    clf = classifier(settings, adapter={"r": 4}, warm_start=True).fit(frame)
    before = {name: t.clone() for name, t in weights(clf).items()}
    with pytest.raises(ParameterError) as error:
        clf.set_params(adapter__r=8).fit(frame)
    assert re.fullmatch(
        r"warm_start continues the adapter of the last fit, LoRA\(r=4\)\. Got LoRA\(r=8\) instead\. "
        r"Set warm_start=False to begin anew\.",
        str(error.value),
    )
    assert same(clf, before)
    clf.set_params(warm_start=False).fit(frame)


def test_a_warm_start_refuses_another_base_model(settings, frame, tiny_chat):
    clf = classifier(settings, warm_start=True).fit(frame)
    with pytest.raises(ModelLoadError, match="is not the one that was fitted"):
        clf.set_params(base_model=tiny_chat).fit(frame)


# Callbacks ------------------------------------------------------------------------------------------


class Diary(Callback):
    """Writes down what it is told, and fails where it is to."""

    def __init__(self, name: str = "", pages: list[Any] | None = None, fail: str = "") -> None:
        self.name, self.pages, self.fail = name, [] if pages is None else pages, fail

    def _note(self, event: str, state: Any) -> None:
        self.pages.append((self.name + event, state.step, state.epoch, len(state.history)))
        if event == self.fail:
            raise ZeroDivisionError

    def on_fit_begin(self, state: Any) -> None:
        self._note("begin", state)

    def on_step_end(self, state: Any) -> None:
        self._note("step", state)

    def on_epoch_end(self, state: Any) -> None:
        self._note("epoch", state)
        assert state.history[-1]["validation_loss"] > 0

    def on_fit_end(self, state: Any) -> None:
        self._note("end", state)


def test_callbacks_are_told_in_order(settings, frame):
    pages: list[Any] = []
    both = [Diary("a ", pages), Diary("b ", pages)]
    classifier(settings, callbacks=both, batch_size=4, epochs=2).fit(frame, eval_set=frame)
    expected = [("begin", 0, 1, 0)]
    expected += [("step", 1, 1, 1), ("step", 2, 1, 2), ("epoch", 2, 1, 2)]
    expected += [("step", 3, 2, 3), ("step", 4, 2, 4), ("epoch", 4, 2, 4), ("end", 4, 2, 4)]
    assert pages == [(name + event[0], *event[1:]) for event in expected for name in ("a ", "b ")]


@pytest.mark.parametrize("event", ["begin", "step", "epoch"])
def test_callbacks_are_told_of_the_end_of_a_fit_that_fails(event, settings, frame):
    diary = Diary(fail=event)
    with pytest.raises(ZeroDivisionError):
        classifier(settings, callbacks=diary).fit(frame, eval_set=frame)
    assert [page[0] for page in diary.pages][-2:] == [event, "end"]


def test_a_function_is_told_of_each_step(settings, frame):
    steps: list[int] = []
    classifier(settings, callbacks=[lambda state: steps.append(state.step)], batch_size=3).fit(frame)
    assert steps == [1, 2, 3]
    assert resolve_callbacks(None) == []


def test_a_callback_stops_a_fit_after_its_step(settings, frame):
    def stop(state: Any) -> None:
        state.stop = state.step == 2

    clf = classifier(settings, callbacks=stop, batch_size=2, epochs=3, schedule="constant").fit(frame)
    assert len(clf.history_) == 2
    assert set(clf.predict(frame)) <= {"fruit", "vehicle"}


# Losses that are not finite -------------------------------------------------------------------------


def test_a_rate_beyond_all_bounds_is_one_sentence(settings, frame):
    with pytest.raises(TrainingError) as error:
        classifier(settings, learning_rate=1e30, epochs=3, batch_size=4).fit(frame)
    found = re.fullmatch(
        r"The (?:loss|norm of the gradient) is (?:nan|inf) at step (\d) of 6 \(rows ((?:\d, )*\d)\)\. "
        r"Try a lower learning_rate, a longer warmup, a smaller max_grad_norm or dtype='float32'\.",
        str(error.value),
    )
    assert found is not None
    step, rows = int(found[1]), {int(row) for row in found[2].split(", ")}
    order = epoch_order(8, fit_seed(), (step - 1) // 2 + 1)
    start = (step - 1) % 2 * 4
    assert rows == set(order[start : start + 4].tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_rows(bad, settings, frame, monkeypatch):
    supervised = OBJECTIVES["supervised"]
    (letter,) = plain_tokenizer(settings["base_model"])("z", add_special_tokens=False)["input_ids"]
    frame.loc["r5", "text"] = "zzz"  # no other row has this letter

    def objective(model: Any, batch: Any) -> torch.Tensor:
        return supervised(model, batch) + (bad if (batch.input_ids == letter).any() else 0.0)

    monkeypatch.setitem(OBJECTIVES, "supervised", objective)
    with pytest.raises(TrainingError) as error:
        classifier(settings, batch_tokens=1).fit(frame)
    assert str(error.value) == (
        f"The loss is {bad} at step 1 of 1 (rows 5). "
        "Try a lower learning_rate, a longer warmup, a smaller max_grad_norm or dtype='float32'."
    )


def test_a_gradient_that_is_not_finite_is_refused_before_the_step(settings, frame, monkeypatch):
    supervised = OBJECTIVES["supervised"]

    def steep(model: Any, batch: Any) -> torch.Tensor:
        some = next(p for p in model.parameters() if p.requires_grad)
        return supervised(model, batch) + (some - some.detach()).sum().abs().sqrt()

    monkeypatch.setitem(OBJECTIVES, "supervised", steep)
    with pytest.raises(TrainingError) as error:
        classifier(settings, max_grad_norm=None).fit(frame)
    assert re.match(
        r"The norm of the gradient is (nan|inf) at step 1 of 1 \(rows (\d, ){7}\d\)\. Try ", str(error.value)
    )


# Memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the objective fail where a batch has more padded tokens than there is memory for."""
    no_collecting(monkeypatch)

    def install(most: int, error: BaseException | None = None) -> None:
        supervised = OBJECTIVES["supervised"]

        def objective(model: Any, batch: Any) -> torch.Tensor:
            loss = supervised(model, batch)  # memory runs out late, when random numbers were drawn
            if batch.input_ids.numel() > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            return loss

        monkeypatch.setitem(OBJECTIVES, "supervised", objective)

    return install


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
@pytest.mark.parametrize("adapter", [ALIVE, {"dropout": 0.3}])
def test_a_step_that_memory_does_not_hold_is_cut_and_ends_the_same(adapter, error, settings, ragged, little_memory):
    setting = {"adapter": adapter, "epochs": 2, "batch_size": 8}
    cut = classifier(settings, batch_tokens=300, **setting).fit(ragged)
    little_memory(400, error)
    with pytest.warns(MemoryWarning) as warned:
        clf = classifier(settings, batch_tokens=600, **setting).fit(ragged)
    assert [str(w.message) for w in warned] == [
        "Memory ran out: going on with batches of 300 tokens, smaller ones if it runs out again."
    ]
    assert same(clf, cut)  # bit for bit as if it had been cut from the start, dropout included


def test_a_beginning_longer_than_the_budget_leaves_rows_to_halve(settings, frame, little_memory):
    """A pass holds it and half of the budget: what is behind it can be cut down to one row."""
    task = "Tell fruit from vehicles. " * 30
    own = {"template": {"task": task, "template": "{task}\n{text} is a"}, "target": "label", "adapter": ALIVE}
    whole = llmfit.LLMClassifier(**{**settings, **own}).fit(frame)
    little_memory(len(task) + 48)
    with pytest.warns(MemoryWarning, match="Memory ran out: going on with batches of"):
        cut = llmfit.LLMClassifier(**{**settings, **own, "batch_tokens": 400}).fit(frame)
    np.testing.assert_allclose(cut.history_["loss"], whole.history_["loss"], rtol=1e-5)


def test_a_validation_that_memory_does_not_hold_is_cut(settings, ragged, monkeypatch):
    no_collecting(monkeypatch)
    measure = training.mean_loss

    def small(*given: Any, budget: int, **rest: Any) -> float:
        if budget > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(*given, budget=budget, **rest)

    expected = classifier(settings, adapter=ALIVE).fit(ragged, eval_set=ragged)
    monkeypatch.setattr(training, "mean_loss", small)
    with pytest.warns(MemoryWarning, match="batches of 300 tokens"):
        clf = classifier(settings, adapter=ALIVE, batch_tokens=600).fit(ragged, eval_set=ragged)
    assert clf.history_["validation_loss"][0] == pytest.approx(expected.history_["validation_loss"][0], rel=1e-5)


def test_a_row_that_memory_does_not_hold_is_one_sentence(settings, frame, little_memory):
    little_memory(0)
    with pytest.raises(OutOfMemoryError) as error:
        classifier(settings, batch_tokens=16).fit(frame)
    assert str(error.value) == (
        "Memory does not hold one row. Lower max_length. Choose a smaller base_model or adapter rank, or a dtype of "
        "fewer bytes."
    )


def test_memory_that_does_not_hold_the_optimizer_is_one_sentence(settings, frame, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(OutOfMemoryError) as error:
        classifier(settings).fit(frame)
    assert str(error.value) == (
        "Memory does not hold what the optimizer keeps of the weights. Choose a smaller base_model or adapter rank, or "
        "a dtype of fewer bytes."
    )


def test_another_error_is_none_of_memory(settings, frame, little_memory):
    little_memory(0, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match=r"^broken$"):
        classifier(settings).fit(frame)


# What is told on the way ----------------------------------------------------------------------------


def test_verbose_zero_is_silent_and_one_shows_a_bar(settings, frame, capfd):
    classifier(settings).fit(frame).predict(frame)
    capfd.readouterr()  # what libraries say when they are first used
    quiet = classifier(settings, epochs=2, validation_fraction=0.25).fit(frame)
    quiet.predict(frame)
    assert capfd.readouterr() == ("", "")
    loud = classifier(settings, epochs=2, validation_fraction=0.25, verbose=1).fit(frame)
    out, err = capfd.readouterr()
    losses = loud.history_["validation_loss"]
    assert out == ""
    assert "trainable params: 16,384 || all params: 51,680 || trainable%: 31.7028" in err
    told = re.findall(r"epoch \d: validation loss [\d.]+", err)
    assert told == [f"epoch {i}: validation loss {loss:.4f}" for i, loss in enumerate(losses, 1)]
    assert re.search(r"LLMClassifier: 100%.*2/2 .*epoch=2/2", err)
    assert same(quiet, loud)


def test_learning_a_row_by_heart_takes_no_padding_token(settings, frame, tiny, tmp_path):
    """Pad and end are one token here; the end is learned all the same, and padding is not."""
    folder = with_tokenizer(tiny, tmp_path / "model", pad_token="</s>")
    assert same(classifier(settings, base_model=folder, epochs=2).fit(frame), classifier(settings, epochs=2).fit(frame))
