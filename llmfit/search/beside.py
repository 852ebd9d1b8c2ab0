"""The fits of a search that train side by side, or go on from one round to the next.

Takes the candidates that a search is about to ask for; gives each of them fitted when it comes to it. A candidate is
known by what is set for it, a fold by the rows in it. Knows no kind of search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sklearn.base import clone
from sklearn.utils import check_random_state

from llmfit.exceptions import ParameterError, quoted, reason
from llmfit.search.digests import digest_of
from llmfit.search.records import Records

if TYPE_CHECKING:
    from llmfit.checkpoints import Pause

__all__ = ["Fused", "name_of"]

TAKES = {"sample_weight", "eval_set"}  # parameters of a fit that may train side by side


@dataclass
class _Candidate:
    """An estimator that is to come, the name of the fit that it is a part of, and whether it may train with others."""

    estimator: Any
    whole: str
    joins: bool


@dataclass
class _Held:
    """Where a fit stands, and what it is given anew in every round: its seed, and callbacks with what they know."""

    pause: Pause
    settings: dict[str, Any] = field(default_factory=dict)


class Fused:
    """The fits of a search that train side by side, kept until they are asked for.

    Parameters
    ----------
    owner : str
        Name of the search, for sentences.

    Attributes
    ----------
    rounds : list of dict of str to list of float
        Of every round, by a candidate's name, what its fits took in seconds.
    epochs : int or None
        Of a whole fit, where candidates have fewer, behind which their fits are held.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.rounds: list[dict[str, list[float]]] = []
        self.epochs: int | None = None
        self._held: dict[tuple[str, str], _Held] = {}
        self.forget()

    def announce(self, estimator: Any, candidates: Sequence[dict[str, Any]], epochs: int | None = None) -> None:
        """Say which candidates are to come, as parameters of an estimator; fits of others are not held any more.

        Raises
        ------
        ParameterError
            If fits are to be held, and a candidate cannot be told from others or keeps checkpoints itself.
        """
        from llmfit.estimators.joining import can_join

        self.forget()
        self.epochs = epochs
        self.rounds.append({})
        for params in candidates:
            name, own = self._name(params), _set(estimator, params)
            if own is None or not name:
                continue
            self._check_held(own)
            joins = can_join(own)
            if joins or epochs is not None:
                whole = {key: value for key, value in params.items() if epochs is None or key != "epochs"}
                self.coming[name] = _Candidate(own, digest_of(whole), joins)
        wanted = {candidate.whole for candidate in self.coming.values()}
        self._held = {key: held for key, held in self._held.items() if key[0] in wanted}

    def meant(self, estimator: Any) -> tuple[Any, dict[str, Any]]:
        """Give the whole fit that a candidate stands for, and how far of it, unless to its end."""
        if self.epochs is None:
            return estimator, {}
        far = {} if estimator.epochs == self.epochs else {"epochs": estimator.epochs}
        return clone(estimator).set_params(epochs=self.epochs), far

    def forget(self) -> None:
        """Drop candidates and fits that nobody will ask for: the best one is fitted anew on all rows."""
        self.coming: dict[str, _Candidate] = {}
        self.done: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        """Drop all fits that are held: no other round is to come."""
        self.forget()
        self._held.clear()

    def fit(
        self, estimator: Any, chosen: dict[str, Any], X: Any, y: Any, params: dict[str, Any], *, known: Records
    ) -> Any:
        """Fit an estimator, and those to come that can be fitted with it; return it fitted.

        Parameters
        ----------
        estimator : estimator
        chosen : dict of str to any
            What was set on it.
        X, y, params
            As for its `fit`.
        known : Records
            Candidates of which it knows scores are not fitted.
        """
        name, fold = self._place(chosen, X, y, params)
        if name in self.coming and fold not in self.done:
            self.done[fold] = self._fit_all(X, y, params, known, fold, needed=name)
        elif name in self.coming and self.epochs and name not in self.done[fold]:  # alone, or the same rows twice
            self.done[fold] |= self._fit_all(X, y, params, known, fold, needed=name, alone=True)
        if name not in self.done.get(fold, ()):
            return estimator.fit(X, **params) if y is None else estimator.fit(X, y, **params)
        outcome = self.done[fold].pop(name)
        self.rounds[-1].setdefault(name, []).append(outcome.seconds)
        if outcome.error is not None:
            raise outcome.error
        return outcome.estimator

    # Names --------------------------------------------------------------------------------------

    def _name(self, params: dict[str, Any]) -> str:
        """Name a candidate; "" where it cannot be told from others, and need not be."""
        name = name_of(params)
        if name or self.epochs is None:
            return name
        wrong = next(key for key, value in params.items() if not name_of({key: value}))
        raise ParameterError(
            f"{self.owner} finds the fits that go on by what is searched, and the values of {wrong!r} cannot be told "
            "from one another. Set it on the estimator instead."
        )

    def _place(self, chosen: dict[str, Any], X: Any, y: Any, params: dict[str, Any]) -> tuple[str, str]:
        """Name a candidate and the rows of a fold; "" where it does not train with others."""
        if not params.keys() <= TAKES or len(self.coming) < (2 if self.epochs is None else 1):
            return "", ""
        name = name_of(chosen)
        if self.epochs is not None and name not in self.coming:
            searched = quoted(key for key in chosen if key != "epochs")
            raise ParameterError(
                f"{self.owner} finds the fits that go on by what is searched, and a value of {searched} has changed "
                "meanwhile. Search only values that stay as they are."
            )
        try:
            return name, digest_of(X, y, params)
        except ParameterError as error:
            if self.epochs is None:
                return "", ""
            raise ParameterError(
                f"{self.owner} finds the fits that go on by their rows, and these cannot be told from others: "
                f"{reason(error.__cause__ or error)}."
            ) from error

    def _check_held(self, estimator: Any) -> None:
        if self.epochs is not None and estimator.checkpoint_dir is not None:
            raise ParameterError(
                f"The 'checkpoint_dir' parameter of the estimator has no meaning in {self.owner}, which holds its "
                "fits itself. Set the search's."
            )

    # Fits ---------------------------------------------------------------------------------------

    def _fit_all(
        self, X: Any, y: Any, params: dict[str, Any], known: Records, fold: str, *, needed: str, alone: bool = False
    ) -> dict[str, Any]:
        """Fit the one that is needed and, unless alone, those that may train with it; others would only be kept."""
        from llmfit.estimators.joining import fit_together

        chosen = {
            name: own
            for name, own in self.coming.items()
            if name == needed or not (alone or not own.joins or self._is_known(known, own.estimator, X, y, params))
        }
        every = [self._begin(own, fold) for own in chosen.values()]
        estimators, pauses = [own for own, _ in every], [pause for _, pause in every]
        return dict(zip(chosen, fit_together(estimators, X, y, params, pauses), strict=True))

    def _is_known(self, known: Records, estimator: Any, X: Any, y: Any, params: dict[str, Any]) -> bool:
        own, far = self.meant(estimator)
        return bool(known.read(known.key(own, X, y, {**params, **far})))

    def _begin(self, candidate: _Candidate, fold: str) -> tuple[Any, Pause | None]:
        """Give the whole fit of a candidate, and where it goes on from and how far."""
        from llmfit.checkpoints import Pause

        own = clone(self.meant(candidate.estimator)[0])
        if self.epochs is None:
            return own, None
        far = candidate.estimator.epochs
        key = candidate.whole, fold
        if key not in self._held:
            settings = {"callbacks": own.callbacks}
            if own.random_state is None:  # which draws another seed each time
                settings["random_state"] = int(check_random_state(None).randint(2**31 - 1))
            self._held[key] = _Held(Pause(far), settings)
        held = self._held[key]
        held.pause.epochs = far
        return own.set_params(**held.settings), held.pause


def name_of(params: dict[str, Any]) -> str:
    """Name a candidate by its parameters; "" where these cannot be told from others."""
    try:
        return digest_of(params)
    except ParameterError:
        return ""


def _set(estimator: Any, params: dict[str, Any]) -> Any:
    """Set parameters on a copy; None where they are none, as its own fit will say."""
    try:
        return clone(estimator).set_params(**clone(params, safe=False))
    except (ValueError, TypeError):
        return None
