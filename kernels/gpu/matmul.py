# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Matrix products x W^T on tensor cores: bfloat16 operands (or float32, without TensorFloat32), float32 sums.

Every output is summed over K in steps of 16, in sequence, whatever the tile: no split of K, so bits are a function of
the row alone. Weights keep their Hugging Face layout [outputs, inputs].
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.elementwise import vexp

_GROUP_M = 8


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column number of a program's tile: GROUP_M rows of tiles share their columns while these are in L2."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    inside = pid % (GROUP_M * columns)
    return first + inside % height, inside // height


@triton.jit
def load_block(ptr, rows, k, K, stride, EVEN_K: tl.constexpr):
    """Entries [rows, k] of a row-major matrix; zeros past K, which add nothing to a sum."""
    block = ptr + rows.to(tl.int64)[:, None] * stride + k[None, :]
    if EVEN_K:
        return tl.load(block)
    return tl.load(block, mask=(k < K)[None, :], other=0.0)


@triton.jit
def product(
    x_ptr, weight_ptr, rows, n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """x[rows] weight[n]^T, float32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_block(x_ptr, rows, k, K, K, EVEN_K)
        weight = load_block(weight_ptr, n, k, K, K, EVEN_K)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    return acc


@triton.jit
def swiglu_product(
    x_ptr, gate_ptr, up_ptr, rows, n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """silu(x gate^T) * (x up^T) of the rows, float32 [BLOCK_M, BLOCK_N]."""
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_block(x_ptr, rows, k, K, K, EVEN_K)
        gate = tl.dot(x, tl.trans(load_block(gate_ptr, n, k, K, K, EVEN_K)), gate, input_precision="ieee")
        up = tl.dot(x, tl.trans(load_block(up_ptr, n, k, K, K, EVEN_K)), up, input_precision="ieee")
    return tl.div_rn(gate, 1.0 + vexp(-gate)) * up


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, max_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, TILE_MAX: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = x[M, K] weight[N, K]^T + bias; with TILE_MAX also the largest entry of each row in each tile."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one: loads need no mask, and the results are not stored.
    acc = product(
        x_ptr, weight_ptr, tl.minimum(m, M - 1), tl.minimum(n, N - 1), K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    if TILE_MAX:
        largest = tl.max(tl.where((n < N)[None, :], acc, float("-inf")), axis=1)
        tl.store(max_ptr + m * tl.cdiv(N, BLOCK_N) + tile_n, largest, mask=m < M)


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, M, N, K,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = silu(x gate^T) * (x up^T), gate and up [N, K]."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = swiglu_product(
        x_ptr, gate_ptr, up_ptr, tl.minimum(m, M - 1), tl.minimum(n, N - 1), K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
    )
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


def linear(x, weight, bias, out, *, tile=None):
    """out [M, N] = x [M, K] weight [N, K]^T + bias [N] (or None), rounded once to the type of `out`.

    x and weight are of one type, bfloat16 or float32; bias is float32. `tile` overrides the table.
    """
    (rows, k), n = x.shape, weight.shape[0]
    tile = tile or tiles.choose(tiles.LINEAR, rows, n)
    _launch_linear(x, weight, bias, out, None, rows, n, k, tile)


def linear_with_tile_max(x, weight, out, tile_max, *, tile):
    """`linear` that also writes the largest output of every row in every column tile: [M, ceil(N / BLOCK_N)]."""
    (rows, k), n = x.shape, weight.shape[0]
    _launch_linear(x, weight, None, out, tile_max, rows, n, k, tile)


def _launch_linear(x, weight, bias, out, tile_max, rows, n, k, tile):
    grid = (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),)
    linear_kernel[grid](
        x, weight, x if bias is None else bias, out, out if tile_max is None else tile_max, rows, n, k,
        HAS_BIAS=bias is not None, TILE_MAX=tile_max is not None, EVEN_K=k % tile.BLOCK_K == 0, GROUP_M=_GROUP_M,
        enable_fp_fusion=False, **tile.options(),
    )  # fmt: skip


def swiglu(x, gate, up, out, *, tile=None):
    """out [M, F] = silu(x gate^T) * (x up^T), gate and up [F, K], rounded once to the type of `out`."""
    (rows, k), n = x.shape, gate.shape[0]
    tile = tile or tiles.choose(tiles.SWIGLU, rows, n)
    grid = (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),)
    swiglu_kernel[grid](
        x, gate, up, out, rows, n, k, EVEN_K=k % tile.BLOCK_K == 0, GROUP_M=_GROUP_M,
        enable_fp_fusion=False, **tile.options(),
    )  # fmt: skip
