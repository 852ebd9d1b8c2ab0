"""The command line: clean pipes, exit codes, one sentence on what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import llmfit
from llmfit.cli import main
from llmfit.cli.parsing import COMMANDS, make_parser
from llmfit.search import make_search

CONFIG = """\
estimator: LLMClassifier
base_model: {tiny}
target: label
features: [text]
adapter: {{type: lora, r: 4}}
epochs: 1
device: cpu
random_state: 0
"""


@pytest.fixture
def place(tiny: str, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and rows, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(tiny=tiny))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was saved once for all tests."""
    texts = ["red apple", "green pear", "old car", "fast train", "sweet plum", "big truck"]
    frame = pd.DataFrame({"text": texts, "label": ["fruit", "fruit", "vehicle", "vehicle", "fruit", "vehicle"]})
    clf = llmfit.LLMClassifier(tiny, target="label", epochs=1, random_state=0, device="cpu", dtype="float32", verbose=0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    clf.fit(frame).save(folder)
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


class TestFit:
    def test_is_the_fit_of_python(self, place: Path, tiny: str, frame: pd.DataFrame, capsys: Any) -> None:
        assert (
            run("fit", "config.yaml", "rows.csv", "-o", "model", "--set", "adapter.r=2", "--set", "learning_rate=1e-3")
            == 0
        )
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("llmfit: 8 row(s) learned; the model is in 'model'.\n")
        model = llmfit.load("model", verbose=0)
        assert model.get_params()["adapter__r"] == 2
        assert model.learning_rate == 1e-3
        same = llmfit.LLMClassifier(
            tiny,
            target="label",
            features=["text"],
            adapter={"type": "lora", "r": 2},
            epochs=1,
            learning_rate=1e-3,
            device="cpu",
            random_state=0,
            verbose=0,
        ).fit(frame)
        np.testing.assert_array_equal(model.predict_proba(frame), same.predict_proba(frame))

    def test_quiet_says_its_last_sentence_alone(self, place: Path, capsys: Any) -> None:
        assert run("fit", "config.yaml", "rows.csv", "-o", "model", "-q", "--eval", "rows.csv") == 0
        assert capsys.readouterr() == ("", "llmfit: 8 row(s) learned; the model is in 'model'.\n")
        assert "validation_loss" in llmfit.load("model").history_

    def test_several_configs_are_merged(self, place: Path) -> None:
        (place / "more.yaml").write_text("adapter:\n  alpha: 3\nepochs: 2\n")
        assert run("fit", "config.yaml", "-c", "more.yaml", "rows.csv", "-o", "model", "-q", "--set", "epochs=1") == 0
        params = llmfit.load("model").get_params()
        assert (params["adapter__r"], params["adapter__alpha"], params["epochs"]) == (4, 3, 1)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["no.yaml", "rows.csv", "-o", "m"], "The config 'no.yaml' cannot be read: "),
            (["config.yaml", "no.csv", "-o", "m"], "'no.csv' cannot be read: there is no such file.\n"),
            (["config.yaml", "rows.csv", "-o", "rows.csv"], "'rows.csv' exists and is no saved llmfit model. "),
            (["config.yaml", "rows.csv", "-o", "rows.csv/m"], "'rows.csv/m' cannot be written: "),
            (
                ["config.yaml", "rows.csv", "-o", "m", "--set", "epochs=x"],
                "The 'epochs' parameter of LLMClassifier must",
            ),
            (["config.yaml", "rows.csv", "-o", "m", "--set", "target=lable"], "LLMClassifier needs the target column"),
        ],
    )
    def test_what_is_wrong_is_said_in_a_sentence(self, arguments: Any, sentence: str, place: Path, capsys: Any) -> None:
        assert run("fit", *arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"llmfit: {sentence}")
        assert err.count("\n") == 1
        assert not (place / "m").exists()

    def test_debug_shows_where(self, place: Path) -> None:
        with pytest.raises(llmfit.exceptions.DataError):
            run("fit", "config.yaml", "no.csv", "-o", "m", "--debug")

    def test_an_error_that_nobody_foresaw_is_a_sentence_as_well(
        self, place: Path, capsys: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("llmfit.files.read_table", lambda *_, **__: 1 / 0)
        assert run("fit", "config.yaml", "rows.csv", "-o", "m") == 1
        assert capsys.readouterr().err == (
            "llmfit: ZeroDivisionError: division by zero. Add --debug for the traceback.\n"
        )

    def test_an_interrupt_has_its_exit_code(self, place: Path, capsys: Any, monkeypatch: Any) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("llmfit.files.read_table", interrupted)
        assert run("fit", "config.yaml", "rows.csv", "-o", "m") == 130
        assert capsys.readouterr().err == "llmfit: interrupted.\n"


class TestPredict:
    def test_is_predict_of_python(self, place: Path, saved: Path, frame: pd.DataFrame, capsys: Any) -> None:
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "--proba", "-q") == 0
        assert capsys.readouterr() == ("", "llmfit: 8 row(s) answered in 'out.csv'.\n")
        out, model = pd.read_csv("out.csv"), llmfit.load(saved, verbose=0)
        assert out["label_predicted"].tolist() == model.predict(frame).tolist()
        proba = out[["label_proba_fruit", "label_proba_vehicle"]].to_numpy()
        np.testing.assert_array_equal(proba, model.predict_proba(frame))

    def test_rows_without_an_answer_have_an_exit_code(self, place: Path, saved: Path, capsys: Any) -> None:
        (place / "rows.csv").write_text("text,label\none,fruit\ntwo\nthree,fruit\n")
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "--keep", "text") == 3
        assert capsys.readouterr().err.endswith("llmfit: 1 of 3 row(s) have no answer: see 'out.errors.csv'.\n")
        assert pd.read_csv("out.csv")["row"].tolist() == [0, 2]
        assert run("predict", saved, "rows.csv", "-o", "strict.csv", "--strict", "-q") == 1
        assert capsys.readouterr().err == "llmfit: 'rows.csv', line 3: it has 1 value(s), the header has 2.\n"
        assert run("predict", saved, "rows.csv", "-q") == 1
        out, err = capsys.readouterr()
        head, before = out.splitlines()
        assert head == "text,label,label_predicted"
        assert before.startswith("one,fruit,")
        assert err == (
            "llmfit: 'rows.csv', line 3: it has 1 value(s), the header has 2. Name a file with --errors, and "
            "such rows go "
            "there.\n"
        )
        assert run("predict", saved, "rows.csv", "-q", "--errors", "bad.csv") == 3
        assert capsys.readouterr().out.count("\n") == 3
        assert pd.read_csv("bad.csv")["line"].tolist() == [3]

    def test_errors_advise_options(self, place: Path, saved: Path, capsys: Any) -> None:
        (place / "out.csv").write_text("mine")
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "-q") == 1
        assert capsys.readouterr().err == (
            "llmfit: 'out.csv' exists: nothing was written. Pass --overwrite, or name another file.\n"
        )
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "-q", "--overwrite") == 0
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "-q", "--resume") == 0
        assert run("predict", saved, "rows.csv", "-o", "out.csv", "-q", "--resume", "--proba") == 1
        assert capsys.readouterr().err.endswith(
            "was begun with proba=False, not proba=True: it cannot go on. Pass --overwrite to begin anew.\n"
        )

    def test_settings_reach_the_model(self, place: Path, saved: Path, capsys: Any) -> None:
        assert run("predict", saved, "rows.csv", "-q", "--set", "devise=cpu") == 1
        assert "--set devise has no effect on a model that is fitted. " in capsys.readouterr().err
        assert run("predict", saved, "rows.csv", "-q", "--set", "batch_tokens=64") == 0


