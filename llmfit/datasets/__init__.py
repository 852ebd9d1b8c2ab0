"""Small text data sets that ship with llmfit, for demos, documentation and tests.

Two tables are packaged as UTF-8 CSV files beside this module:

``book_reviews.csv``
    240 short reviews of 60 invented books, 48 for each score from 1 (hated it) to 5 (loved it).
    A book has three to five reviews, each with a different score, so the title does not give
    the score away. For classification and regression.

``support_faq.csv``
    100 questions and answers from the help desk of Fernwood, an invented online shop for house
    plants, on eight topics, each with a second wording of the question. The answers are concrete
    facts of the shop (prices, days, steps), so a model can hardly give them without having
    learned them. For text generation.

The loaders read no network and no cache: each call parses the packaged file and returns a fresh
object, which the caller may change freely. There are no missing values; row order is fixed.

The people, books, shop, addresses and facts in the tables are fictional. All text was written for
this project and is covered by the licence of the package, Apache-2.0.
"""

from importlib.resources import files
from typing import Literal, overload

import pandas as pd

__all__ = ["load_book_reviews", "load_support_faq"]


def _read(name: str) -> pd.DataFrame:
    """Parse a packaged CSV file."""
    with files(__package__).joinpath(name).open("rb") as handle:
        return pd.read_csv(handle, encoding="utf-8", keep_default_na=False)


@overload
def load_book_reviews(*, return_X_y: Literal[False] = False) -> pd.DataFrame: ...
@overload
def load_book_reviews(*, return_X_y: Literal[True]) -> tuple[pd.DataFrame, pd.Series]: ...
@overload
def load_book_reviews(*, return_X_y: bool) -> pd.DataFrame | tuple[pd.DataFrame, pd.Series]: ...
def load_book_reviews(*, return_X_y: bool = False) -> pd.DataFrame | tuple[pd.DataFrame, pd.Series]:
    """Load the book reviews: predict a score from 1 to 5 from a title and a review.

    The reviews have 8 to 45 words; the classes are balanced, and the rows are shuffled.

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return ``(X, y)`` instead of a single table.

    Returns
    -------
    data : pandas.DataFrame of shape (240, 3)
        Columns ``title`` and ``review`` (text) and ``score`` (int64, 1 to 5). Text columns have
        the dtype that :func:`pandas.read_csv` gives to text: ``str`` in pandas 3, ``object``
        before.
    (X, y) : tuple of pandas.DataFrame of shape (240, 2) and pandas.Series of shape (240,)
        Only if `return_X_y` is True: ``X`` holds ``title`` and ``review``, ``y`` holds ``score``.

    Examples
    --------
    >>> from llmfit.datasets import load_book_reviews
    >>> data = load_book_reviews()
    >>> data.shape
    (240, 3)
    >>> data["score"].value_counts().sort_index().to_dict()
    {1: 48, 2: 48, 3: 48, 4: 48, 5: 48}
    >>> X, y = load_book_reviews(return_X_y=True)
    >>> list(X.columns), y.name
    (['title', 'review'], 'score')
    """
    data = _read("book_reviews.csv").astype({"score": "int64"})
    if return_X_y:
        return data[["title", "review"]].copy(), data["score"].copy()
    return data


@overload
def load_support_faq(*, return_X_y: Literal[False] = False) -> pd.DataFrame: ...
@overload
def load_support_faq(*, return_X_y: Literal[True]) -> tuple[pd.DataFrame, pd.Series]: ...
@overload
def load_support_faq(*, return_X_y: bool) -> pd.DataFrame | tuple[pd.DataFrame, pd.Series]: ...
def load_support_faq(*, return_X_y: bool = False) -> pd.DataFrame | tuple[pd.DataFrame, pd.Series]:
    """Load the help desk FAQ: generate the answer to a question.

    Questions have 5 to 15 words and answers 8 to 30. ``paraphrase`` asks the same thing as
    ``question`` in other words, so it can test whether a model fitted on the questions still
    finds the answer. Rows are grouped by topic.

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return ``(X, y)`` instead of a single table.

    Returns
    -------
    data : pandas.DataFrame of shape (100, 4)
        Columns ``question``, ``answer``, ``topic`` (one of eight) and ``paraphrase``, all text,
        with the dtype that :func:`pandas.read_csv` gives to text: ``str`` in pandas 3,
        ``object`` before.
    (X, y) : tuple of pandas.DataFrame of shape (100, 1) and pandas.Series of shape (100,)
        Only if `return_X_y` is True: ``X`` holds ``question``, ``y`` holds ``answer``.

    Examples
    --------
    >>> from llmfit.datasets import load_support_faq
    >>> data = load_support_faq()
    >>> data.shape
    (100, 4)
    >>> sorted(data["topic"].unique())[:4]
    ['account', 'delivery', 'gift cards', 'payment']
    >>> X, y = load_support_faq(return_X_y=True)
    >>> list(X.columns), y.name
    (['question'], 'answer')
    """
    data = _read("support_faq.csv")
    if return_X_y:
        return data[["question"]].copy(), data["answer"].copy()
    return data
