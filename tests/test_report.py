"""The report: one page that needs nothing else, with what `evaluate` says, and whatever rows hold shown as text."""

from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from llmfit import LLMClassifier, LLMEstimator, LLMGenerator, LLMRegressor
from llmfit.estimators.answering import answered
from llmfit.exceptions import DataError, ParameterError
from llmfit.report import write_report
from llmfit.report.html import cell, number, shown, table
from llmfit.search import make_search

VOID = {"meta", "img", "br", "link"}
HOSTILE = [
    "<script>alert('x')</script>",
    "\"quotes\" & 'more' </td></table></main>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil reversed",
    "\u2066isolated for ever",
    "nul \x00 escape \x1b[31m",
    "word " * 300,
    "日本語 🎉 عربي",
]


class Page(HTMLParser):
    """Reads a page, and refuses one whose tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def hostile(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        text=HOSTILE,
        label=["<b>fruit</b>", "R&D \u202e $5 $6"] * 4,
        note=[None, np.nan, "", "a\nb", "c", "d", "e", "f"],
        size=[1.5, -2.25, 3.0, 1e-9, 0.0, 6.0, 7.0, 1e12],
    )


def classifier(settings: dict[str, Any], **own: Any) -> LLMClassifier:
    return LLMClassifier(**{"features": ["text", "size", "note"], "target": "label", **settings, **own})


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pictures(page: Page) -> list[str]:
    """Decode the pictures, each of which must be whole XML without a script or a link to elsewhere."""
    found = []
    for tag, name, value in page.attributes:
        if tag == "img" and name == "src":
            assert value.startswith("data:image/svg+xml;base64,")
            found.append(base64.b64decode(value.partition(",")[2]).decode())
    for picture in found:
        tree = ElementTree.fromstring(picture)
        assert not [node for node in tree.iter() if node.tag.endswith(("script", "foreignObject"))]
        links = [v for node in tree.iter() for k, v in node.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;")) for link in links)
    return found


def test_a_report_holds_what_rows_hold_as_text_alone(
    hostile: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    clf = classifier(settings).fit(hostile)
    path = write_report(clf, hostile, tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    page, source = read(path), path.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "form", "a", "base"} & set(page.tags)
    assert page.tags.count("main") == 1
    assert {name for _, name, _ in page.attributes if name.startswith("on") or name in ("href", "srcdoc")} == set()
    assert "default-src 'none'" in source
    for text in (
        "<script>alert('x')</script>",
        "\"quotes\" & 'more' </td></table></main>",
        "<img src=x onerror=alert(1)>",
    ):
        assert text in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", source)
    assert "\u27e8U+202E\u27e9evil" in page.text
    assert "nul \u2400 escape \u241b[31m" in page.text
    assert "1,500 characters" in page.text
    assert "word " * 100 not in page.text
    assert "日本語 🎉 عربي" in page.text
    assert "missing" in page.text
    assert len(pictures(page)) == 4
    assert any("&lt;b&gt;fruit" in picture for picture in pictures(page))
    assert "://" not in re.sub(r"base64,[^\"]*|<pre>.*?</pre>", "", source)


def test_a_report_says_what_evaluate_says(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    clf = classifier(settings, features="text").fit(frame)
    wanted = clf.evaluate(frame)
    del clf.evaluation_
    text = read(write_report(clf, frame, tmp_path / "r.html")).text
    for name, value in wanted.items():
        if isinstance(value, float):
            assert f"{name}{number(value)}" in re.sub(r"\s", "", text)
    assert clf.evaluation_ == {"rows": 8, **{k: v for k, v in wanted.items() if isinstance(v, float)}}
    assert "LLMClassifier: text to label" in text
    assert "Evaluated on 8 rows" in text
    assert "learning_rate0.01" in re.sub(r"\s", "", text)
    assert "trained parameters" in text


def test_the_worst_rows_come_first(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    clf = classifier(settings, features="text").fit(frame)
    proba = pd.DataFrame(clf.predict_proba(frame), index=frame.index, columns=clf.classes_)
    chance = pd.Series([proba.loc[row, label] for row, label in frame["label"].items()], index=frame.index)
    order = chance.sort_values().index.tolist()
    source = write_report(clf, frame, tmp_path / "r.html", n_worst=3).read_text(encoding="utf-8")
    rows = re.findall(r'data-name="row"><bdi>(.*?)</bdi>', source)
    assert rows == order[:3]
    losses = re.findall(r'data-name="loss \(nats\)">([\d.]+)<', source)
    assert [float(loss) for loss in losses] == pytest.approx((-np.log(chance[order[:3]])).tolist(), abs=1e-4)
    assert "Worst rows" not in read(write_report(clf, frame, tmp_path / "r.html", n_worst=0)).text


def test_a_label_that_no_fitted_row_had_costs_most(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    clf = classifier(settings, features="text").fit(frame)
    frame.loc["r5", "label"] = "mineral"
    with pytest.warns(UserWarning, match="fit never saw: 'mineral'"):
        source = write_report(clf, frame, tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r'data-name="row"><bdi>(.*?)</bdi>', source)[0] == "r5"
    assert '<td class="number" data-name="loss (nats)">∞</td>' in source


def regressor(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    return LLMRegressor(features="text", target="size", **settings | {"adapter": None}).fit(frame)


def generator(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    own = settings | {"generation": {"max_new_tokens": 4}}
    return LLMGenerator(features="text", target="label", **own).fit(frame)


def chooser(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    return LLMEstimator(features="text", target="label", **settings).fit(frame)


def zero_shot(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    return classifier(settings, features="text", adapter=None).fit(frame)


def several(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    own = settings | {"adapter": None, "head": "linear"}
    return LLMEstimator(features="text", target={"label": "category", "size": "number"}, **own).fit(frame)


def in_words(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    own = settings | {"generation": {"max_new_tokens": 4}}
    return LLMEstimator(features="text", target={"label": "category", "text2": "text"}, **own).fit(frame)


def sets(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    return classifier(settings, features="text", target="tags", adapter=None, head="linear").fit(frame)


def searched(frame: pd.DataFrame, settings: dict[str, Any]) -> Any:
    return make_search(classifier(settings, features="text"), {"adapter__r": [1, 2]}, cv=2).fit(frame)


# An estimator of each kind, words that its report has, and how many pictures.
KINDS: dict[str, tuple[Any, list[str], int]] = {
    "regressor": (regressor, ["r2", "mae", "Predicted and true size", "distance"], 3),
    "generator": (generator, ["exact_match", "perplexity", "1 - token F1"], 2),
    "chooser": (chooser, ["LLMEstimator: text to label", "accuracy"], 4),
    "zero-shot": (zero_shot, ["none: the base model answers as it is"], 3),
    "several": (several, ["text to label, size", "accuracy", "r2", "Predicted and true size"], 5),
    "several in words": (in_words, ["text to label, text2", "accuracy", "exact_match", "perplexity"], 4),
    "sets": (sets, ["subset_accuracy", "jaccard", "Each class"], 2),
    "search": (searched, ["Candidates", "adapter__r", "fit_seconds"], 5),
}


@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning", "ignore::llmfit.exceptions.DataWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_every_kind(kind: str, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    make, words, n_pictures = KINDS[kind]
    frame["text2"] = frame["text"].str.upper()
    frame["tags"] = [["a"], ["b"], ["a", "b"], []] * 2
    model = make(frame, settings)
    page = read(write_report(model, frame, tmp_path / "r.html"))
    for word in words:
        assert word in page.text
    assert len(pictures(page)) == n_pictures
    one = read(write_report(model, frame[:1], tmp_path / "r.html"))  # a row alone, of one class
    assert "Evaluated on 1 row;" in one.text


@pytest.mark.filterwarnings("ignore::llmfit.exceptions.TruncationWarning")
@pytest.mark.parametrize("make", [chooser, regressor, generator, several, sets], ids=lambda make: make.__name__)
def test_one_pass_says_what_evaluate_and_predict_say(make: Any, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    frame["tags"] = [["a"], ["b"], ["a", "b"], []] * 2
    model = make(frame, settings)
    rows, answers = answered(model, frame)
    assert list(rows.columns) == ["text"]
    predicted = model.predict(frame)
    measures = model.evaluate(frame)
    for one in answers:
        own = predicted[one.target] if isinstance(predicted, pd.DataFrame) else predicted
        assert list(map(str, map(tuple, own) if one.kind == "sets" else own)) == list(map(str, one.predicted))
        wanted = measures[one.target] if len(answers) > 1 else measures
        for name, value in wanted.items():
            if isinstance(value, float):
                assert one.measures[name] == pytest.approx(value, nan_ok=True), name
        assert one.costs()[1].shape == (8,)


def test_the_same_report_is_the_same_bytes(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    clf = classifier(settings, features="text").fit(frame)
    first, second = (write_report(clf, frame, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_y_and_metrics_go_to_evaluate(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    clf = classifier(settings, features="text").fit(frame)

    def n_wrong(y_true: Any, y_pred: Any) -> int:
        return int((y_true != y_pred).sum())

    path = write_report(clf, frame[["text"]], tmp_path / "r.html", y=frame["label"], metrics=[n_wrong])
    assert "n_wrong" in read(path).text


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"estimator": "clf"},
            ParameterError,
            "The 'estimator' parameter of write_report must be a fitted estimator of llmfit, or a fitted search "
            "over one. "
            "Got 'str' instead.",
        ),
        ({"path": 3}, ParameterError, "The 'path' parameter of write_report must be a str or a path. Got 3 instead."),
        ({"path": "."}, ParameterError, "The 'path' parameter of write_report must be a file. '.' is a folder."),
        (
            {"n_worst": -1},
            ParameterError,
            "The 'n_worst' parameter of write_report must be an int >= 0. Got -1 instead.",
        ),
    ],
    ids=["estimator", "path", "folder", "n_worst"],
)
def test_what_cannot_be_reported_is_refused_in_a_sentence(
    arguments: dict[str, Any], error: Any, sentence: str, tmp_path: Path
) -> None:
    given = {"estimator": LLMClassifier(), "X": pd.DataFrame({"a": [1]}), "path": tmp_path / "r.html", **arguments}
    with pytest.raises(error) as caught:
        write_report(**given)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.pyplot"])
def test_without_matplotlib_no_row_is_answered(
    missing: str, frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zero_shot(frame, settings)
    monkeypatch.setattr(LLMClassifier, "_respond", lambda *_: pytest.fail("rows were answered"))
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ParameterError) as caught:
        write_report(model, frame, tmp_path / "r.html")
    assert str(caught.value) == "write_report needs matplotlib. Install it with: pip install 'llmfit[plots]'."
    assert not (tmp_path / "r.html").exists()


def test_columns_of_the_rows_take_no_place_of_others(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    own = ["row (column)", "row", "true", "true (column)"]
    rows = frame.assign(**{name: f"its {name}" for name in own})
    model = classifier(settings, features=["text", *own], adapter=None).fit(rows)
    page = read(write_report(model, rows, tmp_path / "r.html"))
    names = [value for tag, name, value in page.attributes if (tag, name) == ("td", "data-name")]
    for name in ["row (column)", "row (column) (column)", "true (column)", "true (column) (column)"]:
        assert name in names
    for name in own:
        assert f"its {name}" in page.text


def test_a_place_that_cannot_be_written_is_named(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^'.*r.html' cannot be written: "):
        write_report(zero_shot(frame, settings), frame, tmp_path / "file" / "r.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1234567"),
        (-3, "\u22123"),
        (0.1 + 0.2, "0.3"),
        (-1234.5, "\u22121234.5"),
        (float("nan"), '<em class="none">missing</em>'),
        (float("-inf"), "\u2212\u221e"),
        (None, '<em class="none">missing</em>'),
        ("  ", '<em class="none">empty</em>'),
        (True, "<bdi>True</bdi>"),
        (np.int64(4), "4"),
        (["a", "<b>"], "<bdi>a, &lt;b&gt;</bdi>"),
        ([], '<em class="none">none</em>'),
        (pd.Timestamp("2024-05-01"), "<bdi>2024-05-01 00:00:00</bdi>"),
        ("\ud800", "<bdi>\ufffd</bdi>"),
    ],
    ids=repr,
)
def test_cells_are_written_by_what_they_are(value: Any, text: str) -> None:
    assert cell(value) == text


def test_columns_of_numbers_stand_one_under_the_other() -> None:
    source = table({"n": [1.5, -0.25, 30.0], "small": [1e-5, 0.5, 1.0], "mixed": [1, "a", 2]})
    cells = re.findall(r"<td(.*?)>(.*?)</td>", source)
    assert [text for own, text in cells if '"n"' in own] == ["1.50", "\u22120.25", "30.00"]
    assert [text for own, text in cells if "small" in own] == ["1e\u221205", "0.5", "1"]
    assert all(("number" in own) == ("mixed" not in own) for own, _ in cells)


def test_long_texts_are_cut_and_say_so() -> None:
    text = shown("<" * 1000)
    assert text.count("&lt;") == 400
    assert "1,000 characters" in text
