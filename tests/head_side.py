"""What the tests of heads share: a tiny BERT and a tiny T5, and pooled hidden states by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import llmfit
from llmfit.sources import quiet_loading

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
SETS = [["fruit", "sweet"], ["fruit"], [], [], ["fruit", "sweet"], [], ["fruit", "sweet"], []]


def headed(settings: dict[str, Any], cls: Any = llmfit.LLMClassifier, **changed: Any) -> Any:
    """An estimator with a linear head."""
    own = {"head": "linear", "template": "{text} is a"} | ({"target": "label"} if "target" not in settings else {})
    return cls(**{**own, **settings, **changed})


def byte_tokenizer(cls_first: bool) -> Any:
    """A byte-level tokenizer that writes [CLS] and [SEP] around a text, or [SEP] behind it, as T5's does."""
    from transformers import PreTrainedTokenizerFast

    vocab = {text: i for i, text in enumerate(SPECIAL)}
    vocab |= {char: i + len(SPECIAL) for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if cls_first else "$A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    named |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if cls_first else {"eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def write(model: Any, tokenizer: Any, folder: Path) -> str:
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_encoder(folder: Path, seed: int = 0, *, masked: bool = False, hidden: int = 32) -> str:
    """Write a random BERT without dropout; `masked`: as one that fills in words, which has no pooling layer."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (BertForMaskedLM if masked else BertModel)(config)
    return write(model, byte_tokenizer(True), folder)


def make_encoder_decoder(folder: Path, seed: int = 0) -> str:
    """Write a random T5 without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=260,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
    return write(model, byte_tokenizer(False), folder)


MODELS = {"encoder": make_encoder, "encoder-decoder": make_encoder_decoder}


@torch.no_grad()
def pooled_by_hand(kind: str, folder: str, row: tuple[int, ...], pooling: str) -> torch.Tensor:
    """The pooled last hidden states of one row without padding, by transformers alone."""
    from transformers import AutoModel

    with quiet_loading():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([row])
    reader = model.get_encoder() if kind == "encoder-decoder" else model
    hidden = reader(input_ids=ids).last_hidden_state[0]
    return {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]
