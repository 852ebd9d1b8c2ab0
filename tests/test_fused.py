"""Candidates that train side by side: each as if it had been fitted alone, scored as scikit-learn's own grid scores."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, ParameterGrid, StratifiedKFold
from sklearn.pipeline import Pipeline
from torch_side import classifier, furthest, generator, make_other, no_collecting, weights
from transformers.models.llama.modeling_llama import LlamaMLP

import llmfit
from llmfit import LLMEstimator, selfcheck, together
from llmfit.adapters import bank, fused, resolve_adapter
from llmfit.adapters.bank import start_of
from llmfit.base_model import load_base_model
from llmfit.estimators import joining
from llmfit.estimators.base import BaseLLM
from llmfit.exceptions import MemoryWarning, PackingWarning, ParameterError, TrainingError
from llmfit.packing import Layouts
from llmfit.search import FusedGridSearchCV, make_search

# What a process imports at its first fit warns of torch.jit, and pytest.warns hands that on.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

GRID = {"adapter__r": [2, 8], "adapter__dropout": [0.0, 0.3], "learning_rate": [1e-3, 1e-2], "random_state": [0, 1]}
SMALL = {"adapter__r": [2, 4], "adapter__dropout": [0.0, 0.3]}
OWN: list[dict[str, Any]] = [  # of one candidate each: what else a fit alone decides by itself
    {"weight_decay": 0.5},
    {"schedule": "linear", "warmup": 0.5},
    {"max_grad_norm": 0.1},
    {"max_grad_norm": None, "optimizer": "sgd"},
    {"adapter__alpha": 3, "adapter__use_rslora": True},
    {"adapter__dropout": 0.2},
    {"adapter__init_lora_weights": "gaussian"},
    {"adapter__rank_pattern": {"q_proj": 3}, "adapter__loraplus_lr_ratio": 8.0},
    {"epochs": 3, "batch_size": 3},
    {"template": {"task": "Say what it is, in a word.", "template": "{task} {text}"}},
]


@pytest.fixture
def ragged(frame: pd.DataFrame) -> pd.DataFrame:
    """Sixteen rows whose lengths differ."""
    rows = pd.concat([frame, frame.assign(text=frame["text"] + ", they say")], ignore_index=True)
    return rows.assign(text=[text + " so" * (i % 5) for i, text in enumerate(rows["text"])])


@pytest.fixture
def one(settings: dict[str, Any]) -> llmfit.LLMClassifier:
    return classifier(settings, adapter="lora", epochs=2, batch_size=4)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many train at once, step by step."""
    seen: list[int] = []
    step = together._one_step
    monkeypatch.setattr(
        together,
        "_one_step",
        lambda model, bank, active, room: (seen.append(len(active)), step(model, bank, active, room))[1],
    )
    return seen


def candidates(estimator: Any, grid: Any) -> list[Any]:
    return [clone(estimator).set_params(**params) for params in ParameterGrid(grid)]


def assert_as_alone(outcomes: list[joining.Outcome], rows: pd.DataFrame, most: float = 1e-4) -> None:
    for outcome in outcomes:
        assert outcome.error is None
        fitted, alone = outcome.estimator, clone(outcome.estimator).fit(rows)
        assert furthest(fitted, alone) <= most
        assert fitted.trainable_parameters_ == alone.trainable_parameters_
        for column in ("step", "epoch", "learning_rate", "tokens", "loss", "grad_norm"):
            np.testing.assert_allclose(fitted.history_[column], alone.history_[column], rtol=1e-4, err_msg=column)
        np.testing.assert_allclose(fitted.predict_proba(rows), alone.predict_proba(rows), atol=1e-4)


