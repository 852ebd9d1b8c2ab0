"""Segments become token ids: prompt and completion apart, the same way in training and prediction.

Takes segments and a tokenizer; gives :class:`Encoded` rows. Knows no pandas and no model. Text in a cell never
turns into a control token; a prompt that is too long loses text from its longest values only, and says so.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from llmfit.exceptions import ModelLoadError, TemplateError
from llmfit.templates import PLAIN, Segment, segments_text

__all__ = ["Answer", "Encoded", "Encoder", "Ids", "Limit", "cut_text"]

Ids = tuple[int, ...]
MOST_BYTES = 2**27  # of the texts whose tokens are kept, and of the tokens
EACH = 300  # bytes that a text takes beside its characters and tokens
BEFORE = ("\n", "\t", "|", ".")  # texts that tokenizers seldom join with what follows


class _Texts(dict[str, "array[int]"]):
    """Texts and their tokens, up to a bound; where it is reached, all are forgotten."""

    size = 0

    def remember(self, found: dict[str, Any]) -> None:
        """Add texts that are not known yet; one alone is no row set, but a try of how long a prompt may be."""
        new = sum(len(text) + 4 * len(ids) + EACH for text, ids in found.items())
        if len(found) < 2 or new > MOST_BYTES:
            return
        if self.size + new > MOST_BYTES:
            self.clear()
            self.size = 0
        self.update((text, array("i", ids)) for text, ids in found.items())
        self.size += new


_tokenised: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


class Answer(NamedTuple):
    """An answer as token ids.

    Parameters
    ----------
    ids : tuple of int
        The closing token included.
    shares : tuple of float or None
        See :class:`Encoded`.
    """

    ids: Ids
    shares: tuple[float, ...] | None = None


class Encoded(NamedTuple):
    """One row as token ids.

    Parameters
    ----------
    prompt : tuple of int
        Ids that carry no loss.
    completion : tuple of int
        Ids that carry loss, the closing token included; () where the answer is not known.
    row : int
        Position of the row in the frame.
    weight : float
        Weight of each of the row's loss tokens.
    cut : int
        Characters that truncation took from the prompt.
    target : tuple of float or None
        What a head is to answer: a class's position, a number, or a 0 or 1 for each label. None where the answer is
        `completion`.
    shares : tuple of float or None
        What the loss of each token of the completion weighs, beside `weight`; 0 for one that is given, not answered.
        None where each weighs 1.
    said : tuple of int
        What the decoder of an encoder-decoder has said before the completion.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()
    row: int = 0
    weight: float = 1.0
    cut: int = 0
    target: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None
    said: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of prompt and completion, and of what was said between, together."""
        return len(self.prompt) + len(self.said) + len(self.completion)

    @property
    def first(self) -> int:
        """First position that carries loss; the very first token of a text has nothing to be predicted from."""
        return max(len(self.prompt), 1)

    @property
    def mass(self) -> float:
        """What the row's loss tokens, or a head's answer to it, weigh together, before `weight`."""
        if self.target is not None:
            return 1
        if self.shares is not None:
            return sum(self.shares[self.first - len(self.prompt) :])
        return self.length - self.first


@dataclass(frozen=True)
class Limit:
    """How many tokens a row may have, and what happens to a longer prompt.

    Parameters
    ----------
    max_length : int
        Tokens of prompt and completion together; of each alone where they are apart.
    truncation : "error" or "prompt"
    reserve : int
        Tokens kept free for an answer that is not known yet.
    alike : bool
        Keep the reserve free where the answer is known, too, so that a prompt is cut alike with and without it.
    apart : int
        Tokens that a decoder begins from which answers beside the prompt; 0 where the answer goes on behind it.
    """

    max_length: int
    truncation: str = "error"
    reserve: int = 0
    alike: bool = False
    apart: int = 0

    def room(self, answer: int) -> int:
        """Tokens that a prompt may have before an answer of so many tokens, 0 where it is not known.

        Below 1 where the answer itself is too long.
        """
        kept = max(answer, self.reserve) if self.alike or not answer else answer
        if self.apart:
            kept += self.apart - 1  # the decoder does not read the answer's last token
        return self.max_length if self.apart and kept <= self.max_length else self.max_length - kept


class Encoder:
    """Token ids of prompts and completions for one tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    chat : bool
        Prompts come out of a chat template, which writes its own special tokens.
    closing : str
        What the chat template puts behind an answer; its first special token ends a completion.
    whole : bool
        A prompt is a text of its own, as encoders read it, closed with the tokenizer's own special tokens; else the
        answer goes on behind it.

    Attributes
    ----------
    opening : tuple of int
        What a text begins with.
    end_ids : tuple of int
        Tokens that end an answer, the one to learn first.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = False, closing: str = "", whole: bool = False) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_vocab()
        marks = sorted((text for text in added if len(text) > 1 and text.strip()), key=len, reverse=True)
        self._marks = re.compile(f"(?=({'|'.join(map(re.escape, marks))}))") if marks else None
        self._whole = whole
        self._before = self._find_before()
        opening, ending = self._special_ends()
        self.opening: Ids = () if chat else opening
        self._ending: Ids = ending if whole else ()
        self.end_ids = self._end_ids(closing, set(added.values()))

    @property
    def end_id(self) -> int:
        """The token that closes a completion."""
        if not self.end_ids:
            raise ModelLoadError("The base model's tokenizer has no end-of-text token, so that no answer could end.")
        return self.end_ids[0]

    def _find_before(self) -> str:
        """Find a text to put before a piece, where the tokenizer writes the beginning of a text in its own way.

        Tokenizers of the SentencePiece kind put a space before a text. A piece in its middle has none, and is encoded
        behind this text, whose ids are dropped again. "" where a piece reads alike everywhere.
        """
        for before in BEFORE:
            head, inside, alone = self._ids([before, before + "a", "a"])
            if inside[: len(head)] == head:
                return before if inside[len(head) :] != alone else ""
        return ""

    def _inner_ids(self, pieces: list[str]) -> list[list[int]]:
        """Encode pieces as they read inside a text."""
        if not self._before or not pieces:
            return self._ids(pieces)
        head, *behind = self._ids([self._before, *(self._before + piece for piece in pieces)])
        alone = self._ids(pieces)
        return [ids[len(head) :] if ids[: len(head)] == head else own for ids, own in zip(behind, alone, strict=True)]

    def _special_ends(self) -> tuple[Ids, Ids]:
        """Find the ids that the tokenizer itself puts before and behind a text (BOS, EOS, CLS, SEP or nothing)."""
        bare = self._ids(["a"])[0]
        whole = list(self.tokenizer("a")["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        start = next(starts, 0)
        return tuple(whole[:start]), tuple(whole[start + len(bare) :])

    def _end_ids(self, closing: str, special: set[int]) -> tuple[int, ...]:
        """Ids that end an answer, the one to learn first."""
        closing_ids = [i for i in self._ids([closing])[0] if i in special] if closing.strip() else []
        ends = [*closing_ids[:1], self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ends if i is not None))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts, those aside that this process knows: the fits of a search meet the same rows."""
        known = _tokenised.setdefault(self.tokenizer, _Texts())
        found: dict[str, Any] = {text: known.get(text) for text in texts}
        missing = [text for text, ids in found.items() if ids is None]
        if missing:
            how = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
            found |= zip(missing, self.tokenizer(missing, **how)["input_ids"], strict=True)
            known.remember({text: found[text] for text in missing})
        return [list(found[text] or ()) for text in texts]

    def prompts(self, rows: Sequence[Sequence[Segment]]) -> list[tuple[int, ...]]:
        """Encode prompts, with the special tokens that open a text.

        A prompt without any token is the end-of-text token: the model must begin from something.

        Parameters
        ----------
        rows : sequence of sequences of Segment, length n

        Returns
        -------
        list of tuple of int, length n
        """
        ids = self._joined([self._pieces(row) for row in rows])
        return [self._opened(own) + self._ending or (self.end_id,) for own in ids]

    def _opened(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Put the opening before a text that does not begin with it."""
        return ids if ids[: len(self.opening)] == self.opening else self.opening + ids

    def completions(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode answers, without special tokens and without the closing token."""
        return self._joined([self._pieces([Segment(text, PLAIN)]) for text in texts], inner=not self._whole)

    def closed(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode answers, each with the token that closes it."""
        return [(*ids, self.end_id) for ids in self.completions(texts)]

    def cue(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """Encode what stands between an answer and the next one, without the token that closes an answer."""
        (ids,) = self._joined([self._pieces(segments)], inner=True)
        return ids[ids.index(self.end_id) + 1 :] if self.end_id in ids else ids

    def _joined(self, rows: list[list[str]], *, inner: bool = False) -> list[tuple[int, ...]]:
        """Encode the pieces of every row in one call, and join the ids of each row.

        `inner` says that the rows themselves go on with a text; what follows a row's first piece does in any case.
        """
        first = [pieces[0] for pieces in rows if pieces]
        begun = iter(self._inner_ids(first) if inner else self._ids(first))
        going_on = iter(self._inner_ids([piece for pieces in rows for piece in pieces[1:]]))
        return [tuple(i for k in range(len(pieces)) for i in (next(going_on) if k else next(begun))) for pieces in rows]

    def _pieces(self, segments: Sequence[Segment]) -> list[str]:
        """Split a text where a cell would spell a special token, so that it stays text."""
        text = segments_text(segments)
        if self._marks is None or not text:
            return [text] if text else []
        breaks = [0]
        ends = list(accumulate(len(segment.text) for segment in segments))
        for match in self._marks.finditer(text):
            start, end = match.start(), match.start() + len(match.group(1))
            if _touches_cell(segments, ends, start, end):
                breaks.append(start + 1)
        return [text[i:j] for i, j in zip(breaks, [*breaks[1:], len(text)], strict=True) if i < j]

    def encode(
        self,
        rows: Sequence[Sequence[Segment]],
        completions: Sequence[str] | Sequence[Answer] | None,
        limit: Limit,
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[object] | None = None,
    ) -> list[Encoded]:
        """Encode rows within a limit of tokens.

        Parameters
        ----------
        rows : sequence of sequences of Segment, length n
        completions : sequence of str or of Answer, length n, or None where answers are to be predicted
        limit : Limit
        weights : sequence of float, length n, default=None
        names : sequence, length n, default=None
            Index labels of the rows, for the sentences.

        Returns
        -------
        list of Encoded, length n

        Raises
        ------
        TemplateError
            If a row does not fit, and may not or cannot be cut.
        """
        prompts = self.prompts(rows)
        answers = self._answers(completions) if completions else [Answer(())] * len(rows)
        encoded = []
        for row, (prompt, segments) in enumerate(zip(prompts, rows, strict=True)):
            answer, weight = answers[row], weights[row] if weights is not None else 1.0
            room, cut = limit.room(len(answer.ids)), 0
            if len(prompt) > room:
                name = f"Row {row} (index {names[row] if names is not None else row!r})"
                prompt, cut = self._cut(segments, len(prompt), room, limit, name)
            encoded.append(Encoded(prompt, answer.ids, row, weight, cut, shares=answer.shares))
        return encoded

    def _answers(self, completions: Sequence[str] | Sequence[Answer]) -> list[Answer]:
        """Encode answers that are still texts."""
        closed = iter(self.closed([text for text in completions if isinstance(text, str)]))
        return [answer if isinstance(answer, Answer) else Answer(next(closed)) for answer in completions]

    def _cut(
        self, segments: Sequence[Segment], length: int, room: int, limit: Limit, name: str
    ) -> tuple[tuple[int, ...], int]:
        """Cut the longest values of a prompt to the largest common length at which it fits."""
        if room < 1:
            raise TemplateError(
                f"{name}: the answer has {limit.max_length - room} tokens, max_length is {limit.max_length}. "
                "An answer is never cut: raise max_length."
            )
        kept = limit.max_length - room
        if limit.truncation == "error":
            raise TemplateError(
                f"{name}: the prompt has {length} tokens{f' and {kept} are for the answer' if kept else ''}, "
                f"max_length is {limit.max_length}. Raise max_length, or set truncation='prompt'."
            )
        low, high = 0, max((len(s.text) for s in segments if _cuttable(s)), default=0)
        best = self.prompts([_capped(segments, 0)])[0]
        if len(best) > room:
            room_for = f"leaves no room for an answer of {kept} within" if kept else "is more than"
            raise TemplateError(
                f"{name}: the template without any value has {len(best)} tokens, which {room_for} max_length "
                f"{limit.max_length}. Raise max_length."
            )
        while high - low > 1:
            middle = (low + high) // 2
            ids = self.prompts([_capped(segments, middle)])[0]
            low, high, best = (middle, high, ids) if len(ids) <= room else (low, middle, best)
        return best, len(segments_text(segments)) - len(segments_text(_capped(segments, low)))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn an answer's ids back into text, without special tokens."""
        if not self._before or self._whole:
            return self._decode(ids)
        head = self._ids([self._before])[0]
        return self._decode([*head, *ids]).removeprefix(self._decode(head))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut_text(segments: Sequence[Segment], cut: int) -> str:
    """Write a prompt as truncation left it when it took `cut` characters from the longest values."""
    whole = len(segments_text(segments))
    longest = max((len(segment.text) for segment in segments if _cuttable(segment)), default=0)
    lengths = range(longest + 1)
    most = bisect_left(lengths, whole - cut, key=lambda most: len(segments_text(_capped(segments, most))))
    return segments_text(_capped(segments, most))


def _cuttable(segment: Segment) -> bool:
    return segment.column is not None and segment.column != PLAIN


def _capped(segments: Sequence[Segment], most: int) -> list[Segment]:
    return [Segment(s.text[:most], s.column) if _cuttable(s) else s for s in segments]


def _touches_cell(segments: Sequence[Segment], ends: list[int], start: int, end: int) -> bool:
    """Tell whether the characters from start to end are partly in a cell, or span a seam."""
    first = next(i for i, stop in enumerate(ends) if stop > start)
    return segments[first].column is not None or ends[first] < end
