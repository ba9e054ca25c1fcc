"""Gradients of packed causal attention: against float64, and free of threads, instruction sets and neighbours."""

from itertools import pairwise

import numpy as np
import pytest
from attention_rig import Sequences, assert_same, attend64

from zerokl.kernels.cpu import _cpu


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
    for a, b in pairwise(starts):
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


def test_backward_refuses_wrong_shapes():
    q, k = np.zeros((3, 4, 8), np.float32), np.zeros((3, 2, 8), np.float32)
    with pytest.raises(ValueError, match="dk must have shape"):
        _cpu.attention_backward(q, q, k, k, q, np.array([0, 3], np.int32), 1.0, q.copy(), k[:2].copy(), k.copy())
    with pytest.raises(ValueError, match="seq_starts must end at the 3 tokens of q, got 2"):
        _cpu.attention_backward(q, q, k, k, q, np.array([0, 2], np.int32), 1.0, q.copy(), k.copy(), k.copy())
