"""Which query tokens a program of the attention kernels takes: speed only, never bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

SPLIT = 64
"""Keys per split: part of the definition."""

TILE_COLUMNS = 5
"""Columns of a tile: sequence, first row, rows, position of the first row, splits of keys that others walk for it."""
SHARED_HEAD = 4
"""Columns of a shared tile before the rows of its members: sequence whose table serves, members, splits, 0."""

MOST_STATES = 1 << 15
"""Splits of single tokens that may have a program each, which leaves H (D + 2) float32 in memory."""

ENOUGH_PROGRAMS = 264
"""Of attention: two for each multiprocessor of an H100 or H200."""


def splits_pay(tokens: int, kv_heads: int, context: int) -> bool:
    """Whether so many single tokens, at up to `context` keys, leave the chip idle but for programs per split."""
    splits = -(-context // SPLIT)
    return splits > 1 and tokens * kv_heads < ENOUGH_PROGRAMS and tokens * splits <= MOST_STATES


def attention_tiles(seq_starts: Ints, context_lens: Ints, tokens_per_tile: int) -> tuple[Ints, Ints]:
    """Tiles [n, TILE_COLUMNS] of sequences with one token of the step, and of those with more.

    seq_starts [S + 1] and context_lens [S] as in `StepInputs`. A tile has at most `tokens_per_tile` tokens of one
    sequence. Sequences without tokens have no tile. Long tiles come first. No tile has shared splits:
    `share_prefixes` finds them.
    """
    counts = np.diff(seq_starts)
    (single,), (several,) = np.nonzero(counts == 1), np.nonzero(counts > 1)
    columns: list[NDArray[Any]] = [single, seq_starts[single], counts[single], context_lens[single] - 1, 0 * single]
    chunks = [
        (sequence, seq_starts[sequence] + at, min(tokens_per_tile, count - at), context_lens[sequence] - count + at, 0)
        for sequence, count in zip(several.tolist(), counts[several].tolist(), strict=True)
        for at in range(0, count, tokens_per_tile)
    ]
    # Most keys first: the last programs to start should be short ones.
    chunks.sort(key=lambda tile: -tile[3])
    return np.stack(columns, 1).astype(np.int32), np.array(chunks, np.int32).reshape(-1, TILE_COLUMNS)


def share_prefixes(singles: Ints, tables: Ints, block_size: int, members: int, split: int) -> Ints:
    """Shared tiles [n, SHARED_HEAD + members] of the tokens in `singles` whose sequences begin with the same blocks.

    singles [n, TILE_COLUMNS] of `attention_tiles`; its last column is set here. tables [S, max blocks] int32. Members
    share whole splits of `split` keys that all of them see. Sequences with the same first block are found wherever
    they stand in the batch, those that share more only as neighbours among them. There are at most n / 2 tiles.
    """
    none = np.zeros((0, SHARED_HEAD + members), np.int32)
    if len(singles) < 2:
        return none
    order = np.argsort(tables[singles[:, 0], 0], kind="stable")
    links = _shared_with_next(singles[order], tables, block_size, split)
    before, after = np.append(0, links), np.append(links, 0)
    most = np.maximum(before, after)
    # A group ends where neighbours share less than one of them shares with its other neighbour.
    ends = (links == 0) | (links < np.maximum(most[1:], most[:-1]))
    starts = np.append(0, np.flatnonzero(ends) + 1)
    sizes = np.diff(np.append(starts, len(singles)))
    unbounded = np.iinfo(np.int64).max
    splits = np.minimum.reduceat(np.append(np.where(ends, unbounded, links), unbounded), starts)
    num_tiles = np.where(sizes > 1, -(-sizes // members), 0)
    group = np.repeat(np.arange(len(starts)), sizes)
    rank = np.arange(len(singles)) - starts[group]
    sharing = sizes[group] > 1
    group, rank, rows = group[sharing], rank[sharing], order[sharing]
    tile = (np.cumsum(num_tiles) - num_tiles)[group] + rank // members
    shared = np.zeros((int(num_tiles.sum()), SHARED_HEAD + members), np.int32)
    shared[tile, 0] = singles[rows, 0]
    shared[:, 1] = np.bincount(tile, minlength=len(shared))
    shared[tile, 2] = splits[group]
    shared[tile, SHARED_HEAD + rank % members] = singles[rows, 1]
    singles[rows, TILE_COLUMNS - 1] = splits[group]
    return shared


def _shared_with_next(singles: Ints, tables: Ints, block_size: int, split: int) -> NDArray[np.int64]:
    """Whole splits [n - 1] that each token and the next one both see, in the same blocks."""
    blocks = tables[singles[:, 0]]
    differ = blocks[1:] != blocks[:-1]
    equal = differ.argmax(axis=1)
    equal[~differ[np.arange(len(equal)), equal]] = blocks.shape[1]
    seen = singles[:, 3].astype(np.int64) + 1
    keys: NDArray[np.int64] = np.minimum(equal * block_size, np.minimum(seen[1:], seen[:-1]))
    return keys // split
