"""The house's plan, read from the imports: who may know whom, what stays in one file, how long things get."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

import llmfit

ROOT = Path(llmfit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A room imports rooms of lower tiers, and those that stand before it in its own tier.
TIERS = [
    ["exceptions", "datasets"],
    ["frames", "dates", "features", "templates", "params", "metrics", "ranking", "plots", "files"],
    ["persistence", "encoding", "batching"],
    [
        "kinds",
        "memory",
        "keeping",
        "selfcheck",
        "sources",
        "quantization",
        "embeddings",
        "base_model",
        "adapters",
        "heads",
    ],
    [
        "optim",
        "callbacks",
        "checkpoints",
        "packing",
        "forward",
        "answers",
        "objectives",
        "training",
        "together",
        "tries",
        "scoring",
        "pruning",
        "inference",
    ],
    ["bulk", "estimators"],
    ["search", "config", "report", "demo", "cli", "__main__"],
]
TIER = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}
PLACE = {room: place for rooms in TIERS for place, room in enumerate(rooms)}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Every module a file imports, inside functions too, but for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Name and length of every function, docstrings and signature aside."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found.append((f"{path.name}:{node.name}", body[-1].end_lineno - body[0].lineno + 1 if body else 0))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
class TestFile:
    def test_imports_only_what_lies_below(self, path: Path) -> None:
        room = room_of(path)
        if room == "__init__":
            return
        wrong = []
        for name in imports_of(path):
            if not name.startswith("llmfit."):
                continue
            other = name.split(".")[1]
            below = TIER[other] < TIER[room] or (TIER[other] == TIER[room] and PLACE[other] < PLACE[room])
            if other != room and not below:
                wrong.append(name)
        assert not wrong, f"{room} may not import {wrong}"

    def test_knows_only_the_libraries_of_its_tier(self, path: Path) -> None:
        room, libraries = room_of(path), {name.split(".")[0] for name in imports_of(path)}
        if room == "__init__":
            assert not libraries & {"torch", "transformers", "peft", "pandas"}
        elif TIER[room] <= 2:
            assert not libraries & {"torch", "transformers", "peft"}
        if room in TIER and TIER[room] in (2, 3, 4):
            assert "pandas" not in libraries
        if room != "adapters":
            assert "peft" not in libraries

    def test_is_short_and_says_what_it_is_for(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400
        assert ast.get_docstring(ast.parse(text))
        assert [f for f in functions_of(path) if f[1] > 60] == []

    def test_raises_errors_instead_of_asserting_or_printing(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in calls or room_of(path) in ("demo", "cli")


def test_every_room_has_a_place() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(TIER)


def test_models_are_loaded_in_one_tier() -> None:
    """base_model.py loads them; sources.py reads a GGUF file once, to convert it."""
    loading = {room_of(path) for path in FILES if ".from_pretrained(" in path.read_text(encoding="utf-8")}
    assert loading == {"base_model", "sources"}


def test_functions_are_small() -> None:
    lengths = sorted(length for path in FILES for _, length in functions_of(path))
    assert statistics.median(lengths) <= 9
    assert lengths[int(0.9 * len(lengths))] <= 30
