"""The model card that lies beside a saved model: what it is, how it was made, how to use it."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmfit.estimators.heading import reads
from llmfit.quantization import resolve_quantization
from llmfit.sources import public_name
from llmfit.templates import Field

__all__ = ["facts_of", "model_card"]


def model_card(estimator: Any, form: str = "saved", loader: str = "AutoModelForCausalLM") -> str:
    """Write the README.md of a fitted estimator, in the hub's format.

    Parameters
    ----------
    estimator : LLMClassifier or LLMGenerator
    form : {"saved", "merged", "adapter", "adapter and head", "head"}, default="saved"
        What lies beside the card; a key of `USES`.
    loader : str
        The class of transformers that loads such a model.

    Returns
    -------
    str
        Markdown behind a YAML header.
    """
    name = type(estimator).__name__
    base = public_name(estimator.base_model_["name"])[0]
    library, use = USES[form]
    columns = ", ".join(map(repr, estimator.features_))
    return f"""\
---
library_name: {library}
{_on_the_hub(base)}tags: [llmfit, {_task(estimator)}]
---

# {name}: {", ".join(estimator.features_)} to {_targets(estimator)}

Fitted with [llmfit](https://pypi.org/project/llmfit/).

```python
{use.format(columns=columns, base=base, loader=loader, read="from_pretrained", vector=_vector(estimator))}
```

| | |
|---|---|
{_rows(_facts(estimator))}

## Prompt

````text
{_template_text(estimator)}
````

## Training

| | |
|---|---|
{_rows(_training(estimator))}
{_evaluation(estimator)}"""


def facts_of(estimator: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Tell what a fitted estimator is, how it was trained, and its prompt."""
    return _facts(estimator), _training(estimator), _template_text(estimator)


def _evaluation(estimator: Any) -> str:
    """Tell the measures of the last ``evaluate``, if there was one."""
    measured = dict(getattr(estimator, "evaluation_", {}))
    if not measured:
        return ""
    rows = f"{int(measured.pop('rows')):,}"
    figures = _rows({name: f"{value:.4g}" for name, value in measured.items()})
    return f"\n## Evaluation on {rows} rows\n\n| | |\n|---|---|\n{figures}\n"


def _vector(estimator: Any) -> str:
    """Write in code what a head reads of a model, one vector of a row; "" without a head."""
    if estimator._head is None:
        return ""
    told = reads(estimator)
    more = {"hidden_states[-1]": ", output_hidden_states=True", "encoder_last_hidden_state": f", {BEGUN}"}
    skipped = f"[{told['skip']}:]" if told["skip"] else ""
    pooled = {"last": "[-1]", "first": "[0]", "mean": ".mean(0)"}[told["pooling"]]
    return f"model(**row{more.get(told['reads'], '')}).{told['reads']}[0]{skipped}{pooled}"


def _on_the_hub(base: str) -> str:
    """Link the base model, where it is one of the hub's; a card that names another is refused there."""
    return f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else ""


def _targets(estimator: Any) -> str:
    return estimator.target_ if isinstance(estimator.target_, str) else ", ".join(estimator.target_)


def _each(estimator: Any) -> list[Any]:
    """List the estimators of several targets, or the one there is."""
    return list(getattr(estimator, "estimators_", {"": estimator}).values())


def _task(estimator: Any) -> str:
    for task, mark in (("text-classification", "classes_"), ("text-regression", "target_scale_")):
        if all(hasattr(each, mark) for each in _each(estimator)):
            return task
    return "text-generation"


def _rows(facts: dict[str, Any]) -> str:
    return "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _facts(estimator: Any) -> dict[str, Any]:
    facts = {
        "base model": f"{estimator.base_model_['name']} (fingerprint {estimator.base_model_['fingerprint']})",
        "features": ", ".join(f"{name} ({kind})" for name, kind in estimator.features_.items()),
        "target": _targets(estimator),
        "longest row": f"{estimator.max_length_} tokens",
    }
    if hasattr(estimator, "memory_footprint_"):  # a fit that was saved by llmfit 0.1.0 did not measure it
        facts["base model in memory"] = f"{estimator.memory_footprint_ / 1e6:.1f} MB{_bits(estimator)}"
    for each in _each(estimator):
        if hasattr(each, "classes_"):
            of = "classes" if each is estimator else f"classes of {each.target_}"
            facts[of] = ", ".join(map(str, each.classes_))
    return facts


def _bits(estimator: Any) -> str:
    quantization = resolve_quantization(estimator.quantization)
    return f" ({quantization})" if quantization else ""


def _template_text(estimator: Any) -> str:
    template = estimator._prompts.template
    parts = [_part_text(part) for part in template.parts]
    first, *between, last = template.frame.literals
    shots = f"[{len(between) // 2} worked examples]\n\n" if between else ""
    return f"{first}{shots}{''.join(parts)}{last}"


def _part_text(part: Any) -> str:
    """Write a part as a template string has it."""
    if isinstance(part, Field):
        return f"{{{part.column}{':' * bool(part.spec)}{part.spec}}}"
    return (part if isinstance(part, str) else part.text).replace("{", "{{").replace("}", "}}")


def _training(estimator: Any) -> dict[str, Any]:
    adapter, head, history = estimator._adapter, estimator._head, estimator.history_
    if (adapter is None and head is None) or not len(history):
        return {"adapter": "none: the base model answers as it is" if adapter is None else f"{adapter.type}, untrained"}
    unit = " nats per token" if head is None else ""
    facts = {
        "adapter": "none: the head alone is trained" if adapter is None else _spelled(adapter),
        **({"head": _spelled(replace(head, cache=None))} if head is not None else {}),
        "trained parameters": f"{estimator.trainable_parameters_:,}",
        "weights on disk": f"{sum(t.numel() * t.element_size() for t in estimator._tensors.values()) / 1e6:.1f} MB",
        "optimiser steps": len(history),
        "tokens seen": f"{int(history['tokens'].sum()):,}",
        "peak learning rate": estimator.learning_rate_,
        "loss of the last step": f"{history['loss'].iloc[-1]:.4f}{unit}",
        "seconds": f"{history['seconds'].sum():.0f}",
    }
    losses = history["validation_loss"].dropna()
    if len(losses):
        facts["lowest validation loss"] = f"{losses.min():.4f}{unit}"
    return facts


def _spelled(spec: Any) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in asdict(spec).items() if value is not None)
    return f"{spec.type} ({settings})" if settings else str(spec.type)


