"""The trainer's report: exact logprobs are silent, one last bit alarms, and what need not agree is counted apart."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from tiny_engine import tiny_options, tiny_tensors

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import KLReport
from zerokl.rollout.mismatch import MismatchMonitor, ReportedTokens
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PARAMS = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
LOG = "zerokl.rollout.mismatch"


def perturbed(rollouts: list[Rollout]) -> list[Any]:
    """The rollouts' own logprobs but for the last bit of one."""
    logprobs = [rollout.policy_logprobs.copy() for rollout in rollouts]
    logprobs[1][3] = np.nextafter(logprobs[1][3], np.float32(0))
    return logprobs


def tokens_of(size: int = 4, **changes: Any) -> ReportedTokens:
    same = np.linspace(-2, -1, size, dtype=np.float32)
    fields: dict[str, Any] = {
        "trainer_logprobs": same,
        "rollout_logprobs": same,
        "policy_versions": np.zeros(size, np.int64),
        "inexact": np.zeros(size, np.uint8),
    }
    return ReportedTokens(**(fields | changes))


def test_exact_logprobs_are_silent_and_one_bit_alarms(engine: RolloutEngine, caplog: pytest.LogCaptureFixture) -> None:
    rollouts = engine.generate(["a", "hello"], PARAMS)
    alarmed: list[KLReport] = []
    remove = engine.on_k3_alarm(alarmed.append)
    packed = np.concatenate(engine.score(rollouts))
    with caplog.at_level(logging.WARNING, logger=LOG):
        assert str(engine.report_trainer_logprobs(rollouts, packed).k3_kl_mean) == "0.0"
        one = rollouts[0]
        assert engine.report_trainer_logprobs(one, [one.policy_logprobs]).num_tokens == 12
        assert not alarmed and not caplog.records, "exact logprobs do not alarm"
        report = engine.report_trainer_logprobs(rollouts, perturbed(rollouts))
    assert report.differing_logprobs == 1 and report.k3_kl_mean > 0 and alarmed == [report]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and vars(record)["differing_logprobs"] == 1
    facts = engine.telemetry()["mismatch"]
    assert (facts["reports"], facts["alarms"], facts["is_alarming"]) == (3, 1, True)
    assert facts["tokens"]["exact"] == 48 + 12 + 48 and facts["differing_logprobs"]["exact"] == 1
    assert facts["last"]["exact"] == report.to_dict()
    remove()
    engine.report_trainer_logprobs(rollouts, perturbed(rollouts))
    assert len(alarmed) == 1
    engine.report_trainer_logprobs(rollouts, packed)
    assert not engine.telemetry()["mismatch"]["is_alarming"]


def test_a_difference_too_small_for_k3_alarms_too() -> None:
    tiny = np.array([-1e-30, -1.0], np.float32)
    tokens = tokens_of(2, trainer_logprobs=np.array([-2e-30, -1.0], np.float32), rollout_logprobs=tiny)
    report, alarms = MismatchMonitor(0.0).report(tokens)
    assert report.k3_kl_mean == 0.0 and report.differing_logprobs == 1 and alarms


@pytest.mark.parametrize(("threshold", "alarms"), [(None, False), (1.0, False), (1e-9, True), (0.0, True)])
def test_the_threshold_decides(threshold: float | None, alarms: bool) -> None:
    off = tokens_of().rollout_logprobs + np.float32(1e-3)
    assert MismatchMonitor(threshold).report(tokens_of(trainer_logprobs=off))[1] is alarms


def test_what_need_not_agree_is_counted_apart() -> None:
    monitor = MismatchMonitor(0.0)
    same = tokens_of(6).rollout_logprobs
    off = same.copy()
    off[:4] += np.float32(0.1)
    versions = np.array([2, 2, 3, 3, 3, 3], np.int64)
    inexact = np.array([0, 0, 1, 1, 0, 0], np.uint8)
    mixed = tokens_of(6, trainer_logprobs=off, policy_versions=versions, inexact=inexact)
    report, alarms = monitor.report(mixed)
    assert not alarms and (report.num_tokens, report.k3_kl_mean, report.inexact) == (2, 0.0, False)
    facts = monitor.facts()
    assert facts["tokens"] == {"exact": 2, "inexact": 2, "other_version": 2}
    assert facts["differing_logprobs"] == {"exact": 0, "inexact": 2, "other_version": 2}
    assert facts["last"]["inexact"]["k3_kl_mean"] > 0
    # the negative control: by the forward's own version the first two must agree, and do not
    report, alarms = monitor.report(mixed, version=2)
    assert alarms and report.num_tokens == 2 and report.differing_logprobs == 2
    report, alarms = monitor.report(mixed, version=9)
    assert not alarms and report.inexact and report.num_tokens == 6


