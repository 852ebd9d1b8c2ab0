"""What a column of a file is was settled by the fit: no other row of a file changes how a cell is read."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import fake_model
import numpy as np
import pandas as pd
import pytest

import llmfit
from llmfit.cli import main
from llmfit.estimators.filing import read_as
from llmfit.exceptions import DataError
from llmfit.files import KINDS, kinds_of, open_source, read_table
from llmfit.persistence import from_json

WAYS = ["csv", "tsv", "jsonl", "parquet"]


def write(rows: pd.DataFrame, path: Path) -> Path:
    """Write rows of texts: cells that a format with types of its own would have as numbers are numbers there."""
    if path.suffix in (".csv", ".tsv"):
        rows.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_dict("records")))
    else:
        rows.to_parquet(path)
    return path


@pytest.fixture
def labelled(settings: Any, tmp_path: Path) -> Any:
    """A classifier whose labels were 1, 2, x in the file of the fit."""
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"row {i},{'12x'[i % 3]}\n" for i in range(9)))
    return llmfit.LLMClassifier(**settings, target="label").fit(read_table(tmp_path / "train.csv"))


class TestTarget:
    @pytest.mark.parametrize("labels", ["12x", "12"])
    def test_evaluate_does_not_depend_on_the_labels_that_a_file_lacks(
        self, labelled: Any, labels: str, tmp_path: Path, capsys: Any
    ) -> None:
        labelled.save(tmp_path / "model")
        texts = [f"row {i}" for i in range(9)]
        cells = [labels[i % len(labels)] for i in range(9)]
        (tmp_path / "test.csv").write_text(
            "text,label\n" + "".join(f"{t},{c}\n" for t, c in zip(texts, cells, strict=True))
        )
        assert main(["evaluate", f"{tmp_path}/model", f"{tmp_path}/test.csv", "-o", f"{tmp_path}/m.json", "-q"]) == 0
        measures = json.loads((tmp_path / "m.json").read_text())
        expected = labelled.evaluate(pd.DataFrame({"text": texts, "label": cells}))
        assert measures["accuracy"] == expected["accuracy"]
        assert measures["log_loss"] == expected["log_loss"]
        assert capsys.readouterr().err.count("\n") == 1  # no label is one that fit never saw

    def test_whole_numbers_stay_such_beside_a_label_that_is_none(self, settings: Any, tmp_path: Path) -> None:
        frame = pd.DataFrame({"text": list("abcdef"), "label": [1, 2] * 3})
        clf = llmfit.LLMClassifier(**settings, target="label").fit(frame)
        (tmp_path / "t.csv").write_text("text,label\na,1\nb,02\nc,2.0\nd,x\n")
        read = read_as(clf, tmp_path / "t.csv")
        assert read["label"].tolist() == [1, 2, 2, "x"]
        with pytest.warns(UserWarning, match="1 row holds a label that fit never saw: 'x'"):
            measures = clf.evaluate(read)
        assert measures["confusion_matrix"].loc[[1, 2]].to_numpy().sum() == 3

    def test_rows_to_validate_on_are_read_as_those_of_the_fit(self, tiny: str, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "c.yaml").write_text(
            f"estimator: LLMClassifier\nbase_model: {tiny}\ntarget: label\nepochs: 1\ndevice: cpu\n"
        )
        (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"row {i},{'12x'[i % 3]}\n" for i in range(9)))
        (tmp_path / "valid.csv").write_text("text,label\n1.50,1\n007,2\n")
        arguments = ["c.yaml", "train.csv", "-o", "model", "--eval", "valid.csv"]
        paths = [one if one.startswith("-") else f"{tmp_path}/{one}" for one in arguments]
        assert main(["fit", *paths, "-q"]) == 0, capsys.readouterr().err
        assert "validation_loss" in llmfit.load(tmp_path / "model").history_


class TestDeclared:
    """What a config declares as text or category keeps its characters from the fit on."""

    PLAIN = "estimator: LLMClassifier\ntarget: {label: category}\nfeatures: {code: text, size: number}\n"
    LUDWIG = (
        "input_features:\n- {name: code, type: text}\n- {name: size, type: number}\n"
        "output_features:\n- {name: label, type: category}\ntrainer: {epochs: 1}\n"
    )
    ROWS = "code,size,label\n" + "1.50,1,1.0\n1e5,2,2\n" * 4

    @pytest.mark.parametrize("config", [PLAIN + "epochs: 1\ndevice: cpu\n", LUDWIG])
    def test_fit_and_preview(self, config: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "c.yaml").write_text(config + f"base_model: {tiny}\n")
        (tmp_path / "t.csv").write_text(self.ROWS)
        assert main(["preview", f"{tmp_path}/c.yaml", f"{tmp_path}/t.csv", "-n", "2"]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert [one in out for one in ("1.50", "1e5", "[ 1.0")] == [True] * 3
        assert main(["fit", f"{tmp_path}/c.yaml", f"{tmp_path}/t.csv", "-o", f"{tmp_path}/m", "-q"]) == 0
        model = llmfit.load(tmp_path / "m")
        assert vars(model).get("estimator_", model)._columns == {"code": "text", "size": "int", "label": "text"}
        assert read_as(model, tmp_path / "t.csv")["label"].tolist()[:2] == ["1.0", "2"]

    def test_types_of_json_stay(self, tiny: str, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(self.PLAIN + f"epochs: 1\ndevice: cpu\nbase_model: {tiny}\n")
        rows = [{"code": "x", "size": i, "label": i % 2} for i in range(8)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["fit", f"{tmp_path}/c.yaml", f"{tmp_path}/t.jsonl", "-o", f"{tmp_path}/m", "-q"]) == 0
        assert llmfit.load(tmp_path / "m").classes_.tolist() == [0, 1]


class TestSets:
    def test_sets_that_were_written_can_be_read_again(self, settings: Any, tmp_path: Path, capsys: Any) -> None:
        frame = pd.DataFrame({"text": list("abcdefgh"), "tags": [["x"], ["y", "x"], [], ["y"]] * 2})
        clf = llmfit.LLMClassifier(**{**settings, "head": "linear"}, target="tags").fit(frame)
        clf.save(tmp_path / "model")
        for name in ("out.csv", "out.jsonl"):
            clf.predict_files(write(frame[["text"]], tmp_path / "in.csv"), tmp_path / name)
            capsys.readouterr()
            answered = read_table(tmp_path / name).rename(columns={"tags_predicted": "tags"})
            if name == "out.csv":
                answered.to_csv(tmp_path / "t.csv", index=False)
            else:
                answered.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
            path = tmp_path / f"t{Path(name).suffix}"
            read = read_as(clf, path)["tags"].tolist()
            assert read == [list(one) for one in clf.predict(frame)]
            assert main(["evaluate", f"{tmp_path}/model", str(path), "-o", f"{tmp_path}/m.json", "-q"]) == 0
            assert json.loads((tmp_path / "m.json").read_text())["subset_accuracy"] == 1.0
            (tmp_path / "m.json").unlink()

    def test_a_cell_that_is_no_list_stays(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text('tags\n"[""x"", 1]"\n[x\nx\n""\n')
        assert read_table(tmp_path / "t.csv", kinds={"tags": "list"})["tags"].tolist() == [["x", 1], "[x", "x", None]


class TestFeatures:
    @pytest.mark.parametrize("others", [["word"], [], ["2"]])
    def test_a_text_is_read_char_by_char(self, others: list[str], labelled: Any, tmp_path: Path, capsys: Any) -> None:
        """Prompts, of `preview` and of `predict_files`, do not depend on the rows beside."""
        texts = ["1.50", "007", "+3", "1e5", "True", "9007199254740993", *others]
        write(pd.DataFrame({"text": texts}), tmp_path / "t.csv")
        assert read_as(labelled, tmp_path / "t.csv")["text"].tolist() == texts
        labelled.save(tmp_path / "model")
        assert main(["preview", f"{tmp_path}/model", f"{tmp_path}/t.csv", "-n", "9"]) == 0
        out = capsys.readouterr().out
        assert all(f"text: {text}\n" in out for text in texts)
        labelled.predict_files(tmp_path / "t.csv", tmp_path / "out.csv", proba=True, keep=[], chunk_rows=2)
        expected = labelled.predict_proba(pd.DataFrame({"text": texts}))
        written = pd.read_csv(tmp_path / "out.csv")[[f"label_proba_{name}" for name in "12x"]]
        np.testing.assert_allclose(written, expected, rtol=1e-5)

    def test_a_text_stays_one_in_the_output(self, labelled: Any, tmp_path: Path) -> None:
        write(pd.DataFrame({"text": ["1.50", "2"], "other": ["1.50", "2"]}), tmp_path / "t.csv")
        for name in ("out.jsonl", "out.parquet"):
            labelled.predict_files(tmp_path / "t.csv", tmp_path / name)
            read = read_table(tmp_path / name)
            assert read["text"].tolist() == ["1.50", "2"]
            assert read["other"].tolist() == [1.5, 2.0]

    @pytest.mark.parametrize("way", WAYS)
    def test_numbers_of_a_file_are_read_alike_in_every_format(self, way: str, tmp_path: Path, monkeypatch: Any) -> None:
        fake_model.put_in_place(monkeypatch)
        frame = pd.DataFrame({"whole": range(8), "real": np.arange(8) / 4, "label": list("ab") * 4})
        clf = llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)
        plain = pd.DataFrame({"whole": [1, 2, 3], "real": [1, 2, 3]})
        path = write(plain, tmp_path / f"t.{way}")
        assert clf.preview(read_as(clf, path))["prompt"].tolist() == clf.preview(plain)["prompt"].tolist()
        assert "real: 2.0\n" in clf.preview(read_as(clf, path))["prompt"][1]

    @pytest.mark.parametrize("way", WAYS)
    def test_a_cell_that_is_no_number_is_refused_and_spoils_no_other(
        self, way: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        fake_model.put_in_place(monkeypatch)
        whole = [2**60 + i for i in range(8)]
        frame = pd.DataFrame({"whole": whole, "label": list("ab") * 4})
        clf = llmfit.LLMClassifier("fake", target="label", adapter="full", verbose=0).fit(frame)
        path = write(pd.DataFrame({"whole": [str(whole[1]), "x", str(whole[3])]}), tmp_path / f"t.{way}")
        read = read_as(clf, path)
        assert read["whole"].tolist() == [whole[1], "x", whole[3]]  # to the last digit
        with pytest.raises(DataError, match=r"^Row 1 \(index 1\): the number column 'whole' holds 'x', which is no n"):
            clf.predict(read)
        assert clf.predict_files(path, tmp_path / "out.csv").bad_rows == 1

    @pytest.mark.parametrize("other", ["1.0", "1.5", "", "3"])
    @pytest.mark.parametrize("way", ["csv", "jsonl"])
    def test_digits_of_a_whole_number_do_not_depend_on_the_rows_beside(
        self, way: str, other: str, tmp_path: Path
    ) -> None:
        path = tmp_path / f"t.{way}"
        cells = ["9007199254740993", other, ""]
        path.write_text(
            "".join(f"{cell},x\n" for cell in ["n", *cells])
            if way == "csv"
            else "".join(f'{{"n": {cell or "null"}}}\n' for cell in cells)
        )
        read = read_table(path, kinds={"n": "int"})["n"].astype(object).tolist()
        assert read[0] == 9007199254740993
        assert pd.isna(read[2])
        (chunk,) = open_source(path).chunks(9)
        assert chunk.read_as({"n": "int"})["n"].astype(object).tolist()[0] == 9007199254740993

    def test_decimals_of_parquet_are_read_as_the_numbers_of_the_fit(self, tmp_path: Path) -> None:
        cells = [Decimal("2.00"), Decimal("2.50"), None]
        pd.DataFrame({"whole": cells, "real": cells}).to_parquet(tmp_path / "t.parquet")
        read = read_table(tmp_path / "t.parquet", kinds={"whole": "int", "real": "float"})
        assert read["real"].tolist()[:2] == [2.0, 2.5]
        assert read["real"].dtype == float
        assert [repr(one) for one in read["whole"]] == ["2", "2.5", "None"]

    def test_truth_values_are_read_as_such_beside_what_is_none(self, settings: Any, tmp_path: Path) -> None:
        frame = pd.DataFrame({"truth": [True, False] * 4, "label": list("ab") * 4})
        clf = llmfit.LLMClassifier(**settings, target="label").fit(frame)
        (tmp_path / "t.csv").write_text("truth\ntrue\nFALSE\nperhaps\n")
        assert read_as(clf, tmp_path / "t.csv")["truth"].tolist() == [True, False, "perhaps"]

    def test_values_of_json_become_texts_one_by_one(self, labelled: Any, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text('{"text": 1}\n{"text": 2.5}\n{"text": true}\n{"text": null}\n{"text": "x"}\n')
        read = read_as(labelled, tmp_path / "t.jsonl")["text"]
        assert read.tolist()[:3] == ["1", "2.5", "True"]  # as they would be without the row of 2.5
        assert read.isna().tolist() == [False, False, False, True, False]


class TestWhatIsKept:
    def test_a_model_of_an_earlier_version_is_read_as_far_as_it_tells(
        self, labelled: Any, settings: Any, tmp_path: Path
    ) -> None:
        from llmfit.estimators.saving import _fitted_to_json, _restore

        frame = pd.DataFrame({"text": list("abcd"), "n": [1, 2, 3, 4], "r": [0.5] * 4, "label": ["x", "y"] * 2})
        clf = llmfit.LLMClassifier(**settings, target="label").fit(frame)
        clf.save(tmp_path / "model")
        fitted = from_json(_fitted_to_json(clf))
        assert fitted.pop("columns") == {"text": "text", "n": "int", "r": "float", "label": "text"}
        _restore(clf, tmp_path / "model", fitted)
        assert clf._columns == {"n": "int", "r": "float"}

    def test_a_saved_model_knows_them(self, settings: Any, tmp_path: Path) -> None:
        frame = pd.DataFrame(
            {
                "text": [f"t{i}" for i in range(8)],
                "whole": pd.array([1, None] * 4, dtype="Int64"),
                "real": [0.5] * 8,
                "truth": [True, False] * 4,
                "kind": pd.Categorical(["x", "y"] * 4),
                "label": [1, 2] * 4,
                "size": [0.5, 1.5] * 4,
            }
        )
        kinds = dict.fromkeys(["text", "kind"], "text") | {"whole": "int", "real": "float", "truth": "bool"}
        one = llmfit.LLMClassifier(**settings, target="label", features=[*kinds]).fit(frame)
        chosen = llmfit.LLMEstimator(**settings, target="label", features=[*kinds]).fit(frame)
        both = llmfit.LLMEstimator(**settings, target=["label", "size"], features=[*kinds], head="linear").fit(frame)
        for estimator, targets in ((one, {"label": "int"}), (chosen, {"label": "int"}), (both, {"size": "float"})):
            estimator.save(tmp_path / "model")
            for known in (estimator, llmfit.load(tmp_path / "model")):
                inner = vars(known).get("estimator_", known)
                assert inner._columns.items() >= (kinds | targets).items()

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            (["a", None], "text"),
            (pd.Series(["a", "b"], dtype=object), "text"),
            ([1, 2], "int"),
            (pd.array([1, None], dtype="Int8"), "int"),
            ([1.0, None], "int"),  # whole numbers, one of which is missing
            ([1.0, 2.0], "float"),
            ([1.5, None], "float"),
            ([None, None], "text"),
            ([True, False], "bool"),
            (pd.array([True, None], dtype="boolean"), "bool"),
            (pd.Categorical([1, 2]), "int"),
            (pd.Series([1, "x"], dtype=object), "object"),
            (pd.Series([1, 2.5], dtype=object), "object"),
            ([["a"], ["b"]], "list"),
            ([{"a"}, None], "list"),
            ([["a"], "b"], "object"),
            (pd.to_datetime(["2024-01-01"]), "day"),
            (pd.to_datetime(["2024-01-01 12:30"]), "date"),
            (pd.to_timedelta(["1D"]), "object"),
        ],
    )
    def test_kinds(self, values: Any, kind: str) -> None:
        assert kinds_of(pd.DataFrame({"a": values})) == {"a": kind}
        assert kind in KINDS

    def test_chunks_are_the_whole(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text('a\n1\nx\n""\n2.5\n')
        source = open_source(tmp_path / "t.csv")
        for kind in KINDS:
            whole = read_table(tmp_path / "t.csv", kinds={"a": kind})["a"].astype(object)
            apart = pd.concat([chunk.read_as({"a": kind}) for chunk in source.chunks(1)])["a"].astype(object)
            assert [str(one) for one in whole.fillna("")] == [str(one) for one in apart.fillna("")]
