"""Definition of the paged KV cache and of causal attention over it.

A cache is a pair of arrays of one layer: keys [num_blocks, KV, D, B], values [num_blocks, KV, B, D], with B positions a
block. Position p of a sequence lives in block `block_table[p // B]` at offset `p % B`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


def write_kv(k: Floats, v: Floats, slot_mapping: Ints, keys: Floats, values: Floats) -> None:
    """Store k, v [T, KV, D] at `slot_mapping` [T] = block * B + offset; padding tokens have slot -1 and are skipped."""
    block_size = keys.shape[-1]
    for token, slot in enumerate(slot_mapping):
        if slot >= 0:
            block, offset = divmod(int(slot), block_size)
            keys[block, :, :, offset] = k[token]
            values[block, :, offset, :] = v[token]


def read_kv(keys: Floats, values: Floats, block_table: Ints, length: int) -> tuple[Floats, Floats]:
    """The first `length` positions of a sequence as plain arrays [length, KV, D]."""
    block_size = keys.shape[-1]
    positions = np.arange(length)
    blocks, offsets = block_table[positions // block_size], positions % block_size
    return keys[blocks, :, :, offsets], values[blocks, :, offsets, :]


def causal_attention(q: Floats, k: Floats, v: Floats, first_position: int, scale: float) -> Floats:
    """softmax(scale q k^T) v where query i, at position first_position + i, sees the keys up to its own position.

    q [n, H, D]; k, v [length, KV, D], length >= first_position + n; query head h reads key head h // (H / KV)
    (arXiv:2305.13245). Returns [n, H, D].
    """
    count, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    for i in range(count):
        visible = first_position + i + 1
        for head in range(heads):
            scores = k[:visible, head // group] @ q[i, head] * scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[:visible, head // group] / weights.sum()
    return out


def paged_attention(
    q: Floats, keys: Floats, values: Floats, block_tables: Ints, seq_starts: Ints, context_lens: Ints, scale: float
) -> Floats:
    """Causal attention of each sequence's tokens over its cached keys, their own included.

    q [T, H, D]; block_tables [S, max blocks]; seq_starts [S + 1]; context_lens [S], keys visible to the sequence's last
    token. Returns [T, H, D], zeros for padding tokens that belong to no sequence.
    """
    out = np.zeros_like(q)
    for sequence, length in enumerate(context_lens):
        tokens = slice(int(seq_starts[sequence]), int(seq_starts[sequence + 1]))
        count = tokens.stop - tokens.start
        if count:
            k, v = read_kv(keys, values, block_tables[sequence], int(length))
            out[tokens] = causal_attention(q[tokens], k, v, int(length) - count, scale)
    return out
