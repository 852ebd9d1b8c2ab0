"""A linear head in place of words: what it sees, how it learns, what it answers, on every kind of base model."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import NAME, put_in_place
from head_side import MODELS, SETS, headed, make_encoder, pooled_by_hand
from sklearn.base import clone
from sklearn.metrics import f1_score, hamming_loss, jaccard_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.utils.class_weight import compute_sample_weight
from torch_side import CPU, fit_seed, furthest, plain_model, plain_tokenizer, same

import llmfit
from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.answers import LOSSES, collate_answers
from llmfit.base_model import load_base_model
from llmfit.batching import epoch_order
from llmfit.encoding import Encoded
from llmfit.exceptions import DataError, ModelLoadError, ParameterError
from llmfit.heads import HEADS, LinearHead, Pooled, resolve_head
from llmfit.heads.modules import POOLINGS
from llmfit.metrics import set_metrics

ADAPTERS: dict[str, Any] = {"none": None, "lora": {"type": "lora", "r": 4}, "full": "full"}


@pytest.fixture(scope="module")
def bases(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of a tiny model of every kind."""
    return {"decoder": tiny} | {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


# What a head sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["decoder", *MODELS])
def test_a_vector_is_that_of_transformers_alone_whatever_stands_beside_it(kind, pooling, bases):
    base = load_base_model(bases[kind], device="cpu", dtype="float32")
    rows = [(1, 70, 80, 90), (1, 70), (1, 60, 61, 62, 63, 64, 65, 66, 2)]
    expected = torch.stack([pooled_by_hand(kind, bases[kind], row, pooling) for row in rows])
    with base.attach(Pooled(pooling)) as model, torch.no_grad():
        for some in ([0, 1, 2], [2, 1], [0], [1], [2]):
            batch = collate_answers([Encoded(rows[i], target=(0.0,)) for i in some], base.pad_id, CPU)
            found = model(batch.input_ids, batch.lengths)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected[some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", *MODELS])
def test_auto_pools_where_a_token_has_seen_the_others(kind, bases, frame, settings):
    given = settings | {"base_model": bases[kind], "adapter": None}
    auto, named = (
        headed(given, head={"pooling": pooling}).fit(frame)
        for pooling in ("auto", "last" if kind == "decoder" else "mean")
    )
    assert same(auto, named)


def test_a_model_that_gives_all_positions_has_the_same_vectors(tiny, monkeypatch):
    base = load_base_model(tiny, device="cpu", dtype="float32")
    batch = collate_answers([Encoded((1, 70, 80), target=(0.0,)), Encoded((1, 5), target=(0.0,))], 0, CPU)
    with base.attach(Pooled("last")) as model, torch.no_grad():
        expected = model(batch.input_ids, batch.lengths)
        forward = model.model.forward
        model.model.forward = lambda logits_to_keep, **given: forward(**given)  # noqa: ARG005
        torch.testing.assert_close(model(batch.input_ids, batch.lengths), expected)


@pytest.mark.parametrize("kind", ["decoder", *MODELS])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_base_model_is_as_before_after_fit_predict_and_a_failed_fit(kind, adapter, bases, frame, settings):
    base = load_base_model(bases[kind], device="cpu", dtype="float32")
    tensors = {name: p.clone() for name, p in base.model.state_dict().items()}
    modules = list(base.model.modules())
    given = settings | {"base_model": bases[kind], "adapter": ADAPTERS[adapter]}
    clf = headed(given).fit(frame)
    clf.predict(frame)
    with pytest.raises(RuntimeError, match="stop"):
        headed(given, callbacks=fail).fit(frame)
    assert all(a is b for a, b in zip(base.model.modules(), modules, strict=True))
    assert all(torch.equal(p, tensors[name]) for name, p in base.model.state_dict().items())


def fail(_: Any) -> None:
    raise RuntimeError("stop")


# How it learns -----------------------------------------------------------------------------------------------------


def by_hand(name: str, outputs: np.ndarray, target: tuple[float, ...]) -> float:
    """The loss of one row, in NumPy."""
    if name == "classes":
        return float(np.logaddexp.reduce(outputs) - outputs[int(target[0])])
    if name == "number":
        return float((outputs[0] - target[0]) ** 2)
    chance = 1 / (1 + np.exp(-outputs))
    return float(-np.mean([math.log(p if wanted else 1 - p) for p, wanted in zip(chance, target, strict=True)]))


TARGETS = {
    "classes": [(0.0,), (2.0,), (1.0,)],
    "sets": [(0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)],
    "number": [(0.5,), (-1.0,), (3.0,)],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_by_hand_summed_by_weight(name):
    outputs = torch.tensor([[0.2, -1.0, 2.0], [1.5, 0.0, -0.5], [0.0, 3.0, 0.1]])
    outputs = outputs[:, :1] if name == "number" else outputs
    weights = (0.5, 2.0, 1.0)
    rows = [Encoded((i,), target=t, weight=w) for i, (t, w) in enumerate(zip(TARGETS[name], weights, strict=True))]
    batch = collate_answers(rows, 0, CPU)
    found = float(LOSSES[name](lambda ids, *_: outputs[ids[:, 0]], batch))
    expected = sum(
        w * by_hand(name, row.double().numpy(), target)
        for row, target, w in zip(outputs, TARGETS[name], weights, strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert set(TARGETS) == set(LOSSES)


def plain_fit(folder: str, kind: str, frame: pd.DataFrame, params: dict[str, Any], weights: Any) -> Any:
    """Full fine-tuning with a head by transformers and torch alone: a linear layer of zeros, SGD, one row at a time."""
    from transformers import AutoModel, AutoModelForCausalLM

    model = (AutoModelForCausalLM if kind == "decoder" else AutoModel).from_pretrained(folder, dtype=torch.float32)
    model.eval()
    tokenizer, labels = plain_tokenizer(folder), sorted(set(frame["label"]))
    head = torch.nn.Linear(32, len(labels))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=params["learning_rate"])
    order = [i for e in range(params["epochs"]) for i in np.split(epoch_order(len(frame), fit_seed(), e + 1), 2)]
    for step in order:
        loss = 0.0
        for i in step:
            ids = torch.tensor([tokenizer(f"{frame['text'].iloc[i]} is a")["input_ids"]])
            out = model(ids, output_hidden_states=True).hidden_states[-1][0]
            pooled = out[-1] if kind == "decoder" else out.mean(0)
            truth = torch.tensor(labels.index(frame["label"].iloc[i]))
            loss = loss + weights[i] * torch.nn.functional.cross_entropy(head(pooled), truth)
        (loss / weights[step].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_fit_equals_transformers_and_torch_alone(kind, bases, frame, settings):
    weights = np.linspace(0.5, 2.0, len(frame))
    own = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant", "warmup": 0, "max_grad_norm": None}
    given = settings | own | {"epochs": 3, "batch_size": 4, "base_model": bases[kind], "adapter": "full"}
    clf = headed(given).fit(frame, sample_weight=weights)
    head = plain_fit(bases[kind], kind, frame, given, weights)
    torch.testing.assert_close(clf._tensors["head/weight"], head.weight.detach(), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(clf._tensors["head/bias"], head.bias.detach(), atol=2e-5, rtol=1e-3)
    assert float(head.weight.detach().abs().max()) > 0.01


def test_the_forward_is_that_of_sequence_classification(bases, frame, settings):
    """The same weights in transformers' own class for Llama, whose head stands on the last token."""
    from transformers import AutoModelForSequenceClassification

    clf = headed(settings | {"adapter": "full", "epochs": 4}).fit(frame)
    model = AutoModelForSequenceClassification.from_pretrained(bases["decoder"], num_labels=2, dtype=torch.float32)
    state = {name: tensor for name, tensor in clf._tensors.items() if not name.startswith("head/")}
    model.load_state_dict(state | {"score.weight": clf._tensors["head/weight"]})
    model.eval()
    ids = [plain_tokenizer(bases["decoder"])(f"{text} is a")["input_ids"] for text in frame["text"]]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row])).logits for row in ids]) + clf._tensors["head/bias"]
    np.testing.assert_allclose(clf.predict_proba(frame), logits.softmax(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", *MODELS])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_learns_rows_by_heart(kind, adapter, bases, frame, settings):
    given = settings | {"base_model": bases[kind], "adapter": ADAPTERS[adapter], "epochs": 40, "warmup": 0}
    rate = {"learning_rate": 0.3} if adapter == "none" else {}  # a head alone learns on vectors of length one
    clf = headed(given | rate, head={"pooling": "mean"}).fit(frame)
    assert clf.history_["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-6)  # a head of zeros
    assert clf.history_["loss"].iloc[-1] < 0.1
    assert clf.score(frame) == 1.0
    assert clf.predict(frame).index.equals(frame.index)
    np.testing.assert_allclose(clf.predict_proba(frame).sum(1), 1.0)


@pytest.mark.parametrize("task", ["classes", "sets", "number"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_way_of_cutting_a_step_changes_a_fit(task, adapter, frame, settings):
    ragged = frame.assign(text=[text * (1 + i % 3) for i, text in enumerate(frame["text"])])
    y = {"classes": frame["label"], "sets": SETS, "number": [0.1, 5, 2, 3, 8, 1, 1, 4]}[task]
    cls = LLMRegressor if task == "number" else LLMClassifier
    weight = np.linspace(0.2, 3.0, len(frame))
    given = settings | {"adapter": ADAPTERS[adapter], "optimizer": "sgd", "template": "{text} is a", "epochs": 2}
    fits = [
        cls(**given, head="linear", batch_tokens=budget, max_length=64).fit(ragged, y, sample_weight=weight)
        for budget in (1, 100, 10**6)
    ]
    assert furthest(fits[0], fits[2]) < 1e-5
    assert furthest(fits[1], fits[2]) < 1e-5
    answers = [fit.predict_proba(ragged) if task != "number" else fit.predict(ragged) for fit in fits]
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-4)


def test_rows_of_weight_zero_are_no_rows_and_a_weight_of_two_is_twice_the_loss(frame, settings):
    given = settings | {"adapter": "full", "optimizer": "sgd"}
    some = headed(given).fit(frame, sample_weight=[1, 1, 1, 1, 0, 0, 0, 0])
    assert same(some, headed(given).fit(frame[:4]))
    weight = np.array([2.0, 1, 1, 1, 1, 1, 1, 1])
    once, twice = headed(given).fit(frame), headed(given).fit(frame, sample_weight=weight)
    head = {fit: fit._tensors["head/bias"] for fit in (once, twice)}
    assert head[twice][0] > head[once][0]  # the first row is fruit


def test_class_weights_weigh_rows(frame, settings):
    given = settings | {"adapter": None, "epochs": 3}
    skewed = frame.assign(label=["fruit"] * 6 + ["vehicle"] * 2)
    balanced = headed(given, class_weight="balanced").fit(skewed)
    by_row = headed(given).fit(skewed, sample_weight=compute_sample_weight("balanced", skewed["label"]))
    assert same(balanced, by_row)
    assert same(
        headed(given, class_weight={"vehicle": 3.0}).fit(skewed),
        headed(given).fit(skewed, sample_weight=np.where(skewed["label"] == "vehicle", 3.0, 1.0)),
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_early_stopping_restores_the_best_epoch(adapter, frame, settings):
    held = frame.assign(label=frame["label"].map({"fruit": "vehicle", "vehicle": "fruit"}))
    given = settings | {"adapter": ADAPTERS[adapter], "epochs": 30, "warmup": 0, "early_stopping": 2}
    clf = headed(given).fit(frame, eval_set=held)
    losses = clf.history_["validation_loss"].dropna()
    assert clf.best_epoch_ == int(np.argmin(losses)) + 1
    assert len(losses) < 30
    assert clf.evaluate(held)["log_loss"] == pytest.approx(losses.min(), abs=1e-5)


class Killed(BaseException):
    """Nothing in a fit may catch it."""


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fit_that_was_killed_goes_on_bit_for_bit(adapter, frame, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfit.checkpoints.SHARE_OF_TIME", float("inf"))
    given = settings | {"adapter": ADAPTERS[adapter], "epochs": 3, "batch_size": 3, "head": {"dropout": 0.2}}
    expected = headed(given).fit(frame)
    steps: list[int] = []

    def kill(state: Any) -> None:
        steps.append(state.step)
        if len(steps) == 4:
            raise Killed

    with pytest.raises(Killed):
        headed(given, callbacks=kill, checkpoint_dir=tmp_path).fit(frame)
    again = headed(given, callbacks=kill, checkpoint_dir=tmp_path).fit(frame)
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert same(again, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_warm_start_goes_on_with_the_head(adapter, frame, settings):
    given = settings | {"adapter": ADAPTERS[adapter], "epochs": 10, "warm_start": True}
    clf = headed(given).fit(frame)
    first = clf.history_["loss"].iloc[-1]
    clf.fit(frame)
    assert clf.history_["loss"].iloc[10] < first + 0.02
    assert clf.history_["step"].tolist() == list(range(1, 21))
    with pytest.raises(DataError) as error:
        clf.fit(frame.assign(label=["fish", "fruit", *frame["label"][2:]]))
    assert str(error.value) == (
        "warm_start goes on with a head of 2 output(s), but the target now wants 3. Set warm_start=False to begin anew."
    )
    with pytest.raises(ParameterError, match="warm_start continues the head of the last fit, LinearHead"):
        clf.set_params(head={"pooling": "mean"}).fit(frame)


def test_a_seed_is_a_result_and_dropout_of_the_head_is_drawn_from_it(frame, settings):
    given = settings | {"adapter": None, "epochs": 3, "head": {"dropout": 0.5}}
    fits = [headed(given | {"random_state": seed}).fit(frame) for seed in (0, 0, 1)]
    assert same(fits[0], fits[1])
    assert not same(fits[0], fits[2])


# What it answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", *MODELS])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saved_heads_come_back_bit_for_bit(kind, adapter, bases, frame, settings, tmp_path):
    given = settings | {"base_model": bases[kind], "adapter": ADAPTERS[adapter]}
    for name, model, y in (
        ("classes", headed(given), None),
        ("sets", headed(given), SETS),
        ("number", headed(given, LLMRegressor, target="size", features="text"), None),
        ("chosen", headed(given, LLMEstimator), None),
    ):
        model.fit(frame, y)
        model.save(tmp_path / name)
        loaded = llmfit.load(tmp_path / name)
        assert same(getattr(loaded, "estimator_", loaded), getattr(model, "estimator_", model))
        assert list(loaded.predict(frame)) == list(model.predict(frame))
        if hasattr(model, "predict_proba"):
            assert np.array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
        assert loaded.get_params() == model.get_params()
        assert (tmp_path / name / "head.safetensors").is_file()
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert "| head | linear (pooling='auto', dropout=0.0, bias=True) |" in card


def test_the_adapter_of_a_saved_head_is_a_peft_folder(bases, frame, settings, tmp_path):
    import peft
    from transformers import AutoModel

    bare = partial(AutoModel.from_pretrained, add_pooling_layer=False)  # whose layer no vector comes through
    for kind, make in (("encoder", bare), ("decoder", plain_model)):
        clf = headed(settings | {"base_model": bases[kind], "adapter": {"r": 2}, "epochs": 3}).fit(frame)
        clf.save(tmp_path / kind)
        model = peft.PeftModel.from_pretrained(make(bases[kind]), str(tmp_path / kind / "adapter")).eval()
        ids = torch.tensor([clf._prompts.encode(load_base_model(bases[kind]), frame[["text"]])[0].prompt])
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            pooled = hidden.mean(0) if kind == "encoder" else hidden[-1]
            logits = clf._tensors["head/weight"] @ pooled + clf._tensors["head/bias"]
        np.testing.assert_allclose(clf.predict_proba(frame)[0], logits.softmax(-1).numpy(), atol=1e-5)


def test_a_damaged_head_is_one_sentence(frame, settings, tmp_path):
    headed(settings | {"adapter": None}).fit(frame).save(tmp_path / "m")
    (tmp_path / "m" / "head.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"is incomplete: head\.safetensors is missing\.$"):
        llmfit.load(tmp_path / "m")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_answers_do_not_depend_on_rows_beside_duplicates_or_order(adapter, frame, settings):
    clf = headed(settings | {"adapter": ADAPTERS[adapter], "epochs": 4}).fit(frame)
    whole = clf.predict_proba(frame)
    np.testing.assert_allclose(clf.predict_proba(frame[::-1]), whole[::-1], atol=1e-6)
    np.testing.assert_allclose(clf.predict_proba(pd.concat([frame, frame])), np.tile(whole, (2, 1)), atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate([clf.predict_proba(frame[i : i + 1]) for i in range(8)]), whole, atol=1e-6
    )
    np.testing.assert_allclose(clf.set_params(batch_tokens=1).predict_proba(frame), whole, atol=1e-5)
    assert clf.predict_proba(frame[:0]).shape == (0, 2)
    assert len(clf.predict(frame[:0])) == 0


def test_a_search_over_keys_of_the_head(frame, settings):
    grid = {"head__pooling": ["mean", "last"], "learning_rate": [1e-2, 1e-1]}
    given = settings | {"adapter": None, "epochs": 30}
    search = GridSearchCV(headed(given, features="text"), grid, cv=2).fit(frame, frame["label"])
    folds = list(StratifiedKFold(2).split(frame, frame["label"]))
    for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        alone = [
            clone(headed(given, features="text")).set_params(**params).fit(frame.iloc[a], frame["label"].iloc[a])
            for a, _ in folds
        ]
        parts = zip(alone, folds, strict=True)
        assert score == np.mean([one.score(frame.iloc[b], frame["label"].iloc[b]) for one, (_, b) in parts])
    assert {one["head__pooling"] for one in search.cv_results_["params"]} == {"mean", "last"}
    assert same(search.best_estimator_, clone(search.best_estimator_).fit(frame, frame["label"]))
    assert headed(given).set_params(head__dropout=0.5).head == {"type": "linear", "dropout": 0.5}


# Several labels a row ----------------------------------------------------------------------------------------------


def test_sets_come_back_in_the_form_in_which_they_were_given(frame, settings):
    given = settings | {"adapter": None, "epochs": 60}
    X = frame[["text"]]
    listed = headed(given, features="text").fit(X, pd.Series(SETS, index=frame.index, name="tags"))
    assert listed.classes_.tolist() == ["fruit", "sweet"]
    answers = listed.predict(X)
    assert isinstance(answers, pd.Series)
    assert answers.index.equals(frame.index)
    assert answers.tolist() == SETS
    assert listed.predict_proba(X).shape == (8, 2)
    assert listed.predict_proba(X).sum(1).max() > 1.2  # each label for itself
    array = np.array([[label in labels for label in ("fruit", "sweet")] for labels in SETS]).astype(int)
    for y in (array, array.astype(bool), array.tolist()):
        clf = headed(given, features="text").fit(X, y)
        assert clf.classes_.tolist() == [0, 1]
        assert isinstance(clf.predict(X), np.ndarray)
        assert clf.predict(X).dtype == np.asarray(y).dtype
        assert (clf.predict(X) == np.asarray(y)).all()
        assert clf.score(X, y) == 1.0
    columns = pd.DataFrame(array, columns=["is_fruit", "is_sweet"], index=frame.index)
    framed = headed(given, features="text").fit(X, columns)
    pd.testing.assert_frame_equal(framed.predict(X), columns)
    assert framed.score(X, columns) == 1.0
    chosen = headed(given, LLMEstimator, head="auto", features="text").fit(X, columns)
    pd.testing.assert_frame_equal(chosen.predict(X), columns)


def test_sets_are_lists_tuples_or_sets_of_any_label(frame, settings):
    given = settings | {"adapter": None, "epochs": 60}
    for make in (tuple, set, frozenset, lambda labels: [*labels, *labels]):
        y = pd.Series([make(labels) for labels in SETS], index=frame.index)
        assert headed(given).fit(frame[["text"]], y).predict(frame).tolist() == SETS
    numbers = pd.Series([[7, 3], [3], [], [7]] * 2, index=frame.index)
    clf = headed(given | {"epochs": 150}, target={"tags": "set"}).fit(frame[["text"]], numbers)
    assert clf.predict(frame).tolist() == [[3, 7], [3], [], [7]] * 2
    assert clf.classes_.tolist() == [3, 7]


def test_measures_of_sets_are_scikit_learns(frame, settings):
    clf = headed(settings | {"adapter": None, "epochs": 3}).fit(frame[["text"]], SETS)
    truth = [[], ["fruit", "new"], *SETS[2:]]
    found = clf.evaluate(frame[["text"]], truth, per_class=True)
    labels = ["fruit", "sweet", "new"]
    y, p = (
        np.array([[label in row for label in labels] for row in side]) for side in (truth, clf.predict(frame).tolist())
    )
    assert found["subset_accuracy"] == np.mean((y == p).all(1)) == clf.score(frame[["text"]], truth)
    assert found["hamming_loss"] == pytest.approx(hamming_loss(y, p))
    assert found["f1_micro"] == pytest.approx(f1_score(y, p, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(y, p, average="macro", zero_division=0))
    assert found["f1_samples"] == pytest.approx(f1_score(y, p, average="samples", zero_division=1))
    assert found["jaccard"] == pytest.approx(jaccard_score(y, p, average="samples", zero_division=1))
    assert found["per_class"].index.tolist() == labels
    assert set_metrics([[]], [[]], np.array(["a"]))["f1_macro"] == 1.0


def test_weights_of_labels_are_the_mean_over_those_of_a_row(frame, settings):
    given = settings | {"adapter": None, "epochs": 2}
    weights = {"fruit": 3.0, "sweet": 0.5}
    by_row = [np.mean([weights[label] for label in labels]) if labels else 1.0 for labels in SETS]
    one = headed(given, class_weight=weights).fit(frame[["text"]], SETS)
    assert same(one, headed(given).fit(frame[["text"]], SETS, sample_weight=by_row))
    counts = {label: sum(label in labels for labels in SETS) for label in weights}
    balanced = {label: sum(counts.values()) / (2 * count) for label, count in counts.items()}
    assert same(
        headed(given, class_weight="balanced").fit(frame[["text"]], SETS),
        headed(given, class_weight=balanced).fit(frame[["text"]], SETS),
    )


def test_a_feature_may_be_a_set_and_reads_as_words(frame, settings):
    rows = pd.DataFrame({"tags": [["b", "a"], {"z", "y"}, (1, 2.0), []] * 2, "label": frame["label"].to_numpy()})
    shown = headed(settings | {"template": "{tags}"}).preview(rows, 4)
    assert shown["prompt"].tolist() == ["b, a", "y, z", "1, 2", ""]


# What is refused ---------------------------------------------------------------------------------------------------

HEAD_SENTENCES: list[tuple[Any, str]] = [
    (None, "The 'head' parameter of LLMClassifier must be one of 'lm', 'linear'. Got None instead."),
    (3, "The 'head' parameter of LLMClassifier must be one of 'lm', 'linear'. Got 3 instead."),
    (
        "liner",
        "The 'head' parameter of LLMClassifier must be one of 'lm', 'linear'. Got 'liner' instead. "
        "Did you mean 'linear'?",
    ),
    ({"type": "mlp"}, "The 'head' parameter of LLMClassifier must be one of 'lm', 'linear'. Got 'mlp' instead."),
    (
        {"poolling": "mean"},
        "The head 'linear' has no parameter 'poolling'. It has 'bias', 'cache', 'dropout', 'pooling'. "
        "Did you mean 'pooling'?",
    ),
    ({"type": "lm", "pooling": "mean"}, "The head 'lm' has no parameter 'pooling'. It has none."),
    (
        {"pooling": "max"},
        "The 'pooling' parameter of head must be one of 'auto', 'last', 'mean', 'first'. Got 'max' instead.",
    ),
    ({"dropout": 1}, "The 'dropout' parameter of head must be a number >= 0 and < 1. Got 1 instead."),
    ({"dropout": -0.1}, "The 'dropout' parameter of head must be a finite number >= 0 and <= 1. Got -0.1 instead."),
    ({"cache": 3}, "The 'cache' parameter of head must be None or a path. Got 3 instead."),
    (
        {"cache": "folder"},
        "The 'cache' parameter of head has no meaning with an adapter, whose training changes the vectors. Set "
        "adapter=None, or cache=None.",
    ),
]


def test_a_head_alone_computes_no_layer_again(settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        headed(settings, adapter=None, gradient_checkpointing=True).fit(frame)
    assert str(error.value) == (
        "The 'gradient_checkpointing' parameter has no meaning with a linear head alone, for which no layer of the "
        "base model is trained. Set gradient_checkpointing=False, or an adapter."
    )


@pytest.mark.parametrize(("head", "sentence"), HEAD_SENTENCES)
def test_a_head_that_cannot_be_used_has_its_sentence(head, sentence, frame, monkeypatch):
    put_in_place(monkeypatch)
    with pytest.raises(ParameterError) as error:
        LLMClassifier(NAME, target="label", head=head, verbose=0).fit(frame)
    assert str(error.value) == sentence


def test_a_generator_has_no_head(frame, monkeypatch):
    put_in_place(monkeypatch)
    with pytest.raises(ParameterError) as error:
        LLMGenerator(NAME, target="label", head="linear", verbose=0).fit(frame)
    assert str(error.value) == "The 'head' parameter of LLMGenerator must be one of 'lm'. Got 'linear' instead."


def test_several_labels_in_words_are_refused(frame, settings):
    for y in (SETS, np.eye(8, 3, dtype=int)):
        with pytest.raises(ParameterError) as error:
            LLMClassifier(**settings).fit(frame[["text"]], y)
        assert str(error.value) == (
            "LLMClassifier answers with one label a row in words, but 'label' holds several. Set head='linear'."
        )


DATA: dict[str, tuple[Any, str]] = {
    "a cell that is no set": (
        {"target": {"label": "set"}},
        "Row 0 (index 'r0'): the target 'label' must hold a list, tuple or set of labels in every row. "
        "Got 'fruit' instead.",
    ),
}


def test_what_is_no_set_is_named(frame, settings):
    for params, sentence in DATA.values():
        with pytest.raises(DataError) as error:
            headed(settings | params).fit(frame)
        assert str(error.value) == sentence
    with pytest.raises(DataError) as error:
        headed(settings).fit(frame[["text"]], [[]] * 8)
    assert str(error.value) == "LLMClassifier needs at least one label in 'label', but every row is empty."
    with pytest.raises(DataError) as error:
        headed(settings | {"adapter": None}).fit(frame[["text"]], SETS, eval_set=(frame[["text"]], [["new"]] * 8))
    assert str(error.value) == (
        "eval_set: Row 0 (index 'r0') has the label 'new', which no fitted row has. The classes are 'fruit', 'sweet'."
    )


def test_every_spelling_of_a_head_is_one_spec():
    for value in ("linear", {}, {"type": "linear"}, LinearHead(), {"pooling": "auto", "dropout": 0.0}):
        assert resolve_head(value, "x", list(HEADS)) == LinearHead()
    assert resolve_head("lm", "x", list(HEADS)) is None
    assert resolve_head({"type": "lm"}, "x", list(HEADS)) is None


def test_encoder_folder_is_one(tmp_path):
    assert load_base_model(make_encoder(tmp_path / "e"), device="cpu").kind == "encoder"
