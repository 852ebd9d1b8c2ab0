"""Several fits at once: each takes the steps that it would take alone, their rows go through one base together.

Takes a lent module with a :class:`~llmfit.adapters.bank.Bank` in it and the fits; trains the adapters and gives a
:class:`~llmfit.callbacks.State` of each. Order, loss, clipping, optimiser, schedule and dropout are each fit's own,
from :mod:`llmfit.training`; a pass through the layers is shared, in which each fit's tokens are multiplied and attend
as they do alone. A fit that fails leaves the others as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llmfit.adapters.bank import Bank, Start
from llmfit.adapters.spec import AdapterSpec
from llmfit.callbacks import Callback, State, notify
from llmfit.checkpoints import Pause
from llmfit.encoding import Encoded
from llmfit.exceptions import TrainingError
from llmfit.forward import Batch, collate, completion_logits, same_words, side_by_side
from llmfit.memory import auto_budget, bare, enough, halved, is_out_of_memory, once_more, runs_out
from llmfit.objectives import loss_mass, weighed_losses
from llmfit.packing import packed
from llmfit.training import (
    Run,
    Settings,
    check_loss,
    micro_batches,
    next_rows,
    step_seed,
    total_steps,
    update,
)

__all__ = ["Fit", "can_read_beside", "train_together"]

MOST_APART = 0.3  # share of the norm by which rounding may set adapters side by side apart; mixed up, they are 1.4


@dataclass
class Fit:
    """One of several fits.

    Parameters
    ----------
    rows : sequence of Encoded
    settings : Settings
    adapter : AdapterSpec
    shared : int
        Tokens that all prompts begin with, at least, as :func:`llmfit.forward.packable` says.
    pause : Pause or None
        Where it goes on from, and how far.
    """

    rows: Sequence[Encoded]
    settings: Settings
    adapter: AdapterSpec
    shared: int
    pause: Pause | None = None


@dataclass
class _Member:
    """A fit that trains: its place in the bank, where it stands, the rows of its step and their loss so far."""

    place: int
    run: Run
    rows: Sequence[Encoded]
    state: State
    pause: Pause | None = None
    batch: list[Encoded] = field(default_factory=list)
    loss: float = 0.0
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Leave the others; nothing that an error holds is kept."""
        self.error = self.error or bare(error)

    @property
    def trains(self) -> bool:
        """Whether a step is left to do."""
        return self.error is None and not self.state.stop and self.state.step < self.state.total_steps


@dataclass
class _Room:
    """Tokens of a pass, all fits together. A fit's own budget is not touched: it cuts steps as the fit alone does."""

    tokens: int
    warned: bool = False


@dataclass
class _Part:
    """A packed micro-batch of one member."""

    member: _Member
    rows: Sequence[Encoded]
    batch: Batch

    @property
    def tokens(self) -> int:
        """Count the tokens, those that all its rows begin with once."""
        return self.batch.input_ids.shape[1]


def train_together(
    model: Any,
    bank: Bank,
    fits: Sequence[Fit],
    *,
    device: torch.device,
    pad_id: int,
    callbacks: Sequence[Callback] = (),
) -> list[State | Exception]:
    """Train the adapters of a bank.

    Parameters
    ----------
    model : torch.nn.Module
        In training mode, lent with `bank` in it.
    bank : Bank
        Of K adapters.
    fits : sequence of Fit, length K
        Without validation.
    device : torch.device
    pad_id : int
    callbacks : sequence of Callback
        Told of the fit of most steps.

    Returns
    -------
    list of State or Exception, length K
        The error where that fit's optimiser cannot be made or fails, or a loss or a gradient is not finite.

    Raises
    ------
    BankError
        If the model's layers cannot tell the adapters apart.
    OutOfMemoryError
        If the micro-batches of fits do not even fit one by one: alone, they are cut smaller.
    """
    begun = [_begin(model, bank, i, fit, device, pad_id) for i, fit in enumerate(fits)]
    members = [member for member in begun if isinstance(member, _Member)]
    if not members:
        return [member for member in begun if isinstance(member, Exception)]
    lead = max(members, key=lambda member: member.state.total_steps)
    room = _Room(min(min(m.run.budget, enough(m.run.settings.batch_tokens, device)) for m in members))
    with packed(model):
        try:
            notify(callbacks, "on_fit_begin", lead.state)
            while active := [member for member in members if member.trains]:
                _one_step(model, bank, active, room)
                if lead.state.history and lead.error is None:
                    notify(callbacks, "on_step_end", lead.state)
        finally:
            notify(callbacks, "on_fit_end", lead.state)
    return [member if isinstance(member, Exception) else member.error or member.state for member in begun]


def _begin(model: Any, bank: Bank, place: int, fit: Fit, device: torch.device, pad_id: int) -> _Member | Exception:
    budget = auto_budget(fit.settings.batch_tokens, device)
    own = bank.starts[place].parameters
    try:
        run = Run(model, fit.settings, pad_id, budget, device, (), fit.adapter, own, shared=fit.shared)
    except Exception as error:  # of its optimiser
        if runs_out(error):
            raise  # of all of them
        return bare(error)
    state = State(total_steps(len(fit.rows), fit.settings), fit.settings.epochs)
    if fit.pause is not None:
        fit.pause.restore(run, state)
    return _Member(place, run, fit.rows, state, fit.pause)


