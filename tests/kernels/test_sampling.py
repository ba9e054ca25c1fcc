"""The C++ sampler against its definition, and rule by rule: ties, truncation, penalties, temperature 0, bad rows."""

from dataclasses import replace

import numpy as np
import pytest
from sampling_rig import assert_same_bits, logprobs_of_all, make_batch, random_batch, sample, support, take_rows

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.reference.philox import token_bits
from zerokl.kernels.reference.sampling import row_distribution, sample_rows

OPTIONS_ON = {"temperature": 0.7, "top_k": 300, "top_p": 0.9, "min_p": 0.01}


def close(value, expected):
    """Within 2e-6 of the expected value's magnitude, at least 1."""
    if np.isnan(expected) or np.isinf(expected):
        return np.array_equal(value, np.float32(expected), equal_nan=True)
    return abs(value - expected) <= 2e-6 * max(1.0, abs(expected))


def drawn_by(distribution, batch, row, token):
    """Whether the draw gives `token` for some weights within 1e-6 of the exact ones."""
    if batch.forced[row] >= 0:
        return token == batch.forced[row]
    cumulative = np.cumsum(distribution.masses).tolist()
    bits = token_bits(int(batch.seed[row]), int(batch.sample_index[row]), int(batch.position[row]))
    threshold, slack = bits * cumulative[-1] >> 64, 1e-6 * cumulative[-1]
    before = cumulative[token - 1] if token else 0
    return distribution.kept[token] and before - slack <= threshold < cumulative[token] + slack


def explained(logits, batch, row, result, nudge):
    """Whether the definition gives the row's result, with top-p and min-p moved by a relative `nudge`."""
    near = replace(
        batch,
        top_p=np.where(batch.top_p < 1, batch.top_p * np.float64(1 + nudge[0]), 1.0),
        min_p=batch.min_p * np.float64(1 + nudge[1]),
    )
    distribution = row_distribution(logits[row], near, row)
    if distribution is None:
        return result.tokens[row] == -1 and np.isnan(result.logprobs[row])
    token = result.tokens[row]
    return drawn_by(distribution, batch, row, token) and all(
        close(value, expected)
        for value, expected in [
            (result.logprobs[row], distribution.logprobs[token]),
            (result.policy_logprobs[row], distribution.policy_logprobs[token]),
            (result.raw_logprobs[row], distribution.raw_logprobs[token]),
            (result.entropy[row], distribution.entropy),
        ]
    )


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 3000])
def test_agrees_with_definition(vocab):
    """Over random logits and options: the same up to cuts and draws that lie within 1e-6 of a boundary."""
    rng = np.random.default_rng(vocab)
    rows, borderline = 48, 0
    batch = random_batch(rows, vocab, rng)
    logits = rng.normal(scale=rng.choice([0.1, 3.0, 12.0], (rows, 1)), size=(rows, vocab)).astype(np.float32)
    logits[::3] = np.round(logits[::3] * 4) / 4  # ties
    result = sample(logits, batch)
    for row in range(rows):
        if not explained(logits, batch, row, result, (0.0, 0.0)):
            nudges = [(a, b) for a in (-1e-6, 0.0, 1e-6) for b in (-1e-6, 0.0, 1e-6)]
            assert any(explained(logits, batch, row, result, nudge) for nudge in nudges), f"row {row}"
            borderline += 1
    assert borderline <= 1


@pytest.mark.parametrize("scale", [0.02, 2.0, 9.0])
def test_tokens_agree_at_a_real_vocabulary(scale):
    rng = np.random.default_rng(int(scale * 100))
    rows, vocab = 24, 49152
    logits = rng.normal(scale=scale, size=(rows, vocab)).astype(np.float32)
    batch = make_batch(
        rows,
        seed=rng.integers(0, 2**63, rows),
        temperature=[1, 0.7, 1.3] * 8,
        top_k=[0, 40, 0, 20000] * 6,
        top_p=[1, 0.95, 1, 0.5, 0.999, 1] * 4,
        min_p=[0.0] * 20 + [0.02] * 4,
    )
    result, expected = sample(logits, batch), sample_rows(logits, batch)
    assert np.sum(result.tokens != expected.tokens) <= 1  # a draw within 1e-6 of a boundary
    same = result.tokens == expected.tokens
    for name in ("logprobs", "policy_logprobs", "entropy"):
        np.testing.assert_allclose(getattr(result, name)[same], getattr(expected, name)[same], rtol=2e-6, atol=2e-6)


