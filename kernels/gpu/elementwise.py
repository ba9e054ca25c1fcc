# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Copies of rows, and the library's exp.

A program sees its own row only, so a row's bits cannot depend on the batch. Kernels are launched with
enable_fp_fusion=False: a multiply and an add are fused only where the source says fma (docs/numerics.md, rule 1).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

Tensor = Any  # paddle.Tensor, or anything else with shape, dtype and data_ptr()


@triton.jit
def _exp_near_zero(r):
    """e^r for |r| <= ln(2) / 2, by the polynomial of `vexp`."""
    p = tl.full(r.shape, 1.9875691500e-4, tl.float32)
    p = tl.fma(p, r, tl.full(r.shape, 1.3981999507e-3, tl.float32))
    p = tl.fma(p, r, tl.full(r.shape, 8.3334519073e-3, tl.float32))
    p = tl.fma(p, r, tl.full(r.shape, 4.1665795894e-2, tl.float32))
    p = tl.fma(p, r, tl.full(r.shape, 1.6666665459e-1, tl.float32))
    p = tl.fma(p, r, tl.full(r.shape, 5.0000001201e-1, tl.float32))
    return tl.fma(p, r * r, r) + 1.0


@triton.jit
def vexp(x):
    """e^x, the same operations in the same order as `vexp` of csrc/simd.h; 0 below -87.3, infinity above 88.72."""
    clamped = tl.minimum(tl.maximum(x, -87.3), 88.72)
    n = tl.fma(clamped, tl.full(x.shape, 1.44269504088896341, tl.float32), tl.full(x.shape, 12582912.0, tl.float32))
    n = n - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), clamped)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = _exp_near_zero(r)
    e = n.to(tl.int32)
    e1 = e >> 1
    e2 = e - e1
    y = p * ((e1 + 127) << 23).to(tl.float32, bitcast=True)
    y = y * ((e2 + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.3, 0.0, y)
    y = tl.where(x > 88.72, float("inf"), y)
    return tl.where(x == x, y, x)


@triton.jit
def vexp_to_one(x):
    """`vexp` of x <= 0 (or NaN) in fewer instructions, bit for bit.

    Nothing can overflow, one factor 2^n suffices, and its bits are shifted out of the sum that rounds to n.
    """
    log2_e = tl.full(x.shape, 1.44269504088896341, tl.float32)
    shifted = tl.fma(tl.maximum(x, -87.3), log2_e, tl.full(x.shape, 12582912.0, tl.float32))
    n = shifted - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), x)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    factor = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, _exp_near_zero(r) * factor)


@triton.jit
def gather_kernel(table_ptr, ids_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = table[ids[row]]. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids_ptr + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(table_ptr + source * WIDTH + column, mask=inside)
    tl.store(out_ptr + row * WIDTH + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def gather(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """out [R, E] = rows ids [R] of the table [N, E], in the type of `out`."""
    rows, width = out.shape
    gather_kernel[(rows,)](table, ids, out, WIDTH=width, BLOCK=triton.next_power_of_2(width))


@triton.jit
def embed_kernel(
    table_ptr, ids_ptr, rows_ptr, results_ptr, out_ptr, RESULT_COLUMNS, TOKEN, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row] = table[id], the id being ids[row] or, where rows[row] >= 0, the token of that row of the results."""
    row = tl.program_id(0).to(tl.int64)
    drawn = tl.load(rows_ptr + row)
    source = tl.load(ids_ptr + row)
    if drawn >= 0:
        # A row without a distribution gave -1; what it leads to is thrown away, but must not be read out of bounds.
        source = tl.maximum(tl.load(results_ptr + drawn * RESULT_COLUMNS + TOKEN), 0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(table_ptr + source.to(tl.int64) * WIDTH + column, mask=inside)
    tl.store(out_ptr + row * WIDTH + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def embed(table: Tensor, ids: Tensor, rows: Tensor, results: Tensor, token_column: int, out: Tensor) -> None:
    """out [T, E] = rows of the table [V, E]: of ids [T], or of the tokens of the results [R, columns] where rows [T]
    are not -1. All but table and out are int32.
    """
    tokens, width = out.shape
    embed_kernel[(tokens,)](
        table, ids, rows, results, out, results.shape[1], token_column,
        WIDTH=width, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
