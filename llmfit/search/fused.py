"""Grid searches whose candidates train side by side over one base model.

Takes what scikit-learn's ``GridSearchCV`` and ``HalvingGridSearchCV`` take; gives their attributes. Folds, scores,
ranks, failures and the refit are the library's own: where it fits the first candidate on a fold, the others that can be
are trained in the same passes, and handed out when it comes to them. Halved, the fits of the survivors go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV

from llmfit.exceptions import ParameterError, check_choice, parameter_error
from llmfit.search.digests import digest_of
from llmfit.search.records import Records
from llmfit.search.searches import Search

if TYPE_CHECKING:
    from llmfit.checkpoints import Pause

__all__ = ["Fused", "FusedGridSearchCV", "FusedHalvingGridSearchCV"]

TAKES = {"sample_weight", "eval_set"}  # parameters of a fit that may train side by side


class _FusedSearch(Search):
    """Mixin before a search of scikit-learn's: one process, in which candidates train together."""

    _always: ClassVar[bool] = True
    n_jobs: Any
    n_splits_: int
    cv_results_: Any

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try the candidates, and fit the best one on all rows.

        Parameters
        ----------
        X, y, **params
            As for scikit-learn's search; without `y`, the target is taken from the frame.

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
        self._fused, given = Fused(), self.n_jobs
        try:
            self.n_jobs = 1  # whatever joblib was told outside
            super().fit(X, y, **params)
            self._share_times()
        finally:
            self.n_jobs = given
            del self._fused
        return self

    def _stand_in_settings(self) -> dict[str, Any]:
        return {"fused": self._fused}

    def _epochs(self, candidates: int) -> int | None:
        """Count the epochs of the whole fits, of which the candidates are the first; None where they are whole."""
        return None

    def _run_search(self, evaluate_candidates: Any, *, callback_ctx: Any = None) -> None:
        given: Any = self.estimator  # the stand-in

        def evaluate(candidates: Any, *args: Any, **settings: Any) -> Any:
            every = list(candidates)
            self._fused.announce(given.estimator, every, self._fused.epochs or self._epochs(len(every)))
            try:
                return evaluate_candidates(every, *args, **settings)
            finally:
                self._fused.forget()

        super()._run_search(evaluate, callback_ctx=callback_ctx)  # type: ignore[misc]

    def _share_times(self) -> None:
        """Write what each candidate's fits took, where the library has measured whole groups."""
        for i, params in enumerate(self.cv_results_["params"]):
            name = _name(params)
            seconds = self._fused.seconds.get(name, ()) if name else ()
            if len(seconds) == self.n_splits_:
                self.cv_results_["mean_fit_time"][i] = np.mean(seconds)
                self.cv_results_["std_fit_time"][i] = np.std(seconds)


class FusedGridSearchCV(_FusedSearch, GridSearchCV):
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
        Folder for the score of each candidate on each fold; see :func:`make_search`. scikit-learn scores candidate by
        candidate: of a search that was killed, fits that were trained but not scored yet are trained again.

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


