"""What one training step did, as plain data: for tables, JSON-lines logs and plots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from zerokl.rollout.kl import KLReport


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Figures of one step, in the order in which things happened."""

    step: int
    policy_version: int
    """Version of the weights that the rollouts were drawn from."""
    sync_seconds: float
    """Publish, stage, verify and commit of the weights."""
    rollout_seconds: float
    rollout_tokens: int
    """Generated tokens."""
    cached_tokens: int
    """Prompt tokens that came out of the prefix cache."""
    reward_mean: float
    reward_std: float
    mismatch: KLReport
    """Trainer's forward (the one whose graph is back-propagated) against the rollout. All zeros."""
    reference: KLReport
    """Policy against the frozen reference."""
    entropy: float
    """Mean over the generated tokens, nats."""
    loss: float
    """Mean over the generated tokens, first epoch."""
    train_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of rollout."""
        return self.rollout_tokens / self.rollout_seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the derived speed included."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}
