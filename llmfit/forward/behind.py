"""Packed rows that are read once, and tokens that go on from some of them in passes of their own.

Takes a lent module and prompts; gives what the model says behind them. Knows no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from llmfit.encoding import Ids
from llmfit.forward.batches import ask, collate, completion_logits, on_device
from llmfit.forward.checking import SHORT, same_words, some_rows
from llmfit.forward.pieces import completion_states
from llmfit.forward.words import Words
from llmfit.kinds import find_own
from llmfit.packing import Branch, KeptBeginning, Layout, Tree, common_prefix, lay_behind, packed

__all__ = ["go_behind", "goes_behind", "read_rows"]


def read_rows(
    model: Any, prompts: Sequence[Ids], *, pad_id: int, device: torch.device, shared: int, kept: KeptBeginning
) -> tuple[torch.Tensor, Words, Layout]:
    """Read packed prompts, and keep the keys and values of each.

    Parameters
    ----------
    prompts : sequence of tuple of int, length R
    shared, kept
        As for :func:`~llmfit.forward.ask`.

    Returns
    -------
    Tensor of shape (R, D)
        What the model says behind each.
    Words
        What makes logits of that.
    Layout
        For :func:`go_behind`.
    """
    batch = ask(prompts, (), Tree(), pad_id=pad_id, device=device, shared=shared, kept=kept)
    layout: Any = batch.layout
    layout = replace(layout, read={})
    states, words = completion_states(model, replace(batch, layout=layout))
    return states, words, layout


def go_behind(
    model: Any,
    layout: Layout,
    rows: Sequence[int],
    branches: Sequence[Branch],
    pad_id: int,
) -> tuple[torch.Tensor, Words, list[int]]:
    """Read a branch of answers behind each of some rows.

    Parameters
    ----------
    layout : Layout
        As :func:`read_rows` gave it.
    rows : sequence of int
        Their positions there.
    branches : sequence of Branch, as long

    Returns
    -------
    Tensor of shape (N, D)
        What the model says behind each of their tokens, row by row.
    Words
    list of int
        Places, among all that was read, of each branch's first token.
    """
    behind = lay_behind(layout, rows, branches)
    ids = torch.full((1, behind.length), pad_id)
    predicts = torch.zeros(1, behind.length, dtype=torch.bool)
    for start, branch in zip(behind.starts, branches, strict=True):
        ids[0, start : start + len(branch.tokens)] = torch.tensor(branch.tokens)
        predicts[0, start : start + len(branch.tokens)] = True
    nothing = torch.zeros(int(predicts.sum()), dtype=torch.long)
    batch = on_device([ids, predicts, nothing, nothing], layout.positions.device)
    states, words = completion_states(model, replace(batch, layout=behind))
    return states, words, [behind.offset + start for start in behind.starts]


def goes_behind(model: Any, *, pad_id: int, device: torch.device) -> bool:
    """Tell whether a model that reads packed rows goes on from them as it does from whole ones; seen once."""

    def read() -> list[torch.Tensor]:
        rows = some_rows(find_own(model), SHORT, 3)
        first, second, other = rows[0].completion
        plain = completion_logits(model, collate(rows, pad_id, device))
        alone = torch.cat([completion_logits(model, collate([row], pad_id, device)) for row in rows])
        with packed(model):
            prompts = [row.prompt for row in rows]
            how: dict[str, Any] = {
                "pad_id": pad_id,
                "device": device,
                "shared": common_prefix(prompts),
                "kept": KeptBeginning(),
            }
            states, words, layout = read_rows(model, prompts, **how)
            said, every = [states], range(len(rows))
            head = Branch((other, first), Tree((0, 0), (1, 2)), ((), ()))
            behind, _, places = go_behind(model, layout, every, [head] * len(rows), pad_id)
            said.append(behind.view(len(rows), 2, -1)[:, 1])
            tails = [Branch((second,), Tree((1,), (1,)), ((place + 1,),)) for place in places]
            said.append(go_behind(model, layout, every, tails, pad_id)[0])
            quick = words(torch.stack(said, dim=1).flatten(0, 1))
        return [plain, quick, alone]

    return same_words(model, "behind", read)
