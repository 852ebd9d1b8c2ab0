"""Writes the tables of docs/from-ludwig.md and docs/config.schema.json anew; tests compare them with the code."""

from __future__ import annotations

import json
from pathlib import Path

from llmfit.config import json_schema
from llmfit.config.ludwig.page import with_tables

DOCS = Path(__file__).parent.parent.parent / "docs"

if __name__ == "__main__":
    page = DOCS / "from-ludwig.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    (DOCS / "config.schema.json").write_text(text + "\n", encoding="utf-8")
