"""Paged attention on the CPU: right against float64, and bit for bit however a sequence is cut, cached or batched."""

from itertools import pairwise

import numpy as np
import pytest
from attention_rig import LENGTHS, Sequences, assert_same

from zerokl.kernels.cpu import _cpu

SPLIT = 64


# -- right -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [
        (9, 3, 64),
        (4, 4, 32),
        (7, 1, 80),
        (6, 2, 33),
        (1, 1, 1),
        (4, 2, 96),
        (2, 2, 128),
        (2, 1, 256),
        (50, 1, 8),
        (14, 2, 17),
    ],
)
def test_matches_one_softmax_in_float64(heads, kv_heads, dim):
    sequences = Sequences((1, 64, 65, 150), heads, kv_heads, dim)
    for block_size in (8, 16):
        got = sequences.run(block_size=block_size)
        for x, want in zip(got, sequences.exact(), strict=True):
            np.testing.assert_allclose(x, want, rtol=2e-5, atol=2e-6)
    assert_same(sequences.run(chunk=7, block_size=24), got)


def test_large_scores_stay_finite():
    sequences = Sequences((130,))
    sequences.q[0] *= 200
    np.testing.assert_allclose(sequences.run()[0], sequences.exact()[0], rtol=1e-4, atol=1e-4)


def test_what_a_query_cannot_see_does_not_matter():
    sequences = Sequences((200,))
    want = sequences.run()[0]
    sequences.k[0][100:] = np.inf
    sequences.v[0][100:] = np.nan
    got = sequences.run()[0]
    assert got[:100].tobytes() == want[:100].tobytes()
    assert np.isnan(got[100:]).all()


def test_empty_sequences_and_padding_are_ignored():
    sequences = Sequences((5, 70))
    want = sequences.run()
    ids, keys, values = sequences.cache(16)
    sequences.step([(0, 0, 5), (1, 0, 70)], (ids, keys, values), [np.empty_like(q) for q in sequences.q])
    q = np.concatenate([*sequences.q, np.full((4, 6, 32), np.nan, np.float32)])
    out = np.full_like(q, 7.0)
    table = np.array([[-1] * 5, ids[0], [-1] * 5, ids[1]], np.int32)
    starts, lens = np.array([0, 0, 5, 5, 75], np.int32), np.array([0, 5, 9999, 70], np.int32)
    _cpu.attention(q, keys, values, table, starts, lens, sequences.scale, out)
    assert_same([out[:5], out[5:75]], want)
    assert (out[75:] == 7.0).all()


# -- bit for bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 17, 64, 100])
def test_chunks_and_decode_equal_whole_prefill(chunk):
    sequences = Sequences(heads=9, kv_heads=3, dim=64)
    assert_same(sequences.run(chunk), sequences.run())


@pytest.mark.parametrize("cached", [16, 48, 64, 112, 128])
def test_a_cached_prefix_equals_whole_prefill(cached):
    sequences = Sequences()
    want = sequences.run()
    assert_same(sequences.run(cached=cached), want)
    assert_same(sequences.run(cached=cached, chunk=1), want)


@pytest.mark.parametrize("block_size", [8, 24, 32, 64, 128])
def test_block_size_does_not_matter(block_size):
    sequences = Sequences()
    want = sequences.run(block_size=16)
    assert_same(sequences.run(block_size=block_size), want)
    assert_same(sequences.run(block_size=block_size, chunk=33), want)


def test_other_sequences_do_not_matter():
    sequences = Sequences()
    together = sequences.run(chunk=50)
    for s in range(len(LENGTHS)):
        assert_same([sequences.run(chunk=50, only=[s])[s]], [together[s]])


def test_decode_rows_are_independent_in_batches_of_1_to_300():
    lengths = tuple(int(n) for n in np.random.default_rng(2).integers(1, 140, 300))
    sequences = Sequences(lengths, heads=3, kv_heads=1, dim=16)
    cache = sequences.cache(16)
    want = [np.empty_like(q) for q in sequences.q]
    sequences.step([(s, 0, length) for s, length in enumerate(lengths)], cache, want)
    for count in range(1, 301):
        members = range(count) if count % 2 else range(300 - count, 300)
        got = [np.empty_like(q) for q in sequences.q]
        sequences.step([(s, lengths[s] - 1, lengths[s]) for s in members], cache, got)
        assert_same([got[s][-1] for s in members], [want[s][-1] for s in members])


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (5, 1, 33, 8)])
def test_threads_and_instruction_sets_give_the_same_bits(heads, kv_heads, dim, block_size):
    sequences = Sequences((1, 65, 200), heads, kv_heads, dim)
    want = sequences.run(block_size=block_size)
    for instruction_set in _cpu.instruction_sets():
        _cpu.set_instruction_set(instruction_set)
        for threads in (1, 2, 3):
            _cpu.set_num_threads(threads)
            assert_same(sequences.run(block_size=block_size), want)
        assert_same(sequences.run(chunk=40, block_size=block_size), want)


