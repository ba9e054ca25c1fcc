"""Exactness of mixtures of experts: the tiny job on both families, every way to run the engine, one set of bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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
from tiny_engine import VOCAB_SIZE, write_byte_tokenizer

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.rollout import model_runner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config

FAMILIES = ("Qwen3MoeForCausalLM", "Ernie4_5_MoeForCausalLM")


def make_job(folder: Path, prompts: Any, family: str) -> Job:
    content = tiny_moe_config(family, vocab_size=VOCAB_SIZE, hidden_size=64, eos_token_id=256)
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), gain=2.0))
    write_byte_tokenizer(folder)
    return Job(folder=folder, prompts=prompts, n=2, max_tokens=24, return_routing="all")


@pytest.fixture(scope="module", params=FAMILIES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_job: Job) -> Job:
    return make_job(tmp_path_factory.mktemp("moe"), tiny_job.prompts, request.param)


@pytest.fixture(scope="module")
def plain(job: Job) -> Outcome:
    return run(job)


@pytest.mark.parametrize("setting", ["temperature 1", "penalties", "temperature 0"])
def test_score_and_trainer_equal_the_rollout(job: Job, setting: str) -> None:
    from zerokl.integrations.policy_model import PolicyModel

    outcome, model = run(job, [SETTINGS[setting]]), PolicyModel.from_pretrained(job.folder)
    assert not any(score_differences(outcome).values())
    for pack in (1, 3, 16):
        assert trainer_differences(outcome.rollouts, model, pack) == NO_FORWARD_DIFFERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_plain_run(job: Job, plain: Outcome, variant: str) -> None:
    outcome = run_variant(job, variant)
    assert differences(outcome.rollouts, plain.rollouts) == NONE_DIFFER
    assert not any(score_differences(outcome).values())


def test_a_worker_process_gives_the_same_bits(job: Job, plain: Outcome) -> None:
    assert differences(run(job, worker="process").rollouts, plain.rollouts) == NONE_DIFFER


class OrdinaryExperts(CpuOps):
    """CpuOps with NumPy's matrix products inside the experts, and nowhere else."""

    def pack_experts(self, count: int, experts: Any) -> Any:
        return [tuple(np.array(matrix) for matrix in expert) for expert in experts]

    def moe(self, x: Any, routing: Any, experts: Any, shared: Any) -> Any:
        out = np.zeros_like(x) if shared is None else np.array(shared)
        for index, (gate, up, down) in enumerate(experts):
            tokens, slots = np.nonzero(routing.experts == index)
            rows = x[tokens]
            hidden = rows @ gate.T
            hidden = hidden / (1 + np.exp(-hidden)) * (rows @ up.T)
            out[tokens] += routing.weights[tokens, slots, None] * (hidden @ down.T)
        return out


def test_ordinary_products_in_the_experts_are_found_out(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "get_ops", lambda device, num_threads, *given: OrdinaryExperts(num_threads))
    plain = run(job)
    assert differences(plain.rollouts, run(job).rollouts) == NONE_DIFFER, "the same run repeats its bits"
    assert score_differences(plain)["policy_logprobs"] > 0
    for variant in ("batch 1", "tokens 16", "preempted"):
        assert differences(run_variant(job, variant).rollouts, plain.rollouts)["policy_logprobs"] > 0, variant
