"""One page that tells how good a fitted model is: measures, pictures, the worst rows, the model and its settings.

Takes a fitted estimator, or a fitted search over one, and rows with their target; writes one HTML file that needs
nothing else: pictures are inside, there is no script and no link, and whatever the rows hold is shown as text.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from sklearn.utils.validation import check_is_fitted

from llmfit.estimators.answering import answered
from llmfit.estimators.base import BaseLLM
from llmfit.exceptions import DataError, ParameterError, check_int, parameter_error, reason
from llmfit.plots.drawing import check_installed
from llmfit.report.html import page
from llmfit.report.sections import answer_section, fit_section, heading, search_section

__all__ = ["write_report"]


def write_report(estimator: Any, X: Any, path: Any, *, y: Any = None, metrics: Any = (), n_worst: int = 10) -> Path:
    """Evaluate a fitted model on rows, and write what was found as one HTML page.

    Parameters
    ----------
    estimator : LLMClassifier, LLMRegressor, LLMGenerator, LLMEstimator, or a search over one
        A fitted one.
    X : as for its `evaluate`
        ``n_rows`` rows that it did not learn from.
    path : str or path
        The file; one that is there is replaced as a whole.
    y : array-like of shape (n_rows,), default=None
        The target, where it is no column of `X`.
    metrics : as for its `evaluate`, default=()
        More measures.
    n_worst : int, default=10
        Rows to show whose answers cost most.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    ParameterError
        If it is no estimator of llmfit, or matplotlib is not installed (``pip install 'llmfit[plots]'``).
    DataError
        If the rows cannot be evaluated, or the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> from llmfit.report import write_report
    >>> reviews = load_book_reviews()
    >>> model = LLMClassifier(target="score", epochs=1, random_state=0, verbose=0).fit(reviews[:40])
    >>> write_report(model, reviews[40:60], tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    check_int("n_worst", "write_report", n_worst, least=0)
    target = _target_of(path)
    model = getattr(estimator, "best_estimator_", estimator)
    if not isinstance(model, BaseLLM):
        wanted = "a fitted estimator of llmfit, or a fitted search over one"
        raise parameter_error("estimator", "write_report", wanted, type(model).__name__)
    check_is_fitted(model)
    check_installed("write_report")  # before rows are answered
    frame, answers = answered(model, X, y, metrics=metrics)
    sections = [answer_section(one, frame, n_worst, alone=len(answers) == 1) for one in answers]
    if model is not estimator:
        sections.append(search_section(estimator))
    sections.append(fit_section(model, frame, answers))
    _write(target, page(*heading(model, frame, answers), sections))
    return target


def _target_of(path: Any) -> Path:
    """Check the place of the file before anything is computed."""
    if not isinstance(path, str | os.PathLike):
        raise parameter_error("path", "write_report", "a str or a path", path)
    target = Path(path).expanduser().absolute()
    if target.is_dir():
        raise ParameterError(f"The 'path' parameter of write_report must be a file. {str(path)!r} is a folder.")
    return target


def _write(target: Path, text: str) -> None:
    """Write a file whole: a process that is killed leaves the one before."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise DataError(f"{str(target)!r} cannot be written: {reason(error)}.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp makes files that nobody else can read
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
