"""The same fits with TRL, one after the other, the model loaded for each."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import peer_train
import torch
from labels import judge
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import serve


def prepare(job: dict[str, Any]) -> Any:
    def fit(rank: int, rate: float, held: list[int]) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        how = {"dtype": torch.bfloat16, "attn_implementation": job.get("attention", "sdpa")}
        model = AutoModelForCausalLM.from_pretrained(job["folder"], **how).to(job["device"])
        config = peer_train.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        peer_train.RATE, peer_train.lora = rate, lambda: config
        kept = [pair for i, pair in enumerate(job["pairs"]) if i not in held]
        model, _, _ = peer_train.train_trl(model, tokenizer, {**job, "pairs": kept}, 0)
        prompts = [job["pairs"][i][0] for i in held]
        return judge(model.eval(), tokenizer, prompts, job["labels"], [job["truth"][i] for i in held])

    def work(request: dict[str, Any]) -> dict[str, Any]:
        held = job["folds"][request["turn"] % len(job["folds"])]
        scores = [fit(*one, held) for one in itertools.product(*job["grid"].values())]
        accuracies, losses = ([one[name] for one in scores] for name in ("accuracy", "losses"))
        return {
            "fits": len(scores),
            "accuracy": round(statistics.mean(accuracies), 4),
            "losses": [statistics.mean(rows) for rows in losses],
        }

    return work


if __name__ == "__main__":
    serve(prepare)
