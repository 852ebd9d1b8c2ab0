"""From encoded rows to a trained adapter: the validation split, checkpoints, the history.

Takes an estimator's checked parameters and encoded rows; gives a :class:`Fitted`. Knows no frame of the user's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmfit.adapters import AdapterSpec, Tensors
from llmfit.base_model import BaseModel
from llmfit.batching import auto_batch_size
from llmfit.callbacks import Progress
from llmfit.checkpoints import Checkpoint
from llmfit.encoding import Encoded
from llmfit.estimators.checks import Checked
from llmfit.estimators.heads import embed
from llmfit.exceptions import DataError, ParameterError
from llmfit.heads import OnVectors, WithHead, check_outputs
from llmfit.training import Settings, train

__all__ = ["Fitted", "fit_adapter", "join_history", "split_rows"]

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
    if y is not None:
        counts = y.astype(str).value_counts()
        if counts.min() < 2 or min(held, n_rows - held) < len(counts):
            y = None
    kept, out = train_test_split(np.arange(n_rows), test_size=held, stratify=y, random_state=seed)
    return np.sort(kept).tolist(), np.sort(out).tolist()


def fit_adapter(
    checked: Checked,
    base: BaseModel,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    *,
    before: Tensors | None = None,
    checkpoint_dir: Any = None,
    label: str = "",
) -> Fitted:
    """Train an adapter in a base model that is lent for it.

    Parameters
    ----------
    before : dict of str to Tensor or None
        Weights to begin from; None draws new ones.
    checkpoint_dir : path or None
    label : str
        Stands before the progress bar; "" shows no bar.

    Raises
    ------
    DataError
        If there is no row to train on.
    """
    if checked.settings.batch_size == "auto":
        rows_a_step = auto_batch_size(len(rows), checked.settings.epochs)
        checked = replace(checked, settings=replace(checked.settings, batch_size=rows_a_step))
    if checked.adapter is None and checked.head is None:
        return Fitted(None, checked.settings)
    if checked.adapter is not None and base.dtype.itemsize == 2 and str(base.dtype) == "torch.float16":
        raise ParameterError(
            "The 'dtype' parameter must be 'bfloat16' or 'float32' to train. Got 'float16', whose gradients underflow."
        )
    if checked.head is not None and before is not None:
        check_outputs(before, checked.outputs)
    if not rows:
        raise DataError("Every row to train on has weight zero: look at sample_weight and class_weight.")
    checkpoint = None
    if checkpoint_dir is not None:
        checkpoint = Checkpoint(checkpoint_dir, _fit_key(checked, base, rows, validation, before))
    stopping = [checked.early_stopping] if checked.early_stopping is not None else []
    callbacks = [*([Progress(label)] if label else []), *stopping, *checked.callbacks]
    longest = max(row.length for row in (*rows, *validation))
    adapter, rows, validation = _onto(checked, base, rows, validation, label)
    with base.attach(adapter, before, seed=checked.seed, training=True, longest=longest) as model:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        state = train(
            model,
            rows,
            checked.settings,
            device=base.device,
            pad_id=base.pad_id,
            validation=validation,
            callbacks=callbacks,
            checkpoint=checkpoint,
        )
        tensors = adapter.tensors(model)
    if checkpoint is not None:
        checkpoint.remove()
    history = pd.DataFrame(state.history, columns=COLUMNS)
    return Fitted(checked.adapter, checked.settings, tensors, trainable, history, state.best_epoch)


def _onto(
    checked: Checked, base: BaseModel, rows: Sequence[Encoded], validation: Sequence[Encoded], label: str
) -> tuple[Any, Sequence[Encoded], Sequence[Encoded]]:
    """Say what is installed, and what rows look like to it: where a head is all that learns, places among vectors."""
    if checked.head is None:
        return checked.adapter, rows, validation
    if checked.adapter is not None:
        return WithHead(checked.adapter, checked.head, checked.outputs), rows, validation
    prompts = list(dict.fromkeys(row.prompt for row in (*rows, *validation)))  # those to learn from come first
    place = {prompt: (i,) for i, prompt in enumerate(prompts)}
    learned = len({row.prompt for row in rows})
    with tqdm(total=len(prompts), desc=f"{label}: vectors", unit="row", disable=not label, delay=2.0) as bar:
        vectors = embed(base, checked.head, prompts, batch_tokens=checked.settings.batch_tokens, progress=bar.update)
    spec = OnVectors(checked.head, checked.outputs, vectors, learned)
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
    if not (getattr(checked.adapter, "dropout", 0) or getattr(checked.head, "dropout", 0)):
        del settings["batch_tokens"]  # decides which numbers dropout draws, and nothing else
    parts = [
        settings,
        [checked.adapter.type, asdict(checked.adapter)] if checked.adapter else None,
        [checked.head.type, asdict(replace(checked.head, cache=None)), checked.outputs] if checked.head else None,
        asdict(checked.early_stopping) if checked.early_stopping else None,
        [base.source.fingerprint, str(base.dtype), base.device.type],
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
