"""PyLayer of the LM head: log-probabilities of given tokens and entropies, a chunk of rows at a time.

Forward runs the engine's sampler with the tokens forced, so it yields `policy_logprobs` as a rollout would; the [R, V]
logits never exist as a whole, and backward computes each chunk of them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle.autograd import PyLayer

from zerokl.kernels.autograd.arrays import Floats, empty, read, zeros
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import SampleResult, SamplingBatch, check_temperature, neutral_sampling

Tensor = Any  # paddle.Tensor
DEFAULT_CHUNK_ROWS = 64


class _LMHead(PyLayer):  # type: ignore[misc]  # Paddle has no complete stubs
    """(hidden [R, E], weight [V, E], targets [R], temperature, chunk rows) -> (logprobs [R], entropy [R])."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: NDArray[np.int32], temperature: float, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        ctx.wanted = (not hidden.stop_gradient, not weight.stop_gradient)
        ctx.call = (targets, temperature, chunk_rows)
        rows = targets.shape[0]
        logprobs, logprobs_array = empty(rows)
        entropy, entropy_array = empty(rows)
        for chunk, logits in _logit_chunks(read(hidden), read(weight), chunk_rows):
            batch = neutral_sampling(logits.shape[0], targets[chunk], temperature)
            sampled = sample_logits(logits, batch)
            logprobs_array[chunk], entropy_array[chunk] = sampled.policy_logprobs, sampled.entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        targets, temperature, chunk_rows = ctx.call
        hidden, weight = (read(t) for t in ctx.saved_tensor())
        wanted_hidden, wanted_weight = ctx.wanted
        dhidden, dhidden_array = empty(*hidden.shape) if wanted_hidden else (None, None)
        dweight, dweight_array = zeros(*weight.shape) if wanted_weight else (None, None)
        nothing = np.zeros(targets.shape[0], np.float32)
        dlogprob_rows = nothing if dlogprobs is None else read(dlogprobs)
        dentropy_rows = nothing if dentropy is None else read(dentropy)
        for chunk, logits in _logit_chunks(hidden, weight, chunk_rows):
            heat = np.full(logits.shape[0], temperature, np.float32)
            _cpu.log_softmax_backward(logits, targets[chunk], heat, dlogprob_rows[chunk], dentropy_rows[chunk])
            if dhidden_array is not None:
                _cpu.matmul(logits, weight, dhidden_array[chunk])
            if dweight_array is not None:
                _cpu.matmul(logits, hidden[chunk], dweight_array, trans_a=True, accumulate=True)
        return dhidden, dweight


def _logit_chunks(hidden: Floats, weight: Floats, chunk_rows: int) -> Iterator[tuple[slice, Floats]]:
    """Row slices and their logits, in one buffer that the next chunk overwrites."""
    rows = hidden.shape[0]
    buffer = np.empty((min(chunk_rows, rows), weight.shape[0]), np.float32)
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, rows))
        logits = buffer[: chunk.stop - start]
        _cpu.linear_unpacked(hidden[chunk], weight, None, logits)
        yield chunk, logits


def lm_head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: NDArray[np.int32],
    temperature: float = 1.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Logprobs of `targets` [R] and entropies [R] (nats) under softmax(hidden weight^T / temperature), differentiable.

    `hidden` [R, E] and `weight` [V, E] are float32, `temperature` is finite and above 0. `chunk_rows` rows of logits
    exist at a time ([chunk_rows, V] float32); no result depends on it but the last bits of the weight's gradient.
    """
    check_temperature(temperature)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if targets.ndim != 1 or targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"targets must have one entry per hidden row ({hidden.shape[0]}), got shape {targets.shape}")
    result: tuple[Tensor, Tensor] = _LMHead.apply(hidden, weight, targets, float(temperature), chunk_rows)
    return result


def sample_logits(logits: Floats, batch: SamplingBatch) -> SampleResult:
    """The engine's sampler on [R, V] logits, with fresh results."""
    rows = logits.shape[0]
    tokens = np.empty(rows, np.int32)
    logprobs, policy_logprobs, entropy = (np.empty(rows, np.float32) for _ in range(3))
    raw_logprobs = np.empty(rows, np.float32) if batch.want_raw else None
    options = [getattr(batch, field.name) for field in fields(batch) if field.name != "want_raw"]
    _cpu.sample(logits, *options, tokens, logprobs, policy_logprobs, entropy, raw_logprobs)
    return SampleResult(
        tokens=tokens, logprobs=logprobs, policy_logprobs=policy_logprobs, entropy=entropy, raw_logprobs=raw_logprobs
    )
