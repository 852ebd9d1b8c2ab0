"""What stands in a report: a section for each target, for a search, and for the fit.

Takes answers that were measured, frames and fitted estimators; gives HTML.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import pandas as pd

from llmfit import plots
from llmfit.estimators.answering import Answered
from llmfit.estimators.card import facts_of
from llmfit.exceptions import DataError
from llmfit.ranking import results
from llmfit.report.html import facts, figure, number, shown, table

__all__ = ["answer_section", "fit_section", "heading", "search_section"]

COLUMNS = 6  # of the rows' own that are shown beside an answer
CANDIDATES = 20  # of a search


def heading(model: Any, frame: pd.DataFrame, answers: list[Answered]) -> tuple[str, str]:
    """Write the title and the head of the page: what answers what, on how many rows."""
    asked, told = ", ".join(map(str, frame.columns)), ", ".join(one.target for one in answers)
    rows = f"{len(frame):,} row{'s' * (len(frame) != 1)}"
    name = type(model).__name__
    return f"{name}: {asked[:80]} to {told[:80]}", (
        f"<header><h1>{name}: {shown(asked, 80)} to {shown(told, 80)}</h1>"
        f"<p>Evaluated on {rows}; base model {shown(model.base_model_['name'], 120)}</p></header>"
    )


def answer_section(one: Answered, frame: pd.DataFrame, n_worst: int, *, alone: bool) -> str:
    """Tell how good the answers to one target are."""
    parts = [f"<section><h2>{'Measures' if alone else shown(one.target)}</h2>", _measures(one)]
    pictures = [figure(draw, title) for draw, title in PICTURES[one.kind](one)]
    if pictures:
        parts.append(f'<div class="figures">{"".join(pictures)}</div>')
    per_class = one.measures.get("per_class")
    if per_class is not None:
        columns = {"class": per_class.index, **{name: per_class[name] for name in per_class}}
        parts.append(f"<h3>Each class</h3>{table(columns)}")
    parts.append(_worst(one, frame, n_worst))
    return "\n".join([*parts, "</section>"])


def _measures(one: Answered) -> str:
    tiles = ""
    for name, value in one.measures.items():
        if isinstance(value, numbers.Real):
            undefined = '<span class="none">undefined</span>'
            text = undefined if math.isnan(value) else number(float(value))
            note = MEANINGS.get(name, "")
            tiles += f"<div><dt>{shown(name)}</dt><dd>{text}</dd>{f'<dd>{note}</dd>' if note else ''}</div>\n"
    return f'<dl class="measures">\n{tiles}</dl>'


def _worst(one: Answered, frame: pd.DataFrame, n_worst: int) -> str:
    """List the rows whose answers cost most."""
    what, costs = one.costs()
    order = [int(i) for i in np.argsort(-costs, kind="stable")[:n_worst] if costs[i] > 0]
    if not order:
        return ""
    columns: dict[str, Any] = {"row": frame.index[order].tolist(), what: costs[order].round(4)}
    columns["true"] = [one.truth.iloc[i] for i in order]
    columns["predicted"] = [one.predicted.iloc[i] for i in order]
    if one.kind == "classes" and one.proba is not None:
        columns["its probability"] = one.proba[order].max(axis=1).round(4)
    own = frame.iloc[order, :COLUMNS]
    for place, name in enumerate(own.columns):
        columns[_free(name, columns, own.columns)] = own.iloc[:, place].tolist()
    more = frame.shape[1] - COLUMNS
    note = f' <span class="note">{more} more columns are not shown.</span>' if more > 0 else ""
    return f'<h3>Worst rows</h3><p class="note">{WORST[one.kind]}{note}</p>{table(columns, kind="rows")}'


def _free(name: str, taken: Container[str], own: Container[str]) -> str:
    """Name a column of the rows' own so that it takes the place of no other."""
    free = name
    while free in taken or (free != name and free in own):
        free += " (column)"
    return free


def search_section(search: Any) -> str:
    """Tell what a search found."""
    found = results(search).head(CANDIDATES)
    try:
        picture = figure(lambda fig: plots.search_results(search, ax=fig), "Candidates of the search, the best on top")
    except DataError:
        picture = ""  # no candidate has a score
    rounded = [name for name in found if name in ("score", "std", "fit_seconds") or f"{name}_std" in found]
    columns = {name: found[name].round(4) if name in rounded else found[name] for name in found}
    return f'<section><h2>Search</h2><div class="figures">{picture}</div><h3>Candidates</h3>{table(columns)}</section>'


