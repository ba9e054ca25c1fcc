"""How far two sets of logprobs of the same sampled tokens are apart, and what to do about it in a loss.

Two different quantities use these formulas and must not be mixed:

- *mismatch*: the trainer's forward against the rollout, same weights. Exactly 0.0 here; anything else is a defect.
- *reference*: the policy against a frozen reference. What the algorithm watches; grows as the policy learns.

All functions take NumPy float32 or float64 arrays of one shape and compute in float64, where a difference of two
float32 values is exact. Estimators are J. Schulman's ("Approximating KL Divergence", 2020): with r = log p - log q of
tokens drawn from q, k1 = -r, k2 = r^2 / 2, k3 = exp(r) - r - 1; k1 and k3 are unbiased for KL(q || p), k3 is never
negative.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["token", "sequence", "geometric"]
Correction = Literal["truncate", "mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KLReport:
    """Masked statistics over the tokens of a batch. k3 is exp-shaped, so corrupt tokens show in p99 and max first."""

    num_tokens: int
    k1_kl_mean: float
    k2_kl_mean: float
    k3_kl_mean: float
    k3_kl_p99: float
    k3_kl_max: float
    probs_diff_mean: float
    """Mean of |exp(log p) - exp(log q)|."""
    probs_diff_max: float
    differing_logprobs: int
    """Tokens whose two logprobs are not the same number."""
    inexact: bool = False
    """Whether the rollout's weights were rounded otherwise than the trainer's: then a mismatch is no defect."""

    def metrics(self, prefix: str = "rollout_corr") -> dict[str, float]:
        """Under names that trainers log: `<prefix>/kl`, `<prefix>/k3_kl`, `training/rollout_probs_diff_mean`, ..."""
        return {
            f"{prefix}/kl": self.k1_kl_mean,
            f"{prefix}/k3_kl": self.k3_kl_mean,
            f"{prefix}/k3_kl_p99": self.k3_kl_p99,
            f"{prefix}/k3_kl_max": self.k3_kl_max,
            "training/rollout_probs_diff_mean": self.probs_diff_mean,
            "training/rollout_probs_diff_max": self.probs_diff_max,
            f"{prefix}/inexact": float(self.inexact),
        }

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for a JSON log."""
        return asdict(self)