# 1. Each as alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_tokens", "steps"), [(4096, [16] * 8), ("auto", [8] * 16)])
def test_every_candidate_is_what_it_is_alone(batch_tokens, steps, one, ragged, beside):
    one.set_params(batch_tokens=batch_tokens)
    outcomes = joining.fit_together(candidates(one, GRID), ragged, None, {})
    assert beside == steps  # two epochs of four steps; a CPU gains nothing by more than half as many at once
    assert_as_alone(outcomes, ragged)
    assert len({outcome.estimator.history_["loss"].iloc[-1] for outcome in outcomes}) == 16


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-9), ("float32", 1e-4)])
def test_what_a_fit_decides_by_itself_stays_its_own(dtype, most, one, ragged, beside):
    one.set_params(dtype=dtype)
    given = [{name: [value] for name, value in own.items()} for own in OWN]
    outcomes = joining.fit_together(candidates(one, given), ragged, None, {})
    assert beside[0] == len(OWN)
    assert beside[-1] == 1  # three epochs of more steps
    assert_as_alone(outcomes, ragged, most)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("target_modules", [["q_proj", "k_proj"], ["q_proj"], ["k_proj", "q_proj", "k_proj"]]),
        ("target_modules", ["q_proj", ["v_proj"], ["q_proj"]]),
        ("exclude_modules", [["q_proj"], ["k_proj"], "q_proj"]),
        ("layers_to_transform", [[0], [1], 0]),
    ],
    ids=str,
)
def test_those_that_change_other_layers_train_apart(name, values, one, ragged, beside):
    """Else the gradients of what layers read would be summed up in another order than alone."""
    outcomes = joining.fit_together(candidates(one, {f"adapter__{name}": values}), ragged, None, {})
    assert beside == [2] * 8
    assert_as_alone(outcomes, ragged, 0.0)


def test_a_bank_is_of_adapters_that_change_the_same_layers():
    starts = [bank.Start({}, {name: bank.Update("a", "b", 1.0, 0.0)}, 0, 0) for name in ("one", "other")]
    with pytest.raises(bank.BankError, match="different layers"):
        bank.Bank(starts)


def test_adapters_that_are_left_to_peft_train_one_by_one(one, ragged, beside, monkeypatch):
    """They would be rounded otherwise than in a bank, and may draw otherwise what drops out."""
    monkeypatch.setattr(fused, "_are_alike", lambda *_: False)
    llmfit.clear_cache()
    outcomes = joining.fit_together(candidates(one, SMALL), ragged, None, {})
    assert not beside
    assert_as_alone(outcomes, ragged, 0.0)
    llmfit.clear_cache()


