"""New heads in place of a model's words: the spec, and the ways a head goes onto a model that is lent.

Takes the `head` parameter in any spelling; gives a :class:`LinearHead` or None for an answer in words, and what
:meth:`llmfit.base_model.BaseModel.attach` installs: a head with an adapter, a head on vectors that are known, or the
pooled vectors alone. Knows no adapter by name and no estimator. A new head is one dataclass and one line in `HEADS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.exceptions import (
    DataError,
    ModelLoadError,
    ParameterError,
    check_choice,
    check_keys,
    check_number,
    parameter_error,
    reason,
)

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = [
    "HEADS",
    "LinearHead",
    "OnVectors",
    "Pooled",
    "WithHead",
    "check_outputs",
    "check_use",
    "head_defaults",
    "head_from_folder",
    "resolve_head",
    "save_head",
    "split_tensors",
]

MARK = "head/"  # before the names of a head's tensors among those of an adapter: no parameter's name has a slash
FILE = "head.safetensors"
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class LinearHead:
    """A linear layer, in float32, on one vector a row: the model's last hidden states, pooled.

    It begins as zeros: every class equally likely, every number the mean.

    Parameters
    ----------
    pooling : {"auto", "last", "mean", "first"}, default="auto"
        Which tokens of a row make its vector: the last, all in the mean, or the first. "auto" is the last token of a
        decoder, the only one that has seen the others, and the mean of an encoder (of an encoder-decoder's encoder).
        A decoder's first token has seen none: "first" is refused there.
    dropout : float, default=0.0
        Share of the vector set to zero in training.
    bias : bool, default=True
        Add a number to each output. Without, a classifier on a decoder can be exported to transformers, whose models
        for sequence classification have none.
    cache : None or path, default=None
        With ``adapter=None``, a folder that keeps the vectors for other processes. They are found by content: of the
        base model, its dtype, the pooling and the tokens.

    Examples
    --------
    >>> from llmfit import LLMClassifier
    >>> LLMClassifier(head={"type": "linear", "pooling": "mean"}).get_params()["head__dropout"]
    0.0
    """

    type: ClassVar[str] = "linear"
    learning_rate: ClassVar[float] = 3e-2  # of a head alone, on vectors of length one

    pooling: str = "auto"
    dropout: float = 0.0
    bias: bool = True
    cache: Any = None

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        check_choice("pooling", "head", self.pooling, ["auto", "last", "mean", "first"])
        if check_number("dropout", "head", self.dropout, least=0, most=1) == 1:
            raise parameter_error("dropout", "head", "a number >= 0 and < 1", self.dropout)
        check_choice("bias", "head", self.bias, [True, False])
        if not (self.cache is None or isinstance(self.cache, str | os.PathLike)):
            raise parameter_error("cache", "head", "None or a path", self.cache)
        if self.cache is not None and Path(self.cache).expanduser().is_file():
            raise parameter_error("cache", "head", "a folder, not a file", str(self.cache))

    def pooling_of(self, kind: str) -> str:
        """Resolve "auto" for a kind of base model."""
        if self.pooling != "auto":
            return self.pooling
        return "last" if kind == "decoder" else "mean"


def resolve_head(value: Any, owner: str, known: Sequence[str]) -> LinearHead | None:
    """Turn every spelling of the `head` parameter into a checked spec.

    Parameters
    ----------
    value : str, dict or LinearHead
        A head's name, a dict of "type" and its settings (linear where there is no type), or a spec.
    owner : str
        Name of the estimator.
    known : sequence of str
        Heads that the estimator can have.

    Returns
    -------
    LinearHead or None
        None for an answer in words.

    Raises
    ------
    ParameterError
        If the head or a setting is unknown, or a value cannot be used.
    """
    if isinstance(value, LinearHead):
        value = {"type": value.type, **vars(value)}
    given = dict(value) if isinstance(value, Mapping) else {"type": value}
    name = given.pop("type", LinearHead.type)
    check_choice("head", owner, name, known)
    spec = HEADS[name]
    check_keys(f"The head {name!r}", given, [f.name for f in fields(spec)] if spec else [])
    if spec is None:
        return None
    head = spec(**given)
    head.check()
    return head


def head_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a head's dict with its default; {} for a head that is unknown."""
    name = given.get("type", LinearHead.type)
    if not isinstance(name, str) or name not in HEADS:
        return {}
    spec = HEADS[name]
    return {"type": name, **({f.name: f.default for f in fields(spec)} if spec else {})}


def split_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """Part what a fit keeps into the head's tensors and the adapter's."""
    own = {name.removeprefix(MARK): tensor for name, tensor in tensors.items() if name.startswith(MARK)}
    return own, {name: tensor for name, tensor in tensors.items() if not name.startswith(MARK)}


def save_head(folder: Path, own: Tensors) -> None:
    """Write a head's tensors to a folder."""
    from safetensors.torch import save_file

    save_file(own, folder / FILE, metadata={"format": "pt"})


def head_from_folder(folder: Path) -> Tensors:
    """Read the tensors that :func:`save_head` wrote, named as a fit keeps them.

    Raises
    ------
    ModelLoadError
        If the file is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        return _marked(load_file(folder / FILE))
    except Exception as error:  # safetensors raises its own error, which is not exported
        raise ModelLoadError(f"The head {str(folder / FILE)!r} cannot be read: {reason(error)}.") from error


def _marked(head: Mapping[str, torch.Tensor]) -> Tensors:
    return {MARK + name: tensor.detach().cpu().clone() for name, tensor in head.items()}


@dataclass(frozen=True)
class Pooled:
    """One vector a row, and no head: what is kept of a model that is not trained."""

    pooling: str

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Put a tap before the model's words."""
        from llmfit.heads.modules import Pooler

        return Pooler(base, self.pooling)


@dataclass(frozen=True)
class WithHead:
    """An adapter and a head, trained and lent together.

    Parameters
    ----------
    adapter : AdapterSpec
    head : LinearHead
    outputs : int
        Numbers that the head answers a row with.
    """

    adapter: Any
    head: LinearHead
    outputs: int

    @property
    def type(self) -> str:
        """Name of the adapter's method."""
        return str(self.adapter.type)

    @property
    def quantizable(self) -> tuple[int, ...]:
        """Bits of the base model that the adapter works beside."""
        bits: tuple[int, ...] = self.adapter.quantizable
        return bits

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, **given: Any) -> Any:
        """Put a tap before the model's words, then the adapter, to which the words are no layer any more.

        What else is given goes to the adapter.
        """
        from llmfit.heads.modules import Headed, Pooler

        own, rest = split_tensors(tensors or {})
        pooler = Pooler(base, self.head.pooling_of(base.kind))
        pooler.model = self.adapter.install(base, rest if tensors is not None else None, training=training, **given)
        if pooler.tap is not None and base.model.get_output_embeddings() is not pooler.tap:
            raise ParameterError(
                f"The adapter {self.type!r} trains the output embeddings, in whose place the linear head stands. Take "
                "them out of modules_to_save and target_modules, or set head='lm'."
            )
        headed = Headed(pooler, self.outputs, self.head.dropout, bias=self.head.bias)
        headed.load_head(own)
        headed.head.requires_grad_(training)
        return headed

    # What an adapter has to say while it is trained concerns the model inside.

    def rate(self, parameter: str) -> float:
        """Factor on the learning rate of the weight of that name."""
        return float(self.adapter.rate(parameter))

    def penalty(self, model: Any) -> Any:
        """Scalar that is added to the loss of every step; None for none."""
        return self.adapter.penalty(model.backbone.model)

    def end_step(self, model: Any, step: int) -> None:
        """Run after optimiser step `step`, counted from 1."""
        self.adapter.end_step(model.backbone.model, step)

    def state(self, model: Any) -> Tensors:
        """Give what a checkpoint needs beside the weights that are trained."""
        state: Tensors = self.adapter.state(model.backbone.model)
        return state

    def restore(self, model: Any, state: Tensors) -> None:
        """Take back what :meth:`state` gave."""
        self.adapter.restore(model.backbone.model, state)

    def tensors(self, model: Any) -> Tensors:
        """Copy the adapter's weights and the head's."""
        return {**self.adapter.tensors(model.backbone.model), **_marked(dict(model.head.named_parameters()))}


