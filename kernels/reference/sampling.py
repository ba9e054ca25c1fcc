"""Definition of sampling: from a row of float32 logits to a token, its log-probabilities and the entropy.

Processed logits are float32, each step rounded, because their order decides ties; everything after them is float64,
except masses and the draw, which are integers. docs/numerics.md states the same in prose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch
from zerokl.kernels.reference.philox import token_bits

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

MASS_ONE = 1 << 40
"""Mass of the likeliest token: probabilities relative to it are counted in units of 2^-40."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDistribution:
    """All that is known of one row of V logits before the draw."""

    kept: NDArray[np.bool_]
    """[V], the support after top-k, top-p and min-p; at temperature 0 the argmax alone."""
    masses: NDArray[np.uint64]
    """[V], integer weights of the draw, 0 outside `kept`."""
    logprobs: Floats
    """[V], of the distribution sampled from; -inf outside `kept`."""
    policy_logprobs: Floats
    """[V], log-softmax of logits / temperature (temperature 1 in place of 0)."""
    raw_logprobs: Floats
    """[V], log-softmax of the logits."""
    entropy: float
    """Nats, of the policy distribution."""

    def draw(self, bits: int) -> int:
        """First id, ascending, whose cumulative mass exceeds floor(bits * total / 2^64)."""
        cumulative = np.cumsum(self.masses)
        threshold = bits * int(cumulative[-1]) >> 64
        return int(np.searchsorted(cumulative, np.uint64(threshold), side="right"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """Outcome for R rows in float64; see `SampleResult`. A row without a distribution has token -1 and NaNs."""

    tokens: NDArray[np.int32]
    logprobs: Floats
    policy_logprobs: Floats
    entropy: Floats
    raw_logprobs: Floats


def log_softmax(x: NDArray[np.floating]) -> Floats:
    """Along the last axis, in float64."""
    d = x.astype(np.float64) - np.max(x, axis=-1, keepdims=True)
    result: Floats = d - np.log(np.sum(np.exp(d), axis=-1, keepdims=True))
    return result


def entropy_of(logprobs: Floats) -> float:
    """-sum p log p in nats; impossible tokens add nothing."""
    possible = logprobs[logprobs > -np.inf]
    return float(-np.sum(np.exp(possible) * possible))


def alter_logits(logits: Singles, batch: SamplingBatch, row: int) -> Singles:
    """Logit bias, then repetition, presence and frequency penalties, in float32. `logits` [V] stays as it is."""
    out: Singles = logits.copy()
    bias = slice(batch.bias_start[row], batch.bias_start[row + 1])
    out[batch.bias_token[bias]] += batch.bias_value[bias]
    history = slice(batch.history_start[row], batch.history_start[row + 1])
    tokens, counts = batch.history_token[history], batch.history_count[history]
    repetition = batch.repetition_penalty[row]
    x = out[tokens]
    x = np.where(x > 0, x / repetition, x * repetition)
    in_output = counts > 0
    x = np.where(in_output, x - batch.presence_penalty[row], x)
    x = np.where(in_output, x - batch.frequency_penalty[row] * counts.astype(np.float32), x)
    out[tokens] = x
    return out


def masses_of(x: Singles) -> NDArray[np.uint64]:
    """floor(exp(x - max) * 2^40), the difference rounded to float32 first."""
    d = (x - x.max()).astype(np.float64)
    masses: NDArray[np.uint64] = np.floor(np.exp(d) * MASS_ONE).astype(np.uint64)
    return masses


def truncate(x: Singles, masses: NDArray[np.uint64], top_k: int, top_p: float, min_p: float) -> NDArray[np.bool_]:
    """Which tokens top-k, top-p and min-p keep, [V].

    The order is (x descending, id ascending). Top-k keeps the first k; top-p the shortest prefix, of at least one
    token, whose mass reaches top_p times the mass that top-k kept; min-p, of these, the tokens of mass >= min_p * 2^40.
    """
    order = np.argsort(-x, kind="stable")
    cumulative = np.cumsum(masses[order])
    last = len(x) - 1 if top_k == 0 else min(top_k, len(x)) - 1
    if top_p < 1.0:
        threshold = np.uint64(float(top_p) * float(cumulative[last]))
        last = int(np.searchsorted(cumulative, threshold, side="left"))
    kept = np.zeros(len(x), bool)
    kept[order[: last + 1]] = True
    if min_p > 0.0:
        kept &= masses >= np.uint64(float(min_p) * MASS_ONE)
    return kept


def row_distribution(logits: Singles, batch: SamplingBatch, row: int) -> RowDistribution | None:
    """Distribution of one row of logits [V]; None if there is none (a NaN, +inf, or every token banned)."""
    temperature = batch.temperature[row]
    divisor = temperature if temperature > 0 else np.float32(1)
    altered = alter_logits(logits, batch, row)
    with np.errstate(over="ignore"):  # an overflow is then found as an infinite maximum
        policy, x = logits / divisor, altered / divisor
    if not (np.isfinite(policy.max()) and np.isfinite(x.max())):
        return None
    masses = masses_of(x)
    if temperature > 0:
        top_k, top_p, min_p = int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row])
        kept = truncate(x, masses, top_k, top_p, min_p)
    else:
        kept = np.arange(len(x)) == np.argmax(x)
    policy_logprobs = log_softmax(policy)
    return RowDistribution(
        kept=kept,
        masses=np.where(kept, masses, np.uint64(0)),
        logprobs=log_softmax(np.where(kept, x, np.float32(-np.inf))),
        policy_logprobs=policy_logprobs,
        raw_logprobs=log_softmax(logits),
        entropy=entropy_of(policy_logprobs),
    )


