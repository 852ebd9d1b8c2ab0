"""Vectors of a frozen base: each distinct prompt once, by content, in memory and on disk."""

from __future__ import annotations

import json
import runpy
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from head_side import headed, make_encoder
from sklearn.model_selection import GridSearchCV
from torch_side import same

import llmfit
from llmfit import LLMRegressor, embeddings, scoring
from llmfit.embeddings import look_up, space_name
from llmfit.exceptions import DataWarning

PROMPTS = [(1, 2, 3), (1, 2), (4,), (1, 2, 3), ()]


class Counted:
    """Computes a vector of three numbers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        self.asked += prompts
        return torch.tensor([[len(p), sum(p), 0.5] for p in prompts])


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    embeddings.forget_embeddings()
    yield
    embeddings.forget_embeddings()


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The prompts that go through a base model, one by one."""
    read: list[tuple[int, ...]] = []
    collate = scoring.collate_answers

    def watch(rows: Any, *rest: Any) -> Any:
        read.extend(row.prompt for row in rows)
        return collate(rows, *rest)

    monkeypatch.setattr(scoring, "collate_answers", watch)
    return read


# The store ---------------------------------------------------------------------------------------------------------


def test_a_folder_in_the_home_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    look_up(space_name("a"), PROMPTS, Counted(), "~/kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [space_name("a")]
    assert not (tmp_path / "~").exists()


def test_each_distinct_prompt_is_computed_once() -> None:
    compute = Counted()
    found = look_up("s", PROMPTS, compute)
    assert found.tolist() == [[3, 6, 0.5], [2, 3, 0.5], [1, 4, 0.5], [3, 6, 0.5], [0, 0, 0.5]]
    assert compute.asked == [(1, 2, 3), (1, 2), (4,), ()]
    again = look_up("s", [*PROMPTS, (9,)], compute)
    assert compute.asked[4:] == [(9,)]
    assert torch.equal(again[:5], found)
    look_up("another space", [(4,)], compute)
    assert compute.asked[5:] == [(4,)]


def test_what_was_longest_not_asked_for_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counted()
    monkeypatch.setattr(embeddings, "MOST_BYTES", 2 * 12)  # two vectors of three numbers
    look_up("s", [(1,)], compute)
    look_up("s", [(2,)], compute)
    look_up("s", [(1,)], compute)
    look_up("s", [(3,)], compute)
    assert compute.asked == [(1,), (2,), (3,)]
    look_up("s", [(1,)], compute)
    assert len(compute.asked) == 3
    look_up("s", [(2,)], compute)
    assert len(compute.asked) == 4
    assert look_up("s", [(5,), (6,), (7,)], compute).shape == (3, 3)  # more than is kept is given all the same


def test_a_folder_serves_other_processes(tmp_path: Path) -> None:
    compute = Counted()
    first = look_up("s", PROMPTS[:2], compute, tmp_path)
    look_up("s", PROMPTS, compute, tmp_path)
    embeddings.forget_embeddings()
    fresh = Counted()
    assert torch.equal(look_up("s", PROMPTS, fresh, tmp_path)[:2], first)
    assert fresh.asked == []
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert list(tmp_path.rglob("*.tmp")) == []
    look_up("t", PROMPTS[:1], fresh, tmp_path)
    assert fresh.asked == [(1, 2, 3)]


DAMAGES: dict[str, Any] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "another file": lambda _: b"hello" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again_and_replaced(damage: str, tmp_path: Path) -> None:
    compute = Counted()
    whole = look_up("s", PROMPTS, compute, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    embeddings.forget_embeddings()
    with pytest.warns(DataWarning, match=rf"^The file '.*{path.name}' of kept vectors is damaged \(.*\): they are"):
        again = look_up("s", PROMPTS, compute, tmp_path)
    assert torch.equal(again, whole)
    assert len(compute.asked) == 8
    embeddings.forget_embeddings()
    assert torch.equal(look_up("s", PROMPTS, compute, tmp_path), whole)
    assert len(compute.asked) == 8


def test_threads_may_ask_at_once_and_one_that_computes_keeps_none_from_asking(tmp_path: Path) -> None:
    """The model is lent to one thread at a time: its holder may ask for vectors while another waits for the model."""
    model, waiting = threading.Lock(), threading.Event()
    found: list[torch.Tensor] = []

    def compute(prompts: list[tuple[int, ...]]) -> torch.Tensor:
        waiting.set()
        with model:
            return Counted()(prompts)

    with model:
        threads = [
            threading.Thread(target=lambda: found.append(look_up("s", PROMPTS, compute, tmp_path)), daemon=True)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        assert waiting.wait(10)
        assert look_up("other", [(7,)], Counted()).tolist() == [[1, 7, 0.5]]
    for thread in threads:
        thread.join(10)
    assert len(found) == 4
    assert all(torch.equal(one, found[0]) for one in found)
    assert len(list(tmp_path.rglob("vectors-*"))) == 1


def test_a_space_is_named_by_contents() -> None:
    assert len({space_name("f", "float32", pooling) for pooling in ("mean", "last", "first")}) == 3
    assert space_name("f", torch.float32) == space_name("f", "torch.float32")
    assert space_name("a", "bc") != space_name("ab", "c")


# What it saves -----------------------------------------------------------------------------------------------------


def test_forward_passes_are_one_a_distinct_prompt_not_one_an_epoch_or_fold(
    rows_read: Any, frame: pd.DataFrame, settings: Any
) -> None:
    rows = pd.concat([frame, frame[:3]])  # eleven rows, eight prompts
    given = settings | {"adapter": None, "epochs": 7, "features": "text"}
    clf = headed(given).fit(rows)
    assert len(rows_read) == len(set(rows_read)) == 8
    clf.predict_proba(rows)
    clf.score(rows)
    assert len(rows_read) == 8
    grid = {"head__dropout": [0.0, 0.5], "learning_rate": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]}
    GridSearchCV(headed(given), grid, cv=3).fit(rows, rows["label"])
    headed(given | {"target": "size"}, LLMRegressor).fit(rows)  # another question about the same prompts
    assert len(rows_read) == 8
    headed(given, head={"pooling": "mean"}).fit(rows)
    assert len(rows_read) == 16
    llmfit.clear_cache()
    clf.predict(rows)
    assert len(rows_read) == 24


def test_vectors_are_found_by_content_never_by_folder(
    rows_read: Any, frame: pd.DataFrame, settings: Any, tiny: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    given = settings | {"adapter": None}
    one = headed(given).fit(frame)
    other = headed(given | {"base_model": str(tmp_path / "copy")}).fit(frame)
    assert len(rows_read) == 8
    assert same(one, other)
    headed(given | {"dtype": "bfloat16"}).fit(frame)
    assert len(rows_read) == 16
    encoder = make_encoder(tmp_path / "model")
    headed(given | {"base_model": encoder}).fit(frame)
    shutil.rmtree(encoder)
    make_encoder(Path(encoder), seed=1)  # other weights at the same place
    llmfit.base_model._cache.clear()
    headed(given | {"base_model": encoder}).fit(frame)
    assert len(rows_read) == 32


def test_a_folder_of_vectors_is_written_where_it_is_asked_for(
    rows_read: Any, frame: pd.DataFrame, settings: Any, tmp_path: Path
) -> None:
    given = settings | {"adapter": None, "epochs": 3}
    plain = headed(given).fit(frame)
    embeddings.forget_embeddings()
    kept = headed(given, head={"cache": tmp_path / "vectors"}).fit(frame)
    assert len(rows_read) == 16
    embeddings.forget_embeddings()
    again = headed(given, head={"cache": str(tmp_path / "vectors")}).fit(frame)
    assert len(rows_read) == 16
    assert same(plain, kept)
    assert same(kept, again)
    again.save(tmp_path / "model")
    assert np.array_equal(llmfit.load(tmp_path / "model").predict_proba(frame), kept.predict_proba(frame))
    assert len(rows_read) == 16


def test_a_folder_is_filled_from_memory(rows_read: Any, frame: pd.DataFrame, settings: Any, tmp_path: Path) -> None:
    given = settings | {"adapter": None, "epochs": 3}
    headed(given).fit(frame.iloc[:5])
    kept = headed(given, head={"cache": tmp_path / "vectors"}).fit(frame)
    headed(given, head={"cache": tmp_path / "vectors"}).fit(frame)
    assert len(rows_read) == 8
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    embeddings.forget_embeddings()
    again = headed(given, head={"cache": tmp_path / "vectors"}).fit(frame)
    assert len(rows_read) == 8
    assert same(kept, again)


def test_the_benchmark_measures_both(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "frozen_head.py"))
    script["main"].__globals__["REPEATS"] = 1
    fit, epochs = script["fit"], []
    seconds = iter([[9.0], [8.0, 1.0, 3.0], [6.0, 4.0, 2.0]])
    script["main"].__globals__["fit"] = lambda *given: (epochs.append(fit(*given)), next(seconds))[1]
    result = script["main"](tiny, "12")
    assert json.loads(capsys.readouterr().out.splitlines()[0])["rows"] == 12
    assert [measured["ratio"] for measured in result.values()] == [4.0, 2.0]
    assert [len(taken) for taken in epochs] == [script["EPOCHS"]] * 3
    assert all(second > 0 for taken in epochs for second in taken)


def test_an_adapter_is_never_given_kept_vectors(rows_read: Any, frame: pd.DataFrame, settings: Any) -> None:
    headed(settings | {"adapter": None}).fit(frame)
    clf = headed(settings | {"adapter": {"r": 2}, "epochs": 5}).fit(frame)
    before = len(rows_read)
    clf.predict(frame)
    assert len(rows_read) == before + 8


def test_a_frozen_head_is_that_of_a_plain_loop_on_scaled_vectors(frame: pd.DataFrame, settings: Any) -> None:
    """The same steps by torch alone: vectors with mean 0 and length 1, SGD from zeros, scales taken back at the end."""
    from torch_side import fit_seed

    from llmfit.base_model import load_base_model
    from llmfit.batching import epoch_order
    from llmfit.estimators.heads import embed

    own = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant", "warmup": 0, "max_grad_norm": None}
    clf = headed(settings | own | {"adapter": None, "epochs": 4, "batch_size": 4}).fit(frame)
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    prompts = [row.prompt for row in clf._prompts.encode(base, frame[["text"]])]
    vectors = embed(base, clf._head, prompts)
    scale = Scaled(vectors)
    weight, bias = torch.zeros(2, 32, requires_grad=True), torch.zeros(2, requires_grad=True)
    truth = torch.tensor([int(label == "vehicle") for label in frame["label"]])
    for epoch in range(4):
        for step in np.split(epoch_order(8, fit_seed(), epoch + 1), 2):
            some = torch.from_numpy(step.copy())
            logits = scale.vectors[some] @ weight.T + bias
            grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, truth[some]), (weight, bias))
            with torch.no_grad():
                weight -= 0.05 * grads[0]
                bias -= 0.05 * grads[1]
    expected = (scale.vectors @ weight.T + bias).softmax(-1).detach().numpy()
    np.testing.assert_allclose(clf.predict_proba(frame), expected, atol=1e-5)


