"""What the tests of the torch side share: estimators on the tiny model, and the same numbers computed plainly.

Nothing here uses llmfit's own encoding, losses or adapters: a prompt is the text of `TEMPLATE`, an answer is one
space, the text and the end token, a model is loaded by transformers and called on one row without padding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import llmfit
import llmfit.memory
from llmfit.sources import quiet_loading

TEMPLATE = "{text} is a"
CPU = torch.device("cpu")

Row = tuple[list[int], list[int]]


def classifier(settings: dict[str, Any], **changed: Any) -> llmfit.LLMClassifier:
    """An estimator whose prompts are the text of `TEMPLATE`."""
    return llmfit.LLMClassifier(**{**settings, "template": TEMPLATE, "target": "label", **changed})


def generator(settings: dict[str, Any], **changed: Any) -> llmfit.LLMGenerator:
    """A generator with the same prompts, whose answers are the labels."""
    return llmfit.LLMGenerator(**{**settings, "template": TEMPLATE, "target": "label", **changed})


def token_rows(folder: str, texts: Any, answers: Any) -> list[Row]:
    """Prompt and completion of every row as a person would write them down."""
    tokenizer = plain_tokenizer(folder)
    return [
        (
            tokenizer(f"{text} is a")["input_ids"],
            [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for text, answer in zip(texts, answers, strict=True)
    ]


def plain_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def plain_model(folder: str, **changed: Any) -> Any:
    """The model of a folder, loaded anew, without llmfit."""
    from transformers import AutoModelForCausalLM

    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changed).eval()


@torch.no_grad()
def token_losses(model: Any, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Negative log-likelihood of every token of a completion, from the full logits of one row, in float64."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.array([-log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


def fit_seed(random_state: int = 0) -> int:
    """The seed that a fit draws from an int, as scikit-learn draws one."""
    return int(np.random.RandomState(random_state).randint(2**31 - 1))


def weights(estimator: Any) -> dict[str, torch.Tensor]:
    """What a fit has learned."""
    return dict(estimator._tensors)


def same(one: Any, other: Any) -> bool:
    """Whether two fits, or two dicts of tensors, are equal to the last bit."""
    a, b = (dict(x) if isinstance(x, dict) else weights(x) for x in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(one: Any, other: Any) -> float:
    """Largest difference between the weights of two fits."""
    a, b = (dict(x) if isinstance(x, dict) else weights(x) for x in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a if a[name].numel())


def no_collecting(monkeypatch: Any) -> None:
    """Where running out of memory is only played: collecting garbage among all that tests have loaded takes long."""
    monkeypatch.setattr(llmfit.memory, "gc", SimpleNamespace(collect=lambda: 0))


def with_tokenizer(folder: str, target: Path, **changed: Any) -> str:
    """Copy a model and change attributes of its tokenizer."""
    shutil.copytree(folder, target)
    tokenizer = plain_tokenizer(folder)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(target)
    return str(target)


def make_other(folder: Path, tiny: str, kind: str, **changed: Any) -> str:
    """Write a random model of another architecture beside the tokenizer of the tiny one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny, folder)
    size: dict[str, Any] = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        if kind == "gpt2"
        else {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=261, initializer_range=0.2, **{**size, **ids, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    with quiet_loading():
        model.save_pretrained(folder)
    return str(folder)
