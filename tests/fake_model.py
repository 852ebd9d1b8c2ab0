"""A language model that is none: it reads the numbers out of prompts and answers as the nearest rows of `fit` did.

Exact, deterministic and quick, so that scikit-learn's whole suite of checks can run on the estimators: a row of weight
two is the row twice, a row of weight zero is no row, no answer depends on the other rows asked about or on an order.
What it learns lies in the tensors that an estimator keeps, so that pickles and saved folders carry it. It stands in at
five seams: loading, the training loop, the scoring of labels, generation and a head's answers. Prompts, answers,
encoding, label sequences, weights, the kept tensors and what is made of scores are llmfit's own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmfit.callbacks import State

NAME = "fake"
END = 256  # one token a byte, and this one behind an answer
WIDTH = 0.15  # of the kernel, in standard deviations of the fitted rows


class ByteTokenizer:
    """UTF-8 bytes as tokens, no special token but the end of an answer."""

    eos_token_id = END

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": list(texts.encode())}
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(token for token in ids if token != END).decode()


class FakeModel(torch.nn.Module):
    """The rows of `fit` as parameters: numbers (N, D), answers (N, L) padded with -1, weights (N,)."""

    def __init__(self, tensors: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.learn(tensors or {})

    @property
    def backbone(self) -> Any:
        """Where an adapter and a head look for each other: this model is both."""
        return SimpleNamespace(model=self)

    @property
    def head(self) -> torch.nn.Module:
        return torch.nn.Module()

    def learn(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor.clone(), requires_grad=False))

    def log_similarity(self, prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Log of weight times kernel between prompts and the fitted rows: (P, N)."""
        known, weights = self.numbers.numpy(), self.weights.numpy()
        mean = np.average(known, axis=0, weights=weights)
        spread = np.sqrt(np.average((known - mean) ** 2, axis=0, weights=weights))
        spread[spread < 1e-9] = 1.0
        asked = np.stack([numbers(prompt, known.shape[1]) for prompt in prompts])
        squares = (((asked[:, None] - known[None]) / spread / WIDTH) ** 2).sum(-1)
        return np.log(weights) - 2 * np.log1p(squares)  # long tails: a weight of 1000 outshouts what is near


class FakeBase:
    """What estimators use of a base model."""

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.context_length = 100_000
        self.kind, self.start_ids, self.has_dropout = "decoder", (), False
        self.has_chat_template = False
        self.quantization, self.memory_footprint = None, 0
        self.device, self.dtype, self.pad_id = torch.device("cpu"), torch.float32, 0
        self.source = SimpleNamespace(fingerprint="f" * 32)

    @contextmanager
    def attach(self, adapter: Any, tensors: Any = None, **_: Any) -> Iterator[FakeModel]:
        yield FakeModel(tensors)


def numbers(prompt: tuple[int, ...], width: int = 0) -> np.ndarray:
    """Read the value of every ``name: value`` line of a prompt; words count by their digest, nothing counts as 0."""
    lines = bytes(prompt).decode().split("\n\n")[-2].split("\n")
    values = [_number(line.rpartition(": ")[2]) for line in lines]
    return np.array([*values, *[0.0] * (width - len(values))])


def _number(text: str) -> float:
    try:
        return max(-1e100, min(1e100, float(text)))
    except ValueError:
        return zlib.crc32(text.encode()) / 2**32 if text else 0.0


def train(model: FakeModel, rows: Sequence[Any], settings: Any, **_: Any) -> State:
    longest = max(len(row.completion) for row in rows)
    targets = [row.target for row in rows if row.target is not None]
    model.learn(
        {
            "numbers": torch.tensor(np.stack([numbers(row.prompt) for row in rows])),
            "answers": torch.tensor([[*row.completion, *[-1] * (longest - len(row.completion))] for row in rows]),
            "weights": torch.tensor([row.weight for row in rows], dtype=torch.float64),
            "targets": torch.tensor(targets, dtype=torch.float64),
            "objective": torch.tensor([*map(ord, settings.objective)]),
        }
    )
    record = {"step": 1, "epoch": 1, "loss": 0.5, "learning_rate": settings.learning_rate, "tokens": len(rows)}
    return State(total_steps=1, epochs=1, step=1, history=[record])


def score_labels(model: FakeModel, prompts: Sequence[Any], labels: Sequence[Any], **_: Any) -> np.ndarray:
    """Log of the similar rows' weight behind each label, over a floor that leaves every label possible: (P, K)."""
    similarity = model.log_similarity(prompts)
    answers = [tuple(int(i) for i in row) for row in model.answers]
    columns = []
    for label in labels:
        mine = np.array([answer[: len(label)] == tuple(label) for answer in answers])
        of_label = similarity[:, mine] if mine.any() else np.full((len(prompts), 1), -np.inf)
        columns.append(np.logaddexp(np.logaddexp.reduce(of_label, axis=1), -600.0))
    return np.stack(columns, axis=1)


def head_outputs(model: FakeModel, prompts: Sequence[Any], **_: Any) -> torch.Tensor:
    """The similar rows' mean number, or the logits of their mean classes or labels: (P, K)."""
    similarity = model.log_similarity(prompts)
    shares = np.exp(similarity - np.logaddexp.reduce(similarity, axis=1, keepdims=True))
    targets, objective = model.targets.numpy(), bytes(model.objective.tolist()).decode()
    if objective == "classes":
        targets = np.eye(int(targets.max()) + 1)[targets[:, 0].astype(int)]
    means = (shares[:, :, None] * targets[None]).sum(1)
    if objective == "number":
        return torch.from_numpy(means)
    chances = means.clip(1e-12, 1 - 1e-12)
    return torch.from_numpy(np.log(chances) - (np.log(1 - chances) if objective == "sets" else 0.0))


def generate(model: FakeModel, prompts: Sequence[Any], settings: Any, **_: Any) -> tuple[list[Any], int]:
    """The answer that weighs most among the rows that are nearest; the smaller one where two weigh the same."""
    answers = [tuple(int(i) for i in row if i not in (-1, END)) for row in model.answers]
    chosen = []
    for row in model.log_similarity(prompts):
        mass: dict[tuple[int, ...], float] = {}
        for answer, log_weight in zip(answers, row, strict=True):
            mass[answer] = np.logaddexp(mass.get(answer, -np.inf), log_weight)
        chosen.append(max(sorted(mass), key=lambda answer: round(mass[answer], 6)))
    return chosen, 0


def reference_losses(model: FakeModel, rows: Sequence[Any], **_: Any) -> tuple[float, int]:
    """One nat a token."""
    count = sum(len(row.completion) for row in rows)
    return float(count), count


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every base model be the fake one, until the test ends. The adapter must be "full" or None."""
    monkeypatch.setattr("llmfit.base_model.load_base_model", lambda *_, **__: FakeBase())
    monkeypatch.setattr("llmfit.estimators.fitting.train", train)
    monkeypatch.setattr("llmfit.scoring.score_labels", score_labels)
    monkeypatch.setattr("llmfit.scoring.head_outputs", head_outputs)
    monkeypatch.setattr("llmfit.scoring.reference_losses", reference_losses)
    monkeypatch.setattr("llmfit.inference.generate", generate)
