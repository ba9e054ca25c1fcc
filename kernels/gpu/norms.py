# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""RMSNorm, with or without a residual sum, and the per-head norms, rotary embedding and KV write in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.reductions import fold_rows, fold_sum
from zerokl.kernels.ops import AttentionSpec, KVPool

_HEADS_BLOCK, _HEADS_WARPS = 8, 4


@triton.jit
def inverse_rms(sums, eps, WIDTH: tl.constexpr):
    """1 / sqrt(sum of squares / WIDTH + eps)."""
    one = tl.full(sums.shape, 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(tl.div_rn(sums, one * WIDTH) + eps))


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
    scale = inverse_rms(fold_sum(x * x, BLOCK), eps, WIDTH)
    y = (x * scale) * tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def qkv_to_cache_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, positions_ptr, rope_ptr, slots_ptr, keys_ptr, values_ptr, query_ptr,
    first_block,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One program per (token, some heads of q, k and v). Queries go to `query`, keys and values to their slot.

    Pools are [layers * blocks, KV, BLOCK_SIZE, SIZE]; `first_block` is layer * blocks. A slot of -1 is not written.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, HALF_BLOCK)[None, :]
    low, high = (2 * i, 2 * i + 1) if INTERLEAVED else (i, i + HALF)
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * SIZE
    here = (head < HEADS + 2 * KV_HEADS)[:, None] & (i < HALF)
    a = tl.load(row + low, mask=here, other=0.0).to(tl.float32)
    b = tl.load(row + high, mask=here, other=0.0).to(tl.float32)
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    x = a
    y = b
    if HAS_NORM:
        scale = inverse_rms(fold_rows(a * a + b * b, HEADS_BLOCK, HALF_BLOCK), eps, SIZE)[:, None]
        weight_ptr = tl.where(is_query, q_norm_ptr, k_norm_ptr)
        x = (a * scale) * tl.load(weight_ptr + low, mask=here, other=0.0)
        y = (b * scale) * tl.load(weight_ptr + high, mask=here, other=0.0)
    table = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * SIZE
    cos = tl.broadcast_to(tl.load(table + i, mask=i < HALF, other=0.0), x.shape)
    sin = tl.broadcast_to(tl.load(table + HALF + i, mask=i < HALF, other=0.0), x.shape)
    a = tl.where(is_value, a, tl.fma(-y, sin, x * cos)).to(query_ptr.dtype.element_ty)
    b = tl.where(is_value, b, tl.fma(x, sin, y * cos)).to(query_ptr.dtype.element_ty)
    out = query_ptr + (token * HEADS + head)[:, None] * SIZE
    tl.store(out + low, a, mask=here & is_query)
    tl.store(out + high, b, mask=here & is_query)
    slot = tl.load(slots_ptr + token)
    written = here & (slot >= 0) & (is_query == 0)
    block = first_block + (tl.maximum(slot, 0) // BLOCK_SIZE).to(tl.int64)
    kv_head = tl.maximum(head - HEADS, 0) % KV_HEADS
    at = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + tl.maximum(slot, 0) % BLOCK_SIZE)[:, None] * SIZE
    out = tl.where(is_value, values_ptr + at, keys_ptr + at)
    tl.store(out + low, a, mask=written)
    tl.store(out + high, b, mask=written)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, *, delta: Tensor | None = None, num_warps: int | None = None
) -> None:
    """out [T, E] = RMSNorm of x [T, E] times weight [E] (float32); with `delta` [T, E], x += delta first, in place."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](
        x, x if delta is None else delta, weight, out, eps, WIDTH=width, BLOCK=block,
        HAS_DELTA=delta is not None, enable_fp_fusion=False, num_warps=num_warps or max(1, block // 4096),
    )  # fmt: skip


def qkv_to_cache(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: Tensor, positions: Tensor, slots: Tensor,
    pool: KVPool[Tensor], layer: int, query: Tensor, spec: AttentionSpec,
) -> None:  # fmt: skip
    """Queries of qkv [T, (H + 2 KV) D] to query [T, H D], keys and values to the pool, normed and rotated.

    `pool.keys` and `pool.values` are [layers, blocks, KV, block size, D]; norms [D] float32 or None.
    """
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv_to_cache_kernel[(qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, _HEADS_BLOCK))](
        qkv, rope if q_norm is None else q_norm, rope if k_norm is None else k_norm, spec.norm_eps,
        positions, rope, slots, pool.keys, pool.values, query, layer * pool.keys.shape[1],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF_BLOCK=triton.next_power_of_2(size // 2),
        BLOCK_SIZE=pool.block_size, HEADS_BLOCK=_HEADS_BLOCK, INTERLEAVED=spec.rotary_layout == "interleaved",
        HAS_NORM=q_norm is not None, enable_fp_fusion=False, num_warps=_HEADS_WARPS,
    )  # fmt: skip
