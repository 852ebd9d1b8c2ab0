"""Learn a help desk's answers by heart, and answer questions in other words.

Usage: python examples/02_faq.py [ROWS] [EPOCHS]
"""

import sys
import time

from llmfit import LLMGenerator
from llmfit.datasets import load_support_faq


def main(rows: int = 60, epochs: int = 20) -> None:
    faq = load_support_faq()[:rows]
    model = LLMGenerator(
        "smollm2",
        features="question",
        target="answer",
        template={"template": "{question}", "system": "You answer for the help desk of the plant shop Fernwood."},
        adapter={"type": "lora", "r": 32},
        epochs=epochs,
        learning_rate=1e-3,
        batch_size=10,
        random_state=0,
    )
    started = time.perf_counter()
    model.fit(faq)
    print(f"fitted {len(faq)} pairs in {time.perf_counter() - started:.0f} s")

    answers = model.predict(faq)
    print(f"exact match on the pairs learned: {(answers == faq['answer']).mean():.4f}")

    fresh = faq[["paraphrase", "answer"]].rename(columns={"paraphrase": "question"})[:6]
    for question, wanted, answer in zip(fresh["question"], fresh["answer"], model.predict(fresh), strict=True):
        print(f"\nQ: {question}\nA: {answer}\n   ({'as learned' if answer == wanted else 'learned: ' + wanted})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
