"""Base models: loaded once in a process, shared by every estimator, given back as they were.

Takes a name, a device and a dtype; gives a :class:`BaseModel` out of one bounded, locked cache. This is the only
file that loads a model, and :meth:`BaseModel.attach` the only place that changes one: whatever an adapter
does inside, weights, modules, flags and hooks are those from before when it ends, also by an exception.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from llmfit.batching import PAD_STEP
from llmfit.embeddings import forget_embeddings
from llmfit.encoding import Encoder
from llmfit.exceptions import LLMFitError, ModelLoadError, ParameterError, check_choice, parameter_error, reason
from llmfit.keeping import Adapter, Kept, Standing, cuda_in_use
from llmfit.kinds import draws_numbers, kind_of, missing_words, see_both_ways
from llmfit.memory import free, is_out_of_memory, keep_freed, once_more, one_memory_error
from llmfit.quantization import (
    Quantization,
    check_quantizable,
    loading_options,
    memory_footprint,
    resolve_quantization,
    settle,
)
from llmfit.sources import Source, find_source, forget_sources, quiet_loading

__all__ = ["DTYPES", "BaseModel", "clear_cache", "load_base_model", "load_copy"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MOST_CACHED = 2
SHORT = 512  # tokens up to which plain attention beats the fused kernel on a CPU (docs/performance.md)
UNSTATED_CONTEXT = 2048  # tokens, for the rare model that states no limit


class BaseModel:
    """A pretrained model and its tokenizer, shared and frozen.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    kind : {"decoder", "encoder", "encoder-decoder"}
        A decoder goes on with its prompt, an encoder-decoder reads it and answers beside it, an encoder has no words.
    source : Source
    device : torch.device
    dtype : torch.dtype
        Of what is not quantized, and of what is computed.
    quantization : Quantization or None
    memory_footprint : int
        Bytes of the weights as they are stored.
    without : tuple of str
        Weights that its files do not have, and without which it has no words: a linear head needs none of them.
    unpacked : frozenset of str
        Layers of a copy whose weights are those that a quantized model's stand for.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype | str, quantization: Quantization | None = None
    ) -> None:
        self.source, self.device, self.quantization = source, device, quantization
        self.tokenizer, self.model, self.kind, self.without = _read(source, dtype, device, quantization)
        if device.type == "cpu":
            keep_freed()
        self.dtype: torch.dtype = dtype if isinstance(dtype, torch.dtype) else self.model.dtype
        self.model.requires_grad_(False).eval()
        if (words := self.model.get_output_embeddings()) is not None:
            words.register_forward_pre_hook(_side_by_side)
        if quantization is None:
            self.model.to(device)
        else:
            settle(self.model)
        self.memory_footprint = memory_footprint(self.model)
        self.unpacked: frozenset[str] = frozenset()
        self._lent, self._standing = False, Standing()

    @property
    def context_length(self) -> int:
        """Tokens that the model can attend to; of its own positions whole steps of padding."""
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or UNSTATED_CONTEXT
        return int(min(stated // PAD_STEP * PAD_STEP or stated, self.tokenizer.model_max_length))

    @property
    def pad_id(self) -> int:
        """A token id to fill batches with; it is never attended to and carries no loss."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(i for i in ids if i is not None))

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What an encoder-decoder's decoder begins an answer from; () where answers go on behind prompts.

        That is the model's own start token, and what its tokenizer opens every text with, as in its pretraining.
        """
        if self.kind != "encoder-decoder":
            return ()
        configs = (self.model.config, self.model.generation_config)
        starts = (getattr(config, "decoder_start_token_id", None) for config in configs)
        start = next((i for i in starts if i is not None), None)
        if start is None:
            raise ModelLoadError(
                f"The base model {self.source.name!r} states no decoder_start_token_id, so that no answer could begin."
            )
        opening = Encoder(self.tokenizer).opening
        return opening if opening[:1] == (start,) else (start, *opening)

    @property
    def has_dropout(self) -> bool:
        """Whether the model itself draws random numbers in training."""
        return draws_numbers(self.model.config)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self.tokenizer.chat_template)

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Render messages with the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    @contextmanager
    def attach(
        self,
        adapter: Adapter | None,
        tensors: dict[str, torch.Tensor] | None = None,
        *,
        seed: int = 0,
        training: bool = False,
        longest: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> Iterator[Any]:
        """Lend the model with an adapter in it, alone to this thread; then restore it bit by bit.

        One model is lent at a time in a process: torch's generators, which are seeded here, are the process's.

        Parameters
        ----------
        adapter : Adapter or None
            None lends the plain model.
        tensors : dict of str to Tensor or None
            Weights of a fitted adapter; None draws new ones from `seed`.
        seed : int
            Seeds torch inside; torch's own generators are as before afterwards.
        training : bool
            Put the module into training mode and let the adapter's weights require gradients.
        longest : int or None
            Tokens of the longest row to come, where it is known: decides how attention is computed.
        gradient_checkpointing : bool
            In training, keep a layer's inputs only, and compute the rest again on the way back.

        Yields
        ------
        torch.nn.Module

        Raises
        ------
        LLMFitError
            If this thread has lent the model already.
        ParameterError
            If the adapter trains weights that are quantized.
        OutOfMemoryError
            If memory does not hold the adapter.
        """
        with _lock, torch.random.fork_rng(devices=cuda_in_use()):
            if self._lent:
                raise LLMFitError(
                    f"The base model {self.source.name!r} is lent to a fit or a prediction that has not ended: "
                    "a callback cannot use an estimator on the same base model."
                )
            check_quantizable(adapter, self.quantization)
            kept = Kept(self.model)
            self._lent = True
            try:
                ready = partial(self._make_ready, adapter, tensors, seed=seed, training=training, longest=longest)
                with one_memory_error("the adapter's weights"):
                    model = once_more(ready, undo=kept.restore)
                if tensors is not None:
                    torch.manual_seed(seed)  # whether layers were drawn anew or not
                if training and gradient_checkpointing:
                    _recompute(self.model)
                yield model.train(training)
            finally:
                kept.restore()
                self._standing.in_use, self._lent = None, False

    def _make_ready(
        self, adapter: Adapter | None, tensors: Any, *, seed: int, training: bool, longest: int | None
    ) -> Any:
        """Choose how attention is computed, and put the adapter in."""
        torch.manual_seed(seed)
        short = longest is not None and longest <= SHORT
        if self.device.type == "cpu" and short and self.dtype != torch.float64:  # NaN behind padding there
            self.model.set_attn_implementation("eager")
        if adapter is None:
            return self.model
        return self._standing.put_in(self, adapter, tensors, seed=seed, training=training)


def _side_by_side(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy hidden states that were cut out of longer rows: torch would copy the words' weights, once for each row."""
    return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs)


def _recompute(model: Any) -> None:
    """Let the layers of a lent model forget their activations in training.

    Without re-entry, the inputs of the layers need no gradients of their own.

    Raises
    ------
    ParameterError
        If the model's layers cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ParameterError(
            f"The 'gradient_checkpointing' parameter must be False for this base model: {reason(error)}."
        ) from error
    model.disable_input_require_grads()


def _read(
    source: Source, dtype: torch.dtype | str, device: torch.device, quantization: Quantization | None
) -> tuple[Any, Any, str, tuple[str, ...]]:
    import transformers

    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **safe)
            config = transformers.AutoConfig.from_pretrained(source.folder, **safe)
            kind, loader = kind_of(config)
            how = {**loading_options(quantization, loader, config, dtype, device), **_without_pooler(loader, config)}
            how |= {"config": config} if kind == "encoder-decoder" else {}
            model, told = loader.from_pretrained(source.folder, dtype=dtype, output_loading_info=True, **how, **safe)
            see_both_ways(model.config)
    except Exception as error:  # loaders raise errors of many libraries
        if is_out_of_memory(error):
            raise
        why = reason(error)
        if "trust_remote_code" in str(error):
            why = "it needs code that comes with the model, and llmfit never runs such code"
        raise ModelLoadError(f"The base model {source.name!r} cannot be loaded: {why}.") from error
    return tokenizer, model, kind, missing_words(model, kind, told["missing_keys"], source.name)


def _without_pooler(loader: Any, config: Any) -> dict[str, bool]:
    """Leave out the layer that BERT and its kin put on their first token: what is pooled here comes before it."""
    try:
        model_class = loader._model_mapping[type(config)]
    except KeyError:
        return {}
    takes = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


_Key = tuple[str, str, Quantization | None, torch.dtype, torch.device]
_cache: OrderedDict[_Key, BaseModel] = OrderedDict()
_lock = threading.RLock()  # one for cache and models: what holds it may ask for either


def load_base_model(
    base_model: Any, *, device: str = "auto", dtype: str = "auto", quantization: Any = None
) -> BaseModel:
    """Return the base model of that name from the cache, loading it at most once.

    Parameters
    ----------
    base_model : str or path
        Hub id, local folder, GGUF file or alias; see :func:`llmfit.sources.find_source`.
    device : str, default="auto"
        "auto" takes CUDA, then Apple's MPS, then the CPU.
    dtype : str, default="auto"
        "auto" takes bfloat16 where the hardware multiplies it faster, float32 elsewhere.
    quantization : None, int, dict or Quantization, default=None
        See :func:`llmfit.quantization.resolve_quantization`.

    Raises
    ------
    ModelLoadError
        If the model cannot be found or read.
    ParameterError
        If device, dtype or quantization is unknown here.
    """
    source = find_source(base_model)
    where = _resolve_device(device)
    few_bits, numbers = resolve_quantization(quantization), _resolve_dtype(dtype, where)
    if few_bits and numbers == torch.float64:
        raise ParameterError("The 'dtype' parameter 'float64' cannot be used with quantization: bitsandbytes lacks it.")
    key = (source.folder, source.fingerprint, few_bits, numbers, where)
    with _lock:
        if key not in _cache:
            while len(_cache) >= MOST_CACHED:
                _cache.popitem(last=False)
                free()  # adapters stand in cycles
            with one_memory_error("the base model"):
                _cache[key] = once_more(partial(BaseModel, source, where, numbers, few_bits))
        _cache.move_to_end(key)
        return _cache[key]


def load_copy(base_model: Any) -> tuple[BaseModel, torch.dtype]:
    """Load a copy of a base model that is nobody else's, to be written to: whole, on the CPU, in float32 or wider.

    Returns
    -------
    BaseModel
    torch.dtype
        In which the weights are stored.

    Raises
    ------
    ModelLoadError
        If the model cannot be found or read.
    """
    source = find_source(base_model)
    with _lock, one_memory_error("a copy of the base model"):
        return once_more(partial(_read_wide, source))


def _read_wide(source: Source) -> tuple[BaseModel, torch.dtype]:
    base = BaseModel(source, torch.device("cpu"), "auto")
    stored = base.dtype
    base.dtype = torch.promote_types(stored, torch.float32)
    base.model.to(base.dtype)
    return base, stored


def clear_cache() -> None:
    """Forget every loaded base model and free its memory.

    Fitted estimators stay usable: they load the base model again when they next need it.

    Examples
    --------
    >>> import llmfit
    >>> llmfit.clear_cache()
    """
    with _lock:
        _cache.clear()
        forget_sources()
    forget_embeddings()
    free()


def _resolve_device(device: Any) -> torch.device:
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not isinstance(device, str | torch.device):
        raise parameter_error("device", "the estimator", "'auto' or a device of torch, like 'cpu' or 'cuda:0'", device)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParameterError(f"The 'device' parameter {str(device)!r} cannot be used here: {reason(error)}.") from error
    if where.type == "meta":
        raise ParameterError("The 'device' parameter 'meta' cannot be used here: it holds shapes and no weights.")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def _resolve_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    check_choice("dtype", "the estimator", dtype, ["auto", *DTYPES])
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return False
