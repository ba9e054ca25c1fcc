import math

import numpy as np
import pytest

from zerokl.rollout.kl import correction_weights, importance_ratios, kl_estimates, kl_report, mismatch_kl, reference_kl


def test_estimates_by_hand():
    k1, k2, k3 = kl_estimates([-1.0, -2.0], [-1.5, -1.0])
    np.testing.assert_allclose(k1, [-0.5, 1.0])
    np.testing.assert_allclose(k2, [0.125, 0.5])
    np.testing.assert_allclose(k3, [math.exp(0.5) - 1.5, math.exp(-1.0)])


def test_equal_logprobs_give_exact_zeros():
    logprobs = -np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    report = mismatch_kl(logprobs, logprobs.copy())
    assert str(report.k3_kl_mean) == str(report.k1_kl_mean) == "0.0"
    assert (report.k3_kl_p99, report.k3_kl_max, report.probs_diff_max, report.differing_logprobs) == (0, 0, 0, 0)


def test_one_ulp_is_seen():
    logprobs = np.full(1000, -0.7, np.float32)
    other = logprobs.copy()
    other[17] = np.nextafter(other[17], np.float32(0))
    report = mismatch_kl(other, logprobs)
    assert report.differing_logprobs == 1
    assert report.k3_kl_mean > 0
    assert report.k3_kl_max > report.k3_kl_p99 == 0


def test_mask_selects_tokens():
    report = kl_report([-1.0, -9.0, -1.0], [-1.0, -1.0, -2.0], mask=[1, 0, 1])
    assert report.num_tokens == 2
    assert report.k3_kl_mean == pytest.approx((math.e - 2) / 2)
    assert report.metrics()["rollout_corr/k3_kl"] == report.k3_kl_mean


def test_reference_kl_is_unbiased_for_the_true_divergence():
    rng = np.random.default_rng(1)
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = rng.choice(3, size=400_000, p=q)
    report = reference_kl(np.log(p)[drawn], np.log(q)[drawn])
    assert report.k3_kl_mean == pytest.approx(float((q * np.log(q / p)).sum()), rel=0.02)


def test_ratio_levels():
    trainer, rollout, bounds = [-1.0, -1.0, -3.0], [-1.5, -0.5, -2.0], [0, 2, 3]
    np.testing.assert_allclose(importance_ratios(trainer, rollout, bounds), np.exp([0.5, -0.5, -1.0]))
    np.testing.assert_allclose(importance_ratios(trainer, rollout, bounds, "sequence"), np.exp([0.0, 0.0, -1.0]))
    np.testing.assert_allclose(importance_ratios([-1, -2], [-2, -4], [0, 2], "geometric"), np.exp([1.5, 1.5]))


def test_corrections():
    ratios = [0.1, 1.0, 5.0]
    np.testing.assert_allclose(correction_weights(ratios, "truncate", upper=2.0), [0.1, 1.0, 2.0])
    np.testing.assert_allclose(correction_weights(ratios, "mask", upper=2.0, lower=0.5), [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_report([1.0], [1.0, 2.0]), r"\(1,\) and \(2,\)"),
        (lambda: kl_report([0.0, np.nan], [0.0, 0.0]), "index 1"),
        (lambda: kl_report([0.0], [0.0], mask=[0]), "no token"),
        (lambda: kl_report([0.0], [0.0], mask=[1, 1]), "mask"),
        (lambda: importance_ratios([0.0], [0.0], [0, 2], "sequence"), "cu_seqlens"),
        (lambda: importance_ratios([0.0], [0.0], [0, 1], "word"), "'word'"),
        (lambda: correction_weights([1.0], "truncate", upper=0.0), "upper=0.0"),
        (lambda: correction_weights([1.0], "clip"), "'clip'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
