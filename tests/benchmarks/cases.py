"""What the comparisons work on: SMS messages, a short task and one of 200 tokens, two classes and twenty."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

SHORT = {"task": "Classify the SMS message as ham or spam."}
LONG = {
    "task": (
        "You sort the text messages of a telephone company's customers. A message is ham if one person wrote it to "
        "another: greetings, plans, questions, jokes, worries, anything that friends, families and colleagues tell "
        "each other, however short, misspelt or odd it may be. A message is spam if it was sent to many people in "
        "order to sell something or to deceive: offers of prizes, ring tones, credit or company, requests to call a "
        "number that costs money, to answer with a code word or to follow a link, announcements that an account is "
        "about to be closed. Messages of a shop, a doctor or a bank that the customer has asked for are ham. Look at "
        "who could have written the message and what its writer wants the reader to do next. Capital letters, prices "
        "and telephone numbers are hints, no proof: friends send each other numbers as well, and a careful fraud "
        "avoids all of these. Where nothing points to a sender who does not know the reader, decide for ham. Answer "
        "with one word, ham or spam."
    )
}
TWENTY = [
    *(f"advertisement of {what}" for what in ("a prize", "ring tones", "a dating service", "credit")),
    *(f"question about {what}" for what in ("plans", "work", "health")),
    *(f"complaint about {what}" for what in ("a delay", "money")),
    *(f"greeting of a {who}" for who in ("friend", "relative")),
    *(f"news of the {what}" for what in ("family", "day")),
    *("fraudulent request", "answer to a question", "declaration of love", "joke among friends"),
    *("offer of help", "request for help", "thanks for a favour"),
]


def messages(path: str | Path) -> pd.DataFrame:
    """Read the messages in an order of their own."""
    return pd.read_csv(path).sample(frac=1, random_state=7).reset_index(drop=True)


def options(description: str | None) -> argparse.ArgumentParser:
    """Options of every comparison."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("path")
    parser.add_argument("--base-model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    return parser


def rendered(frame: pd.DataFrame, template: dict[str, Any], base_model: str) -> list[tuple[str, str]]:
    """Prompt and completion of every row, as llmfit writes them: the peers get the same."""
    from llmfit import LLMClassifier

    model = LLMClassifier(base_model, features="text", target="label", template=template, verbose=0)
    shown = model.preview(frame, len(frame))
    return list(zip(shown["prompt"], shown["completion"], strict=True))


def bare(written: list[tuple[str, str]], answers: list[str]) -> list[str]:
    """Take from completions of these answers what closes them: a label is scored without it."""
    closing = written[0][1].removeprefix(answers[0])
    return [completion.removesuffix(closing) for _, completion in written]


def where(given: argparse.Namespace) -> dict[str, str]:
    """Model and device of a job; `folder` is where llmfit keeps the model in the form that transformers reads."""
    from llmfit.sources import find_source

    folder = str(find_source(given.base_model).folder)
    return {"base_model": given.base_model, "device": given.device, "folder": folder}