def test_tokens_of_tools_do_not_count(engine: RolloutEngine) -> None:
    session = engine.open_session("hello", seed=5)
    session.generate(SamplingParams(max_tokens=4, ignore_eos=True))
    session.append([5, 6, 7])
    session.generate(SamplingParams(max_tokens=3, ignore_eos=True))
    rollout = session.to_rollout()
    (logprobs,) = engine.score([rollout])
    report = engine.report_trainer_logprobs(rollout, [logprobs])
    assert report.num_tokens == 7 and report.k3_kl_mean == 0.0 and report.differing_logprobs == 0
    logprobs = logprobs.copy()
    logprobs[4:7] = 0.0  # of the tool
    assert engine.report_trainer_logprobs(rollout, [logprobs]).differing_logprobs == 0
    logprobs[7] -= 1.0
    assert engine.report_trainer_logprobs(rollout, [logprobs]).differing_logprobs == 1


def test_tokens_of_kept_keys_and_values_never_alarm(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate("a", dataclasses.replace(PARAMS, n=1))
    kept = dataclasses.replace(rollout, num_kept_updates=1)
    off = rollout.policy_logprobs + np.float32(0.01)
    assert engine.report_trainer_logprobs(kept, [off]).inexact
    assert engine.telemetry()["mismatch"]["alarms"] == 0
    assert not engine.report_trainer_logprobs(rollout, [off]).inexact
    assert engine.telemetry()["mismatch"]["alarms"] == 1


def test_a_hook_that_raises_is_logged(engine: RolloutEngine, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: KLReport) -> None:
        raise OSError("the pager is broken")

    seen: list[KLReport] = []
    engine.on_k3_alarm(fail)
    engine.on_k3_alarm(seen.append)
    rollouts = engine.generate("a", PARAMS)
    engine.report_trainer_logprobs(rollouts, perturbed(rollouts))
    assert len(seen) == 1 and "the pager is broken" in caplog.text
    assert engine.telemetry()["mismatch"]["hook_errors"] == 1


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (lambda good: good[:1], "logprobs must be one array for each of the 2 rollouts"),
        (lambda good: [good[0], good[1][:5]], r"logprobs\[1\] must have shape \(12,\).*got \(5,\)"),
        (lambda good: [good[0], good[1].astype(np.float64)], r"logprobs\[1\] must be a float32 array, got float64"),
        (lambda good: [good[0], good[1].tolist()], r"logprobs\[1\] must be a float32 array, got list"),
        (lambda good: np.concatenate(good)[:5], r"logprobs must have shape \(24,\).*got \(5,\)"),
        (lambda good: np.stack(good), "logprobs must be one array for each of the 2 rollouts, or one of all"),
        (lambda good: [good[0], np.full(12, np.nan, np.float32)], "must be finite, got nan at token 12"),
        (lambda good: [good[0], -np.full(12, np.inf, np.float32)], "trainer_logprobs must be finite, got -inf"),
        (lambda good: None, "logprobs must be one array"),
    ],
)
def test_what_does_not_fit_is_named(engine: RolloutEngine, logprobs: Any, message: str) -> None:
    rollouts = engine.generate("a", PARAMS)
    with pytest.raises(ValueError, match=message):
        engine.report_trainer_logprobs(rollouts, logprobs([one.policy_logprobs for one in rollouts]))
    assert engine.telemetry()["mismatch"]["reports"] == 0


def test_other_wrong_arguments(engine: RolloutEngine) -> None:
    with pytest.raises(ValueError, match="rollouts must hold at least one token"):
        engine.report_trainer_logprobs([], [])
    with pytest.raises(ValueError, match="rollouts must be a Rollout or a sequence"):
        engine.report_trainer_logprobs(["a"], [])  # type: ignore[list-item]
    rollouts = engine.generate("a", PARAMS)
    with pytest.raises(ValueError, match="version must be an integer >= 0, got -1"):
        engine.report_trainer_logprobs(rollouts, [one.policy_logprobs for one in rollouts], version=-1)
    with pytest.raises(ValueError, match="hook must be callable"):
        engine.on_k3_alarm(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k3_alarm must be None or a number >= 0, got -1"):
        tiny_options("x", k3_alarm=-1)  # type: ignore[arg-type]


def test_a_trainers_forward_of_new_weights_is_off(engine: RolloutEngine) -> None:
    """Another policy's logprobs are no trainer's of this one."""
    rollouts = engine.generate("a", PARAMS)
    engine.update_weights(tiny_tensors(1))
    assert engine.report_trainer_logprobs(rollouts, engine.score(rollouts)).k3_kl_mean > 0
    # said to be of the new version, they are another version's tokens
    assert engine.report_trainer_logprobs(rollouts, engine.score(rollouts), version=1).inexact
    assert engine.telemetry()["mismatch"]["alarms"] == 1
