"""Base models: loaded once in a process, shared by every estimator, given back as they were.

Takes a name, a device and a dtype; gives a :class:`BaseModel` out of one bounded, locked cache. This is the only
file that loads a model, and :meth:`BaseModel.attach` the only place that changes one: whatever an adapter
does inside, weights, modules, flags and hooks are those from before when it ends, also by an exception.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from llmfit.embeddings import forget_embeddings
from llmfit.exceptions import LLMFitError, ModelLoadError, ParameterError, check_choice, parameter_error, reason
from llmfit.memory import one_memory_error
from llmfit.sources import Source, find_source, forget_sources, quiet_loading

__all__ = ["Adapter", "BaseModel", "clear_cache", "load_base_model"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MOST_CACHED = 2
SHORT = 512  # tokens up to which plain attention beats the fused kernel on a CPU (docs/performance.md)
UNSTATED_CONTEXT = 2048  # tokens, for the rare model that states no limit


class Adapter(Protocol):
    """What :meth:`BaseModel.attach` needs of an adapter."""

    def install(self, base: BaseModel, tensors: dict[str, torch.Tensor] | None, *, training: bool) -> Any:
        """Change ``base.model`` and return the module to call."""


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
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.tokenizer, self.model, self.kind = _read(source, dtype)
        self.model.requires_grad_(False).eval().to(device)
        self._lent = False

    @property
    def context_length(self) -> int:
        """Tokens that the model can attend to."""
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(min(stated or UNSTATED_CONTEXT, self.tokenizer.model_max_length))

    @property
    def pad_id(self) -> int:
        """A token id to fill batches with; it is never attended to and carries no loss."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(i for i in ids if i is not None))

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

        Yields
        ------
        torch.nn.Module

        Raises
        ------
        LLMFitError
            If this thread has lent the model already.
        OutOfMemoryError
            If memory does not hold the adapter, or what training keeps of its weights.
        """
        with _lock, torch.random.fork_rng(devices=_cuda_in_use()), one_memory_error():
            if self._lent:
                raise LLMFitError(
                    f"The base model {self.source.name!r} is lent to a fit or a prediction that has not ended: "
                    "a callback cannot use an estimator on the same base model."
                )
            torch.manual_seed(seed)
            kept = _Kept(self.model)
            self._lent = True
            try:
                if self.device.type == "cpu" and longest is not None and longest <= SHORT:
                    self.model.set_attn_implementation("eager")
                model = adapter.install(self, tensors, training=training) if adapter else self.model
                yield model.train(training)
            finally:
                kept.restore()
                self._lent = False


def _cuda_in_use() -> range:
    """Devices whose generators a seed changes."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


class _Kept:
    """Everything that a module tree refers to, to be put back."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(module, dict(vars(module)), _shallow(vars(module))) for module in root.modules()]
        self.parameters = [(p, p.data, p.requires_grad) for p in root.parameters()]
        named = [getattr(m, name, None) for m in root.modules() for name in ("config", "generation_config")]
        configs = {id(c): c for c in named if hasattr(c, "__dict__")}
        self.configs = [(c, dict(vars(c))) for c in configs.values()]

    def restore(self) -> None:
        for module, own, contents in self.modules:  # hooks and submodules keep their dicts: handles point to them
            vars(module).clear()
            vars(module).update(own)
            for key, content in contents.items():
                own[key].clear()
                own[key].update(content)
        for parameter, data, requires_grad in self.parameters:
            parameter.data = data
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for config, state in self.configs:
            vars(config).clear()
            vars(config).update(state)


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() for key, value in state.items() if isinstance(value, dict)}


def _read(source: Source, dtype: torch.dtype) -> tuple[Any, Any, str]:
    import transformers

    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **safe)
            kind, loader = _kind(transformers.AutoConfig.from_pretrained(source.folder, **safe))
            model = loader.from_pretrained(source.folder, dtype=dtype, **safe)
    except Exception as error:  # loaders raise errors of many libraries
        why = reason(error)
        if "trust_remote_code" in str(error):
            why = "it needs code that comes with the model, and llmfit never runs such code"
        raise ModelLoadError(f"The base model {source.name!r} cannot be loaded: {why}.") from error
    return tokenizer, model, kind


def _kind(config: Any) -> tuple[str, Any]:
    """Tell what kind of model a configuration describes, and the class that loads it.

    Families such as BERT can be built as decoders too: what the weights were saved from decides.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return "encoder-decoder", transformers.AutoModelForSeq2SeqLM
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    saved_as_decoder = bool({*(config.architectures or ())} & {*causal.values()})
    if saved_as_decoder or (config.model_type in causal and config.model_type not in masked):
        return "decoder", transformers.AutoModelForCausalLM
    return "encoder", transformers.AutoModel


_cache: OrderedDict[tuple[str, str, torch.dtype, torch.device], BaseModel] = OrderedDict()
_lock = threading.RLock()  # one for cache and models: what holds it may ask for either


def load_base_model(base_model: Any, *, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """Return the base model of that name from the cache, loading it at most once.

    Parameters
    ----------
    base_model : str or path
        Hub id, local folder, GGUF file or alias; see :func:`llmfit.sources.find_source`.
    device : str, default="auto"
        "auto" takes CUDA, then Apple's MPS, then the CPU.
    dtype : str, default="auto"
        "auto" takes bfloat16 where the hardware multiplies it faster, float32 elsewhere.

    Raises
    ------
    ModelLoadError
        If the model cannot be found or read.
    ParameterError
        If device or dtype is unknown here.
    """
    source = find_source(base_model)
    where = _resolve_device(device)
    key = (source.folder, source.fingerprint, _resolve_dtype(dtype, where), where)
    with _lock:
        if key not in _cache:
            while len(_cache) >= MOST_CACHED:
                _cache.popitem(last=False)
            with one_memory_error():
                _cache[key] = BaseModel(source, where, key[2])
        _cache.move_to_end(key)
        return _cache[key]


def clear_cache() -> None:
    """Forget every loaded base model and free its memory.

    Fitted estimators stay usable: they load the base model again when they next need it.

    Examples
    --------
    >>> import llmfit
    >>> llmfit.clear_cache()
    """
    import gc

    with _lock:
        _cache.clear()
        forget_sources()
    forget_embeddings()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
