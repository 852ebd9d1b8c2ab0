"""A fit that was killed and is started again ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch_side import classifier, generator, same, weights

from llmfit import checkpoints
from llmfit.exceptions import ParameterError
from llmfit.optim import OPTIMIZERS

STEPS = 6  # of every fit here: two epochs of three steps


class Killed(BaseException):
    """Nothing in a fit may catch it."""


class KillAt:
    """Ends a fit after a step, and remembers the steps that it saw."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, []

    def __call__(self, state: Any) -> None:
        self.seen.append(state.step)
        if state.step == self.step:
            raise Killed


@pytest.fixture(autouse=True)
def _every_state_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))


@pytest.fixture
def resumable(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **settings,
        "epochs": 2,
        "batch_size": 3,
        "adapter": {"r": 4, "dropout": 0.1},
        "checkpoint_dir": tmp_path / "states",
    }


def killed(settings: dict[str, Any], step: int, rows: pd.DataFrame, make: Any = classifier, **fit: Any) -> list[int]:
    """Fit until a step; the steps that were taken."""
    kill = KillAt(step)
    with pytest.raises(Killed):
        make(settings, callbacks=kill).fit(rows, **fit)
    return kill.seen


def uninterrupted(settings: dict[str, Any], rows: pd.DataFrame, make: Any = classifier, **fit: Any) -> Any:
    return make({**settings, "checkpoint_dir": None}).fit(rows, **fit)


def assert_same_fit(one: Any, other: Any) -> None:
    assert same(one, other)
    steady = [name for name in one.history_ if name != "seconds"]
    pd.testing.assert_frame_equal(one.history_[steady], other.history_[steady], check_exact=True)
    assert one.best_epoch_ == other.best_epoch_


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_fit_killed_at_any_step_ends_as_if_it_had_not_been(step, resumable, frame):
    expected = uninterrupted(resumable, frame)
    assert killed(resumable, step, frame) == list(range(1, step + 1))
    watch = KillAt(0)
    again = classifier(resumable, callbacks=watch).fit(frame)
    assert watch.seen == list(range(step, STEPS + 1))  # it went on; only the step of the kill was taken twice
    assert_same_fit(again, expected)
    np.testing.assert_array_equal(again.predict_proba(frame), expected.predict_proba(frame))
    assert list(resumable["checkpoint_dir"].iterdir()) == []


FITS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "sgd with momentum": {"optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True}},
    "adamw of the largest": {"optimizer": {"type": "adamw", "amsgrad": True}},
    "adagrad with decay": {"optimizer": {"type": "adagrad", "lr_decay": 0.1}},
    "rmsprop centered": {"optimizer": {"type": "rmsprop", "centered": True, "momentum": 0.5}},
    "full": {"adapter": "full"},
    "full in eight bits": {"adapter": "full", "optimizer": "adamw_8bit"},
    "full lion in eight bits": {"adapter": "full", "optimizer": "lion_8bit"},
    "dora": {"adapter": {"r": 4, "use_dora": True, "dropout": 0.1}},
    "few bits": {"dtype": "bfloat16"},
    "few bits in full": {"dtype": "bfloat16", "adapter": "full"},
    "validation": {"validation_fraction": 0.25, "batch_size": 2},
    "early stopping": {"validation_fraction": 0.25, "batch_size": 2, "early_stopping": 1},
    "warmup and decay": {"warmup": 0.5, "schedule": "linear", "weight_decay": 0.1},
}


@pytest.mark.parametrize("changed", FITS.values(), ids=FITS)
def test_a_fit_killed_twice_ends_as_if_it_had_not_been(changed, resumable, frame):
    settings = {**resumable, **changed}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        expected = uninterrupted(settings, frame)
        assert killed(settings, 2, frame) == [1, 2]
        assert killed(settings, 4, frame) == [2, 3, 4]
        again = classifier(settings).fit(frame)
    assert_same_fit(again, expected)
    assert list(resumable["checkpoint_dir"].iterdir()) == []


