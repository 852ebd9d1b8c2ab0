"""Saved models: what was fitted comes back bit for bit, whatever it was; what is damaged is refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from conftest import make_model
from sklearn.exceptions import NotFittedError

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LoRA
from llmfit.exceptions import DataError, ModelLoadError, ParameterError
from llmfit.persistence import _digest_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*answers for .* reached max_new_tokens:llmfit.exceptions.TruncationWarning"
)


def answers(model: Any, frame: pd.DataFrame) -> Any:
    """What a model answers to rows: probabilities where it has them."""
    return (model.predict_proba if hasattr(model, "predict_proba") else model.predict)(frame).tolist()


def assert_same(loaded: Any, model: Any, frame: pd.DataFrame) -> None:
    """Two estimators are the same in all that can be seen."""
    assert type(loaded) is type(model)
    pd.testing.assert_series_equal(loaded.predict(frame), model.predict(frame))
    if hasattr(model, "predict_proba"):
        assert np.array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    pd.testing.assert_frame_equal(loaded.history_, model.history_, check_exact=True)
    for name in (
        *("target_", "features_", "max_length_", "learning_rate_", "trainable_parameters_", "best_epoch_"),
        *("n_features_in_", "base_model_", "target_dtype_"),
    ):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.feature_names_in_.tolist() == model.feature_names_in_.tolist()
    if hasattr(model, "classes_"):
        assert loaded.classes_.tolist() == model.classes_.tolist()
        assert loaded.classes_.dtype == model.classes_.dtype
    pd.testing.assert_frame_equal(loaded.preview(frame), model.preview(frame))


def saved(model: Any, folder: Path) -> Any:
    """Save and load."""
    model.save(folder)
    return llmfit.load(folder)


@pytest.fixture
def fitted(frame: pd.DataFrame, settings: dict[str, Any]) -> LLMClassifier:
    """A classifier with every kind of thing to save: an adapter, a history, weights of classes."""
    params = {"adapter": {"type": "lora", "r": 2}, "class_weight": {"fruit": 2.0}, **settings}
    return LLMClassifier(target="label", features="text", **params).fit(frame)


# What comes back ---------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, Any] = {
    "lora": "lora",
    "spec": LoRA(r=2, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "dict": {"r": 2, "alpha": 1, "use_dora": True},
    "bias": {"r": 1, "bias": "all"},
    "full": "full",
    "none": None,
}


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((LLMClassifier, name) for name in ADAPTERS),
        *((cls, name) for cls in (LLMGenerator, LLMEstimator) for name in ("lora", "full", "none")),
    ],
)
def test_every_adapter_comes_back_for_every_estimator(
    cls: Any, name: str, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = ADAPTERS[name]
    own = {"generation": {"max_new_tokens": 3}} if cls is LLMGenerator else {}
    model = cls(target="label", features=["text", "size"], adapter=adapter, **own, **settings).fit(frame)
    loaded = saved(model, tmp_path / "model")
    assert_same(loaded, model, frame)
    plain = {key: value for key, value in model.get_params().items() if key != "adapter" or name != "spec"}
    assert {key: loaded.get_params()[key] for key in plain} == plain
    assert loaded.get_params().get("adapter__type") == (
        None if adapter is None else "full" if name == "full" else "lora"
    )


LABELS: dict[str, Any] = {
    "str": ["b", "a"],
    "object": pd.Series(["b", "a"] * 4, dtype=object),
    "object of int": pd.Series([2, 1] * 4, dtype=object),
    "int": [2, 1],
    "int8": pd.Series([2, 1] * 4, dtype="int8"),
    "bool": [True, False],
    "float": [2.0, 1.0],
    "Int64": pd.Series([2, 1] * 4, dtype="Int64"),
    "boolean": pd.Series([True, False] * 4, dtype="boolean"),
    "string": pd.Series(["b", "a"] * 4, dtype="string"),
    "category": pd.Series(["b", "a"] * 4, dtype="category"),
    "ordered": pd.Series(["b", "a"] * 4, dtype=pd.CategoricalDtype(["b", "a", "c"], ordered=True)),
    "category of int": pd.Series([2, 1] * 4, dtype="category"),
    "category of Int64": pd.Series(pd.Categorical(pd.array([2, 1] * 4, dtype="Int64"))),
    "category of bool": pd.Series([True, False] * 4, dtype="category"),
    "odd words": ['"{é}\n', "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")],
}


@pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)
def test_every_kind_of_label_comes_back(y: Any, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    y = pd.Series(y * 4 if isinstance(y, list) else y.to_list(), dtype=getattr(y, "dtype", None), name="kind")
    model = LLMClassifier(adapter=None, **settings).fit(frame[["text"]], y.set_axis(frame.index))
    loaded = saved(model, tmp_path)
    assert_same(loaded, model, frame)
    assert loaded.predict(frame).dtype == y.dtype
    assert loaded.score(frame, y.set_axis(frame.index)) == model.score(frame, y.set_axis(frame.index))


TEMPLATES: dict[str, Any] = {
    "string": "{text} of {size:.1f}{{}}:",
    "no chat": {"task": "Sort.", "chat": False, "system": "You sort."},
    "few shot": {"few_shot": {"k": 2, "seed": 1}},
    "missing values": {"template": "{text}|{size}", "na_rep": "n/a"},
    "number of shots": {"few_shot": 1, "task": "Sort."},
}


@pytest.mark.parametrize("base", ["tiny", "tiny_chat"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_kind_of_template_comes_back(
    base: str, template: Any, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path, request: Any
) -> None:
    settings |= {"base_model": request.getfixturevalue(base), "adapter": None, "template": template}
    frame["size"] = frame["size"].where(frame["size"] != 3)
    model = LLMClassifier(target="label", **settings).fit(frame)
    loaded = saved(model, tmp_path)
    assert_same(loaded, model, frame)
    assert loaded.get_params() == model.get_params()


def test_generator_keeps_how_long_answers_may_be(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    model = LLMGenerator(target="label", features="text", generation={"num_beams": 2}, **settings).fit(frame)
    loaded = saved(model, tmp_path)
    assert loaded.max_new_tokens_ == model.max_new_tokens_ == 32
    assert loaded.generation == {"num_beams": 2}
    assert_same(loaded, model, frame)


@pytest.mark.parametrize("label", ["category", "text"])
def test_chooser_comes_back_as_a_chooser(
    label: str, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    own = {"generation": {"max_new_tokens": 3}} if label == "text" else {"class_weight": "balanced"}
    model = LLMEstimator(target={"label": label}, features="text", **own, **settings).fit(frame)
    loaded = saved(model, tmp_path)
    assert type(loaded.estimator_) is type(model.estimator_)
    assert loaded.get_params() == model.get_params()
    assert_same(loaded, model, frame)


def test_history_keeps_every_bit(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    model = LLMClassifier(target="label", validation_fraction=0.5, **settings | {"epochs": 2, "batch_size": 2}).fit(
        frame
    )
    model.history_.loc[0, "loss"] = 1 / 3e12  # has more digits than a rounded file would hold
    loaded = saved(model, tmp_path)
    assert "NaN" not in (tmp_path / "history.json").read_text(encoding="utf-8")  # which is no JSON
    pd.testing.assert_frame_equal(loaded.history_, model.history_, check_exact=True)
    assert loaded.history_["validation_loss"].notna().sum() == 2
    assert loaded.best_epoch_ == model.best_epoch_


def test_array_fit_comes_back_without_names(settings: dict[str, Any], tmp_path: Path) -> None:
    X, y = np.arange(8.0).reshape(4, 2), [0, 1, 0, 1]
    model = LLMClassifier(adapter=None, **settings).fit(X, y)
    loaded = saved(model, tmp_path)
    assert not hasattr(loaded, "feature_names_in_")
    assert isinstance(loaded.predict(X), np.ndarray)
    assert np.array_equal(loaded.predict_proba(X), model.predict_proba(X))
    with pytest.raises(ValueError, match="X has 3 features, but LLMClassifier is expecting 2 features"):
        loaded.predict(np.ones((1, 3)))


def test_loaded_model_can_be_saved_pickled_and_fitted_on(
    fitted: LLMClassifier, frame: pd.DataFrame, tmp_path: Path
) -> None:
    again = saved(saved(fitted, tmp_path / "one"), tmp_path / "two")
    assert_same(again, fitted, frame)
    again.set_params(warm_start=True).fit(frame)
    fitted.set_params(warm_start=True).fit(frame)
    assert again.history_["step"].tolist() == [1, 2]
    assert np.array_equal(again.predict_proba(frame), fitted.predict_proba(frame))


def test_another_process_predicts_the_same(fitted: LLMClassifier, frame: pd.DataFrame, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    frame.to_csv(tmp_path / "rows.csv")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "import llmfit, pandas as pd\n"
        f"model = llmfit.load({str(tmp_path / 'model')!r})\n"
        f"rows = pd.read_csv({str(tmp_path / 'rows.csv')!r}, index_col=0)\n"
        "print(model.predict_proba(rows).tolist())"
    )
    paths = os.pathsep.join([str(Path(llmfit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert json.loads(run.stdout.strip().splitlines()[-1]) == fitted.predict_proba(frame).tolist()


# What lies in the folder -------------------------------------------------------------------------------------------


def test_folder_holds_json_and_safetensors_and_nothing_else(fitted: LLMClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    names = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "llmfit.json",
        "history.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_peft_reads_the_adapter_folder(fitted: LLMClassifier, frame: pd.DataFrame, tiny: str, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert model.peft_config["default"].base_model_name_or_path == tiny
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    scores = []
    for prompt in fitted.preview(frame, n=8)["prompt"]:
        start = len(tokenizer(prompt)["input_ids"])
        for label in ("fruit", "vehicle"):
            ids = tokenizer(f"{prompt} {label}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=ids).logits.log_softmax(-1)[0]
            scores.append(sum(float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))
    proba = torch.tensor(scores).reshape(8, 2).softmax(-1).numpy()
    assert np.allclose(proba, fitted.predict_proba(frame), rtol=0, atol=1e-5)


def test_full_fine_tune_is_saved_whole(
    frame: pd.DataFrame, settings: dict[str, Any], tiny: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    LLMClassifier(target="label", adapter="full", **settings).fit(frame).save(tmp_path)
    tensors = load_file(tmp_path / "adapter" / "model.safetensors")
    base = load_file(Path(tiny) / "model.safetensors")
    assert base.keys() <= tensors.keys()
    assert any(not torch.equal(tensors[name], base[name]) for name in base)


def test_model_card_says_what_was_fitted_and_how(
    frame: pd.DataFrame, settings: dict[str, Any], tiny: str, tmp_path: Path
) -> None:
    template = {"task": "Fruit or vehicle?", "template": "{task} {text} | {size:.1f} ="}
    params = {"adapter": LoRA(r=2), "template": template, "validation_fraction": 0.25, **settings}
    model = LLMClassifier(target="label", **params).fit(frame)
    model.save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    last = model.history_.iloc[-1]
    for wanted in (
        f"| base model | {tiny} (fingerprint ",
        "tags: [llmfit, text-classification]",
        "# LLMClassifier: text, size to label",
        f"fingerprint {model.base_model_['fingerprint']}",
        "text (text), size (number)",
        "| classes | fruit, vehicle |",
        "Fruit or vehicle? {text} | {size:.1f} =",
        "| lora (target_modules='all-linear', r=2, ",
        f"| trained parameters | {model.trainable_parameters_:,} |",
        "| optimiser steps | 1 |",
        f"| tokens seen | {last['tokens']:,.0f} |",
        "| peak learning rate | 0.01 |",
        f"| loss of the last step | {last['loss']:.4f} nats per token |",
        f"| lowest validation loss | {last['validation_loss']:.4f} nats per token |",
        " MB |",
        "llmfit.load(",
    ):
        assert wanted in card, wanted
    assert card.startswith("---\n")


def test_model_card_may_be_edited(fitted: LLMClassifier, frame: pd.DataFrame, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert answers(llmfit.load(tmp_path), frame) == answers(fitted, frame)
    (tmp_path / "README.md").unlink()
    assert answers(llmfit.load(tmp_path), frame) == answers(fitted, frame)


# Parameters that are no plain values -------------------------------------------------------------------------------


def test_callbacks_and_random_states_are_dropped_and_paths_become_text(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    seen: list[int] = []
    settings |= {"base_model": Path(str(settings["base_model"])), "random_state": np.random.RandomState(0)}
    model = LLMClassifier(target="label", callbacks=lambda state: seen.append(state.step), **settings).fit(frame)
    assert seen == [1]
    loaded = saved(model, tmp_path)
    assert (loaded.callbacks, loaded.random_state) == (None, None)
    assert loaded.base_model == str(settings["base_model"])
    assert_same(loaded, model, frame)


def test_numpy_values_and_odd_keys_of_parameters_come_back_plain(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    params = {"features": np.array(["text", "size"]), "learning_rate": np.float32(0.5), "batch_size": np.int64(4)}
    weights = {1: 2.0, 2: np.float64(0.5)}
    model = LLMClassifier(adapter=None, class_weight=weights, **settings | params)
    model.fit(frame[["text", "size"]], [1, 2] * 4)
    loaded = saved(model, tmp_path)
    assert loaded.features == ["text", "size"]
    assert loaded.class_weight == {1: 2.0, 2: 0.5}
    assert {type(key) for key in loaded.class_weight} == {int}
    assert (loaded.learning_rate, loaded.batch_size) == (0.5, 4)


def test_parameter_that_cannot_be_saved_is_named_and_nothing_is_written(fitted: LLMClassifier, tmp_path: Path) -> None:
    fitted.set_params(optimizer=len)
    with pytest.raises(DataError) as caught:
        fitted.save(tmp_path / "model")
    assert str(caught.value) == (
        "The 'optimizer' parameter cannot be saved: <built-in function len> (builtin_function_or_method) cannot be "
        "saved. Use plain values, lists and dicts."
    )
    assert list(tmp_path.iterdir()) == []


def test_load_changes_parameters_on_request(fitted: LLMClassifier, frame: pd.DataFrame, tmp_path: Path) -> None:
    fitted.set_params(device="auto", verbose=1).save(tmp_path)
    loaded = llmfit.load(tmp_path, verbose=0, device="cpu", batch_tokens=64)
    assert (loaded.verbose, loaded.device, loaded.batch_tokens) == (0, "cpu", 64)
    assert np.allclose(
        loaded.predict_proba(frame), fitted.set_params(verbose=0).predict_proba(frame), rtol=0, atol=1e-5
    )
    with pytest.raises(ParameterError, match=r"^Invalid parameter 'verbos' .* Did you mean 'verbose'\?$"):
        llmfit.load(tmp_path, verbos=0)


@pytest.mark.parametrize("kind", ["category", "text"])
def test_load_changes_parameters_of_a_chooser_and_of_what_it_chose(
    kind: str, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    LLMEstimator(target={"label": kind}, adapter=None, **settings).fit(frame).save(tmp_path)
    loaded = llmfit.load(tmp_path, verbose=1, batch_tokens=64)
    assert (loaded.verbose, loaded.estimator_.verbose) == (1, 1)
    assert (loaded.batch_tokens, loaded.estimator_.batch_tokens) == (64, 64)


# Writing: all or nothing -------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_saved_model_is_replaced_as_a_whole(
    fitted: LLMClassifier, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    fitted.save(tmp_path / "model")
    zero = LLMClassifier(target="label", adapter=None, **settings).fit(frame)
    zero.save(tmp_path / "model")
    assert set(contents(tmp_path / "model")) == {"README.md", "llmfit.json", "history.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(llmfit.load(tmp_path / "model"), zero, frame)


def test_empty_folder_and_missing_parents_are_filled(
    fitted: LLMClassifier, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("empty", "new/folder", "~/at home"):
        fitted.save(path)
        assert answers(llmfit.load(path), frame) == answers(fitted, frame)
    assert (tmp_path / "at home").is_dir()


class Failure(BaseException):
    """As when the process is interrupted."""


BREAKS = {
    "the weights": ("safetensors.torch.save_file", 0),
    "the card": ("llmfit.estimators.saving.model_card", 0),
    "the manifest": ("llmfit.persistence._versions", 0),
    "the first renaming": ("pathlib.Path.rename", 0),
    "the second renaming": ("pathlib.Path.rename", 1),
}


@pytest.mark.parametrize(("name", "lets_pass"), BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("error", [OSError, Failure])
def test_failure_while_saving_leaves_the_old_model_and_nothing_else(
    name: str,
    lets_pass: int,
    error: Any,
    fitted: LLMClassifier,
    frame: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted.save(tmp_path / "model")
    before, wanted = contents(tmp_path / "model"), answers(fitted, frame)
    fitted.set_params(random_state=1).fit(frame)
    calls: list[Any] = []
    rename = Path.rename

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == lets_pass + 1:
            raise error("no room left")
        return rename(*args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(name, failing)
        with pytest.raises(error, match="no room left"):
            fitted.save(tmp_path / "model")
    assert contents(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert answers(llmfit.load(tmp_path / "model"), frame) == wanted


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_saved_model_is_not_overwritten(kind: str, fitted: LLMClassifier, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine", encoding="utf-8")
    else:
        path.write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(DataError) as caught:
        fitted.save(path)
    assert str(caught.value) == (
        f"{str(path)!r} exists and is no saved llmfit model: nothing was written. Choose another."
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("cls", [LLMClassifier, LLMGenerator, LLMEstimator])
def test_what_is_not_fitted_is_not_saved(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match=f"^This {cls.__name__} instance is not fitted yet"):
        cls().save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Reading: nothing that is damaged ----------------------------------------------------------------------------------


@pytest.fixture
def folder(fitted: LLMClassifier, tmp_path: Path) -> Path:
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Any, **params: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        llmfit.load(folder, **params)
    return str(caught.value)


def edit(folder: Path, change: Any) -> None:
    """Change a manifest as somebody would who knows of its digest."""
    manifest = change(json.loads((folder / "llmfit.json").read_text(encoding="utf-8")))
    if isinstance(manifest, dict):
        manifest["digest"] = _digest_of(manifest)
    (folder / "llmfit.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_changed_manifest_is_damaged(folder: Path) -> None:
    text = (folder / "llmfit.json").read_text(encoding="utf-8")
    (folder / "llmfit.json").write_text(text.replace('"vehicle"', '"vessel"'), encoding="utf-8")
    assert refusal(folder) == f"The saved model {str(folder)!r} is damaged: llmfit.json is not as it was written."


def test_folder_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    assert refusal(path) == f"{str(path)!r} is no saved llmfit model: it has no llmfit.json."
    path.mkdir()
    assert refusal(str(path)) == f"{str(path)!r} is no saved llmfit model: it has no llmfit.json."


def test_newer_format_is_named(folder: Path) -> None:
    edit(folder, lambda m: {**m, "format_version": 2, "versions": {"llmfit": "9.1"}})
    assert refusal(folder) == (
        f"{str(folder)!r} has format 2, made by llmfit 9.1; this llmfit reads formats up to 1. "
        "Upgrade with: pip install -U llmfit."
    )


FILES = ["history.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"The saved model {str(folder)!r} is incomplete: {name} is missing."


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_bit_is_found(name: str, place: float, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data)) if place >= 0 else -1] ^= 1
    (folder / name).write_bytes(bytes(data))
    assert refusal(folder) == f"The saved model {str(folder)!r} is damaged: {name} is not as it was written."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: {k: v for k, v in m.items() if k != "files"}, "'files'"),
        (lambda m: {**m, "format_version": "one"}, "invalid literal for int() with base 10: 'one'"),
        (lambda m: {**m, "files": None}, "'NoneType' object is not iterable"),
        (lambda m: [m], "list indices must be integers or slices, not str"),
    ],
)
def test_damaged_manifest_is_refused(change: Any, reason: str, folder: Path) -> None:
    edit(folder, change)
    assert refusal(folder) == f"{str(folder / 'llmfit.json')!r} is damaged: {reason}."


def test_manifest_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "llmfit.json").write_text((folder / "llmfit.json").read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert refusal(folder).startswith(f"{str(folder / 'llmfit.json')!r} is damaged: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {**m, "class": "Popen"},
        lambda m: {k: v for k, v in m.items() if k != "params"},
        lambda m: {**m, "params": {**m["params"], "unheard_of": 1}},
        lambda m: {**m, "fitted": {k: v for k, v in m["fitted"].items() if k != "prompts"}},
        lambda m: {**m, "fitted": []},
        lambda m: {**m, "fitted": {**m["fitted"], "adapter": {"type": "unheard of"}}},
        lambda m: {**m, "fitted": {**m["fitted"], "target_dtype": {"name": "unheard of"}}},
    ],
)
def test_manifest_that_makes_no_sense_is_refused(change: Any, folder: Path) -> None:
    edit(folder, change)
    assert refusal(folder).startswith(f"The saved model {str(folder)!r} cannot be read: ")


def test_other_weights_in_the_same_place_are_refused(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base")
    settings |= {"base_model": base, "adapter": None}
    model = LLMClassifier(target="label", **settings).fit(frame)
    model.save(tmp_path / "model")
    then = model.base_model_["fingerprint"]
    make_model(tmp_path / "base", seed=7)
    now = llmfit.sources.find_source(base).fingerprint
    assert now != then
    assert refusal(tmp_path / "model") == (
        f"The base model {base!r} is not the one that was fitted: its fingerprint is {now}, "
        f"the saved model wants {then}. Pass base_model= to say where that one lies."
    )
    with pytest.raises(ModelLoadError) as caught:
        model.predict(frame)
    assert str(caught.value) == (
        f"The base model {base!r} is not the one that was fitted: its fingerprint is {now}, not {then}."
    )


@pytest.mark.parametrize("cls", [LLMClassifier, LLMEstimator])
def test_moved_base_is_found_where_the_user_says(
    cls: Any, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    old, new = tmp_path / "base", tmp_path / "moved"
    settings |= {"base_model": make_model(old)}
    model = cls(target="label", features="text", **settings).fit(frame)
    model.save(tmp_path / "model")
    wanted = answers(model, frame)
    shutil.move(old, new)
    llmfit.clear_cache()
    assert refusal(tmp_path / "model") == (
        f"The base model {str(old)!r} is a path, but there is nothing there. Pass base_model= to say where it lies now."
    )
    loaded = llmfit.load(tmp_path / "model", base_model=new)
    assert answers(loaded, frame) == wanted
    assert loaded.base_model == new
    loaded.save(tmp_path / "again")
    assert answers(llmfit.load(tmp_path / "again"), frame) == wanted
