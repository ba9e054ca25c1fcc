"""Group relative policy optimisation (arXiv:2402.03300) as plain functions: advantages and a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.integrations.policy_loss import clipped_policy_loss, reference_penalty

Tensor = Any  # paddle.Tensor


def group_advantages(
    rewards: ArrayLike, group_size: int, normalize: bool = True, epsilon: float = 1e-4
) -> NDArray[np.float32]:
    """Reward minus its group's mean, over the group's standard deviation + epsilon.

    `rewards`: [G * group_size], the samples of one prompt side by side. `normalize=False` leaves the division out
    (Dr. GRPO, arXiv:2503.20783). A group of equal rewards gets zeros. Raises ValueError for a length that is no
    multiple.
    """
    values = np.asarray(rewards, np.float64)
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 (a lone sample has no baseline), got {group_size}")
    if values.ndim != 1 or len(values) == 0 or len(values) % group_size:
        raise ValueError(f"rewards must be a list whose length is a multiple of {group_size}, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {values[~np.isfinite(values)][0]}")
    groups = values.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if normalize:
        centred = centred / (groups.std(axis=1, keepdims=True) + epsilon)
    advantages: NDArray[np.float32] = centred.reshape(-1).astype(np.float32)
    return advantages


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Sum over the R tokens of the clipped loss plus `kl_coef` times the k3 penalty against the reference.

    All tensors are [R]; `advantages` repeats a sequence's advantage over its tokens. A sum, so that micro-batches add
    up:
    divide by the tokens of the whole batch (token mean) before `backward`.
    """
    if kl_coef and reference_logprobs is None:
        raise ValueError(f"reference_logprobs is needed when kl_coef is not 0, got kl_coef={kl_coef}")
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high)
    if reference_logprobs is not None and kl_coef:
        loss = loss + kl_coef * reference_penalty(logprobs, reference_logprobs)
    return loss.sum()
