"""Big files: every row once, in order, whatever stops the run and whenever."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import fake_model
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError

import llmfit
from llmfit import scoring
from llmfit.embeddings import forget_embeddings
from llmfit.exceptions import DataError, DataWarning, LLMFitWarning, ParameterError, TruncationWarning
from llmfit.files import read_table

HERE = Path(__file__).parent
OPTIONS = {"proba": True, "chunk_rows": 7}


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def rows(count: int) -> pd.DataFrame:
    sizes = [i * 37 % 101 for i in range(count)]
    return pd.DataFrame({"id": [f"{i:06d}" for i in range(count)], "size": sizes, "weight": [s / 7 for s in sizes]})


def spoil(path: Path) -> None:
    """Put lines among others that cannot be read, and cells that are no numbers."""
    lines = path.read_text().splitlines(keepends=True)
    for number in range(7, len(lines), 13):
        lines[number] = "lonely\n" if number % 2 else "x,y,1\n"
    path.write_text("".join(lines))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake_model.put_in_place(monkeypatch)
    frame = rows(40).drop(columns="id").assign(label=["low" if i * 37 % 101 < 50 else "high" for i in range(40)])
    return llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows(60).to_csv(tmp_path / "in.csv", index=False)
    spoil(tmp_path / "in.csv")
    return tmp_path / "in.csv"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestOutput:
    def test_is_what_predict_says(self, fake: Any, tmp_path: Path) -> None:
        frame = rows(25)
        frame.to_csv(tmp_path / "in.csv", index=False)
        scored = fake.predict_files(tmp_path / "in.csv", tmp_path / "out.csv", proba=True, chunk_rows=4)
        assert (scored.rows, scored.bad_rows, scored.errors) == (25, 0, None)
        out = pd.read_csv(tmp_path / "out.csv", dtype={"id": str})
        assert out["id"].tolist() == frame["id"].tolist()
        assert out["label_predicted"].tolist() == fake.predict(frame).tolist()
        proba = out[["label_proba_high", "label_proba_low"]].to_numpy()
        np.testing.assert_array_equal(proba, fake.predict_proba(frame))
        assert sorted(files_of(tmp_path)) == ["in.csv", "out.csv", "out.csv.manifest.json"]

    @pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
    @pytest.mark.parametrize("source", ["in.csv", "in.jsonl", "in.parquet"])
    def test_has_the_same_rows_in_every_format(self, name: str, source: str, fake: Any, tmp_path: Path) -> None:
        frame = rows(9).assign(gap=pd.array([1, None, 3] * 3, dtype="Int64"))
        write = {".csv": "to_csv", ".jsonl": "to_json", ".parquet": "to_parquet"}[Path(source).suffix]
        options = (
            {"orient": "records", "lines": True, "double_precision": 15} if write == "to_json" else {"index": False}
        )
        getattr(frame, write)(tmp_path / source, **options)
        fake.predict_files(tmp_path / source, tmp_path / name, chunk_rows=2)
        read = read_table(tmp_path / name)
        pd.testing.assert_frame_equal(
            read, frame.assign(label_predicted=fake.predict(frame)).astype({"id": "str", "label_predicted": "str"})
        )

    @pytest.mark.parametrize("chunk_rows", [1, 3, 100])
    def test_rows_that_have_no_answer_stand_among_the_errors(
        self, chunk_rows: int, fake: Any, table: Path, tmp_path: Path
    ) -> None:
        scored = fake.predict_files(table, tmp_path / "out.csv", chunk_rows=chunk_rows)
        out, errors = pd.read_csv(tmp_path / "out.csv"), pd.read_csv(tmp_path / "out.errors.csv")
        assert (scored.rows, scored.bad_rows, scored.errors) == (60, 5, str(tmp_path / "out.errors.csv"))
        assert errors["row"].tolist() == [6, 19, 32, 45, 58]
        assert errors["line"].tolist() == [8, 21, 34, 47, 60]
        assert set(errors["file"]) == {"in.csv"}
        assert errors["reason"].tolist()[:2] == [
            "it has 1 value(s), the header has 3.",
            "the number column 'size' holds 'y', which is no number.",
        ]
        good = rows(60).drop(index=errors["row"])
        assert out["id"].tolist() == good["id"].astype(int).tolist()
        assert out["label_predicted"].tolist() == fake.predict(good).tolist()

    def test_keep_names_the_columns_behind_the_number(self, fake: Any, table: Path, tmp_path: Path) -> None:
        fake.predict_files(table, tmp_path / "a.csv", keep=["id"], errors=tmp_path / "bad.jsonl")
        fake.predict_files(table, tmp_path / "b.csv", keep=[])
        a, b = (pd.read_csv(tmp_path / name) for name in ("a.csv", "b.csv"))
        assert a.columns.tolist() == ["row", "id", "label_predicted"]
        assert a["row"].tolist() == a["id"].tolist()
        assert b.columns.tolist() == ["row", "label_predicted"]
        assert read_table(tmp_path / "bad.jsonl")["row"].tolist() == [6, 19, 32, 45, 58]

    def test_half_a_surrogate_pair_is_an_error_of_its_row(self, fake: Any, tmp_path: Path) -> None:
        lines = ['{"size": 1, "weight": 2, "id": "\\ud800"}', '{"size": 1, "weight": 2, "id": "x"}']
        (tmp_path / "in.jsonl").write_text("\n".join(lines))
        assert fake.predict_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl").bad_rows == 1
        assert read_table(tmp_path / "out.jsonl")["id"].tolist() == ["x"]
        with pytest.raises(DataError) as caught:
            fake.predict_files(tmp_path / "in.jsonl", tmp_path / "strict.jsonl", strict=True)
        assert str(caught.value) == "'in.jsonl', line 1: it holds half of a surrogate pair, which is no character."

    def test_no_rows_give_a_head_alone(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.csv").write_text("size,weight\n")
        assert fake.predict_files(tmp_path / "in.csv", tmp_path / "out.csv").rows == 0
        assert (tmp_path / "out.csv").read_text() == "size,weight,label_predicted\n"

    def test_prompts_that_are_too_long_are_errors(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        clf = llmfit.LLMClassifier(**settings, target="label", features="text", max_length=120).fit(frame)
        frame.loc["r2", "text"] = "z" * 150
        frame.to_csv(tmp_path / "in.csv", index=False)
        clf.predict_files(tmp_path / "in.csv", tmp_path / "out.csv", chunk_rows=4)
        (error,) = pd.read_csv(tmp_path / "out.errors.csv").to_dict("records")
        assert error["row"] == 2
        assert error["reason"].startswith("the prompt has 2")
        assert error["reason"].endswith("Raise max_length, or set truncation='prompt'.")
        out = pd.read_csv(tmp_path / "out.csv")
        assert out["label_predicted"].tolist() == clf.predict(frame.drop(index="r2")).tolist()

    def test_what_chunks_warn_of_is_said_once(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        clf = llmfit.LLMClassifier(**settings, target="label", features="text", max_length=120, truncation="prompt")
        clf.fit(frame)
        frame.assign(text="z" * 150).to_csv(tmp_path / "in.csv", index=False)
        with pytest.warns(TruncationWarning) as caught:
            clf.predict_files(tmp_path / "in.csv", tmp_path / "out.csv", chunk_rows=2)
        assert len(caught) == 1
        said = str(caught[0].message)
        assert said.startswith("8 of 8 prompts were cut to max_length 120 tokens, ")
        with pytest.warns(TruncationWarning) as whole:
            clf.predict(pd.read_csv(tmp_path / "in.csv"))
        assert said == str(whole[0].message)

    def test_answers_that_are_no_number_are_counted_over_all_chunks(
        self, settings: Any, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of each target by itself, and a frame that is refused and halved counts its rows once."""
        rows = frame.assign(price=range(8), weight=range(8), size=range(8))
        given = {"target": ["price", "weight"], "features": ["text", "size"], "head": "lm"}
        model = llmfit.LLMEstimator(**settings, **given).fit(rows)
        said = {"price": ["1", "many", "3", "4", "dear", "6", "7", "8"], "weight": ["light", *"2345678"]}

        def in_words(self: Any, base: Any, encoded: Any, later: int = 0) -> Any:
            places = [int(re.search(r"size: (\d)", tokenizer.decode(row.prompt))[1]) for row in encoded]
            return [said[self.target_][place] for place in places], [()] * len(encoded)

        tokenizer = llmfit.base_model.load_base_model(settings["base_model"], device="cpu", dtype="float32").tokenizer
        monkeypatch.setattr(llmfit.LLMGenerator, "_in_words", in_words)
        rows.to_csv(tmp_path / "in.csv", index=False)
        expected = [
            "2 of 8 answers for 'price' are no number, and missing: 'many', 'dear'.",
            "1 of 8 answers for 'weight' are no number, and missing: 'light'.",
        ]
        for chunk_rows in (2, 3, 8):
            out = tmp_path / f"{chunk_rows}.csv"
            with pytest.warns(DataWarning) as caught:
                model.predict_files(tmp_path / "in.csv", out, keep=["size"], chunk_rows=chunk_rows)
            assert [str(one.message) for one in caught] == expected
            assert pd.read_csv(out)["price_predicted"].isna().sum() == 2
        odd = pd.concat([rows, rows.iloc[:1].assign(text="z" * 5000)])
        odd.to_csv(tmp_path / "odd.csv", index=False)
        with pytest.warns(DataWarning) as caught:
            done = model.predict_files(tmp_path / "odd.csv", tmp_path / "odd.out.csv", keep=["size"])
        assert done.bad_rows == 1
        assert [str(one.message) for one in caught] == expected


