"""Tiny encoder-decoders for tests, and their numbers computed plainly, by transformers alone.

A prompt is the text of `TEMPLATE` as the tokenizer closes it, an answer its text with no white space before it, and the
end token; a model is loaded by transformers and called on one row without padding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_side import Row, plain_tokenizer

import llmfit
from llmfit.sources import quiet_loading

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "max_position_embeddings": 512,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
# Model type, its settings, the tokens around a text, and those that its decoder begins from.
KINDS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "t5": ("t5", {**T5, "dropout_rate": 0.0}, "$A </s>", (0,)),
    "t5 v1.1": (
        "t5",
        {**T5, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "$A </s>",
        (0,),
    ),
    "bart": ("bart", {**BART, "dropout": 0.0}, "<s> $A </s>", (2, 1)),
}
# Such as embed tokens in their own ways: not among those that all else is tested with.
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", {**BART, "dropout": 0.0, "scale_embedding": True}),
    "pegasus": ("pegasus", {**BART, "dropout": 0.0, "scale_embedding": True}),
    "marian": ("marian", {**BART, "dropout": 0.0, "scale_embedding": True, "decoder_start_token_id": 0}),
}


def make_pair(folder: Path, tiny: str, kind: str, **changed: Any) -> str:
    """Write a random encoder-decoder beside the tokenizer of the tiny model, which closes texts as such models do."""
    from tokenizers import processors
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    model_type, settings, around, _ = KINDS.get(kind) or (*SCALED[kind], "$A </s>", (0,))
    shutil.copytree(tiny, folder)
    tokenizer = plain_tokenizer(tiny)
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**settings, **ids, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForSeq2SeqLM.from_config(config)
        if kind == "t5 v1.1":  # such checkpoints keep an output head of their own
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.3)
    with quiet_loading():
        model.save_pretrained(folder)
    return str(folder)


def plain_pair(folder: str, **changed: Any) -> Any:
    """The model of a folder, loaded anew, without llmfit."""
    from transformers import AutoModelForSeq2SeqLM

    with quiet_loading():
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, **changed).eval()


def pair_rows(folder: str, texts: Any, answers: Any) -> list[Row]:
    """Prompt and completion of every row as a person would write them down."""
    tokenizer = plain_tokenizer(folder)
    return [
        (
            tokenizer(f"{text} is a")["input_ids"],
            [*tokenizer(str(answer), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for text, answer in zip(texts, answers, strict=True)
    ]


@torch.no_grad()
def pair_losses(model: Any, prompt: list[int], completion: list[int], start: tuple[int, ...]) -> np.ndarray:
    """Negative log-likelihood of every token of a completion, from the full logits of one row, in float64."""
    read = torch.tensor([[*start, *completion[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.array([-log_probs[len(start) - 1 + i, token] for i, token in enumerate(completion)])


def assert_several_answered(pair: Any, frame: Any) -> None:
    """A class and a text behind it, whatever the token budget."""
    given = {"target": ["label", "size"], "features": "text", "generation": {"max_new_tokens": 3}}
    table = frame.assign(size=frame["size"].astype(str) + " kg")
    model = llmfit.LLMEstimator(**pair, **given).fit(table)
    expected, proba = model.predict(table), model.predict_proba(table)["label"]
    model.set_params(batch_tokens=1)
    assert model.predict(table).equals(expected)
    np.testing.assert_allclose(model.predict_proba(table)["label"], proba, atol=1e-5)
