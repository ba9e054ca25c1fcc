# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Matrix products x W^T on tensor cores: bfloat16 operands (or float32, without TensorFloat32), float32 sums.

Every output is summed over K in steps of 16, in sequence, whatever the tile: no split of K, so bits are a function of
the row alone. Weights keep their Hugging Face layout [outputs, inputs].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.tiles import Tile

_GROUP_M = 8
_SIZES = {"bfloat16": 2, "float32": 4}


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column number of a program's tile: GROUP_M rows of tiles share their columns while these are in L2."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    inside = pid % (GROUP_M * columns)
    return first + inside % height, inside // height


@triton.jit
def load_block(matrix, first, rows, start, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr):
    """Inputs start .. start + BLOCK_K - 1 of some rows of a row-major matrix; zeros past K, which add nothing to a sum.

    With TMA `matrix` is a descriptor and the rows are those from `first` on, zeros past the last; otherwise a pointer
    and the rows are `rows`.
    """
    if TMA:
        block = matrix.load([first, start])
    else:
        k = start + tl.arange(0, BLOCK_K)
        at = matrix + rows.to(tl.int64)[:, None] * K + k[None, :]
        block = tl.load(at) if EVEN_K else tl.load(at, mask=(k < K)[None, :], other=0.0)
    return block


