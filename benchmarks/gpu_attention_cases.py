"""Attention of a decode step, or of one prefill, as something to time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu_cases import Case, Shape
from gpu_timing import Bench, copies_past_cache

from zerokl.kernels.gpu import norms, paged_attention, tiles
from zerokl.kernels.gpu.attention_tiles import SPLIT, attention_tiles, share_prefixes, splits_pay
from zerokl.kernels.gpu.tiles import Tile

CONTEXT = 384
PROMPT = 256
SAMPLES = 8
MOST_SEQUENCES = 512  # more rows are one prefill
BLOCK_SIZE = 16


def attention_cases(
    bench: Bench, shape: Shape, rows: int, tile: Tile | None = None, split: int = SPLIT
) -> Iterator[Case]:
    """The write of keys and values, and attention: `rows` sequences at CONTEXT, or one prefill of `rows` tokens."""
    step = AttentionStep(bench, shape, rows)
    qkv = bench.normal(rows, (shape.heads + 2 * shape.kv_heads) * shape.size)
    yield Case(
        "qkv_to_cache", 4.0 * rows * (shape.heads + 2 * shape.kv_heads) * shape.size, 0.0, step.copies,
        lambda i: norms.qkv_to_cache(
            qkv, step.norm, step.norm, step.rope, step.positions, step.slots, step.pool, i, step.query, step.spec
        ),
    )  # fmt: skip
    yield step.case("attention", tile=tile, split=split)


def shared_attention_cases(
    bench: Bench, shape: Shape, rows: int, walk: Tile = tiles.SHARED_ATTENTION, own: Tile = tiles.DECODE_ATTENTION
) -> Iterator[Case]:
    """The same for decode where SAMPLES sequences share the blocks of their PROMPT: read once, and each on its own."""
    step = AttentionStep(bench, shape, rows, SAMPLES)
    yield step.case("attention n=8, own", tile=own)
    yield step.case("attention n=8", tile=own, shared=step.shared(walk))


class AttentionStep:
    """Keys, values and metadata of a decode step (or of one prefill of `rows` tokens), random, in scattered blocks."""

    def __init__(self, bench: Bench, shape: Shape, rows: int, samples: int = 1) -> None:
        self._bench, self._rows, self._prefill = bench, rows, rows > MOST_SEQUENCES
        sequences, context = (1, rows) if self._prefill else (rows, CONTEXT)
        heads, kv, size = shape.heads, shape.kv_heads, shape.size
        self.spec: Any = SimpleNamespace(
            num_heads=heads, num_kv_heads=kv, head_dim=size, scale=size**-0.5, rotary_layout="half", norm_eps=1e-6
        )
        self._context = context
        self._tables = _tables(sequences, context, samples)
        blocks = int(self._tables.max()) + 1
        self._kv_bytes = 4.0 * blocks * BLOCK_SIZE * kv * size
        self.copies = copies_past_cache(int(self._kv_bytes))
        self.pool: Any = SimpleNamespace(
            keys=bench.normal(self.copies, blocks, kv, BLOCK_SIZE, size),
            values=bench.normal(self.copies, blocks, kv, BLOCK_SIZE, size),
            block_size=BLOCK_SIZE,
        )
        counts = np.full(sequences, context if self._prefill else 1)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = np.arange(rows) if self._prefill else np.full(rows, context - 1)
        owner = np.repeat(np.arange(sequences), counts)
        slots = self._tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self.positions, self.slots = (bench.ints(v.astype(np.int32)) for v in (positions, slots))
        self.rope = bench.normal(max(4096, context), 2, size // 2, dtype="float32")
        self.norm = bench.normal(size, dtype="float32")
        self.query = bench.normal(rows, heads * size)
        self._tables_there, self._out = bench.ints(self._tables), bench.empty(rows, heads * size)

    def _tiles(self, tile: Tile) -> Any:
        contexts = np.full(len(self._tables), self._context, np.int32)
        return attention_tiles(self._starts, contexts, paged_attention.tokens_per_tile(tile, self.spec))[self._prefill]

    def shared(self, walk: Tile) -> paged_attention.Shared:
        """The groups of the step."""
        members = paged_attention.members_per_tile(self.spec)
        singles = self._tiles(tiles.DECODE_ATTENTION)
        listed = share_prefixes(singles, self._tables, BLOCK_SIZE, members, SPLIT)
        self._shared_singles = self._bench.ints(singles)
        acc, state = (
            self._bench.empty(self._rows, self.spec.num_heads, width, dtype="float32")
            for width in (self.spec.head_dim, 2)
        )
        return paged_attention.Shared(self._bench.ints(listed), acc, state, walk)

    def case(
        self, op: str, *, tile: Tile | None = None, split: int = SPLIT,
        shared: paged_attention.Shared | None = None,
    ) -> Case:  # fmt: skip
        """Attention; `shared` is of this step."""
        spec, rows = self.spec, self._rows
        heads, size = spec.num_heads, spec.head_dim
        tile = tile or (tiles.PREFILL_ATTENTION if self._prefill else tiles.DECODE_ATTENTION)
        tile_list = self._shared_singles if shared else self._bench.ints(self._tiles(tile))
        partial = None
        if not self._prefill and splits_pay(rows, spec.num_kv_heads, self._context) and not shared:
            buffer = (rows, heads, -(-self._context // split))
            partial = (
                self._bench.empty(*buffer, size, dtype="float32"), self._bench.empty(*buffer, 2, dtype="float32"),
            )  # fmt: skip
        pairs = self._context * (self._context + 1) / 2 if self._prefill else rows * self._context
        return Case(
            op, self._kv_bytes + 4.0 * rows * heads * size, 4.0 * pairs * heads * size, self.copies,
            lambda i: paged_attention.attention(
                self.query, self.pool, i, self._tables_there, tile_list, self._out, spec, partial=partial,
                shared=shared, tile=tile, split=split,
            ),
        )  # fmt: skip


def _tables(sequences: int, context: int, samples: int) -> Any:
    """Block tables in which `samples` sequences after one another begin with the same PROMPT keys."""
    shared = PROMPT // BLOCK_SIZE if samples > 1 else 0
    own = context // BLOCK_SIZE - shared
    groups = sequences // samples
    order = np.random.default_rng(1).permutation(groups * shared + sequences * own).astype(np.int32)
    prompts = np.repeat(order[: groups * shared].reshape(groups, shared), samples, axis=0)
    return np.concatenate([prompts, order[groups * shared :].reshape(sequences, own)], axis=1)