def test_the_best_epoch_before_a_kill_is_the_one_restored(resumable, frame):
    """The best weights lie in the state: the kill comes when later epochs have already spoilt them."""
    held = frame.assign(label=frame["label"].map({"fruit": "vehicle", "vehicle": "fruit"}))
    changed = {"epochs": 40, "learning_rate": 1e-2, "adapter": "full", "early_stopping": 3, "batch_size": 8}
    settings = {**resumable, **changed, "warmup": 0}
    expected = uninterrupted(settings, frame, generator, eval_set=held)
    best, last = expected.best_epoch_, len(expected.history_)
    assert last == best + 3
    assert killed(settings, best + 2, frame, generator, eval_set=held)[-1] == best + 2
    watch = KillAt(0)
    again = generator(settings, callbacks=watch).fit(frame, eval_set=held)
    assert watch.seen == [best + 2, best + 3]
    assert_same_fit(again, expected)


def test_a_warm_start_is_a_fit_of_its_own(resumable, frame):
    settings = {**resumable, "warm_start": True}
    expected = uninterrupted(settings, frame).fit(frame)
    clf = classifier(settings).fit(frame)
    with pytest.raises(Killed):
        clf.set_params(callbacks=KillAt(4)).fit(frame)
    watch = KillAt(0)
    clf.set_params(callbacks=watch).fit(frame)
    assert watch.seen == [4, 5, 6]
    assert_same_fit(clf, expected)


OTHERS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 3},
    "learning rate": {"learning_rate": 3e-3},
    "batch size": {"batch_size": 4},
    "rank": {"adapter": {"r": 2, "dropout": 0.1}},
    "dropout": {"adapter": {"r": 4, "dropout": 0.2}},
    "adapter": {"adapter": "full"},
    "optimizer": {"optimizer": "nadam"},
    "settings of the optimizer": {"optimizer": {"type": "adamw", "eps": 1e-2}},
    "schedule": {"schedule": "constant"},
    "warmup": {"warmup": 3},
    "weight decay": {"weight_decay": 0.5},
    "norm": {"max_grad_norm": 0.01},
    "random state": {"random_state": 1},
    "template": {"template": "{text} is one"},
    "validation": {"validation_fraction": 0.25},
    "class weight": {"class_weight": {"fruit": 5}},
    "token budget": {"batch_tokens": 50},  # with dropout it decides which numbers are drawn
    "dtype": {"dtype": "float64"},
}


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_another_fit_begins_at_its_own_beginning(changed, resumable, frame):
    killed(resumable, 4, frame)
    watch = KillAt(0)
    clf = classifier(resumable, callbacks=watch, **changed).fit(frame)
    assert watch.seen == list(range(1, len(clf.history_) + 1))
    assert len(list(resumable["checkpoint_dir"].iterdir())) == 1  # the state of the first one is still there


@pytest.mark.parametrize("kind", ["text", "label", "order", "weights", "base model", "eval_set"])
def test_a_fit_of_other_rows_begins_at_its_own_beginning(kind, resumable, frame, tiny_chat):
    killed(resumable, 4, frame)
    rows, fit, settings = frame.copy(), {}, dict(resumable)
    if kind == "text":
        rows.loc["r3", "text"] = "slow train"
    elif kind == "label":
        rows.loc["r3", "label"] = "fruit"
    elif kind == "order":
        rows = rows.iloc[::-1]
    elif kind == "weights":
        fit["sample_weight"] = [2.0] + [1.0] * 7
    elif kind == "eval_set":
        fit["eval_set"] = frame
    else:
        settings["base_model"] = tiny_chat
    watch = KillAt(0)
    classifier(settings, callbacks=watch).fit(rows, **fit)
    assert watch.seen == list(range(1, STEPS + 1))


def test_callbacks_and_verbosity_are_no_other_fit(resumable, frame, capfd):
    killed(resumable, 4, frame)
    watch = KillAt(0)
    classifier(resumable, callbacks=[watch, lambda _: None], verbose=1).fit(frame)
    assert watch.seen == [4, 5, 6]
    assert "LLMClassifier" in capfd.readouterr().err


