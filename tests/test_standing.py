"""An adapter that stands in its base model is put back with other weights, and nothing shows but the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from torch_side import classifier, generator, same, weights

from llmfit import base_model, inference, keeping, scoring, training
from llmfit.adapters.methods import lora
from llmfit.base_model import clear_cache, load_base_model
from llmfit.exceptions import ModelLoadError, PackingWarning

ADAPTERS: dict[str, Any] = {
    "lora": {"type": "lora", "r": 4},
    "ranks by layer": {"type": "lora", "r": 4, "rank_pattern": {"q_proj": 2}, "dropout": 0.1, "use_rslora": True},
    "dora": {"type": "dora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
    "biases": {"type": "lora", "r": 2, "bias": "lora_only"},
    "a head to save": {"type": "lora", "r": 2, "modules_to_save": ["lm_head"]},
    "from the weights": {"type": "lora", "r": 2, "init_lora_weights": "pissa"},
    "another method": {"type": "vera", "r": 4},
}

copy = lora._copy


@pytest.fixture
def wraps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count how often layers are wrapped."""
    found: list[Any] = []
    wrap = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *args, **kwargs: found.append(args) or wrap(*args, **kwargs))
    return found


def always_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.LoRA, "refillable", False)


def room(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Hold so many bytes, however large the base model is."""
    monkeypatch.setattr(keeping, "MOST_BYTES", most)
    monkeypatch.setattr(keeping, "SHARE", 10**9)


def held(base: Any) -> bool:
    """Whether anything stands that is not in use."""
    standing = base._standing
    return any(one is not standing.in_use or one.drawn for one in standing._known)


def full(base: Any, work: Any, tries: list[bool]) -> Any:
    """Do some work, and run out of memory at its end while anything stands that is not in use; note each try."""

    def do(*args: Any, **kwargs: Any) -> Any:
        found = work(*args, **kwargs)
        tries.append(held(base))
        if tries[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    return do


def answers(settings: Any, frame: pd.DataFrame, adapter: Any, **changed: Any) -> list[Any]:
    """What comes out of fits, predictions and a continued fit in turn, over one base model."""
    found: list[Any] = []
    rows, long = frame.head(8), frame.assign(text=frame["text"] * 60)
    one = classifier(settings, adapter=adapter, **changed)
    other = classifier(settings, adapter=adapter, learning_rate=1e-2, **changed)
    for model in (one, other, one):
        model.fit(rows)
        found += [weights(model), model.history_["loss"].to_numpy(), model.predict_proba(rows)]
    found += [other.predict_proba(rows), one.predict_proba(long), one.predict_proba(rows)]
    found += [weights(one.set_params(warm_start=True).fit(rows)), one.predict_proba(rows)]
    return found


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget afterwards what is seen of a base model meanwhile."""
    yield
    clear_cache()


def alike(found: list[Any], expected: list[Any]) -> None:
    """See that all that came out is the same, to the last bit."""
    for mine, right in zip(found, expected, strict=True):
        if isinstance(mine, dict):
            assert mine.keys() == right.keys()
            assert all(torch.equal(mine[key], right[key]) for key in mine)
        else:
            np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_results_are_those_of_layers_that_are_wrapped_anew(
    name: str, settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answers(settings, frame, ADAPTERS[name])
    always_anew(monkeypatch)
    alike(found, answers(settings, frame, ADAPTERS[name]))


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": True}, {"quantization": 8}, {"dtype": "bfloat16"}])
def test_the_results_are_the_same_however_the_base_is_lent(
    changed: Any, settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answers(settings, frame, {"r": 4}, **changed)
    always_anew(monkeypatch)
    for mine, plain in zip(found, answers(settings, frame, {"r": 4}, **changed), strict=True):
        if not isinstance(mine, dict):
            np.testing.assert_array_equal(mine, plain)


def test_predictions_wrap_nothing_and_a_search_as_often_as_a_rank_is_new(
    settings: Any, frame: pd.DataFrame, wraps: list[Any]
) -> None:
    model = classifier(settings, adapter={"r": 4}).fit(frame)
    model.predict_proba(frame)
    model.predict(frame)
    assert len(wraps) == 1
    grid = {"adapter__r": [2, 8], "learning_rate": [1e-3, 1e-2]}
    GridSearchCV(classifier(settings), grid, cv=2, refit=False).fit(frame[["text"]], frame["label"])
    assert len(wraps) == 1 + 2
    model.predict(frame)
    assert len(wraps) == 1 + 2


def test_adapters_of_several_ranks_stand_beside_one_another(
    settings: Any, frame: pd.DataFrame, wraps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a search whose folds are the outer loop; until their weights are more than are held, oldest first."""
    ranks, rows = [2, 4, 8], frame.head(8)

    def in_turn() -> list[Any]:
        models = [classifier(settings, adapter={"r": r, "alpha": 2 * r}, learning_rate=1e-2) for r in ranks]
        fits = [model.fit(rows).predict_proba(rows) for _ in range(2) for model in models]
        return [*fits, *(model.predict_proba(rows) for model in models)]

    found = in_turn()
    assert len(wraps) == 3
    one = sum(tensor.nbytes for tensor in weights(classifier(settings, adapter={"r": 8}).fit(rows)).values())
    room(monkeypatch, 2 * one + 1)
    clear_cache()
    wraps.clear()
    np.testing.assert_array_equal(found, in_turn())
    assert len(wraps) == 9  # every one is gone before it is asked for again
    always_anew(monkeypatch)
    np.testing.assert_array_equal(found, in_turn())


def test_a_larger_base_model_holds_larger_adapters(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, wraps: list[Any]
) -> None:
    """Two of them, with what was drawn for them, come to just as many bytes as may be, or to more: one goes."""
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    one, other = (classifier(settings, dtype="float32", adapter={"r": r}) for r in (1, 2))
    size = 2 * sum(tensor.nbytes for model in (one, other) for tensor in weights(model.fit(frame)).values())
    monkeypatch.setattr(keeping, "MOST_BYTES", 0)
    for footprint, wrapped in ((keeping.SHARE * size, 2), (keeping.SHARE * (size - 1), 3)):
        monkeypatch.setattr(base, "memory_footprint", footprint)
        base._standing.forget()
        wraps.clear()
        for model in (one, other):
            model.fit(frame)
        for model in (one, other):
            model.predict(frame)
        assert len(wraps) == wrapped


def test_where_memory_runs_out_nothing_stands_any_more(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while another adapter is put in, nor while even a single row is read."""
    first = classifier(settings, adapter={"r": 2}).fit(frame)
    base, expected, tries = first._fitted_base(), first.predict_proba(frame.head(1)), []
    base._standing.forget()
    classifier(settings, adapter={"r": 4}).fit(frame)
    with monkeypatch.context() as patch:
        patch.setattr(peft, "get_peft_model", full(base, peft.get_peft_model, tries))
        found = classifier(settings, adapter={"r": 2}).fit(frame)
    assert same(found, first)
    assert [one.form[0].r for one in base._standing._known] == [2]
    monkeypatch.setattr(scoring, "completion_states", full(base, scoring.completion_states, tries))
    np.testing.assert_array_equal(found.predict_proba(frame.head(1)), expected)
    assert tries == [True, False, True, False]


def test_a_step_is_done_again_without_what_stood(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many tokens as before, and without a word: there was enough memory after all."""
    first, tries = classifier(settings, adapter={"r": 2}).fit(frame), []
    monkeypatch.setattr(training, "_accumulate", full(first._fitted_base(), training._accumulate, tries))
    again = classifier(settings, adapter={"r": 2}).fit(frame)
    assert tries[0]
    assert not any(tries[1:])
    assert same(again, first)


def test_a_base_model_is_loaded_where_adapters_of_another_stood(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tries = classifier(settings).fit(frame)._fitted_base(), []
    monkeypatch.setattr(base_model, "_read", full(base, base_model._read, tries))
    load_base_model(settings["base_model"], device="cpu", dtype="float64")
    assert tries == [True, False]


def test_no_more_adapters_stand_than_a_few(settings: Any, frame: pd.DataFrame) -> None:
    """Of tiny ones many would have room, each with layers of its own."""
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    for alpha in range(1, keeping.MOST + 4):
        classifier(settings, dtype="float32", adapter={"r": 1, "alpha": alpha}).fit(frame.head(4))
    assert len(base._standing._known) == keeping.MOST


def test_another_seed_draws_anew(settings: Any, frame: pd.DataFrame, wraps: list[Any]) -> None:
    first, second = (weights(classifier({**settings, "random_state": seed}).fit(frame)) for seed in (0, 1))
    assert len(wraps) == 2
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_the_base_model_is_as_it_was_and_large_adapters_are_not_held(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, wraps: list[Any]
) -> None:
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    modules = [type(module) for module in base.model.modules()]
    room(monkeypatch, 1000)
    base._standing.forget()
    classifier(settings, dtype="float32").fit(frame).predict(frame)
    assert len(wraps) == 2
    monkeypatch.undo()
    classifier(settings, dtype="float32").fit(frame).predict(frame)
    after = base.model.state_dict()
    assert [type(module) for module in base.model.modules()] == modules
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_fit_that_failed_leaves_nothing_behind(settings: Any, frame: pd.DataFrame) -> None:
    def stop(state: Any) -> None:
        if state.step == 1:
            raise KeyError("stop")

    plain = classifier(settings).fit(frame).predict_proba(frame)
    with pytest.raises(KeyError):
        classifier(settings, callbacks=[stop]).fit(frame)
    np.testing.assert_array_equal(classifier(settings).fit(frame).predict_proba(frame), plain)


@pytest.mark.filterwarnings("ignore:.*reached max_new_tokens")
def test_what_is_drawn_in_a_prediction_is_the_same_with_layers_wrapped_anew(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = {"generation": {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}}
    model = generator(settings, **drawing).fit(frame)
    first, second = model.predict(frame), model.predict(frame)
    always_anew(monkeypatch)
    assert first.tolist() == second.tolist() == model.predict(frame).tolist()
    assert first.nunique() > 1


@pytest.mark.filterwarnings("ignore:.*reached max_new_tokens")
def test_what_is_drawn_is_drawn_again_where_memory_ran_out(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = {"generation": {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}}
    model = generator(settings, adapter={"r": 2}, **drawing).fit(frame)
    expected, base, tries = model.predict(frame), model._fitted_base(), []
    classifier(settings, adapter={"r": 4}).fit(frame)
    monkeypatch.setattr(inference, "_generate_batch", full(base, inference._generate_batch, tries))
    assert model.predict(frame).tolist() == expected.tolist()
    assert tries[:2] == [True, False]


def doubled(places: Any, tensors: Any) -> None:
    copy(places, {name: 2 * tensor for name, tensor in tensors.items()})


def without_the_first(places: Any, tensors: Any) -> None:
    copy(dict([*places.items()][1:]), tensors)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("otherwise", [doubled, without_the_first])
def test_where_weights_are_written_otherwise_peft_writes_them_and_says_so_once(
    otherwise: Any, settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answers(settings, frame, {"r": 4})
    clear_cache()  # of what was seen of it, too
    monkeypatch.setattr(lora, "_copy", otherwise)
    with pytest.warns(PackingWarning) as told:
        found = answers(settings, frame, {"r": 4})
    assert [str(one.message) for one in told if one.category is PackingWarning] == [
        "This model cannot have an adapter's weights written by their names (its answers differ): peft writes them, "
        "which takes longer."
    ]
    alike(found, plain)


def test_weights_of_another_rank_say_nothing_of_those_that_belong(
    settings: Any, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = frame.head(8)
    small, large = (classifier(settings, adapter={"r": r}).fit(rows) for r in (2, 4))
    written: list[Any] = []
    monkeypatch.setattr(lora, "_copy", lambda *given: written.append(given) or copy(*given))
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    spec, right, wrong = lora.LoRA(r=4), weights(large), weights(small)
    for tensors in (right, right):  # wrapped, and written to what stands
        with base.attach(spec, tensors, longest=20):
            pass
    assert written
    with pytest.raises(ModelLoadError), base.attach(spec, wrong, longest=20):
        pass
    for other, tensors in ((spec, right), (lora.LoRA(r=2), wrong), (lora.LoRA(r=2), wrong), (spec, right)):
        with base.attach(other, tensors, longest=20):
            pass
    before = len(written)
    for other, tensors in ((lora.LoRA(r=2), wrong), (spec, right)):
        with base.attach(other, tensors, longest=20) as model:
            assert all(torch.equal(place, tensors[name]) for name, place in lora._places(model, tensors).items())
    assert len(written) == before + 2
