"""What the command line refuses before any work, and how it says what went wrong: one sentence."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.exceptions import FitFailedWarning

import llmfit
from llmfit.cli import main
from llmfit.cli.models import SETTINGS


@pytest.fixture(scope="module")
def saved(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was saved once for all tests."""
    frame = pd.DataFrame({"text": list("abcdef"), "label": ["fruit", "vehicle"] * 3})
    clf = llmfit.LLMClassifier(tiny, target="label", epochs=1, random_state=0, device="cpu", dtype="float32", verbose=0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    clf.fit(frame).save(folder)
    return folder


@pytest.fixture
def place(tiny: str, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and rows, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"estimator: LLMClassifier\nbase_model: {tiny}\ntarget: label\nfeatures: [text]\nepochs: 1\ndevice: cpu\n"
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    return tmp_path


def refused(capsys: Any, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return str(err.removeprefix("llmfit: ").removesuffix("\n"))


def test_a_report_without_matplotlib_is_refused_before_a_model_is_loaded(
    place: Path, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmfit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert refused(capsys, "evaluate", saved, "rows.csv", "-o", "r.html") == (
        "A report in HTML needs matplotlib. Install it with: pip install 'llmfit[plots]'."
    )


class TestPlaces:
    """A place that cannot be written to is found before a model is loaded, or made."""

    NO_FOLDER = "'{}' cannot be written: '{}' is no folder that may be written to."

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["evaluate", "MODEL", "rows.csv", "-o", "file/m.json"], NO_FOLDER.format("file/m.json", "file")),
            (["evaluate", "MODEL", "rows.csv", "-o", "file/m.html"], NO_FOLDER.format("file/m.html", "file")),
            (["evaluate", "MODEL", "rows.csv", "-o", "m.pdf"], "The report 'm.pdf' must end in .html or .json."),
            (["predict", "MODEL", "rows.csv", "-o", "file/o.csv"], NO_FOLDER.format("file/o.csv", "file")),
            (["predict", "MODEL", "rows.csv", "-o", "folder.csv"], "'folder.csv' cannot be written: it is a folder."),
            (
                ["predict", "MODEL", "rows.csv", "-o", "z.txt"],
                "'z.txt' cannot be written: its name must end in one of '.csv', '.tsv', '.tab', '.jsonl', '.ndjson', "
                "'.parquet', '.pq', each of the first 5 also with '.gz'.",
            ),
            (
                ["predict", "MODEL", "rows.csv", "-o", "o.json"],
                "'o.json' cannot be written: its name must end in one of '.csv', '.tsv', '.tab', '.jsonl', '.ndjson', "
                "'.parquet', '.pq', each of the first 5 also with '.gz'.",
            ),
            (
                ["predict", "MODEL", "rows.csv", "-o", "o.csv", "--errors", "file/e.csv"],
                NO_FOLDER.format("file/e.csv", "file"),
            ),
            (
                ["predict", "MODEL", "rows.csv", "-o", "o.csv", "--errors", "o.csv"],
                "'o.csv' was to be the output and the file of errors. Name another file.",
            ),
            (["predict", "MODEL", "rows.csv", "-o", "rows.csv"], "'rows.csv' exists: nothing was written. Pass"),
            (["export", "MODEL", "file/m"], NO_FOLDER.format("file/m", "file")),
            (["export", "MODEL", "full"], "'full' exists and is no exported model. Choose another."),
            (["fit", "config.yaml", "rows.csv", "-o", "file/m"], NO_FOLDER.format("file/m", "file")),
            (["fit", "config.yaml", "rows.csv", "-o", "full"], "'full' exists and is no saved llmfit model. Choose"),
        ],
    )
    def test_are_checked_first(
        self, arguments: list[str], sentence: str, saved: Path, place: Path, capsys: Any, monkeypatch: Any
    ) -> None:
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("loaded")

        monkeypatch.setattr(llmfit, "load", never)
        monkeypatch.setattr("llmfit.base_model.load_base_model", never)
        before = sorted(place.rglob("*"))
        said = refused(capsys, *[saved if one == "MODEL" else one for one in arguments])
        assert said.startswith(sentence.replace("'file' is", f"'{place}/file' is"))
        assert sorted(place.rglob("*")) == before

    def test_folders_that_are_not_there_are_made(self, saved: Path, place: Path) -> None:
        assert main(["evaluate", str(saved), "rows.csv", "-o", "new/m.json", "-q"]) == 0
        assert main(["predict", str(saved), "rows.csv", "-o", "other/o.csv", "-q"]) == 0
        assert (place / "new" / "m.json").is_file()
        assert (place / "other" / "o.csv").is_file()

    def test_a_file_of_errors_is_not_written_over(self, saved: Path, place: Path, capsys: Any) -> None:
        (place / "bad.csv").write_text("mine")
        arguments = ["predict", saved, "rows.csv", "--errors", "bad.csv", "-q"]
        assert refused(capsys, *arguments) == (
            "'bad.csv' exists: nothing was written. Pass --overwrite, or name another file."
        )
        assert (place / "bad.csv").read_text() == "mine"
        assert main([*map(str, arguments), "--overwrite"]) == 0
        assert capsys.readouterr().out.count("\n") == 9
        assert not (place / "bad.csv").exists()  # no row is without an answer
        (place / "rows.csv").write_text("text\nred\na,b\n")
        assert main([*map(str, arguments)]) == 3
        assert pd.read_csv("bad.csv")["line"].tolist() == [3]


class TestWithoutEffect:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["preview", "MODEL", "rows.csv", "-c", "config.yaml"],
                "-c is merged over a config, and MODEL is a model: it has its parameters already.",
            ),
            (
                ["export", "MODEL", "out", "--no-merge", "--dtype", "float16"],
                "The 'dtype' parameter of export is of merged weights, and --no-merge writes none.",
            ),
            (
                ["predict", "MODEL", "rows.csv", "--resume"],
                "--resume needs an output that is a file: what went to standard output is not kept.",
            ),
            (
                ["predict", "MODEL", "rows.csv", "--overwrite"],
                "--overwrite has nothing to write over: the output is standard output, and no file of errors is named.",
            ),
        ],
    )
    def test_an_option_is_refused(
        self, arguments: list[str], sentence: str, saved: Path, place: Path, capsys: Any
    ) -> None:
        said = refused(capsys, *[saved if one == "MODEL" else one for one in arguments])
        assert said == sentence.replace("MODEL", repr(str(saved)))

    @pytest.mark.parametrize("command", SETTINGS)
    @pytest.mark.parametrize("key", ["epochs", "adapter.r", "devise", "base_model", "target"])
    def test_a_setting_is_refused_with_those_that_have_one(
        self, command: str, key: str, saved: Path, place: Path, capsys: Any
    ) -> None:
        words = {"export": ["out"], "export --no-merge": ["out", "--no-merge"]}.get(command, ["rows.csv"])
        said = refused(capsys, command.partition(" ")[0], saved, *words, "--set", f"{key}=1")
        usable = SETTINGS[command]
        if key == "base_model":
            assert said == "--set base_model has no place here. Pass --base-model."
        else:
            assert said.startswith(
                f"--set {key} has no effect on a model that is fitted. llmfit {command} has {', '.join(usable)}."
            )
            assert said.endswith("Did you mean 'device'?") == (key == "devise" and "device" in usable)

    def test_a_value_that_cannot_be_is_a_sentence(self, saved: Path, place: Path, capsys: Any) -> None:
        assert refused(capsys, "evaluate", saved, "rows.csv", "--set", "batch_tokens=abc") == (
            "The 'batch_tokens' parameter of the estimator must be 'auto' or an int >= 1. Got 'abc' instead."
        )

    def test_generation_is_refused_where_nothing_is_generated(
        self, saved: Path, place: Path, tiny: str, frame: pd.DataFrame, capsys: Any
    ) -> None:
        sentence = "--set generation has no effect on this model: it generates no text."
        for command in ("predict", "evaluate"):
            setting = ["--set", "generation.max_new_tokens=3"]
            assert refused(capsys, command, saved, "rows.csv", *setting) == sentence
        chosen = llmfit.LLMEstimator(tiny, target="label", features=["text"], epochs=1, device="cpu", verbose=0)
        chosen.fit(frame).save("chosen")
        assert refused(capsys, "evaluate", "chosen", "rows.csv", "--set", "generation.max_new_tokens=3") == sentence

    def test_generation_reaches_a_model_that_generates(self, place: Path, tiny: str, frame: pd.DataFrame) -> None:
        words = llmfit.LLMGenerator(tiny, target="label", features=["text"], epochs=1, device="cpu", verbose=0)
        words.fit(frame).save("words")
        setting = ["--set", "generation.max_new_tokens=1", "--set", "batch_tokens=64", "--set", "dtype=float64"]
        assert main(["predict", "words", "rows.csv", "-o", "o.csv", "-q", *setting]) == 0