@pytest.mark.parametrize(
    ("changed", "together"),
    [
        ({}, [3, 1, 2, 1]),
        ({"adapter__target_modules": [["q_proj", "v_proj"]]}, [1] * 7),
        ({"adapter__dropout": [0.0, 0.3]}, [3, 1, 2, 1]),
    ],
    ids=["all layers", "some layers", "dropout"],
)
def test_changed_layers_that_read_the_same_are_computed_together(changed, together, one, ragged, monkeypatch):
    """As alone, or numbers of few bits would be rounded otherwise, and steps go apart from there."""
    found: list[int] = []
    real = bank.adapted
    monkeypatch.setattr(
        bank, "adapted", lambda x, layers, *given: (found.append(len(layers)), real(x, layers, *given))[1]
    )
    outcomes = joining.fit_together(candidates(one, {"learning_rate": [1e-3, 1e-2], **changed}), ragged, None, {})
    assert found == together * (len(found) // len(together))
    assert len(found) >= 16 * len(together)  # two layers, two epochs of four steps
    monkeypatch.undo()
    assert_as_alone(outcomes, ragged, 0.0)


SOME = ["q_proj", "v_proj"]


@pytest.mark.parametrize("targets", ["all-linear", SOME], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_are_to_the_bit_what_they_are_alone(dtype, targets, one, ragged, beside):
    """With one thread, and widths that vectors divide: others compute the last numbers by themselves."""
    one.set_params(dtype=dtype, adapter__target_modules=targets)
    outcomes = joining.fit_together(candidates(one, {**SMALL, "learning_rate": [1e-2]}), ragged, None, {})
    assert beside == [4] * 8
    for outcome in outcomes:
        alone = clone(outcome.estimator).fit(ragged)
        assert furthest(outcome.estimator, alone) == 0.0
        assert outcome.estimator.history_["loss"].tolist() == alone.history_["loss"].tolist()
        assert all(tensor.dtype != torch.bfloat16 for tensor in weights(outcome.estimator).values())


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """How many rows are multiplied at once, and into how many columns: some processors round by that."""
    seen: set[tuple[int, int]] = set()

    def watch(owner: Any, name: str, first: int = 0, columns: int = -1) -> None:
        real = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            one, other = given[first : first + 2]
            seen.add((one.reshape(-1, one.shape[-1]).shape[0], other.shape[columns]))
            return real(*given, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(torch.nn.functional, "linear", columns=0)
    watch(torch, "mm")
    watch(torch.Tensor, "__matmul__")
    watch(torch, "addmm", 1)
    watch(torch.Tensor, "addmm_", 1)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("changed", [{}, {"target_modules": SOME}, {"dropout": 0.3}], ids=str)
def test_products_have_the_rows_that_they_have_alone(changed, kind, settings, tiny, tmp_path, ragged, sizes, beside):
    folder = tiny if kind == "llama" else make_other(tmp_path / kind, tiny, kind)  # which has biases
    one = classifier(settings, base_model=folder, adapter={"type": "lora", "r": 4, **changed}, epochs=1, batch_size=4)
    for _ in range(2):  # the first time, models are looked at
        sizes.clear()
        outcomes = joining.fit_together(candidates(one, {"learning_rate": [1e-3, 1e-2]}), ragged, None, {})
        assert [outcome.error for outcome in outcomes] == [None, None]
    assert {*beside} == {2}
    found = {*sizes}
    sizes.clear()
    clone(one).fit(ragged)
    assert sizes == found


def test_weighed_rows_several_targets_and_texts(settings, ragged):
    rows, weight = ragged.assign(size=["small", "big"] * 8), np.arange(16) % 3
    several = LLMEstimator(**{**settings, "target": ["label", "size"], "loss_weights": {"label": 2.0}, "epochs": 2})
    chosen = LLMEstimator(**{**settings, "target": "label", "features": "text", "class_weight": "balanced"})
    for estimator in (several, chosen, generator(settings)):
        every = candidates(estimator, {"adapter__r": [2, 4], "learning_rate": [1e-3, 1e-2]})
        for outcome in joining.fit_together(every, rows, None, {"sample_weight": weight}):
            alone = clone(outcome.estimator).fit(rows, sample_weight=weight)
            assert outcome.error is None
            assert outcome.estimator.history_["loss"].tolist() == pytest.approx(alone.history_["loss"].tolist())
            inner, other = (getattr(est, "estimator_", est) for est in (outcome.estimator, alone))
            assert furthest(inner, other) < 1e-4


def test_a_model_of_another_family(settings, tiny, tmp_path, ragged, beside):
    folder = make_other(tmp_path / "qwen2", tiny, "qwen2")  # biases beside q, k and v
    one = classifier(settings, base_model=folder, epochs=2, batch_size=4)
    assert_as_alone(joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {}), ragged)
    assert set(beside) == {2}


def test_a_saved_candidate_is_the_same_again(one, ragged, tmp_path):
    fitted = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})[1].estimator
    fitted.save(tmp_path / "model")
    found = llmfit.load(tmp_path / "model").predict_proba(ragged)
    np.testing.assert_array_equal(found, fitted.predict_proba(ragged))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_among_others_computes_to_the_bit_what_it_does_alone(dtype, settings):
    base = load_base_model(settings["base_model"], device="cpu", dtype=dtype)
    spec, ids = resolve_adapter({"type": "lora", "r": 4}), torch.arange(5, 45).view(2, 20)
    found, starts = [], []

    def run(model: Any, trained: Any) -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        found.append({"logits": logits.detach(), **{name: p.grad for name, p in trained.items()}})

    with base.attach(spec, training=True) as model:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
        starts = [start_of(spec, model) for _ in range(2)]
        run(model, trained)
    beside = bank.Bank(starts)
    with base.attach(beside, training=True) as model, beside.reading([(1, ids.numel())]):
        run(model, starts[1].parameters)
    alone, among = found
    assert alone.keys() == among.keys()
    assert len(alone) == 1 + 2 * 7 * 2
    for name, tensor in alone.items():
        assert tensor.abs().max() > 0
        assert torch.equal(tensor, among[name]), name


def test_the_base_model_is_bit_by_bit_what_it_was(one, settings, ragged):
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kept = {name: dict(vars(module)) for name, module in base.model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in base.model.named_modules()}
    draws = torch.get_rng_state()
    joining.fit_together(candidates(one, SMALL), ragged, None, {})
    assert torch.equal(draws, torch.get_rng_state())
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, module in base.model.named_modules():
        assert vars(module).keys() == kept[name].keys()
        assert len(module._forward_hooks) == hooks[name]
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


