"""The commands, their arguments, and a help that teaches them by example.

Takes nothing; gives an argparse parser whose result knows the function to run. Loads neither torch nor pandas.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from llmfit import __version__
from llmfit.cli import models, tuning

__all__ = ["make_parser"]

ABOUT = "Fine-tune language models on tables, and score tables with them."
STEPS = """
from a table to predictions:
  llmfit preview spam.yaml train.csv              see the prompts, before anything is trained
  llmfit fit spam.yaml train.csv -o model         train, and save to a folder
  llmfit evaluate model test.csv                  measure on rows that were held out
  llmfit predict model new.csv -o scored.csv      answer other rows

spam.yaml says what is to be learned:
  estimator: LLMClassifier
  base_model: smollm2
  target: label
  epochs: 2

Files are CSV, TSV, JSON, JSONL, Parquet or Excel, told by suffix (.csv.gz and the like are read, too); 'data/*.csv'
reads several, - is standard input or output. 'llmfit COMMAND --help' has examples of each.

exit codes: 0 done, 1 error, 2 wrong usage, 3 done, but some rows have no answer, 130 interrupted
"""
FILE = "file, glob or - for standard input; several are read as one table"
SETTING = re.compile(r"[A-Za-z_][\w]*(\.[\w]+)*")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; what it parses has the attributes `run` (a function of it) and `debug`."""
    parser = argparse.ArgumentParser("llmfit", description=ABOUT, epilog=STEPS, formatter_class=_Form)
    parser.add_argument("--version", action="version", version=f"llmfit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (run, about, examples, add) in COMMANDS.items():
        own = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=examples, formatter_class=_Form
        )
        add(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        own.set_defaults(run=run)
    return parser


class _Form(argparse.RawDescriptionHelpFormatter):
    """Help with a wide column of names."""

    def __init__(self, prog: str, **rest: Any) -> None:
        super().__init__(prog, max_help_position=30, **rest)


def _setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; the value as configuration files have it."""
    from llmfit.config.reading import read_value

    name, equals, value = text.partition("=")
    if not equals or not SETTING.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, for example adapter.r=8")
    return name, read_value(value)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML or JSON file that says what is to be learned")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="+", help=FILE)
    parser.add_argument(
        "--format", help="format of DATA where its suffix does not tell: csv, tsv, json, jsonl, parquet, excel"
    )


def _settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help=f"{what}; dots reach inside; VALUE is a number, true, null, [a, b], {{k: v}} or a text; may be repeated",
    )


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")


def _more_configs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        dest="more",
        metavar="CONFIG",
        action="append",
        default=[],
        help="another config, merged over CONFIG; may be repeated",
    )


def _fit(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _data(parser)
    parser.add_argument(
        "-o", "--output", metavar="MODEL", required=True, help="folder to save to; an earlier model is replaced"
    )
    parser.add_argument("--eval", metavar="FILE", action="append", default=[], help="rows for the validation loss")
    _more_configs(parser)
    _settings(parser, "override a key of the config")
    _quiet(parser)


def _search(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _data(parser)
    parser.add_argument("-o", "--output", metavar="MODEL", help="folder to save the best model to")
    parser.add_argument("--results", metavar="FILE", help="CSV file for all that was measured of each candidate")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="folder for the score of each candidate on each fold: the same command, given again after it was stopped, "
        "takes from there what it knows (in a config: hyperopt.checkpoint_dir)",
    )
    _more_configs(parser)
    _settings(parser, "override a key of the config")
    _quiet(parser)


def _preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML or JSON file, or the folder of a model")
    _data(parser)
    parser.add_argument("-n", "--rows", type=int, default=5, help="rows to show (default: 5)")
    _more_configs(parser)
    _settings(parser, "override a key of the config")
    parser.set_defaults(quiet=True)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder that llmfit fit, or save() in Python, has written")


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="PATH", help="where the base model lies now, if it has moved")
    _settings(parser, "override a parameter of the model, such as device=cpu")
    _quiet(parser)


def _predict(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _data(parser)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        metavar="OUT",
        default="-",
        help="file to write: .csv, .tsv, .jsonl, .parquet (default: - , CSV to standard output)",
    )
    add("--proba", action="store_true", help="write the probability of every class, too")
    add(
        "--keep",
        metavar="NAMES",
        type=_names,
        help="columns to copy, as a,b, behind the row's number; '' for none (default: all, without the number)",
    )
    add(
        "--errors",
        metavar="FILE",
        help="file for rows that cannot be answered (default: OUT.errors.csv, without OUT's .csv)",
    )
    add("--strict", action="store_true", help="stop at the first row that cannot be answered")
    add("--resume", action="store_true", help="go on with a run that was stopped; OUT becomes as if it had not been")
    add("--overwrite", action="store_true", help="begin anew, whatever OUT holds")
    add("--chunk-rows", metavar="N", type=int, default=1000, help="rows answered and written at a time (default: 1000)")
    _loading(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _data(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="REPORT",
        help="report.html for a page with plots, or metrics.json (default: text to standard output)",
    )
    _loading(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a plain model of transformers with the adapter merged in (default), or the adapter alone, for PEFT",
    )
    parser.add_argument("--dtype", default="auto", help="of merged weights: auto, float32, bfloat16, float16")
    _loading(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-model", default="smollm2", help="hub id, folder, .gguf file or alias (default: smollm2)"
    )
    parser.add_argument("--rows", type=int, default=190, help="rows to train on, 20 to 190 (default: 190)")


COMMANDS: dict[str, tuple[Callable[[Any], Any], str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "fit": (
        tuning.fit,
        "train a model on rows and save it",
        """examples:
  llmfit fit spam.yaml train.csv -o model
  llmfit fit spam.yaml 'data/2024-*.csv.gz' -o model --set epochs=1 --set adapter.r=8
  llmfit fit spam.yaml -c qlora.yaml train.parquet -o model --eval valid.parquet
  zcat train.csv.gz | llmfit fit spam.yaml - -o model

--set takes YAML: --set epochs=3, --set target=label, --set 'features=[title, review]', --set adapter=null,
--set 'adapter={type: lora, r: 8}'. Lists and mappings stand in brackets and braces; whatever else is no number, true,
false or null is a text as it stands: --set 'template=Message: {text}'. Quotes make a text of a number:
--set 'target="2024"'.""",
        _fit,
    ),
    "predict": (
        models.predict,
        "answer the rows of files, of any length, in little memory",
        """examples:
  llmfit predict model new.csv -o scored.csv --proba
  llmfit predict model 'logs/*.jsonl.gz' -o scored.parquet --keep id
  llmfit predict model huge.csv -o scored.csv --resume      again, after a kill or a full disk
  cat new.csv | llmfit predict model - | head

Columns of DATA are copied, and TARGET_predicted follows; with --proba a column TARGET_proba_CLASS for each class. A
row that cannot be answered stands in scored.errors.csv with its line and the reason, and the exit code is 3.
scored.csv.manifest.json says how far a run is; scored.csv is there when all rows are done.""",
        _predict,
    ),
    "evaluate": (
        models.evaluate,
        "measure a model on rows whose answers are known",
        """examples:
  llmfit evaluate model test.csv
  llmfit evaluate model test.csv -o report.html
  llmfit evaluate model test.csv -o metrics.json""",
        _evaluate,
    ),
    "preview": (
        tuning.preview,
        "show how rows become prompts; nothing is trained",
        """examples:
  llmfit preview spam.yaml train.csv
  llmfit preview spam.yaml train.csv -n 1 --set 'template=Message: {text}'
  llmfit preview model new.csv

The answer that is learned stands in brackets behind the prompt.""",
        _preview,
    ),
    "search": (
        tuning.search,
        "try the candidates of a config's hyperopt, and save the best",
        """examples:
  llmfit search search.yaml train.csv
  llmfit search search.yaml train.csv -o model --results results.csv
  llmfit search search.yaml train.csv -o model --resume scores      again, after a kill

A search that draws its candidates needs hyperopt.random_state to be gone on with: else it would draw others.""",
        _search,
    ),
    "export": (
        models.export,
        "write a model for transformers, or its adapter for PEFT",
        """examples:
  llmfit export model merged --merge
  llmfit export model adapter --no-merge""",
        _export,
    ),
    "show": (
        models.show,
        "say what a saved model is, without loading it",
        """examples:
  llmfit show model""",
        _model,
    ),
    "demo": (
        tuning.demo,
        "the main job, on packaged book reviews: prompts, zero-shot, fine-tuning, grid search, save and load",
        """examples:
  llmfit demo                  a few minutes on a CPU
  llmfit demo --rows 40""",
        _demo,
    ),
}
