"""A packed batch of whole sequences as one step of the op table: what a trainer's forward runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import StepInputs, neutral_sampling

BLOCK_SIZE = 64
"""Of the scratch pool for a step's keys and values; no result depends on it."""


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


def num_blocks(inputs: StepInputs) -> int:
    """Blocks of BLOCK_SIZE that a packed step needs."""
    return int(inputs.block_tables.max(initial=-1)) + 1
