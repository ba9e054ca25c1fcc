"""The jobs of the exactness tests: a tiny random model, and the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exactness_harness import Job
from tiny_engine import VOCAB_SIZE, write_tiny_model

from zerokl.rollout.text import Tokenizer

TEXTS = [
    "Hi",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Ein Satz mit Umlauten: über, naïve, 你好 und 🙂,  17 + a   1b =",
    "The committee met on Tuesday to discuss " + "the budget, the roof, the bicycles, and " * 12 + "finally",
    "<|im_start|>user\nCompute 17 + 25. Answer with the number only.<|im_end|>\n<|im_start|>assistant\n",
    "The committee met on Tuesday to discuss " + "the budget, the roof, the bicycles, and " * 12 + "nobody",
    "1 2 3 4 5 6 7 8 9 10 11 12 13",
]
"""Prompts of 1 to about 110 tokens: within and beyond one attention split of 64 keys, two with a long common start."""


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """8 prompts x 2 samples x 24 tokens on the tiny model."""
    random = np.random.default_rng(7)
    common = random.integers(0, VOCAB_SIZE, 70)
    lengths = [1, 5, 17, 40, 63, 64, 30, 33]
    prompts = [random.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in lengths]
    prompts[6:] = [np.concatenate([common, prompt]).astype(np.int32) for prompt in prompts[6:]]
    return Job(folder=write_tiny_model(tmp_path_factory.mktemp("tiny")), prompts=prompts, n=2, max_tokens=24)


@pytest.fixture(scope="session")
def smollm2_job(smollm2_folder: Path) -> Job:
    """8 prompts x 2 samples x 24 tokens on SmolLM2-135M-Instruct."""
    tokenizer = Tokenizer(smollm2_folder)
    return Job(folder=smollm2_folder, prompts=[tokenizer.encode(text) for text in TEXTS], n=2, max_tokens=24)


@pytest.fixture(scope="session")
def long_smollm2_job(smollm2_folder: Path) -> Job:
    """32 prompts x 4 samples x 48 tokens on SmolLM2-135M-Instruct."""
    tokenizer = Tokenizer(smollm2_folder)
    beginnings = ["", "Once upon a time. ", "# Notes\n\n- one\n- two\n\n", "I say this again and again: "]
    texts = [beginning + text for beginning in beginnings for text in TEXTS]
    return Job(folder=smollm2_folder, prompts=[tokenizer.encode(text) for text in texts], n=4, max_tokens=48)
