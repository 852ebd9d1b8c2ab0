"""Score labels with a peer: "naive" log-likelihoods, transformers' "generate", or lm-evaluation-harness ("harness")."""

from __future__ import annotations

from typing import Any

import torch
from labels import label_scores
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import serve


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[int]:
    """Let the model answer, as long as the longest label; take the label that the answer begins with, or none."""
    longest = max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in job["labels"])
    order = sorted(range(len(job["prompts"])), key=lambda i: -len(job["prompts"][i]))
    best = [-1] * len(order)
    tokenizer.padding_side = "left"
    for start in range(0, len(order), job["batch"]):
        part = order[start : start + job["batch"]]
        given = tokenizer([job["prompts"][i] for i in part], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**given, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            best[i] = next((k for k, label in enumerate(job["answers"]) if text.strip().startswith(label)), -1)
    return best


def prepare(job: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job.get("dtype", "bfloat16")))
    model = model.to(job["device"]).eval()
    if job["peer"] == "harness":
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=job["batch"], device=job["device"])

    def work(_: dict[str, Any]) -> dict[str, Any]:
        prompts, labels = job["prompts"], job["labels"]
        if job["peer"] == "generate":
            best = generate(model, tokenizer, job)
        elif job["peer"] == "naive":
            best = label_scores(model, tokenizer, prompts, labels, job["batch"]).argmax(1).tolist()
        else:
            asked = [Instance("loglikelihood", {}, (p, label), i) for i, p in enumerate(prompts) for label in labels]
            scores = torch.tensor([score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)])
            best = scores.view(len(prompts), len(labels)).argmax(1).tolist()
        return {"rows": len(prompts), "best": best}

    return work


if __name__ == "__main__":
    serve(prepare)