class TestEvaluate:
    def test_prints_what_python_gives(self, place: Path, saved: Path, frame: pd.DataFrame, capsys: Any) -> None:
        assert run("evaluate", saved, "rows.csv", "-q") == 0
        out = capsys.readouterr().out
        measures = llmfit.load(saved, verbose=0).evaluate(frame)
        assert f"accuracy           {measures['accuracy']:.4f}\n" in out
        assert "confusion matrix" in out

    def test_writes_json(self, place: Path, saved: Path, frame: pd.DataFrame, capsys: Any) -> None:
        assert run("evaluate", saved, "rows.csv", "-q", "-o", "m.json") == 0
        assert capsys.readouterr().out == ""
        measures, written = llmfit.load(saved, verbose=0).evaluate(frame), json.loads((place / "m.json").read_text())
        assert written["log_loss"] == measures["log_loss"]
        assert written["confusion_matrix"]["fruit"]["vehicle"] == measures["confusion_matrix"].loc["fruit", "vehicle"]

    def test_a_report_of_another_form_is_refused(self, place: Path, saved: Path, capsys: Any) -> None:
        assert run("evaluate", saved, "rows.csv", "-o", "m.pdf") == 1
        assert capsys.readouterr().err == "llmfit: The report 'm.pdf' must end in .html or .json.\n"

    def test_a_page_is_written_whole(self, place: Path, saved: Path) -> None:
        assert run("evaluate", saved, "rows.csv", "-o", "m.html", "-q") == 0
        page = (place / "m.html").read_text(encoding="utf-8")
        assert page.lower().startswith("<!doctype html>")
        assert "LLMClassifier" in page
        assert "accuracy" in page


