"""Prompts whose answers are generated: as ``model.generate`` of transformers wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmfit.batching import PAD_STEP, pad
from llmfit.encoding import Ids

__all__ = ["generation_inputs"]


def generation_inputs(
    prompts: Sequence[Ids], *, pad_id: int, device: torch.device, start_ids: Ids = (), step: int = PAD_STEP
) -> tuple[dict[str, torch.Tensor], int]:
    """Pad prompts as ``model.generate`` wants them.

    Returns
    -------
    dict of str to Tensor
    int
        Tokens that stand before each answer in what is generated.
    """
    ids, mask = (torch.from_numpy(array).to(device) for array in pad(prompts, pad_id, left=not start_ids, step=step))
    given = {"input_ids": ids, "attention_mask": mask}
    if not start_ids:
        return given, ids.shape[1]
    return {**given, "decoder_input_ids": torch.tensor(start_ids, device=device).repeat(len(ids), 1)}, len(start_ids)
