"""From encoded rows to a trained adapter: the validation split, checkpoints, the history.

Takes an estimator's checked parameters and encoded rows; gives a :class:`Fitted`. Knows no frame of the user's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmfit.adapters import AdapterSpec, Plan, Planned, Tensors, adapter_from_folder, count_parameters
from llmfit.base_model import BaseModel
from llmfit.batching import auto_batch_size, epoch_order
from llmfit.callbacks import Progress, State
from llmfit.checkpoints import Checkpoint, Pause
from llmfit.encoding import Encoded
from llmfit.estimators.checks import Checked
from llmfit.estimators.heads import embed
from llmfit.exceptions import DataError, ParameterError
from llmfit.features import is_set, label_text
from llmfit.forward import collate, look
from llmfit.heads import LinearHead, OnVectors, WithHead, check_outputs
from llmfit.objectives import loss_mass, objective_of
from llmfit.training import Settings, total_steps, train

__all__ = ["Fitted", "Job", "fit_adapter", "history_of", "join_history", "split_rows", "train_alone", "with_batch_size"]

PLAN_ROWS = 128  # of the fit, that an adapter may look at before it begins
COLUMNS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "validation_loss"]


@dataclass
class Fitted:
    """What training leaves behind.

    Attributes
    ----------
    adapter : AdapterSpec or None
    settings : Settings
        With the batch size and everything else as it was used.
    tensors : dict of str to Tensor
        The adapter's weights, on the CPU.
    trainable : int
        Number of weights that were trained.
    history : DataFrame
        One row an optimiser step.
    best_epoch : int or None
    """

    adapter: AdapterSpec | None
    settings: Settings
    tensors: Tensors = field(default_factory=dict)
    trainable: int = 0
    history: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    best_epoch: int | None = None


@dataclass(frozen=True)
class Job:
    """What is to be trained, as :func:`fit_adapter` takes it."""

    checked: Checked
    base: BaseModel
    rows: Sequence[Encoded]
    validation: Sequence[Encoded]
    before: Tensors | None = None
    checkpoint_dir: Any = None
    label: str = ""
    pause: Pause | None = None

    def train(self) -> Fitted:
        """Train it alone."""
        how = {"before": self.before, "checkpoint_dir": self.checkpoint_dir, "label": self.label, "pause": self.pause}
        return fit_adapter(self.checked, self.base, self.rows, self.validation, **how)


def train_alone(fitting: Generator[Job, Fitted, Any]) -> Any:
    """Let an estimator's fit run through, trained where it wants it."""
    job = next(fitting)
    try:
        fitting.send(job.train())
    except StopIteration as done:
        return done.value