class TestTheRest:
    def test_preview_shows_prompts(self, place: Path, saved: Path, capsys: Any) -> None:
        assert run("preview", "config.yaml", "rows.csv", "-n", 1) == 0
        out, err = capsys.readouterr()
        assert "text: red apple\n\nlabel:[ fruit</s>]\n" in out
        assert out.startswith("--- row 0: ")
        assert err == ""
        assert run("preview", saved, "rows.csv", "-n", 2) == 0
        assert capsys.readouterr().out.count("--- row") == 2

    def test_search_shows_the_best_first_and_saves_it(self, place: Path, capsys: Any, monkeypatch: Any) -> None:
        import llmfit.config

        make = llmfit.config.from_config

        def search(*given: Any, **rest: Any) -> Any:
            return make_search(make(*given, **rest), {"adapter__r": [1, 2]}, cv=2, scoring="neg_log_loss")

        monkeypatch.setattr(llmfit.config, "from_config", search)
        assert run("search", "config.yaml", "rows.csv", "-q", "-o", "model", "--results", "all.csv") == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == "2 candidates on 2 folds; a higher score is better"
        assert out.splitlines()[1].split() == ["rank", "score", "std", "adapter__r"]
        assert [line.split()[0] for line in out.splitlines()[2:]] == ["1", "2"]
        assert err == "llmfit: The best of 2 candidate(s) is in 'model'.\n"
        results = pd.read_csv("all.csv")
        assert results["rank"].tolist() == [1, 2]
        assert llmfit.load("model").get_params()["adapter__r"] == results["adapter__r"][0]
        assert run("fit", "config.yaml", "rows.csv", "-o", "model") == 1
        assert "has hyperopt, which is a search. Run: llmfit search." in capsys.readouterr().err

    def test_search_needs_something_to_search(self, place: Path, capsys: Any) -> None:
        assert run("search", "config.yaml", "rows.csv") == 1
        assert capsys.readouterr().err == (
            "llmfit: The config 'config.yaml' has no hyperopt, so that there is nothing to search.\n"
        )

    def test_export(self, place: Path, saved: Path, capsys: Any) -> None:
        assert run("export", saved, "merged", "--merge", "-q") == 0
        assert run("export", saved, "adapter", "--no-merge", "-q") == 0
        assert (place / "merged" / "model.safetensors").is_file()
        assert (place / "adapter" / "adapter_config.json").is_file()
        assert capsys.readouterr().out == ""

    def test_show_reads_the_folder_alone(self, place: Path, saved: Path, capsys: Any) -> None:
        assert run("show", saved) == 0
        lines = dict(
            line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("base")
        )
        assert lines["estimator"] == "LLMClassifier"
        assert lines["adapter"].startswith("lora (r=")
        assert lines["classes"] == "fruit, vehicle"
        assert run("show", place) == 1
        assert capsys.readouterr().err == f"llmfit: '{place}' is no saved llmfit model: it has no llmfit.json.\n"

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_teaches_by_example(self, command: str, capsys: Any) -> None:
        with pytest.raises(SystemExit) as left:
            run(command, "--help")
        assert left.value.code == 0
        assert f"  llmfit {command} " in capsys.readouterr().out.partition("examples:")[2]

    def test_examples_of_the_help_are_commands_that_there_are(self) -> None:
        for name, (_, _, examples, _) in COMMANDS.items():
            lines = [line for line in examples.splitlines() if line.startswith("  llmfit")]
            assert lines
            for line in lines:
                words = shlex.split(line.partition("      ")[0])
                assert make_parser().parse_args(words[1:]).command == name

    @pytest.mark.parametrize(
        ("setting", "problem"),
        [
            ("epochs", "'epochs' must be NAME=VALUE, for example adapter.r=8"),
            ("=3", "'=3' must be NAME=VALUE, for example adapter.r=8"),
        ],
    )
    def test_a_setting_that_is_none_is_wrong_usage(self, setting: str, problem: str, capsys: Any) -> None:
        with pytest.raises(SystemExit) as left:
            run("fit", "c.yaml", "d.csv", "-o", "m", "--set", setting)
        assert left.value.code == 2
        assert capsys.readouterr().err.endswith(f"argument --set: {problem}\n")

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("8", 8),
            ("1e-4", 1e-4),
            ("null", None),
            ("", None),
            ("true", True),
            ("yes", "yes"),  # words, as in files: YAML 1.2
            ("on", "on"),
            ("0o17", "0o17"),
            ("2024-01-01", "2024-01-01"),
            ("[a, b]", ["a", "b"]),
            ("{type: lora, r: 8}", {"type": "lora", "r": 8}),
            ("{}", {}),
            ("lora", "lora"),
            ("a=b", "a=b"),
            ('"2024"', "2024"),
            ("'a: b'", "a: b"),
            ("Message: {text}", "Message: {text}"),
            ("{title}", "{title}"),
            ("{title}: {text}", "{title}: {text}"),
            ("{title} # {text}", "{title} # {text}"),
            ("Rate it # 1 to 5", "Rate it # 1 to 5"),
            ("# 1", "# 1"),
            ("- {text}", "- {text}"),
            ("a=[", "a=["),
            ('"{title}" says', '"{title}" says'),
            ("{r: 8, r: 9}", "{r: 8, r: 9}"),
            ("first\nsecond", "first\nsecond"),
            ("@text", "@text"),
        ],
    )
    def test_settings_are_yaml(self, text: str, value: Any) -> None:
        given = make_parser().parse_args(["fit", "c", "d", "-o", "m", "--set", f"x.y={text}"])
        assert given.settings == [("x.y", value)]


