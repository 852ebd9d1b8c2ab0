"""Every notebook in examples/ runs from top to bottom, is stored clean, and shows what it says."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest

import llmfit.datasets

mpl.use("Agg")  # before pyplot: no window is opened
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#:]+)[^):]*\)")
CELL_KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"},
}


def read(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))


def sources(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == kind]


# As it is stored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
class TestStored:
    def test_it_is_of_format_4_and_written_as_jupyter_writes_it(self, name: str) -> None:
        notebook, text = read(name), (EXAMPLES / name).read_text(encoding="utf-8")
        assert text == json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"] == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        for cell in notebook["cells"]:
            assert set(cell) == CELL_KEYS[cell["cell_type"]]
            assert cell["metadata"] == {}
            assert all(line.endswith("\n") for line in cell["source"][:-1])
            assert not cell["source"][-1].endswith("\n")

    def test_it_holds_no_outputs_and_is_small(self, name: str) -> None:
        code = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
        assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
        assert (EXAMPLES / name).stat().st_size < 10_000

    def test_its_cells_have_names_of_their_own(self, name: str) -> None:
        ids = [cell["id"] for cell in read(name)["cells"]]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch(r"[a-z][a-z-]{0,63}", own) for own in ids)

    def test_it_is_told_in_short_pieces(self, name: str) -> None:
        told = sources(name, "markdown")
        assert told[0].startswith("# ")
        assert all(len(text.split()) <= 60 for text in told)
        assert all(len(code.splitlines()) <= 25 for code in sources(name, "code"))

    def test_its_links_lead_somewhere(self, name: str) -> None:
        for link in LINK.findall("\n".join(sources(name, "markdown"))):
            assert (EXAMPLES / link).exists(), link


# As it runs -----------------------------------------------------------------------------------------


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packaged tables be short in both directions: what is tested is that the cells run."""
    reviews, faq = llmfit.datasets.load_book_reviews()[:110], llmfit.datasets.load_support_faq()[:8]
    reviews = reviews.assign(review=reviews["review"].str[:24])
    faq = faq.assign(answer=faq["answer"].str[:24])
    monkeypatch.setattr(llmfit.datasets, "load_book_reviews", lambda: reviews)
    monkeypatch.setattr(llmfit.datasets, "load_support_faq", lambda: faq)


def run_cell(code: str, name: str, namespace: dict[str, Any]) -> list[Any]:
    """Run a cell as a notebook does: show its last expression; draw the figures that it leaves open, and close them."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        assert repr(value)
        getattr(value, "_repr_html_", lambda: None)()
    figures = [plt.figure(number) for number in plt.get_fignums()]
    for figure in figures:
        figure.canvas.draw()
        assert all(ax.has_data() for ax in figure.axes)
    plt.close("all")
    return figures


def shares(values: pd.Series) -> bool:
    return bool(values.between(0, 1).all())


def quick_start(namespace: dict[str, Any]) -> None:
    answers = namespace["answers"]
    assert answers.filter(like="p(").sum(axis=1).between(0.97, 1.03).all()  # rounded
    assert set(namespace["measures"]) >= {"accuracy", "f1_macro", "mean_distance", "per_class"}
    assert (len(namespace["train"]), len(answers)) == (60, 50)


def faq_assistant(namespace: dict[str, Any]) -> None:
    compared = namespace["compared"]
    assert list(compared.index) == ["untrained", "learned", "looked up"]
    assert shares(compared["token_f1"])
    assert compared.loc["learned", "perplexity"] < compared.loc["untrained", "perplexity"]
    assert namespace["untrained"].trainable_parameters_ == 0 == namespace["library"].trainable_parameters_


def grid_search(namespace: dict[str, Any]) -> None:
    search, halving = namespace["search"], namespace["halving"]
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.adapter["r"] == search.best_params_["adapter__r"]
    assert halving.n_iterations_ == 2  # of many on few rows and few on many
    assert halving.n_candidates_[0] > halving.n_candidates_[1]


def ways(namespace: dict[str, Any]) -> None:
    compared, zero_shot = namespace["compared"], namespace["ways"]["zero-shot"]
    assert list(compared.index) == list(namespace["ways"])
    assert shares(compared["accuracy"])
    assert compared["log_loss"].nunique() == 4  # what stands before a prompt, and what was learned, matters
    assert zero_shot.trainable_parameters_ == 0 < namespace["ways"]["fine-tuned"].trainable_parameters_


# Figures that a notebook draws, and what holds of its names when it is through.
STORIES: dict[str, tuple[int, Callable[[dict[str, Any]], None]]] = {
    "00_quick_start.ipynb": (3, quick_start),
    "04_faq_assistant.ipynb": (2, faq_assistant),
    "05_grid_search.ipynb": (3, grid_search),
    "06_zero_few_fine_tuned.ipynb": (3, ways),
}


def test_every_notebook_has_a_story() -> None:
    assert sorted(STORIES) == NOTEBOOKS


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")  # a random model does not end its answers
def test_it_runs(name: str, smollm2_is_tiny: None, few_rows: None) -> None:
    figures, holds = STORIES[name]
    plt.close("all")  # what was left open elsewhere
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with pd.option_context("display.max_colwidth", None), mpl.rc_context():
        drawn = [figure for code in sources(name, "code") for figure in run_cell(code, name, namespace)]
    assert len(drawn) == figures
    holds(namespace)
