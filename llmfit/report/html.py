"""From values to HTML that shows them as text, and from sections to a page that needs nothing else.

Takes plain values, frames and pictures that are drawn by a function; gives HTML. Knows no estimator. Every text that
is not this package's own passes :func:`shown`.
"""

from __future__ import annotations

import base64
import html
import io
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmfit

__all__ = ["cell", "facts", "figure", "number", "page", "shown", "table"]

MINUS = "\u2212"
LONGEST = 400  # characters of a cell that are shown
# What would end a text early, turn it round or hide it: shown by its code point in place of itself.
ODD = {
    code: f"\u27e8U+{code:04X}\u27e9"
    for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
ODD |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
ODD |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "\ufffd")


def shown(value: Any, longest: int = LONGEST) -> str:
    """Write any value as text in HTML: nothing in it is markup, and none of it moves what stands beside it."""
    text = str(value)
    tail = f'<span class="more"> \u2026 {len(text):,} characters</span>' if len(text) > longest else ""
    return f"<bdi>{html.escape(text[:longest].translate(ODD))}</bdi>{tail}"


def cell(value: Any) -> str:
    """Write a value of a frame: numbers to six digits, what is missing or empty as such."""
    if isinstance(value, list | tuple | set | np.ndarray):
        return shown(", ".join(map(str, value))) if len(value) else '<em class="none">none</em>'
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return '<em class="none">missing</em>'
    if _is_number(value):
        return str(value).replace("-", MINUS) if isinstance(value, numbers.Integral) else number(float(value), 6)
    return shown(value) if str(value).strip() else '<em class="none">empty</em>'


def number(value: float, digits: int = 4) -> str:
    """Write a number to some digits, with a true minus."""
    return f"{value:.{digits}g}".replace("inf", "\u221e").replace("-", MINUS)


def table(columns: Mapping[str, Iterable[Any]], *, kind: str = "") -> str:
    """Write columns as a table; those of numbers are aligned at their right.

    Parameters
    ----------
    columns : dict of str to values
    kind : str
        A class for the style sheet: "rows" stands one under the other where the page is narrow.
    """
    listed = {name: list(values) for name, values in columns.items()}
    cells = {name: _column(values) for name, values in listed.items()}
    sides = {
        name: ' class="number"' if values and all(map(_is_number, values)) else "" for name, values in listed.items()
    }
    names = {name: html.escape(name[:60].translate(ODD)) for name in listed}
    head = "".join(f'<th scope="col"{sides[name]}>{shown(name, 60)}</th>' for name in listed)
    body = ""
    for row in zip(*cells.values(), strict=True):
        tds = (f'<td{sides[n]} data-name="{names[n]}">{text}</td>' for n, text in zip(cells, row, strict=True))
        body += f"<tr>{''.join(tds)}</tr>\n"
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'
    )


def _column(values: list[Any]) -> list[str]:
    """Write the cells of a column; fractions with the same number of digits, as many as are needed up to four."""
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if len(floats) < 2 or not all(map(_is_number, values)) or any(0 < abs(f) < 0.01 or abs(f) >= 1e6 for f in floats):
        return list(map(cell, values))
    digits = max(len(f"{f:.4f}".rstrip("0").partition(".")[2]) for f in floats)
    return [
        ("" if value >= 0 else MINUS) + f"{abs(value):.{digits}f}" if math.isfinite(value) else cell(value)
        for value in values
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def facts(known: Mapping[str, Any]) -> str:
    """Write names and values as a list of two columns."""
    rows = "".join(f"<div><dt>{shown(name)}</dt><dd>{cell(value)}</dd></div>\n" for name, value in known.items())
    return f'<dl class="facts">\n{rows}</dl>'


def figure(draw: Callable[[Any], Any], title: str) -> str:
    """Draw a picture and put it in the page.

    Parameters
    ----------
    draw : callable (Figure) -> any
    title : str
        Plain text: the caption, and what is read out in place of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn, buffer = Figure(layout="constrained"), io.BytesIO()
    # Text stays text, in whatever fonts the reader has, and the same values give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmfit", "font.size": 10}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        draw(drawn)
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    image = base64.b64encode(buffer.getvalue()).decode()
    width = int(drawn.get_figwidth() * 96)
    return (
        f'<figure><img alt="{html.escape(title)}" width="{width}" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def page(title: str, head: str, sections: Iterable[str]) -> str:
    """Put a heading and sections into a page; `title` is text, the others are HTML."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="llmfit {llmfit.__version__}">
<title>{html.escape(title.translate(ODD))}</title>
<style>
{style}</style>
</head>
<body>
<main>
{head}
{chr(10).join(sections)}
</main>
<footer>Written by llmfit {llmfit.__version__}.</footer>
</body>
</html>
"""
