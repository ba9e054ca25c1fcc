"""The KL gate in short: both tiny policies, every variant of the matrix that takes no time, the negative controls.

`benchmarks/kl_gate.py` is the whole gate, on more tokens; the slow test runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from gate.arrivals import Arrival, aborted, at_once, trickled, updated
from gate.controls import CONTROLS, Control, run_control
from gate.measure import Variant, compare, differing_tokens, plain_runs, run_variant
from gate.policies import GatePolicy, Size, synthetic_policy
from gate.story import tell
from gate.variants import VARIANTS

from zerokl.rollout.model_runner import ModelRunner

ROOT = Path(__file__).resolve().parents[2]


KINDS = ("dense", "moe")


@pytest.fixture(scope="module", params=KINDS)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GatePolicy:
    made = synthetic_policy(request.param, tmp_path_factory.mktemp("gate") / request.param, Size())
    plain_runs(made)
    return made


@pytest.mark.parametrize(
    ("policy", "variant"),
    [
        pytest.param(kind, variant, id=f"{kind}-{variant.name}", marks=[] if variant.short else [pytest.mark.slow])
        for kind in KINDS
        for variant in VARIANTS
        if kind == "moe" or not variant.moe_only
    ],
    indirect=["policy"],
)
def test_a_variant_equals_the_trainer_and_did_take_place(policy: GatePolicy, variant: Variant) -> None:
    assert run_variant(policy, variant).failures == []


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_breach_is_found(policy: GatePolicy, control: Control) -> None:
    report = run_control(policy, control)
    assert report.caught
    assert report.differing_logprobs > 0


def test_a_variant_that_did_not_take_place_fails_by_name(policy: GatePolicy) -> None:
    idle = Variant(name="nothing is preempted", occurs=("steps", "preemptions"), absent=("result_rows",))
    report = run_variant(policy, idle)
    assert not report.differing_logprobs
    assert report.failures == [
        "preemptions is 0: it did not occur",
        f"result_rows is {report.factors['result_rows']}, not 0",
    ]
    assert not report.to_dict()["passed"]


@pytest.mark.parametrize("arrival", [at_once, trickled, aborted, updated])
def test_an_engine_that_fails_fails_the_variant(policy: GatePolicy, arrival: Arrival) -> None:
    with mock.patch.object(ModelRunner, "execute", side_effect=RuntimeError("a broken kernel")):
        report = run_variant(policy, Variant(name="broken", arrival=arrival))
    assert "a broken kernel" in report.missing[0]
    assert report.differing_tokens > 0


def test_lost_and_changed_tokens_are_counted(policy: GatePolicy) -> None:
    rollouts = list(policy.plain[0].values())
    assert differing_tokens(policy, rollouts) == 0
    assert differing_tokens(policy, rollouts[1:]) == policy.job.max_tokens
    short = replace(rollouts[0], token_ids=rollouts[0].token_ids[:5])
    assert differing_tokens(policy, [short, *rollouts[1:]]) == policy.job.max_tokens - 5
    wrong = replace(rollouts[0], policy_logprobs=rollouts[1].policy_logprobs)
    report = compare("one rollout with another's logprobs", policy, [wrong, *rollouts[1:]])
    assert report.differing_logprobs > 0
    assert report.failures
    assert compare("nothing", policy, []).failures


def test_the_schedule_is_no_part_of_our_numbers_and_of_others_it_is(policy: GatePolicy) -> None:
    ours, *others = tell(policy, arrivals=32)
    assert ours.passed
    assert (ours.coupled_k3_kl_mean, ours.collected_k3_kl_mean, ours.differing_logprobs) == (0, 0, 0)
    assert ours.collected_prefill_steps < ours.coupled_prefill_steps
    for chapter in others:
        assert chapter.coupled_k3_kl_mean != chapter.collected_k3_kl_mean, chapter.kernels


@pytest.mark.slow
def test_the_whole_gate() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kl_gate.py", "--json"], env=environment, capture_output=True, text=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert done.returncode == 0, done.stderr
    assert all(control["caught"] for control in report["negative_controls"])
