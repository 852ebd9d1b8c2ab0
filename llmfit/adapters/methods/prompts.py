"""Methods that put virtual tokens before a prompt: prefix tuning, prompt tuning, P-tuning.

peft makes and keeps the virtual tokens; :class:`~llmfit.adapters.virtual.VirtualTokens` hides them from whoever calls
the model. What computes them while they are learned is not kept: they are.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters.peft_spec import PeftSpec
from llmfit.adapters.spec import TASK_TYPES, Plan, Tensors
from llmfit.exceptions import ParameterError, check_choice, parameter_error

if TYPE_CHECKING:
    import torch

    from llmfit.base_model import BaseModel

__all__ = ["METHODS", "PTuning", "PrefixTuning", "PromptSpec", "PromptTuning"]


@dataclass(frozen=True, kw_only=True, repr=False)
class PromptSpec(PeftSpec):
    """Base of the methods with virtual tokens.

    Parameters
    ----------
    num_virtual_tokens : int, default=20
        Virtual tokens before every row. They take room of the model's context.
    """

    mergeable: ClassVar[bool] = False
    prefix: ClassVar[bool] = False

    num_virtual_tokens: int = 20

    @property
    def virtual_tokens(self) -> int:
        """Positions of the model's context that the adapter takes."""
        return int(self.num_virtual_tokens)

    @property
    def virtual_states(self) -> int:
        """Positions before a row's own among the hidden states; keys and values have none."""
        return 0 if self.prefix else self.virtual_tokens

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Put the virtual tokens before the model's inputs.

        What computes them while they are learned is needed no more once there are weights: these are they.
        """
        config.inference_mode = tensors is not None
        model = super().put_in(base, config, tensors, plan)
        model.prompt_encoder.requires_grad_(True)
        return self.hidden(model, base)

    def hidden(self, model: Any, base: BaseModel) -> Any:
        """Hide the virtual tokens in peft's model from whoever calls it."""
        from llmfit.adapters.virtual import EncodedVirtualTokens, VirtualTokens

        if base.kind == "decoder":
            return VirtualTokens(model, prefix=False)
        return EncodedVirtualTokens(model, base.model.get_encoder() if base.kind == "encoder-decoder" else None)

    def config(self, kind: str, base_name: str | None = None, **settings: Any) -> Any:
        """Build peft's configuration: of an encoder-decoder, the encoder alone has virtual tokens."""
        alone = {} if self.prefix or kind == "decoder" else {"num_transformer_submodules": 1}
        return super().config(kind, base_name, **{**alone, **settings})

    def load(self, model: Any, tensors: Tensors) -> None:
        """Write fitted virtual tokens into the adapter; peft keeps as many again for a decoder, which sees none."""
        embeddings = tensors.get("prompt_embeddings")
        if embeddings is not None and not self.prefix and len(embeddings) == 2 * self.virtual_tokens:
            tensors = {**tensors, "prompt_embeddings": embeddings[: self.virtual_tokens]}
        super().load(model.peft_model, tensors)

    def tensors(self, model: Any) -> Tensors:
        """Copy the virtual tokens."""
        return super().tensors(model.peft_model)


