"""The tables of Ludwig's keys as Markdown: what docs/from-ludwig.md shows.

Takes nothing; gives text. A test compares the page with it.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from llmfit.config.ludwig import TABLES
from llmfit.config.ludwig.feature_rows import ENCODERS, INPUT_KINDS, OUTPUT_KINDS
from llmfit.config.ludwig.rows import REFUSED, Row
from llmfit.config.ludwig.search_rows import LOSS_OF, SCORINGS

__all__ = ["BEGIN", "END", "tables", "with_tables"]

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def with_tables(page: str) -> str:
    """Put the tables between a page's marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Write all tables, a section each."""
    sections = [_section(path) for path in TABLES]
    return "\n\n".join([*sections, _names()]) + "\n"


def _section(path: str) -> str:
    title = f"`{path}`" if path else "Top level"
    head = f"### {title}\n\n| key | Ludwig's default | here | what it becomes, or why not |\n|---|---|---|---|\n"
    return head + "\n".join(_line(list(alike)) for _, alike in groupby(TABLES[path].values(), lambda row: row[1:]))


def _line(alike: list[Row]) -> str:
    """Write one row of the table; keys of which the same is said, one after another, share it."""
    row = alike[0]
    keys = ", ".join(f"`{one.key}`" for one in alike)
    words = row.words.replace("|", "\\|")
    if row.verdict == REFUSED:
        passing = [value for value in row.neutral if value is not None]
        words += f" Let pass: {', '.join(map(_value, passing))}." if passing else ""
    default = "" if row.default is None else _value(row.default)
    return f"| {keys} | {default} | {row.verdict} | {words} |"


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _names() -> str:
    """Write the names that stand for something: encoders, types of features, metrics."""
    encoders = [
        f"| `{name}` | {f'`{model}`' if model else 'the model that it names'} |" for name, model in ENCODERS.items()
    ]
    kinds = []
    for name in dict.fromkeys([*INPUT_KINDS, *OUTPUT_KINDS]):
        read, answered = INPUT_KINDS.get(name) or "refused", OUTPUT_KINDS.get(name) or "refused"
        kinds.append(f"| `{name}` | {read} | {answered} |")
    losses = {f"loss ({of})": (scorer, "minimize", of) for of, scorer in LOSS_OF.items()}
    metrics = [
        f"| `{name.split()[0]}` | {of} | `{scorer}` | {goal} |"
        for name, (scorer, goal, of) in {**losses, **SCORINGS}.items()
    ]
    return "\n".join(
        [
            "### Names of encoders\n\n| encoder | base_model |\n|---|---|",
            *encoders,
            "\n### Types of features\n\n| type | as an input | as an output |\n|---|---|---|",
            *kinds,
            "\n### Metrics of a search\n\n| metric | of | scoring | goal |\n|---|---|---|---|",
            *metrics,
        ]
    )
