"""Which query tokens a program of the attention kernel takes: speed only, never bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


def attention_tiles(seq_starts: Ints, context_lens: Ints, tokens_per_tile: int) -> tuple[Ints, Ints]:
    """Tiles [n, 4] of sequences with one token of the step, and of those with more: (sequence, row, rows, position).

    seq_starts [S + 1] and context_lens [S] as in `StepInputs`. A tile has at most `tokens_per_tile` tokens of one
    sequence; `position` is that of its first one. Sequences without tokens have no tile. Long tiles come first.
    """
    counts = np.diff(seq_starts)
    (single,) = np.nonzero(counts == 1)
    singles = np.stack([single, seq_starts[single], counts[single], context_lens[single] - 1], 1).astype(np.int32)
    chunks = [
        (sequence, seq_starts[sequence] + at, min(tokens_per_tile, count - at), context_lens[sequence] - count + at)
        for sequence, count in enumerate(counts.tolist())
        if count > 1
        for at in range(0, count, tokens_per_tile)
    ]
    # Most keys first: the last programs to start should be short ones.
    chunks.sort(key=lambda tile: -tile[3])
    return singles, np.array(chunks, np.int32).reshape(-1, 4)
