"""What only a CUDA device shows: placement, mixed precision, memory given back, models that move between devices."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import make_encoder, make_encoder_decoder
from sklearn.model_selection import GridSearchCV

import llmfit
from llmfit import LLMClassifier, LLMGenerator, LLMRegressor, checkpoints, inference, scoring, training
from llmfit.adapters import METHODS
from llmfit.packing import attention
from llmfit.search import FusedGridSearchCV, FusedHalvingGridSearchCV

# bitsandbytes says so of models as narrow as these
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:inner dimension")]


def on_gpu(settings: dict[str, object], **changes: object) -> dict[str, object]:
    return {**settings, "device": "auto", "dtype": "auto", "epochs": 20, **changes}


@pytest.mark.parametrize("adapter", ["lora", "full", {"use_dora": True}])
def test_rows_are_learned_by_heart_in_bfloat16(settings: dict, frame: pd.DataFrame, adapter: object) -> None:
    model = LLMClassifier(**on_gpu(settings), features="text", target="label", adapter=adapter).fit(frame)
    assert model.score(frame) == 1.0


def test_a_model_fitted_on_the_gpu_predicts_on_the_cpu(settings: dict, frame: pd.DataFrame, tmp_path) -> None:
    model = LLMClassifier(**on_gpu(settings, dtype="float32"), features="text", target="label").fit(frame)
    model.save(tmp_path / "model")
    loaded = llmfit.load(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(loaded.predict_proba(frame), model.predict_proba(frame), atol=1e-3)


def test_generation_stops_and_is_learned_by_heart(settings: dict, frame: pd.DataFrame) -> None:
    model = LLMGenerator(**on_gpu(settings, epochs=60), features="text", target="label").fit(frame)
    assert model.score(frame) == 1.0


def test_answers_of_packed_prompts_are_those_of_whole_ones(settings, frame, monkeypatch) -> None:
    own = on_gpu(settings, dtype="float32", epochs=2, template="Say what this is: {text}", target="label")
    model = LLMGenerator(**own, generation={"max_new_tokens": 20, "min_new_tokens": 20}).fit(frame)
    rows = pd.concat([frame, frame.assign(text=frame["text"] * 4)], ignore_index=True)
    real, ways = inference.begin, []
    monkeypatch.setattr(inference, "begin", lambda *given, **named: ways.append(real(*given, **named)) or ways[-1])
    with pytest.warns(UserWarning, match="without an end"):
        found = model.predict(rows)
    assert [type(way).__name__ for way in ways] == ["PackedPrompts"]
    monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="without an end"):
        pd.testing.assert_series_equal(model.predict(rows), found)


def test_memory_is_given_back(settings: dict, frame: pd.DataFrame) -> None:
    held = []
    for ranks in ((8,), (2, 4, 8)):  # cuBLAS takes its share the first time, and keeps it
        for rank in ranks:
            own = on_gpu(settings, epochs=1, adapter={"r": rank})
            LLMClassifier(**own, features="text", target="label").fit(frame).predict(frame)
        llmfit.clear_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0]


def test_a_step_that_does_not_fit_is_halved_not_failed(settings: dict, frame: pd.DataFrame) -> None:
    """A cap on the process's memory makes the allocator fail for real."""
    LLMClassifier(**on_gpu(settings, epochs=1), features="text", target="label").fit(frame)  # cuBLAS takes its share
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 64 * 2**20) / total)
    several = [frame.assign(text=[f"{i} {text} " * 120 for text in frame["text"]]) for i in range(16)]
    try:
        with pytest.warns(llmfit.exceptions.MemoryWarning, match="going on with batches of"):
            LLMClassifier(
                **on_gpu(settings, epochs=1, batch_tokens=10**6, batch_size=128), features="text", target="label"
            ).fit(pd.concat(several))  # equal rows would be computed once
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("quantization", [4, {"type": "fp4", "double_quant": False}, 8])
def test_a_quantized_base_learns_by_heart_and_is_left_as_it_was(settings, frame, tiny, quantization) -> None:
    own = on_gpu(settings, quantization=quantization, gradient_checkpointing=True)
    model = LLMClassifier(**own, features="text", target="label").fit(frame)
    base = model._fitted_base()
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    assert model.score(frame) == 1.0
    model.fit(frame)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    assert all(tensor.dtype == torch.float32 for tensor in model._tensors.values())


