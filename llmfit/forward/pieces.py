"""Hidden states whose words are made a piece at a time, of padded rows too where that is seen to be the same.

Takes a lent module and a :class:`~llmfit.forward.Batch`; gives states, and what makes logits of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llmfit.forward.batches import Batch, bare_states, completion_logits
from llmfit.forward.checking import same_words
from llmfit.forward.words import Words, output_embeddings

__all__ = ["completion_states"]

LOOKED_AT = 16  # positions of a row that say whether two ways are one


def completion_states(model: Any, batch: Batch) -> tuple[torch.Tensor, Words]:
    """Hidden states of every loss token's predecessor, (N, D), and what makes logits of them.

    Only these positions meet the vocabulary. Of padded rows whose logits are few, or whose model makes them in a way of
    its own, it is the logits, (N, V), and nothing to be made.
    """
    if batch.layout is not None or _in_pieces(model, batch):
        return bare_states(model, batch)
    return completion_logits(model, batch), Words()


def _in_pieces(model: Any, batch: Batch) -> bool:
    """Tell padded rows with more logits than may be made at once, of a model that says the same without them."""
    layer = output_embeddings(model)
    if layer is None or not batch.targets.numel():
        return False
    made = len(batch.targets) if batch.decoder_input_ids is None else batch.predicts.numel()  # such a decoder keeps all
    if made <= Words(layer).most:
        return False

    def read() -> list[torch.Tensor]:
        few = _sample(batch)
        states, words = bare_states(model, few)
        return [completion_logits(model, few), words(states)]

    return same_words(model, "in pieces", read)


def _sample(batch: Batch) -> Batch:
    """Take the row of a padded batch of which most is asked, as far as its first answers."""
    row = int(batch.predicts.sum(1).argmax())
    predicts = batch.predicts[row : row + 1]
    predicts = predicts & (predicts.cumsum(1) <= LOOKED_AT)
    stop = int(predicts.nonzero()[-1, 1]) + 1
    ids, count = batch.input_ids[row : row + 1], int(predicts.sum())
    few = replace(batch, predicts=predicts[:, :stop], targets=batch.targets[:count], weights=batch.weights[:count])
    if batch.decoder_input_ids is None or batch.attention_mask is None:
        return replace(few, input_ids=ids[:, :stop])
    said, mask = batch.decoder_input_ids[row : row + 1, :stop], batch.attention_mask[row : row + 1]
    return replace(few, input_ids=ids, decoder_input_ids=said, attention_mask=mask)