def test_logits_are_left_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 500)).astype(np.float32)
    before = logits.copy()
    sample(logits, random_batch(20, 500, rng))
    np.testing.assert_array_equal(logits, before)
    logits.flags.writeable = False
    sample(logits, make_batch(20))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_options_off_and_neutral_options_give_the_same_bits(temperature):
    """The plain path, the truncating path and the path of altered logits meet in every bit."""
    rng = np.random.default_rng(1)
    rows, vocab = 40, 5003
    logits = (rng.normal(size=(rows, vocab)) * 5).astype(np.float32)
    common = {"seed": np.arange(rows), "temperature": temperature}
    plain = sample(logits, make_batch(rows, **common))
    np.testing.assert_array_equal(plain.logprobs, plain.policy_logprobs)
    neutral = [
        {"min_p": 1e-30},
        {"top_k": vocab},
        {"top_k": vocab + 9, "min_p": 1e-30},
        {"bias": [{3: 0.0}] * rows},
        {"bias": [{4: -0.0}] * rows, "min_p": 1e-30},
        {"history": [{3: 1, 7: 0}] * rows},
        {"history": [{}] * rows, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1},
    ]
    for options in neutral:
        assert_same_bits(sample(logits, make_batch(rows, **common, **options)), plain)
    forced = sample(logits, make_batch(rows, **common, forced=rng.integers(0, vocab, rows)))
    np.testing.assert_array_equal(forced.logprobs, forced.policy_logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_forced_token_is_judged_like_a_drawn_one(temperature):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(200, 700)).astype(np.float32)
    batch = replace(random_batch(200, 700, rng), forced=np.full(200, -1, np.int32))
    batch = replace(
        batch, temperature=np.where(batch.temperature > 0, batch.temperature, temperature).astype(np.float32)
    )
    drawn = sample(logits, batch)
    assert np.all(drawn.logprobs > -np.inf)
    assert_same_bits(sample(logits, replace(batch, forced=drawn.tokens)), drawn)


def test_forced_token_outside_the_support():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]] * 4, np.float32)
    result = sample(logits, make_batch(4, forced=[0, 1, 2, 3], top_k=2))
    assert np.all(np.isinf(result.logprobs[2:])) and np.all(np.isfinite(result.logprobs[:2]))
    assert np.all(np.isfinite(result.policy_logprobs))
    np.testing.assert_array_equal(result.tokens, [0, 1, 2, 3])


def test_temperature_zero():
    logits = np.array([[1.0, 4.0, 4.0, 0.0], [0.0, -0.0, -1.0, -2.0], [5.0, 4.0, 0.0, 1.0]], np.float32)
    batch = make_batch(3, temperature=0, top_p=0.5, bias=[{}, {}, {0: -np.inf}])
    result = sample(logits, batch)
    np.testing.assert_array_equal(result.tokens, [1, 0, 1])  # ties go to the lower id
    np.testing.assert_array_equal(result.logprobs, 0.0)
    at_one = sample(logits, make_batch(3, forced=result.tokens))
    np.testing.assert_array_equal(result.policy_logprobs, at_one.policy_logprobs)
    np.testing.assert_array_equal(result.entropy, at_one.entropy)
    other = sample(logits, replace(batch, forced=np.array([2, 0, 0], np.int32)))
    np.testing.assert_array_equal(other.logprobs, [-np.inf, 0.0, -np.inf])


def test_support_and_ties():
    assert support([1, 3, 3, 3], top_k=2) == [1, 2]
    assert support([1, 3, 3, 3], top_k=1) == [1]
    assert support([-0.0, 0.0, -1.0], top_k=1) == [0]
    assert support([-1.0, 0.0, -0.0], top_k=2) == [1, 2]
    assert support([0, 0, 0, 0], top_p=0.5) == [0, 1]
    assert support([0, 0, 0, 0], top_p=0.51) == [0, 1, 2]
    assert support([0, 0, 0, 0], top_k=2, top_p=0.5) == [0]  # of the mass that top-k kept
    assert support([2, 5, 5], top_p=1e-30) == [1]
    assert support([2, 5, 5], min_p=1.0) == [1, 2]
    assert support([0, np.log(0.5) + 1e-6, np.log(0.5) - 1e-6], min_p=0.5) == [0, 1]
    assert support([3, 2, 1, 0], top_k=3, bias=[{0: -np.inf}] * 4) == [1, 2, 3]


@pytest.mark.parametrize("values", ["one value", "two values"])
def test_long_ties_are_cut_by_id(values):
    """Runs of equal logits far longer than a vector or a bucket."""
    size = 2500
    logits = np.full(size, 1.5, np.float32)
    if values == "two values":
        logits[1::2] = 1.5 + 2**-20
    order = np.argsort(-logits, kind="stable")
    for count in (1, 16, 33, 1249, 1250, 1251, 2499):
        assert support(logits, top_k=count) == sorted(order[:count].tolist())


