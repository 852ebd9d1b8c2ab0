"""The one training loop.

Takes a lent module, encoded rows and :class:`Settings`; changes the module's trainable weights and gives a
:class:`~llmfit.callbacks.State`. Knows no pandas and no estimator, and of an adapter only its say in a step. The
gradient of a step is that of the summed loss over the summed weights of its rows, however the step is cut into
micro-batches; order and randomness come from the seed and the step alone, so that training can go on from any step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llmfit.adapters import AdapterSpec
from llmfit.answers import collate_answers, packable_answers
from llmfit.batching import epoch_order, length_batches
from llmfit.callbacks import Callback, State, notify
from llmfit.checkpoints import Checkpoint, Pause
from llmfit.encoding import Encoded, Ids
from llmfit.exceptions import TrainingError, quoted
from llmfit.forward import collate, packable
from llmfit.memory import auto_budget, halved, is_out_of_memory, once_more, one_memory_error
from llmfit.objectives import loss_mass, objective_of
from llmfit.optim import by_rate, learning_rate_at, make_optimizer, set_rate
from llmfit.packing import cut_step, extent, packed, parted

__all__ = [
    "Run",
    "Settings",
    "check_loss",
    "mean_loss",
    "micro_batches",
    "next_rows",
    "step_seed",
    "total_steps",
    "train",
    "update",
]


@dataclass(frozen=True)
class Settings:
    """How to train; every number checked by the estimator.

    Parameters
    ----------
    epochs : int
    batch_size : int
        Rows per optimiser step.
    batch_tokens : int or "auto"
        Tokens of one forward pass, padding included.
    learning_rate, weight_decay, warmup : float
    schedule : str
    optimizer : str or dict
    max_grad_norm : float or None
        Gradients are scaled down to this norm; None leaves them.
    seed : int
    restore_best : bool
        End with the weights of the epoch of lowest validation loss.
    objective : str or tuple of Part
        See :func:`llmfit.objectives.objective_of`.
    """

    epochs: int
    batch_size: Any  # an int once training begins
    learning_rate: float
    batch_tokens: Any = "auto"
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: str = "cosine"
    optimizer: Any = "adamw"
    max_grad_norm: float | None = 1.0
    seed: int = 0
    restore_best: bool = False
    objective: Any = "supervised"


@dataclass
class Run:
    """What a fit holds while it trains.

    Parameters
    ----------
    parameters : dict of str to Parameter
        What is trained; all of the model that require gradients where none are given.
    """

    model: Any
    settings: Settings
    pad_id: int
    budget: int
    device: torch.device
    start_ids: Ids
    adapter: AdapterSpec
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer = field(init=False)
    shared: int | None = None  # tokens that all rows begin with, where they are packed
    held: int | None = None  # the same of the rows that it is validated on, of which training knows nothing
    best: dict[str, torch.Tensor] | None = None
    warned: bool = False

    def __post_init__(self) -> None:
        named = self.model.named_parameters()
        self.parameters = self.parameters or {name: p for name, p in named if p.requires_grad}
        self.optimizer = make_optimizer(
            self.settings.optimizer,
            by_rate(self.parameters, self.adapter.rate),
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
        )


def total_steps(n_rows: int, settings: Settings) -> int:
    """Count the optimiser steps of a fit."""
    return int(math.ceil(n_rows / settings.batch_size) * settings.epochs)


def train(
    model: Any,
    rows: Sequence[Encoded],
    settings: Settings,
    *,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    adapter: AdapterSpec | None = None,
    validation: Sequence[Encoded] = (),
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | Pause | None = None,
) -> State:
    """Train the weights of `model` that require gradients.

    Parameters
    ----------
    model : torch.nn.Module
        In training mode, as :meth:`llmfit.base_model.BaseModel.attach` lends it.
    rows : sequence of Encoded, length n_rows
    settings : Settings
    device : torch.device
    pad_id : int
    start_ids : tuple of int
        What the decoder of an encoder-decoder begins from.
    adapter : AdapterSpec or None
        Has a say in rates, in the loss and after each step; None has none.
    validation : sequence of Encoded
        Rows whose loss is measured after every epoch; () for none.
    callbacks : sequence of Callback
    checkpoint : Checkpoint, Pause or None
        Where to begin, if something is there, and where to leave states on the way.

    Returns
    -------
    State

    Raises
    ------
    TrainingError
        If a loss or a gradient is not finite.
    OutOfMemoryError
        If not even one row fits.
    """
    budget = auto_budget(settings.batch_tokens, device)
    run = Run(model, settings, pad_id, budget, device, start_ids, adapter or AdapterSpec())
    run.shared, run.held = _shared(run, rows), _shared(run, validation)
    state = State(total_steps=total_steps(len(rows), settings), epochs=settings.epochs)
    if checkpoint is not None:
        checkpoint.restore(run, state)
    try:
        notify(callbacks, "on_fit_begin", state)
        while state.step < state.total_steps and not state.stop:
            with _reading(model, run.shared):
                ended = _steps(run, rows, state, callbacks, checkpoint)
            if ended:
                _end_epoch(run, validation, state, callbacks)
                if checkpoint is not None:
                    checkpoint.save(run, state)
    finally:
        notify(callbacks, "on_fit_end", state)
    if run.best is not None and settings.restore_best:
        _load(run.parameters, run.best)
    return state


def _shared(run: Run, rows: Sequence[Encoded]) -> int | None:
    """Say how many tokens these rows may share, packed; None where they have to be padded, or there are none."""
    if rows and rows[0].target is not None:
        return packable_answers(run.model, rows, pad_id=run.pad_id, device=run.device)
    return packable(run.model, rows, pad_id=run.pad_id, device=run.device, start_ids=run.start_ids)


def _reading(model: Any, shared: int | None) -> AbstractContextManager[None]:
    """Let a model read rows packed inside, where they share so many tokens, or padded."""
    return packed(model) if shared is not None else nullcontext()


def _steps(
    run: Run,
    rows: Sequence[Encoded],
    state: State,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | Pause | None,
) -> bool:
    """Take the steps of an epoch that are left; tell whether its end was reached, behind which there is more to do."""
    while state.step < state.total_steps and not state.stop:
        _one_step(run, rows, state, callbacks)
        if state.step % (state.total_steps // state.epochs) == 0:
            return True
        if checkpoint is not None:
            checkpoint.save(run, state)
    return False


def _one_step(run: Run, rows: Sequence[Encoded], state: State, callbacks: Sequence[Callback]) -> None:
    """Take one optimiser step and record it."""
    started = time.perf_counter()
    batch = next_rows(run, rows, state)
    loss = _within_memory(run, batch, run.shared, lambda: _accumulate(run, batch, state))
    update(run, batch, state, loss)
    state.history[-1]["seconds"] = time.perf_counter() - started
    notify(callbacks, "on_step_end", state)


def next_rows(run: Run, rows: Sequence[Encoded], state: State) -> list[Encoded]:
    """Choose the rows of the next step; count the epoch that it belongs to."""
    settings, per_epoch = run.settings, state.total_steps // state.epochs
    state.epoch, index = state.step // per_epoch + 1, state.step % per_epoch
    order = epoch_order(len(rows), settings.seed, state.epoch)
    return [rows[i] for i in order[index * settings.batch_size : (index + 1) * settings.batch_size]]


def update(run: Run, batch: Sequence[Encoded], state: State, loss: float) -> None:
    """Take the step that the gradients of these rows point to, and record it."""
    settings = run.settings
    rate = learning_rate_at(
        state.step,
        state.total_steps,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
    )
    norm = _clip(run, batch, state)
    set_rate(run.optimizer, rate)
    with one_memory_error("what the optimizer keeps of the weights"):
        run.optimizer.step()
    state.step += 1
    run.adapter.end_step(run.model, state.step)
    run.optimizer.zero_grad(set_to_none=True)
    state.history.append(
        {
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(row.length for row in batch),
        }
    )


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: from the fit's seed and the step alone."""
    return (seed * 1_000_003 + step + 1) % 2**63


