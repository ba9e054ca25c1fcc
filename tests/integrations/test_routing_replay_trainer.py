"""Trainers on a mixture of experts: with `return_routing` the rollout's experts are those of every later forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_rig import captured

from zerokl.integrations.batch import PackedBatch, pack_rollouts
from zerokl.integrations.grpo_trainer import GRPOConfig, GRPOTrainer
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.ppo_trainer import PPOConfig, PPOTrainer
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync.publisher import WeightPublisher

KINDS: dict[str, Any] = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = tiny_moe_config(vocab_size=32, hidden_size=32, head_dim=8, eos_token_id=None)
    target = tmp_path_factory.mktemp("moe") / "model"
    save_pretrained(target, content, random_tensors(ModelConfig.from_json(content), 3))
    return target


@pytest.fixture
def engine(folder: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(EngineConfig(model=str(folder), kv_cache_bytes=1 << 20, return_routing="output")) as engine:
        yield engine


def two_epochs(engine: RolloutEngine, algo: str, **options: Any) -> tuple[Any, list[np.ndarray]]:
    """The step's report, and of each micro-batch of both epochs the share of given choices that were not followed."""
    trainer_kind, config_kind = KINDS[algo]
    params = SamplingParams(n=4, max_tokens=6)
    config = config_kind(sampling_params=params, learning_rate=0.05, epochs=2, micro_batch_tokens=1000, **options)
    policy = PolicyModel.from_pretrained(engine.config.model)
    shares = []

    class Watched(trainer_kind):  # type: ignore[misc, valid-type]
        def losses(self, batch: PackedBatch, signals: Any) -> Any:
            losses = super().losses(batch, signals)
            assert batch.routing is not None
            given = batch.routing >= 0
            shares.append((capture.take().experts != batch.routing)[given].mean())
            return losses

    with WeightPublisher() as publisher, captured(policy) as capture:
        trainer = Watched(policy, engine, publisher, lambda rollout: float(np.mean(rollout.token_ids < 16)), config)
        return trainer.step(np.random.default_rng(0).integers(0, 32, (3, 5)).tolist()), shares


@pytest.mark.parametrize("algo", KINDS)
def test_experts_are_held_after_an_update(engine: RolloutEngine, algo: str) -> None:
    report, shares = two_epochs(engine, algo)
    assert str(report.mismatch.k3_kl_mean) == "0.0"
    assert shares == [0.0, 0.0]


@pytest.mark.parametrize("algo", KINDS)
def test_without_replay_the_routers_choose_anew(engine: RolloutEngine, algo: str) -> None:
    """The negative control."""
    _, (before, after) = two_epochs(engine, algo, replay_routing=False)
    assert before == 0.0 and after > 0.01


def test_routing_is_packed_where_every_rollout_has_it(engine: RolloutEngine, folder: Path) -> None:
    params = SamplingParams(max_tokens=3)
    rollouts = engine.generate([[1, 2, 3], [4]], params)
    batch = pack_rollouts(rollouts)
    assert batch.routing is not None and batch.routing.shape == (2, 10, 3)
    assert (batch.routing[0, :, 0] < 0).tolist() == [True, True, False, False, False, True, False, False, False, True]
    with RolloutEngine(EngineConfig(model=str(folder), kv_cache_bytes=1 << 20)) as plain:
        mixed = [*rollouts, *plain.generate([[5]], params)]
        assert pack_rollouts(mixed).routing is None
        with pytest.raises(ValueError, match="replay_routing must not be True where the engine's return_routing"):
            GRPOTrainer(None, plain, None, None, GRPOConfig(replay_routing=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replay_routing must be True, False or None, got 'yes'"):
        GRPOConfig(replay_routing="yes")  # type: ignore[arg-type]
