"""Grid searches whose candidates train side by side over one base model.

Takes what scikit-learn's ``GridSearchCV`` and ``HalvingGridSearchCV`` take; gives their attributes. Folds, scores,
ranks, failures and the refit are the library's own: where it fits the first candidate on a fold, the others that can be
are trained in the same passes, and handed out when it comes to them. Halved, the fits of the survivors go on.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - lets the next import work
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV

from llmfit.exceptions import ParameterError, check_choice, check_int, parameter_error
from llmfit.search.beside import Fused, name_of
from llmfit.search.searches import Search

__all__ = ["Fused", "FusedGridSearchCV", "FusedHalvingGridSearchCV"]


class _FusedSearch(Search):
    """Mixin before a search of scikit-learn's: one process, in which candidates train together."""

    _always: ClassVar[bool] = True
    n_jobs: Any
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
        self._fused, given = Fused(type(self).__name__), self.n_jobs
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

        try:
            super()._run_search(evaluate, callback_ctx=callback_ctx)  # type: ignore[misc]
        finally:
            self._fused.close()

    def _share_times(self) -> None:
        """Write what each candidate's fits took, where the library has measured whole groups."""
        every = self.cv_results_["params"]
        for i, turn in enumerate(self.cv_results_.get("iter", [0] * len(every))):
            seconds = self._fused.rounds[turn].get(name_of(every[i]))  # of the folds whose scores were not known
            if seconds:
                self.cv_results_["mean_fit_time"][i] = np.mean(seconds)
                self.cv_results_["std_fit_time"][i] = np.std(seconds)


class FusedGridSearchCV(_FusedSearch, GridSearchCV):
    """``GridSearchCV`` whose candidates train side by side: the frozen base reads the rows of many of them at once.

    Candidates with plain LoRA (of any r, alpha and dropout, and the same settings of layers) on one base model train in
    one pass, each with its own rows, order, seed, learning rate, weight decay, schedule, warm-up and clipping, and
    become what they become when they are fitted alone: in float32 to 1e-4; in bfloat16 on a CPU to the bit or next to
    it, on a GPU to rounding. A pass takes as many as `batch_tokens` of the estimator holds. All other candidates are
    fitted one at a time: other adapters and heads, quantized or encoder-decoder base models, and fits with validation
    rows, callbacks, checkpoints or gradient_checkpointing. Nothing has to be chosen. Meant for a GPU, which small steps
    leave idle: on a CPU ``GridSearchCV`` takes about as long, and half the memory.

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
        ``ceil(n / factor)`` of n candidates go on, to `factor` times the epochs.
    resource : {"epochs"}, default="epochs"
    max_resources : int or "auto", default="auto"
        Epochs of the last round at most; "auto" takes the estimator's.
    min_resources : int or {"exhaust", "smallest"}, default="exhaust"
        Epochs of the first round: "exhaust" chooses them for the last round to have as many as possible, "smallest" is
        one.
    aggressive_elimination, cv, scoring, refit, error_score, verbose
        As for ``HalvingGridSearchCV``.
    return_train_score : bool, default=False
        Score every fit of every round on the rows that it learns from as well.
    random_state : None
        Nothing is drawn: anything else is refused.
    n_jobs : None or 1, default=None
    checkpoint_dir : path or None, default=None
        Folder for the score of each candidate on each fold and round; see :func:`make_search`. A search that was
        killed takes from there what it knows, and trains survivors anew as far as they had come.

    Attributes
    ----------
    n_resources_ : list of int
        Epochs of each round.
    cv_results_, best_estimator_, best_params_, n_candidates_, n_iterations_, ...
        As of ``HalvingGridSearchCV``. The fit time is that of the round alone, over the folds whose scores were not
        known.

    Notes
    -----
    Until a round is over, each of its fits on each fold is held in main memory: what it trains, and what the optimiser
    keeps of that, three times as much in all with AdamW. That is little with LoRA, and much with ``adapter="full"``.
    Callbacks of a fit go on with what they know, and are told of the beginning and the end of every round.

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

    _one_score: ClassVar[bool] = True
    resource: str
    max_resources: Any
    random_state: Any
    factor: Any
    aggressive_elimination: bool
    min_resources_: int
    max_resources_: int

    def __init__(self, *args: Any, resource: str = "epochs", return_train_score: bool = False, **settings: Any) -> None:
        super().__init__(*args, resource=resource, return_train_score=return_train_score, **settings)

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
        if self.random_state is not None:
            raise ParameterError(f"The 'random_state' parameter has no meaning in {owner}: nothing is drawn.")
        if not can_pause(self.estimator):
            raise parameter_error("estimator", owner, "an estimator of llmfit, whose fits can be held", self.estimator)
        given = self.max_resources
        try:
            if given == "auto":
                self.max_resources = check_int("epochs", type(self.estimator).__name__, self.estimator.epochs, least=1)
            return super().fit(X, y, **params)
        finally:
            self.max_resources = given

    def _epochs(self, candidates: int) -> int | None:
        required = 1 + math.floor(math.log(candidates, self.factor))
        possible = 1 + math.floor(math.log(self.max_resources_ // self.min_resources_, self.factor))
        rounds = possible if self.aggressive_elimination else min(required, possible)
        return min(int(self.factor ** (rounds - 1) * self.min_resources_), self.max_resources_)