def test_fits_that_share_a_folder_do_not_mix(resumable, frame):
    many = [{**resumable, "learning_rate": rate, "random_state": seed} for rate, seed in ((1e-3, 0), (1e-2, 1))]
    for step, settings in enumerate(many, 2):
        killed(settings, step, frame)
    assert len(list(resumable["checkpoint_dir"].iterdir())) == len(many)
    for step, settings in enumerate(many, 2):
        watch = KillAt(0)
        assert_same_fit(classifier(settings, callbacks=watch).fit(frame), uninterrupted(settings, frame))
        assert watch.seen[0] == step
    assert list(resumable["checkpoint_dir"].iterdir()) == []


def test_a_stop_before_the_kill_is_a_stop_after_it(resumable, frame):
    def stop(state: Any) -> None:
        state.stop = state.step >= 3

    expected = classifier({**resumable, "checkpoint_dir": None}, callbacks=stop).fit(frame)
    with pytest.raises(Killed):
        classifier(resumable, callbacks=[stop, KillAt(3)]).fit(frame)
    assert_same_fit(classifier(resumable, callbacks=stop).fit(frame), expected)


def test_a_kill_while_a_state_is_written_leaves_the_one_before(resumable, frame, monkeypatch):
    save, calls = checkpoints.save_file, []

    def half(tensors: Any, path: Any, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half of a sta")
            raise Killed
        save(tensors, path, metadata=metadata)

    expected = uninterrupted(resumable, frame)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", half)
        with pytest.raises(Killed):
            classifier(resumable).fit(frame)
    watch = KillAt(0)
    assert_same_fit(classifier(resumable, callbacks=watch).fit(frame), expected)
    assert watch.seen == [4, 5, 6]
    assert list(resumable["checkpoint_dir"].iterdir()) == []


def test_states_take_a_small_share_of_the_time(resumable, frame, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", 1e-9)
    save, calls = checkpoints.save_file, []
    monkeypatch.setattr(checkpoints, "save_file", lambda *a, **k: (calls.append(1), save(*a, **k)))
    clf = classifier(resumable).fit(frame)
    assert len(calls) == 1  # the first, which tells what one costs
    assert_same_fit(clf, uninterrupted(resumable, frame))


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)])
def test_without_an_int_to_seed_it_a_fit_cannot_be_taken_up(random_state, resumable, frame):
    with pytest.raises(ParameterError) as error:
        classifier(resumable, random_state=random_state).fit(frame)
    assert str(error.value) == (
        "The 'checkpoint_dir' parameter of LLMClassifier needs random_state to be an int, so that a fit which is "
        f"started again is the same fit. Got {random_state!r} instead."
    )
    assert not resumable["checkpoint_dir"].exists()


def test_a_process_that_is_killed_leaves_a_fit_that_goes_on(resumable, frame, tmp_path):
    """The real thing: SIGKILL, which no Python code can catch."""
    script = tmp_path / "fit.py"
    frame.to_csv(tmp_path / "rows.csv")
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal
            import pandas as pd
            from llmfit import LLMClassifier, checkpoints
            checkpoints.SHARE_OF_TIME = float("inf")
            def kill(state):
                if state.step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
            rows = pd.read_csv({str(tmp_path / "rows.csv")!r}, index_col=0)
            LLMClassifier(
                {resumable["base_model"]!r}, template="{{text}} is a", target="label", epochs=2, batch_size=3,
                learning_rate=1e-2, adapter={resumable["adapter"]!r}, random_state=0, device="cpu", dtype="float32",
                verbose=0, checkpoint_dir={str(resumable["checkpoint_dir"])!r}, callbacks=kill,
            ).fit(rows)
            """
        )
    )
    root = str(Path(checkpoints.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(_threads())}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    watch = KillAt(0)
    again = classifier(resumable, callbacks=watch).fit(frame)
    assert watch.seen == [4, 5, 6]
    assert_same_fit(again, uninterrupted(resumable, frame))
    assert weights(again)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