def test_the_commands_of_the_readme_are_all_that_is_needed(place: Path, tiny: str, frame: pd.DataFrame) -> None:
    readme = (Path(llmfit.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (place / "spam.yaml").write_text(readme.partition("```yaml\n")[2].partition("```")[0].replace("smollm2", tiny))
    assert len((place / "spam.yaml").read_text().splitlines()) == 8
    for name in ("train", "test", "new"):
        frame.to_csv(f"{name}.csv", index=False)
    commands = [line for line in readme.splitlines() if line.startswith("llmfit ")]
    assert [command.split()[1] for command in commands] == ["preview", "fit", "evaluate", "predict"]
    for command in commands:
        assert run(*shlex.split(command, comments=True)[1:]) == 0, command
    assert pd.read_csv("scored.csv").columns.tolist()[-2:] == ["label_proba_fruit", "label_proba_vehicle"]


class TestProcess:
    """What only a process of its own can show."""

    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom llmfit.cli import main\n"
            "try: main(['predict', '--help'])\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'transformers', 'peft', 'sklearn', 'yaml'} & set(sys.modules)))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.endswith("[]\n")

    def test_usage(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(llmfit.__file__).parents[1])}
        command = [sys.executable, "-m", "llmfit", "predict", "model"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith("error: the following arguments are required: DATA\n")

    def test_pipes_carry_rows_alone_and_end_quietly(self, saved: Path, place: Path, frame: pd.DataFrame) -> None:
        pd.concat([frame] * 40).to_csv("many.csv", index=False)
        command = f"{sys.executable} -m llmfit predict {saved} - -q --chunk-rows 5 < many.csv | head -n 3"
        environment = {**os.environ, "PYTHONPATH": str(Path(llmfit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, env=environment
        )
        predicted = llmfit.load(saved, verbose=0).predict(frame).tolist()
        assert done.stdout.splitlines() == [
            "text,size,label,label_predicted",
            f"red apple,0,fruit,{predicted[0]}",
            f"green pear,1,fruit,{predicted[1]}",
            "141",
        ]
        assert done.stderr == ""

    @pytest.mark.parametrize(
        ("target", "code", "said"),
        [
            ("| true; echo ${PIPESTATUS[0]} >&2", "141\n", ""),
            ("> /dev/full; echo $? >&2", "1\n", "Standard output cannot be written: No space left on device."),
        ],
    )
    def test_what_cannot_be_written_at_the_end_is_said_once(
        self, saved: Path, place: Path, target: str, code: str, said: str
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(llmfit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = f"{sys.executable} -m llmfit show {saved} {target}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
        lines = done.stderr.splitlines(keepends=True)
        assert lines[-1] == code
        assert [line.rstrip("\n").partition(": ")[2] for line in lines[:-1]] == ([said] if said else [])