@triton.jit
def product(
    x, weight, m, rows, n, columns, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[rows] weight[columns]^T, float32 [BLOCK_M, BLOCK_N]; m and n are the first row and column."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = load_block(x, m, rows, start, K, BLOCK_K, EVEN_K, X_TMA)
        b = load_block(weight, n, columns, start, K, BLOCK_K, EVEN_K, TMA)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def swiglu_of(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """silu(gate) * up [BLOCK_M, BLOCK_N / 2] of products whose columns are gate and up in turn.

    2^x and the quotient are the hardware's: the library's own exp and a rounded division take longer than the products.
    """
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    return gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up


@triton.jit
def linear_tile(
    number, x, weight, bias_ptr, out_ptr, max_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, TILE_MAX: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile `number` of `linear_kernel`."""
    tile_m, tile_n = tile_of(number, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one: loads need no mask, and the results are not stored.
    acc = product(
        x, weight, tile_m * BLOCK_M, tl.minimum(m, M - 1), tile_n * BLOCK_N, tl.minimum(n, N - 1), K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, TMA,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    if TILE_MAX:
        largest = tl.max(tl.where((n < N)[None, :], acc, float("-inf")), axis=1)
        tl.store(max_ptr + m * tl.cdiv(N, BLOCK_N) + tile_n, largest, mask=m < M)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias_ptr, out_ptr, max_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, TILE_MAX: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = x[M, K] weight[N, K]^T + bias; with TILE_MAX also the largest entry of each row in each tile.

    A program computes one tile; with PERSISTENT every so many tiles one, in one loop with the loads.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            linear_tile(
                number, x, weight, bias_ptr, out_ptr, max_ptr, M, N, K,
                HAS_BIAS, TILE_MAX, EVEN_K, TMA, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        linear_tile(
            tl.program_id(0), x, weight, bias_ptr, out_ptr, max_ptr, M, N, K,
            HAS_BIAS, TILE_MAX, EVEN_K, TMA, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def swiglu_tile(
    number, x, weight, out_ptr, M, N, K,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile `number` of `swiglu_kernel`."""
    tile_m, tile_n = tile_of(number, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product(
        x, weight, tile_m * BLOCK_M, tl.minimum(m, M - 1), tile_n * BLOCK_N, tl.minimum(n, N - 1), K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, TMA,
    )  # fmt: skip
    y = swiglu_of(acc, BLOCK_M, BLOCK_N).to(out_ptr.dtype.element_ty)
    f = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    inside = (m < M)[:, None] & (f < N // 2)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * (N // 2) + f[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(
    x, weight, out_ptr, M, N, K,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N / 2] = silu(x gate^T) * (x up^T), the rows of weight [N, K] being those of gate and up in turn.

    PERSISTENT is that of `linear_kernel`.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            swiglu_tile(number, x, weight, out_ptr, M, N, K, EVEN_K, TMA, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        swiglu_tile(tl.program_id(0), x, weight, out_ptr, M, N, K, EVEN_K, TMA, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, tile: Tile | None = None) -> None:
    """out [M, N] = x [M, K] weight [N, K]^T + bias [N] (or None), rounded once to the type of `out`.

    x and weight are of one type, bfloat16 or float32; bias is float32. `tile` overrides the table.
    """
    (rows, k), n = x.shape, weight.shape[0]
    tile = tile or tiles.choose(tiles.LINEAR, rows, n, dtype_of(x))
    _launch_linear(x, weight, bias, out, None, rows, n, k, tile)


def linear_with_tile_max(x: Tensor, weight: Tensor, out: Tensor, tile_max: Tensor, *, tile: Tile) -> None:
    """`linear` that also writes the largest output of every row in every column tile: [M, ceil(N / BLOCK_N)]."""
    (rows, k), n = x.shape, weight.shape[0]
    _launch_linear(x, weight, None, out, tile_max, rows, n, k, tile)


def _launch_linear(x, weight, bias, out, tile_max, rows, n, k, tile):
    tma = serves_tma(tile, x, k)
    persistent = tma and tile.persistent and dtype_of(out) != "float32"
    linear_kernel[_grid(tile, rows, n, persistent)](
        operand(x, rows, k, tile.BLOCK_M, tile.BLOCK_K, tma), operand(weight, n, k, tile.BLOCK_N, tile.BLOCK_K, tma),
        out if bias is None else bias, out, out if tile_max is None else tile_max, rows, n, k,
        HAS_BIAS=bias is not None, TILE_MAX=tile_max is not None, EVEN_K=k % tile.BLOCK_K == 0, TMA=tma,
        GROUP_M=_GROUP_M, PERSISTENT=persistent, enable_fp_fusion=False, **tile.options(),
    )  # fmt: skip


def swiglu(x: Tensor, gate_up: Tensor, out: Tensor, *, tile: Tile | None = None) -> None:
    """out [M, F] = silu(x gate^T) * (x up^T), rounded once to the type of `out`.

    gate_up [2 F, K] holds the rows of gate and up in turn: both sums of an output are neighbours in one tile.
    """
    (rows, k), n = x.shape, gate_up.shape[0]
    tile = tile or tiles.choose(tiles.SWIGLU, rows, n, dtype_of(x))
    tma = serves_tma(tile, x, k)
    persistent = tma and tile.persistent
    swiglu_kernel[_grid(tile, rows, n, persistent)](
        operand(x, rows, k, tile.BLOCK_M, tile.BLOCK_K, tma), operand(gate_up, n, k, tile.BLOCK_N, tile.BLOCK_K, tma),
        out, rows, n, k, EVEN_K=k % tile.BLOCK_K == 0, TMA=tma, GROUP_M=_GROUP_M, PERSISTENT=persistent,
        enable_fp_fusion=False, **tile.options(),
    )  # fmt: skip


def _grid(tile: Tile, rows: int, n: int, persistent: bool) -> tuple[int]:
    """Programs for an output of [rows, n]."""
    count = triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N)
    return (min(count, _multiprocessors()) if persistent else count,)


@cache
def _multiprocessors() -> int:
    """Of the GPU that this process computes on."""
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return int(properties["multiprocessor_count"])


def dtype_of(tensor: Tensor) -> str:
    """The name of a tensor's type: "bfloat16", "float32"."""
    return str(tensor.dtype).rpartition(".")[2]


class _Dtype(str):
    """A type's name with its size, as Triton's descriptors ask for it; Paddle's types have no size."""

    __slots__ = ("itemsize",)


class _Base:
    """A tensor under a descriptor: everything but the type is the tensor's."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.dtype = _Dtype(dtype_of(tensor))
        self.dtype.itemsize = _SIZES[self.dtype]

    def __getattr__(self, name):
        return getattr(self._tensor, name)


def serves_tma(tile: Tile, x: Tensor, k: int) -> bool:
    """Whether `tile` wants the bulk copy engine and rows of x [M, k] start at multiples of 16 bytes, as it needs."""
    return tile.tma and k * _SIZES[dtype_of(x)] % 16 == 0


def operand(matrix: Tensor, rows: int, k: int, block_rows: int, block_k: int, tma: bool) -> Any:
    """What a kernel takes for a row-major [rows, k] matrix: the tensor, or its descriptor for blocks of that shape."""
    return TensorDescriptor(_Base(matrix), [rows, k], [k, 1], [block_rows, block_k]) if tma else matrix
