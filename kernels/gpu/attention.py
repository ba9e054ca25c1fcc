# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Triton kernels for per-head norms, rotary embedding, the KV write, and paged causal attention.

Attention runs one program per (token, query head) over fixed splits of KV_SPLIT keys merged in position order, so
prefill, chunked prefill and decode are the same computation (docs/numerics.md, rule 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import vexp


@triton.jit
def qkv_to_cache_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, positions_ptr, rope_ptr, slots_ptr, keys_ptr, values_ptr, query_ptr,
    first_block,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One program per (token, head of q, k and v). Queries go to `query`, keys and values to their slot of the pool.

    `first_block` is layer * num_blocks. A token with slot -1 writes no key and no value.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, HALF_BLOCK)
    inside = i < HALF
    if INTERLEAVED:
        low = 2 * i
        high = 2 * i + 1
    else:
        low = i
        high = i + HALF
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE
    a = tl.load(row + low, mask=inside, other=0.0)
    b = tl.load(row + high, mask=inside, other=0.0)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    if HAS_NORM:  # noqa: SIM102  (known at compile time, the next is not)
        if not is_value:
            scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(a * a) + tl.sum(b * b), SIZE * 1.0) + eps))
            weight_ptr = q_norm_ptr
            if not is_query:
                weight_ptr = k_norm_ptr
            a = (a * scale) * tl.load(weight_ptr + low, mask=inside, other=0.0)
            b = (b * scale) * tl.load(weight_ptr + high, mask=inside, other=0.0)
    if not is_value:
        table = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * SIZE
        cos = tl.load(table + i, mask=inside, other=0.0)
        sin = tl.load(table + HALF + i, mask=inside, other=0.0)
        turned = tl.fma(-b, sin, a * cos)
        b = tl.fma(a, sin, b * cos)
        a = turned
    if is_query:
        out = query_ptr + (token * HEADS + head) * SIZE
        tl.store(out + low, a, mask=inside)
        tl.store(out + high, b, mask=inside)
    else:
        slot = tl.load(slots_ptr + token)
        written = inside & (slot >= 0)
        block = first_block + (tl.maximum(slot, 0) // BLOCK_SIZE).to(tl.int64)
        offset = tl.maximum(slot, 0) % BLOCK_SIZE
        if is_value:
            out = values_ptr + ((block * KV_HEADS + head - HEADS - KV_HEADS) * BLOCK_SIZE + offset) * SIZE
            tl.store(out + low, a, mask=written)
            tl.store(out + high, b, mask=written)
        else:
            out = keys_ptr + (block * KV_HEADS + head - HEADS) * SIZE * BLOCK_SIZE + offset
            tl.store(out + low * BLOCK_SIZE, a, mask=written)
            tl.store(out + high * BLOCK_SIZE, b, mask=written)


@triton.jit
def attention_kernel(
    query_ptr, keys_ptr, values_ptr, tables_ptr, positions_ptr, sequences_ptr, out_ptr, scale, first_block, max_blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[token, head] = softmax(scale q k^T) v over keys 0 .. position. A token of no sequence (-1) gets zeros."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    d = tl.arange(0, SIZE_BLOCK)
    inside = d < SIZE
    query = tl.load(query_ptr + (token * HEADS + head) * SIZE + d, mask=inside, other=0.0)
    sequence = tl.load(sequences_ptr + token)
    length = tl.load(positions_ptr + token) + 1
    if sequence < 0:
        length = 0
    table = tables_ptr + tl.maximum(sequence, 0).to(tl.int64) * max_blocks
    m = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((SIZE_BLOCK,), tl.float32)
    for start in range(0, length, SPLIT):
        j = start + tl.arange(0, SPLIT)
        seen = j < length
        block = first_block + tl.load(table + j // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        row = block * KV_HEADS + kv_head
        offset = j % BLOCK_SIZE
        mask = seen[:, None] & inside[None, :]
        keys = keys_ptr + (row[:, None] * SIZE + d[None, :]) * BLOCK_SIZE + offset[:, None]
        score = tl.sum(query[None, :] * tl.load(keys, mask=mask, other=0.0), axis=1) * scale
        score = tl.where(seen, score, float("-inf"))
        split_max = tl.max(score, axis=0)
        e = tl.where(seen, vexp(score - split_max), 0.0)
        values = values_ptr + (row * BLOCK_SIZE + offset)[:, None] * SIZE + d[None, :]
        split_acc = tl.sum(e[:, None] * tl.load(values, mask=mask, other=0.0), axis=0)
        new_max = tl.maximum(m, split_max)
        old_weight = vexp(m - new_max)
        new_weight = vexp(split_max - new_max)
        acc = tl.fma(split_acc, tl.broadcast_to(new_weight, acc.shape), acc * old_weight)
        total = tl.fma(tl.sum(e, axis=0), new_weight, total * old_weight)
        m = new_max
    out = tl.where(total > 0.0, tl.div_rn(acc, total), 0.0)
    tl.store(out_ptr + (token * HEADS + head) * SIZE + d, out, mask=inside)
