"""The modules that hide virtual tokens from whoever calls a model.

Takes peft's model; gives one whose masks, positions, caches and logits count real tokens only, in training, scoring and
generation alike. A decoder has them before a row, an encoder before the prompt that it reads, whatever says the answer.
Knows no method: peft makes the virtual tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from llmfit.exceptions import ParameterError
from llmfit.selfcheck import apart

__all__ = ["EncodedVirtualTokens", "VirtualTokens"]

SCALES = ("embed_scale", "embedding_multiplier")  # what some models multiply with where they embed ids themselves
ALIKE = 0.05  # how far apart two readings of the same may be


class _Hiding(nn.Module):
    """Stands before peft's model, and answers for the base model in it.

    Parameters
    ----------
    peft_model : peft.PeftModel
        Makes the virtual tokens.
    """

    packable = False  # a row's virtual tokens stand before what rows share

    def __init__(self, peft_model: Any) -> None:
        super().__init__()
        self.peft_model, self.peft_config = peft_model, peft_model.peft_config
        self.number = peft_model.peft_config["default"].num_virtual_tokens
        self.scale = 1.0

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens as the model itself does: (B, T) to (B, T, H)."""
        embedded: torch.Tensor = self.peft_model.word_embeddings(input_ids)
        return embedded if self.scale == 1 else embedded * self.scale

    def _behind(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens, behind virtual ones: (B, V + T, H)."""
        embedded = self.embed(input_ids)
        virtual = self.peft_model.get_prompt(batch_size=len(input_ids))
        return torch.cat([virtual.to(embedded.dtype), embedded], dim=1)

    def _find_scale(self, reader: Any) -> None:
        """See what a model multiplies the embeddings of ids with, and not embeddings that it is given.

        Raises
        ------
        ParameterError
            If it reads embeddings in yet another way.
        """
        own = [vars(module).get(name) for module in reader.modules() for name in SCALES if not _embeds(module)]
        choices = {1.0, *(float(scale) for scale in own if isinstance(scale, int | float))}
        if len(choices) == 1:
            return
        ids = torch.arange(8, device=self.device)[None]
        training = reader.training
        reader.eval()
        with torch.no_grad():
            plain = reader(input_ids=ids, use_cache=False)[0]
            words = self.peft_model.word_embeddings(ids)
            found = {c: apart(reader(inputs_embeds=words * c, use_cache=False)[0], plain) for c in choices}
        reader.train(training)
        self.scale = min(choices, key=found.__getitem__)
        if not found[self.scale] <= ALIKE:
            raise ParameterError(
                "Virtual tokens cannot be put before this model: it reads embeddings that are given otherwise than "
                "those of its own tokens."
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.peft_model.device
        return device

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.peft_model.get_base_model().config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base model does."""
        return self.peft_model.get_base_model().generate(*args, **kwargs)


class VirtualTokens(_Hiding):
    """A decoder with virtual tokens before every row, called as if there were none.

    Where the cache is empty, they go in: as keys and values of every layer (`prefix`), or as embeddings before those of
    the row. Where the cache holds them already, masks and positions are moved behind them. The base model's own
    ``forward`` is replaced while it is lent, so that its ``generate`` finds them too.

    Parameters
    ----------
    peft_model : peft.PeftModel
        Makes the virtual tokens.
    prefix : bool
    """

    def __init__(self, peft_model: Any, *, prefix: bool) -> None:
        super().__init__(peft_model)
        self.prefix = prefix
        if not prefix:
            self._find_scale(peft_model.get_base_model())
        self.base = peft_model.get_base_model().forward

        @functools.wraps(self.base)  # generate looks at the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

        peft_model.get_base_model().forward = forward

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        **others: Any,
    ) -> Any:
        """Call the base model; see :class:`VirtualTokens`.

        Parameters
        ----------
        input_ids : Tensor of shape (B, T)
        attention_mask : Tensor of shape (B, tokens in the cache + T), or None
        position_ids : Tensor of shape (B, T), or None
        logits_to_keep : int, or Tensor as the base model takes it

        Returns
        -------
        transformers.utils.ModelOutput
            Logits of real tokens only.
        """
        filled = past_key_values is not None and past_key_values.get_seq_length() > 0
        inputs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": past_key_values}
        before = 0  # positions of this call that are virtual
        if not filled and self.prefix:
            inputs["past_key_values"] = self._prefix(len(input_ids), past_key_values)
        elif not filled:
            inputs["input_ids"], before = None, self.number
            inputs["inputs_embeds"] = self._behind(input_ids)
        if attention_mask is not None:
            inputs["attention_mask"] = _seen(attention_mask, self.number)
        if position_ids is not None:
            inputs["position_ids"] = self._moved(position_ids, before)
        out = self.base(**inputs, logits_to_keep=self._kept(logits_to_keep, before), **others)
        if before and isinstance(logits_to_keep, int) and logits_to_keep == 0:
            out.logits = out.logits[:, before:]
        return out

    def _prefix(self, batch_size: int, given: Any) -> Any:
        """Fill an empty cache, or a new one where none is given."""
        cache = self.peft_model.get_prompt(batch_size)
        if given is None:
            return cache
        for index, layer in enumerate(cache.layers):
            given.update(layer.keys, layer.values, index)
        return given

    def _moved(self, positions: torch.Tensor, before: int) -> torch.Tensor:
        moved = positions + self.number
        first = torch.arange(before, device=positions.device).expand(len(positions), before)
        return torch.cat([first.to(positions.dtype), moved], dim=1)

    def _kept(self, chosen: Any, before: int) -> Any:
        """Shift which positions have logits: the last k, a mask of all, or indices."""
        if not isinstance(chosen, torch.Tensor) or not before:
            return chosen
        if chosen.dtype == torch.bool:
            return torch.cat([chosen.new_zeros(*chosen.shape[:-1], before), chosen], dim=-1)
        return chosen + before


