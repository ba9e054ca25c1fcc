# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Triton matrix products x W^T in float32, K in sequence, one tile shape: an output depends on its row of x alone.

Weights stay in their Hugging Face layout [outputs, inputs]. Plain FMA, no TensorFloat32 (`input_precision="ieee"`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import vexp

BLOCK_M = 16
BLOCK_N = 32
BLOCK_K = 32


@triton.jit
def _load_rows(ptr, rows, k, num_rows, K: tl.constexpr):
    inside = (rows < num_rows)[:, None] & (k < K)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = x[M, K] weight[N, K]^T + bias. One program per tile."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, m, k, M, K)
        weight = _load_rows(weight_ptr, n, k, N, K)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], acc, mask=inside)


@triton.jit
def swiglu_linear_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, M, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = silu(x gate^T) * (x up^T), gate and up [N, K]. One program per tile."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, m, k, M, K)
        gate = tl.dot(x, tl.trans(_load_rows(gate_ptr, n, k, N, K)), gate, input_precision="ieee")
        up = tl.dot(x, tl.trans(_load_rows(up_ptr, n, k, N, K)), up, input_precision="ieee")
    out = tl.div_rn(gate, 1.0 + vexp(-gate)) * up
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], out, mask=inside)
