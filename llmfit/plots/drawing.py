"""What all pictures share: an Axes to draw in, colours, and how a name is written.

Takes an Axes or none, and any value as a name. matplotlib is imported where a figure is made. Colours are Okabe and
Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sized
from typing import Any

from llmfit.exceptions import DataError, missing_package, parameter_error

__all__ = ["BLUE", "GREY", "ORANGE", "axes_of", "check_installed", "check_lengths", "named", "tidy"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
LONGEST_NAME = 24  # characters
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")  # Unicode's categories of characters that show nothing, or move others


def check_installed(what: str) -> None:
    """Raise where there is no matplotlib, which `what` needs."""
    try:
        import matplotlib.pyplot  # noqa: F401 - whatever draws needs it
    except ImportError:
        raise missing_package(what, "matplotlib", "plots") from None


def axes_of(ax: Any, size: tuple[float, float] = (6.4, 4.0)) -> Any:
    """Take the Axes to draw in, or make one in the figure that was given, or in a new one."""
    check_installed("llmfit.plots")
    import matplotlib.pyplot as plt

    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if hasattr(ax, "add_axes") and not ax.axes:
        ax.set_size_inches(*size)
        return ax.subplots()
    if not hasattr(ax, "transAxes"):
        raise parameter_error("ax", "llmfit.plots", "None, an Axes or an empty Figure of matplotlib", ax)
    return ax


def tidy(ax: Any) -> Any:
    """Take away the frame's upper and right line, and lay a thin grid behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    return ax


def named(value: Any, longest: int = LONGEST_NAME) -> str:
    """Write a name so that matplotlib shows it as it is, on one line: no formulas, nothing invisible."""
    text = " ".join(str(value).split())
    text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in HIDDEN else c for c in text)
    text = text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return text.replace("$", r"\$") or "(empty)"


def check_lengths(owner: str, truth: Sized, predicted: Sized) -> None:
    """Refuse answers that are not one a row."""
    if len(truth) != len(predicted):
        raise DataError(f"{owner} needs one answer per row. Got {len(predicted)} answers for {len(truth)} rows.")