class Scaled:
    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = (vectors - vectors.mean(0)) / (32**0.5 * vectors.std(0, correction=0))


def test_a_base_in_fewer_bits_has_vectors_of_its_own(rows_read: Any, frame: pd.DataFrame, settings: Any) -> None:
    from llmfit.base_model import load_base_model
    from llmfit.quantization import Quantization

    headed(settings | {"adapter": None}).fit(frame)
    base = load_base_model(settings["base_model"], device="cpu", dtype="float32")
    before = vars(base).get("quantization")
    base.quantization = Quantization(bits=4)
    try:
        headed(settings | {"adapter": None}).fit(frame)
    finally:
        base.quantization = before
    assert len(rows_read) == 16


@pytest.mark.parametrize(
    "ways",
    [
        ({"bits": 8, "threshold": 0.0}, {"bits": 8, "threshold": 0.5}),
        ({"bits": 4, "compute_dtype": "float32"}, {"bits": 4, "compute_dtype": "bfloat16"}),
    ],
    ids=["threshold", "compute_dtype"],
)
def test_every_setting_of_few_bits_has_vectors_of_its_own(
    ways: Any, frame: pd.DataFrame, settings: Any, tmp_path: Path
) -> None:
    """In the process and in a folder, whichever was asked first."""
    from conftest import make_model

    given = settings | {"adapter": None, "base_model": make_model(tmp_path / "wide", hidden=64)}
    head = {"type": "linear", "cache": str(tmp_path / "kept")}
    found = []
    for way in (*ways, *ways[::-1]):
        found.append(headed(given | {"quantization": way}, head=head).fit(frame).predict_proba(frame))
        embeddings.forget_embeddings()
    assert not np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[3])
    assert np.array_equal(found[1], found[2])
    assert len(list((tmp_path / "kept").iterdir())) == 2
    shared = [headed(given | {"quantization": way}).fit(frame).predict_proba(frame) for way in ways]  # in memory
    assert not np.array_equal(*shared)
