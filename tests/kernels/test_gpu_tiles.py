"""What the GPU kernels' hosts plan, without a GPU: which tile serves, which tokens a program takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.attention_tiles import SHARED_HEAD, attention_tiles, share_prefixes

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
    for sequence, row, rows, position, shared in np.concatenate([singles, chunks]).tolist():
        assert shared == 0
        assert 1 <= rows <= max(per_tile, 1)
        assert starts[sequence] <= row and row + rows <= starts[sequence + 1]
        assert position - sequences[sequence][1] == row - starts[sequence]
        seen += range(row, row + rows)
    assert sorted(seen) == list(range(starts[-1]))
    assert all(counts[sequence] == 1 for sequence in singles[:, 0])


BLOCK, SPLIT, MEMBERS = 16, 64, 8


def decode_step(groups, order):
    """(singles, tables) of sequences that share their group's prompt: groups of (keys of the prompt, own keys)."""
    fresh = iter(range(10**6))
    tables, lengths = [], []
    for prompt, own in groups:
        shared = [next(fresh) for _ in range(prompt // BLOCK)]
        for more in own:
            length = prompt + more
            tables.append(shared + [next(fresh) for _ in range(-(-length // BLOCK) - len(shared))])
            lengths.append(length)
    width = max(map(len, tables))
    padded = np.array([table + [-1] * (width - len(table)) for table in tables], np.int32)[order]
    lengths = np.array(lengths, np.int32)[order]
    singles, _ = attention_tiles(np.arange(len(order) + 1, dtype=np.int32), lengths, 1)
    return singles, padded


GROUP = st.tuples(st.integers(0, 400), st.lists(st.integers(1, 150), min_size=1, max_size=20))


@settings(deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_members_share_whole_splits_of_equal_blocks_that_all_of_them_see(groups, random):
    order = list(range(sum(len(own) for _, own in groups)))
    random.shuffle(order)
    singles, tables = decode_step(groups, order)
    shared = share_prefixes(singles, tables, BLOCK, MEMBERS, SPLIT)
    assert len(shared) <= len(singles) / 2
    walked = {}
    for sequence, members, splits, _, *rows in shared.tolist():
        assert 1 <= members <= MEMBERS and splits >= 1
        for row in rows[:members]:
            assert row not in walked
            walked[row] = splits
            equal = slice(0, splits * SPLIT // BLOCK)
            np.testing.assert_array_equal(tables[row, equal], tables[sequence, equal])
    assert [walked.get(row, 0) for row in range(len(singles))] == singles[:, 4].tolist()
    assert all(splits * SPLIT <= position + 1 for _, _, _, position, splits in singles.tolist())
    # Nothing is missed: every group of at least two walks all whole splits of its prompt at once.
    expected = [prompt // BLOCK * BLOCK // SPLIT if len(own) > 1 else 0 for prompt, own in groups for _ in own]
    assert singles[:, 4].tolist() == [expected[i] for i in order]


def test_groups_behind_one_system_prompt_share_their_own_prompts_too():
    singles, tables = decode_step([(256, [5] * 3), (320, [9] * 4), (64, [1])], list(range(8)))
    tables[:, : 64 // BLOCK] = tables[0, : 64 // BLOCK]
    shared = share_prefixes(singles, tables, BLOCK, MEMBERS, SPLIT)
    assert shared[:, 1:3].tolist() == [[3, 4], [4, 5]]
    assert singles[:, 4].tolist() == [4] * 3 + [5] * 4 + [0]
    assert shared[0, SHARED_HEAD : SHARED_HEAD + 4].tolist() == [0, 1, 2, 0]


def test_blocks_larger_than_a_split_hold_several():
    tables = np.array([[3, 4], [3, 5], [6, 7]], np.int32)
    singles, _ = attention_tiles(np.arange(4, dtype=np.int32), np.array([200, 130, 129], np.int32), 1)
    assert share_prefixes(singles, tables, 128, MEMBERS, SPLIT)[:, 1:3].tolist() == [[2, 2]]
    assert singles[:, 4].tolist() == [2, 2, 0]
