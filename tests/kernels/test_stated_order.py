"""The order of operations that docs/numerics.md states, carried out in NumPy, gives the very bits of the C++ kernel."""

import math

import numpy as np
import pytest
from sampling_rig import make_batch, sample

LANES, PARTITION = 16, 1024
ONE = np.float32(1)
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def fma(a, b, c):
    """c + a * b rounded once: the product of two float32 is exact in long double, whose sum is then rounded."""
    wide = np.longdouble
    assert np.finfo(wide).nmant >= 63
    return (np.asarray(c, wide) + np.asarray(a, wide) * np.asarray(b, wide)).astype(np.float32)


def stated_exp(x):
    """e^x for float32 x in [-87.3, 0]; 0 below."""
    clamped = np.maximum(x, np.float32(-87.3))
    magic = np.float32(12582912)
    n = fma(clamped, np.float32(1.44269504088896341), magic) - magic
    r = fma(n, np.float32(2.12194440e-4), fma(n, np.float32(-0.693359375), clamped))
    p = np.float32(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = fma(p, r, np.float32(coefficient))
    y = np.ldexp(fma(p, r * r, r) + ONE, n.astype(np.int32))
    return np.where(x < np.float32(-87.3), np.float32(0), y)


def fold(lanes):
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def stated_sums(e, d):
    """(sum of e, sum of e * d) of one row."""
    total = weighted = 0.0
    for start in range(0, len(e), PARTITION):
        lanes, weighted_lanes = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        chunk = np.zeros((2, PARTITION), np.float32)
        size = len(e[start : start + PARTITION])
        chunk[0, :size], chunk[1, :size] = e[start : start + PARTITION], d[start : start + PARTITION]
        for e16, d16 in zip(chunk[0].reshape(-1, LANES), chunk[1].reshape(-1, LANES), strict=True):
            lanes = lanes + e16
            weighted_lanes = fma(e16, d16, weighted_lanes)
        total += fold(lanes)
        weighted += fold(weighted_lanes)
    return total, weighted


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [5, 1024, 3001, 20000])
def test_policy_logprobs_and_entropy(vocab, temperature):
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=vocab) * 4).astype(np.float32)
    x = logits / np.float32(temperature)
    d = x - x.max()
    total, weighted = stated_sums(stated_exp(d), d)
    tokens = rng.integers(0, vocab, 50)
    batch = make_batch(50, forced=tokens, temperature=temperature)
    result = sample(np.ascontiguousarray(np.broadcast_to(logits, (50, vocab))), batch)
    expected = np.array([np.float32(float(d[token]) - math.log(total)) for token in tokens])
    np.testing.assert_array_equal(result.policy_logprobs, expected)
    np.testing.assert_array_equal(result.logprobs, expected)
    np.testing.assert_array_equal(result.entropy, np.float32(math.log(total) - weighted / total))


def test_entropies_of_many_short_rows():
    """Each rounds its sums anew: a product that is not fused shows in some of them."""
    logits = np.random.default_rng(1).normal(size=(200, 40)).astype(np.float32)
    expected = []
    for row in logits:
        d = row - row.max()
        total, weighted = stated_sums(stated_exp(d), d)
        expected.append(math.log(total) - weighted / total)
    np.testing.assert_array_equal(sample(logits, make_batch(200)).entropy, np.float32(expected))


def test_logprobs_of_a_truncated_distribution():
    """What top-k leaves out adds 0 to the same partition."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=5000) * 4).astype(np.float32)
    kept = np.argsort(-logits, kind="stable")[:900]
    d = logits - logits.max()
    e = np.zeros(5000, np.float32)
    e[kept] = stated_exp(d[kept])
    total, _ = stated_sums(e, d)
    result = sample(np.ascontiguousarray(np.broadcast_to(logits, (900, 5000))), make_batch(900, forced=kept, top_k=900))
    expected = np.array([np.float32(float(d[token]) - math.log(total)) for token in kept])
    np.testing.assert_array_equal(result.logprobs, expected)


def test_stated_exp_is_close_to_the_exponential():
    x = np.linspace(-87, 0, 20001).astype(np.float32)
    np.testing.assert_allclose(stated_exp(x), np.exp(x.astype(np.float64)), rtol=1.2e-7)
