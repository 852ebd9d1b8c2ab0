"""Every adapter of METHODS trains, predicts, is kept, read by peft, merged, cloned and searched."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from benchmarks import adapters as table
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch_side import classifier, make_other, plain_model, same, token_losses, token_rows, weights

import llmfit
from llmfit import callbacks, checkpoints
from llmfit.adapters import METHODS, adapter_defaults, resolve_adapter
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

IDS = table.IDS
# One key of each method, and two values that make two models.
KEYS: dict[str, tuple[str, Any, Any]] = {
    "adalora": ("target_r", 2, 4),
    "adaption_prompt": ("adapter_len", 2, 4),
    "bitfit": ("target_modules", ["q_proj"], ["k_proj"]),
    "boft": ("boft_block_size", 2, 4),
    "c3a": ("block_size", 4, 8),
    "fourierft": ("n_frequency", 10, 20),
    "ia3": ("exclude_modules", "k_proj", "v_proj"),
    "ln_tuning": ("target_modules", ["norm"], ["input_layernorm"]),
    "oft": ("oft_block_size", 4, 8),
    "p_tuning": ("num_virtual_tokens", 2, 4),
    "prefix_tuning": ("num_virtual_tokens", 2, 4),
    "prompt_tuning": ("num_virtual_tokens", 2, 4),
    "tinylora": ("u", 4, 8),
    "waveft": ("n_frequency", 10, 20),
}
PARTS = [name for name in METHODS if name != "full"]  # of a model; "full" has no keys and no peft


def key_of(name: str) -> tuple[str, Any, Any]:
    """Take the method's key of above; of one that is not there its rank, or the first of its keys that is a number."""
    numbers = [key for key, value in adapter_defaults({"type": name}).items() if type(value) is int]
    return KEYS.get(name) or ("r" if "r" in numbers else numbers[0], 2, 4)


def settings_of(name: str) -> dict[str, Any]:
    return {"adapter": name, "learning_rate": table.RATES.get(name, 1e-2)}


@pytest.fixture(scope="module", params=METHODS)
def fitted(request: pytest.FixtureRequest, tiny: str) -> Any:
    """The rows of the table, learned by one method."""
    return table.fit(tiny, request.param)


@pytest.fixture(scope="module")
def pristine(tiny: str) -> dict[str, torch.Tensor]:
    return plain_model(tiny).state_dict()


def assert_pristine(tiny: str, pristine: dict[str, torch.Tensor]) -> None:
    state = load_base_model(tiny, device="cpu", dtype="float32").model.state_dict()
    assert state.keys() == pristine.keys()
    assert [name for name in state if not torch.equal(state[name], pristine[name])] == []


@torch.no_grad()
def logits_of(clf: Any) -> torch.Tensor:
    base = load_base_model(clf.base_model, device="cpu", dtype=clf.dtype)
    with base.attach(clf._adapter, weights(clf)) as model:
        return model(input_ids=IDS).logits


# Training and prediction ----------------------------------------------------------------------------


def test_the_loss_falls_and_the_base_is_as_it_was(fitted, tiny, pristine):
    losses = fitted.history_["loss"]
    assert losses.iloc[-1] < 0.8 * losses.iloc[0]
    probabilities = fitted.predict_proba(table.ROWS)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert_pristine(tiny, pristine)


def test_scores_are_those_of_peft_and_one_row_at_a_time(fitted, tiny, tmp_path):
    """Labels of many tokens over a shared cache, against the full logits of each row alone."""
    model = peft_model(fitted, tiny, tmp_path)
    virtual = fitted._adapter.virtual_tokens
    for i in (0, 3):
        row = table.ROWS.iloc[[i]]
        pairs = token_rows(tiny, [row["text"].iloc[0]] * 2, fitted.classes_)
        scores = np.array([-losses_behind(model, prompt, answer[:-1], virtual).sum() for prompt, answer in pairs])
        expected = scores - np.logaddexp.reduce(scores)
        np.testing.assert_allclose(fitted.predict_log_proba(row)[0], expected, atol=1e-4)


