"""Proximal policy optimisation (arXiv:1707.06347) as plain functions: GAE, value loss, whole loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.integrations.paddle_backend import import_paddle
from zerokl.integrations.policy_loss import clipped_policy_loss

Tensor = Any  # paddle.Tensor


def token_rewards(
    rewards: ArrayLike, cu_rows: ArrayLike, kl: ArrayLike | None = None, kl_coef: float = 0.0
) -> NDArray[np.float32]:
    """[R]: a sequence's reward on its last token, minus `kl_coef` times the per-token `kl` (arXiv:2203.02155)."""
    bounds = np.asarray(cu_rows, np.int64)
    values = np.asarray(rewards, np.float64)
    if len(values) != len(bounds) - 1:
        raise ValueError(f"rewards must hold one value per sequence ({len(bounds) - 1}), got {len(values)}")
    shaped = np.zeros(bounds[-1]) if kl is None else -kl_coef * np.asarray(kl, np.float64)
    shaped[bounds[1:] - 1] += values
    return shaped.astype(np.float32)


def generalized_advantages(
    rewards: ArrayLike, values: ArrayLike, cu_rows: ArrayLike, gamma: float = 1.0, lam: float = 0.95
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """GAE (arXiv:1506.02438): (advantages [R], returns [R]) of packed sequences that end after their last token.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t, with V beyond the end
    0.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    bounds = np.asarray(cu_rows, np.int64)
    if r.shape != v.shape or r.shape != (int(bounds[-1]),):
        raise ValueError(f"rewards and values must have shape ({int(bounds[-1])},), got {r.shape} and {v.shape}")
    advantages = np.zeros_like(r)
    for start, end in pairwise(bounds):
        following_value = following_advantage = 0.0
        for t in range(end - 1, start - 1, -1):
            delta = r[t] + gamma * following_value - v[t]
            following_advantage = delta + gamma * lam * following_advantage
            following_value = v[t]
            advantages[t] = following_advantage
    return advantages.astype(np.float32), (advantages + v).astype(np.float32)


def whiten(values: ArrayLike, epsilon: float = 1e-8) -> NDArray[np.float32]:
    """Mean 0 and standard deviation 1 over the batch."""
    x = np.asarray(values, np.float64)
    whitened: NDArray[np.float32] = ((x - x.mean()) / (x.std() + epsilon)).astype(np.float32)
    return whitened


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Per-token loss [R]: 0.5 * max((V - R)^2, (clip(V, V_old +- clip) - R)^2)."""
    paddle = import_paddle()
    if clip <= 0.0:
        raise ValueError(f"clip must be above 0, got {clip}")
    clipped = old_values + paddle.clip(values - old_values, -clip, clip)
    return 0.5 * paddle.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropy: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
) -> Tensor:
    """Sum over the R tokens of policy loss + value_coef * value loss - entropy_coef * entropy; all tensors are [R]."""
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, clip, clip)
    loss = loss + value_coef * clipped_value_loss(values, old_values, returns, value_clip)
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    return loss.sum()
