"""Model runners over several ranks in one process, and what one rank gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from ranks_rig import communicators, each

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.held_sets import LIVE
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import step_inputs, tiny_moe_config
from zerokl.rollout.step_order import StepOrder, StepResult

FAMILIES = ("Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM")
BLOCK = 16


def moe_config(family: str = FAMILIES[0]) -> ModelConfig:
    """A tiny model with mixtures."""
    return ModelConfig.from_json(tiny_moe_config(family))


@contextmanager
def runners(
    config: ModelConfig, size: int, experts: int, tensors: Mapping[str, Any] | None, redundant: int = 0
) -> Iterator[list[ModelRunner]]:
    """One per rank, with committed weights."""
    options = EngineConfig(model="unused", num_blocks=8, block_size=BLOCK, num_threads=1)
    options = options.resolve(max_position_embeddings=64, kv_bytes_per_token=1)
    with communicators(size) as ends:
        made = [
            ModelRunner(options, config, RankPlace(rank, size, experts, ends[rank], redundant)) for rank in range(size)
        ]
        if tensors is not None:
            for runner in made:
                runner.stage(tensors)
                runner.commit()
        yield made


def prompt(seed: int, length: int) -> np.ndarray:
    """Token ids [length]."""
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)


def order(seed: int, length: int, step: int = 0, policy: str = LIVE, block: int = 2) -> StepOrder:
    """A prompt in one block; length 0 is the dummy entry."""
    if not length:
        return StepOrder(inputs=step_inputs([], [], [], BLOCK, step=step, policy=policy))
    return StepOrder(inputs=step_inputs([prompt(seed, length)], [0], [[block]], BLOCK, step=step, policy=policy))


def run(made: list[ModelRunner], orders: list[StepOrder]) -> list[StepResult]:
    """One step of all ranks."""
    return each(len(made), lambda rank: made[rank].execute(orders[rank]))


def alone(config: ModelConfig, tensors: Mapping[str, Any], orders: list[StepOrder]) -> list[StepResult]:
    """Each order on the one rank of a runner of its own."""
    with runners(config, 1, 1, tensors) as (runner,):
        return [runner.execute(one) for one in orders]


def assert_same(left: SampleResult, right: SampleResult) -> None:
    """To the bit."""
    for name in ("tokens", "logprobs", "policy_logprobs", "entropy"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
