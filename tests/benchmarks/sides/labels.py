"""Log-likelihood of labels the plain way: every prompt with every label through the network, in batches by length."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def label_scores(
    model: Any, tokenizer: Any, prompts: list[str], labels: list[str], rows: int = 16, *, sparing: bool = False
) -> torch.Tensor:
    """Give log P(label | prompt): (n_prompts, n_labels); sparing: labels of one token have no pass of their own."""
    answers = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    begun = {k for k, a in enumerate(answers) if sparing and len(a) == 1 and k != longest_of(answers)}
    read = [(k, a) for k, a in enumerate(answers) if k not in begun]
    pairs = [(i, k, tokenizer(p)["input_ids"], a) for i, p in enumerate(prompts) for k, a in read]
    pairs.sort(key=lambda pair: -len(pair[2]) - len(pair[3]))
    scores = torch.zeros(len(prompts), len(labels))
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        width = max(len(p) + len(a) for _, _, p, a in part)
        longest = max(len(a) for _, _, _, a in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (_, _, p, a) in enumerate(part):  # padded at the left, so that answers stand in the last columns
            ids[row, width - len(p) - len(a) :], mask[row, width - len(p) - len(a) :] = torch.tensor(p + a), 1
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits
        log_probs = logits.float().log_softmax(-1).cpu()
        for row, (i, k, _, a) in enumerate(part):
            places = torch.arange(longest - len(a), longest)
            scores[i, k] = log_probs[row, places, torch.tensor(a)].sum()
            for other in begun:
                scores[i, other] = log_probs[row, longest - len(a), answers[other][0]]
    return scores


def longest_of(answers: list[list[int]]) -> int:
    return max(range(len(answers)), key=lambda k: len(answers[k]))


def judge(model: Any, tokenizer: Any, prompts: list[str], labels: list[str], truth: list[int]) -> dict[str, Any]:
    """Accuracy of the likeliest labels, and the loss of each row, in nats: how unlikely the right one is among them."""
    scores, right = label_scores(model, tokenizer, prompts, labels, sparing=True), torch.tensor(truth)
    losses = torch.nn.functional.cross_entropy(scores, right, reduction="none")
    return {"accuracy": float((scores.argmax(1) == right).float().mean()), "losses": losses.tolist()}