def sample_rows(logits: NDArray[np.floating], batch: SamplingBatch) -> SampledRows:
    """Tokens and log-probabilities of logits [R, V], rounded to float32 on entry."""
    rows = len(logits)
    tokens = np.full(rows, -1, np.int32)
    values = {name: np.full(rows, np.nan) for name in ("logprobs", "policy_logprobs", "entropy", "raw_logprobs")}
    for row, row_logits in enumerate(logits.astype(np.float32)):
        distribution = row_distribution(row_logits, batch, row)
        if distribution is None:
            continue
        token = int(batch.forced[row])
        if token < 0:
            bits = token_bits(int(batch.seed[row]), int(batch.sample_index[row]), int(batch.position[row]))
            token = distribution.draw(bits)
        tokens[row] = token
        values["logprobs"][row] = distribution.logprobs[token]
        values["policy_logprobs"][row] = distribution.policy_logprobs[token]
        values["entropy"][row] = distribution.entropy
        values["raw_logprobs"][row] = distribution.raw_logprobs[token]
    return SampledRows(tokens=tokens, **values)


def log_softmax_backward(
    logits: Floats, targets: NDArray[np.int32], temperature: Floats, dlogprob: Floats, dentropy: Floats
) -> Floats:
    """Gradient with respect to logits [R, V] of sum(dlogprob * policy_logprobs[targets] + dentropy * entropy), all [R].

    With p = softmax(logits / t) and H its entropy, d log p_target / d logit_j = (1[j = target] - p_j) / t and
    d H / d logit_j = -p_j (log p_j + H) / t.
    """
    divisor = np.where(temperature > 0, temperature, 1.0)[:, None]
    logprobs = log_softmax(logits / divisor)
    p = np.exp(logprobs)
    entropy = -np.sum(p * logprobs, axis=1, keepdims=True)
    gradient = -p * (dlogprob[:, None] + dentropy[:, None] * (logprobs + entropy))
    gradient[np.arange(len(logits)), targets] += dlogprob
    result: Floats = gradient / divisor
    return result
