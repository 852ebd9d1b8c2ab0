"""Worked examples chosen for each row out of the fitted ones: drawn at random, or those most like it.

Takes rendered rows; gives, for each, the examples that stand before it. No row sees itself, nor one that reads alike,
with its answer: in a fit as afterwards, so that fitted rows can be measured. Rows are compared by the values of their
features alone, through vectors of the base model or of another one, as they are before any training; no answer has a
part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from llmfit.base_model import BaseModel
from llmfit.exceptions import ModelLoadError
from llmfit.templates import PLAIN, Example, FewShot, Segment, segments_text

__all__ = ["Retrieval", "learn_retrieval"]

Contents = Sequence[tuple[Segment, ...]]
CHUNK = 1024  # rows that are compared with all examples at once
DIGITS = 5  # of a likeness: what rows beside a row do to its vector lies below


@dataclass(frozen=True)
class Retrieval:
    """How examples are chosen for a row.

    Parameters
    ----------
    kind : {"random", "semantic"}
    k : int
        Examples before a row.
    seed : int
    model : str or None
        Whose vectors are compared; None is the base model.
    fingerprint : str or None
        Of that model.
    apart : dict or None
        Where the vectors of the examples are kept, by a run that shares none with others: the last digits of a vector
        depend on the rows that it was computed beside. None keeps all vectors in the process.
    """

    kind: str
    k: int
    seed: int
    model: str | None = None
    fingerprint: str | None = None
    apart: dict[str, np.ndarray] | None = field(default=None, repr=False, compare=False)

    def choose(self, base: BaseModel, pool: Sequence[Example], contents: Contents) -> list[tuple[Example, ...]]:
        """Choose the examples of every row, the most alike last.

        Parameters
        ----------
        base : BaseModel
        pool : sequence of Example
            Of the fitted rows.
        contents : sequence of tuple of Segment, length n
            The rows, rendered by themselves.

        Returns
        -------
        list of tuple of Example, length n
        """
        texts = [segments_text(content) for content in contents]
        alike: dict[str, list[int]] = {}
        for place, example in enumerate(pool):
            alike.setdefault(segments_text(example.content), []).append(place)
        hidden = [alike.get(text, []) for text in texts]
        places = CHOICES[self.kind](self, base, pool, contents, hidden)
        return [tuple(pool[place] for place in own) for own in places]

    def reader(self, base: BaseModel) -> BaseModel:
        """Give the model whose vectors are compared.

        Raises
        ------
        ModelLoadError
            If it is not the one of the fit.
        """
        if self.model is None:
            return base
        from llmfit.base_model import load_base_model

        reader = load_base_model(self.model, device=str(base.device))
        if reader.source.fingerprint != self.fingerprint:
            raise ModelLoadError(
                f"The model {self.model!r} of few_shot is not the one of the fit: its fingerprint is "
                f"{reader.source.fingerprint}, not {self.fingerprint}."
            )
        return reader


def learn_retrieval(few_shot: FewShot, base: BaseModel, k: int) -> Retrieval | None:
    """Take from the template how examples are chosen for each row; None where all rows have the same."""
    if few_shot.retrieval is None:
        return None
    if few_shot.model is None:
        return Retrieval(few_shot.retrieval, k, few_shot.seed)
    from llmfit.base_model import load_base_model

    reader = load_base_model(few_shot.model, device=str(base.device))
    return Retrieval(few_shot.retrieval, k, few_shot.seed, str(few_shot.model), reader.source.fingerprint)


def _at_random(
    retrieval: Retrieval, _: BaseModel, pool: Sequence[Example], contents: Contents, hidden: Sequence[list[int]]
) -> list[list[int]]:
    """Draw examples from the seed and what a row says, so that neither its place nor the rows beside it matter."""
    places = []
    for content, own in zip(contents, hidden, strict=True):
        drawn = np.random.default_rng([retrieval.seed, crc32(segments_text(content).encode("utf-8", "surrogatepass"))])
        some = drawn.choice(len(pool), min(len(pool), retrieval.k + len(own)), replace=False).tolist()
        places.append([place for place in some if place not in own][: retrieval.k])
    return places


def _most_alike(
    retrieval: Retrieval, base: BaseModel, pool: Sequence[Example], contents: Contents, hidden: Sequence[list[int]]
) -> list[list[int]]:
    """Find the examples whose vectors point most nearly where a row's does, seen from the middle of all examples."""
    reader = retrieval.reader(base)
    known = _vectors_of_examples(retrieval, reader, pool)
    middle = known.mean(axis=0)
    asked = _directions(_vectors(reader, contents, keep=retrieval.apart is None) - middle)
    known = _directions(known - middle)
    places = []
    for start in range(0, len(asked), CHUNK):
        likeness = np.round(asked[start : start + CHUNK] @ known.T, DIGITS)  # (rows, examples)
        for row, own in zip(likeness, hidden[start : start + CHUNK], strict=True):
            row[own] = -np.inf
            places.append(_greatest(row, retrieval.k)[::-1])
    return places


def _greatest(values: np.ndarray, k: int) -> list[int]:
    """Find the places of the k greatest values, the greatest first; of equal ones, the first."""
    least = np.partition(values, -k)[-k]
    places = np.flatnonzero(values >= least)
    chosen: list[int] = places[np.argsort(-values[places], kind="stable")][:k].tolist()
    return chosen


def _vectors_of_examples(retrieval: Retrieval, reader: BaseModel, pool: Sequence[Example]) -> np.ndarray:
    """Vectors of the examples, computed once for a run that keeps its own."""
    contents = [example.content for example in pool]
    if retrieval.apart is None:
        return _vectors(reader, contents)
    if "examples" not in retrieval.apart:
        retrieval.apart["examples"] = _vectors(reader, contents, keep=False)
    return retrieval.apart["examples"]


def _vectors(reader: BaseModel, contents: Contents, *, keep: bool = True) -> np.ndarray:
    """Vectors of rows: the mean of the last hidden states over the values of their features. (n, hidden)."""
    from llmfit.encoding import Encoder
    from llmfit.estimators.heads import embed
    from llmfit.heads import LinearHead

    if not contents:
        return np.empty((0, 1))
    rows = [[Segment(text, PLAIN)] for text in map(_values, contents)]
    encoder = Encoder(reader.tokenizer, whole=reader.kind != "decoder")
    prompts = [ids[: reader.context_length] for ids in encoder.prompts(rows)]
    return np.asarray(embed(reader, LinearHead(pooling="mean"), prompts, keep=keep).double().numpy())


def _values(content: tuple[Segment, ...]) -> str:
    """Take what a row says, without the template's words, which all rows share."""
    cells = [segment.text for segment in content if segment.column not in (None, PLAIN)]
    return "\n".join(cells) or segments_text(content)


def _directions(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0))


CHOICES: dict[str, Callable[..., list[list[int]]]] = {"random": _at_random, "semantic": _most_alike}
