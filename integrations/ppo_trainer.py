"""A PPO trainer that one can read in a sitting: a value head on the policy's hidden states, GAE, clipped losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.integrations.batch import PackedBatch, micro_batches, pack_rollouts
from zerokl.integrations.paddle_backend import import_paddle
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.ppo import generalized_advantages, ppo_loss, token_rewards, whiten
from zerokl.integrations.trainer import Losses, PerRollout, PolicyTrainer, Reward, TrainerConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import kl_estimates
from zerokl.rollout.outputs import Rollout
from zerokl.weight_sync.publisher import WeightPublisher

Tensor = Any  # paddle.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig(TrainerConfig):
    """Options of PPO beside the common ones."""

    kl_coef: float = 0.0
    """Weight of the per-token k1 estimate against the reference in the rewards."""
    gamma: float = 1.0
    lam: float = 0.95
    """Lambda of GAE."""
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)  # `super()` does not find its way in a dataclass with slots
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("clip", "value_clip"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class _Signals:
    advantages: Sequence[NDArray[np.float32]]  # per rollout, per generated token
    values: Sequence[NDArray[np.float32]]
    returns: Sequence[NDArray[np.float32]]


class PPOTrainer(PolicyTrainer):
    """The value of a token's state is read by a linear head from the hidden row that predicts the token."""

    config: PPOConfig

    def __init__(
        self,
        policy: PolicyModel,
        engine: RolloutEngine,
        publisher: WeightPublisher,
        reward: Reward,
        config: PPOConfig | None = None,
    ) -> None:
        paddle = import_paddle()
        self.value_head = paddle.nn.Linear(policy.config.hidden_size, 1)
        self.value_head.weight.set_value(paddle.zeros_like(self.value_head.weight))
        super().__init__(policy, engine, publisher, reward, config or PPOConfig(), self.value_head.parameters())

    def signals(self, rollouts: list[Rollout], rewards: NDArray[np.float64], reference: PerRollout) -> _Signals:
        """Values before the update, then shaped rewards, GAE and whitened advantages over the whole batch."""
        values = self._values(rollouts)
        batch = pack_rollouts(rollouts)
        k1, _, _ = kl_estimates(np.concatenate(reference), batch.rollout_logprobs)
        shaped = token_rewards(rewards, batch.cu_rows, k1, self.config.kl_coef)
        config = self.config
        advantages, returns = generalized_advantages(shaped, values, batch.cu_rows, config.gamma, config.lam)
        cuts = batch.cu_rows[1:-1]
        return _Signals(np.split(whiten(advantages), cuts), np.split(values, cuts), np.split(returns, cuts))

    def losses(self, batch: PackedBatch, signals: _Signals) -> Losses:
        """One forward serves the policy's logprobs and the value head."""
        paddle = import_paddle()
        hidden = self._hidden_states(batch)
        temperature = self.config.sampling_params.temperature or 1.0
        logprobs, entropy = self.policy.head_logprobs(hidden, batch.targets, temperature)
        total = ppo_loss(
            logprobs,
            paddle.to_tensor(batch.rollout_logprobs),
            paddle.to_tensor(batch.select(signals.advantages)),
            self.value_head(hidden).squeeze(-1),
            paddle.to_tensor(batch.select(signals.values)),
            paddle.to_tensor(batch.select(signals.returns)),
            entropy,
            self.config.clip,
            self.config.value_clip,
            self.config.value_coef,
            self.config.entropy_coef,
        )
        return Losses(total, logprobs, entropy)

    def _hidden_states(self, batch: PackedBatch) -> Tensor:
        return self.policy.hidden_states(
            batch.token_ids, batch.cu_seqlens, rows=batch.rows, routing=self.routing_of(batch)
        )

    def _values(self, rollouts: list[Rollout]) -> NDArray[np.float32]:
        """[R] values of the current head, without a graph."""
        paddle = import_paddle()
        parts = []
        with paddle.no_grad():
            for batch in micro_batches(rollouts, self.config.micro_batch_tokens):
                hidden = self._hidden_states(batch)
                parts.append(self.value_head(hidden).squeeze(-1).numpy())
        return np.concatenate(parts)