@dataclass(frozen=True, eq=False)
class OnVectors:
    """A head alone, on vectors that are known: a row's prompt is one id, its place among them.

    Parameters
    ----------
    head : LinearHead
    outputs : int
    vectors : Tensor of shape (n, hidden)
        On the CPU.
    learned : int
        So many of them, the first, are of rows to learn from.
    """

    head: LinearHead
    outputs: int
    vectors: Any
    learned: int

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool) -> Any:
        """Leave the model as it is: the vectors are all that is left of it."""
        from llmfit.heads.modules import Headed, Vectors

        vectors = Vectors(self.vectors, self.learned, centred=self.head.bias)
        headed = Headed(vectors, self.outputs, self.head.dropout, bias=self.head.bias)
        headed.load_head(headed.backbone.to_scaled(split_tensors(tensors or {})[0]))
        return headed

    def tensors(self, model: Any) -> Tensors:
        """Copy the head's weights."""
        return _marked(model.backbone.to_plain(dict(model.head.named_parameters())))


def check_outputs(tensors: Mapping[str, torch.Tensor], outputs: int) -> None:
    """Raise unless a head that is to go on has as many outputs as are wanted now."""
    before = len(split_tensors(tensors)[0].get("weight", ()))
    if before != outputs:
        raise DataError(
            f"warm_start goes on with a head of {before} output(s), but the target now wants {outputs}. Set "
            "warm_start=False to begin anew."
        )


def check_use(head: LinearHead | None, adapter: Any) -> None:
    """Refuse settings of a head and an adapter that have no meaning beside each other."""
    if head is not None and getattr(adapter, "init_lora_weights", None) == "lora_ga":
        raise ParameterError(
            "init_lora_weights='lora_ga' begins along the gradient of the loss in the base model's weights, which is "
            "zero where a new linear head, whose weights are zeros, answers. Choose another start, or set head='lm'."
        )
    if head is not None and head.cache is not None and adapter is not None:
        raise ParameterError(
            "The 'cache' parameter of head has no meaning with an adapter, whose training changes the vectors. "
            "Set adapter=None, or cache=None."
        )


HEADS: dict[str, type[LinearHead] | None] = {"lm": None, "linear": LinearHead}
