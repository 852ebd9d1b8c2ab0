"""Batched generation of answers.

Takes a lent module in evaluation mode and prompts as token ids; gives the answers' ids. Knows no pandas and no
estimator. Every prompt has one answer back; an answer ends at an end-of-text token, and those that did not are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from llmfit.batching import PAD_STEP, length_batches
from llmfit.encoding import Encoded, Ids
from llmfit.exceptions import check_choice, check_int, check_keys, check_number, parameter_error
from llmfit.forward import PackedPrompts, PaddedPrompts, begin, generation_inputs
from llmfit.memory import auto_budget
from llmfit.packing import by_beginning, common_prefix
from llmfit.scoring import run_batches

__all__ = ["Generation", "check_least", "generate", "generation_config", "resolve_generation"]


@dataclass(frozen=True)
class Generation:
    """How answers are generated; greedy by default.

    Parameters
    ----------
    max_new_tokens : int or None, default=None
        Longest answer in tokens; None is twice the longest answer seen in `fit`, at least 32.
    min_new_tokens : int, default=0
    do_sample : bool, default=False
        Draw tokens rather than take the likeliest; seeded by random_state.
    temperature, top_p : float, default=1.0
    top_k : int, default=0
        Draw among the k likeliest; 0 for all.
    num_beams : int, default=1
    repetition_penalty, length_penalty : float, default=1.0
    no_repeat_ngram_size : int, default=0
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", "generation", self.max_new_tokens, least=1)
        for name, least in (("min_new_tokens", 0), ("top_k", 0), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
            check_int(name, "generation", getattr(self, name), least=least)
        for name in ("temperature", "repetition_penalty"):
            check_number(name, "generation", getattr(self, name), least=0, open_ends=True)
        check_number("top_p", "generation", self.top_p, least=0, most=1)
        check_number("length_penalty", "generation", self.length_penalty)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise parameter_error("min_new_tokens", "generation", "at most max_new_tokens", self.min_new_tokens)
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise parameter_error("num_beams", "generation", "> 1 where length_penalty is set", self.num_beams)
        check_choice("do_sample", "generation", self.do_sample, [True, False])
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise parameter_error(
                "do_sample", "generation", "True where temperature, top_p or top_k is set", self.do_sample
            )


def resolve_generation(value: Any) -> Generation:
    """Turn None, a dict or a Generation into checked settings.

    Raises
    ------
    ParameterError
        If a key is unknown or a value cannot be used.
    """
    if value is None:
        value = {}
    if isinstance(value, Generation):
        value = asdict(value)
    if not isinstance(value, Mapping):
        raise parameter_error("generation", "the estimator", "None or a dict", value)
    check_keys("generation", value, [f.name for f in fields(Generation)])
    settings = Generation(**value)
    settings.check()
    return replace(  # transformers refuses ints here
        settings,
        temperature=float(settings.temperature),
        top_p=float(settings.top_p),
        repetition_penalty=float(settings.repetition_penalty),
        length_penalty=float(settings.length_penalty),
    )


def check_least(settings: Generation, most: int) -> None:
    """Raise where answers may not be as long as they must be.

    Parameters
    ----------
    most : int
        Longest answer, in tokens, where the settings do not say it.
    """
    if settings.min_new_tokens > most:
        raise parameter_error(
            "min_new_tokens", "generation", f"at most {most}, the longest answer", settings.min_new_tokens
        )


def generate(
    model: Any,
    prompts: Sequence[Ids],
    settings: Generation,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    context_length: int,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    said: Sequence[Ids] | None = None,
    batch_tokens: Any = "auto",
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[Ids], int]:
    """Generate an answer to every prompt.

    Parameters
    ----------
    model : torch.nn.Module
    prompts : sequence of tuple of int, length n
        Equal prompts are computed once, unless answers are drawn.
    settings : Generation
    end_ids : sequence of int
        Tokens that end an answer.
    max_new_tokens : int
    context_length : int
        Tokens of prompt and answer that the model can hold, or of each where they are apart: ends an answer too.
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    said : sequence of tuple of int, length n, or None
        What it has said behind that, before each answer: penalties on what was said count it.
    progress : callable
        Told the number of prompts done.

    Returns
    -------
    list of tuple of int, length n
        Answers without the token that ended them.
    int
        Answers that reached `max_new_tokens`, or the end of the context, without an end of their own.
    """
    _forget_own_settings(model)
    asked = list(zip(prompts, said or [()] * len(prompts), strict=True))
    times = Counter(() if settings.do_sample else asked)  # answers that are drawn differ where prompts are equal
    rows = [Encoded(prompt, said=before) for prompt, before in (asked if settings.do_sample else times)]
    answers: list[Ids] = [()] * len(rows)
    taken = [len(start_ids) + len(row.said) - 1 if start_ids else row.length for row in rows]
    rooms = [min(max_new_tokens, context_length - tokens) for tokens in taken]
    # Penalties on what was said count a decoder's prompt and padding as said: then only prompts of one length answer
    # together, unpadded.
    counting = not start_ids and (settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size > 0)
    kinds = [(room, row.length if counting else 0) for room, row in zip(rooms, rows, strict=True)]
    budget = auto_budget(batch_tokens, device)
    where = {"pad_id": pad_id, "device": device, "room": max_new_tokens, "budget": budget}
    begins = not start_ids and settings.num_beams == 1  # beams copy no cache that is given
    for positions, begun in _behind(model, rows, where) if begins else [([*range(len(rows))], None)]:
        for kind in sorted({kinds[i] for i in positions}, reverse=True):  # rows near the context's end answer apart
            alike = [i for i in positions if kinds[i] == kind]
            some = [rows[i] for i in alike]
            config = generation_config(settings, end_ids, kind[0], pad_id, start_ids)

            def answer_batch(part: list[Encoded], config: Any = config, begun: Any = begun) -> list[Ids]:
                step = 1 if counting else PAD_STEP
                return _generate_batch(model, part, config, device, pad_id, start_ids, step=step, begun=begun)

            batches = _batches(some, kind[0], begun, budget)
            for batch, ids in run_batches(some, batches, answer_batch):
                for position, answer in zip(batch, ids, strict=True):
                    answers[alike[position]] = answer
                    row = rows[alike[position]]
                    progress(times[row.prompt, row.said] or 1)
    if not settings.do_sample:
        known = {(row.prompt, row.said): answer for row, answer in zip(rows, answers, strict=True)}
        answers = [known[one] for one in asked]
    ended = [_until_end(answer, end_ids) for answer in answers]
    return [answer for answer, _ in ended], sum(not stopped for _, stopped in ended)


def _behind(
    model: Any, rows: Sequence[Encoded], where: dict[str, Any]
) -> Iterator[tuple[list[int], PaddedPrompts | PackedPrompts | None]]:
    """Part rows by what they begin with, read when the turn of a part comes; those that are read whole come last."""
    prompts = [row.prompt for row in rows]
    whole: list[int] = []
    able = True
    for positions, shared in by_beginning(prompts, common_prefix(prompts), where["budget"]):
        begun = begin(model, [prompts[i] for i in positions], **where) if able else None
        if begun is not None:
            yield positions, begun
            continue
        able = able and (len(positions) < 2 or shared < PAD_STEP)  # else the model cannot, or memory holds no more
        whole += positions
    if whole:
        yield sorted(whole), None


def _batches(
    rows: Sequence[Encoded], room: int, begun: PaddedPrompts | PackedPrompts | None, budget: int
) -> Iterator[list[int]]:
    """Part rows into batches by what keys and values they keep, those of their answers too.

    Prompts take half of the budget, and leave the other half for answers. Where what they begin with is held once, a
    row takes its own tokens, padding, and the room for its answer, but no more than it would take whole; and what is
    copied of the beginning for each row.
    """
    if begun is None:
        return length_batches(rows, max(1, budget // 2))
    read = len(begun.ids)
    own = [
        row._replace(prompt=row.prompt[read:], completion=(0,) * min(room + begun.copied, row.length + read))
        for row in rows
    ]
    return length_batches(own, budget, alike=begun.pads)


def _forget_own_settings(model: Any) -> None:
    """Take the settings away that a model brings: they would fill in whatever ours leave open."""
    from transformers import GenerationConfig

    for module in model.modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = GenerationConfig()


def generation_config(
    settings: Generation, end_ids: Sequence[int], max_new_tokens: int, pad_id: int, start_ids: Ids = ()
) -> Any:
    """Say the settings in the words of transformers, a ``GenerationConfig``."""
    from transformers import GenerationConfig

    given = asdict(settings)
    if not settings.do_sample:
        given |= {"temperature": None, "top_p": None, "top_k": None}
    if settings.num_beams == 1:
        del given["length_penalty"]
    given["max_new_tokens"] = max_new_tokens
    if start_ids:
        given["decoder_start_token_id"] = start_ids[0]
    return GenerationConfig(**given, eos_token_id=list(end_ids), pad_token_id=pad_id)


@torch.inference_mode()
def _generate_batch(
    model: Any,
    rows: list[Encoded],
    config: Any,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    *,
    step: int = PAD_STEP,
    begun: PaddedPrompts | PackedPrompts | None = None,
) -> list[Ids]:
    prompts, said = [row.prompt for row in rows], [row.said for row in rows]
    given, before = generation_inputs(
        model, prompts, pad_id=pad_id, device=device, start_ids=start_ids, said=said, step=step, begun=begun
    )
    with nullcontext() if begun is None else begun.attending(model):
        out = model.generate(**given, generation_config=config)
    return [tuple(row) for row in out[:, before:].tolist()]


def _until_end(answer: Ids, end_ids: Sequence[int]) -> tuple[Ids, bool]:
    """Cut an answer at its first end token; tell whether there was one."""
    for i, token in enumerate(answer):
        if token in end_ids:
            return answer[:i], True
    return answer, False
