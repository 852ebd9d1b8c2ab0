"""The model card that lies beside a saved model: what it is, how it was made, how to use it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmfit.sources import public_name
from llmfit.templates import Field

__all__ = ["model_card"]


def model_card(estimator: Any) -> str:
    """Write the README.md of a fitted estimator, in the hub's format.

    Parameters
    ----------
    estimator : LLMClassifier or LLMGenerator

    Returns
    -------
    str
        Markdown behind a YAML header.
    """
    name = type(estimator).__name__
    return f"""\
---
library_name: llmfit
base_model: {public_name(estimator.base_model_["name"])[0]}
tags: [llmfit, {"text-classification" if hasattr(estimator, "classes_") else "text-generation"}]
---

# {name}: {", ".join(estimator.features_)} to {estimator.target_}

Fitted with [llmfit](https://pypi.org/project/llmfit/).

```python
import llmfit

model = llmfit.load("path/to/this/folder")
model.predict(df)  # df has the columns {", ".join(map(repr, estimator.features_))}
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
"""


def _rows(facts: dict[str, Any]) -> str:
    return "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _facts(estimator: Any) -> dict[str, Any]:
    facts = {
        "base model": f"{estimator.base_model_['name']} (fingerprint {estimator.base_model_['fingerprint']})",
        "features": ", ".join(f"{name} ({kind})" for name, kind in estimator.features_.items()),
        "target": estimator.target_,
        "longest row": f"{estimator.max_length_} tokens",
    }
    if hasattr(estimator, "classes_"):
        facts["classes"] = ", ".join(map(str, estimator.classes_))
    return facts


def _template_text(estimator: Any) -> str:
    template = estimator._prompts.template
    parts = [f"{{{p.column}}}" if isinstance(p, Field) else p if isinstance(p, str) else p.text for p in template.parts]
    first, *between, last = template.frame.literals
    shots = f"[{len(between) // 2} worked examples]\n\n" if between else ""
    return f"{first}{shots}{''.join(parts)}{last}"


def _training(estimator: Any) -> dict[str, Any]:
    adapter, history = estimator._adapter, estimator.history_
    if adapter is None or not len(history):
        return {"adapter": "none: the base model answers as it is" if adapter is None else f"{adapter.type}, untrained"}
    settings = ", ".join(f"{key}={value!r}" for key, value in asdict(adapter).items() if value is not None)
    facts = {
        "adapter": f"{adapter.type} ({settings})" if settings else adapter.type,
        "trained parameters": f"{estimator.trainable_parameters_:,}",
        "weights on disk": f"{sum(t.numel() * t.element_size() for t in estimator._tensors.values()) / 1e6:.1f} MB",
        "optimiser steps": len(history),
        "tokens seen": f"{int(history['tokens'].sum()):,}",
        "peak learning rate": estimator.learning_rate_,
        "loss of the last step": f"{history['loss'].iloc[-1]:.4f} nats per token",
        "seconds": f"{history['seconds'].sum():.0f}",
    }
    losses = history["validation_loss"].dropna()
    if len(losses):
        facts["lowest validation loss"] = f"{losses.min():.4f} nats per token"
    return facts
