"""The gradient of policy_logprobs and entropy with respect to the logits."""

import numpy as np
import pytest
from sampling_rig import make_batch, sample

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.reference.sampling import entropy_of, log_softmax, log_softmax_backward


def case(rows, vocab, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    temperature = rng.choice([1.0, 0.6, 0.0], rows).astype(np.float32)
    return logits, targets, temperature, *rng.normal(size=(2, rows)).astype(np.float32)


def gradient(logits, *args):
    out = logits.copy()
    _cpu.log_softmax_backward(out, *args)
    return out


def test_definition_matches_finite_differences():
    logits, targets, temperature, dlogprob, dentropy = (x.astype(np.float64) for x in case(4, 9))
    targets = targets.astype(np.int32)

    def loss(x):
        logprobs = log_softmax(x / np.where(temperature > 0, temperature, 1)[:, None])
        chosen = logprobs[np.arange(4), targets]
        return float(
            np.sum(dlogprob * chosen) + sum(d * entropy_of(row) for d, row in zip(dentropy, logprobs, strict=True))
        )

    exact, step = log_softmax_backward(logits, targets, temperature, dlogprob, dentropy), 1e-6
    for row, column in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[row, column] += step
        down[row, column] -= step
        assert abs((loss(up) - loss(down)) / (2 * step) - exact[row, column]) < 1e-7


@pytest.mark.parametrize("vocab", [1, 7, 16, 1000, 1025, 49152])
def test_agrees_with_definition(vocab):
    logits, targets, temperature, dlogprob, dentropy = case(6, vocab)
    args = (targets, temperature, dlogprob, dentropy)
    expected = log_softmax_backward(logits.astype(np.float64), *args)
    np.testing.assert_allclose(gradient(logits, *args), expected, rtol=2e-5, atol=2e-6)


def test_same_bits_for_any_batch_threads_and_instruction_set():
    logits, *args = case(300, 333)
    threads, instruction_set = _cpu.num_threads(), _cpu.instruction_set()
    whole = gradient(logits, *args)
    for count in range(1, 301, 7):
        part = gradient(logits[-count:], *(a[-count:] for a in args))
        np.testing.assert_array_equal(part, whole[-count:])
    try:
        for count in (1, 2, 3):
            _cpu.set_num_threads(count)
            np.testing.assert_array_equal(gradient(logits, *args), whole)
        for name in _cpu.instruction_sets():
            _cpu.set_instruction_set(name)
            np.testing.assert_array_equal(gradient(logits, *args), whole)
    finally:
        _cpu.set_num_threads(threads)
        _cpu.set_instruction_set(instruction_set)


def test_rows_of_minus_infinity_and_nan():
    logits, targets, temperature, dlogprob, dentropy = case(3, 50)
    targets[:] = 3
    logits[0, 10] = -np.inf
    logits[1, 20] = np.nan
    out = gradient(logits, targets, temperature, dlogprob, dentropy)
    assert np.all(np.isfinite(out[[0, 2]])) and out[0, 10] == 0
    assert np.all(np.isnan(out[1]))


def test_agrees_with_forward_through_a_small_step():
    """A step along the gradient raises the forward's own logprob by |gradient|^2 times the step."""
    logits, targets, temperature, _, _ = case(5, 400)
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    g = gradient(logits, targets, temperature, ones, zeros)
    step = np.float32(1e-2)
    batch = make_batch(5, forced=targets, temperature=temperature)
    change = sample(logits + step * g, batch).policy_logprobs - sample(logits, batch).policy_logprobs
    np.testing.assert_allclose(change, step * np.sum(g * g, axis=1), rtol=0.05)


def test_refuses_bad_arrays():
    logits, targets, temperature, dlogprob, dentropy = case(3, 8)
    with pytest.raises(ValueError, match=r"targets\[1\] must be in \[0, 8\), got -1"):
        gradient(logits, np.array([0, -1, 2], np.int32), temperature, dlogprob, dentropy)
    with pytest.raises(ValueError, match="dentropy must have 3 entries, got 2"):
        gradient(logits, targets, temperature, dlogprob, dentropy[:2])
    with pytest.raises(ValueError, match="temperature"):
        gradient(logits, targets, np.array([1, np.inf, 1], np.float32), dlogprob, dentropy)
