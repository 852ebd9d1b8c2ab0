"""What a search has found out already, on disk: a file for each candidate on each fold.

Takes an estimator and a scorer; gives a stand-in for each, with which a search of scikit-learn or Optuna does all that
it does, and asks nothing twice. Knows no kind of search.

Why stand-ins: a search asks two things of what it is given, `fit` of an estimator and a number of a callable scorer,
and both are part of scikit-learn's public contract. Folds, ranks, failures, refitting and `cv_results_` stay its own,
for every kind of search, and nothing of its inside is replaced. A fold is known by the rows in it rather than by their
places, so that a record can never be taken for one of other data.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import tempfile
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import check_scoring

import llmfit
from llmfit.exceptions import DataError, LLMFitWarning, ModelLoadError, ParameterError, parameter_error, reason, warn
from llmfit.search.digests import digest_of

__all__ = ["EscapedError", "Recorded", "RecordedScorer", "Records"]

WITHOUT_EFFECT = ("verbose", "checkpoint_dir")  # parameters that decide no score


class EscapedError(Exception):
    """Carries an error past a library that would swallow it: its cause is the error."""


class Records:
    """The scores that are known, in a folder; or, without one, in no place at all.

    Parameters
    ----------
    folder : path or None
    scoring : any
        What the search measures: part of every record's name.
    """

    def __init__(self, folder: Any, scoring: Any) -> None:
        self.folder = None if folder is None else _made(folder)
        self.scoring = None if folder is None else digest_of(scoring)

    def key(self, estimator: Any, X: Any, y: Any, params: dict[str, Any]) -> str:
        """Name what is learned from these rows with these parameters; "" where nothing is recorded."""
        if self.folder is None:
            return ""
        settings = {
            name: value
            for name, value in sorted(estimator.get_params(deep=True).items())
            if name.rpartition("__")[2] not in WITHOUT_EFFECT
        }
        weights = [_fingerprint(place) for name, value in settings.items() for place in _places(name, value)]
        return digest_of(llmfit.__version__, type(estimator), settings, weights, self.scoring, X, y, params)

    def read(self, key: str) -> dict[str, Any]:
        """Read what was measured of a fit: scores by the rows that they were measured on. A damaged file is none."""
        if self.folder is None:
            return {}
        try:
            content = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return {rows: _numbers(scores) for rows, scores in content["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, key: str, params: dict[str, Any], rows: int, scores: dict[str, Any]) -> None:
        """Write what was measured of a fit, whole: a process that is killed leaves the file before, or none."""
        if self.folder is None:
            return
        shown = {name: value if isinstance(value, str | int | float) else repr(value) for name, value in params.items()}
        content = {"params": shown, "rows": rows, "scores": {name: _texts(own) for name, own in scores.items()}}
        handle, temporary = tempfile.mkstemp(prefix=f".{key}-", dir=self.folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(content, file, indent=1, allow_nan=False, default=str)
            os.replace(temporary, self.folder / f"{key}.json")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _made(folder: Any) -> Path:
    """Make the folder of records."""
    if not isinstance(folder, str | os.PathLike):
        raise parameter_error("checkpoint_dir", "make_search", "None, a str or a path", folder)
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"checkpoint_dir {str(folder)!r} cannot be written: {reason(error)}.") from error
    return path


def _places(name: str, value: Any) -> list[Any]:
    """List where weights lie that a parameter has a fit read: those of models, and of an adapter to begin from."""
    from llmfit.adapters import adapter_start

    key = name.rpartition("__")[2]
    if key == "base_model":
        return [value]
    if key == "few_shot":
        return [value["model"]] if isinstance(value, Mapping) and value.get("model") else []
    try:
        start = adapter_start(value) if key == "adapter" else None
    except ParameterError:  # which the fit says
        return []
    return [start] if start is not None else []


def _fingerprint(place: Any) -> str | None:
    """Name the weights that lie at a place now, where they can be found."""
    from llmfit.sources import digest_folder, find_source

    try:
        if isinstance(place, Path) and place.is_dir() and not (place / "config.json").is_file():
            return digest_folder(place)
        return find_source(place).fingerprint
    except (ModelLoadError, OSError):
        return None


def _texts(scores: Any) -> Any:
    """Write scores as JSON can hold them: what is not finite as a word."""
    if isinstance(scores, dict):
        return {name: _texts(score) for name, score in scores.items()}
    return float(scores) if math.isfinite(scores) else str(float(scores))


def _numbers(scores: Any) -> Any:
    return {name: float(score) for name, score in scores.items()} if isinstance(scores, dict) else float(scores)


def _rows(X: Any) -> int:
    return int(X.shape[0]) if hasattr(X, "shape") else len(X)


class Recorded:
    """Stands in for an estimator: it fits only where its scores are not known yet.

    Parameters
    ----------
    estimator : estimator
    records : Records
    whole : str
        Digest of all rows, on which it always fits: they are those of the refit.
    fused : Fused or None
        Fits it together with others, where it can.
    failing : {"", "warn", "raise"}
        What else to do where a fit fails with a ``ValueError``, which Optuna's search takes for a bad trial without a
        word: warn, or raise :class:`EscapedError` in its place.
    """

    def __init__(self, estimator: Any, records: Records, whole: str, *, fused: Any = None, failing: str = "") -> None:
        self.estimator, self.records, self.whole, self.failing = estimator, records, whole, failing
        self.fused = fused
        self.params: dict[str, Any] = {}

    def __sklearn_clone__(self) -> Recorded:
        copy = Recorded(clone(self.estimator), self.records, self.whole, fused=self.fused, failing=self.failing)
        copy.params = dict(self.params)
        return copy

    def __sklearn_tags__(self) -> Any:
        return self.estimator.__sklearn_tags__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "estimator" not in vars(self):
            raise AttributeError(name)
        return getattr(self.estimator, name)

    def get_params(self, deep: bool = True) -> Any:
        """Get the estimator's parameters."""
        return self.estimator.get_params(deep=deep)

    def set_params(self, **params: Any) -> Recorded:
        """Set the estimator's parameters."""
        self.estimator.set_params(**params)
        self.params.update(params)
        return self

    def fit(self, X: Any, y: Any = None, **params: Any) -> Recorded:
        """Fit, unless scores of such a fit are known."""
        self.given, self.fitted = (X, y, params), False
        own, far = (self.estimator, {}) if self.fused is None else self.fused.meant(self.estimator)
        self.key = self.records.key(own, X, y, {**params, **far})
        self.known = self.records.read(self.key)
        if not self.known or digest_of(X) == self.whole:
            self._fit()
        return self

    def _fit(self) -> None:
        X, y, params = self.given
        try:
            fit = self.estimator.fit if self.fused is None else self._fit_fused
            fit(X, **params) if y is None else fit(X, y, **params)
        except ValueError as error:
            if self.failing == "raise":
                raise EscapedError from error
            if self.failing == "warn":
                warn(LLMFitWarning(f"A candidate failed, {self.params}: {reason(error)}."))
            raise
        self.fitted = True

    def _fit_fused(self, X: Any, y: Any = None, **params: Any) -> None:
        self.estimator = self.fused.fit(self.estimator, self.params, X, y, params, known=self.records)

    def scored(self, scorer: Any, X: Any, y: Any, params: dict[str, Any]) -> Any:
        """Look scores up, or measure and record them."""
        rows = digest_of(X, y, params) if self.key else ""
        if rows in self.known:
            return self.known[rows]
        if not self.fitted:
            self._fit()
        scores = scorer(self.estimator, X, **params) if y is None else scorer(self.estimator, X, y, **params)
        if self.key and _all_numbers(scores):  # and no error that scikit-learn deals with: to be tried again
            self.known = {**self.known, rows: scores}
            self.records.write(self.key, self.params, _rows(self.given[0]), self.known)
        return scores