# 2. Budgets, passes, memory -----------------------------------------------------------------------------------


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every sequence that goes through the network in training."""
    seen: list[int] = []
    forward = torch.nn.Embedding.forward

    def counted(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    return seen


def test_one_pass_a_step_for_all(one, ragged, monkeypatch):
    seen = passes(monkeypatch)
    joining.fit_together(candidates(one, SMALL), ragged, None, {})
    assert len(seen) == 8
    for estimator in candidates(one, SMALL):
        estimator.fit(ragged)
    assert len(seen) == 8 + 4 * 8
    assert sum(seen[:8]) == sum(seen[8:])


def test_a_pass_takes_what_the_budget_holds(one, ragged, beside, monkeypatch):
    one.set_params(batch_tokens=550, adapter__dropout=0.3)
    seen = passes(monkeypatch)
    outcomes = joining.fit_together(candidates(one, {"random_state": range(6)}), ragged, None, {})
    assert max(seen) <= 550
    assert set(beside) == {3}  # two crews of three rather than four and two
    assert_as_alone(outcomes, ragged)


def test_a_budget_smaller_than_one_candidate(one, ragged, beside):
    one.set_params(batch_tokens=64)
    outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert not beside
    assert_as_alone(outcomes, ragged, 1e-9)


def test_steps_longer_than_the_budget_are_cut_as_alone(one, frame, beside, monkeypatch):
    """One long row: the steps are short in the mean, and one of them is cut into parts, dropout's draws with it."""
    long = pd.concat([frame] * 4, ignore_index=True)
    long.loc[3, "text"] += " and so on" * 20
    one.set_params(batch_tokens=270, adapter__dropout=0.3, epochs=1)
    seen = passes(monkeypatch)
    outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), long, None, {})
    assert beside == [2] * 8
    assert len(seen) > 8
    assert_as_alone(outcomes, long)


def test_where_memory_runs_out_passes_get_smaller(one, ragged, beside, monkeypatch):
    no_collecting(monkeypatch)
    forward = torch.nn.Embedding.forward

    def scarce(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() > 300 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", scarce)
    with pytest.warns(MemoryWarning):
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 3, 4, 8]}), ragged, None, {})
    assert set(beside) == {4}
    assert_as_alone(outcomes, ragged)


# 3. Who cannot ------------------------------------------------------------------------------------------------

ALONE: dict[str, dict[str, Any]] = {
    "dora": {"adapter": "dora"},
    "a start that moves the base": {"adapter": {"init_lora_weights": "pissa"}},
    "a layer in full": {"adapter": {"modules_to_save": ["lm_head"]}},
    "tokens": {"adapter": {"trainable_token_indices": [5]}},
    "the words": {"adapter": {"target_modules": ["lm_head"]}},
    "a head": {"head": "linear"},
    "4 bits": {"quantization": 4},
    "validation": {"validation_fraction": 0.25},
    "checkpointing": {"gradient_checkpointing": True},
    "callbacks": {"callbacks": [llmfit.Callback()]},
}


@pytest.mark.parametrize("changed", ALONE.values(), ids=ALONE)
def test_others_are_fitted_one_at_a_time(changed, one, ragged, beside, monkeypatch):
    one.set_params(**changed)
    search = FusedGridSearchCV(one, {"learning_rate": [1e-3, 1e-2]}, cv=2, refit=False).fit(ragged)
    assert not beside
    plain = GridSearchCV(one, {"learning_rate": [1e-3, 1e-2]}, cv=2, refit=False).fit(ragged, ragged["label"])
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"])


def test_a_base_model_with_dropout_is_trained_alone(settings, tiny, tmp_path, ragged, beside):
    one = classifier(settings, base_model=make_other(tmp_path / "gpt2", tiny, "gpt2"), epochs=1)
    outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert not beside


