"""The chaos run in short, on a real `rollout-server` of four ranks; and runs that must fail.

`benchmarks/chaos.py` is the whole run, of 10 minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos_run.breached_server import BREACHES
from chaos_run.layouts import LAYOUTS
from chaos_run.run import ChaosOptions, ChaosReport, run_chaos
from chaos_run.traffic import Asked, streamed_wrong
from chaos_run.verdict import Verdict, compare, count_answers

from zerokl.rollout.client_calls import TokenChunk
from zerokl.rollout.sampling_params import SamplingParams

CHANGES = ("pause", "update", "broken_update", "trainer_killed", "client_killed", "rank_kill", "rank_stop")


def expect_survived(report: ChaosReport, kinds: tuple[str, ...]) -> None:
    """The run passed, and faults of these kinds were among what it survived."""
    assert report.failures == [] and report.leaks == [], report.evidence
    assert report.requests == report.answered_once == report.bit_equal > 0
    assert report.lacking(kinds) == []


def test_a_short_run(tmp_path: Path) -> None:
    options = ChaosOptions(seconds=3.0, until=CHANGES, seed=0, layout="moe")
    expect_survived(run_chaos(options, tmp_path), CHANGES)


def test_a_short_run_without_updates_is_the_undisturbed_one(tmp_path: Path) -> None:
    kinds = ("pause", "abort", "client_killed", "rank_kill")
    report = run_chaos(ChaosOptions(seconds=3.0, until=kinds, seed=2, updates=False), tmp_path)
    expect_survived(report, kinds)
    assert not any("update" in kind for kind in report.faults)


def test_breaches_are_found(tmp_path: Path) -> None:
    """A lost answer, a segment and a process left behind, and KV of a lost rank that is taken to be there."""
    options = ChaosOptions(
        seconds=1.0,
        until=("rank_kill",),
        seed=8,
        updates=False,
        breach=",".join(BREACHES),
        answer_seconds=2.0,
        idle_seconds=0.5,
    )
    report = run_chaos(options, tmp_path)
    assert report.bit_equal < report.answered_once < report.requests
    assert [line for line in report.failures if "were not answered once" in line]
    assert [line for line in report.failures if "are not those of a fresh engine" in line]
    assert sorted(leak.split()[0] for leak in report.leaks if leak.startswith(("segment /", "process "))) == [
        "process",
        "segment",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_minute(layout: str, tmp_path: Path) -> None:
    expect_survived(run_chaos(ChaosOptions(seconds=60.0, until=CHANGES, seed=5, layout=layout), tmp_path), CHANGES)


# -- the verdict itself -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Asked]]:
    """A model, and calls that a plain engine has answered."""
    layout = LAYOUTS["dense"]
    model = layout.write(tmp_path_factory.mktemp("chaos") / "model")
    asked = [
        Asked(prompts=[[1, 2, 3], [4]], params=[SamplingParams(n=2, max_tokens=12, seed=seed)] * 2) for seed in range(3)
    ]
    with layout.plain_engine(model) as engine:
        for one in asked:
            one.answers.append(engine.generate(one.prompts, one.params))
    return model, asked


def judged(answered: tuple[Path, list[Asked]], changed: Any = None) -> Verdict:
    """The verdict, with another first rollout."""
    model, asked = answered
    if changed is not None:
        first = asked[0]
        answers = [[changed, *first.answers[0][1:]]] if changed else [first.answers[0][1:]]
        asked = [replace(first, answers=answers), *asked[1:]]
    verdict = count_answers(asked)
    compare(verdict, LAYOUTS["dense"], model, asked, [], [], last_version=0)
    return verdict


def test_good_answers_pass(answered: tuple[Path, list[Asked]]) -> None:
    verdict = judged(answered)
    assert (verdict.requests, verdict.answered_once, verdict.bit_equal, verdict.wrong) == (12, 12, 12, [])


@pytest.mark.parametrize("column", ["logprobs", "policy_logprobs", "entropy", "token_ids"])
def test_one_changed_value_is_found(answered: tuple[Path, list[Asked]], column: str) -> None:
    rollout = answered[1][0].answers[0][0]
    values = getattr(rollout, column).copy()
    values.view(np.int32)[5] ^= 1
    verdict = judged(answered, replace(rollout, **{column: values}))
    assert verdict.bit_equal == 11 and verdict.evidence[0]["places"][0] == 5


def test_short_missing_doubled_and_strange_answers_are_found(answered: tuple[Path, list[Asked]]) -> None:
    rollout = answered[1][0].answers[0][0]
    names = ("token_ids", "logprobs", "policy_logprobs", "entropy", "policy_versions")
    short = {name: getattr(rollout, name)[:8] for name in (*names, "steps", "phases", "cached_lens", "ranks")}
    assert judged(answered, replace(rollout, **short)).bit_equal == 11
    assert judged(answered, replace(rollout, **short, finish_reason="abort")).bit_equal == 12, "a prefix is right"
    assert judged(answered, replace(rollout, policy_versions=rollout.policy_versions + 1)).bit_equal == 11
    assert judged(answered, ()).answered_once == 11
    doubled = [replace(answered[1][0], answers=answered[1][0].answers * 2)]
    assert count_answers(doubled).answered_once == 0


def test_a_stream_that_lost_a_token_is_found(answered: tuple[Path, list[Asked]]) -> None:
    rollout = answered[1][0].answers[0][0]

    def chunk(start: int, end: int) -> TokenChunk:
        names = ("token_ids", "logprobs", "policy_logprobs", "policy_versions")
        columns = {name: getattr(rollout, name)[start:end] for name in names}
        return TokenChunk(index=0, start=start, num_restarts=0, **columns)

    assert streamed_wrong([chunk(0, 5), chunk(5, 12)], [rollout]) == 0
    assert streamed_wrong([chunk(0, 5), chunk(6, 12)], [rollout]) > 0
