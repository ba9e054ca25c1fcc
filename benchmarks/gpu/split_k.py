# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Products whose sum over K several programs share, and what stands around a vendor's product in our engine.

None of this is exact: a sum in parts has other bits. It is what exactness is compared with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu import matmul
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.tiles import Tile

_GROUP_M = 8
_BLOCK = 1024


@triton.jit(do_not_specialize=["M"])
def split_kernel(
    x, weight, partial_ptr, M, N, K, SEGMENT,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[part, M, N] = x[M, K] weight[N, K]^T over the inputs of a part, SEGMENT of them."""
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * SEGMENT, tl.minimum(part * SEGMENT + SEGMENT, K), BLOCK_K):
        a = matmul.load_block(x, tile_m * BLOCK_M, rows, start, K, BLOCK_K, EVEN_K, TMA)
        b = matmul.load_block(weight, tile_n * BLOCK_N, columns, start, K, BLOCK_K, EVEN_K, TMA)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    out = partial_ptr + (part.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def join_kernel(partial_ptr, out_ptr, size, PARTS: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over parts [PARTS, size], rounded; with SWIGLU, of gate and up in turn, half as many results."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial_ptr + part * size + i, mask=i < size, other=0.0).to(tl.float32)
    if SWIGLU:
        y = matmul.swiglu_of(tl.reshape(total, (1, BLOCK)), 1, BLOCK)
        j = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        y = tl.reshape(y, (BLOCK // 2,)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + j, y, mask=j < size // 2)
    else:
        tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def tile_max_kernel(x_ptr, max_ptr, N, NUM_TILES, TILE_N: tl.constexpr, TILES: tl.constexpr):
    """The largest entry of each row of x [M, N] in each TILE_N columns: [M, NUM_TILES]. TILES of a row a program."""
    row = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * N + column, mask=column < N, other=float("-inf"))
    tl.store(max_ptr + row * NUM_TILES + tile, tl.max(x, axis=1), mask=tile < NUM_TILES)


def split(x: Tensor, weight: Tensor, partial: Tensor, parts: int, tile: Tile) -> None:
    """partial (float32, at least [parts, M, N]) = the sums over parts of K of x [M, K] weight [N, K]^T."""
    (rows, k), n = x.shape, weight.shape[0]
    segment = triton.cdiv(triton.cdiv(k, parts), tile.BLOCK_K) * tile.BLOCK_K
    grid = (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N), parts)
    tma = matmul.serves_tma(tile, x, k)
    split_kernel[grid](
        matmul.operand(x, rows, k, tile.BLOCK_M, tile.BLOCK_K, tma),
        matmul.operand(weight, n, k, tile.BLOCK_N, tile.BLOCK_K, tma), partial, rows, n, k,
        segment, EVEN_K=k % tile.BLOCK_K == 0, TMA=tma, GROUP_M=_GROUP_M, **tile.options(),
    )  # fmt: skip


def join(partial: Tensor, out: Tensor, size: int, parts: int, *, swiglu: bool = False) -> None:
    """out [size] = the sum over parts of partial [parts, size], or its SwiGLU [size / 2] of gate and up in turn."""
    join_kernel[(triton.cdiv(size, _BLOCK),)](partial, out, size, PARTS=parts, SWIGLU=swiglu, BLOCK=_BLOCK)


def tile_max(x: Tensor, out: Tensor, tile_n: int) -> None:
    """out [M, tiles] = the largest entries of x [M, N] (float32) in each `tile_n` columns."""
    (rows, n), tiles = x.shape, out.shape[1]
    some = max(1, 4096 // tile_n)
    tile_max_kernel[(rows, triton.cdiv(tiles, some))](x, out, n, tiles, TILE_N=tile_n, TILES=some)