def kl_estimates(log_p: ArrayLike, log_q: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """k1, k2, k3 per token. `log_q`: of the distribution the tokens were drawn from; `log_p`: of the other one.

    Raises ValueError for unequal shapes or a value that is not finite.
    """
    r = _log_ratio(log_p, log_q)
    return -r, 0.5 * r * r, np.expm1(r) - r


def kl_report(log_p: ArrayLike, log_q: ArrayLike, mask: ArrayLike | None = None) -> KLReport:
    """Statistics over the tokens where `mask` (same shape, default all) is true. ValueError if there is none."""
    p, q = np.asarray(log_p), np.asarray(log_q)
    _check_shapes(p, q)
    keep = _mask(p, mask)
    p, q = p[keep], q[keep]
    k1, k2, k3 = kl_estimates(p, q)
    diff = np.abs(np.exp(p.astype(np.float64)) - np.exp(q.astype(np.float64)))
    return KLReport(
        num_tokens=int(keep.sum()),
        k1_kl_mean=float(k1.mean()) + 0.0,  # + 0.0 turns -0.0 into 0.0
        k2_kl_mean=float(k2.mean()),
        k3_kl_mean=float(k3.mean()),
        k3_kl_p99=float(np.quantile(k3, 0.99)),
        k3_kl_max=float(k3.max()),
        probs_diff_mean=float(diff.mean()),
        probs_diff_max=float(diff.max()),
        differing_logprobs=int(np.count_nonzero(p != q)),
    )


def mismatch_kl(
    trainer_logprobs: ArrayLike, rollout_logprobs: ArrayLike, mask: ArrayLike | None = None, *, inexact: bool = False
) -> KLReport:
    """Trainer's forward against the rollout that drew the tokens (`policy_logprobs`), same weights: all zeros.

    But not so where weights were rounded on the way otherwise than the trainer rounds them: `inexact` (a rollout's own
    `inexact` says it) is noted in the report.
    """
    return replace(kl_report(trainer_logprobs, rollout_logprobs, mask), inexact=inexact)


def reference_kl(reference_logprobs: ArrayLike, policy_logprobs: ArrayLike, mask: ArrayLike | None = None) -> KLReport:
    """KL(policy || reference) over tokens drawn from the policy."""
    return kl_report(reference_logprobs, policy_logprobs, mask)


def importance_ratios(
    trainer_logprobs: ArrayLike, rollout_logprobs: ArrayLike, cu_seqlens: ArrayLike, level: Level = "token"
) -> Floats:
    """trainer / rollout probability, one value per token.

    Arrays are packed: sequence s owns entries cu_seqlens[s] : cu_seqlens[s + 1]. "token": each token's own ratio;
    "sequence": the product over its sequence; "geometric": the product's root by the sequence's length (GSPO,
    arXiv:2507.18071). The last two repeat one value over the sequence.
    """
    r = _log_ratio(trainer_logprobs, rollout_logprobs)
    if level == "token":
        return np.exp(r)
    if level not in ("sequence", "geometric"):
        raise ValueError(f"level must be 'token', 'sequence' or 'geometric', got {level!r}")
    bounds = _sequence_bounds(cu_seqlens, len(r))
    lengths = np.diff(bounds)
    totals = np.array([r[start:end].sum() for start, end in pairwise(bounds)])
    if level == "geometric":
        totals = totals / np.maximum(lengths, 1)
    return np.repeat(np.exp(totals), lengths)


def correction_weights(ratios: ArrayLike, correction: Correction, upper: float = 2.0, lower: float = 0.0) -> Floats:
    """Factors for the policy loss that account for rollouts drawn from other weights than the trainer's.

    "truncate": min(ratio, upper) (truncated importance sampling); "mask": the ratio inside [lower, upper], 0 outside
    (masked importance sampling). Bounds: 0 <= lower <= upper, upper finite and positive.
    """
    if not (0.0 <= lower <= upper and 0.0 < upper < np.inf):
        raise ValueError(f"bounds must satisfy 0 <= lower <= upper < inf, upper > 0; got lower={lower}, upper={upper}")
    weights = np.asarray(ratios, np.float64)
    if correction == "truncate":
        return np.minimum(weights, upper)
    if correction == "mask":
        return np.where((weights >= lower) & (weights <= upper), weights, 0.0)
    raise ValueError(f"correction must be 'truncate' or 'mask', got {correction!r}")


def _log_ratio(log_p: ArrayLike, log_q: ArrayLike) -> Floats:
    p, q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    _check_shapes(p, q)
    bad = ~(np.isfinite(p) & np.isfinite(q))
    if bad.any():
        where = int(np.flatnonzero(bad.reshape(-1))[0])
        values = p.reshape(-1)[where], q.reshape(-1)[where]
        raise ValueError(f"logprobs must be finite, got {values[0]} and {values[1]} at index {where}")
    difference: Floats = p - q
    return difference


def _check_shapes(p: NDArray[np.generic], q: NDArray[np.generic]) -> None:
    if p.shape != q.shape:
        raise ValueError(f"logprobs must have one shape, got {p.shape} and {q.shape}")


def _mask(values: NDArray[np.generic], mask: ArrayLike | None) -> NDArray[np.bool_]:
    keep = np.ones(values.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if keep.shape != values.shape:
        raise ValueError(f"mask must have the shape of the logprobs {values.shape}, got {keep.shape}")
    if not keep.any():
        raise ValueError("mask leaves no token to compare")
    return keep


def _sequence_bounds(cu_seqlens: ArrayLike, total: int) -> NDArray[np.int64]:
    bounds = np.asarray(cu_seqlens, np.int64)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {total}, got {bounds.tolist()}")
    return bounds
