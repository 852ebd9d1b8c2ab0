"""Tests of the packaged data sets."""

import re
from importlib.resources import files

import pandas as pd
import pytest

from llmfit.datasets import load_book_reviews, load_support_faq

LOADERS = [load_book_reviews, load_support_faq]


def n_words(text: pd.Series) -> pd.Series:
    return text.str.split().str.len()


@pytest.mark.parametrize("load", LOADERS)
def test_no_missing_or_padded_text(load):
    data = load()
    assert not data.isna().any(axis=None)
    for column in data.columns.drop("score", errors="ignore"):
        assert pd.api.types.is_string_dtype(data[column])
        assert (data[column] != "").all()
        assert (data[column] == data[column].str.strip()).all()


@pytest.mark.parametrize("load", LOADERS)
def test_fresh_copy_each_call(load):
    first, original = load(), load()
    first.iloc[0, 0] = "changed"
    first["extra"] = 0
    pd.testing.assert_frame_equal(load(), original)


@pytest.mark.parametrize("load", LOADERS)
def test_return_X_y_is_keyword_only(load):
    with pytest.raises(TypeError):
        load(True)


@pytest.mark.parametrize("name", ["book_reviews.csv", "support_faq.csv"])
def test_file_is_utf8_with_unix_line_ends(name):
    raw = files("llmfit.datasets").joinpath(name).read_bytes()
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert not raw.decode("utf-8").isascii()


def test_book_reviews_shape_and_dtypes():
    data = load_book_reviews()
    assert data.shape == (240, 3)
    assert list(data.columns) == ["title", "review", "score"]
    assert data["score"].dtype == "int64"


def test_book_reviews_scores_are_balanced_and_mixed():
    data = load_book_reviews()
    assert data["score"].value_counts().to_dict() == dict.fromkeys([1, 2, 3, 4, 5], 48)
    assert set(data["score"].head(40)) == {1, 2, 3, 4, 5}


def test_book_reviews_titles_do_not_give_the_score():
    groups = load_book_reviews().groupby("title")["score"]
    assert groups.ngroups == 60
    assert groups.size().between(3, 5).all()
    assert (groups.nunique() == groups.size()).all()


def test_book_reviews_text():
    review = load_book_reviews()["review"]
    assert not review.str.casefold().duplicated().any()
    assert n_words(review).between(8, 45).all()
    leak = re.compile(r"\d|\bstars?\b|\bout of (five|ten)\b", re.IGNORECASE)
    assert not [text for text in review if leak.search(text)]


def test_book_reviews_exercise_real_text():
    data = load_book_reviews()
    text = " ".join(data["title"] + " " + data["review"])
    assert all(char in text for char in "\"',éñ—")


def test_book_reviews_return_X_y():
    data = load_book_reviews()
    X, y = load_book_reviews(return_X_y=True)
    pd.testing.assert_frame_equal(X, data[["title", "review"]])
    pd.testing.assert_series_equal(y, data["score"])


def test_support_faq_shape_and_topics():
    data = load_support_faq()
    assert data.shape == (100, 4)
    assert list(data.columns) == ["question", "answer", "topic", "paraphrase"]
    counts = data["topic"].value_counts()
    assert len(counts) == 8
    assert counts.between(10, 15).all()


def test_support_faq_text():
    data = load_support_faq()
    asked = pd.concat([data["question"], data["paraphrase"]]).str.casefold()
    assert not asked.duplicated().any()
    assert not data["answer"].str.casefold().duplicated().any()
    assert n_words(data["question"]).between(5, 15).all()
    assert n_words(data["answer"]).between(8, 30).all()


def test_support_faq_return_X_y():
    data = load_support_faq()
    X, y = load_support_faq(return_X_y=True)
    pd.testing.assert_frame_equal(X, data[["question"]])
    pd.testing.assert_series_equal(y, data["answer"])
