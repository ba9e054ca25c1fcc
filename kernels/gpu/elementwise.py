# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Triton kernels that handle one row per program, and the library's exp.

A program sees its own row only, so a row's bits cannot depend on the batch. Kernels are launched with
enable_fp_fusion=False: a multiply and an add are fused only where the source says fma (docs/numerics.md, rule 1).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vexp(x):
    """e^x, the same operations in the same order as `vexp` of csrc/simd.h; 0 below -87.3, infinity above 88.72."""
    clamped = tl.minimum(tl.maximum(x, -87.3), 88.72)
    n = tl.fma(clamped, tl.full(x.shape, 1.44269504088896341, tl.float32), tl.full(x.shape, 12582912.0, tl.float32))
    n = n - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), clamped)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = tl.full(x.shape, 1.9875691500e-4, tl.float32)
    p = tl.fma(p, r, tl.full(x.shape, 1.3981999507e-3, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 8.3334519073e-3, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 4.1665795894e-2, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.6666665459e-1, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 5.0000001201e-1, tl.float32))
    p = tl.fma(p, r * r, r) + 1.0
    e = n.to(tl.int32)
    e1 = e >> 1
    e2 = e - e1
    y = p * ((e1 + 127) << 23).to(tl.float32, bitcast=True)
    y = y * ((e2 + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.3, 0.0, y)
    y = tl.where(x > 88.72, float("inf"), y)
    return tl.where(x == x, y, x)


@triton.jit
def embedding_kernel(ids_ptr, table_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = table[ids[row]]; also row gathering. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids_ptr + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(table_ptr + source * WIDTH + column, mask=inside)
    tl.store(out_ptr + row * WIDTH + column, x, mask=inside)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = x / sqrt(mean(x^2) + eps) * weight. One program per row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x), WIDTH * 1.0) + eps))
    weight = tl.load(weight_ptr + column, mask=inside)
    tl.store(out_ptr + row + column, (x * scale) * weight, mask=inside)


@triton.jit
def add_rms_norm_kernel(residual_ptr, delta_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """residual += delta, in place; out = its RMSNorm. One program per row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(residual_ptr + row + column, mask=inside, other=0.0)
    x += tl.load(delta_ptr + row + column, mask=inside, other=0.0)
    tl.store(residual_ptr + row + column, x, mask=inside)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x), WIDTH * 1.0) + eps))
    weight = tl.load(weight_ptr + column, mask=inside)
    tl.store(out_ptr + row + column, (x * scale) * weight, mask=inside)
