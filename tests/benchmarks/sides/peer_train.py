"""Fine-tune with a peer: TRL's SFTTrainer ("trl"), or a plain loop over transformers and peft ("loop").

Only training counts, not the loading of the model nor tokenisation. The base is in bfloat16, which was as fast as mixed
precision here; TRL groups rows by length, pads no more than a batch needs or not at all ("padding_free"), or packs as
many rows as a batch has on average into each of its sequences ("packing"), and both may use transformers' fused
attention ("sdpa") or its plain one ("eager").
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
import time
from typing import Any

import torch
from labels import judge
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import serve

RATE = 5e-4


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def train_trl(model: Any, tokenizer: Any, job: dict[str, Any], seed: int) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in job["pairs"]])
    epochs = job.get("epochs", 1)
    steps = epochs * math.ceil(len(data) / job["batch_size"])
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": job["batch_size"],
            "num_train_epochs": epochs,
            "learning_rate": RATE,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(job["warmup"] * steps),
            "weight_decay": 0.0,
            "max_length": None,
            "completion_only_loss": True,
            "train_sampling_strategy": "group_by_length",
            "use_cpu": job["device"] == "cpu",
            "bf16": job["mixed"],
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "epoch",
            "disable_tqdm": True,
            "seed": seed,
        }
        args = SFTConfig(**{**settings, **job.get("trl", {})})
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora())
        wall, cpu = time.perf_counter(), time.process_time()
        loss = trainer.train().training_loss
        took = time.perf_counter() - wall, time.process_time() - cpu
        return trainer.model, loss, took


def train_loop(model: Any, tokenizer: Any, job: dict[str, Any], seed: int) -> Any:
    """Pad each batch, lose nothing but the completion's tokens, step: what a careful person writes by hand."""
    torch.manual_seed(seed)
    model = get_peft_model(model, lora()).train()
    rows = [(tokenizer(p)["input_ids"], tokenizer(c, add_special_tokens=False)["input_ids"]) for p, c in job["pairs"]]
    random.Random(seed).shuffle(rows)
    size = job["batch_size"]
    steps = math.ceil(len(rows) / size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    warm = math.ceil(job["warmup"] * steps)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
    )
    mixed = torch.autocast(job["device"], dtype=torch.bfloat16) if job["mixed"] else contextlib.nullcontext()
    wall, cpu, losses = time.perf_counter(), time.process_time(), []
    for step in range(steps):
        part = rows[step * size : (step + 1) * size]
        width = max(len(p) + len(c) for p, c in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (p, c) in enumerate(part):
            ids[i, : len(p) + len(c)], mask[i, : len(p) + len(c)] = torch.tensor(p + c), 1
            labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
        ids, mask, labels = (x.to(job["device"]) for x in (ids, mask, labels))
        with mixed:
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, sum(losses) / len(losses), (time.perf_counter() - wall, time.process_time() - cpu)


def prepare(job: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.bfloat16, attn_implementation=job.get("attention", "sdpa")
    ).to(job["device"])
    train = {"trl": train_trl, "loop": train_loop}[job["peer"]]
    tokens = sum(len(tokenizer(p + c)["input_ids"]) for p, c in job["pairs"])

    def work(request: dict[str, Any]) -> dict[str, Any]:
        model, loss, (seconds, cpu) = train(plain, tokenizer, job, request.get("seed", request["turn"]))
        done = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "rows": len(job["pairs"]),
            "tokens": tokens,
            "loss": round(loss, 4),
        }
        if request.get("evaluate"):
            done |= judge(model.eval(), tokenizer, job["test_prompts"], job["labels"], job["truth"])
        inner = getattr(model, "module", model)
        inner.unload()
        return done

    return work


if __name__ == "__main__":
    serve(prepare)
