"""A packed batch of whole sequences as one step of the op table, with the scratch KV pool that its attention needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.autograd.arrays import empty
from zerokl.kernels.ops import AttentionSpec, KVPool, StepInputs, neutral_sampling

BLOCK_SIZE = 64
"""Of the scratch pool; no result depends on it."""


def packed_step(
    token_ids: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    rows: NDArray[np.int32],
    routing: NDArray[np.int32] | None = None,
    routing_weights: NDArray[np.float32] | None = None,
) -> StepInputs:
    """Sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1], from position 0; hidden states of `rows` are wanted.

    Every sequence has blocks of its own, in order. `routing` and `routing_weights`: as in `StepInputs`. The caller has
    checked the arrays.
    """
    lengths = np.diff(cu_seqlens)
    blocks = -(-lengths // BLOCK_SIZE)
    first_block = np.concatenate([[0], np.cumsum(blocks)[:-1]])
    positions = np.arange(len(token_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    columns = np.arange(blocks.max(initial=0))
    tables = np.where(columns < blocks[:, None], first_block[:, None] + columns, -1)
    return StepInputs(
        token_ids=token_ids,
        positions=positions.astype(np.int32),
        slot_mapping=(np.repeat(first_block * BLOCK_SIZE, lengths) + positions).astype(np.int32),
        seq_starts=cu_seqlens,
        context_lens=lengths.astype(np.int32),
        block_tables=tables.astype(np.int32),
        logit_rows=rows,
        sampling=neutral_sampling(len(rows)),
        routing=routing,
        routing_weights=routing_weights,
    )


def scratch_pool(inputs: StepInputs, spec: AttentionSpec) -> KVPool[Any]:
    """A pool of one layer with room for the step; its content is whatever the memory held."""
    blocks = int(inputs.block_tables.max(initial=-1)) + 1
    keys, _ = empty(1, blocks, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE)
    values, _ = empty(1, blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return KVPool(keys=keys, values=values, block_size=BLOCK_SIZE)