def split_rows(n_rows: int, fraction: float, y: pd.Series | None, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Part the positions of rows into training and validation, with classes in proportion where they can be.

    Raises
    ------
    DataError
        If either part would be empty.
    """
    from sklearn.model_selection import train_test_split

    held = round(n_rows * fraction)
    if not 0 < held < n_rows:
        raise DataError(
            f"validation_fraction {fraction:g} of {n_rows} row(s) leaves no row to "
            f"{'validate' if not held else 'train'} on."
        )
    strata = None if y is None else list(map(_stratum, y))
    if strata is not None:
        counts = Counter(strata)
        if min(counts.values()) < 2 or min(held, n_rows - held) < len(counts):
            strata = None
    kept, out = train_test_split(np.arange(n_rows), test_size=held, stratify=strata, random_state=seed)
    return np.sort(kept).tolist(), np.sort(out).tolist()


def _stratum(label: Any) -> str:
    """Write a row's label, or its several ones in any order, as one text: sets have no order to be sorted by."""
    return repr(sorted({*map(label_text, label)})) if is_set(label) else label_text(label)


def fit_adapter(
    checked: Checked,
    base: BaseModel,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    *,
    before: Tensors | None = None,
    checkpoint_dir: Any = None,
    label: str = "",
    pause: Pause | None = None,
) -> Fitted:
    """Train an adapter in a base model that is lent for it.

    Parameters
    ----------
    before : dict of str to Tensor or None
        Weights to begin from; None draws new ones.
    checkpoint_dir : path or None
    label : str
        Stands before the progress bar; "" shows no bar.
    pause : Pause or None
        Where it goes on from, and how far; in place of `checkpoint_dir`.

    Raises
    ------
    DataError
        If there is no row to train on.
    """
    checked = with_batch_size(checked, len(rows))
    if checked.adapter is None and checked.head is None:
        return Fitted(None, checked.settings)
    if checked.adapter is not None and base.dtype.itemsize == 2 and str(base.dtype) == "torch.float16":
        raise ParameterError(
            "The 'dtype' parameter must be 'bfloat16', 'float32' or 'float64' to train. Got 'float16', whose gradients "
            "underflow."
        )
    if checked.head is not None and before is not None:
        check_outputs(before, checked.outputs)
    if not rows:
        raise DataError("Every row to train on has weight zero: look at sample_weight and class_weight.")
    if before is None and checked.start is not None and checked.adapter is not None:
        before = adapter_from_folder(checked.start, checked.adapter)
    checkpoint: Checkpoint | Pause | None = pause
    if checkpoint is None and checkpoint_dir is not None:
        checkpoint = Checkpoint(checkpoint_dir, _fit_key(checked, base, rows, validation, before))
    stopping = [checked.early_stopping] if checked.early_stopping is not None else []
    longest = max(row.length for row in (*rows, *validation))
    adapter, rows, validation = _onto(checked, base, rows, validation, label)
    with base.attach(
        adapter,
        before,
        seed=checked.seed,
        training=True,
        longest=longest,
        gradient_checkpointing=checked.gradient_checkpointing,
    ) as model:
        trainable, every = count_parameters(model)
        if checked.adapter is None:  # a head alone is trained on vectors, but answers with the whole model
            every += count_parameters(base.model)[1]
        progress = [Progress(label, heading=_heading(trainable, every))] if label else []
        state = train(
            model,
            rows,
            checked.settings,
            device=adapter.vectors.device if isinstance(adapter, OnVectors) else base.device,
            pad_id=base.pad_id,
            start_ids=base.start_ids,
            adapter=adapter if checked.adapter is not None else None,
            validation=validation,
            callbacks=[*progress, *stopping, *checked.callbacks],
            checkpoint=checkpoint,
        )
        tensors = adapter.tensors(model)
    if checkpoint is not None:
        checkpoint.remove()
    return Fitted(checked.adapter, checked.settings, tensors, trainable, history_of(state), state.best_epoch)


def with_batch_size(checked: Checked, n_rows: int) -> Checked:
    """Choose the rows of a step where the user has not."""
    if checked.settings.batch_size != "auto":
        return checked
    return replace(checked, settings=replace(checked.settings, batch_size=auto_batch_size(n_rows)))


def history_of(state: State) -> pd.DataFrame:
    """Write the records of a fit as a frame: one row an optimiser step."""
    return pd.DataFrame(state.history, columns=COLUMNS)


def _plan(checked: Checked, base: BaseModel, rows: Sequence[Encoded]) -> Plan:
    """Tell an adapter of the fit to come: its steps, and its first rows one by one."""
    settings = checked.settings
    chosen = [rows[i] for i in epoch_order(len(rows), settings.seed, 1)[:PLAN_ROWS]]
    pooling = checked.head.pooling_of(base.kind) if checked.head is not None else None
    if pooling is not None:  # an answer of any token, which is taken off again
        chosen = [row._replace(completion=(base.pad_id,)) for row in chosen]

    def batches() -> Iterator[Any]:
        made = (collate([row], base.pad_id, base.device, base.start_ids, step=1) for row in chosen if loss_mass([row]))
        return made if pooling is None else (_as_read(batch, pooling) for batch in made)

    def loss(model: Any, batch: Any) -> Any:
        if checked.head is not None:
            return look(model, batch)  # a head's loss is not of the words
        return objective_of(settings.objective)(model, batch) / batch.weights.sum()

    return Plan(total_steps(len(rows), settings), batches, loss)


def _as_read(batch: Any, pooling: str) -> Any:
    """Take the answer off a row, and look where a head reads: at the last token of a prompt, or at all."""
    if batch.decoder_input_ids is not None:  # its encoder reads the prompt alone
        return batch
    ids, predicts = batch.input_ids[:, :-1], batch.predicts[:, :-1]
    seen = predicts if pooling == "last" else predicts.new_ones(predicts.shape)
    return replace(batch, input_ids=ids, predicts=seen)


def _heading(trained: int, every: int) -> str:
    """Say how much is trained, in the form that peft gives the sentence."""
    return f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}"


def _onto(
    checked: Checked, base: BaseModel, rows: Sequence[Encoded], validation: Sequence[Encoded], label: str
) -> tuple[Any, Sequence[Encoded], Sequence[Encoded]]:
    """Say what is installed, and what rows look like to it: where a head is all that learns, places among vectors."""
    if checked.adapter is not None:
        planned = Planned(checked.adapter, _plan(checked, base, rows))
        return (WithHead(planned, checked.head, checked.outputs) if checked.head else planned), rows, validation
    head = checked.head or LinearHead()
    prompts = list(dict.fromkeys(row.prompt for row in (*rows, *validation)))  # those to learn from come first
    place = {prompt: (i,) for i, prompt in enumerate(prompts)}
    learned = len({row.prompt for row in rows})
    with tqdm(total=len(prompts), desc=f"{label}: vectors", unit="row", disable=not label, delay=2.0) as bar:
        vectors = embed(base, head, prompts, batch_tokens=checked.settings.batch_tokens, progress=bar.update)
    spec = OnVectors(head, checked.outputs, vectors, learned)
    here, held = ([row._replace(prompt=place[row.prompt]) for row in part] for part in (rows, validation))
    return spec, here, held


def _fit_key(
    checked: Checked,
    base: BaseModel,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    before: Tensors | None,
) -> str:
    """Digest all that decides the result of a fit, to the last bit."""
    settings = asdict(checked.settings)
    drawn = [base, checked.adapter, checked.head]
    if not any(getattr(part, "has_dropout", False) or getattr(part, "dropout", 0) for part in drawn):
        del settings["batch_tokens"]  # decides which numbers dropout draws, and nothing else
    parts = [
        settings,
        [checked.adapter.type, asdict(checked.adapter)] if checked.adapter else None,
        [checked.head.type, asdict(replace(checked.head, cache=None)), checked.outputs] if checked.head else None,
        asdict(checked.early_stopping) if checked.early_stopping else None,
        [base.source.fingerprint, str(base.dtype), base.device.type, repr(base.quantization)],
        [list(rows), list(validation)],
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted((before or {}).items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:24]


def join_history(earlier: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """Put the history of a continued fit behind the one before, steps and epochs counted on."""
    if earlier is None or not len(earlier) or not len(new):
        return new
    new = new.assign(step=new["step"] + earlier["step"].iloc[-1], epoch=new["epoch"] + earlier["epoch"].iloc[-1])
    return pd.concat([earlier, new], ignore_index=True)