def test_a_model_that_cannot_pack(one, ragged, beside, monkeypatch):
    monkeypatch.setattr(joining, "packable", lambda *_, **__: None)
    assert_as_alone(joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {}), ragged)
    assert not beside


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["what it says", "its gradients"])
def test_a_model_that_mixes_what_stands_side_by_side(fault, dtype, one, ragged, beside, monkeypatch):
    one = one.set_params(dtype=dtype)
    monkeypatch.setattr(selfcheck, "_known", type(selfcheck._known)())
    read, recorded = together.completion_logits, bank._recorded
    if fault == "what it says":
        monkeypatch.setattr(
            together,
            "completion_logits",
            lambda model, batch: read(model, batch) * (1 + isinstance(batch.layout, Layouts)),
        )
    else:
        monkeypatch.setattr(bank, "_recorded", lambda x, *given: recorded(2 * x - x.detach(), *given))  # x learns twice
    with pytest.warns(PackingWarning) as caught:
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert next(str(warning.message) for warning in caught if warning.category is PackingWarning) == (
        "This model cannot read rows of several adapters at once (its answers differ): adapters are trained one by "
        "one, which takes longer."
    )
    assert not beside
    assert [outcome.error for outcome in outcomes] == [None, None]


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward layer that reads its tokens half by half."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def halves(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([forward(self, part) for part in x.split(x.shape[1] // 2, dim=1)], dim=1)

    monkeypatch.setattr(selfcheck, "_known", type(selfcheck._known)())
    monkeypatch.setattr(LlamaMLP, "forward", halves)


@pytest.mark.usefixtures("halved")
def test_a_layer_that_sees_some_tokens_only(one, ragged, beside):
    with pytest.warns(PackingWarning, match="not every layer sees all tokens"):
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert not beside
    assert [outcome.error for outcome in outcomes] == [None, None]


@pytest.mark.usefixtures("halved")
def test_a_layer_that_sees_some_tokens_only_though_others_of_the_model_see_all(one, ragged, beside):
    grid = {"adapter__r": [2, 4], "adapter__target_modules": [["q_proj"]]}
    assert_as_alone(joining.fit_together(candidates(one, grid), ragged, None, {}), ragged)
    assert beside == [2] * 8
    with pytest.warns(PackingWarning, match=r"several adapters at once \(not every layer sees all tokens\)"):
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert_as_alone(outcomes, ragged, 1e-9)
    assert len(beside) == 8


# 4. Failures --------------------------------------------------------------------------------------------------