def _one_step(model: Any, bank: Bank, active: Sequence[_Member], room: _Room) -> None:
    """Take one optimiser step of every member."""
    started = time.perf_counter()
    for member in active:
        member.batch = next_rows(member.run, member.rows, member.state)
    _within_memory(model, bank, active, room)
    for member in active:
        try:
            if member.error is None:
                update(member.run, member.batch, member.state, member.loss)
        except Exception as error:
            if runs_out(error):
                raise  # of all of them
            member.fail(error)
    seconds = time.perf_counter() - started
    for member in active:
        if member.error is None:
            member.state.history[-1]["seconds"] = seconds / len(active)
            if member.pause is not None:
                member.pause.save(member.run, member.state)


def _within_memory(model: Any, bank: Bank, active: Sequence[_Member], room: _Room) -> None:
    """Add up gradients; where memory runs out, bring fewer micro-batches together and begin again."""

    def forget() -> None:
        for member in active:
            member.run.optimizer.zero_grad(set_to_none=True)

    while True:
        try:
            return once_more(partial(_accumulate, model, bank, active, room), undo=forget)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            forget()
            error.__traceback__ = None  # its frames hold the tensors
        cut = _passes(active, room)
        size = max(sum(part.tokens for part in parts) for parts in cut)
        least = max(part.tokens for parts in cut for part in parts)
        room.tokens, room.warned = halved(size, "tokens", least=least, warn=not room.warned), True


def _accumulate(model: Any, bank: Bank, active: Sequence[_Member], room: _Room) -> None:
    """Add up the gradients of all members' micro-batches, and each one's mean loss in nats per token."""
    for member in active:
        member.loss = 0.0
        bank.draw_from(member.place, step_seed(member.run.settings.seed, member.state.step))
    for parts in _passes(active, room):
        batch = side_by_side([part.batch for part in parts])
        with bank.reading([(part.member.place, part.tokens) for part in parts]):
            losses = torch.split(weighed_losses(model, batch), [len(part.batch.targets) for part in parts])
        sound = []
        for part, own in zip(parts, losses, strict=True):
            member = part.member
            loss = own.sum() / loss_mass(member.batch)
            try:
                member.loss += check_loss(loss, part.rows, member.state)
                sound.append(loss)
            except TrainingError as error:
                member.fail(error)
        if sound:
            torch.stack(sound).sum().backward()  # type: ignore[no-untyped-call]


def _passes(active: Sequence[_Member], room: _Room) -> list[list[_Part]]:
    """Put micro-batches side by side as far as there is room, no two of a member: dropout draws in order."""
    cut = [(member, micro_batches(member.run, member.batch)) for member in active]
    passes: list[list[_Part]] = []
    for i in range(max(len(parts) for _, parts in cut)):
        tokens = room.tokens
        for member, parts in cut:
            if i < len(parts):
                rows, shared = parts[i]
                batch = collate(rows, member.run.pad_id, member.run.device, shared=shared)
                part = _Part(member, rows, batch)
                if tokens + part.tokens > room.tokens:
                    passes.append([])
                    tokens = 0
                passes[-1].append(part)
                tokens += part.tokens
    return passes


def can_read_beside(model: Any, bank: Bank, fits: Sequence[Fit], *, device: torch.device, pad_id: int) -> bool:
    """See once whether a model reads the rows of several adapters at once as it reads them one after the other.

    The adapters are full of random numbers meanwhile: as they begin, they change nothing, and could be mixed up.

    Warns
    -----
    PackingWarning
        If it does not.
    """
    places = range(2)
    rows = [fits[0].rows[0]._replace(shares=None), fits[1].rows[-1]._replace(shares=None)]

    def read() -> list[torch.Tensor]:
        batches = [
            collate([row], pad_id, device, shared=fits[place].shared) for place, row in zip(places, rows, strict=True)
        ]
        tokens = [(place, batch.input_ids.shape[1]) for place, batch in zip(places, batches, strict=True)]
        alone, again = [], []
        for place, row in zip(places, rows, strict=True):
            padded = collate([row], pad_id, device)  # rounded otherwise, as sums over several rows are on some devices
            with bank.reading([(place, padded.input_ids.numel())]):
                again.append(completion_logits(model, padded))
        with packed(model):
            for batch, own in zip(batches, tokens, strict=True):
                with bank.reading([own]):
                    alone.append(completion_logits(model, batch))
            with bank.reading(tokens):
                return [torch.cat(alone), completion_logits(model, side_by_side(batches)), torch.cat(again)]

    with _stirred([bank.starts[place] for place in places]):
        back = (bank.together, "on the way back")
        return same_words(model, "beside", read, bank.together, most=MOST_APART) and same_words(
            model, "beside", bank.both_ways, back
        )


@contextmanager
def _stirred(starts: Sequence[Start]) -> Iterator[None]:
    """Inside, fill adapters with random numbers, with updates of what a layer reads that are as long as that.

    Larger ones would make so much of rounding that nothing is to be seen behind it. Nobody else's numbers are drawn.
    """
    parameters = [p for start in starts for p in start.parameters.values()]
    before = [p.detach().clone() for p in parameters]
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for start in starts:
            for update in start.layers.values():
                for name, size in ((update.a, 1.0), (update.b, update.scaling or 1.0)):
                    p = start.parameters[name]
                    p.copy_(torch.randn(p.shape, generator=source) * p.shape[-1] ** -0.5 / size)
        try:
            yield
        finally:
            for p, own in zip(parameters, before, strict=True):
                p.copy_(own)
