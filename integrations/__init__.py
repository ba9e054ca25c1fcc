"""The trainer's side: the policy as a Paddle layer, GRPO and PPO over rollouts, and model folders from other formats.

Names are imported on first use; importing this package loads neither Paddle nor the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "GRPOConfig": "grpo_trainer",
    "GRPOTrainer": "grpo_trainer",
    "NoGpuBackwardError": "policy_forward",
    "PPOConfig": "ppo_trainer",
    "PPOTrainer": "ppo_trainer",
    "PackedBatch": "batch",
    "PolicyModel": "policy_model",
    "PolicyTrainer": "trainer",
    "PublishEvery": "publish_hook",
    "StepReport": "report",
    "micro_batches": "batch",
    "pack_rollouts": "batch",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
