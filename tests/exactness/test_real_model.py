"""Exactness on SmolLM2-135M-Instruct: rollout == score() == the trainer's forward, however the engine works.

The default size is 8 prompts x 2 samples x 24 tokens; the tests marked `long` use 32 x 4 x 48.
"""

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

MIXED = list(SETTINGS.values())


@pytest.fixture(scope="module")
def plain(smollm2_job: Job) -> Outcome:
    return run(smollm2_job)


@pytest.fixture(scope="module")
def mixed(smollm2_job: Job) -> Outcome:
    """Every way to sample, in turn over the prompts."""
    return run(smollm2_job, MIXED)


@pytest.fixture(scope="module")
def policy_model(smollm2_job: Job) -> Any:
    from zerokl.integrations.policy_model import PolicyModel

    return PolicyModel.from_pretrained(smollm2_job.folder)


@pytest.mark.parametrize("run_name", ["plain", "mixed"])
def test_score_and_trainer_equal_the_rollout(run_name: str, policy_model: Any, request: pytest.FixtureRequest) -> None:
    outcome: Outcome = request.getfixturevalue(run_name)
    assert not any(score_differences(outcome).values())
    assert trainer_differences(outcome.rollouts, policy_model, pack=5) == NO_FORWARD_DIFFERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_plain_run(smollm2_job: Job, plain: Outcome, variant: str) -> None:
    outcome = run_variant(smollm2_job, variant)
    assert differences(outcome.rollouts, plain.rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


def test_a_variant_equals_the_plain_run_in_every_setting(smollm2_job: Job, mixed: Outcome) -> None:
    outcome = run_variant(smollm2_job, "tokens 100", MIXED, max_num_seqs=3)
    assert differences(outcome.rollouts, mixed.rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


# -- full size -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def long_plain(long_smollm2_job: Job) -> dict[str, Outcome]:
    return {name: run(long_smollm2_job, [setting]) for name, setting in SETTINGS.items()}


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_long_score_and_trainer_equal_the_rollout(
    long_plain: dict[str, Outcome], setting: str, policy_model: Any
) -> None:
    assert not any(score_differences(long_plain[setting]).values())
    assert trainer_differences(long_plain[setting].rollouts, policy_model, pack=8) == NO_FORWARD_DIFFERS


LONG_BATCHES = {f"batch {size}": {"max_num_seqs": size} for size in (1, 7, 32, 128)}
LONG_VARIANTS = [*LONG_BATCHES, *(name for name in VARIANTS if not name.startswith("batch"))]


@pytest.mark.long
@pytest.mark.parametrize("variant", LONG_VARIANTS)
def test_long_variants_equal_the_plain_run(long_smollm2_job: Job, long_plain: dict[str, Outcome], variant: str) -> None:
    outcome = run_variant(long_smollm2_job, variant, **LONG_BATCHES.get(variant, {}))
    assert differences(outcome.rollouts, long_plain["temperature 1"].rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


@pytest.mark.long
@pytest.mark.parametrize("variant", ["batch 7", "tokens 100", "preempted"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "temperature 1"])
def test_long_variants_equal_the_plain_run_in_every_setting(
    long_smollm2_job: Job, long_plain: dict[str, Outcome], setting: str, variant: str
) -> None:
    outcome = run_variant(long_smollm2_job, variant, [SETTINGS[setting]])
    assert differences(outcome.rollouts, long_plain[setting].rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())