def _all_numbers(scores: Any) -> bool:
    each = scores.values() if isinstance(scores, dict) else [scores]
    return all(isinstance(score, numbers.Number) for score in each)


class RecordedScorer:
    """Stands in for what measures: it asks the stand-in of the estimator first.

    Parameters
    ----------
    estimator : estimator
    scoring : None, str, callable, list, tuple or dict
    error_score : float or "raise"
    """

    def __init__(self, estimator: Any, scoring: Any, error_score: Any) -> None:
        self.scorer: Any = check_scoring(estimator, scoring, raise_exc=error_score == "raise")
        self.error_score = error_score
        self.several: dict[str, Any] | None = None  # what the search calls its scorer_
        if isinstance(scoring, dict):
            self.several = {name: check_scoring(estimator, one) for name, one in scoring.items()}
        elif isinstance(scoring, list | tuple):
            self.several = {name: check_scoring(estimator, name) for name in scoring}

    def __call__(self, estimator: Any, X: Any, y: Any = None, **params: Any) -> Any:
        """Measure an estimator on rows."""
        scores = estimator.scored(self.scorer, X, y, params)
        if self.several is None or _all_numbers(scores):
            return scores
        failed = [name for name, score in scores.items() if isinstance(score, str)]
        last = scores[failed[0]].strip().rpartition("\n")[2]
        warnings.warn(
            f"Scoring failed. The score of {', '.join(failed)} on this fold is {self.error_score}: {last}",
            FitFailedWarning,
            stacklevel=2,
        )
        return {name: self.error_score if name in failed else score for name, score in scores.items()}

    def _accept_sample_weight(self) -> bool:
        """Answer scikit-learn, which asks scorers so, or looks for the name among their parameters."""
        asked = getattr(self.scorer, "_accept_sample_weight", None)
        return bool(asked()) if asked is not None else "sample_weight" in signature(self.scorer).parameters

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "scorer" not in vars(self):
            raise AttributeError(name)
        return getattr(self.scorer, name)  # metadata routing asks the scorer what it takes
