"""Sequences with random queries, keys and values, run through the paged cache in any number of steps."""

import numpy as np

from zerokl.kernels.cpu import _cpu

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 200)


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
        """Outputs, `chunk` tokens of each sequence at a time, the first `cached` tokens in a step of their own."""
        outs = [np.full_like(q, np.nan) for q in self.q]
        done = dict.fromkeys(range(len(self.lengths)) if only is None else only, 0)
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
