"""The loop that GRPO and PPO share: weights out, rollouts in, one update. Algorithms say what differs in two methods.

sync weights -> generate -> reward -> score by the reference -> signals() -> micro-batches: losses() -> AdamW step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.integrations.batch import PackedBatch, micro_batches
from zerokl.integrations.paddle_backend import import_paddle
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.report import StepReport
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import reference_kl
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync.publisher import WeightPublisher

Tensor = Any  # paddle.Tensor
PerRollout = Sequence[NDArray[np.float32]]  # one array per rollout, one value per generated token
Reward = Callable[[Rollout], float]
PhaseObserver = Callable[[str], None]  # told what the step is about to do, for a progress display


def _ignore_phase(_: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Options of every algorithm."""

    sampling_params: SamplingParams = field(default_factory=lambda: SamplingParams(n=4, max_tokens=32))
    """How rollouts are drawn; n is the group size."""
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    micro_batch_tokens: int = 512
    """Tokens of one forward and backward; bounds the trainer's memory."""
    epochs: int = 1
    """Optimizer steps per batch of rollouts, each over the whole batch."""
    replay_routing: bool | None = None
    """Send each token through the experts that it went through in the rollout, whatever the routers choose after an
    update (routing replay, arXiv:2510.11370). None: where the engine returns routing."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("micro_batch_tokens", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.replay_routing not in (None, True, False):
            raise ValueError(f"replay_routing must be True, False or None, got {self.replay_routing!r}")


@dataclass(frozen=True, slots=True)
class Losses:
    """A micro-batch's outcome; `total` carries the graph, the others are its by-products [R]."""

    total: Tensor
    logprobs: Tensor
    entropy: Tensor


class PolicyTrainer(ABC):
    """Owns the optimizer and the version counter; the engine owns its weights, the publisher the shared memory.

    The first `step` publishes the policy and pins it in the engine as "reference": the frozen start.
    """

    def __init__(
        self,
        policy: PolicyModel,
        engine: RolloutEngine,
        publisher: WeightPublisher,
        reward: Reward,
        config: TrainerConfig,
        extra_parameters: Sequence[Tensor] = (),
    ) -> None:
        if config.replay_routing and engine.config.return_routing == "none":
            raise ValueError("replay_routing must not be True where the engine's return_routing is 'none'")
        paddle = import_paddle()
        self.policy, self.engine, self.publisher = policy, engine, publisher
        self.reward, self.config = reward, config
        self.optimizer = paddle.optimizer.AdamW(
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            parameters=[*policy.parameters(), *extra_parameters],
            grad_clip=paddle.nn.ClipGradByGlobalNorm(config.max_grad_norm),
        )
        self.step_number = 0
        self.on_phase: PhaseObserver = _ignore_phase

    @abstractmethod
    def signals(self, rollouts: list[Rollout], rewards: NDArray[np.float64], reference: PerRollout) -> Any:
        """What the losses need beside the forward (advantages, old values, ...), computed once a step."""

    @abstractmethod
    def losses(self, batch: PackedBatch, signals: Any) -> Losses:
        """Forward of one micro-batch and the sum of its per-token losses."""

    def step(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> StepReport:
        """One rollout of `prompts` (n samples each) and one update from it."""
        self.on_phase("weight sync")
        version, sync_seconds = self.sync_weights()
        self.on_phase("rollout")
        start = perf_counter()
        rollouts = self.roll_out(prompts)
        rollout_seconds = perf_counter() - start
        rewards = np.array([self.reward(rollout) for rollout in rollouts], np.float64)
        self.on_phase("scoring by the reference")
        scores = self.engine.score(rollouts, policy="reference")
        reference = [score[rollout.generated] for score, rollout in zip(scores, rollouts, strict=True)]
        self.on_phase("update")
        start = perf_counter()
        signals = self.signals(rollouts, rewards, reference)
        first_epoch, *_ = [self._epoch(rollouts, signals) for _ in range(self.config.epochs)]
        train_seconds = perf_counter() - start
        self.step_number += 1
        rolled = np.concatenate([rollout.policy_logprobs[rollout.generated] for rollout in rollouts])
        return StepReport(
            step=self.step_number - 1,
            policy_version=version,
            sync_seconds=sync_seconds,
            rollout_seconds=rollout_seconds,
            rollout_tokens=len(rolled),
            cached_tokens=sum(rollout.num_cached_tokens for rollout in rollouts),
            reward_mean=float(rewards.mean()),
            reward_std=float(rewards.std()),
            mismatch=self.engine.report_trainer_logprobs(
                rollouts, _per_token(rollouts, first_epoch.logprobs), version=version
            ),
            reference=reference_kl(np.concatenate(reference), rolled),
            entropy=first_epoch.entropy,
            loss=first_epoch.loss,
            train_seconds=train_seconds,
        )

    def roll_out(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[Rollout]:
        """n rollouts of each prompt, prompt by prompt, at the temperature of `config.sampling_params`.

        Override it for conversations: those of a prompt are forks of a `Session`, each handed over by `to_rollout`.
        """
        return self.engine.generate(prompts, self.config.sampling_params)

    def sync_weights(self) -> tuple[int, float]:
        """Publish the policy, rounded as in its own forward, and commit it in the engine; (version, seconds)."""
        start = perf_counter()
        version = self.engine.get_weight_version() + 1
        dtype = None if self.policy.weight_dtype == "float32" else self.policy.weight_dtype
        self.engine.update_weights(
            self.publisher.publish(self.policy.named_arrays(), version, dtype=dtype, inexact=False)
        )
        seconds = perf_counter() - start
        if self.step_number == 0:
            self.engine.pin_weights("reference")
        return version, seconds

    def routing_of(self, batch: PackedBatch) -> NDArray[np.int32] | None:
        """What `PolicyModel` is to replay for a batch: `batch.routing`, or None where it is not to."""
        return None if self.config.replay_routing is False else batch.routing

    def _epoch(self, rollouts: list[Rollout], signals: Any) -> _Epoch:
        """Accumulate gradients over all micro-batches, then one optimizer step."""
        total_tokens = sum(int(rollout.generated.sum()) for rollout in rollouts)
        logprobs, entropy, loss = [], 0.0, 0.0
        for batch in micro_batches(rollouts, self.config.micro_batch_tokens):
            losses = self.losses(batch, signals)
            (losses.total / total_tokens).backward()
            logprobs.append(losses.logprobs.numpy())
            entropy += float(losses.entropy.sum())
            loss += float(losses.total)
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)  # frees them: the rollout comes next
        return _Epoch(np.concatenate(logprobs), entropy / total_tokens, loss / total_tokens)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What the report takes from one pass over the batch."""

    logprobs: NDArray[np.float32]
    entropy: float
    loss: float


def _per_token(rollouts: Sequence[Rollout], logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logprobs [R] of the sampled tokens among all T tokens of the rollouts: [T], 0 at those of tools."""
    whole = np.zeros(sum(len(rollout.token_ids) for rollout in rollouts), np.float32)
    whole[np.concatenate([rollout.generated for rollout in rollouts])] = logprobs
    return whole
