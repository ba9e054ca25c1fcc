"""A GRPO trainer that one can read in a sitting: what `PolicyTrainer` leaves open, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.integrations.batch import PackedBatch
from zerokl.integrations.grpo import group_advantages, grpo_loss
from zerokl.integrations.paddle_backend import import_paddle
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.trainer import Losses, PerRollout, PolicyTrainer, Reward, TrainerConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.weight_sync.publisher import WeightPublisher


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(TrainerConfig):
    """Options of GRPO beside the common ones."""

    kl_coef: float = 0.0
    """Weight of the k3 penalty against the reference in the loss."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize_advantages: bool = True
    """Divide by the group's standard deviation."""

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)  # `super()` does not find its way in a dataclass with slots
        if self.sampling_params.n < 2:
            raise ValueError(f"sampling_params.n must be at least 2 (the group), got {self.sampling_params.n}")


@dataclass(frozen=True, slots=True)
class _Signals:
    advantages: NDArray[np.float32]  # one per rollout
    reference: Sequence[NDArray[np.float32]]


class GRPOTrainer(PolicyTrainer):
    """Group relative policy optimisation: rewards against their group's mean, no value model."""

    config: GRPOConfig

    def __init__(
        self,
        policy: PolicyModel,
        engine: RolloutEngine,
        publisher: WeightPublisher,
        reward: Reward,
        config: GRPOConfig | None = None,
    ) -> None:
        super().__init__(policy, engine, publisher, reward, config or GRPOConfig())

    def signals(self, rollouts: list[Rollout], rewards: NDArray[np.float64], reference: PerRollout) -> _Signals:
        """Advantages within the groups; `rollouts` come prompt by prompt."""
        group_size = self.config.sampling_params.n
        return _Signals(group_advantages(rewards, group_size, self.config.normalize_advantages), reference)

    def losses(self, batch: PackedBatch, signals: _Signals) -> Losses:
        """The trainer's forward is the engine's, so the first epoch's ratios are exactly 1."""
        paddle = import_paddle()
        temperature = self.config.sampling_params.temperature or 1.0
        logprobs, entropy = self.policy.logprobs(
            batch.token_ids, batch.cu_seqlens, temperature, rows=batch.rows, routing=self.routing_of(batch)
        )
        total = grpo_loss(
            logprobs,
            paddle.to_tensor(batch.rollout_logprobs),
            paddle.to_tensor(signals.advantages[batch.indices][batch.sequence_of_row]),
            paddle.to_tensor(batch.select(signals.reference)),
            self.config.kl_coef,
            self.config.clip_low,
            self.config.clip_high,
        )
        return Losses(total, logprobs, entropy)