class EncodedVirtualTokens(_Hiding):
    """An encoder with virtual tokens before every prompt, called as if there were none, with or without a decoder.

    They go in as embeddings, where the encoder itself is called: `generate` and a linear head call it apart from the
    model. A decoder sees what the encoder made of them. Both ``forward`` are replaced while the model is lent.

    Parameters
    ----------
    peft_model : peft.PeftModel
        Makes the virtual tokens.
    encoder : torch.nn.Module or None
        The model's encoder, where it has a decoder as well.
    """

    def __init__(self, peft_model: Any, encoder: Any = None) -> None:
        super().__init__(peft_model)
        model = peft_model.get_base_model()
        self._find_scale(model if encoder is None else encoder)
        if encoder is not None:
            encoder.forward = _replaced(encoder.forward, self._encode)
        model.forward = _replaced(model.forward, self._encode if encoder is None else self._answer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; see :class:`EncodedVirtualTokens`.

        Returns
        -------
        transformers.utils.ModelOutput
            Hidden states of an encoder stand for virtual tokens as well, before the others.
        """
        return self.peft_model.get_base_model()(*args, **kwargs)

    def _encode(self, whole: Any, input_ids: torch.Tensor, attention_mask: Any = None, **others: Any) -> Any:
        """Read a prompt behind virtual tokens; the mask may know of them already."""
        others["inputs_embeds"] = self._behind(input_ids)
        if attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]:
            attention_mask = _seen(attention_mask, self.number)
        return whole(attention_mask=attention_mask, **others)

    def _answer(self, whole: Any, *args: Any, attention_mask: Any = None, **others: Any) -> Any:
        """Answer what the encoder reads, or has read."""
        seen = None if attention_mask is None else _seen(attention_mask, self.number)
        return whole(*args, attention_mask=seen, **others)


def _replaced(whole: Any, by: Any) -> Any:
    """Let another function stand for a model's, its signature kept: generate looks at it."""

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return by(whole, *args, **kwargs)

    return forward


def _embeds(module: nn.Module) -> bool:
    """Tell an embedding, which does all that it does wherever it is called."""
    return isinstance(module, nn.Embedding)


def _seen(mask: torch.Tensor, number: int) -> torch.Tensor:
    """Let a mask see so many virtual tokens before all others: (B, V + T)."""
    return torch.cat([mask.new_ones(len(mask), number), mask], dim=1)
