"""Shared prefixes read once: the bits of every sequence walking its own keys, for any group and any tile.

Under TRITON_INTERPRET=1 everything runs on the CPU in float32: indexing and formulas, no claims about bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()

from zerokl.kernels.gpu import paged_attention, tiles  # noqa: E402
from zerokl.kernels.gpu.attention_tiles import SPLIT, attention_tiles, share_prefixes  # noqa: E402
from zerokl.kernels.gpu.tiles import Tile  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCK = 16
# (keys of the prompt, own keys of each sequence): prompts that end inside a split, groups of one and of more
# than a tile has members.
GROUPS = [
    (256, [1, 70, 128, 3, 64, 200, 9, 33]), (200, [5, 90, 1]), (64, [7]), (130, [2] * 11), (640, [30, 1]),
    (100, [100, 120]),
]  # fmt: skip
if rig.INTERPRETED:
    GROUPS = [(128, [1, 70, 64]), (90, [5, 40]), (64, [7]), (70, [2] * 9), (80, [50, 60])]
SHAPES = [(16, 8, 128), (32, 8, 128), (4, 4, 64), (12, 2, 24)]  # heads, key heads, head size


def spec_of(heads: int, kv_heads: int, size: int) -> Any:
    return SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=size**-0.5)


@dataclass(slots=True)
class Step:
    """One decode token for each sequence of GROUPS, shuffled, over a paged pool of random keys and values."""

    spec: Any
    query: Any
    pool: rig.Pool
    lengths: NDArray[np.int32]
    tables: NDArray[np.int32]

    @classmethod
    def random(cls, shape: tuple[int, int, int]) -> Step:
        spec = spec_of(*shape)
        counts = [sum(-(-(prompt % BLOCK + own) // BLOCK) for own in owns) + prompt // BLOCK for prompt, owns in GROUPS]
        fresh = iter(np.random.default_rng(1).permutation(sum(counts)).tolist())
        tables, lengths = [], []
        for prompt, owns in GROUPS:
            shared = [next(fresh) for _ in range(prompt // BLOCK)]
            for own in owns:
                lengths.append(prompt + own)
                tables.append(shared + [next(fresh) for _ in range(-(-(prompt + own) // BLOCK) - len(shared))])
        order = np.random.default_rng(2).permutation(len(tables))
        padded = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, source in enumerate(order):
            padded[row, : len(tables[source])] = tables[source]
        pools = [rig.put(rig.normal(seed, 1, sum(counts), shape[1], BLOCK, shape[2])) for seed in (6, 7)]
        query = rig.put(rig.normal(5, len(tables), shape[0] * shape[2], scale=2.0))
        return cls(spec, query, rig.Pool(*pools, BLOCK), np.array(lengths, np.int32)[order], padded)

    def lists(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(single tiles, shared tiles)."""
        singles, _ = attention_tiles(np.arange(len(self.lengths) + 1, dtype=np.int32), self.lengths, 1)
        members = paged_attention.members_per_tile(self.spec)
        return singles, share_prefixes(singles, self.tables, BLOCK, members, SPLIT)

    def run(
        self, lists: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
        own: Tile = tiles.DECODE_ATTENTION, walk: Tile = tiles.SHARED_ATTENTION, spread: bool = False,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Outputs [T, H D]: with `lists` the shared way, otherwise each sequence, or each of its splits, on its own."""
        rows, heads, size = len(self.lengths), self.spec.num_heads, self.spec.head_dim
        out = rig.empty(rows, heads * size, dtype="float32")
        singles, shared_tiles = lists or (self.lists()[0], None)
        shared = partial = None
        if shared_tiles is not None:
            buffers = rig.empty(rows, heads, size, dtype="float32"), rig.empty(rows, heads, 2, dtype="float32")
            shared = paged_attention.Shared(rig.put(shared_tiles), *buffers, walk)
        if spread:
            singles = singles[::-1].copy()  # states lie where their tile does, not their row
            shape = (rows, heads, -(-int(self.lengths.max()) // SPLIT))
            partial = rig.empty(*shape, size, dtype="float32"), rig.empty(*shape, 2, dtype="float32")
        paged_attention.attention(
            self.query, self.pool, 0, rig.put(self.tables), rig.put(singles), out, self.spec,
            shared=shared, partial=partial, tile=own,
        )  # fmt: skip
        return rig.get(out)

    def exact(self) -> NDArray[np.float64]:
        """The same in float64."""
        keys, values = (rig.get(part)[0].astype(np.float64) for part in (self.pool.keys, self.pool.values))
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        query = rig.get(self.query).astype(np.float64).reshape(-1, kv_heads, heads // kv_heads, self.spec.head_dim)
        out = np.empty_like(query)
        for row, length in enumerate(self.lengths):
            at = np.arange(length)
            block = self.tables[row, at // BLOCK]
            k, v = (part[block, :, at % BLOCK] for part in (keys, values))
            score = np.einsum("kgd,jkd->kgj", query[row], k) * self.spec.scale
            weight = np.exp(score - score.max(-1, keepdims=True))
            out[row] = np.einsum("kgj,jkd->kgd", weight / weight.sum(-1, keepdims=True), v)
        return out.reshape(len(out), -1)


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Equal bits; under the interpreter, whose products have a library's order, equal to rounding."""
    if rig.INTERPRETED:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_prefixes_have_the_bits_of_own_keys(shape: tuple[int, int, int]) -> None:
    step = Step.random(shape)
    singles, shared = step.lists()
    assert (singles[:, 4] > 0).sum() == sum(len(owns) for _, owns in GROUPS if len(owns) > 1)
    expected = step.run()
    assert rig.relative_error(expected, step.exact()) < (1e-6 if rig.INTERPRETED else 5e-3)
    same(step.run((singles, shared)), expected)
    same(step.run(spread=True), expected)


@pytest.mark.skipif(rig.INTERPRETED, reason="the interpreter knows neither warps nor stages")
@pytest.mark.parametrize(("warps", "stages"), [(1, 1), (2, 3), (4, 1), (8, 2)])
def test_no_tile_changes_a_bit(warps: int, stages: int) -> None:
    step = Step.random(SHAPES[0])
    same(step.run(step.lists(), Tile(16, 0, 0, warps, stages), Tile(0, 0, 0, warps, stages)), step.run())


def test_empty_tiles_are_skipped() -> None:
    """A recorded step is replayed with other groups, at most as many as there is room for."""
    step = Step.random(SHAPES[0])
    singles, shared = step.lists()
    padded = np.zeros((2 * len(shared), shared.shape[1]), np.int32)
    padded[: len(shared)] = shared
    padded_singles = np.concatenate([singles, np.zeros((5, singles.shape[1]), np.int32)])
    same(step.run((padded_singles, padded)), step.run())


def test_a_shared_split_that_is_not_whole_is_found_out() -> None:
    """The control: members walk one split more together than they share."""
    step = Step.random(SHAPES[0])
    singles, shared = step.lists()
    visible = np.array([(singles[rows[4 : 4 + rows[1]], 3] + 1).min() // SPLIT for rows in shared])
    more = np.flatnonzero(visible > shared[:, 2])
    assert len(more)
    for tile in more:
        shared[tile, 2] += 1
        singles[shared[tile, 4 : 4 + shared[tile, 1]], 4] += 1
    assert (np.abs(step.run((singles, shared)) - step.run()) > 1e-3).mean() > 0.01