def fit_section(model: Any, frame: pd.DataFrame, answers: list[Answered]) -> str:
    """Tell what the model is, how it was fitted, and with which settings."""
    inner = vars(model).get("estimator_", model)
    known, training, template = facts_of(inner)
    pictures = []
    if len(inner.history_):
        pictures.append(figure(lambda fig: plots.learning_curve(inner, ax=fig), "Loss while it was fitted"))
    y = pd.DataFrame({one.target: one.truth for one in answers})
    y = y if len(answers) > 1 else y.iloc[:, 0]
    title = "Tokens of the rows evaluated"
    pictures.append(figure(lambda fig: plots.token_lengths(inner, frame, y, ax=fig), title))
    return (
        f"<section><h2>Model</h2>{facts(known)}<h3>Training</h3>{facts(training)}"
        f'<div class="figures">{"".join(pictures)}</div>'
        f"<h3>Prompt</h3><pre>{shown(template, 5000)}</pre>"
        f"<h3>Settings that are not the default</h3>{_settings(model)}</section>"
    )


def _settings(model: Any) -> str:
    defaults = {name: p.default for name, p in inspect.signature(type(model).__init__).parameters.items()}
    given = {
        name: repr(value) for name, value in model.get_params(deep=False).items() if repr(value) != repr(defaults[name])
    }
    return facts(given) if given else '<p class="note">None.</p>'


Picture = tuple[Callable[[Any], Any], str]


def _of_classes(one: Answered) -> list[Picture]:
    matrix = one.measures["confusion_matrix"]
    title = "Reliability of the probabilities"
    return [
        (lambda fig: plots.confusion_matrix(matrix, ax=fig), "True and predicted classes, in rows"),
        (lambda fig: plots.reliability(_plain(one.truth), one.proba, classes=_plain(one.classes), ax=fig), title),
    ]


def _plain(labels: Any) -> list[Any]:
    return list(np.asarray(labels, dtype=object).tolist())


def _of_numbers(one: Answered) -> list[Picture]:
    truth, predicted = one.truth.astype(float), one.predicted.astype(float)
    return [
        (
            lambda fig: plots.predicted_against_true(truth, predicted, unit=one.target, ax=fig),
            f"Predicted and true {one.target}",
        )
    ]


PICTURES: dict[str, Callable[[Answered], list[Picture]]] = {
    "classes": _of_classes,
    "sets": lambda _: [],
    "number": _of_numbers,
    "text": lambda _: [],
}
WORST = {
    "classes": "Rows whose true class was thought least likely: -ln of its probability, infinite for one that no "
    "fitted row had.",
    "sets": "Rows whose labels were thought least likely: the sum of -ln of what was true of each label.",
    "number": "Rows whose answer is farthest from the truth, in units of the target; infinite where it is no number.",
    "text": "Rows whose answer shares the fewest words with the true one.",
}
MEANINGS = {
    "accuracy": "share of rows answered right",
    "balanced_accuracy": "mean over the classes",
    "f1_macro": "mean over the classes",
    "f1_weighted": "mean over the rows",
    "f1_micro": "over all decisions",
    "f1_samples": "mean over the rows",
    "precision_macro": "mean over the classes",
    "recall_macro": "mean over the classes",
    "log_loss": "nats a row, 0 is best",
    "roc_auc": "0.5 is chance, 1 is best",
    "subset_accuracy": "rows with all labels right",
    "hamming_loss": "wrong decisions, 0 is best",
    "jaccard": "overlap of the labels",
    "r2": "1 is best, 0 is the mean",
    "mae": "in units of the target",
    "rmse": "in units of the target",
    "spearman": "correlation of ranks",
    "unanswered": "answers that are no number",
    "exact_match": "share of rows, 0 to 1",
    "token_f1": "shared words, 0 to 1",
    "rouge1": "0 to 1",
    "rouge2": "0 to 1",
    "rougeL": "0 to 1",
    "bleu": "0 to 100",
    "chrf": "0 to 100",
    "perplexity": "per token, 1 is best",
}
