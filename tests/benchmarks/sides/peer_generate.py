"""Generate an answer to every prompt with transformers, in batches of prompts of like length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import serve


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[str]:
    """Let the model answer, greedily."""
    order = sorted(range(len(job["prompts"])), key=lambda i: -len(job["prompts"][i]))
    answers = [""] * len(order)
    how = {"max_new_tokens": job["tokens"], "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for start in range(0, len(order), job["batch"]):
        part = order[start : start + job["batch"]]
        given = tokenizer([job["prompts"][i] for i in part], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**given, **how)
        texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text.strip()
    return answers


def prepare(job: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job.get("dtype", "bfloat16")))
    model = model.to(job["device"]).eval()

    def work(_: dict[str, Any]) -> dict[str, Any]:
        return {"rows": len(job["prompts"]), "answers": generate(model, tokenizer, job)}

    return work


if __name__ == "__main__":
    serve(prepare)