def _accumulate(run: Run, batch: Sequence[Encoded], state: State) -> float:
    """Add up the gradients of a step's micro-batches; return its mean loss in nats per token."""
    torch.manual_seed(step_seed(run.settings.seed, state.step))
    mass = loss_mass(batch)
    total = 0.0
    for micro, shared in micro_batches(run, batch):
        together = _collate(micro, run.pad_id, run.device, run.start_ids, shared)
        loss = objective_of(run.settings.objective)(run.model, together) / mass
        total += check_loss(loss, micro, state)
        loss.backward()  # type: ignore[no-untyped-call]
    penalty = run.adapter.penalty(run.model)  # once a step, however it is cut up
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    return total


def micro_batches(run: Run, batch: Sequence[Encoded]) -> list[tuple[list[Encoded], int | None]]:
    """Part the rows of a step into those that go through the network at once, each with what its rows share."""
    return cut_step(batch, run.shared, run.budget)


def check_loss(loss: torch.Tensor, rows: Sequence[Encoded], state: State) -> float:
    """Give a loss as a number; raise a TrainingError where it is none."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _not_finite(f"The loss is {value}", rows, state)
    return value


def _collate(
    rows: Sequence[Encoded], pad_id: int, device: torch.device, start_ids: Ids, shared: int | None = None
) -> Any:
    """Put rows together into a batch of tokens to predict, or of rows for a head to answer."""
    if rows[0].target is not None:
        return collate_answers(rows, pad_id, device, shared)
    return collate(rows, pad_id, device, start_ids, shared=shared)


def _clip(run: Run, batch: Sequence[Encoded], state: State) -> float:
    """Scale the gradients down to the allowed norm; return the norm before."""
    most = math.inf if run.settings.max_grad_norm is None else run.settings.max_grad_norm
    norm = float(torch.nn.utils.clip_grad_norm_(run.parameters.values(), most))
    if not math.isfinite(norm):
        raise _not_finite(f"The norm of the gradient is {norm}", batch, state)
    return norm


def _not_finite(what: str, batch: Sequence[Encoded], state: State) -> TrainingError:
    return TrainingError(
        f"{what} at step {state.step + 1} of {state.total_steps} (rows {quoted(row.row for row in batch)}). "
        "Try a lower learning_rate, a longer warmup, a smaller max_grad_norm or dtype='float32'."
    )


def _within_memory(run: Run, rows: Sequence[Encoded], shared: int | None, work: Callable[[], Any]) -> Any:
    """Do some work on rows; where memory runs out, halve the token budget and do it again from the start."""
    forget = partial(run.optimizer.zero_grad, set_to_none=True)
    while True:
        try:
            return once_more(work, undo=forget)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            forget()
            error.__traceback__ = None  # its frames hold the tensors
        together, least = extent(rows, shared, run.budget)
        size = min(run.budget, together)
        run.budget, run.warned = halved(size, "tokens", least=least, warn=not run.warned), True


def _end_epoch(run: Run, validation: Sequence[Encoded], state: State, callbacks: Sequence[Callback]) -> None:
    """Measure the validation loss and keep the weights where it is the lowest so far."""
    if validation:
        earlier = [r["validation_loss"] for r in state.history if "validation_loss" in r]
        run.model.eval()
        with _reading(run.model, run.held):
            loss = _within_memory(run, validation, run.held, lambda: _validation_loss(run, validation))
        run.model.train()
        state.history[-1]["validation_loss"] = loss
        if loss < min(earlier, default=math.inf):
            state.best_epoch = state.epoch
            if run.settings.restore_best:
                run.best = {name: p.detach().cpu().clone() for name, p in run.parameters.items()}
    notify(callbacks, "on_epoch_end", state)


def _validation_loss(run: Run, validation: Sequence[Encoded]) -> float:
    return mean_loss(
        run.model,
        validation,
        budget=run.budget,
        device=run.device,
        pad_id=run.pad_id,
        start_ids=run.start_ids,
        objective=run.settings.objective,
        shared=run.held,
    )


def _load(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


@torch.no_grad()
def mean_loss(
    model: Any,
    rows: Sequence[Encoded],
    *,
    budget: int,
    device: torch.device,
    pad_id: int,
    start_ids: Ids = (),
    objective: Any = "supervised",
    shared: int | None = None,
) -> float:
    """Mean of the rows' losses, each weighing what it does in training; nothing but the sum is kept."""
    total = 0.0
    for positions, begun in parted(rows, shared, budget):
        some = [rows[i] for i in positions]
        for here in length_batches(some, budget, begun):
            batch = _collate([some[i] for i in here], pad_id, device, start_ids, begun)
            total += float(objective_of(objective)(model, batch))
    return total / loss_mass(rows)