def one_head():
    """Queries, keys and values [200, 32] of one head."""
    sequences = Sequences((200,))
    return sequences.q[0][:, 0], sequences.k[0][:, 0], sequences.v[0][:, 0]


def split_attention(q, k, v, first_split):
    """The last query of q over all keys in float32, in splits of 64 after one of `first_split` keys."""
    scores = (k * q[-1]).sum(axis=1)
    weights = np.exp(scores - scores.max())
    starts = [0, *range(first_split, len(k), SPLIT), len(k)]
    parts = [(weights[a:b, None] * v[a:b]).sum(axis=0) for a, b in pairwise(starts)]
    return np.sum(parts, axis=0, dtype=np.float32) / weights.sum()


def test_control_splits_that_are_not_aligned_to_positions_are_caught():
    q, k, v = one_head()
    prefixes = [(q[:n], k[:n], v[:n]) for n in range(1, 201)]
    aligned = np.stack([split_attention(*prefix, SPLIT) for prefix in prefixes])
    backwards = np.stack([split_attention(*prefix, len(prefix[0]) % SPLIT or SPLIT) for prefix in prefixes])
    np.testing.assert_allclose(backwards, aligned, atol=1e-5)
    assert backwards.tobytes() != aligned.tobytes()


def test_control_matrix_products_over_the_whole_length_differ_between_decode_and_prefill():
    q, k, v = one_head()
    mask = np.where(np.triu(np.ones((200, 200), bool), 1), np.float32(-np.inf), np.float32(0))

    def softmax(scores):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    prefill = softmax(q @ k.T + mask) @ v
    decode = np.concatenate([softmax(q[i : i + 1] @ k[: i + 1].T) @ v[: i + 1] for i in range(200)])
    np.testing.assert_allclose(decode, prefill, atol=1e-4)
    assert decode.tobytes() != prefill.tobytes()


# -- refusals ----------------------------------------------------------------------------------------------------------


def call(**changed):
    """Attention of 3 tokens of one sequence with 20 keys, with some arguments exchanged."""
    zeros = np.zeros((4, 2, 8, 16), np.float32)
    arguments = {
        "q": np.zeros((3, 4, 8), np.float32),
        "k_cache": zeros,
        "v_cache": np.zeros((4, 2, 16, 8), np.float32),
        "block_tables": np.array([[1, 3, -1]], np.int32),
        "seq_starts": np.array([0, 3], np.int32),
        "context_lens": np.array([20], np.int32),
        "scale": 1.0,
        "out": np.empty((3, 4, 8), np.float32),
    }
    _cpu.attention(**{**arguments, **changed})


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": np.zeros((3, 3, 8), np.float32)}, "multiple of the 2 KV heads, got 3"),
        ({"q": np.zeros((3, 4, 9), np.float32)}, r"k_cache must have shape \(4, 2, 9, 16\), got \(4, 2, 8, 16\)"),
        ({"q": np.zeros((3, 4, 257), np.float32)}, r"head size must be in \[1, 256\], got 257"),
        ({"k_cache": np.zeros((4, 2, 8, 12), np.float32)}, "multiple of 8, got 12"),
        ({"v_cache": np.zeros((4, 2, 8, 16), np.float32)}, "v_cache must have shape"),
        ({"out": np.zeros((2, 4, 8), np.float32)}, "out must have shape"),
        ({"seq_starts": ints(0, 4)}, r"seq_starts\[1\] must be in \[0, 3\], got 4"),
        ({"seq_starts": ints(1, 3)}, r"seq_starts\[0\] must be 0, got 1"),
        ({"seq_starts": ints(0, 3, 3)}, "seq_starts must have shape"),
        ({"context_lens": ints(2)}, r"context_lens\[0\] must be in \[3, 48\]"),
        ({"context_lens": ints(49)}, r"context_lens\[0\] must be in \[3, 48\]"),
        ({"context_lens": ints(33)}, r"block_tables\[0\]\[2\] must be in \[0, 4\), got -1"),
        ({"block_tables": ints([4, 3])}, r"block_tables\[0\]\[0\] must be in \[0, 4\), got 4"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused_by_name(changed, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changed)
