"""A grid search whose candidates train side by side over one base model.

Takes what scikit-learn's ``GridSearchCV`` takes; gives its attributes. Folds, scores, ranks, failures and the refit are
the library's own: where it fits the first candidate on a fold, the others that can be are trained in the same passes,
and handed out when it comes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from llmfit.exceptions import ParameterError, parameter_error
from llmfit.search.digests import digest_of
from llmfit.search.records import Records
from llmfit.search.searches import Search

__all__ = ["Fused", "FusedGridSearchCV"]

TAKES = {"sample_weight", "eval_set"}  # parameters of a fit that may train side by side


class FusedGridSearchCV(Search, GridSearchCV):
    """``GridSearchCV`` whose candidates train side by side: the frozen base reads the rows of many of them at once.

    Candidates with plain LoRA (of any r, alpha, dropout and target_modules) on one base model train in one pass, each
    with its own rows, order, seed, learning rate, weight decay, schedule, warm-up and clipping, and become what they
    become when they are fitted alone: in float32 to 1e-4, and to rounding in dtypes of fewer bytes. A pass takes as
    many as `batch_tokens` of the estimator holds. All other candidates are fitted one at a time: other adapters and
    heads, quantized or encoder-decoder base models, and fits with validation rows, callbacks, checkpoints or
    gradient_checkpointing. Nothing has to be chosen.

    Parameters
    ----------
    estimator : estimator
        One of llmfit's; any other is searched as by ``GridSearchCV``.
    param_grid : dict of str to list, or list of such dicts
        What to try for each parameter; ``adapter__r`` names a key of ``adapter``.
    scoring, refit, cv, verbose, error_score, return_train_score
        As for ``GridSearchCV``.
    n_jobs : None or 1, default=None
        Several processes would each train on their own.
    pre_dispatch : int or str, default="2*n_jobs"
        Without effect, as there is one process.
    checkpoint_dir : path or None, default=None
        Folder for the score of each candidate on each fold; see :func:`make_search`.

    Attributes
    ----------
    cv_results_, best_estimator_, best_params_, best_score_, best_index_, scorer_, n_splits_, refit_time_, multimetric_
        As of ``GridSearchCV``. The fit time of candidates that were trained side by side is each one's share.

    Notes
    -----
    scikit-learn scores candidate by candidate. Until it comes to them, the adapters of all candidates on all folds are
    held in main memory.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> from llmfit.search import FusedGridSearchCV, results
    >>> model = LLMClassifier(target="score", epochs=1, random_state=0, verbose=0)
    >>> search = FusedGridSearchCV(model, {"adapter__r": [2, 4], "learning_rate": [1e-4, 1e-3]}, cv=2)
    >>> len(results(search.fit(load_book_reviews()[:40])))
    4
    """

    _always: ClassVar[bool] = True

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try the candidates, and fit the best one on all rows.

        Parameters
        ----------
        X, y, **params
            As for ``GridSearchCV``; without `y`, the target is taken from the frame.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If `n_jobs` asks for more than one process, or records for what no later search could find.
        DataError
            If the target is missing.
        """
        if self.n_jobs not in (None, 1):
            wanted = "None or 1, as one process trains candidates side by side"
            raise parameter_error("n_jobs", type(self).__name__, wanted, self.n_jobs)
        self._fused = Fused()
        try:
            super().fit(X, y, **params)
            self._share_times()
        finally:
            del self._fused
        return self

    def _stand_in_settings(self) -> dict[str, Any]:
        return {"fused": self._fused}

    def _run_search(self, evaluate_candidates: Any, *, callback_ctx: Any = None) -> None:
        given: Any = self.estimator  # the stand-in

        def evaluate(candidates: Any, *args: Any, **settings: Any) -> Any:
            every = list(candidates)
            self._fused.announce(given.estimator, every)
            try:
                return evaluate_candidates(every, *args, **settings)
            finally:
                self._fused.forget()

        super()._run_search(evaluate, callback_ctx=callback_ctx)

    def _share_times(self) -> None:
        """Write what each candidate's fits took, where the library has measured whole groups."""
        for i, params in enumerate(self.cv_results_["params"]):
            seconds = self._fused.seconds.get(_name(params), ())
            if len(seconds) == self.n_splits_:
                self.cv_results_["mean_fit_time"][i] = np.mean(seconds)
                self.cv_results_["std_fit_time"][i] = np.std(seconds)


class Fused:
    """The fits of a search that train side by side, kept until they are asked for.

    Attributes
    ----------
    seconds : dict of str to list of float
        Of a candidate, what its fit took on each fold.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.forget()

    def announce(self, estimator: Any, candidates: Sequence[dict[str, Any]]) -> None:
        """Say which candidates are to come, as parameters of an estimator."""
        from llmfit.estimators.joining import can_join

        self.forget()
        for params in candidates:
            try:
                own = clone(estimator).set_params(**clone(params, safe=False))
                if can_join(own):
                    self.coming[_settings(own)] = own, params
            except (ValueError, TypeError):  # of parameters that its own fit will refuse, or that have no digest
                continue

    def forget(self) -> None:
        """Drop candidates and fits that nobody will ask for: the best one is fitted anew on all rows."""
        self.coming: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.done: dict[str, dict[str, Any]] = {}

    def fit(self, estimator: Any, X: Any, y: Any, params: dict[str, Any], *, known: Records) -> Any:
        """Fit an estimator, and those to come that can be fitted with it; return it fitted.

        Parameters
        ----------
        estimator : estimator
        X, y, params
            As for its `fit`.
        known : Records
            Candidates of which it knows scores are not fitted.
        """
        name, fold = self._place(estimator, X, y, params)
        if name in self.coming and fold not in self.done:
            self.done[fold] = self._fit_all(X, y, params, known, needed=name)
        if name not in self.done.get(fold, ()):  # or handed out already: the same rows are a fold twice
            return estimator.fit(X, **params) if y is None else estimator.fit(X, y, **params)
        outcome = self.done[fold].pop(name)
        self.seconds.setdefault(_name(self.coming[name][1]), []).append(outcome.seconds)
        if outcome.error is not None:
            raise outcome.error
        return outcome.estimator

    def _place(self, estimator: Any, X: Any, y: Any, params: dict[str, Any]) -> tuple[str, str]:
        """Name a candidate and the rows of a fold; "" where it does not train with others."""
        if len(self.coming) < 2 or not params.keys() <= TAKES:
            return "", ""
        try:
            return _settings(estimator), digest_of(X, y, params)
        except ParameterError:  # what has no digest cannot be told from others
            return "", ""

    def _fit_all(self, X: Any, y: Any, params: dict[str, Any], known: Records, *, needed: str) -> dict[str, Any]:
        from llmfit.estimators.joining import fit_together

        chosen = {
            name: clone(own)
            for name, (own, _) in self.coming.items()
            if name == needed or not known.read(known.key(own, X, y, params))
        }
        return dict(zip(chosen, fit_together(list(chosen.values()), X, y, params), strict=True))


def _settings(estimator: Any) -> str:
    """Name an estimator by what it is and its parameters."""
    return digest_of(type(estimator), estimator.get_params(deep=False))


def _name(params: dict[str, Any]) -> str:
    return digest_of(params)