class TestSentences:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["predict", "MODEL", "rows.csv", "--chunk-rows", "0"], "--chunk-rows must be an int >= 1. Got 0 instead."),
            (["preview", "MODEL", "rows.csv", "-n", "-1"], "--rows must be an int >= 0. Got -1 instead."),
            (["preview", "config.yaml", "rows.csv", "-n", "-1"], "--rows must be an int >= 0. Got -1 instead."),
            (
                ["fit", "config.yaml", "-", "-o", "m", "--eval", "-"],
                "Standard input can be read once, but '-' stands among DATA and behind --eval.",
            ),
            (
                ["fit", "sample.yaml", "rows.csv", "-o", "m"],
                "The config's 'preprocessing.sample_ratio' cannot be 0.1 here: write a sample of the rows to a file, "
                "and name that.",
            ),
        ],
    )
    def test_are_of_the_command_line_and_come_before_any_work(
        self, arguments: list[str], sentence: str, saved: Path, place: Path, capsys: Any, monkeypatch: Any
    ) -> None:
        (place / "sample.yaml").write_text(
            "input_features: [{name: text, type: text}]\noutput_features: [{name: label, type: category}]\n"
            "preprocessing: {sample_ratio: 0.1}\n"
        )
        monkeypatch.setattr(llmfit, "load", lambda *_, **__: 1 / 0)
        monkeypatch.setattr("llmfit.files.read_table", lambda *_, **__: 1 / 0)
        assert refused(capsys, *[saved if one == "MODEL" else one for one in arguments]) == sentence

    def test_a_fit_that_fails_among_others_is_a_sentence(self, place: Path, capsys: Any, monkeypatch: Any) -> None:
        def warning(*_: Any, **__: Any) -> Any:
            try:
                raise llmfit.exceptions.DataError("Row 3 is odd.\nVery odd.")
            except llmfit.exceptions.DataError:
                import traceback

                warnings.warn(
                    "\n1 fits failed out of a total of 6.\nThe score on these train-test partitions for these "
                    "parameters will be set to nan.\n\nBelow are more details about the failures:\n"
                    f"{'-' * 80}\n1 fits failed with the following error:\n{traceback.format_exc()}\n",
                    FitFailedWarning,
                    stacklevel=1,
                )
            warnings.warn("two\nlines", RuntimeWarning, stacklevel=1)
            raise llmfit.exceptions.DataError("no more.")

        monkeypatch.setattr("llmfit.files.read_table", warning)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["fit", "config.yaml", "rows.csv", "-o", "m", "-q"]) == 1
        assert capsys.readouterr().err == (
            "llmfit: warning: 1 fits failed out of a total of 6: Row 3 is odd.\n"
            "llmfit: warning: two.\n"
            "llmfit: no more.\n"
        )
        with pytest.warns() as caught, pytest.raises(llmfit.exceptions.DataError):
            main(["fit", "config.yaml", "rows.csv", "-o", "m", "-q", "--debug"])
        assert [one.category for one in caught] == [FitFailedWarning, RuntimeWarning]
        assert "Traceback" in str(caught[0].message)

    def test_fits_that_all_fail_say_why(self, place: Path, tiny: str, frame: pd.DataFrame, capsys: Any) -> None:
        pd.concat([frame] * 2).to_csv("rows.csv", index=False)
        (place / "search.yaml").write_text(
            f"estimator: LLMClassifier\nbase_model: {tiny}\ntarget: label\nfeatures: [text]\nepochs: 1\ndevice: cpu\n"
            "max_length: 3\nhyperopt: {parameters: {learning_rate: [0.1, 0.2]}}\n"
        )
        said = refused(capsys, "search", "search.yaml", "rows.csv", "-q")
        assert said == (
            "ValueError: All the 10 fits failed: Row 0 (index 0): the answer has 9 tokens, max_length is 3. An answer "
            "is never cut: raise max_length. Add --debug for the traceback."
        )

    @pytest.mark.parametrize("name", ["base", "weights/base", "../base"])
    def test_a_base_model_that_lies_elsewhere_is_asked_for(
        self, name: str, place: Path, tiny: str, capsys: Any, monkeypatch: Any
    ) -> None:
        (place / "here").mkdir()
        shutil.copytree(tiny, (place / "here" / name).resolve())
        monkeypatch.chdir(place / "here")
        assert main(["fit", "../config.yaml", "../rows.csv", "-o", "model", "-q", "--set", f"base_model={name}"]) == 0
        (place / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(place / "a" / "b")
        capsys.readouterr()
        said = refused(capsys, "evaluate", "../../here/model", "../../rows.csv", "-q")
        assert said.startswith(f"The base model {name!r} ")
        assert said.endswith(". Pass --base-model to say where it lies now.")
        assert main(["evaluate", "../../here/model", "../../rows.csv", "-q", "--base-model", f"../../here/{name}"]) == 0


class TestConfigs:
    @pytest.mark.parametrize(("name", "text"), [("c.json", '{"epochs": 2}'), ("c.yaml", "epochs: 2")])
    def test_a_byte_order_mark_is_no_part_of_a_config(self, name: str, text: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert llmfit.config.from_config([{"estimator": "LLMClassifier"}, tmp_path / name]).epochs == 2

    @pytest.mark.parametrize("twice", ["input_features", "output_features"])
    def test_features_of_one_name_are_refused(self, twice: str) -> None:
        config = {"base_model": "x", "input_features": [{"name": "a", "type": "text"}]}
        config["output_features"] = [{"name": "b", "type": "category"}]
        config[twice] = [*config[twice], config[twice][0]]
        with pytest.raises(llmfit.exceptions.ParameterError) as caught:
            llmfit.from_config(config)
        name = config[twice][0]["name"]
        assert str(caught.value) == (
            f"The config's '{twice}[1]' names the column '{name}', as another before it does. Drop one."
        )
