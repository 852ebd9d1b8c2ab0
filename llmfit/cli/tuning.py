"""Commands that begin with a config: ``fit``, ``search``, ``preview``, and ``demo``.

Takes parsed arguments; trains, saves, shows. Everything heavy is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfit.cli.models import load_model
from llmfit.cli.outputs import check_folder, check_results
from llmfit.cli.saying import put, say
from llmfit.exceptions import DataError, ParameterError, check_int

__all__ = ["demo", "fit", "preview", "search"]


def fit(given: Any) -> None:
    """Train a model and save it."""
    from llmfit.files import kinds_of, read_table

    check_folder(given.output)
    if "-" in given.data and "-" in given.eval:
        raise DataError("Standard input can be read once, but '-' stands among DATA and behind --eval.")
    estimator = _from_config(given)
    if _is_search(estimator):
        raise ParameterError(f"The config {given.config!r} has hyperopt, which is a search. Run: llmfit search.")
    frame = _read(estimator, given)
    known = {"eval_set": read_table(given.eval, format=given.format, kinds=kinds_of(frame))} if given.eval else {}
    estimator.fit(frame, **known)
    estimator.save(given.output)
    say(f"{len(frame)} row(s) learned; the model is in {given.output!r}.")


def search(given: Any) -> None:
    """Try candidates, show them, save the best."""
    from llmfit.search import leaderboard, results

    if given.output:
        check_folder(given.output)
    if given.results:
        check_results(given.results)
    found = _from_config(given)
    if not _is_search(found):
        raise ParameterError(f"The config {given.config!r} has no hyperopt, so that there is nothing to search.")
    if given.output and not found.refit:
        raise ParameterError("The best model cannot be saved: the config says refit: false.")
    if given.resume:
        found.set_params(checkpoint_dir=given.resume)
    frame = _read(found.estimator, given)
    _check_targets(found.estimator, frame)
    found.fit(frame)
    table = results(found)
    put(leaderboard(found, len(table)))
    if given.output:
        found.best_estimator_.save(given.output)
        say(f"The best of {len(table)} candidate(s) is in {given.output!r}.")
    if given.results:
        file = Path(given.results).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(file, index=False)


def preview(given: Any) -> None:
    """Show prompts."""
    from llmfit.estimators.filing import read_as

    check_int("n", "preview", given.rows, least=0)
    if Path(given.config).is_dir():
        if given.more:
            raise ParameterError(
                f"-c is merged over a config, and {given.config!r} is a model: it has its parameters already."
            )
        estimator = load_model(given, given.config, "preview")
        frame = read_as(estimator, given.data, format=given.format)
    else:
        estimator = _from_config(given)
        estimator = estimator.estimator if _is_search(estimator) else estimator
        frame = _read(estimator, given)
    for number, row in enumerate(estimator.preview(frame, given.rows).itertuples()):
        put(f"--- row {number}: {row.prompt_tokens} + {row.completion_tokens} tokens, {row.cut} character(s) cut")
        put(f"{row.prompt}[{row.completion}]\n")


def demo(given: Any) -> None:
    """Run the main job on packaged data."""
    from llmfit.demo import run_demo

    run_demo(base_model=given.base_model, rows=given.rows)


def _from_config(given: Any) -> Any:
    from llmfit.config import from_config

    made = from_config([given.config, *given.more], **dict(given.settings))
    if given.quiet:
        (made.estimator if _is_search(made) else made).set_params(verbose=0)
    return made


def _read(estimator: Any, given: Any) -> Any:
    """Read the rows of a config: cells of CSV that it declares as text or category are not taken for numbers."""
    from llmfit import LLMGenerator
    from llmfit.files import find_inputs, read_table

    features, target = estimator.features, estimator.target
    if isinstance(estimator, LLMGenerator) and isinstance(target, str):
        target = {target: "text"}
    declared = [one for one in (features, target) if isinstance(one, Mapping)]
    kinds = {name: "text" for one in declared for name, kind in one.items() if kind in ("text", "category")}
    guessed = find_inputs(given.data, format=given.format)[0].format in ("csv", "tsv")  # others have types of their own
    return read_table(given.data, format=given.format, kinds=kinds if guessed else None)


def _is_search(estimator: Any) -> bool:
    return hasattr(estimator, "refit") and hasattr(estimator, "estimator")


def _check_targets(estimator: Any, frame: Any) -> None:
    """Refuse rows without the target, in the words of a config."""
    named = estimator.target
    names = [named] if isinstance(named, str) else list(named or ())
    if not names:
        raise ParameterError("A search needs to know its target. Set the key target.")
    for name in names:
        if name not in frame.columns:
            raise DataError(f"The target column {name!r} is missing: the data has {list(frame.columns)}.")
