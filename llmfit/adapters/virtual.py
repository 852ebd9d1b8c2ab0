"""The modules that hide virtual tokens from whoever calls a model.

Takes peft's model; gives one whose masks, positions, caches and logits count real tokens only, in training, scoring and
generation alike. A decoder has them before a row, an encoder before the prompt that it reads, whatever says the answer;
the decoder beside an encoder has keys and values before what it says.
Knows no method: peft makes the virtual tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from llmfit.exceptions import ModelLoadError, ParameterError
from llmfit.selfcheck import apart

__all__ = ["DecoderPrefix", "EncodedPrefix", "EncodedVirtualTokens", "VirtualTokens", "decoder_keys", "takes_no_keys"]

SCALES = ("embed_scale", "embedding_multiplier")  # what some models multiply with where they embed ids themselves
ALIKE = 0.05  # how far apart two readings of the same may be
SOME = 8  # tokens that a model is tried on


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


class EncodedPrefix(_Hiding):
    """An encoder with keys and values of virtual tokens in every layer, called as if there were none.

    As peft's own model for features does it: the encoder is given a filled cache, and a mask that counts it. Its
    ``forward`` is replaced while it is lent.

    Parameters
    ----------
    peft_model : peft.PeftModel
        Makes the virtual tokens.
    """

    def __init__(self, peft_model: Any) -> None:
        super().__init__(peft_model)
        model = peft_model.get_base_model()
        if not self._attended(model):
            raise takes_no_keys(model)
        model.forward = _replaced(model.forward, self._encode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; see :class:`EncodedPrefix`.

        Returns
        -------
        transformers.utils.ModelOutput
            Hidden states of real tokens only.
        """
        return self.peft_model.get_base_model()(*args, **kwargs)

    def _encode(self, whole: Any, input_ids: torch.Tensor, attention_mask: Any = None, **others: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = self.peft_model.get_prompt(len(input_ids))
        return whole(
            input_ids=input_ids, attention_mask=_seen(mask, self.number), **{**others, "past_key_values": cache}
        )

    def _attended(self, model: Any) -> bool:
        """See whether every layer puts what it makes behind what it is given: others leave a cache aside in silence."""
        ids, training = torch.arange(SOME, device=self.device)[None], model.training
        cache = self.peft_model.get_prompt(1)
        mask = ids.new_ones(1, self.number + SOME)
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=mask, past_key_values=cache)
        model.train(training)
        return all(layer.get_seq_length() == self.number + SOME for layer in cache.layers)


class DecoderPrefix(_Hiding):
    """An encoder-decoder whose decoder attends to keys and values of virtual tokens before what it says.

    They stand in the cache of its self-attention alone, as with peft: an encoder keeps none, and cross-attention makes
    its own of what the encoder reads. The model's ``forward`` is replaced while it is lent, so that its ``generate``
    finds them too.

    Parameters
    ----------
    peft_model : peft.PeftModel
        Makes the virtual tokens.

    Raises
    ------
    ModelLoadError
        If they are of another size than the decoder's keys.
    """

    def __init__(self, peft_model: Any) -> None:
        super().__init__(peft_model)
        model, config = peft_model.get_base_model(), peft_model.peft_config["default"]
        self.layers, heads, width = decoder_keys(model)
        if config.num_layers < self.layers or (config.num_attention_heads, config.token_dim) != (heads, heads * width):
            raise ModelLoadError(
                "The saved weights do not belong to this base model: its decoder has keys of another size."
            )
        model.forward = _replaced(model.forward, self._answer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; see :class:`DecoderPrefix`.

        Returns
        -------
        transformers.utils.ModelOutput
            Logits of real tokens only.
        """
        return self.peft_model.get_base_model()(*args, **kwargs)

    def _answer(
        self, whole: Any, *args: Any, decoder_input_ids: torch.Tensor, past_key_values: Any = None, **others: Any
    ) -> Any:
        """Fill an empty cache, or a new one; where it is filled, the virtual tokens are in it."""
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            past_key_values = self._filled(len(decoder_input_ids), past_key_values)
        said = others.get("decoder_attention_mask")
        if said is not None:
            others["decoder_attention_mask"] = _seen(said, self.number)
        return whole(*args, decoder_input_ids=decoder_input_ids, past_key_values=past_key_values, **others)

    def _filled(self, batch_size: int, given: Any) -> Any:
        cache = self.peft_model.get_prompt(batch_size)
        own = cache.self_attention_cache
        own.layers = own.layers[: self.layers]
        if given is None:
            return cache
        for index, layer in enumerate(own.layers):
            given.self_attention_cache.update(layer.keys, layer.values, index)
        return given


def takes_no_keys(model: Any) -> ParameterError:
    """Say that an encoder's layers take no keys and values from before a row."""
    return ParameterError(
        "The adapter 'prefix_tuning' is for models whose layers take keys and values from before a row, which this "
        f"encoder of the family {model.config.model_type!r} does not. Choose another adapter, as 'p_tuning'."
    )


def decoder_keys(model: Any) -> tuple[int, int, int]:
    """Read off a model's own cache how many layers its decoder has, and the heads and width of their keys.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        An encoder-decoder.

    Raises
    ------
    ParameterError
        If layers differ, or keep no keys and values.
    """
    ids, training = torch.zeros(1, 1, dtype=torch.long, device=model.device), model.training
    with torch.no_grad():
        out = model.eval()(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    model.train(training)
    layers = getattr(getattr(out.past_key_values, "self_attention_cache", None), "layers", ())
    sizes = {tuple(layer.keys.shape) for layer in layers}
    if len(sizes) != 1:
        raise ParameterError(
            f"The adapter 'prefix_tuning' is for models whose layers keep keys and values of one size, which this "
            f"decoder of the family {model.config.model_type!r} does not."
        )
    ((_, heads, _, width),) = sizes
    return len(layers), heads, width


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
