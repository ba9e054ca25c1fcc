"""Exactness on a tiny random model: every way to sample, every way to run the engine, one set of bits."""

from __future__ import annotations

from typing import Any

import pytest
from exactness_harness import (
    NO_FORWARD_DIFFERS,
    NONE_DIFFER,
    SETTINGS,
    VARIANTS,
    Job,
    Outcome,
    differences,
    run,
    run_variant,
    score_differences,
    trainer_differences,
)


@pytest.fixture(scope="module")
def plain(tiny_job: Job) -> dict[str, Outcome]:
    """The plain run of each setting."""
    return {name: run(tiny_job, [setting]) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="module")
def policy_model(tiny_job: Job) -> Any:
    from zerokl.integrations.policy_model import PolicyModel

    return PolicyModel.from_pretrained(tiny_job.folder)


@pytest.mark.parametrize("setting", SETTINGS)
def test_score_and_trainer_equal_the_rollout(plain: dict[str, Outcome], setting: str, policy_model: Any) -> None:
    assert not any(score_differences(plain[setting]).values())
    for pack in (1, 3, 16):
        assert trainer_differences(plain[setting].rollouts, policy_model, pack) == NO_FORWARD_DIFFERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_plain_run(tiny_job: Job, plain: dict[str, Outcome], variant: str) -> None:
    outcome = run_variant(tiny_job, variant)
    assert differences(outcome.rollouts, plain["temperature 1"].rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


@pytest.mark.parametrize("variant", ["batch 3", "tokens 16", "preempted", "cache warm"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "temperature 1"])
def test_variants_equal_the_plain_run_in_every_setting(
    tiny_job: Job, plain: dict[str, Outcome], variant: str, setting: str
) -> None:
    outcome = run_variant(tiny_job, variant, [SETTINGS[setting]])
    assert differences(outcome.rollouts, plain[setting].rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


def test_settings_do_not_disturb_each_other_in_a_batch(tiny_job: Job, plain: dict[str, Outcome]) -> None:
    names = list(SETTINGS)
    mixed = run(tiny_job, list(SETTINGS.values()))
    expected = [
        plain[names[rollout.prompt_index % len(names)]].rollouts[index] for index, rollout in enumerate(mixed.rollouts)
    ]
    assert differences(mixed.rollouts, expected) == NONE_DIFFER
    assert not any(score_differences(mixed).values())


def test_a_worker_process_gives_the_same_bits(tiny_job: Job, plain: dict[str, Outcome]) -> None:
    outcome = run(tiny_job, worker="process")
    assert differences(outcome.rollouts, plain["temperature 1"].rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())
