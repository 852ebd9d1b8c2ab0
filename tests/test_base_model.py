"""The shared base: loaded once, lent to one fit at a time, given back as it was, whatever happens meanwhile."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import make_model
from torch_side import classifier, generator, make_other, same, weights

import llmfit
from llmfit import base_model, scoring
from llmfit.base_model import _resolve_device, load_base_model
from llmfit.exceptions import LLMFitError, ModelLoadError, ParameterError, TrainingError

ADAPTERS: dict[str, Any] = {
    "lora": "lora",
    "dropout": {"dropout": 0.5},
    "dora": {"r": 4, "use_dora": True},
    "rslora": {"r": 4, "use_rslora": True},
    "bias": {"r": 4, "bias": "all"},
    "bias of the adapted": {"r": 4, "bias": "lora_only"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "full": "full",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny,
        "qwen2": make_other(root / "qwen2", tiny, "qwen2"),
        "gpt2": make_other(root / "gpt2", tiny, "gpt2"),
    }


def state_of(model: Any) -> dict[str, Any]:
    """All of a model that a fit could leave changed."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "values": {n: (t.dtype, t.detach().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()},
        "tensors": {n: (id(t), t.data_ptr(), t.requires_grad, t.grad) for n, t in tensors.items()},
        "modules": [(n, id(m), type(m), m.training, _plain(vars(m))) for n, m in model.named_modules()],
        "config": json.dumps(model.config.to_dict(), default=str),
        "attention": model.config._attn_implementation,
        "generation": json.dumps(model.generation_config.to_dict(), default=str),
    }


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes by identity, those that are dicts (submodules, hooks) entry by entry."""
    return {
        name: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else id(value)
        for name, value in attributes.items()
    }


def shared(folder: str, dtype: str = "float32") -> Any:
    return load_base_model(folder, device="cpu", dtype=dtype).model


def raising(error: BaseException, step: int = 2) -> Any:
    def callback(state: Any) -> None:
        if state.step == step:
            raise error

    return callback


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_fit_and_predict_leave_the_base_as_it_was(name, adapter, bases, settings, frame):
    model = shared(bases[name])
    before = state_of(model)
    clf = classifier(settings, base_model=bases[name], adapter=adapter).fit(frame, eval_set=frame)
    assert state_of(model) == before
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        read = scoring.score_labels
        patch.setattr(scoring, "score_labels", lambda m, *a, **k: (seen.append(m), read(m, *a, **k))[1])
        clf.predict(frame)
    assert len(seen) == 1  # the fitted model did answer
    assert state_of(model) == before
    assert all(float(t.abs().sum()) > 0 for t in weights(clf).values() if t.dim() > 1)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("adapter", ["lora", {"bias": "all"}, "full"])
def test_a_base_in_few_bits_is_left_as_it_was(name, adapter, bases, settings, frame):
    model = shared(bases[name], "bfloat16")
    before = state_of(model)
    classifier(settings, base_model=bases[name], adapter=adapter, dtype="bfloat16").fit(frame).predict(frame)
    assert state_of(model) == before


def test_generation_leaves_the_base_as_it_was(tiny, settings, frame):
    model = shared(tiny)
    before = state_of(model)
    generation = {"max_new_tokens": 3, "num_beams": 2, "do_sample": True}
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        generator(settings, generation=generation).fit(frame).predict(frame)
    assert state_of(model) == before


FAILURES: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "callback": ({"callbacks": raising(ZeroDivisionError())}, ZeroDivisionError),
    "interrupt": ({"callbacks": raising(KeyboardInterrupt())}, KeyboardInterrupt),
    "full": ({"callbacks": raising(ZeroDivisionError()), "adapter": "full"}, ZeroDivisionError),
    "bias": ({"callbacks": raising(ZeroDivisionError()), "adapter": {"bias": "all"}}, ZeroDivisionError),
    "no such layer": ({"adapter": {"target_modules": ["nowhere"]}}, ParameterError),
    "no linear layer": ({"adapter": {"target_modules": ["input_layernorm"], "bias": "all"}}, ParameterError),
    "loss not finite": ({"learning_rate": 1e30}, TrainingError),
    "loss not finite in full": ({"learning_rate": 1e30, "adapter": "full"}, TrainingError),
    "optimizer": ({"optimizer": {"type": "adamw", "betaz": 1}}, ParameterError),
}


@pytest.mark.parametrize(("changed", "error"), FAILURES.values(), ids=FAILURES)
def test_a_failed_fit_leaves_base_and_generators_as_they_were(changed, error, bases, settings, frame):
    model = shared(bases["qwen2"])
    before, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(error):
        classifier(settings, base_model=bases["qwen2"], epochs=3, **changed).fit(frame)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    classifier(settings, base_model=bases["qwen2"]).fit(frame)  # and it can be lent again


def test_a_failed_prediction_leaves_the_base_as_it_was(tiny, settings, frame, monkeypatch):
    clf = classifier(settings).fit(frame)
    model = shared(tiny)
    before = state_of(model)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(scoring, "completion_states", fail)
    with pytest.raises(ZeroDivisionError):
        clf.predict(frame)
    assert state_of(model) == before


@pytest.mark.parametrize("cold", [False, True])
def test_generators_of_the_process_are_not_touched(cold, settings, frame):
    if cold:
        llmfit.clear_cache()
    torch.manual_seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    clf = classifier(settings, adapter={"dropout": 0.3}, validation_fraction=0.25).fit(frame)
    clf.predict(frame)
    with pytest.warns(llmfit.exceptions.TruncationWarning):
        generator(settings, generation={"do_sample": True, "max_new_tokens": 2}).fit(frame).predict(frame)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_the_generators_of_the_process_do_not_touch_a_fit(settings, frame):
    clf = classifier(settings, adapter={"dropout": 0.3})
    torch.manual_seed(1)
    one = weights(clf.fit(frame))
    torch.manual_seed(2)
    assert same(one, clf.fit(frame))


def test_fitted_estimators_do_not_see_each_other(settings, frame):
    first = classifier(settings).fit(frame)
    alone = first.predict_proba(frame)
    swapped = frame.assign(label=frame["label"].map({"fruit": "vehicle", "vehicle": "fruit"}))
    second = classifier(settings, epochs=3, adapter={"bias": "all", "r": 2}).fit(swapped)
    third = classifier(settings, adapter="full").fit(swapped)
    others = second.predict_proba(frame), third.predict_proba(frame)
    np.testing.assert_array_equal(first.predict_proba(frame), alone)
    np.testing.assert_array_equal(second.predict_proba(frame), others[0])
    np.testing.assert_array_equal(third.predict_proba(frame), others[1])
    assert np.abs(others[0] - alone).max() > 1e-3


def test_a_callback_cannot_use_the_model_that_is_being_trained(settings, frame, tiny_chat):
    clf = classifier(settings).fit(frame)
    elsewhere = classifier(settings, base_model=tiny_chat).fit(frame)
    proba = elsewhere.predict_proba(frame)
    classifier(  # another base model is another matter
        settings, callbacks=lambda _: np.testing.assert_array_equal(elsewhere.predict_proba(frame), proba)
    ).fit(frame)
    with pytest.raises(LLMFitError) as error:
        classifier(settings, callbacks=lambda _: clf.predict(frame)).fit(frame)
    assert str(error.value) == (
        f"The base model {settings['base_model']!r} is lent to a fit or a prediction that has not ended: "
        "a callback cannot use an estimator on the same base model."
    )
    clf.predict(frame)


# The cache ------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that transformers read a model from, the cache empty at first."""
    llmfit.clear_cache()
    counted: list[str] = []
    read = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: str, **options: Any) -> Any:
        counted.append(str(folder))
        return read(folder, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return counted


def test_many_fits_and_predictions_load_a_model_once(loads, settings, frame, tiny):
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(classifier(settings), {"adapter__r": [2, 4], "learning_rate": [1e-3, 1e-2]}, cv=2)
    search.fit(frame, frame["label"]).predict(frame)
    generator(settings, base_model=Path(tiny)).fit(frame)
    assert loads == [str(Path(tiny).resolve())]


def test_the_cache_keeps_the_two_last_used(loads, tiny):
    first, second = (load_base_model(tiny, device="cpu", dtype=dtype) for dtype in ("float32", "float64"))
    assert load_base_model(tiny, device="cpu", dtype="float32") is first
    load_base_model(tiny, device="cpu", dtype="bfloat16")
    assert load_base_model(tiny, device="cpu", dtype="float32") is first
    gone = weakref.ref(second.model)
    del second
    gc.collect()
    assert gone() is None
    assert len(loads) == 3
    assert load_base_model(tiny, device="cpu", dtype="float64").dtype == torch.float64
    assert len(loads) == 4


def test_clear_cache_frees_models_and_leaves_estimators_usable(loads, settings, frame, tiny):
    clf = classifier(settings).fit(frame)
    before = clf.predict_proba(frame)
    gone = weakref.ref(shared(tiny))
    llmfit.clear_cache()
    assert gone() is None
    np.testing.assert_array_equal(clf.predict_proba(frame), before)
    assert len(loads) == 2


def test_a_folder_whose_weights_change_is_loaded_anew(settings, frame, tmp_path):
    folder = make_model(tmp_path / "model", seed=1)
    clf = classifier(settings, base_model=folder).fit(frame)
    old = load_base_model(folder, device="cpu", dtype="float32")
    make_model(tmp_path / "model", seed=2)
    new = load_base_model(folder, device="cpu", dtype="float32")
    assert not torch.equal(old.model.lm_head.weight, new.model.lm_head.weight)
    expected = (
        f"The base model {folder!r} is not the one that was fitted: its fingerprint is "
        f"{new.source.fingerprint}, not {old.source.fingerprint}."
    )
    with pytest.raises(ModelLoadError, match=f"^{re.escape(expected)}$"):
        clf.predict(frame)


def test_threads_get_the_results_of_fits_alone(loads, settings, frame, tiny, tiny_chat):
    def results(seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        folder = (tiny, tiny_chat)[seed % 2]
        clf = classifier(
            settings, base_model=folder, random_state=seed, adapter={"r": 4, "dropout": 0.3}, epochs=3, batch_size=4
        )
        proba = clf.fit(frame).predict_proba(frame)
        return weights(clf), proba

    alone = [results(seed) for seed in range(4)]
    llmfit.clear_cache()
    loads.clear()
    before = torch.get_rng_state()
    together: dict[int, Any] = {}
    gate = threading.Barrier(4)

    def work(seed: int) -> None:
        gate.wait()
        together[seed] = results(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, (tensors, proba) in enumerate(alone):
        assert same(together[seed][0], tensors)
        np.testing.assert_array_equal(together[seed][1], proba)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(loads) == sorted({str(Path(tiny).resolve()), str(Path(tiny_chat).resolve())})


def test_the_cache_is_not_emptied_while_a_model_is_lent(loads, settings, frame):
    clf = classifier(settings, epochs=3, callbacks=lambda _: llmfit.clear_cache()).fit(frame)
    assert same(clf, classifier(settings, epochs=3).fit(frame))


# What cannot be loaded ------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such dtype": (
        {"dtype": "float31"},
        "The 'dtype' parameter of the estimator must be one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'. "
        "Got 'float31' instead. Did you mean 'float32'?",
    ),
    "a dtype of torch": (
        {"dtype": torch.float16},
        "The 'dtype' parameter of the estimator must be one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'. "
        "Got torch.float16 instead. Did you mean 'float16'?",
    ),
    "no such device": (
        {"device": "nowhere"},
        r"The 'device' parameter 'nowhere' cannot be used here: .*nowhere\.",
    ),
    "a device that is not here": (
        {"device": "cuda:99"},
        r"The 'device' parameter 'cuda:99' cannot be used here: .*\.",
    ),
    "a device without weights": (
        {"device": "meta"},
        "The 'device' parameter 'meta' cannot be used here: it holds shapes and no weights.",
    ),
    "no name of a device": (
        {"device": 3.5},
        "The 'device' parameter of the estimator must be 'auto' or a device of torch, like 'cpu' or 'cuda:0'. "
        "Got 3.5 instead.",
    ),
    "no name of a model": (
        {"base_model": None},
        "The 'base_model' parameter of the estimator must be a hub id, a path or an alias. Got None instead.",
    ),
    "an empty name": (
        {"base_model": ""},
        "The 'base_model' parameter of the estimator must be a hub id, a path or an alias. Got '' instead.",
    ),
}


@pytest.mark.parametrize(("changed", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_parameter_is_one_sentence(changed, sentence, settings, frame):
    with pytest.raises(ParameterError) as error:
        classifier(settings, **changed).fit(frame)
    assert re.fullmatch(sentence, str(error.value)) or str(error.value) == sentence


def damage(folder: Path, kind: str) -> None:
    file = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}.get(kind.split()[-1], "config.json")
    if kind.startswith("no "):
        (folder / file).unlink()
    elif kind.startswith("half "):
        (folder / file).write_bytes((folder / file).read_bytes()[: (folder / file).stat().st_size // 2])
    else:
        (folder / file).write_text(json.dumps(["a list"]))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    {
        "no config": "The base model folder {name} has no config.json.",
        "half config": "The base model folder {name} cannot be read: .*\\.",
        "odd config": "The base model folder {name} cannot be read: .*\\.",
        "no weights": "The base model {name} cannot be loaded: .*\\.",
        "half weights": "The base model {name} cannot be loaded: .*\\.",
        "half tokenizer": "The base model {name} cannot be loaded: .*\\.",
    }.items(),
)
def test_a_damaged_folder_is_one_sentence(kind, sentence, settings, frame, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage(folder, kind)
    with pytest.raises(ModelLoadError) as error:
        classifier(settings, base_model=folder).fit(frame)
    assert re.fullmatch(sentence.format(name=re.escape(repr(str(folder)))), str(error.value))


@pytest.mark.parametrize(
    ("name", "sentence"),
    {
        "./nowhere/model": "The base model './nowhere/model' is a path, but there is nothing there.",
        "/no/where": "The base model '/no/where' is a path, but there is nothing there.",
        "~/no/where": "The base model '~/no/where' is a path, but there is nothing there.",
        "a/b/c": "The base model 'a/b/c' is a path, but there is nothing there.",
        "nowhere.gguf": "The base model file 'nowhere.gguf' does not exist.",
    }.items(),
)
def test_a_path_to_nothing_is_one_sentence(name, sentence, settings, frame):
    with pytest.raises(ModelLoadError, match=f"^{re.escape(sentence)}$"):
        classifier(settings, base_model=name).fit(frame)


@pytest.mark.parametrize("name", ["org/nowhere", "org/nowhere@main", "nowhere"])
def test_a_hub_model_out_of_reach_is_one_sentence(name, settings, frame, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError) as error:
        classifier(settings, base_model=name).fit(frame)
    assert re.fullmatch(
        f"The base model '{name}' is no local folder or file, none of the aliases smollm2, "
        r"and cannot be had from the hub: \w+: .*\.",
        str(error.value),
    )


@pytest.mark.parametrize("known", [False, True])
def test_code_that_comes_with_a_model_never_runs(known, settings, frame, tiny, tmp_path):
    folder, ran = Path(shutil.copytree(tiny, tmp_path / "model")), tmp_path / "ran"
    for name in ("configuration_odd", "modeling_odd"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').write('ran')\nclass Odd: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_odd.Odd", "AutoModelForCausalLM": "modeling_odd.Odd"}
    if not known:
        config["model_type"] = "odd"
    (folder / "config.json").write_text(json.dumps(config))
    clf = classifier(settings, base_model=folder)
    if known:  # transformers has this architecture itself
        assert same(clf.fit(frame), classifier(settings).fit(frame))
    else:
        sentence = (
            f"The base model {str(folder)!r} cannot be loaded: it needs code that comes with the model, "
            "and llmfit never runs such code."
        )
        with pytest.raises(ModelLoadError, match=f"^{re.escape(sentence)}$"):
            clf.fit(frame)
    assert not ran.exists()


def test_a_failed_load_is_not_kept(loads, settings, frame, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage(folder, "no weights")
    for _ in range(2):
        with pytest.raises(ModelLoadError):
            classifier(settings, base_model=folder).fit(frame)
    shutil.copy(Path(tiny) / "model.safetensors", folder)
    assert same(classifier(settings, base_model=folder).fit(frame), classifier(settings).fit(frame))


@pytest.mark.parametrize(
    ("table", "expected"),
    [({"auto": "float32"}, torch.float32), ({"auto": "bfloat16"}, torch.bfloat16)],
)
def test_dtype_auto_is_the_quick_one_of_the_hardware(table, expected, tiny, monkeypatch):
    monkeypatch.setattr(base_model, "_multiplies_bfloat16", lambda _: table["auto"] == "bfloat16")
    assert load_base_model(tiny, device="cpu").model.dtype == expected


def test_context_length_is_the_smaller_of_model_and_tokenizer(tiny, tmp_path, settings, frame):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    assert classifier(settings).fit(frame).max_length_ == 2048
    assert classifier(settings, base_model=folder).fit(frame).max_length_ == 77


def test_a_series_and_a_frame_are_the_same_rows(settings, frame):
    clf = classifier(settings, features="text").fit(frame)
    np.testing.assert_array_equal(clf.predict_proba(frame), clf.predict_proba(pd.Series(frame["text"])))


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(cuda, mps, chosen, monkeypatch):
    asked: list[str] = []
    empty = torch.empty

    def tried(*size: Any, device: Any = None, **given: Any) -> Any:
        asked.append(torch.device(device).type)
        return empty(*size, **given)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", tried)
    assert _resolve_device("auto").type == chosen
    assert asked == [chosen]
