"""Pictures: the numbers that are drawn, names that are awkward, one row, many classes, nothing to draw."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")  # before pyplot: no window is opened

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay
from sklearn.model_selection import GridSearchCV
from sklearn.tree import DecisionTreeClassifier

from llmfit import LLMClassifier, LLMRegressor, plots
from llmfit.exceptions import DataError, ParameterError
from llmfit.ranking import results

AWKWARD = ["$5 and $10", "x_1^2", "a very long name of a class that goes on", "\u202eevil", "two\nlines", "", "\\alpha"]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def history(n: int, *, validated: bool = False) -> pd.DataFrame:
    frame = pd.DataFrame({"step": range(1, n + 1), "epoch": 1, "loss": np.linspace(2, 1, n), "validation_loss": np.nan})
    if validated:
        frame.loc[n - 1, "validation_loss"] = 1.5
    return frame


def search(n: int = 3) -> Any:
    X = np.arange(60.0).reshape(30, 2)
    grid = {"max_depth": list(range(1, n + 1)), "criterion": ["gini"]}
    return GridSearchCV(DecisionTreeClassifier(random_state=0), grid, cv=3).fit(X, np.arange(30) % 2)


# What is drawn, from as little as there can be to a lot: each makes a picture that can be written without a warning.
PICTURES: dict[str, Any] = {
    "learning curve": lambda ax: plots.learning_curve(history(3), ax=ax),
    "learning curve, long": lambda ax: plots.learning_curve(history(300, validated=True), ax=ax),
    "learning curve, one step": lambda ax: plots.learning_curve(history(1), ax=ax),
    "confusion": lambda ax: plots.confusion_matrix(list("aabb"), list("abbb"), ax=ax),
    "confusion, shares": lambda ax: plots.confusion_matrix(list("aabb"), list("abbb"), normalize="true", ax=ax),
    "confusion, one class": lambda ax: plots.confusion_matrix(["a"], ["a"], ax=ax),
    "confusion, 60 classes": lambda ax: plots.confusion_matrix(range(60), range(60), ax=ax),
    "confusion, awkward": lambda ax: plots.confusion_matrix(AWKWARD, AWKWARD, ax=ax),
    "reliability": lambda ax: plots.reliability(list("abb"), [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], ax=ax),
    "reliability, one row": lambda ax: plots.reliability(["a"], [[0.9, 0.1]], classes=["a", "b"], ax=ax),
    "reliability, awkward": lambda ax: plots.reliability(["$a$"], [[0.9, 0.1]], classes=["$5 to $9", "$a$"], ax=ax),
    "numbers": lambda ax: plots.predicted_against_true([1.0, 2.0, 3.0], [1.5, 2.0, np.nan], unit="$", ax=ax),
    "numbers, one row": lambda ax: plots.predicted_against_true([1.0], [1.0], ax=ax),
    "numbers, none": lambda ax: plots.predicted_against_true([1.0], [np.nan], ax=ax),
    "tokens": lambda ax: plots.token_lengths([3, 9, 400], max_length=200, ax=ax),
    "tokens, one row": lambda ax: plots.token_lengths([3], ax=ax),
    "search": lambda ax: plots.search_results(search(), ax=ax),
    "search, one candidate": lambda ax: plots.search_results(search(1), ax=ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_where_it_is_wanted_and_can_be_written(name: str) -> None:
    figure, own = Figure(), plt.subplots()[1]
    for given in (None, own, figure):
        drawn = PICTURES[name](given)
        ax = getattr(drawn, "ax_", drawn)
        assert given is not own or ax is own
        assert given is not figure or ax.figure is figure
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ax.figure.savefig(io.BytesIO(), format="png", dpi=40)
        assert ax.get_xlabel()
        assert ax.get_ylabel() or "search" in name


@pytest.mark.parametrize("name", ["confusion, awkward", "reliability, awkward"])
def test_names_are_shown_as_they_are(name: str) -> None:
    drawn = PICTURES[name](None)
    ax = drawn.ax_
    ax.figure.savefig(io.BytesIO(), format="png", dpi=40)
    if name.startswith("confusion"):
        shown = [text.get_text() for text in ax.get_yticklabels()]
        wanted = {"(empty)", "\\alpha", "two lines", "x_1^2", "\ufffdevil", "a very long name of a c\u2026"}
        assert wanted | {r"\$5 and \$10"} == set(shown)  # an escaped dollar is a dollar, and begins no formula
    else:
        assert ax.get_xlabel() == r"probability of \$a\$"
    assert not any(mpl.cbook.is_math_text(text.get_text()) for text in ax.findobj(mpl.text.Text))


def test_learning_curve_shows_every_step_and_the_epoch_that_is_kept(
    frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    own = settings | {"epochs": 3, "batch_size": 2, "validation_fraction": 0.25, "early_stopping": 3}
    clf = LLMClassifier(target="label", features="text", **own).fit(frame)
    ax = plots.learning_curve(clf)
    train, validation, best = ax.lines
    assert train.get_ydata().tolist() == clf.history_["loss"].tolist()
    held = clf.history_["validation_loss"].dropna()
    assert validation.get_ydata().tolist() == held.tolist()
    assert best.get_xdata()[0] == clf.history_.loc[clf.history_["epoch"] == clf.best_epoch_, "step"].max()
    assert ax.get_ylabel() == "loss (nats per token)"
    assert plots.learning_curve(clf.history_).get_ylabel() == "loss"


@pytest.mark.parametrize(
    ("cls", "target", "label"),
    [
        (LLMClassifier, "label", "loss (nats per row)"),
        (LLMRegressor, "size", "loss (squared error / variance)"),
    ],
)
def test_the_loss_of_a_head_is_named(
    cls: Any, target: str, label: str, frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    model = cls(target=target, features="text", **settings | {"adapter": None, "head": "linear"}).fit(frame)
    assert plots.learning_curve(model).get_ylabel() == label


def test_confusion_matrix_counts_and_divides() -> None:
    true, answered = ["b", "a", "a", "a"], ["a", "a", "b", "a"]
    display = plots.confusion_matrix(true, answered)
    assert isinstance(display, ConfusionMatrixDisplay)
    assert display.confusion_matrix.tolist() == [[2, 1], [1, 0]]
    for normalize, wanted in (("true", [[2 / 3, 1 / 3], [1, 0]]), ("pred", [[2 / 3, 1], [1 / 3, 0]])):
        shares = plots.confusion_matrix(true, answered, normalize=normalize).confusion_matrix
        assert shares == pytest.approx(np.array(wanted))
    assert plots.confusion_matrix(true, answered, normalize="all").confusion_matrix.sum() == 1
    counts = pd.DataFrame([[5, 0], [1, 2]], index=["no", "yes"], columns=["no", "yes"])
    display = plots.confusion_matrix(counts)
    assert display.confusion_matrix.tolist() == [[5, 0], [1, 2]]
    assert [t.get_text() for t in display.ax_.get_xticklabels()] == ["no", "yes"]
    assert plots.confusion_matrix([1, "a"], ["a", 1], labels=["a", 1, 7]).confusion_matrix.shape == (3, 3)


def test_names_of_many_classes_do_not_overlap() -> None:
    ax = plots.confusion_matrix([f"class {i}" for i in range(90)], [f"class {i}" for i in range(90)]).ax_
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
    assert len(boxes) == 30
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize("k", [2, 5, 12])
def test_counts_can_be_read_on_their_ground(k: int) -> None:
    for counts in (np.eye(k, dtype=int) * 9, np.ones((k, k), dtype=int), np.arange(k * k).reshape(k, k)):
        display = plots.confusion_matrix(pd.DataFrame(counts, index=range(k), columns=range(k)))
        for i, j in np.ndindex(k, k):
            ground = np.array(display.im_.cmap(display.im_.norm(counts[i, j])))[:3]
            ink = np.array(mpl.colors.to_rgb(display.text_[i, j].get_color()))
            assert abs(ground.mean() - ink.mean()) > 0.25


def test_reliability_of_two_classes_and_of_more() -> None:
    proba = np.array([[0.95, 0.05], [0.9, 0.1], [0.1, 0.9], [0.05, 0.95]])
    display = plots.reliability(["no", "yes", "yes", "yes"], proba, classes=["no", "yes"], n_bins=2)
    assert isinstance(display, CalibrationDisplay)
    assert display.prob_true.tolist() == [0.5, 1.0]
    assert display.prob_pred == pytest.approx([0.075, 0.925])
    three = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
    display = plots.reliability(["a", "c", "b"], three, classes=["a", "b", "c"], n_bins=5)
    assert display.prob_true.tolist() == [0.5, 0.0] or display.prob_true.tolist() == [0.5, 0.0][::-1]
    assert display.ax_.get_xlabel() == "probability of the answer"
    assert plots.reliability(["x"], [[1 + 1e-9, 0.0]], classes=["a", "b"]).prob_true.tolist() == [0.0]


def test_numbers_are_predicted_across_and_true_upwards() -> None:
    display = plots.predicted_against_true([1.0, 2.0, 3.0], [10.0, np.nan, 30.0], unit="EUR")
    assert isinstance(display, PredictionErrorDisplay)
    assert display.ax_.collections[0].get_offsets().tolist() == [[10.0, 1.0], [30.0, 3.0]]
    assert display.ax_.get_xlabel() == "predicted (EUR)"
    assert display.ax_.get_ylabel() == "true (EUR)"
    assert display.ax_.get_title() == "1 row is not shown: its answer is no number"


def test_token_lengths_are_those_of_the_preview(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    clf = LLMClassifier(target="label", features="text", max_length=128, **settings)
    seen = clf.preview(frame, 8)
    lengths = seen["prompt_tokens"] + seen["completion_tokens"]
    for model in (clf, clf.fit(frame)):
        ax = plots.token_lengths(model, frame)
        assert sum(bar.get_height() for bar in ax.patches) == 8
        occupied = [bar.get_x() for bar in ax.patches if bar.get_height()]
        assert min(occupied) + 0.5 <= lengths.min() < max(occupied) + 1 + 0.5 == lengths.max() + 1
        assert ax.lines[0].get_xdata()[0] == 128
        assert ax.get_title() == f"longest {lengths.max()} of max_length 128 tokens"


def test_rows_that_are_too_long_are_counted_before_and_after_a_fit(
    frame: pd.DataFrame, settings: dict[str, Any]
) -> None:
    frame.loc["r2", "text"] = "long " * 40
    clf = LLMClassifier(target="label", features="text", max_length=128, **settings)
    assert plots.token_lengths(clf, frame).get_title() == "1 of 8 rows have more than 128 tokens"
    with pytest.warns(UserWarning, match="cut"):
        clf.set_params(truncation="prompt").fit(frame)
    with pytest.warns(UserWarning, match="cut"):
        assert plots.token_lengths(clf, frame).get_title() == "1 of 8 rows are cut"


def test_search_results_are_drawn_in_their_order() -> None:
    fitted = search(4)
    ax = plots.search_results(fitted, 3)
    found = results(fitted)
    assert ax.lines[0].get_xdata().tolist() == found["score"].head(3).tolist()
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"max_depth={d}" for d in found["max_depth"].head(3)]
    assert ax.get_title() == "3 of 4 candidates"


def test_long_names_of_candidates_go_on_over_several_lines() -> None:
    X = np.arange(60.0).reshape(30, 2)
    weights = [{0: 1.0, 1: 1.25}, {0: 1.0, 1: 1.5}]
    grid = {"max_depth": [1, 2], "min_weight_fraction_leaf": [0.125, 0.25], "class_weight": weights}
    fitted = GridSearchCV(DecisionTreeClassifier(random_state=0), grid, cv=3).fit(X, np.arange(30) % 2)
    texts = [text.get_text() for text in plots.search_results(fitted).get_yticklabels()]
    assert len(set(texts)) == 8
    whole = [" ".join(text.split()) for text in texts]
    assert all("class_weight={0: 1.0, 1: 1." in text and "\N{HORIZONTAL ELLIPSIS}" not in text for text in whole)
    assert max(len(line) for text in texts for line in text.split("\n")) <= 60


@pytest.mark.parametrize(
    ("draw", "error", "sentence"),
    [
        (
            lambda: plots.learning_curve(history(0)),
            DataError,
            "learning_curve has nothing to draw: no step was trained.",
        ),
        (
            lambda: plots.learning_curve(3),
            ParameterError,
            "The 'fitted' parameter of learning_curve must be a fitted estimator or its history_. Got 3 instead.",
        ),
        (lambda: plots.confusion_matrix([], []), DataError, "confusion_matrix has nothing to draw: there is no row."),
        (
            lambda: plots.confusion_matrix(["a"], ["a", "b"]),
            DataError,
            "confusion_matrix needs one answer per row. Got 2 answers for 1 rows.",
        ),
        (
            lambda: plots.confusion_matrix(["a"], ["b"], labels=["a"]),
            ParameterError,
            "The 'labels' parameter of confusion_matrix lacks 'b', which rows have.",
        ),
        (
            lambda: plots.confusion_matrix(["a"]),
            ParameterError,
            "confusion_matrix needs true and predicted labels, or a square DataFrame of counts.",
        ),
        (
            lambda: plots.confusion_matrix(["a"], ["a"], normalize="rows"),
            ParameterError,
            "The 'normalize' parameter of confusion_matrix must be one of None, 'true', 'pred', 'all'. Got 'rows' "
            "instead.",
        ),
        (
            lambda: plots.reliability([], np.empty((0, 0))),
            DataError,
            "reliability has nothing to draw: there is no row.",
        ),
        (
            lambda: plots.reliability(["a"], [0.5]),
            DataError,
            "reliability: proba must have the shape (1, 1). Got (1,) instead.",
        ),
        (
            lambda: plots.predicted_against_true([1.0], []),
            DataError,
            "predicted_against_true needs one answer per row. Got 0 answers for 1 rows.",
        ),
        (lambda: plots.token_lengths([]), DataError, "token_lengths has nothing to draw: there is no row."),
        (
            lambda: plots.search_results(GridSearchCV(DecisionTreeClassifier(), {})),
            ParameterError,
            "results needs a search that is fitted. Got GridSearchCV instead.",
        ),
        (
            lambda: plots.token_lengths([1], ax=3),
            ParameterError,
            "The 'ax' parameter of llmfit.plots must be None, an Axes or an empty Figure of matplotlib. Got 3 instead.",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(draw: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error) as caught:
        draw()
    assert str(caught.value) == sentence


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ParameterError) as caught:
        plots.token_lengths([1])
    assert str(caught.value) == "llmfit.plots needs matplotlib. Install it with: pip install 'llmfit[plots]'."
