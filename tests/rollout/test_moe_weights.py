"""Weights of mixtures of experts: read back from their packed form, changed in part, put to sleep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_moe_config
from zerokl.rollout.step_order import StepOrder

FAMILIES = ("Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM")
CHANGED = (".experts.1.up_proj.", ".experts.0.down_proj.", "mlp.gate.", "shared_experts.up_proj.", "q_proj")


def make_runner(config: ModelConfig) -> ModelRunner:
    options = EngineConfig(model="unused", num_blocks=8)
    return ModelRunner(options.resolve(max_position_embeddings=64, kv_bytes_per_token=1), config)


def logprobs(runner: ModelRunner) -> list[float]:
    step = step_inputs([np.arange(1, 13, dtype=np.int32)], [0], [[2]], 16)
    return runner.execute(StepOrder(inputs=step)).sampled.policy_logprobs.tolist()


def logprobs_of(config: ModelConfig, tensors: dict[str, np.ndarray]) -> list[float]:
    runner = make_runner(config)
    runner.stage(tensors)
    runner.commit()
    return logprobs(runner)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_packed_experts_are_read_back_exactly(architecture: str) -> None:
    config = ModelConfig.from_json(tiny_moe_config(architecture))
    tensors = random_tensors(config, 1)
    runner = make_runner(config)
    runner.stage(tensors)
    runner.commit()
    live = runner.live_tensors()
    for name, values in tensors.items():
        np.testing.assert_array_equal(live[name], values, err_msg=name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_delta_of_experts_equals_the_whole_set(architecture: str) -> None:
    config = ModelConfig.from_json(tiny_moe_config(architecture))
    old, new = random_tensors(config, 1), random_tensors(config, 2)
    delta = {name: new[name] for name in old if any(part in name for part in CHANGED)}
    assert 0 < len(delta) < len(old)
    updated = make_runner(config)
    updated.stage(old)
    updated.commit()
    updated.stage(delta, 1, delta=True)
    updated.commit()
    live = updated.live_tensors()
    for name, values in {**old, **delta}.items():
        np.testing.assert_array_equal(live[name], values, err_msg=name)
    assert logprobs(updated) == logprobs_of(config, {**old, **delta})
    assert logprobs(updated) != logprobs_of(config, old)


def test_experts_sleep_and_wake(tmp_path: Path) -> None:
    config = ModelConfig.from_json(tiny_moe_config())
    runner = make_runner(config)
    runner.stage(random_tensors(config, 1))
    runner.commit()
    before = logprobs(runner)
    runner.sleep(["weights"], 1, str(tmp_path))
    runner.wake_up(["weights"])
    assert logprobs(runner) == before
