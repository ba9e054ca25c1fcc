# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Sums whose order is stated in the source, not chosen by the compiler's layout of a row over threads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_sum(x, N: tl.constexpr):
    """Sum of [N] values, N a power of two, folded in halves: i with i + N/2, then + N/4, and so on.

    Each step adds two numbers, which has one result in either order, so the bits are the same for every number of
    warps and every layout.
    """
    for step in tl.static_range(20):  # N up to 2^20
        if (N >> step) > 1:
            x = tl.sum(tl.reshape(x, (2, N >> (step + 1))), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def fold_rows(x, M: tl.constexpr, N: tl.constexpr):
    """`fold_sum` of each row of [M, N]."""
    for step in tl.static_range(20):
        if (N >> step) > 1:
            x = tl.sum(tl.reshape(x, (M, 2, N >> (step + 1))), axis=1)
    return tl.sum(x, axis=1)


@triton.jit
def row_sums_by_dot(x, N: tl.constexpr):
    """Sums [M] in float32 of the rows of x [M, N], as a matrix product with ones: the order of `tl.dot`.

    A plain `tl.sum` over an axis that several warps share has another order for every number of warps.
    """
    ones = tl.full((N, 16), 1.0, x.dtype)
    sums = tl.dot(x, ones, input_precision="ieee")
    first = (tl.arange(0, 16) == 0)[None, :]
    return tl.sum(tl.where(first, sums, 0.0), axis=1)