FAILED = (r"ignore:\s*\d fits failed", "ignore:One or more of the test scores are non-finite")


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A loss that is no number from the second step on of a fit with a rate of 0.5."""
    begin = together._begin

    def begun(*args: Any) -> Any:
        member = begin(*args)
        if member.run.settings.learning_rate == 0.5:
            own = next(iter(member.run.parameters.values()))
            step = member.run.optimizer.step
            member.run.optimizer.step = lambda: (step(), own.data.fill_(torch.nan))[0]
        return member

    monkeypatch.setattr(together, "_begin", begun)


@pytest.mark.usefixtures("breaking")
def test_a_candidate_that_fails_leaves_the_others(one, ragged, beside):
    every = candidates(one, {"learning_rate": [1e-3, 0.5, 1e-2]})
    first, failed, last = joining.fit_together(every, ragged, None, {})
    assert isinstance(failed.error, TrainingError)
    assert str(failed.error).startswith("The loss is nan at step 2 of 8 (rows ")
    assert beside == [3, 3, 2, 2, 2, 2, 2, 2]
    assert_as_alone([first, last], ragged)


@pytest.mark.filterwarnings(*FAILED)
@pytest.mark.usefixtures("breaking")
def test_a_failed_candidate_has_the_error_score(one, ragged):
    grid = {"learning_rate": [1e-3, 0.5]}
    search = FusedGridSearchCV(one, grid, cv=2).fit(ragged)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, True]
    assert search.best_params_ == {"learning_rate": 1e-3}
    with pytest.raises(TrainingError, match="The loss is nan"):
        FusedGridSearchCV(one, grid, cv=2, error_score="raise").fit(ragged)


@pytest.mark.filterwarnings(*FAILED)
def test_parameters_that_cannot_be_used(one, ragged, beside):
    search = FusedGridSearchCV(one, {"adapter__r": [2, 4, 0], "epochs": [1]}, cv=2).fit(ragged)
    assert np.isnan(search.cv_results_["mean_test_score"]).tolist() == [False, False, True]
    assert set(beside) == {2}


# 5. The search ------------------------------------------------------------------------------------------------


def both(one: Any, grid: Any, rows: pd.DataFrame, **settings: Any) -> tuple[Any, Any]:
    fused = FusedGridSearchCV(one, grid, **settings).fit(rows, rows["label"])
    plain = GridSearchCV(one, grid, **settings).fit(rows, rows["label"])
    return fused, plain


def assert_same_results(fused: Any, plain: Any) -> None:
    assert fused.cv_results_.keys() == plain.cv_results_.keys()
    assert fused.cv_results_["params"] == plain.cv_results_["params"]
    for name in plain.cv_results_:
        if "score" in name and "time" not in name:
            np.testing.assert_allclose(fused.cv_results_[name], plain.cv_results_[name], atol=1e-4, err_msg=name)


def test_scores_are_those_of_scikit_learns_grid(one, ragged, beside):
    fused, plain = both(one, SMALL, ragged, cv=2, scoring="neg_log_loss", return_train_score=True)
    assert set(beside) == {4}
    assert_same_results(fused, plain)
    assert fused.best_params_ == plain.best_params_
    assert fused.best_score_ == pytest.approx(plain.best_score_, abs=1e-4)
    assert furthest(fused.best_estimator_, plain.best_estimator_) == 0  # the refit is the fit alone
    assert type(fused.best_estimator_) is type(one)
    assert not {*vars(fused)} - {*vars(plain)} - {"checkpoint_dir"}
    times = fused.cv_results_["mean_fit_time"]
    assert times.max() < 2 * times.min()


def test_a_mixed_grid(one, ragged, beside):
    grid = [{"adapter": ["ia3"]}, {"adapter": ["lora"], "adapter__r": [2, 4]}, {"adapter": [None]}]
    grid[1]["epochs"] = [1, 2]
    fused, plain = both(
        one, grid, ragged, cv=StratifiedKFold(2), scoring=["accuracy", "neg_log_loss"], refit="accuracy"
    )
    assert beside == [4, 4, 2, 2] * 2
    assert_same_results(fused, plain)


def test_other_estimators_are_searched_as_usual(one, frame, ragged, beside):
    pipe = Pipeline([("model", one)])
    fused, plain = both(pipe, {"model__adapter__r": [2, 4]}, ragged, cv=2)
    assert_same_results(fused, plain)
    fused = FusedGridSearchCV(LLMEstimator(**one.get_params(deep=False)), {"adapter__r": [2, 4]}, cv=2)
    assert not beside
    fused.fit(ragged)
    assert set(beside) == {2}


def test_the_same_rows_twice(one, ragged, beside):
    every = np.arange(16)
    fused, plain = both(one, {"adapter__r": [2, 4]}, ragged, cv=[(every, every), (every, every)], refit=False)
    assert len(beside) == 8
    assert_same_results(fused, plain)


def test_weights_reach_every_fit(one, ragged):
    weight = np.arange(16) % 3 + 0.5
    one.set_params(epochs=1)
    given = {"cv": 2, "scoring": "neg_log_loss", "refit": False}
    fused = FusedGridSearchCV(one, {"adapter__r": [2, 4]}, **given).fit(ragged, sample_weight=weight)
    plain = GridSearchCV(one, {"adapter__r": [2, 4]}, **given).fit(ragged, ragged["label"], sample_weight=weight)
    assert_same_results(fused, plain)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        FusedGridSearchCV(one, {"adapter__r": [2, 4]}, error_score="raise", cv=2).fit(ragged, weight=weight)


def test_candidates_whose_scores_are_known_are_not_trained(one, ragged, beside, tmp_path):
    given = {"cv": 2, "checkpoint_dir": tmp_path, "refit": False, "scoring": "neg_log_loss"}
    first = make_search(one, {"adapter__r": [2, 4]}, "fused", **given).fit(ragged)
    beside.clear()
    again = make_search(one, {"adapter__r": [2, 3, 4, 5]}, "fused", **given).fit(ragged)
    assert set(beside) == {2}  # of rank 3 and 5
    scores = again.cv_results_["mean_test_score"]
    assert scores[[0, 2]].tolist() == first.cv_results_["mean_test_score"].tolist()


def test_more_processes_are_refused(one, ragged):
    with pytest.raises(ParameterError) as caught:
        FusedGridSearchCV(one, {"adapter__r": [2, 4]}, n_jobs=2).fit(ragged)
    assert str(caught.value) == (
        "The 'n_jobs' parameter of FusedGridSearchCV must be None or 1, as one process trains candidates side by side. "
        "Got 2 instead."
    )


def test_it_is_cloned_and_set_as_scikit_learns_own(one):
    search = FusedGridSearchCV(one, {"adapter__r": [2, 4]}, cv=2)
    assert clone(search).get_params().keys() == {*GridSearchCV(one, {}).get_params(), "checkpoint_dir"}
    assert clone(search).set_params(estimator__adapter__r=3, cv=5).cv == 5


def test_a_bar_says_how_many_train(one, ragged, capsys):
    one.set_params(verbose=1)
    joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert "LLMClassifier, 2 side by side" in capsys.readouterr().err


# 5. One candidate's trouble is its own; nothing is kept or loaded for longer than it is needed ------------------


def test_an_optimiser_that_cannot_be_made_fails_its_candidate_alone(one, ragged, beside):
    bad = {"type": "sgd", "nesterov": True, "momentum": 0.0}
    grid = {"optimizer": ["adamw", bad], "adapter__r": [2, 4]}
    outcomes = joining.fit_together(candidates(one, grid), ragged, None, {})
    assert [outcome.error is None for outcome in outcomes] == [True, False, True, False]
    assert beside == [2] * 8
    assert_as_alone(outcomes[::2], ragged)


def test_an_optimiser_that_fails_on_its_way_fails_its_candidate_alone(one, ragged, monkeypatch):
    step = torch.optim.AdamW.step

    def breaking_step(self: Any, *args: Any) -> Any:
        if self.param_groups[0]["lr"] > 2e-3:
            raise RuntimeError("no such kernel")
        return step(self, *args)

    one.set_params(schedule="constant", warmup=0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", breaking_step)
        outcomes = joining.fit_together(candidates(one, {"learning_rate": [1e-3, 5e-3, 2e-3]}), ragged, None, {})
    assert [str(outcome.error) for outcome in outcomes] == ["None", "no such kernel", "None"]
    assert_as_alone(outcomes[::2], ragged)


@pytest.mark.usefixtures("breaking")
def test_an_error_keeps_nothing_of_the_others(one, ragged):
    outcomes = joining.fit_together(candidates(one, {"learning_rate": [0.5, 1e-2]}), ragged, None, {})
    error = outcomes[0].error
    assert isinstance(error, TrainingError)
    assert outcomes[1].error is None
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_an_error_of_a_fit_alone_keeps_no_other_errors(one, ragged):
    (outcome,) = joining.fit_together([clone(one).set_params(random_state="a")], ragged, None, {})
    error = outcome.error
    assert isinstance(error, ParameterError)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_memory_that_runs_out_in_the_optimiser_s_step(one, ragged, beside, monkeypatch):
    no_collecting(monkeypatch)
    step, alive = torch.optim.AdamW.step, weakref.WeakSet()

    def scarce(self: Any, *args: Any) -> Any:
        alive.add(self)
        if len(alive) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", scarce)
    with pytest.warns(MemoryWarning) as caught:
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 3, 4, 8]}), ragged, None, {})
    assert [str(warning.message) for warning in caught if warning.category is MemoryWarning] == [
        "Memory does not hold 4 candidates side by side: going on with fewer at once."
    ]
    assert beside == [4, *[2] * 16]
    assert_as_alone(outcomes, ragged)


@pytest.mark.parametrize("limit", [350, 500])
def test_dropout_draws_as_alone_where_memory_runs_out(limit, one, ragged, monkeypatch):
    one.set_params(adapter__dropout=0.3)
    forward = torch.nn.Embedding.forward

    def scarce(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() > limit and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, ids)

    no_collecting(monkeypatch)
    monkeypatch.setattr(torch.nn.Embedding, "forward", scarce)
    with pytest.warns(MemoryWarning):
        outcomes = joining.fit_together(
            candidates(one, {"adapter__r": [2, 4, 8], "random_state": [0, 1]}), ragged, None, {}
        )
    assert_as_alone(outcomes, ragged)


def test_base_models_are_lent_one_after_the_other(one, settings, tiny, ragged, tmp_path, monkeypatch):
    folders = [settings["base_model"], *(make_other(tmp_path / kind, tiny, kind) for kind in ("qwen3", "olmo2"))]
    lent: list[str] = []
    load = BaseLLM._load_base

    def counted(self: Any) -> Any:
        lent.append(self.base_model)
        return load(self)

    monkeypatch.setattr(BaseLLM, "_load_base", counted)
    joining.fit_together(candidates(one, {"adapter__r": [2, 4], "base_model": folders}), ragged, None, {})
    assert lent == [folder for folder in folders for _ in range(2)]


def test_rows_of_several_fits_are_held_once(one, ragged, monkeypatch):
    rows: list[list[int]] = []
    train = joining._train
    monkeypatch.setattr(
        joining, "_train", lambda crew: (rows.extend([*map(id, own.job.rows)] for own in crew), train(crew))[1]
    )
    joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert rows[0] == rows[1]


def test_a_large_candidate_leaves_the_small_ones_together(one, ragged, beside):
    one.set_params(batch_tokens=300)
    outcomes = joining.fit_together(candidates(one, {"batch_size": [2, 16], "adapter__r": [2, 4, 8]}), ragged, None, {})
    assert set(beside) == {3}
    assert_as_alone(outcomes, ragged)


def test_parameters_that_have_no_digest(one, ragged):
    class Locked(llmfit.Callback):
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __deepcopy__(self, _: Any) -> Any:
            return self

    grid = {"callbacks": [None, [Locked()]], "adapter__r": [2, 4]}
    found, plain = both(one, grid, ragged)
    assert_same_results(found, plain)


def test_a_scorer_that_weighs_rows_is_given_the_weights(one, ragged):
    def weighed(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        return 0.0 if sample_weight is None else float(np.sum(sample_weight))

    search = FusedGridSearchCV(one, {"adapter__r": [2, 4]}, cv=2, scoring=weighed, refit=False)
    search.fit(ragged, ragged["label"], sample_weight=np.arange(len(ragged), dtype=float))
    assert search.cv_results_["mean_test_score"].tolist() == [60.0, 60.0]


def test_joblib_is_not_asked(one, ragged, beside):
    with joblib.parallel_config("threading", n_jobs=4):
        FusedGridSearchCV(one, {"adapter__r": [2, 4]}, cv=2, refit=False).fit(ragged, ragged["label"])
    assert set(beside) == {2}
    assert len(beside) == 2 * 2 * 2


@pytest.fixture
def sorting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A layer that sorts its tokens, as some mixtures of experts do, computes rightly alone and mixes adapters."""
    forward = LlamaMLP.forward

    def sorted_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        order = x[0, :, 0].argsort()
        return forward(self, x[:, order])[:, order.argsort()]

    monkeypatch.setattr(LlamaMLP, "forward", sorted_forward)
    llmfit.clear_cache()
    yield
    llmfit.clear_cache()


