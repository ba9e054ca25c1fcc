"""Paged attention on the CPU: right against float64, and bit for bit however a sequence is cut, cached or batched."""

from collections.abc import Iterator

import numpy as np
import pytest
from zerokl.kernels.cpu import _cpu

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 200)
SPLIT = 64


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    threads, instruction_set = _cpu.num_threads(), _cpu.instruction_set()
    yield
    _cpu.set_num_threads(threads)
    _cpu.set_instruction_set(instruction_set)


class Sequences:
    """Queries, keys and values of several sequences, and the outputs that steps over a paged cache give them."""

    def __init__(self, lengths=LENGTHS, heads=6, kv_heads=2, dim=32, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths, self.scale = lengths, dim**-0.5
        self.q, self.k, self.v = (
            [rng.normal(size=(n, h, dim)).astype(np.float32) for n in lengths] for h in (heads, kv_heads, kv_heads)
        )

    def cache(self, block_size, seed=0):
        """An empty cache of NaN with block ids in random order, some of them never used."""
        kv_heads, dim = self.k[0].shape[1:]
        width = -(-max(self.lengths) // block_size)
        blocks = len(self.lengths) * width + 3
        ids = np.random.default_rng(seed).permutation(blocks)[: blocks - 3].astype(np.int32).reshape(-1, width)
        keys = np.full((blocks, kv_heads, dim, block_size), np.nan, np.float32)
        values = np.full((blocks, kv_heads, block_size, dim), np.nan, np.float32)
        return ids, keys, values

    def step(self, chunks, cache, outs):
        """One engine step: chunks are (sequence, first token, end)."""
        ids, keys, values = cache
        block_size = keys.shape[3]
        q, k, v = (np.concatenate([x[s][a:b] for s, a, b in chunks]) for x in (self.q, self.k, self.v))
        slots = [ids[s, p // block_size] * block_size + p % block_size for s, a, b in chunks for p in range(a, b)]
        _cpu.kv_write(k, v, np.array(slots, np.int32), keys, values)
        starts = np.cumsum([0] + [b - a for _, a, b in chunks]).astype(np.int32)
        table = np.full((len(chunks), ids.shape[1]), -1, np.int32)
        for row, (s, _, b) in zip(table, chunks, strict=True):
            row[: -(-b // block_size)] = ids[s, : -(-b // block_size)]
        out = np.full_like(q, np.nan)
        lens = np.array([b for _, _, b in chunks], np.int32)
        _cpu.attention(q, keys, values, table, starts, lens, self.scale, out)
        for (s, a, b), first in zip(chunks, starts, strict=False):
            outs[s][a:b] = out[first : first + b - a]

    def run(self, chunk=10**6, block_size=16, cached=0, only=None):
        """Outputs of all sequences, `chunk` tokens of each at a time, the first `cached` tokens in a step of their own."""
        outs = [np.full_like(q, np.nan) for q in self.q]
        done = {s: 0 for s in (range(len(self.lengths)) if only is None else only)}
        cache = self.cache(block_size)
        while done:
            sizes = {s: cached if cached and not a else chunk for s, a in done.items()}
            chunks = [(s, a, min(a + sizes[s], self.lengths[s])) for s, a in done.items()]
            self.step(chunks, cache, outs)
            done = {s: b for s, _, b in chunks if b < self.lengths[s]}
        return outs

    def exact(self):
        """The same in float64, one softmax over the whole length."""
        return [attend64(q, k, v, self.scale)[0] for q, k, v in zip(self.q, self.k, self.v, strict=True)]


def attend64(q, k, v, scale):
    """Output [n, H, D] and probabilities [H, n, n]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * scale
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v), weights


def assert_same(got, want):
    assert [x.tobytes() for x in got] == [x.tobytes() for x in want]


# -- right --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (4, 4, 32), (7, 1, 80), (6, 2, 33), (1, 1, 1), (4, 2, 96), (2, 2, 128), (2, 1, 256), (50, 1, 8), (14, 2, 17)],
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


# -- bit for bit --------------------------------------------------------------------------------------------------------


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


def ordinary_attention(q, k, v, scale, splits):
    """One head in float32: each query (with its position) over keys in splits of 64 that start where `splits` says."""
    out = np.empty_like(q)
    for i, row in enumerate(q):
        position = len(k) - len(q) + i
        scores = (k[: position + 1] * row).sum(axis=1) * np.float32(scale)
        weights = np.exp(scores - scores.max())
        starts = list(splits(position))
        parts = [(weights[a:b, None] * v[a:b]).sum(axis=0) for a, b in zip(starts, [*starts[1:], position + 1], strict=True)]
        out[i] = np.sum(parts, axis=0, dtype=np.float32) / weights.sum()
    return out


def test_control_ordinary_attention_differs_between_decode_and_prefill():
    q, k, v = (x[0][:, 0] for x in (lambda s: (s.q, s.k, s.v))(Sequences((200,))))

    def aligned(position):
        return range(0, position + 1, SPLIT)

    def from_the_chunk(length):
        return lambda position: [0, *range((position - length + 1) % SPLIT or SPLIT, position + 1, SPLIT)]

    prefill = ordinary_attention(q, k, v, 0.2, aligned)
    decode = np.concatenate([ordinary_attention(q[i : i + 1], k[: i + 1], v[: i + 1], 0.2, aligned) for i in range(200)])
    assert prefill.tobytes() == decode.tobytes()
    shifted = np.concatenate([ordinary_attention(q[i : i + 1], k[: i + 1], v[: i + 1], 0.2, from_the_chunk(1)) for i in range(200)])
    assert np.allclose(shifted, prefill, atol=1e-5)
    assert shifted.tobytes() != prefill.tobytes()


def test_control_matrix_products_over_the_whole_length_differ_between_decode_and_prefill():
    q, k, v = (x[0][:, 0] for x in (lambda s: (s.q, s.k, s.v))(Sequences((200,))))
    mask = np.where(np.triu(np.ones((200, 200), bool), 1), np.float32(-np.inf), np.float32(0))

    def softmax(scores):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    prefill = softmax(q @ k.T + mask) @ v
    decode = np.concatenate([softmax(q[i : i + 1] @ k[: i + 1].T) @ v[: i + 1] for i in range(200)])
    assert np.allclose(prefill, decode, atol=1e-4)
    assert prefill.tobytes() != decode.tobytes()


# -- backward -----------------------------------------------------------------------------------------------------------


def packed(sequences):
    return [np.concatenate(x) for x in (sequences.q, sequences.k, sequences.v)]


def gradients(dout, q, k, v, out, starts, scale):
    grads = [np.full_like(x, np.nan) for x in (q, k, v)]
    _cpu.attention_backward(dout, q, k, v, out, np.array(starts, np.int32), scale, *grads)
    return grads


def gradients64(dout, q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    out, p = attend64(q, k, v, scale)
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (k, v))
    slope = np.einsum("ihd,jhd->hij", dout, wide_v) - (dout * out).sum(axis=-1).T[:, :, None]
    ds = p * slope * scale
    wide = (np.einsum("hij,ihd->jhd", ds, q), np.einsum("hij,ihd->jhd", p, dout))
    dk, dv = (x.reshape(len(x), -1, group, x.shape[-1]).sum(axis=2) for x in wide)
    return np.einsum("hij,jhd->ihd", ds, wide_k), dk, dv


def test_the_float64_gradients_are_the_slopes():
    sequences = Sequences((5,), heads=4, kv_heads=2, dim=3)
    q, k, v = (x.astype(np.float64) for x in packed(sequences))
    dout = np.random.default_rng(1).normal(size=q.shape)
    for which, grad in enumerate(gradients64(dout, q, k, v, 0.7)):
        for i in np.ndindex(*grad.shape):
            inputs = [[x.copy() for x in (q, k, v)] for _ in range(2)]
            inputs[0][which][i] += 1e-6
            inputs[1][which][i] -= 1e-6
            high, low = ((attend64(*x, 0.7)[0] * dout).sum() for x in inputs)
            np.testing.assert_allclose(grad[i], (high - low) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim"),
    [((1, 63, 64, 65, 129), 9, 3, 64), ((5, 200), 4, 4, 33), ((70,), 7, 1, 80), ((66,), 50, 1, 8), ((40,), 2, 1, 256)],
)
def test_gradients_match_float64(lengths, heads, kv_heads, dim):
    sequences = Sequences(lengths, heads, kv_heads, dim)
    q, k, v = packed(sequences)
    out, dout = np.concatenate(sequences.run()), np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    starts = np.cumsum([0, *lengths])
    got = gradients(dout, q, k, v, out, starts, sequences.scale)
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        want = gradients64(dout[a:b], q[a:b], k[a:b], v[a:b], sequences.scale)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x[a:b], y, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_threads_instruction_set_or_neighbours():
    sequences = Sequences((30, 1, 130), 6, 2, 33)
    q, k, v = packed(sequences)
    out, dout = np.concatenate(sequences.run()), np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    want = gradients(dout, q, k, v, out, [0, 30, 31, 161], 0.2)
    for instruction_set in _cpu.instruction_sets():
        _cpu.set_instruction_set(instruction_set)
        for threads in (1, 2, 3):
            _cpu.set_num_threads(threads)
            assert_same(gradients(dout, q, k, v, out, [0, 30, 31, 161], 0.2), want)
    alone = gradients(dout[31:], q[31:], k[31:], v[31:], out[31:], [0, 130], 0.2)
    assert_same(alone, [x[31:] for x in want])


# -- refusals -----------------------------------------------------------------------------------------------------------


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


def test_backward_refuses_wrong_shapes():
    q, k = np.zeros((3, 4, 8), np.float32), np.zeros((3, 2, 8), np.float32)
    with pytest.raises(ValueError, match="dk must have shape"):
        _cpu.attention_backward(q, q, k, k, q, ints(0, 3), 1.0, q.copy(), k[:2].copy(), k.copy())
    with pytest.raises(ValueError, match="seq_starts must end at the 3 tokens of q, got 2"):
        _cpu.attention_backward(q, q, k, k, q, ints(0, 2), 1.0, q.copy(), k.copy(), k.copy())
