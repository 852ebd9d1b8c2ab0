"""A picture of what a search found."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd

from llmfit.exceptions import DataError, check_int
from llmfit.plots.drawing import BLUE, GREY, ORANGE, axes_of, named, tidy
from llmfit.ranking import results

__all__ = ["search_results"]

LINE = 60  # characters


def search_results(search: Any, n: int = 20, *, ax: Any = None) -> Any:
    """Draw the scores of a search's best candidates, with the spread over the folds.

    Parameters
    ----------
    search : fitted search
        As for :func:`llmfit.search.results`.
    n : int, default=20
        Candidates to draw.
    ax : matplotlib Axes or empty Figure, default=None

    Returns
    -------
    matplotlib Axes
        The best on top; bars reach one standard deviation over the folds to each side.
    """
    check_int("n", "search_results", n, least=1)
    found = results(search)
    main = search.refit if isinstance(getattr(search, "refit", None), str) else found.columns[1]
    known = found[found[main].notna()].head(n)
    if not len(known):
        raise DataError("search_results has nothing to draw: no candidate has a score.")
    spread = known["std" if main == "score" else f"{main}_std"]
    labels = _candidates(known, found, main)
    lines = [label.split("\n") for label in labels]
    width, height = max(len(line) for label in lines for line in label), max(map(len, lines))
    ax = axes_of(ax, (4.5 + 0.075 * width, 1.2 + (0.14 + 0.18 * height) * len(known)))
    places = np.arange(len(known))[::-1]
    ax.errorbar(known[main], places, xerr=spread, fmt="o", color=BLUE, ecolor=GREY, elinewidth=1, capsize=3)
    ax.plot(known[main].iloc[:1], places[:1], "o", color=ORANGE, markersize=9, zorder=3)
    ax.set_yticks(places, labels, fontsize=9)
    ax.set_ylim(-0.7, len(known) - 0.3)
    scoring = getattr(search, "scoring", None)
    ax.set_xlabel(scoring if main == "score" and isinstance(scoring, str) else main)
    gone = len(found) - len(known)
    if gone:
        ax.set_title(f"{len(known)} of {len(found)} candidates", fontsize=10, color=GREY)
    return tidy(ax)


def _candidates(known: pd.DataFrame, found: pd.DataFrame, main: str) -> list[str]:
    """Name candidates by the parameters that tell them apart, on as many lines as that takes."""
    others = {"rank", "score", "std", "fit_seconds", "n_resources", main, f"{main}_std"}
    measures = {name for name in found.columns if f"{name}_std" in found.columns}
    names = [name for name in found if name not in others | measures and name.removesuffix("_std") not in measures]
    varied = [name for name in names if found[name].astype(str).nunique() > 1] or names
    texts = (
        ", ".join(named(f"{name}={_short(row[name])}", 3 * LINE) for name in varied) for row in known.to_dict("records")
    )
    return ["\n".join(textwrap.wrap(text, LINE, break_long_words=False, break_on_hyphens=False)) for text in texts]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
