# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Sampling as docs/numerics.md defines it, one program for a row, step by step: what the fast kernels are held to."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import vexp
from zerokl.kernels.gpu.sampling import (
    ENTROPY,
    FORCED,
    LOGPROB,
    NUM_OPTIONS,
    NUM_RESULTS,
    POLICY_LOGPROB,
    RAW_LOGPROB,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
    VOCAB_BLOCK,
    cut_at,
    drawn_bits,
    least_mass,
    logprob_of,
    mass_of,
    option_of,
    order_key,
    row_sums,
    scaled,
    share_of,
)


@triton.jit
def _row_max(row_ptr, V, temperature, BLOCK: tl.constexpr):
    """(largest scaled logit, number of entries that are NaN or +inf)."""
    best = tl.full((), float("-inf"), tl.float32)
    broken = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        x = scaled(row_ptr, start + tl.arange(0, BLOCK), V, temperature)
        sound = x < float("inf")
        broken += tl.sum(tl.where(sound, 0, 1), axis=0)
        best = tl.maximum(best, tl.max(tl.where(sound, x, float("-inf")), axis=0))
    return best, broken


@triton.jit
def _draw(row_ptr, V, temperature, best, cut, least, rest, BLOCK: tl.constexpr):
    """First id, ascending, whose cumulative kept mass exceeds `rest`."""
    token = tl.full((), -1, tl.int32)
    before = tl.zeros((), tl.uint64)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = scaled(row_ptr, i, V, temperature)
        mass = mass_of(vexp(x - best))
        mass = tl.where((i < V) & (order_key(x, i) <= cut) & (mass >= least), mass, tl.zeros_like(mass))
        over = before + tl.cumsum(mass, axis=0) > rest
        first = tl.min(tl.where(over, i, V), axis=0)
        token = tl.where((token < 0) & (first < V), first, token)
        before += tl.sum(mass, axis=0)
    return token


@triton.jit
def _first_equal(row_ptr, V, value, BLOCK: tl.constexpr):
    best = V
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
        best = tl.minimum(best, tl.min(tl.where((x == value) & (i < V), i, V), axis=0))
    return best


@triton.jit
def _sample_at_temperature(
    row_ptr, options_ptr, row, V, temperature, best, forced, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """(token, logprob) of a row of processed logits under its truncated distribution."""
    cut = ~tl.zeros((), tl.uint64)
    least = tl.zeros((), tl.uint64)
    unlimited = ~tl.zeros((), tl.uint64)
    top_k = tl.load(options_ptr + row * NUM_OPTIONS + TOP_K)
    top_p = option_of(options_ptr, row, TOP_P)
    if (top_k > 0) & (top_k < V):
        cut, _, _ = cut_at(row_ptr, V, temperature, best, top_k.to(tl.int64), unlimited, BLOCK, CHUNKS)
    if top_p < 1.0:
        _, _, mass, count = row_sums(row_ptr, V, temperature, best, cut, least, BLOCK, CHUNKS)
        wanted = share_of(top_p, mass)
        cut, _, _ = cut_at(row_ptr, V, temperature, best, count + 1, wanted, BLOCK, CHUNKS)
    least = least_mass(options_ptr, row)
    total, _, mass, _ = row_sums(row_ptr, V, temperature, best, cut, least, BLOCK, CHUNKS)
    token = forced
    if forced < 0:
        rest = tl.umulhi(drawn_bits(options_ptr, row), mass)
        token = _draw(row_ptr, V, temperature, best, cut, least, rest, BLOCK)
    x = tl.div_rn(tl.load(row_ptr + token), temperature)
    inside = (order_key(x, token) <= cut) & (mass_of(vexp(x - best)) >= least)
    return token, tl.where(inside, logprob_of(x, best, total), float("-inf"))


@triton.jit
def sample_kernel(logits_ptr, processed_ptr, options_ptr, out_ptr, V, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Results of a row from its logits [V] and the same after bias and penalties."""
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * V
    processed = processed_ptr + row.to(tl.int64) * V
    forced = tl.load(options_ptr + row * NUM_OPTIONS + FORCED)
    temperature = option_of(options_ptr, row, TEMPERATURE)
    positive = tl.where(temperature == 0.0, 1.0, temperature)
    everything = ~tl.zeros((), tl.uint64)
    zero = tl.zeros((), tl.uint64)
    best, broken = _row_max(logits, V, positive, BLOCK)
    total, weighted, _, _ = row_sums(logits, V, positive, best, everything, zero, BLOCK, CHUNKS)
    processed_best, processed_broken = _row_max(processed, V, positive, BLOCK)
    valid = (broken + processed_broken == 0) & (best > float("-inf")) & (processed_best > float("-inf"))
    result = out_ptr + row * NUM_RESULTS
    if valid:
        if temperature == 0.0:
            greedy = _first_equal(processed, V, processed_best, BLOCK)
            token = tl.where(forced < 0, greedy, forced)
            logprob = tl.where(token == greedy, 0.0, float("-inf"))
        else:
            token, logprob = _sample_at_temperature(
                processed, options_ptr, row, V, positive, processed_best, forced, BLOCK, CHUNKS
            )
        chosen = tl.load(logits + token)
        policy_logprob = logprob_of(tl.div_rn(chosen, positive), best, total)
        entropy = (tl.log(total) - weighted / total).to(tl.float32)
        one = tl.full((), 1.0, tl.float32)
        raw_best, _ = _row_max(logits, V, one, BLOCK)
        raw_total, _, _, _ = row_sums(logits, V, one, raw_best, everything, zero, BLOCK, CHUNKS)
        tl.store(result + TOKEN, token)
        tl.store(result + LOGPROB, logprob.to(tl.int32, bitcast=True))
        tl.store(result + POLICY_LOGPROB, policy_logprob.to(tl.int32, bitcast=True))
        tl.store(result + ENTROPY, entropy.to(tl.int32, bitcast=True))
        tl.store(result + RAW_LOGPROB, logprob_of(chosen, raw_best, raw_total).to(tl.int32, bitcast=True))
    else:
        tl.store(result + TOKEN, -1)
        for column in tl.static_range(1, 5):
            tl.store(result + column, 0x7FC00000)  # NaN


def sample(logits: Any, processed: Any, options: Any, out: Any) -> None:
    """Results [R, NUM_RESULTS] int32 of logits [R, V] float32 and the same after bias and penalties."""
    rows, vocab = logits.shape
    sample_kernel[(rows,)](
        logits, processed, options, out, vocab, BLOCK=VOCAB_BLOCK,
        CHUNKS=triton.next_power_of_2(triton.cdiv(vocab, VOCAB_BLOCK)), enable_fp_fusion=False,
    )  # fmt: skip
