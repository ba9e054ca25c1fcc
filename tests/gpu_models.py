"""Models, and engines that serve them, for tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors

GGUF = os.environ.get("ZEROKL_SMOLLM2_GGUF") or os.environ.get("KIT", "/opt/kit") + "/smollm2.gguf"
"""The real weights of SmolLM2-135M-Instruct, where they are at hand."""


def tensors_of(content: dict[str, Any], seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Random weights of the model that a config.json tells."""
    return random_tensors(ModelConfig.from_json(content), seed, gain=2.0)


def write_models(contents: Mapping[str, dict[str, Any]], factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each model, by name, and "smollm2" where its weights are at hand."""
    made = {}
    for name, content in contents.items():
        made[name] = save_pretrained(factory.mktemp(name), content, tensors_of(content))
    if Path(GGUF).is_file() and pytest.importorskip("gguf"):
        from zerokl.integrations.gguf_import import convert_gguf

        made["smollm2"] = convert_gguf(Path(GGUF), factory.mktemp("smollm2") / "model")
    return made


@contextmanager
def engine_on(folder: Path, **options: Any) -> Iterator[RolloutEngine]:
    """An engine on the GPU with little memory of its own."""
    defaults: dict[str, Any] = {
        "model": str(folder),
        "device": "gpu",
        "max_model_len": 256,
        "num_blocks": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
    }
    with RolloutEngine(EngineConfig(**(defaults | options))) as engine:
        yield engine
