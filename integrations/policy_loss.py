"""The clipped policy objective that GRPO and PPO share, on packed Paddle tensors."""

from __future__ import annotations

from typing import Any

from zerokl.integrations.paddle_backend import import_paddle

Tensor = Any  # paddle.Tensor; Paddle ships no types


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Per-token loss [R]: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), arXiv:1707.06347 eq. 7.

    `logprobs` carries the gradient; `old_logprobs` are those of the rollout. Unequal bounds are DAPO's
    (arXiv:2503.14476).
    """
    paddle = import_paddle()
    if not (0.0 <= clip_low < 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip_low must be in [0, 1) and clip_high at least 0, got {clip_low} and {clip_high}")
    ratio = paddle.exp(logprobs - old_logprobs)
    clipped = paddle.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -paddle.minimum(ratio * advantages, clipped * advantages)


def reference_penalty(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token k3 estimate [R] of KL(policy || reference), with a gradient to `logprobs` (arXiv:2402.03300 eq. 4)."""
    paddle = import_paddle()
    r = reference_logprobs - logprobs
    return paddle.expm1(r) - r