@pytest.mark.usefixtures("sorting")
def test_adapters_that_are_mixed_up_are_noticed_before_they_have_learned(one, ragged, beside):
    with pytest.warns(PackingWarning, match="rows of several adapters at once"):
        outcomes = joining.fit_together(candidates(one, {"adapter__r": [2, 4]}), ragged, None, {})
    assert not beside
    assert_as_alone(outcomes, ragged)


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_several_targets_that_are_mixed_up_are_noticed(dtype, settings, ragged, beside):
    rows = ragged.assign(size=["small", "big"] * 8)
    several = LLMEstimator(**{**settings, "adapter": "lora", "target": ["label", "size"], "dtype": dtype})
    with pytest.warns(PackingWarning, match="rows of several adapters at once"):
        outcomes = joining.fit_together(candidates(several, {"adapter__r": [2, 4]}), rows, None, {})
    assert not beside
    assert all(outcome.error is None for outcome in outcomes)


ATTENTION, FEEDING = {"adapter__target_modules": [["q_proj"]]}, {"adapter__target_modules": [["up_proj"]]}


@pytest.mark.usefixtures("sorting")
def test_layers_that_mix_adapters_are_looked_at_where_others_do_not(one, ragged, beside):
    before, last = {"adapter__r": [2, 4], **ATTENTION}, {"adapter__r": [2, 4], **FEEDING}
    joining.fit_together(candidates(one, before), ragged, None, {})
    assert beside == [2] * 8
    beside.clear()
    with pytest.warns(PackingWarning, match="rows of several adapters at once"):
        outcomes = joining.fit_together(candidates(one, last), ragged, None, {})
    assert not beside
    assert_as_alone(outcomes, ragged, 1e-9)