def test_penalties_and_bias_by_hand():
    logits = np.array([2.0, -2.0, 2.0, -2.0, 1.0, 0.5], np.float32)
    # 0, 1: prompt only; 2, 3: twice in the output; 4: biased and once in the output; 5: biased.
    options = {
        "history": [{0: 0, 1: 0, 2: 2, 3: 2, 4: 1}] * 6,
        "bias": [{4: 3.0, 5: 0.25}] * 6,
        "repetition_penalty": 2.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }
    x = np.array([1.0, -4.0, 1.0 - 0.5 - 0.5, -4.0 - 0.5 - 0.5, 2.0 - 0.5 - 0.25, 0.75])
    for temperature in (1.0, 0.5):
        result = logprobs_of_all(logits, temperature=temperature, **options)
        z = x / temperature
        np.testing.assert_allclose(result.logprobs, z - np.log(np.exp(z).sum()), rtol=1e-6, atol=1e-6)
        untouched = logprobs_of_all(logits, temperature=temperature)
        np.testing.assert_array_equal(result.policy_logprobs, untouched.policy_logprobs)


def test_raw_logprobs():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(60, 300)).astype(np.float32)
    batch = random_batch(60, 300, rng)
    result = sample(logits, batch)
    plain = sample(logits, make_batch(60, forced=result.tokens))
    np.testing.assert_array_equal(result.raw_logprobs, plain.policy_logprobs)
    assert sample(logits, replace(batch, want_raw=False)).raw_logprobs is None


@pytest.mark.parametrize("options", [{}, OPTIONS_ON, {"temperature": 0.0}, {"forced": 5}])
@pytest.mark.parametrize("place", [0, 37, 1029, 1999])
def test_rows_without_a_distribution(options, place):
    """They get token -1 and NaNs, and their neighbours the bits that they have without them."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(6, 2000)).astype(np.float32)
    logits[1, place], logits[2, place], logits[4, place] = np.nan, np.inf, -np.inf
    logits[3] = -np.inf
    everything = dict.fromkeys(range(2000), -np.inf)
    batch = make_batch(6, seed=np.arange(6), bias=[{}, {}, {}, {}, {}, everything], want_raw=True, **options)
    result = sample(logits, batch)
    bad, good = [1, 2, 3, 5], [0, 4]
    np.testing.assert_array_equal(result.tokens[bad], -1)
    for values in (result.logprobs, result.policy_logprobs, result.entropy, result.raw_logprobs):
        assert np.all(np.isnan(values[bad])) and np.all(np.isfinite(values[good]))
    alone = sample(np.ascontiguousarray(logits[good]), take_rows(batch, good))
    np.testing.assert_array_equal(result.tokens[good], alone.tokens)
    np.testing.assert_array_equal(result.logprobs[good], alone.logprobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": [1, -1, 1]}, r"temperature\[1\] must be finite and >= 0, got -1"),
        ({"temperature": [1, 1, np.nan]}, r"temperature\[2\]"),
        ({"top_k": [0, 0, -1]}, r"top_k\[2\]"),
        ({"top_p": [0, 1, 1]}, r"top_p\[0\] must be in \(0, 1\]"),
        ({"min_p": [0, 1.5, 1]}, r"min_p\[1\] must be in \[0, 1\]"),
        ({"repetition_penalty": [0, 1, 1]}, r"repetition_penalty\[0\]"),
        ({"presence_penalty": np.inf}, r"presence_penalty\[0\]"),
        ({"frequency_penalty": np.nan}, r"frequency_penalty\[0\]"),
        ({"forced": [1, 2, 8]}, r"forced\[2\] must be in \[-1, 8\), got 8"),
        ({"forced": [1, -2, 8]}, r"forced\[1\]"),
        ({"history": [{1: 0}, {}, {8: 1}]}, r"history_token\[1\]"),
        ({"history": [{1: -1}, {}, {}]}, r"history_count\[0\]"),
        ({"bias": [{-1: 0.0}, {}, {}]}, r"bias_token\[0\]"),
        ({"bias": [{1: np.nan}, {}, {}]}, r"bias_value\[0\]"),
        ({"bias": [{1: 1.0}, {}]}, "bias_start must have 4 entries, got 3"),
    ],
)
def test_refuses_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        sample(np.zeros((3, 8), np.float32), make_batch(3, **change))


def test_refuses_bad_arrays():
    logits = np.zeros((3, 8), np.float32)
    batch = make_batch(3)
    with pytest.raises(ValueError, match="seed must have 3 entries, got 2"):
        sample(logits, replace(batch, seed=batch.seed[:2]))
    with pytest.raises(ValueError, match=r"history_start\[2\] must be no less"):
        sample(logits, replace(batch, history_start=np.array([0, 1, 0, 0], np.int32)))
    with pytest.raises(ValueError, match="bias_start must run from 0 to 0"):
        sample(logits, replace(batch, bias_start=np.array([0, 0, 0, 5], np.int32)))
    with pytest.raises(ValueError, match="logits must have"):
        sample(np.zeros((3, 0), np.float32), batch)
    with pytest.raises(TypeError):
        sample(logits.astype(np.float64), batch)
    assert len(sample(np.zeros((0, 8), np.float32), make_batch(0)).tokens) == 0
    assert _cpu.num_threads() >= 1