def test_an_adapter_trained_beside_4_bits_on_the_gpu_is_merged_on_the_cpu(settings, frame, tmp_path) -> None:
    model = LLMClassifier(**on_gpu(settings, quantization=4), features="text", target="label").fit(frame)
    model.export(tmp_path / "out")
    merged = LLMClassifier(
        **{**settings, "base_model": str(tmp_path / "out"), "adapter": None}, features="text", target="label"
    ).fit(frame)
    assert merged.score(frame) == 1.0


@pytest.mark.parametrize("pairs", [2**24, 0], ids=["in a table", "in groups"])
@pytest.mark.parametrize("words", [1, 120], ids=["by scores", "by torch's kernels"])
@pytest.mark.parametrize("changed", [{}, {"gradient_checkpointing": True}, {"head": "linear"}], ids=str)
def test_packed_rows_learn_and_answer_as_padded_ones(settings, frame, monkeypatch, words, changed, pairs) -> None:
    monkeypatch.setattr(attention, "TABLE", pairs)
    rows = frame.assign(text=[text * words for text in frame["text"]])
    own = {**on_gpu(settings, dtype="float32", epochs=2, max_length=None), **changed}
    own |= {"template": {"task": "Tell fruit from vehicles. " * 20, "template": "{task}{text}"}, "target": "label"}
    one = LLMClassifier(**own).fit(rows)
    found = one.predict_log_proba(rows)
    for room in (scoring, training):
        for name in ("packable", "packable_answers"):
            monkeypatch.setattr(room, name, lambda *_, **__: None)
    other = LLMClassifier(**own).fit(rows)
    np.testing.assert_allclose(one.history_["loss"], other.history_["loss"], rtol=1e-3)
    np.testing.assert_allclose(found, other.predict_log_proba(rows), atol=1e-2)


