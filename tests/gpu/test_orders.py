"""The two claims that GPU numerics rest on: neither tiles nor warps nor the number of rows change a bit.

Matrix products with bfloat16 operands sum K in steps of 16 in sequence; attention over fixed splits of keys, its row
sums by products with ones, is the same for every tile, for decode and for prefill. They are claims about tensor cores,
so they need a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest

rig.require_device()
if rig.INTERPRETED:
    pytest.skip("the interpreter has no tensor cores", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from zerokl.kernels.gpu import matmul, paged_attention, tiles  # noqa: E402
from zerokl.kernels.gpu.reductions import row_sums_by_dot  # noqa: E402
from zerokl.kernels.gpu.tiles import Tile  # noqa: E402

pytestmark = pytest.mark.gpu

REFERENCE = Tile(16, 16, 16, 1, 1)  # one warp, one step of 16 at a time: the order itself
IN_TABLES = {tile for table in (tiles.LINEAR, tiles.SWIGLU, tiles.LM_HEAD, tiles.EXPERTS) for _, _, tile in table}
PERSISTENT = sorted((tile for tile in IN_TABLES if tile.persistent), key=str)
TILES = sorted(
    IN_TABLES | {Tile(16, 64, 64, 1, 4), Tile(16, 128, 64, 2, 3), Tile(64, 64, 16, 4, 3), Tile(64, 128, 32, 8, 4)},
    key=str,
)
# Without tensor cores every step holds whole tiles in registers: smaller ones.
FLOAT32_TILES = [Tile(16, 32, 32, 4, 2), Tile(32, 32, 16, 4, 2), Tile(64, 64, 16, 8, 2), Tile(16, 16, 64, 2, 1)]


def differing(a: Any, b: Any) -> int:
    """Values whose bits differ."""
    a, b = rig.get(a), rig.get(b)
    assert not np.isnan(a).any() and not np.isnan(b).any()
    return int((a.view(np.uint32) != b.view(np.uint32)).sum())


def product(x: Any, w: Any, tile: Tile) -> Any:
    out = rig.empty(x.shape[0], w.shape[0], dtype="float32")
    matmul.linear(x, w, None, out, tile=tile)
    return out


@pytest.mark.parametrize(("n", "k"), [(512, 128), (512, 1024), (256, 3072), (256, 4096), (256, 14336)])
def test_matrix_products_have_one_order(n: int, k: int) -> None:
    x, w = rig.put(rig.normal(1, 384, k, scale=3.0)), rig.put(rig.normal(2, n, k))
    expected = product(x, w, REFERENCE)
    exact = rig.get(x).astype(np.float64) @ rig.get(w).astype(np.float64).T
    # Tensor cores cut off what they add instead of rounding it, so the error grows with K.
    assert rig.relative_error(rig.get(expected), exact) < 2e-9 * k + 1e-6
    for tile in TILES:
        assert differing(product(x, w, tile), expected) == 0, tile


@pytest.mark.parametrize("tile", PERSISTENT, ids=str)
def test_programs_that_take_several_tiles_have_the_same_order(tile: Tile) -> None:
    rows, n, k = 2100, 4360, 1032  # 18 times 17 of the largest tiles, the last ones cut off
    x, w = rig.put(rig.normal(1, rows, k, scale=3.0)), rig.put(rig.normal(2, n, k))
    other = Tile(64, 64, 64, 4, 4)
    outs = [rig.empty(rows, n) for _ in range(2)]
    for out, some in zip(outs, (tile, other), strict=True):
        matmul.linear(x, w, None, out, tile=some)
    assert differing(*outs) == 0
    outs = [product(x, w, some) for some in (tile, other)]  # float32: a program for each tile
    assert differing(*outs) == 0
    outs = [rig.empty(rows, n // 2) for _ in range(2)]
    for out, some in zip(outs, (tile, other), strict=True):
        matmul.swiglu(x, w, out, tile=some)
    assert differing(*outs) == 0


def test_a_split_of_k_is_another_order() -> None:
    """The control: the same product as two sums over half of K each."""
    x, w = rig.normal(1, 64, 2048, scale=3.0), rig.normal(2, 256, 2048)
    whole = rig.get(product(rig.put(x), rig.put(w), TILES[0]))
    halves = [
        rig.get(product(rig.put(x[:, part]), rig.put(w[:, part]), TILES[0]))
        for part in (slice(0, 1024), slice(1024, 2048))
    ]
    assert (halves[0] + halves[1] != whole).mean() > 0.1


@pytest.mark.parametrize("k", [128, 2048])
def test_float32_products_are_single_fused_steps_in_sequence(k: int) -> None:
    x, w = rig.normal(3, 48, k), rig.normal(4, 96, k) + np.float32(1e-4)
    w = w.astype(np.float32)
    on_device = rig.put(x, "float32"), rig.put(w, "float32")
    expected = product(*on_device, FLOAT32_TILES[0])
    for tile in FLOAT32_TILES[1:]:
        assert differing(product(*on_device, tile), expected) == 0, tile
    # fma in sequence: float64 holds the product exactly, and the sum nearly always rounds as the fused one does.
    acc = np.zeros((48, 96), np.float32)
    for i in range(k):
        acc = (acc + x[:, i, None].astype(np.float64) * w[None, :, i]).astype(np.float32)
    assert (rig.get(expected) != acc).mean() < 1e-3


SPEC = SimpleNamespace(num_heads=8, num_kv_heads=2, head_dim=128, scale=128**-0.5)
LENGTH = 700
ATTENTION_TILES = [Tile(16, 0, 0, w, s) for w, s in ((1, 1), (2, 2), (4, 3))] + [
    Tile(32, 0, 0, 4, 2), Tile(64, 0, 0, 4, 2), Tile(64, 0, 0, 8, 1), Tile(128, 0, 0, 8, 2),
]  # fmt: skip


class Attention:
    """One sequence of random queries, keys and values in a paged pool."""

    def __init__(self, block_size: int = 16) -> None:
        blocks = -(-LENGTH // block_size)
        self.query = rig.put(rig.normal(5, LENGTH, SPEC.num_heads * SPEC.head_dim, scale=2.0))
        shape = (1, blocks, block_size, SPEC.num_kv_heads, SPEC.head_dim)
        flat = (blocks * block_size, SPEC.num_kv_heads, SPEC.head_dim)
        order = np.random.default_rng(block_size).permutation(blocks)
        pools = []
        for seed in (6, 7):
            by_position = np.full(flat, np.nan, np.float32)
            by_position[:LENGTH] = rig.normal(seed, LENGTH, *flat[1:])
            pool = np.empty(shape, np.float32)
            pool[0, order] = by_position.reshape(shape[1:])
            pools.append(rig.put(np.ascontiguousarray(pool.transpose(0, 1, 3, 2, 4))))
        self.pool = rig.Pool(*pools, block_size)
        self.table = rig.put(order.astype(np.int32)[None])

    def run(self, tile: Tile, positions: range | None = None, partial: bool = False, split: int = 64) -> Any:
        """Outputs of all positions in tiles of many tokens, or of some positions on their own."""
        tokens = paged_attention.tokens_per_tile(tile, SPEC)
        starts = range(0, LENGTH, tokens) if positions is None else positions
        counts = [min(tokens, LENGTH - at) if positions is None else 1 for at in starts]
        tile_list = np.array([(0, at, n, at, 0) for at, n in zip(starts, counts, strict=True)], np.int32)
        out = rig.empty(LENGTH, SPEC.num_heads * SPEC.head_dim, dtype="float32")
        if partial:
            tile_list = tile_list[::-1].copy()  # states lie where their tile does, not their row
        shape = (len(tile_list), SPEC.num_heads, -(-LENGTH // split))
        buffers = rig.empty(*shape, SPEC.head_dim, dtype="float32"), rig.empty(*shape, 2, dtype="float32")
        paged_attention.attention(
            self.query, self.pool, 0, self.table, rig.put(tile_list), out, SPEC,
            partial=buffers if partial else None, tile=tile, split=split,
        )  # fmt: skip
        return out


@pytest.mark.parametrize("split", [64, 128])
def test_attention_has_one_order(split: int) -> None:
    expected = Attention().run(ATTENTION_TILES[0], split=split)
    for tile in ATTENTION_TILES[1:]:
        assert differing(Attention(32).run(tile, split=split), expected) == 0, tile


def test_decode_has_the_bits_of_prefill() -> None:
    case, positions = Attention(), range(0, LENGTH, 1)
    expected = case.run(ATTENTION_TILES[-1])
    for tile in ATTENTION_TILES[:4]:
        assert differing(case.run(tile, positions), expected) == 0, tile
        assert differing(case.run(tile, positions, partial=True), expected) == 0, tile


def test_another_split_of_the_keys_is_another_order() -> None:
    """The control."""
    case = Attention()
    a, b = (rig.get(case.run(ATTENTION_TILES[0], split=split)) for split in (64, 128))
    assert (a != b).mean() > 0.1


@triton.jit
def row_sums_kernel(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr, BY_DOT: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, N)
    # A product, so that x has the layout of attention weights, and sums that have to be rounded.
    x = tl.dot(tl.load(x_ptr + i[:, None] * N + j[None, :]), tl.load(y_ptr + j[:, None] * N + j[None, :]))
    if BY_DOT:
        tl.store(out_ptr + i, row_sums_by_dot(x.to(tl.bfloat16), N))
    else:
        tl.store(out_ptr + i, tl.sum(x, axis=1))


@pytest.mark.parametrize("by_dot", [True, False])
def test_row_sums_by_products_do_not_depend_on_warps_and_plain_sums_do(by_dot: bool) -> None:
    """The control is `tl.sum`: its order is that of the threads that share a row."""
    x, y = rig.put(rig.normal(8, 128, 128)), rig.put(rig.normal(9, 128, 128))
    results = []
    for warps in (1, 2, 4, 8):
        out = rig.empty(128, dtype="float32")
        row_sums_kernel[(1,)](x, y, out, ROWS=128, N=128, BY_DOT=by_dot, num_warps=warps)
        results.append(rig.get(out))
    assert all(np.array_equal(results[0], sums) for sums in results) == by_dot
