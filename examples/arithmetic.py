"""A verifiable task in the chat template: add two small numbers, answer with the number alone."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

SYSTEM = "Answer with a number."
EXAMPLES = (("What is 2 + 3?", "5"), ("What is 8 + 6?", "14"))  # turns that show the form; every prompt shares them


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its answer."""

    text: str
    answer: int


def questions(count: int, seed: int) -> list[Question]:
    """Distinct questions such as "What is 7 + 5?", the same for the same seed."""
    rng = random.Random(seed)
    chosen: dict[str, int] = {}
    while len(chosen) < count:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        chosen[f"What is {a} + {b}?"] = a + b
    return [Question(text, answer) for text, answer in chosen.items()]


def chat_prompt(question: Question, template: str) -> str:
    """The question as the model's chat template writes it, up to where the assistant speaks."""
    messages = [{"role": "system", "content": SYSTEM}]
    for asked, answered in EXAMPLES:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question.text})
    return Environment().from_string(template).render(messages=messages, add_generation_prompt=True)


def chat_template(folder: Path) -> str:
    """From the model folder's tokenizer_config.json."""
    template: str = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return template


def reward(text: str, answer: int) -> float:
    """1 for the right number alone, 0.5 if the last number in a longer text is right, 0.1 for a wrong number alone."""
    said = text.strip().rstrip(".")
    if said.isdecimal():
        return 1.0 if int(said) == answer else 0.1
    numbers = re.findall(r"-?\d+", text)
    return 0.5 if numbers and int(numbers[-1]) == answer else 0.0
