"""Where hidden states become words: the last layer put aside, and applied to the wanted positions a piece at a time.

Takes a lent module and hidden states; gives losses and log-probabilities, in float32 or wider. What meets the
vocabulary at once is bounded, whatever the length of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmfit.kinds import find_own

__all__ = ["Words", "choices", "most_positions", "output_embeddings", "token_losses", "without_words"]

MOST_LOGITS = 2**24  # numbers that one piece may have
AT_ONCE = {"cpu": 3 * 2**18}  # numbers of a piece that are looked at together, where that is less: what a cache holds
BIAS = "final_logits_bias"  # what models of BART's kind add to their logits


class Words:
    """What turns hidden states (N, D) into logits (N, V); without a layer, they are logits already.

    Parameters
    ----------
    layer : torch.nn.Module or None
        A model's output embeddings.
    bias : Tensor of shape (1, V) or None
        What the model adds behind them.
    computes_in : torch.dtype or None
        What the model itself multiplies weights in where they have more bytes.
    """

    def __init__(
        self, layer: Any = None, bias: torch.Tensor | None = None, computes_in: torch.dtype | None = None
    ) -> None:
        self.layer, self.bias, self.computes_in = layer, bias, computes_in

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make logits, in the dtype of the hidden states."""
        if self.layer is None:
            return hidden
        kind = self.layer.weight.dtype
        chosen = (hidden.dtype, kind, self.computes_in)
        low = next((dtype for dtype in chosen if dtype is not None and dtype.itemsize == 2), None)
        if low is None and kind.itemsize >= 4:
            hidden = hidden.to(kind)  # Mamba gives float32 whatever it is in
        with torch.autocast(hidden.device.type, dtype=low, enabled=low is not None):
            logits: torch.Tensor = self.layer(hidden)
        return logits if self.bias is None else logits + self.bias

    @property
    def most(self) -> int:
        """Count the hidden states that may meet the vocabulary at once."""
        return max(1, MOST_LOGITS // int(self.layer.weight.shape[0]))

    def piece(self, hidden: torch.Tensor) -> int:
        """Count the hidden states, or logits, of these that may be worked on at once."""
        return max(1, MOST_LOGITS // hidden.shape[-1]) if self.layer is None else self.most


@contextmanager
def without_words(model: Any) -> Iterator[Words]:
    """Let a model give what its output embeddings would have turned into logits; yield what turns it.

    A factor that some families put on their logits is on the hidden states then, which is the same, and what others add
    to them is put aside too. Where more follows, the model makes its logits by itself.
    """
    own, layer = find_own(model), output_embeddings(model)
    if layer is None or not _multiplies(own, layer):
        yield Words()
        return
    before, bias = vars(layer).get("forward"), getattr(own, BIAS, None)
    layer.forward = lambda hidden: hidden
    if bias is not None:
        setattr(own, BIAS, bias.new_zeros(1))
    try:
        yield Words(layer, bias, getattr(own, "computes_in", None))
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
        if bias is not None:
            setattr(own, BIAS, bias)


def output_embeddings(model: Any) -> Any:
    """Find the layer that makes logits, where a model names it."""
    own = find_own(model)
    return own.get_output_embeddings() if own is not None else None


def most_positions(model: Any) -> int:
    """Count the positions of which a model may make logits at once."""
    layer = output_embeddings(model)
    return Words(layer).most if layer is not None else MOST_LOGITS


def _multiplies(own: Any, words: Any) -> bool:
    """Tell a model that does nothing more to its logits than to multiply them, or to add a bias of its own."""
    said = own.config.get_text_config().to_dict().items()
    after = {name for name, value in said if "logit" in name and isinstance(value, int | float) and value not in (0, 1)}
    capped = any("cap" in name for name in after)
    biased = getattr(words, "bias", None) is not None or getattr(own, BIAS, None) is not None
    return not capped and not (after and biased)


def token_losses(words: Words, hidden: torch.Tensor, targets: torch.Tensor, parts: Sequence[int] = ()) -> torch.Tensor:
    """Negative log-likelihood of a token behind every hidden state.

    Parameters
    ----------
    words : Words
    hidden : Tensor of shape (N, D)
    targets : Tensor of shape (N,)
    parts : sequence of int
        How many of them, in order, meet the words apart from the others; N in all. Empty is all of them.

    Returns
    -------
    Tensor of shape (N,), in nats
    """
    most, sizes = words.piece(hidden), [*parts] or [len(hidden)]
    pieces = [
        piece
        for part in zip(torch.split(hidden, sizes), torch.split(targets, sizes), strict=True)
        for piece in zip(*(torch.split(x, most) for x in part), strict=True)
    ]
    if len(hidden) <= most:
        return torch.cat([_losses(words, *piece) for piece in pieces])
    return torch.cat([checkpoint(_losses, words, *piece, use_reentrant=False) for piece in pieces])  # logits not kept


def _losses(words: Words, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(_wide(words(hidden)), targets, reduction="none")


def choices(words: Words, hidden: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of some next tokens.

    Parameters
    ----------
    words : Words
    hidden : Tensor of shape (R, P, D)
        P positions of each of R rows.
    tokens : sequence of P sequences of int
        The tokens that are asked for behind each position.

    Returns
    -------
    Tensor of shape (R, P, C), in nats
        C is the length of the longest of `tokens`; what stands behind the others' ends means nothing.
    """
    width = max(map(len, tokens))
    asked = torch.tensor([[*some, *(0,) * (width - len(some))] for some in tokens], device=hidden.device)  # (P, C)
    rows, positions, size = hidden.shape
    flat = hidden.reshape(-1, size)
    most = words.piece(flat)
    pieces = []
    for start in range(0, len(flat), most):
        logits, place = words(flat[start : start + most]), start
        for some in torch.split(logits, _at_once(logits)):
            wanted = asked[torch.arange(place, place + len(some), device=asked.device) % positions]
            pieces.append(_chosen(_wide(some), wanted))
            place += len(some)
    return torch.cat(pieces).view(rows, positions, width)


def _chosen(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, wanted) - logits.logsumexp(1, keepdim=True)


def _at_once(logits: torch.Tensor) -> int:
    """Count the rows that are widened together: on a CPU what stays in its cache from one look to the next."""
    return max(1, AT_ONCE.get(logits.device.type, logits.numel()) // logits.shape[1])


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
