"""Draws follow the stated distribution, and stated log-probabilities add up to one."""

import numpy as np
import pytest
from sampling_rig import logprobs_of_all, make_batch, sample
from scipy.stats import chisquare

from zerokl.kernels.reference.sampling import row_distribution

DRAWS = 100_000
VOCAB = 120
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1.6},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "penalties and bias": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "history": {1: 0, 5: 2, 9: 1, 30: 4},
        "bias": {2: 1.5, 7: -np.inf, 8: -1.0},
        "top_p": 0.97,
    },
}


def one_row(rng, vocab=VOCAB):
    return rng.normal(scale=1.5, size=vocab).astype(np.float32)


def batch_of(rows, setting, **extra):
    ragged = {name: [setting[name]] * rows for name in ("history", "bias") if name in setting}
    return make_batch(rows, **{**setting, **ragged, **extra})


def p_value(tokens, probabilities):
    """Of Pearson's test; tokens expected less than five times are counted together."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    assert np.all(counts[probabilities == 0] == 0)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    present = wanted > 0
    return chisquare(observed[present], wanted[present]).pvalue


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_exact_probabilities(name):
    row = one_row(np.random.default_rng(0))
    exact = row_distribution(row, batch_of(1, SETTINGS[name]), 0)
    assert exact is not None
    logits = np.ascontiguousarray(np.broadcast_to(row, (DRAWS, VOCAB)))
    positions = np.arange(DRAWS) % 5000
    drawn = sample(
        logits, batch_of(DRAWS, SETTINGS[name], seed=11, sample_index=np.arange(DRAWS) // 5000, position=positions)
    )
    assert p_value(drawn.tokens, np.exp(exact.logprobs)) > 1e-3
    np.testing.assert_allclose(drawn.logprobs, exact.logprobs[drawn.tokens], rtol=2e-6, atol=2e-6)


def test_control_the_test_sees_a_wrong_temperature():
    row = one_row(np.random.default_rng(0))
    exact = row_distribution(row, make_batch(1, temperature=0.95), 0)
    assert exact is not None
    logits = np.ascontiguousarray(np.broadcast_to(row, (DRAWS, VOCAB)))
    drawn = sample(logits, make_batch(DRAWS, position=np.arange(DRAWS)))
    assert p_value(drawn.tokens, np.exp(exact.logprobs)) < 1e-6


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocab", [VOCAB, 2049])
def test_probabilities_add_up_to_one(name, vocab):
    row = one_row(np.random.default_rng(1), vocab)
    setting = SETTINGS[name]
    ragged = {key: [setting[key]] * vocab for key in ("history", "bias") if key in setting}
    result = logprobs_of_all(row, **{**setting, **ragged})
    for logprobs in (result.logprobs, result.policy_logprobs):
        assert abs(np.exp(logprobs.astype(np.float64)).sum() - 1) < 1e-5
    p = np.exp(result.policy_logprobs.astype(np.float64))
    assert abs(-np.sum(p * result.policy_logprobs) - result.entropy[0]) < 1e-5


def test_probabilities_add_up_to_one_at_a_real_vocabulary():
    vocab, count = 49152, 2000
    row = one_row(np.random.default_rng(2), vocab)
    first = np.argsort(-row, kind="stable")[: count + 1]
    logits = np.ascontiguousarray(np.broadcast_to(row, (count + 1, vocab)))
    logprobs = sample(logits, make_batch(count + 1, forced=first, top_k=count)).logprobs
    assert logprobs[-1] == -np.inf
    assert abs(np.exp(logprobs.astype(np.float64)).sum() - 1) < 1e-5