@torch.no_grad()
def losses_behind(model: Any, prompt: list[int], completion: list[int], virtual: int) -> np.ndarray:
    """As token_losses, where a model gives logits of virtual tokens as well."""
    if not virtual:
        return token_losses(model, prompt, completion)
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    log_probs = logits[-len(prompt) - len(completion) :].log_softmax(-1).numpy()
    return np.array([-log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


def peft_model(clf: Any, folder: str, tmp_path: Any) -> Any:
    """What peft makes of a saved adapter; of "full", the plain model with its weights."""
    plain = plain_model(folder)
    if clf._adapter.type == "full":
        plain.load_state_dict(weights(clf))
        return plain
    clf.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft has to say of its own
        return peft.PeftModel.from_pretrained(plain, tmp_path / "saved" / "adapter").eval()


def test_predictions_are_those_of_one_row_at_a_time(fitted):
    many = fitted.predict_log_proba(table.ROWS)
    few = clone(fitted)
    vars(few).update({k: v for k, v in vars(fitted).items() if k.endswith("_") or k.startswith("_")})
    few.set_params(batch_tokens=1)
    np.testing.assert_allclose(few.predict_log_proba(table.ROWS), many, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_however_it_is_cut(name, tiny):
    whole, cut = (table.fit(tiny, name, epochs=2, learning_rate=1e-3, batch_tokens=n) for n in (4096, 20))
    np.testing.assert_allclose(whole.history_["loss"], cut.history_["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_is_the_same_fit(name, tiny):
    one, other = (table.fit(tiny, name, epochs=2) for _ in range(2))
    assert same(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_beside_a_base_of_fewer_bits(name, settings, frame):
    exact, coarse = (
        classifier(settings, **settings_of(name), dtype=dtype, epochs=3).fit(frame) for dtype in ("float32", "bfloat16")
    )
    assert coarse.trainable_parameters_ == exact.trainable_parameters_
    assert {t.dtype for t in weights(coarse).values() if t.is_floating_point()} == {torch.float32}
    np.testing.assert_allclose(coarse.history_["loss"], exact.history_["loss"], rtol=0.1)
    assert coarse.predict_proba(frame).shape == (8, 2)


# Folders --------------------------------------------------------------------------------------------


def test_a_saved_model_predicts_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(table.ROWS), fitted.predict_proba(table.ROWS))
    assert (again._adapter, again.trainable_parameters_) == (fitted._adapter, fitted.trainable_parameters_)
    assert same(again, fitted)


def test_peft_reads_the_folder(fitted, tiny, tmp_path):
    with torch.no_grad():
        found = peft_model(fitted, tiny, tmp_path)(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(found, logits_of(fitted), rtol=0, atol=1e-5)


def test_a_fit_goes_on_from_its_weights(fitted, tiny):
    again = clone(fitted)
    vars(again).update({k: v for k, v in vars(fitted).items() if k.endswith("_") or k.startswith("_")})
    again.set_params(warm_start=True, epochs=1, learning_rate=1e-6).fit(table.ROWS)
    assert len(again.history_) == len(fitted.history_) + 1
    assert again.history_["loss"].iloc[-1] <= fitted.history_["loss"].iloc[-1] * 1.05


# Merging --------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_adapted_one(fitted, tiny, pristine):
    if not fitted._adapter.mergeable:
        assert table.merged_distance(fitted) is None
    elif fitted._adapter.type != "bitfit":  # this base has no biases to merge into
        assert table.merged_distance(fitted) < 1e-4
    assert_pristine(tiny, pristine)


def test_what_cannot_be_merged_here_is_one_sentence(tiny, tmp_path):
    clf = table.fit(tiny, "bitfit", epochs=1)
    with pytest.raises(ParameterError) as error:
        clf.export(tmp_path / "m")
    assert str(error.value) == (
        "The adapter cannot be merged: Base layer has no bias, cannot merge bias adapter default. Use merge=False, "
        "which writes a PEFT folder."
    )


def test_biases_are_merged_where_there_are_some(settings, frame, tiny, tmp_path):
    folder = make_other(tmp_path / "qwen2", tiny, "qwen2")
    adapter = {"type": "bitfit", "target_modules": ["q_proj", "v_proj"]}
    clf = classifier(settings, base_model=folder, adapter=adapter, learning_rate=0.1).fit(frame)
    assert table.merged_distance(clf) < 1e-5


# Parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_keys_are_cloned_read_and_set(name, settings):
    key, first, second = key_of(name)
    clf = clone(classifier(settings, adapter={"type": name, key: first}))
    params = clf.get_params()
    assert {k.removeprefix("adapter__"): v for k, v in params.items() if k.startswith("adapter__")} == {
        **adapter_defaults({"type": name}),
        key: first,
    }
    for adapter in (clf.adapter, name, resolve_adapter({"type": name, key: first})):
        changed = classifier(settings, adapter=adapter).set_params(**{f"adapter__{key}": second})
        assert resolve_adapter(changed.adapter) == resolve_adapter({"type": name, key: second})
    with pytest.raises(ParameterError, match=r"has no parameter 'nonsense'\. It has "):
        clf.set_params(adapter__nonsense=1)


@pytest.mark.parametrize("name", PARTS)
def test_a_grid_over_a_key(name, settings, frame):
    key, first, second = key_of(name)
    clf = classifier(settings, **settings_of(name))
    search = GridSearchCV(clf, {f"adapter__{key}": [first, second]}, cv=2, scoring="neg_log_loss")
    search.fit(frame[["text"]], frame["label"])
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


@pytest.mark.parametrize("name", PARTS)
def test_settings_are_of_a_kind_that_is_checked(name):
    for key, value in adapter_defaults({"type": name}).items():
        wrong = object()
        if key in ("type", "init_lora_weights", "init_weights") or key.endswith("_config"):
            continue
        with pytest.raises(ParameterError, match=rf"^The '{key}' parameter of \w+ must be .+\. Got .+ instead\.$"):
            resolve_adapter({"type": name, key: wrong})
        assert resolve_adapter({"type": name, key: value}) == resolve_adapter(name)


# Checkpoints ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in a fit may catch it."""


def kill(state: callbacks.State) -> None:
    if state.step == 3:
        raise Killed


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_fit_goes_on_bit_for_bit(name, settings, frame, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    given = {**settings, **settings_of(name), "epochs": 2, "batch_size": 3}
    whole = classifier(given).fit(frame)
    states = {"checkpoint_dir": tmp_path}
    with pytest.raises(Killed):
        classifier(given, callbacks=kill, **states).fit(frame)
    seen: list[int] = []
    again = classifier(given, callbacks=lambda state: seen.append(state.step), **states).fit(frame)
    assert seen == [3, 4, 5, 6]
    assert same(again, whole)


# The line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "full"])
def test_what_is_trained_is_said_as_peft_says_it(name, settings, frame, tiny, capfd):
    clf = classifier(settings, adapter=name, verbose=1).fit(frame)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("trainable params: ")]
    every = sum(p.numel() for p in plain_model(tiny).parameters())
    every += 0 if name == "full" else clf.trainable_parameters_
    share = 100 * clf.trainable_parameters_ / every
    assert lines == [
        f"trainable params: {clf.trainable_parameters_:,} || all params: {every:,} || trainable%: {share:.4f}"
    ]
    if name == "lora":
        peft.get_peft_model(plain_model(tiny), resolve_adapter(name).config("decoder")).print_trainable_parameters()
        assert capfd.readouterr().out.strip() == lines[0]
    classifier(settings, adapter=name).fit(frame)
    assert capfd.readouterr() == ("", "")


def test_the_table(capsys):
    table.main(["ia3", "prompt_tuning"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == table.HEADER
    assert [line.split()[0] for line in lines] == ["ia3", "prompt_tuning"]
    assert re.search(r" yes +yes \(\de-\d\d\)$", lines[0])
    assert lines[1].endswith("yes              not defined")
