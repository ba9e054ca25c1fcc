# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""RMSNorm, with or without a residual sum, and the per-head norms, rotary embedding and KV write in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.reductions import fold_sum
from zerokl.kernels.ops import AttentionSpec, KVPool


@triton.jit
def inverse_rms(squares, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(sum of BLOCK squares / WIDTH + eps), the sum folded in halves."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(fold_sum(squares, BLOCK), WIDTH * 1.0) + eps))


@triton.jit
def rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr
):
    """out = RMSNorm(x) * weight; with HAS_DELTA, x += delta first, in place. One program per row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row + column, x, mask=inside)
    scale = inverse_rms(x * x, eps, WIDTH, BLOCK)
    y = (x * scale) * tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def qkv_to_cache_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, positions_ptr, rope_ptr, slots_ptr, keys_ptr, values_ptr, query_ptr,
    first_block,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One program per (token, head of q, k and v). Queries go to `query`, keys and values to their slot of the pool.

    Pools are [layers * blocks, KV, BLOCK_SIZE, SIZE]; `first_block` is layer * blocks. A slot of -1 is not written.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, HALF_BLOCK)
    inside = i < HALF
    low, high = (2 * i, 2 * i + 1) if INTERLEAVED else (i, i + HALF)
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE
    a = tl.load(row + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + high, mask=inside, other=0.0).to(tl.float32)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    if HAS_NORM:  # noqa: SIM102  (known at compile time, the next is not)
        if not is_value:
            scale = inverse_rms(a * a + b * b, eps, SIZE, HALF_BLOCK)
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
        tl.store(out + low, a.to(query_ptr.dtype.element_ty), mask=inside)
        tl.store(out + high, b.to(query_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots_ptr + token)
        written = inside & (slot >= 0)
        block = first_block + (tl.maximum(slot, 0) // BLOCK_SIZE).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        at = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + tl.maximum(slot, 0) % BLOCK_SIZE) * SIZE
        out = keys_ptr + at
        if is_value:
            out = values_ptr + at
        tl.store(out + low, a.to(keys_ptr.dtype.element_ty), mask=written)
        tl.store(out + high, b.to(keys_ptr.dtype.element_ty), mask=written)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, *, delta: Tensor | None = None, num_warps: int = 4
) -> None:
    """out [T, E] = RMSNorm of x [T, E] times weight [E] (float32); with `delta` [T, E], x += delta first, in place."""
    rows, width = x.shape
    rms_norm_kernel[(rows,)](
        x, x if delta is None else delta, weight, out, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width),
        HAS_DELTA=delta is not None, enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip


def qkv_to_cache(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: Tensor, positions: Tensor, slots: Tensor,
    pool: KVPool[Tensor], layer: int, query: Tensor, spec: AttentionSpec,
) -> None:  # fmt: skip
    """Queries of qkv [T, (H + 2 KV) D] to query [T, H D], keys and values to the pool, normed and rotated.

    `pool.keys` and `pool.values` are [layers, blocks, KV, block size, D]; norms [D] float32 or None.
    """
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv_to_cache_kernel[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, rope if q_norm is None else q_norm, rope if k_norm is None else k_norm, spec.norm_eps,
        positions, rope, slots, pool.keys, pool.values, query, layer * pool.keys.shape[1],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF_BLOCK=triton.next_power_of_2(size // 2),
        BLOCK_SIZE=pool.block_size, INTERLEAVED=spec.rotary_layout == "interleaved", HAS_NORM=q_norm is not None,
        enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip
