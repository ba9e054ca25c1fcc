"""The weights of each version: the same in the trainer, in the server and in the replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors


def tensors_of(model: Path, version: int) -> dict[str, Any]:
    """By name. Those of version 0 are in the model's folder."""
    return random_tensors(ModelConfig.from_json(model), version, gain=2.0)