@dataclass(frozen=True, kw_only=True, repr=False)
class PromptTuning(PromptSpec):
    """Prompt tuning: embeddings of virtual tokens before the prompt.

    Parameters
    ----------
    num_virtual_tokens : int, default=20
        Virtual tokens before every row. They take room of the model's context.
    init_text : str or None, default=None
        Begin with the embeddings of this text's tokens, repeated or cut to the number of virtual tokens.
    init : {"vocabulary", "random"}, default="vocabulary"
        Without a text, begin with the embeddings of tokens drawn from the vocabulary, or with normal random numbers of
        variance 1, as PEFT does unless it is told otherwise.

    References
    ----------
    .. [1] Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning. arXiv:2104.08691.
    """

    type: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    learning_rate: ClassVar[float] = 3e-2  # peft's examples; the paper takes 0.3 with Adafactor
    apart: ClassVar[tuple[str, ...]] = ("init_text", "init")

    init_text: str | None = None
    init: str = "vocabulary"

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        if self.init_text is not None and self.init != "vocabulary":
            raise parameter_error("init", "PromptTuning", "'vocabulary' where init_text is given", self.init)

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Put the virtual tokens before the model's inputs, new ones with the embeddings of words."""
        model = super().put_in(base, config, tensors, plan)
        if tensors is None and self.init == "vocabulary":
            weight = model.peft_model.prompt_encoder["default"].embedding.weight
            ids = self._first_ids(base.tokenizer, len(model.peft_model.word_embeddings.weight))
            weight.data = model.embed(ids.to(model.device)).detach().to(weight.device, weight.dtype)
        return model

    def _first_ids(self, tokenizer: Any, vocabulary: int) -> torch.Tensor:
        import torch

        if self.init_text is None:
            return torch.randint(0, vocabulary, (self.virtual_tokens,))
        ids = tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise parameter_error("init_text", "PromptTuning", "a text of at least one token", self.init_text)
        return torch.tensor((ids * (self.virtual_tokens // len(ids) + 1))[: self.virtual_tokens])


@dataclass(frozen=True, kw_only=True, repr=False)
class PrefixTuning(PromptSpec):
    """Prefix tuning: keys and values of virtual tokens in every layer.

    Of a decoder, or of an encoder under a linear head, whose layers can take them (those of BERT and RoBERTa). Of an
    encoder-decoder they are the decoder's alone, before what it says: its encoder takes none.

    Parameters
    ----------
    num_virtual_tokens : int, default=20
        Virtual tokens before every row. They take room of the model's context.
    prefix_projection : bool, default=False
        Compute them by a network of two layers while they are learned.
    encoder_hidden_size : int or None, default=None
        Its hidden size. None is the width of a layer's keys.
    init_weights : {None, "zero"}, default=None
        Begin with keys and values of zero instead of random ones.

    References
    ----------
    .. [1] Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation. arXiv:2101.00190.
    """

    type: ClassVar[str] = "prefix_tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    learning_rate: ClassVar[float] = 1e-2  # peft's examples
    recomputable: ClassVar[bool] = False  # a layer that is computed again would find its cache filled
    prefix: ClassVar[bool] = True
    idle: ClassVar[dict[str, tuple[str, Any]]] = {"encoder_hidden_size": ("prefix_projection", False)}

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        check_choice("init_weights", "PrefixTuning", self.init_weights, [None, "zero"])

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Read fitted keys and values as they are."""
        sizes = tensors["prompt_embeddings"].shape[1:]
        return {"prefix_projection": False, **(_sizes(*sizes) if len(sizes) == 3 else {})}

    def fitted(self, model: Any) -> dict[str, Any]:
        """Give the sizes of a decoder's keys beside an encoder: peft would take the encoder's.

        Of the keys and values that it makes for n layers it hands on every other pair, counted round: with an odd n
        every layer has its own, with an even one two layers share one and half of all is never used.
        """
        if not model.config.is_encoder_decoder:
            return {}
        if next(model.get_decoder().parameters(), None) is None:
            raise ParameterError(
                "The adapter 'prefix_tuning' stands before what the decoder beside an encoder says, and a linear head "
                "reads the encoder alone, whose layers take no keys and values from elsewhere. Choose another adapter, "
                "as 'p_tuning', or set head='lm'."
            )
        from llmfit.adapters.virtual import decoder_keys

        layers, heads, width = decoder_keys(model)
        return _sizes(2 * (layers + 1 - layers % 2), heads, width)

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Put keys and values before those of a row; an encoder has to know of such."""
        from llmfit.adapters.virtual import takes_no_keys

        if base.kind == "encoder" and "past_key_values" not in inspect.signature(base.model.forward).parameters:
            raise takes_no_keys(base.model)
        return super().put_in(base, config, tensors, plan)

    def hidden(self, model: Any, base: BaseModel) -> Any:
        """Hide the keys and values in peft's model from whoever calls it."""
        from llmfit.adapters.virtual import DecoderPrefix, EncodedPrefix, VirtualTokens

        if base.kind == "decoder":
            return VirtualTokens(model, prefix=True)
        return EncodedPrefix(model) if base.kind == "encoder" else DecoderPrefix(model)

    def load(self, model: Any, tensors: Tensors) -> None:
        """Write fitted keys and values into the adapter."""
        super().load(model, self.written(tensors))

    def tensors(self, model: Any) -> Tensors:
        """Copy the keys and values; those beside an encoder in their sizes, which no model of its kind tells again."""
        config, tensors = model.peft_config["default"], super().tensors(model)
        return _sized(tensors, vars(config)) if config.task_type == TASK_TYPES["encoder-decoder"] else tensors

    def written(self, tensors: Tensors) -> Tensors:
        """Write them as peft's files have them: (virtual tokens, all numbers of one)."""
        return {name: tensor.flatten(1) for name, tensor in tensors.items()}

    @classmethod
    def read(cls, folder: Path, tensors: Tensors) -> Tensors:
        """Read them off such a file, in the sizes that stand beside it."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return _sized(tensors, config) if config.get("task_type") == TASK_TYPES["encoder-decoder"] else tensors


def _sizes(parts: int, heads: int, width: int) -> dict[str, int]:
    """Say in peft's words of which sizes keys and values are: `parts` of them for each virtual token."""
    return {"num_layers": parts // 2, "num_attention_heads": heads, "token_dim": heads * width}


def _sized(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Part the numbers of a virtual token: (virtual tokens, keys and values, heads, width)."""
    heads, dim = config["num_attention_heads"], config["token_dim"]
    return {n: tensor.reshape(len(tensor), -1, heads, dim // heads) for n, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class PTuning(PromptSpec):
    """P-tuning: embeddings of virtual tokens, computed by a small network while they are learned.

    Parameters
    ----------
    num_virtual_tokens : int, default=20
        Virtual tokens before every row. They take room of the model's context.
    encoder_reparameterization_type : {"MLP", "LSTM"}, default="MLP"
    encoder_hidden_size : int or None, default=None
        Hidden size of the network. None is the model's.
    encoder_num_layers : int, default=2
        Layers of the LSTM.
    encoder_dropout : float, default=0.0
        Dropout between the layers of the LSTM.

    References
    ----------
    .. [1] Liu et al. 2021, GPT Understands, Too. arXiv:2103.10385.
    """

    type: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    learning_rate: ClassVar[float] = 1e-3  # peft's examples: the network's weights take smaller steps than embeddings

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        plain = replace(self, encoder_num_layers=2, encoder_dropout=0.0)
        if self.encoder_reparameterization_type == "MLP" and plain != self:
            raise ParameterError(
                "The 'encoder_num_layers' and 'encoder_dropout' parameters of PTuning are the LSTM's. "
                "Set encoder_reparameterization_type='LSTM' with them."
            )


METHODS = {
    "prefix_tuning": PrefixTuning,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
}
