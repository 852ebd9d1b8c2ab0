"""The modules of a head: pooling of the last hidden states, the linear layer, vectors in place of a model.

Takes a base model that is lent; gives modules called with padded ids and lengths. Knows no adapter: it reads the hidden
states where the model's words would be made of them, whatever is wrapped around the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llmfit.exceptions import ModelLoadError

__all__ = ["POOLINGS", "Headed", "Pooler", "Vectors"]


class _Tap(nn.Module):
    """Stands where the output embeddings stood, and keeps what they would have turned into logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden

    def take(self) -> Any:
        """Give the hidden states away, so that no memory hangs on them."""
        hidden, self.hidden = self.hidden, None
        return hidden


class Pooler(nn.Module):
    """A model, called for one vector a row.

    Parameters
    ----------
    base : BaseModel
        Lent: a decoder's output embeddings are replaced by a tap; of an encoder-decoder, the encoder alone is left.
    pooling : str
        A name in `POOLINGS`.

    Attributes
    ----------
    model : torch.nn.Module
        What is called; whoever wraps the base model puts the wrapper here.
    size : int
        Numbers of a vector.
    """

    def __init__(self, base: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.choose, self.read = base.model, POOLINGS[pooling], READERS[base.kind]
        self.pooling, self.packable = pooling, base.kind == "decoder" and pooling in PACKED
        self.where = base.device
        self.dtype = torch.promote_types(base.dtype, torch.float32)
        self.tap = _Tap() if base.kind == "decoder" else None
        if base.kind == "encoder-decoder":
            _leave_encoder(base.model)
        self.size = _tapped(base, self.tap) if self.tap is not None else int(base.model.config.hidden_size)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor, layout: Any = None) -> torch.Tensor:
        """Compute a vector a row.

        Parameters
        ----------
        input_ids : Tensor of shape (B, T)
            Padded at the right.
        lengths : Tensor of shape (B,)
        layout : Layout or None
            Of rows that are packed into one: then `input_ids` is of shape (1, its length).

        Returns
        -------
        Tensor of shape (B, size)
            In float32 or wider.
        """
        if layout is not None:
            return PACKED[self.pooling](self, input_ids, layout).to(self.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        known = places < lengths[:, None]  # (B, T)
        keep = self.choose(places, lengths[:, None]) & known  # (B, T)
        hidden = self.read(self, input_ids, known, keep).to(self.dtype)  # (N, H)
        parts = torch.split(hidden, keep.sum(1).tolist())
        return torch.stack([part.mean(0) for part in parts])  # (B, H)


def _tapped(base: Any, tap: nn.Module) -> int:
    """Put a tap in the place of the output embeddings; return the width of what flows into it."""
    words = base.model.get_output_embeddings()
    if words is not None:
        base.model.set_output_embeddings(tap)
    if words is None or base.model.get_output_embeddings() is not tap:
        raise ModelLoadError(
            f"The base model {base.source.name!r} names no output embeddings, in whose place a head could stand."
        )
    return int(words.weight.shape[-1] if not hasattr(words, "in_features") else words.in_features)


def _leave_encoder(model: Any) -> None:
    """Take the decoder and the output embeddings out, through which no vector comes: nobody shall train or count them.

    The model keeps its name, its configuration and the names of its layers for whoever wraps it.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    places = [(m, name) for m in model.modules() for name, child in m.named_children() if child is decoder]
    for module, name in places:
        setattr(module, name, nn.Module())
    model.set_output_embeddings(nn.Identity())

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        return encoder(input_ids=input_ids, attention_mask=attention_mask)

    model.forward = forward


def _picked(hidden: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Pick the kept positions; what a wrapper puts before a row's tokens is left aside: (N, H)."""
    return hidden[:, -keep.shape[1] :][keep]


def _read_decoder(pooler: Any, input_ids: torch.Tensor, _: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    pooler.model(input_ids=input_ids, logits_to_keep=keep, use_cache=False)
    hidden = pooler.tap.take()
    rows: torch.Tensor = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) != int(keep.sum()):  # a model that does not know logits_to_keep gives all positions
        return _picked(hidden, keep)
    return rows


def _read_packed(pooler: Any, input_ids: torch.Tensor, layout: Any, keep: torch.Tensor) -> torch.Tensor:
    pooler.model(
        input_ids=input_ids, position_ids=layout.positions, logits_to_keep=keep, use_cache=False, layout=layout
    )
    hidden = pooler.tap.take()
    rows: torch.Tensor = hidden.reshape(-1, hidden.shape[-1])
    return rows if len(rows) == int(keep.sum()) else rows[keep[0]]


def _last_packed(pooler: Any, input_ids: torch.Tensor, layout: Any) -> torch.Tensor:
    keep = torch.zeros_like(input_ids, dtype=torch.bool)
    keep[0, [start + own - 1 for start, own in zip(layout.starts, layout.own, strict=True)]] = True
    return _read_packed(pooler, input_ids, layout, keep)


def _mean_packed(pooler: Any, input_ids: torch.Tensor, layout: Any) -> torch.Tensor:
    """Add what all rows begin with to each row's own; where it is not in the sequence, its sum was kept."""
    inline = layout.shared if layout.inline else 0
    keep = (torch.arange(layout.length, device=input_ids.device) < inline + sum(layout.own))[None]
    hidden = _read_packed(pooler, input_ids, layout, keep).to(pooler.dtype)
    shared, *own = torch.split(hidden, [inline, *layout.own])
    before = shared.sum(0) if inline == layout.shared else layout.kept.summed
    if layout.kept is not None:
        layout.kept.summed = before
    return torch.stack([(before + part.sum(0)) / (layout.shared + len(part)) for part in own])


def _read_encoder(pooler: Any, input_ids: torch.Tensor, known: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return _picked(pooler.model(input_ids=input_ids, attention_mask=known.long()).last_hidden_state, keep)


class Vectors(nn.Module):
    """Known vectors in place of a model: a row's first id is its place among them.

    They are given to the head with each number's mean taken off, divided by its spread and by the root of how many
    there are: vectors of length one in the mean, whatever the model, for which one learning rate is right.
    :meth:`to_plain` writes the head that was learned so for the vectors as they are. Not `centred`, the mean is left
    on: a head without bias could not take it off again.
    """

    def __init__(self, vectors: torch.Tensor, learned: int, *, centred: bool = True) -> None:
        super().__init__()
        self.size, self.dtype, self.where = vectors.shape[1], vectors.dtype, vectors.device
        wide = vectors[:learned].double()
        self.mean = wide.mean(0) * centred
        self.spread = (wide - self.mean).square().mean(0).sqrt()
        self.spread[self.spread <= SMALLEST * self.spread.max()] = 1.0
        self.spread *= self.size**0.5
        self.scaled = ((vectors - self.mean) / self.spread).to(self.dtype)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor, layout: Any = None) -> torch.Tensor:
        """Look the rows' vectors up: (B, size)."""
        return self.scaled[input_ids[:, 0]]

    def to_plain(self, head: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write a head for the vectors as they are."""
        weight = head["weight"].detach().double() / self.spread
        return self._written(head, weight, -weight @ self.mean)

    def to_scaled(self, head: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write a head for the scaled vectors; {} stays {}."""
        if not head:
            return {}
        weight = head["weight"].double()
        return self._written(head, weight * self.spread, weight @ self.mean)

    def _written(
        self, head: Mapping[str, torch.Tensor], weight: torch.Tensor, more: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Write a head with another weight, and more of its bias where it has one."""
        written = {"weight": weight} | ({"bias": head["bias"].detach().double() + more} if "bias" in head else {})
        return {name: tensor.to(self.dtype) for name, tensor in written.items()}


class Headed(nn.Module):
    """A linear layer on what a :class:`Pooler`, or :class:`Vectors`, gives.

    Parameters
    ----------
    backbone : Pooler or Vectors
    outputs : int
    dropout : float
    bias : bool
    """

    def __init__(self, backbone: Any, outputs: int, dropout: float, *, bias: bool = True) -> None:
        super().__init__()
        self.backbone, self.dropout = backbone, nn.Dropout(dropout)
        self.head = nn.Linear(backbone.size, outputs, bias=bias, dtype=backbone.dtype, device=backbone.where)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def load_head(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of a head that was learned; {} leaves the zeros."""
        if tensors:
            self.head.load_state_dict(dict(tensors))

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor, layout: Any = None) -> torch.Tensor:
        """Answer every row: (B, outputs)."""
        answers: torch.Tensor = self.head(self.dropout(self.backbone(input_ids, lengths, layout)))
        return answers


SMALLEST = 1e-6  # of the largest spread: what varies less is a constant, and not stretched

POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "last": lambda places, lengths: places == lengths - 1,
    "mean": lambda places, lengths: places < lengths,
    "first": lambda places, lengths: (places == 0) & (lengths > 0),
}
PACKED: dict[str, Callable[[Any, torch.Tensor, Any], torch.Tensor]] = {"last": _last_packed, "mean": _mean_packed}
READERS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "decoder": _read_decoder,
    "encoder": _read_encoder,
    "encoder-decoder": _read_encoder,
}