class FusedHalvingGridSearchCV(_FusedSearch, HalvingGridSearchCV):
    """``HalvingGridSearchCV`` over epochs, in which the fits of the survivors go on instead of beginning again.

    Every candidate is one fit of as many epochs as the last round gives, its schedule of learning rates over all of
    them. The first round holds it behind the first few and scores it as it stands; the better third (for ``factor=3``)
    goes on from there, weights, optimiser and all, to the next round. What comes to the last round is what it would be
    if it were fitted alone. Candidates train side by side where those of :class:`FusedGridSearchCV` do; all others are
    held and go on as well, one at a time.

    Parameters
    ----------
    estimator : estimator
        One of llmfit's, without a `checkpoint_dir` of its own.
    param_grid : dict of str to list, or list of such dicts
        What to try for each parameter but epochs.
    factor : int or float, default=3
        One in so many candidates goes on, with so many times the epochs.
    resource : {"epochs"}, default="epochs"
    max_resources : int or "auto", default="auto"
        Epochs of the last round at most; "auto" takes the estimator's.
    min_resources : int or {"exhaust", "smallest"}, default="exhaust"
        Epochs of the first round: "exhaust" chooses them for the last round to have as many as possible, "smallest" is
        one.
    aggressive_elimination, cv, scoring, refit, error_score, return_train_score, random_state, verbose
        As for ``HalvingGridSearchCV``.
    n_jobs : None or 1, default=None
    checkpoint_dir : path or None, default=None
        Folder for the score of each candidate on each fold and round; see :func:`make_search`. A search that was
        killed takes from there what it knows, and trains survivors anew as far as they had come.

    Attributes
    ----------
    n_resources_ : list of int
        Epochs of each round.
    cv_results_, best_estimator_, best_params_, n_candidates_, n_iterations_, ...
        As of ``HalvingGridSearchCV``. The fit time is that of the round alone.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> from llmfit.datasets import load_book_reviews
    >>> from llmfit.search import FusedHalvingGridSearchCV
    >>> model = LLMClassifier(target="score", epochs=3, random_state=0, verbose=0)
    >>> search = FusedHalvingGridSearchCV(model, {"learning_rate": [1e-4, 3e-4, 1e-3]}, cv=2)
    >>> search.fit(load_book_reviews()[:20]).n_resources_
    [1, 3]
    """

    resource: str
    max_resources: Any
    factor: Any
    aggressive_elimination: bool
    min_resources_: int
    max_resources_: int

    def __init__(self, *args: Any, resource: str = "epochs", **settings: Any) -> None:
        super().__init__(*args, resource=resource, **settings)

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try the candidates, and fit the best one on all rows.

        Parameters
        ----------
        X, y, **params
            As for ``HalvingGridSearchCV``; without `y`, the target is taken from the frame.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If a fit of the estimator cannot be held, `n_jobs` asks for more than one process, or records are asked for
            that no later search could find.
        DataError
            If the target is missing.
        """
        from llmfit.estimators.joining import can_pause

        owner = type(self).__name__
        check_choice("resource", owner, self.resource, ["epochs"])
        if not can_pause(self.estimator):
            raise parameter_error("estimator", owner, "an estimator of llmfit, whose fits can be held", self.estimator)
        if self.estimator.checkpoint_dir is not None:
            raise ParameterError(
                f"The 'checkpoint_dir' parameter of the estimator has no meaning in {owner}, which holds its fits "
                "itself. Set the search's."
            )
        given = self.max_resources
        try:
            self.max_resources = self.estimator.epochs if given == "auto" else given
            return super().fit(X, y, **params)
        finally:
            self.max_resources = given

    def _epochs(self, candidates: int) -> int | None:
        required = 1 + math.floor(math.log(candidates, self.factor))
        possible = 1 + math.floor(math.log(self.max_resources_ // self.min_resources_, self.factor))
        rounds = possible if self.aggressive_elimination else min(required, possible)
        return min(int(self.factor ** (rounds - 1) * self.min_resources_), self.max_resources_)


class Fused:
    """The fits of a search that train side by side, kept until they are asked for.

    Attributes
    ----------
    seconds : dict of str to list of float
        Of a candidate, what its fit took on each fold.
    epochs : int or None
        Of a whole fit, where candidates have fewer, behind which their fits are held.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.epochs: int | None = None
        self._held: dict[tuple[str, str], Pause] = {}
        self.forget()

    def announce(self, estimator: Any, candidates: Sequence[dict[str, Any]], epochs: int | None = None) -> None:
        """Say which candidates are to come, as parameters of an estimator; fits of others are not held any more."""
        from llmfit.estimators.joining import can_join

        self.forget()
        self.epochs = epochs
        for params in candidates:
            try:
                own = clone(estimator).set_params(**clone(params, safe=False))
                if epochs is not None or can_join(own):
                    self.coming[_settings(own)] = own, params
            except (ValueError, TypeError):  # of parameters that its own fit will refuse, or that have no digest
                continue
        whole = {_settings(self.meant(own)[0]) for own, _ in self.coming.values()}
        self._held = {key: pause for key, pause in self._held.items() if key[0] in whole}

    def meant(self, estimator: Any) -> tuple[Any, dict[str, Any]]:
        """Give the whole fit that a candidate stands for, and how far of it, unless to its end."""
        if self.epochs is None:
            return estimator, {}
        far = {} if estimator.epochs == self.epochs else {"epochs": estimator.epochs}
        return clone(estimator).set_params(epochs=self.epochs), far

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
            self.done[fold] = self._fit_all(X, y, params, known, fold, needed=name)
        elif name in self.coming and self.epochs and name not in self.done[fold]:  # the same rows are a fold twice
            self.done[fold] |= self._fit_all(X, y, params, known, fold, needed=name, alone=True)
        if name not in self.done.get(fold, ()):
            return estimator.fit(X, **params) if y is None else estimator.fit(X, y, **params)
        outcome = self.done[fold].pop(name)
        self.seconds.setdefault(_name(self.coming[name][1]), []).append(outcome.seconds)
        if outcome.error is not None:
            raise outcome.error
        return outcome.estimator

    def _place(self, estimator: Any, X: Any, y: Any, params: dict[str, Any]) -> tuple[str, str]:
        """Name a candidate and the rows of a fold; "" where it does not train with others."""
        if (len(self.coming) < 2 and not self.epochs) or not params.keys() <= TAKES:
            return "", ""
        try:
            return _settings(estimator), digest_of(X, y, params)
        except ParameterError:  # what has no digest cannot be told from others
            if self.epochs and self.coming:
                raise
            return "", ""

    def _fit_all(
        self, X: Any, y: Any, params: dict[str, Any], known: Records, fold: str, *, needed: str, alone: bool = False
    ) -> dict[str, Any]:
        from llmfit.estimators.joining import fit_together

        chosen = {
            name: clone(own)
            for name, (own, _) in self.coming.items()
            if name == needed or not (alone or self._is_known(known, own, X, y, params))
        }
        pauses = [self._hold(own, fold) for own in chosen.values()]
        every = [self.meant(own)[0] for own in chosen.values()]
        return dict(zip(chosen, fit_together(every, X, y, params, pauses), strict=True))

    def _is_known(self, known: Records, estimator: Any, X: Any, y: Any, params: dict[str, Any]) -> bool:
        own, far = self.meant(estimator)
        return bool(known.read(known.key(own, X, y, {**params, **far})))

    def _hold(self, estimator: Any, fold: str) -> Pause | None:
        """Find where a fit is held, and say how far it goes next."""
        from llmfit.checkpoints import Pause

        if self.epochs is None:
            return None
        key = _settings(self.meant(estimator)[0]), fold
        pause = self._held.setdefault(key, Pause(estimator.epochs))
        pause.epochs = estimator.epochs
        return pause


def _settings(estimator: Any) -> str:
    """Name an estimator by what it is and its parameters."""
    return digest_of(type(estimator), estimator.get_params(deep=False))


def _name(params: dict[str, Any]) -> str:
    """Name a candidate; "" for one whose parameters cannot be told from others."""
    try:
        return digest_of(params)
    except ParameterError:
        return ""