@pytest.mark.parametrize("adapter", sorted(METHODS))
def test_every_method_learns_and_is_loaded(settings, frame, tmp_path, adapter) -> None:
    own = on_gpu(settings, dtype="float32", epochs=4)
    model = LLMClassifier(**own, features="text", target="label", adapter=adapter).fit(frame)
    assert model.history_["loss"].iloc[-1] < model.history_["loss"].iloc[0]
    found = model.predict_proba(frame)
    model.save(tmp_path / "model")
    llmfit.clear_cache()
    np.testing.assert_allclose(llmfit.load(tmp_path / "model").predict_proba(frame), found, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*without an end")
@pytest.mark.parametrize("quantization", [None, 8])
def test_an_encoder_decoder_learns(settings, frame, tmp_path, quantization) -> None:
    own = on_gpu(settings, base_model=make_encoder_decoder(tmp_path / "t5"), epochs=20, quantization=quantization)
    own |= {"adapter": {"r": 8, "target_modules": ["q", "v"]}, "features": "text", "target": "label"}
    for kind in (LLMClassifier, LLMGenerator):
        model = kind(**own).fit(frame)
        assert model.history_["loss"].iloc[-1] < model.history_["loss"].iloc[0]
        assert model.predict(frame).notna().all()


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_head_on_an_encoder_learns(settings, frame, tmp_path, adapter) -> None:
    own = on_gpu(settings, base_model=make_encoder(tmp_path / "bert"), head="linear", adapter=adapter, epochs=60)
    own |= {"features": "text", "dtype": "float32"}
    assert LLMClassifier(**own, target="label").fit(frame).score(frame) == 1.0
    assert LLMRegressor(**own, target="size").fit(frame).score(frame) > 0.5


def test_candidates_side_by_side_are_those_fitted_alone(settings, frame) -> None:
    rows = pd.concat([frame] * 2, ignore_index=True)
    grid = {"adapter__r": [2, 4], "adapter__dropout": [0.0, 0.3], "learning_rate": [1e-3, 1e-2]}
    model = LLMClassifier(**on_gpu(settings, dtype="float32", epochs=2), features="text", target="label")
    how = {"cv": 2, "scoring": "neg_log_loss", "refit": False}
    found, alone = (kind(model, grid, **how).fit(rows, rows["label"]) for kind in (FusedGridSearchCV, GridSearchCV))
    each, other = (search.cv_results_["mean_test_score"] for search in (found, alone))
    np.testing.assert_allclose(each, other, atol=1e-3)


def test_a_generator_beside_4_bits_answers_what_it_has_learned(settings, frame) -> None:
    given = on_gpu(settings, epochs=60)
    model = LLMGenerator(**given, features="text", target="label", quantization=4).fit(frame)
    assert model.predict(frame).tolist() == frame["label"].tolist()


@pytest.mark.parametrize("adapter", [None, "lora", "full"])
def test_a_head_on_a_decoder_learns_behind_a_long_beginning(settings, frame, tmp_path, adapter) -> None:
    own = on_gpu(settings, head="linear", adapter=adapter, epochs=60 if adapter else 300, max_length=None)
    own |= {"template": {"task": "Tell fruit from vehicles. " * 20, "template": "{task}{text}"}}
    assert LLMClassifier(**own, target="label").fit(frame).score(frame) >= (1.0 if adapter else 0.75)
    model = LLMRegressor(**own, target="size").fit(frame)
    assert model.score(frame) > 0.5
    model.save(tmp_path / "model")
    np.testing.assert_allclose(llmfit.load(tmp_path / "model").predict(frame), model.predict(frame), rtol=1e-5)


@pytest.mark.parametrize("adapter", [{"r": 4, "dropout": 0.3}, "full"], ids=str)
def test_a_fit_that_was_killed_goes_on_as_if_it_had_not_been(settings, frame, tmp_path, monkeypatch, adapter) -> None:
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    seen: list[int] = []

    def kill(state) -> None:
        seen.append(state.step)
        if seen == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    own = on_gpu(settings, dtype="float32", epochs=3, batch_size=4, adapter=adapter)
    own |= {"features": "text", "target": "label", "random_state": 0, "callbacks": kill}
    with pytest.raises(KeyboardInterrupt):
        LLMClassifier(**own, checkpoint_dir=tmp_path).fit(frame)
    again = LLMClassifier(**own, checkpoint_dir=tmp_path).fit(frame)
    assert seen == [1, 2, 3, 4, 4, 5, 6]
    alone = LLMClassifier(**own).fit(frame)
    np.testing.assert_allclose(again.history_["loss"], alone.history_["loss"], rtol=1e-4)
    np.testing.assert_allclose(again.predict_proba(frame), alone.predict_proba(frame), atol=1e-4)


def test_survivors_of_halving_end_as_if_fitted_alone(settings, frame) -> None:
    rows = pd.concat([frame] * 2, ignore_index=True)
    grid = {"adapter__r": [2, 4], "adapter__dropout": [0.0, 0.3], "learning_rate": [1e-3, 1e-2]}
    own = on_gpu(settings, dtype="float32", epochs=4) | {"features": "text", "target": "label", "random_state": 0}
    search = FusedHalvingGridSearchCV(LLMClassifier(**own), grid, cv=2, factor=2, scoring="neg_log_loss")
    search.fit(rows, rows["label"])
    alone = LLMClassifier(**own).set_params(**search.best_params_).fit(rows)
    np.testing.assert_allclose(search.predict_proba(rows), alone.predict_proba(rows), atol=1e-3)


@pytest.mark.parametrize("quantization", [None, 8, 4])
def test_quick_ways_are_found_to_be_right(settings, frame, quantization, recwarn) -> None:
    """Packing and LoRA in one piece are taken in bfloat16, beside few bits, too."""
    own = on_gpu(settings, epochs=1, quantization=quantization, max_length=None)
    own |= {"template": {"task": "Tell fruit from vehicles. " * 20, "template": "{task}{text}"}, "target": "label"}
    LLMClassifier(**own).fit(frame).predict_proba(frame)
    assert not [str(found.message) for found in recwarn if issubclass(found.category, llmfit.exceptions.PackingWarning)]