BEGUN = 'decoder_input_ids=row["input_ids"][:, :1]'  # whatever they are, the encoder does not see them
_HEAD = """\

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.{read}(folder)
head = load_file(folder + "/head.safetensors")  # head.json says what its outputs mean
row = tokenizer("a prompt, as below", return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    vector = {vector}
    outputs = torch.nn.functional.linear(vector.float(), **head)"""
USES: dict[str, tuple[str, str]] = {
    "saved": (
        "llmfit",
        """\
import llmfit

model = llmfit.load("path/to/this/folder")
model.predict(df)  # df has the columns {columns}""",
    ),
    "merged": (
        "transformers",
        """\
from transformers import {loader}, AutoTokenizer

model = {loader}.{read}("path/to/this/folder")
tokenizer = AutoTokenizer.{read}("path/to/this/folder")""",
    ),
    "adapter": (
        "peft",
        """\
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

model = PeftModel.{read}({loader}.{read}("{base}"), "path/to/this/folder")
tokenizer = AutoTokenizer.{read}("path/to/this/folder")""",
    ),
    "adapter and head": (
        "peft",
        """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import {loader}, AutoTokenizer

model = PeftModel.{read}({loader}.{read}("{base}"), "path/to/this/folder").eval()"""
        + _HEAD,
    ),
    "head": (
        "transformers",
        """\
import torch
from safetensors.torch import load_file
from transformers import {loader}, AutoTokenizer

model = {loader}.{read}("{base}").eval()"""
        + _HEAD,
    ),
}