class TestEstimators:
    def columns(self, estimator: Any, frame: pd.DataFrame, tmp_path: Path, **options: Any) -> pd.DataFrame:
        frame.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
        before = dict(vars(estimator))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LLMFitWarning)
            estimator.predict_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep=[], chunk_rows=3, **options)
        assert vars(estimator) == before
        return read_table(tmp_path / "out.jsonl").drop(columns="row")

    def test_generator_and_regressor(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        words = llmfit.LLMGenerator(**settings, target="label", generation={"max_new_tokens": 3}).fit(frame)
        out = self.columns(words, frame, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LLMFitWarning)
            assert out["label_predicted"].fillna("").tolist() == words.predict(frame).tolist()
        (tmp_path / "out.jsonl").unlink()
        sizes = llmfit.LLMRegressor(**settings, target="size").fit(frame)
        out = self.columns(sizes, frame, tmp_path)
        np.testing.assert_allclose(out["size_predicted"], sizes.predict(frame), rtol=1e-5)

    def test_several_targets(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        both = llmfit.LLMEstimator(**settings, target={"label": "category", "size": "number"}, head="linear").fit(frame)
        out = self.columns(both, frame, tmp_path, proba=True)
        assert out.columns.tolist() == ["label_predicted", "label_proba_fruit", "label_proba_vehicle", "size_predicted"]
        assert out["label_predicted"].tolist() == both.predict(frame)["label"].tolist()
        np.testing.assert_allclose(out["label_proba_fruit"], both.predict_proba(frame)["label"][:, 0], rtol=1e-5)

    def test_one_target_of_the_estimator_that_chooses(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        chosen = llmfit.LLMEstimator(**settings, target="label").fit(frame)
        assert self.columns(chosen, frame, tmp_path)["label_predicted"].tolist() == chosen.predict(frame).tolist()

    def test_several_labels_a_row(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        cells = [["a"], ["b"], ["a", "b"], []] * 2
        clf = llmfit.LLMClassifier(**settings, target="tags", head="linear").fit(frame.assign(tags=cells))
        out = self.columns(clf, frame, tmp_path, proba=True)
        assert out["tags_predicted"].tolist() == clf.predict(frame).tolist()
        assert out.columns.tolist() == ["tags_predicted", "tags_proba_a", "tags_proba_b"]

    def test_an_indicator(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        indicator = pd.DataFrame({"a": [1, 0, 1, 0] * 2, "b": [0, 1, 1, 0] * 2}, index=frame.index)
        clf = llmfit.LLMClassifier(**settings, head="linear").fit(frame[["text"]], indicator)
        out = self.columns(clf, frame, tmp_path)
        assert out.to_numpy().tolist() == clf.predict(frame[["text"]]).to_numpy().tolist()
        assert out.columns.tolist() == ["a_predicted", "b_predicted"]

    def test_probabilities_need_classes(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        sizes = llmfit.LLMRegressor(**settings, target="size").fit(frame)
        frame.to_csv(tmp_path / "in.csv")
        with pytest.raises(ParameterError) as caught:
            sizes.predict_files(tmp_path / "in.csv", tmp_path / "out.csv", proba=True)
        assert str(caught.value) == "proba=True needs a target of classes, and LLMRegressor has none."


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.jsonl.gz"])
class TestStops:
    """The output of a run that was stopped and went on is that of one that was not, byte for byte."""

    def undisturbed(self, fake: Any, table: Path, name: str) -> dict[str, bytes]:
        fake.predict_files(table, table.parent / "plain" / name, **OPTIONS)
        return files_of(table.parent / "plain")

    def test_at_every_write_and_rename(self, name: str, fake: Any, table: Path, monkeypatch: Any) -> None:
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:22]))
        expected, plain = self.undisturbed(fake, table, name), {"sync": os.fsync, "replace": Path.replace}
        left = 0

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        monkeypatch.setattr(os, "fsync", lambda handle: (count(), plain["sync"](handle)))
        monkeypatch.setattr(Path, "replace", lambda own, other: (plain["replace"](own, other), count())[0])
        for moment in range(1, 1000):
            folder, left = table.parent / str(moment), moment
            try:
                fake.predict_files(table, folder / name, **OPTIONS)
            except Killed:
                left = 0
                fake.predict_files(table, folder / name, **OPTIONS, resume=True)
                assert files_of(folder) == expected, moment
            else:
                break
        assert moment > 20  # it has been stopped everywhere

    def test_by_sigkill_at_random_moments(self, name: str, fake: Any, table: Path) -> None:
        started = time.perf_counter()
        expected, draw, kills = self.undisturbed(fake, table, name), random.Random(0), 0
        took = time.perf_counter() - started
        for again in range(
            8
        ):  # the undisturbed run may have been slowed down by others: then the first kill comes late
            folder = table.parent / f"killed{again}"
            while True:
                child = fork(lambda own=folder: fake.predict_files(table, own / name, **OPTIONS, resume=True))
                time.sleep(draw.uniform(0.1, 0.7) * took / 2**again)
                os.kill(child, signal.SIGKILL)
                if os.waitpid(child, 0)[1] == 0 or kills == 12:
                    break
                kills += 1
            fake.predict_files(table, folder / name, **OPTIONS, resume=True)
            assert files_of(folder) == expected
            if kills:
                break
        assert kills

    def test_by_a_disk_that_is_full(self, name: str, fake: Any, table: Path) -> None:
        expected = self.undisturbed(fake, table, name)
        folder = table.parent / "full"
        for size in (100, 400, 700, 1500):

            def limited(most: int = size) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
                with pytest.raises(DataError) as caught:
                    fake.predict_files(table, folder / name, **OPTIONS, resume=True)
                assert str(caught.value) == (
                    f"{str(folder / name)!r} cannot be written: File too large. The rows that are done are kept: "
                    "run it again with resume=True."
                )

            assert os.waitpid(fork(limited), 0)[1] == 0
            assert not (folder / name).exists()
        fake.predict_files(table, folder / name, **OPTIONS, resume=True)
        assert files_of(folder) == expected


class TestVectors:
    """The last digits of a frozen model's vectors depend on the rows beside: none is taken from another chunk."""

    def fitted(self, settings: Any, frame: pd.DataFrame, **options: Any) -> Any:
        settings = {**settings, "adapter": None, "head": {"type": "linear", **options}}
        return llmfit.LLMClassifier(**settings, target="label", features="text").fit(frame)

    def write(self, frame: pd.DataFrame, folder: Path) -> Path:
        texts = [*frame["text"], *frame["text"]]  # all of them twice, beside rows of other lengths
        lengths = [(place * 7) % 40 + 1 for place in range(len(texts))]
        long = [text + " and so on" * length for text, length in zip(texts, lengths, strict=True)]
        pd.DataFrame({"text": [cell for pair in zip(texts, long, strict=True) for cell in pair]}).to_csv(
            folder / "in.csv", index=False
        )
        return folder / "in.csv"

    @pytest.mark.parametrize("cached", [False, True])
    def test_a_run_that_goes_on_in_another_process_writes_the_same_bytes(
        self, cached: bool, settings: Any, frame: pd.DataFrame, tmp_path: Path, monkeypatch: Any
    ) -> None:
        from llmfit.estimators import heads

        outputs = scoring.head_outputs

        def beside(model: Any, prompts: Any, **options: Any) -> torch.Tensor:
            """Let the last digits show, which the tiny model's seldom do, what a row was computed beside."""
            return outputs(model, prompts, **options) * (1 + 1e-6 * sum(map(len, dict.fromkeys(prompts))))

        monkeypatch.setattr(heads.scoring, "head_outputs", beside)
        clf = self.fitted(settings, frame, **({"cache": str(tmp_path / "cache")} if cached else {}))
        if cached:
            shutil.copytree(tmp_path / "cache", tmp_path / "fitted")
        table, options = self.write(frame, tmp_path), {"proba": True, "chunk_rows": 6}
        clf.predict_files(table, tmp_path / "plain" / "out.csv", **options)
        for at in (2, 4, 7):
            if cached:  # what the fit left
                shutil.rmtree(tmp_path / "cache")
                shutil.copytree(tmp_path / "fitted", tmp_path / "cache")
            out = stopped(clf, table, monkeypatch, f"{at}/out.csv", at=at, **options)
            forget_embeddings()  # the next process knows none
            clf.predict_files(table, out, **options, resume=True)
            assert files_of(out.parent) == files_of(tmp_path / "plain"), at

    def test_examples_are_chosen_as_by_a_run_that_was_not_stopped(
        self, settings: Any, frame: pd.DataFrame, tmp_path: Path, monkeypatch: Any
    ) -> None:
        from llmfit.estimators import heads, retrieval

        outputs, likeness = scoring.head_outputs, []

        def beside(model: Any, prompts: Any, **options: Any) -> torch.Tensor:
            vectors = outputs(model, prompts, **options)
            likeness.append(len(dict.fromkeys(prompts)))
            return vectors + torch.randn(vectors.shape, generator=torch.manual_seed(sum(map(len, set(prompts)))))

        monkeypatch.setattr(heads.scoring, "head_outputs", beside)
        monkeypatch.setattr(retrieval, "DIGITS", 12)
        template = {"few_shot": {"k": 1, "retrieval": "semantic"}}
        clf = llmfit.LLMClassifier(
            **{**settings, "adapter": None}, target="label", features="text", template=template
        ).fit(frame)
        table, options = self.write(frame, tmp_path), {"proba": True, "chunk_rows": 6}
        clf.predict_files(table, tmp_path / "plain" / "out.csv", **options)
        chunks, likeness[:] = likeness[:], []
        out = stopped(clf, table, monkeypatch, "again/out.csv", at=4, **options)
        forget_embeddings()  # the next process knows none
        clf.predict_files(table, out, **options, resume=True)
        assert files_of(out.parent) == files_of(tmp_path / "plain")
        assert len([rows for rows in chunks if rows == len(frame)]) <= 2  # the examples: of the fit, and of the run
        clf.save(tmp_path / "saved")
        manifest = json.loads((tmp_path / "saved" / "llmfit.json").read_text(encoding="utf-8"))
        assert manifest["fitted"]["prompts"]["retrieval"].keys() == {"kind", "k", "seed", "model", "fingerprint"}

    def test_vectors_are_kept_for_other_answers(
        self, settings: Any, frame: pd.DataFrame, tmp_path: Path, monkeypatch: Any
    ) -> None:
        clf = self.fitted(settings, frame)
        table, embedded = self.write(frame, tmp_path), []
        outputs = scoring.head_outputs
        monkeypatch.setattr(
            scoring, "head_outputs", lambda model, rows, **o: embedded.extend(rows) or outputs(model, rows, **o)
        )
        clf.predict_files(table, tmp_path / "out.csv", chunk_rows=4)
        assert len(embedded) == 4 * len(frame)
        clf.predict(pd.read_csv(table))
        clf.predict(pd.read_csv(table))
        assert len(embedded) == 4 * len(frame) + 2 * len(frame)  # the texts of the fit are known, the others once


def fork(work: Any) -> int:
    """Run something in a process of its own, which has all that this one has loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        from tqdm import auto, std

        std.tqdm._lock = auto.tqdm._lock = (
            threading.RLock()
        )  # the usual one is shared with the parent, and killed with it
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def stopped(
    estimator: Any, table: Path, monkeypatch: pytest.MonkeyPatch, name: str = "out.csv", *, at: int = 4, **options: Any
) -> Path:
    """Stop a run where it is to write for the fourth time: the head and two chunks are there."""
    from llmfit.bulk.journal import Journal

    append, done = Journal.append, []

    def stop(self: Any, *pieces: Any, **counts: Any) -> None:
        done.append(counts)
        if len(done) == at:
            raise Killed
        append(self, *pieces, **counts)

    out = table.parent / name
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stop)
        with pytest.raises(Killed):
            estimator.predict_files(table, out, **{"chunk_rows": 7, **options})
    return out


class TestResume:
    def test_goes_on_where_the_run_was(self, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = stopped(fake, table, monkeypatch)
        assert not out.exists()
        answered: list[int] = []
        decide = type(fake)._decide
        monkeypatch.setattr(
            type(fake), "_decide", lambda own, asked: answered.extend(asked.index) or decide(own, asked)
        )
        fake.predict_files(table, out, chunk_rows=7, resume=True)
        assert set(answered) == set(range(14, 60)) - {32, 58}  # 14 rows were done, and two of the others are none

    def test_another_run_is_refused(self, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = stopped(fake, table, monkeypatch)
        begun = f"{str(out)!r} was begun"
        end = "it cannot go on. Pass overwrite=True to begin anew."

        def refused(estimator: Any = fake, **options: Any) -> str:
            with pytest.raises(DataError) as caught:
                estimator.predict_files(table, out, **{"chunk_rows": 7, "resume": True, **options})
            return str(caught.value)

        assert refused(resume=False) == (
            f"{begun} by an earlier run, which did 14 row(s). Pass resume=True to go on, or overwrite=True to "
            "begin anew."
        )
        assert refused(proba=True) == f"{begun} with proba=False, not proba=True: {end}"
        assert refused(chunk_rows=8) == f"{begun} with chunk_rows=7, not chunk_rows=8: {end}"
        assert refused(keep=["id"]) == f"{begun} with keep=None, not keep=['id']: {end}"
        other = llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0)
        other.fit(rows(30).drop(columns="id").assign(label=["low", "high"] * 15))
        assert refused(other) == f"{begun} with another model: {end}"
        table.write_text(table.read_text() + "000060,1,1.5\n")
        assert refused() == f"{begun} with another input: {end}"
        fake.predict_files(table, out, overwrite=True)
        assert len(pd.read_csv(out)) == 56

    def test_a_model_that_was_saved_and_loaded_is_the_same(
        self, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from llmfit.estimators.filing import _digest

        frame = rows(30).drop(columns="id").assign(label=["low", "high"] * 15)
        first, again = (
            llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=v).fit(frame) for v in (0, 0)
        )
        assert _digest(first) == _digest(again)
        assert _digest(first) != _digest(fake)
        assert _digest(again.set_params(batch_tokens=64, verbose=1)) == _digest(first)
        assert _digest(again.set_params(dtype="bfloat16")) != _digest(first)

    def test_a_run_that_is_done_stays(self, fake: Any, table: Path, tmp_path: Path) -> None:
        scored = fake.predict_files(table, tmp_path / "out.csv")
        before = files_of(tmp_path)
        assert fake.predict_files(table, tmp_path / "out.csv", resume=True) == scored
        assert files_of(tmp_path) == before
        (tmp_path / "out.csv").unlink()
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, tmp_path / "out.csv", resume=True)
        assert str(caught.value) == (
            f"{str(tmp_path / 'out.csv')!r} was finished by an earlier run, and is gone. Pass overwrite=True to "
            "begin anew."
        )

    @pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.jsonl.gz"])
    @pytest.mark.parametrize("which", ["output", "errors"])
    @pytest.mark.parametrize("how", ["cut", "changed", "gone"])
    def test_a_run_that_is_done_is_looked_at(
        self, name: str, which: str, how: str, fake: Any, table: Path, tmp_path: Path
    ) -> None:
        scored = fake.predict_files(table, tmp_path / name)
        path = Path(scored.output if which == "output" else scored.errors)
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-9] if how == "cut" else content[:-9] + b"#" + content[-8:])
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, tmp_path / name, resume=True)
        assert str(caught.value) == (
            f"{str(path)!r} was finished by an earlier run, and {'is gone' if how == 'gone' else 'was changed since'}. "
            "Pass overwrite=True to begin anew."
        )
        path.write_bytes(content)
        assert fake.predict_files(table, tmp_path / name, resume=True) == scored

    def test_a_run_that_did_no_row_leaves_nothing_to_go_on_with(self, fake: Any, table: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        head, *lines = table.read_text().splitlines(keepends=True)
        table.write_text("".join([head, "1\n", *lines]))
        with pytest.raises(DataError, match="line 2"):
            fake.predict_files(table, out, strict=True)
        assert fake.predict_files(table, out).bad_rows == 6
        assert sorted(files_of(tmp_path)) == ["in.csv", "out.csv", "out.csv.manifest.json", "out.errors.csv"]

    def test_the_file_of_errors_belongs_to_the_run(self, fake: Any, table: Path, monkeypatch: Any) -> None:
        out = stopped(fake, table, monkeypatch)
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, out, chunk_rows=7, resume=True, errors=table.parent / "bad.csv")
        assert str(caught.value) == (
            f"{str(out)!r} was begun with errors='out.errors.csv', not errors='bad.csv': it cannot go on. Pass "
            "overwrite=True to begin anew."
        )
        fake.predict_files(table, out, chunk_rows=7, resume=True)

    def test_a_file_of_errors_that_no_run_wrote_is_not_written_over(self, fake: Any, table: Path) -> None:
        errors = table.parent / "out.errors.csv"
        errors.write_text("mine")
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, table.parent / "out.csv", resume=True)
        assert str(caught.value) == (
            f"{str(errors)!r} exists: nothing was written. Pass overwrite=True, or name another file."
        )
        assert errors.read_text() == "mine"

    def test_what_is_there_is_not_written_over(self, fake: Any, table: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        exists = "exists: nothing was written. Pass overwrite=True, or name another file."
        for name in ("out.errors.csv", "out.csv"):
            (tmp_path / name).write_text("mine")
            with pytest.raises(DataError) as caught:
                fake.predict_files(table, out)
            assert str(caught.value) == f"{str(tmp_path / name)!r} {exists}"
            assert (tmp_path / name).read_text() == "mine"
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, out, resume=True)
        assert str(caught.value) == (
            f"{str(out)!r} exists and has no manifest: it cannot be resumed. Pass overwrite=True, or name another file."
        )
        fake.predict_files(table, out, overwrite=True)
        assert len(pd.read_csv(out)) == 55

    def test_an_earlier_error_file_goes_with_the_output_that_is_replaced(
        self, fake: Any, table: Path, tmp_path: Path
    ) -> None:
        fake.predict_files(table, tmp_path / "out.csv")
        rows(5).to_csv(table, index=False)
        fake.predict_files(table, tmp_path / "out.csv", overwrite=True)
        assert not (tmp_path / "out.errors.csv").exists()

    def test_two_runs_do_not_write_one_file(self, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from llmfit.bulk.journal import Journal

        out = stopped(fake, table, monkeypatch)
        other = Journal(out, table.parent / "out.errors.csv")
        other.lock()
        try:
            with pytest.raises(DataError) as caught:
                fake.predict_files(table, out, chunk_rows=7, resume=True)
            assert str(caught.value) == f"Another run is writing {str(out)!r}."
        finally:
            other.close()
        fake.predict_files(table, out, chunk_rows=7, resume=True)

    @pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
    @pytest.mark.parametrize("what", [{"resume": True}, {"overwrite": True}])
    def test_two_runs_do_not_write_one_file_at_any_write_or_rename(
        self, name: str, what: Any, fake: Any, table: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, moments, seen = {"sync": os.fsync, "replace": Path.replace}, 0, set()
        fake.predict_files(table, table.parent / "plain" / name, chunk_rows=30)
        table.with_name("out").mkdir()

        def interfere() -> None:
            nonlocal moments
            moments += 1
            monkeypatch.undo()
            fake_model.put_in_place(monkeypatch)
            try:
                fake.predict_files(table, table.parent / "out" / name, chunk_rows=30, **what)
            except DataError as error:
                seen.add(str(error))
            patch()

        def patch() -> None:
            monkeypatch.setattr(os, "fsync", lambda handle: (interfere(), plain["sync"](handle)))
            monkeypatch.setattr(Path, "replace", lambda own, other: (plain["replace"](own, other), interfere())[0])

        patch()
        fake.predict_files(table, table.parent / "out" / name, chunk_rows=30)
        monkeypatch.undo()
        assert files_of(table.parent / "out") == files_of(table.parent / "plain")
        assert seen == {f"Another run is writing {str(table.parent / 'out' / name)!r}."}
        assert moments > 20

    def test_a_lock_that_is_left_keeps_nobody_away(self, fake: Any, table: Path) -> None:
        out = table.parent / "out.csv"
        Path(f"{out}.lock").touch()
        fake.predict_files(table, out)
        assert sorted(files_of(table.parent)) == ["in.csv", "out.csv", "out.csv.manifest.json", "out.errors.csv"]

    def test_overwriting_that_was_stopped_before_its_first_row_begins_anew(
        self, fake: Any, table: Path, monkeypatch: Any
    ) -> None:
        fake.predict_files(table, table.parent / "plain" / "out.csv", chunk_rows=7)
        out = stopped(fake, table, monkeypatch)
        stopped(fake, table, monkeypatch, overwrite=True, at=1)
        fake.predict_files(table, out, chunk_rows=7, resume=True)
        (table.parent / "mine").mkdir()
        for path in table.parent.glob("out.*"):
            path.rename(path.parent / "mine" / path.name)
        assert files_of(table.parent / "mine") == files_of(table.parent / "plain")

    @pytest.mark.parametrize("at", [1, 2, 4])
    def test_overwriting_a_run_that_is_done_can_be_stopped(
        self, at: int, fake: Any, table: Path, monkeypatch: Any
    ) -> None:
        out, content = table.parent / "out.csv", table.read_text()
        rows(20).to_csv(table, index=False)
        spoil(table)
        fake.predict_files(table, out)
        table.write_text(content)
        stopped(fake, table, monkeypatch, overwrite=True, at=at)
        fake.predict_files(table, out, chunk_rows=7, resume=True)
        fake.predict_files(table, table.parent / "plain" / "out.csv", chunk_rows=7)
        expected = files_of(table.parent / "plain")
        assert {name: (table.parent / name).read_bytes() for name in expected} == expected

    @pytest.mark.parametrize("what", ["llmfit", "torch", "transformers", "peft"])
    def test_another_version_is_refused(self, what: str, fake: Any, table: Path, monkeypatch: Any) -> None:
        from llmfit import persistence

        out = stopped(fake, table, monkeypatch)
        installed = persistence._versions()
        with monkeypatch.context() as patched:
            patched.setattr(persistence, "_versions", lambda: {**installed, what: "99.0"})
            with pytest.raises(DataError) as caught:
                fake.predict_files(table, out, chunk_rows=7, resume=True)
            assert str(caught.value) == (
                f"{str(out)!r} was begun with {what}={installed[what]!r}, not {what}='99.0': it cannot go on. Pass "
                "overwrite=True to begin anew."
            )
        scored = fake.predict_files(table, out, chunk_rows=7, resume=True)
        with monkeypatch.context() as patched:
            patched.setattr(persistence, "_versions", lambda: {**installed, what: "99.0"})
            assert fake.predict_files(table, out, chunk_rows=7, resume=True) == scored  # what is done stays done

    @pytest.mark.parametrize(("what", "now"), [("device", "mps"), ("dtype", "bfloat16")])
    def test_another_device_is_refused(self, what: str, now: str, fake: Any, table: Path, monkeypatch: Any) -> None:
        out = stopped(fake, table, monkeypatch)
        kind = {"device": torch.device, "dtype": lambda name: getattr(torch, name)}[what]
        other, load = fake._load_base(), type(fake)._load_base
        setattr(other, what, kind(now))
        monkeypatch.setattr(type(fake), "_load_base", lambda _: other)
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, out, chunk_rows=7, resume=True)
        monkeypatch.setattr(type(fake), "_load_base", load)
        then = json.loads(Path(f"{out}.manifest.json").read_text())["run"][what]
        assert then.startswith({"device": "cpu (", "dtype": "float32"}[what])
        assert str(caught.value) == (
            f"{str(out)!r} was begun with {what}={then!r}, not {what}={now!r}: it cannot go on. Pass overwrite=True "
            "to begin anew."
        )

    def test_files_of_a_run_that_are_damaged_are_named(self, fake: Any, table: Path, monkeypatch: Any) -> None:
        out = stopped(fake, table, monkeypatch)
        partial, manifest = Path(f"{out}.partial"), Path(f"{out}.manifest.json")
        partial.write_bytes(partial.read_bytes()[:20])
        with pytest.raises(DataError, match=r"is shorter than its manifest says. Begin anew with overwrite.$"):
            fake.predict_files(table, out, chunk_rows=7, resume=True)
        partial.unlink()
        with pytest.raises(DataError, match=r"is missing, which an earlier run wrote. Begin anew with overwrite.$"):
            fake.predict_files(table, out, chunk_rows=7, resume=True)
        manifest.write_text("{")
        with pytest.raises(DataError, match=r"^The manifest '.*' cannot be read: "):
            fake.predict_files(table, out, chunk_rows=7, resume=True)


class TestErrorsOfSeveralRuns:
    @pytest.mark.parametrize("other", ["out.jsonl", "out.parquet", "out.csv.gz", "out.tsv", "out.CSV"])
    def test_runs_of_one_folder_have_files_of_their_own(
        self, other: str, fake: Any, table: Path, monkeypatch: Any
    ) -> None:
        for name in ("out.csv", other):
            fake.predict_files(table, table.parent / "plain" / name, chunk_rows=7)
        out = stopped(fake, table, monkeypatch)
        scored = fake.predict_files(table, table.parent / other, chunk_rows=7)
        assert scored.errors == str(table.parent / f"{other}.errors.csv")
        fake.predict_files(table, out, chunk_rows=7, resume=True)
        expected = files_of(table.parent / "plain")
        assert {name: (table.parent / name).read_bytes() for name in expected} == expected

    def refused(self, path: Path, run: Any) -> None:
        content = path.read_bytes()
        with pytest.raises(DataError) as caught:
            run()
        assert str(caught.value) == (
            f"{str(path)!r} was written by others since this run began. Move it elsewhere, and pass resume=True."
        )
        assert path.read_bytes() == content

    @pytest.mark.parametrize("rows_before", [3, 4])  # chunks, of which the first is without bad rows
    def test_no_run_writes_over_the_errors_of_another(
        self, rows_before: int, fake: Any, table: Path, monkeypatch: Any
    ) -> None:
        errors = table.parent / "bad.csv"
        fake.predict_files(table, table.parent / "plain" / "out.csv", chunk_rows=6)
        options = {"chunk_rows": 6, "errors": errors}
        out = stopped(fake, table, monkeypatch, at=rows_before, **options)
        other = table.with_name("other.csv")
        other.write_text("".join(table.read_text().splitlines(keepends=True)[:40]))
        fake.predict_files(other, table.parent / "theirs.csv", **options)
        self.refused(errors, lambda: fake.predict_files(table, out, **options, resume=True))
        assert not out.exists()
        errors.rename(table.parent / "moved.csv")
        fake.predict_files(table, out, **options, resume=True)
        expected = (table.parent / "plain" / "out.errors.csv").read_bytes()
        assert errors.read_bytes() == expected

    def test_a_run_without_errors_leaves_those_of_another(self, fake: Any, table: Path, monkeypatch: Any) -> None:
        errors, clean = table.parent / "bad.csv", table.parent / "clean.csv"
        rows(30).to_csv(clean, index=False)
        out = stopped(fake, clean, monkeypatch, errors=errors)
        fake.predict_files(table, table.parent / "other.csv", errors=errors)
        content = errors.read_bytes()
        assert fake.predict_files(clean, out, chunk_rows=7, errors=errors, resume=True).errors is None
        assert errors.read_bytes() == content

    def test_no_run_writes_over_an_output_that_came_since(self, fake: Any, table: Path, monkeypatch: Any) -> None:
        out = stopped(fake, table, monkeypatch)
        out.write_text("mine")
        self.refused(out, lambda: fake.predict_files(table, out, chunk_rows=7, resume=True))
        out.unlink()
        assert fake.predict_files(table, out, chunk_rows=7, resume=True).rows == 60

    def test_a_run_that_was_moved_goes_on(self, fake: Any, table: Path, monkeypatch: Any) -> None:
        fake.predict_files(table, table.parent / "plain" / "out.csv", chunk_rows=7)
        (table.parent / "here").mkdir()
        stopped(fake, table, monkeypatch, "here/out.csv")
        (table.parent / "here").rename(table.parent / "there")
        fake.predict_files(table, table.parent / "there" / "out.csv", chunk_rows=7, resume=True)
        assert files_of(table.parent / "there") == files_of(table.parent / "plain")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"chunk_rows": 0}, "The 'chunk_rows' parameter of predict_files must be an int >= 1. Got 0 instead."),
            ({"proba": 1}, "The 'proba' parameter of predict_files must be one of True, False. Got 1 instead."),
            (
                {"keep": "id"},
                "The 'keep' parameter of predict_files must be None or a list of column names. Got 'id' instead.",
            ),
            ({"keep": ["no"]}, "keep names the column 'no', but the input has only 'id', 'size', 'weight'."),
            (
                {"resume": True, "overwrite": True},
                "resume=True goes on with an earlier run, overwrite=True begins anew. Pass one of them.",
            ),
            (
                {"errors": "e.parquet"},
                "The 'errors' parameter of predict_files must be a CSV, TSV or JSONL file. Got 'e.parquet' instead.",
            ),
        ],
    )
    def test_parameters(self, options: Any, sentence: str, fake: Any, table: Path, tmp_path: Path) -> None:
        with pytest.raises((ParameterError, DataError)) as caught:
            fake.predict_files(table, tmp_path / "out.csv", **options)
        assert str(caught.value) == sentence
        assert sorted(files_of(tmp_path)) == ["in.csv"]

    def test_columns(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "in.csv").write_text("size,other\n1,2\n")
        with pytest.raises(DataError) as caught:
            fake.predict_files(tmp_path / "in.csv", tmp_path / "out.csv")
        assert str(caught.value) == (
            "LLMClassifier needs the feature column 'weight', but the frame has only 'size', 'other'."
        )
        (tmp_path / "in.csv").write_text("size,weight,label_predicted\n1,2,low\n")
        with pytest.raises(DataError) as caught:
            fake.predict_files(tmp_path / "in.csv", tmp_path / "out.csv")
        assert str(caught.value) == (
            "The input has the column 'label_predicted' already, which the output is to have. Leave it out with keep."
        )
        fake.predict_files(tmp_path / "in.csv", tmp_path / "out.csv", keep=["size"])

    def test_bytes_are_no_text(self, settings: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
        frame = frame[["text", "label"]].assign(raw=[text.encode() for text in frame["text"]])
        frame.to_parquet(tmp_path / "in.parquet")
        clf = llmfit.LLMClassifier(**settings, target="label", features="text").fit(frame)
        for name, shown in (("out.csv", "csv"), ("out.jsonl", "jsonl")):
            with pytest.raises(DataError) as caught:
                clf.predict_files(tmp_path / "in.parquet", tmp_path / name)
            assert str(caught.value) == (
                f"The column 'raw' is binary, which {shown} cannot hold. Leave it out with keep, or write Parquet."
            )
        clf.predict_files(tmp_path / "in.parquet", tmp_path / "out.csv", keep=["text"])
        clf.predict_files(tmp_path / "in.parquet", tmp_path / "out.parquet")
        assert pd.read_parquet(tmp_path / "out.parquet")["raw"].tolist() == frame["raw"].tolist()
        read = read_table(tmp_path / "in.parquet")
        with pytest.raises(DataError) as caught:
            llmfit.LLMClassifier(**settings, target="label", features="raw").fit(read)
        assert str(caught.value) == (
            "Row 0 (index 0): the column 'raw' holds bytes, which are no text. Decode them first, for example with "
            "df['raw'].str.decode('utf-8')."
        )
        with pytest.raises(DataError, match=r"^The label b'red apple' is bytes, which are no text. Decode the column "):
            llmfit.LLMGenerator(**settings, target="raw", features="text").fit(read)
        raw = tmp_path / "raw.parquet"
        frame.assign(text=frame["raw"]).drop(columns="raw").to_parquet(raw)
        assert clf.predict_files(raw, tmp_path / "raw.csv", keep=["label"]).bad_rows == len(frame)

    def test_reading_and_writing_one_file(self, fake: Any, table: Path) -> None:
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, table, overwrite=True)
        assert str(caught.value) == f"{str(table)!r} is read and was to be written. Name another file."

    def test_strict_stops_at_the_first_bad_row_and_can_go_on(self, fake: Any, table: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            fake.predict_files(table, tmp_path / "out.csv", strict=True, chunk_rows=4)
        assert str(caught.value) == "'in.csv', line 8: it has 1 value(s), the header has 3."
        assert fake.predict_files(table, tmp_path / "out.csv", resume=True, chunk_rows=4).bad_rows == 5
        fake.predict_files(table, tmp_path / "plain.csv", chunk_rows=4)
        assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()

    @pytest.mark.parametrize("chunk_rows", [4, 100])
    @pytest.mark.parametrize("name", ["out.csv", "out.jsonl.gz", "out.parquet"])
    def test_rows_before_the_bad_one_are_kept_and_chunks_stay_what_they_are(
        self, name: str, chunk_rows: int, fake: Any, table: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        with pytest.raises(DataError, match="line 8"):
            fake.predict_files(table, tmp_path / name, strict=True, chunk_rows=chunk_rows)
        assert json.loads((tmp_path / f"{name}.manifest.json").read_text())["rows"] == 6
        answered: list[list[int]] = []
        decide = type(fake)._decide
        monkeypatch.setattr(
            type(fake), "_decide", lambda own, asked: answered.append(list(asked.index)) or decide(own, asked)
        )
        fake.predict_files(table, tmp_path / name, resume=True, chunk_rows=chunk_rows)
        again, answered[:] = list(answered), []
        fake.predict_files(table, tmp_path / "plain" / name, chunk_rows=chunk_rows)
        whole = answered[1 + 6 // chunk_rows :]  # the first is asked of no rows
        assert again[1:] == whole
        expected = files_of(tmp_path / "plain")
        assert {file: (tmp_path / file).read_bytes() for file in expected} == expected

    def test_rows_before_the_bad_one_go_to_standard_output(self, fake: Any, table: Path, capfdbinary: Any) -> None:
        with pytest.raises(DataError, match="line 8"):
            fake.predict_files(table, "-", keep=["id"])
        assert [line[:1] for line in capfdbinary.readouterr().out.splitlines()] == [b"r", *b"0 1 2 3 4 5".split()]

    def test_an_estimator_that_is_not_fitted(self, table: Path, tmp_path: Path) -> None:
        with pytest.raises(NotFittedError):
            llmfit.LLMClassifier().predict_files(table, tmp_path / "out.csv")


def peak_of(count: int, folder: Path) -> tuple[int, int]:
    """Answer so many rows in a process of its own: its peak memory in MB, and the rows written."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(HERE)!r})
        import pytest, fake_model, llmfit
        from pathlib import Path
        from test_bulk import rows
        fake_model.put_in_place(pytest.MonkeyPatch())
        frame = rows(8).drop(columns="id").assign(label=["low", "high"] * 4)
        clf = llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)
        folder = Path({str(folder)!r})
        with open(folder / "in.csv", "w") as file:
            file.write("id,size,weight\\n")
            file.writelines(f"{{i:07d}},{{i * 37 % 101}},{{i * 37 % 101 / 7}}\\n" for i in range({count}))
        print(clf.predict_files(folder / "in.csv", folder / "out.csv", overwrite=True, chunk_rows=2000).rows)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    done, peak = map(int, out.stdout.split())
    return peak, done


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_some_thousands(tmp_path: Path) -> None:
    few, done = peak_of(20_000, tmp_path)
    assert done == 20_000
    many, done = peak_of(1_000_000, tmp_path)
    assert done == 1_000_000
    assert many < few + 40
    with (tmp_path / "out.csv").open() as file:
        next(file)
        assert all(line.startswith(f"{number:07d},") for number, line in enumerate(file))
