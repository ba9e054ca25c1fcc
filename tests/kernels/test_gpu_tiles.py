"""What the GPU kernels' hosts plan, without a GPU: which tile serves, which tokens a program takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.attention_tiles import attention_tiles

TABLES = (tiles.LINEAR, tiles.SWIGLU, tiles.LM_HEAD, tiles.EXPERTS)


@pytest.mark.parametrize("table", TABLES)
def test_every_product_has_a_tile_no_taller_than_needed(table):
    for rows in (1, 16, 17, 64, 200, 10_000):
        for outputs in (16, 4096, 200_000):
            tile = tiles.choose(table, rows, outputs, "bfloat16")
            assert max(16, 2 * rows) >= tile.BLOCK_M or tile.BLOCK_M <= 64
            assert tiles.choose(table, rows, outputs, "float32") is tiles.FLOAT32
    assert tiles.choose(table, 10**6, 10**6, "bfloat16") is table[-1][2]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), max_size=8),
    st.integers(1, 16),
)
def test_every_token_is_in_one_tile_of_its_sequence(sequences, per_tile):
    counts = np.array([count for count, _ in sequences], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lengths = np.array([before + count for count, before in sequences], np.int32)
    singles, chunks = attention_tiles(starts, lengths, per_tile)
    assert all(chunks[i, 3] >= chunks[i + 1, 3] for i in range(len(chunks) - 1))
    seen = []
    for sequence, row, rows, position in np.concatenate([singles, chunks]).tolist():
        assert 1 <= rows <= max(per_tile, 1)
        assert starts[sequence] <= row and row + rows <= starts[sequence + 1]
        assert position - sequences[sequence][1] == row - starts[sequence]
        seen += range(row, row + rows)
    assert sorted(seen) == list(range(starts[-1]))
    assert all(counts[sequence] == 1 for sequence in singles[:, 0])
