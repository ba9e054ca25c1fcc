"""FastDeploy's #6680 and its revert, re-enacted: two ways to schedule the same arrivals, on our kernels and on others.

Requests arrive one per step. *Coupled* (#6680) takes one request a call and schedules when the forward has ended: each
joins the step after its arrival. *Collected* (#7791) gathers what arrives within a window and lets it join together.
With our kernels both give the trainer's bits. With kernels that depend on the batch, or are chosen by what else is in
it, the two schedules give two mismatches, and their ratio is a matter of scheduling alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from exactness_harness import Job
from ordinary_ops import MakeOps, OrdinaryOps, PhaseOps, engines_use

from gate.arrivals import trickled
from gate.measure import run_arrival
from gate.policies import GatePolicy
from zerokl.rollout.kl import KLReport, mismatch_kl

WINDOW = 8
"""Steps, and so arrivals, that the collecting schedule waits for."""

KERNELS: dict[str, MakeOps | None] = {
    "ours": None,
    "ordinary products": lambda num_threads: OrdinaryOps(num_threads=num_threads),
    "bfloat16 inputs in steps without a prompt": lambda num_threads: PhaseOps("decode", num_threads),
    "bfloat16 inputs in steps with a prompt": lambda num_threads: PhaseOps("prefill", num_threads),
}


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Both schedules on one kind of kernels."""

    policy: str
    kernels: str
    tokens: int
    coupled_k3_kl_mean: float
    collected_k3_kl_mean: float
    differing_logprobs: int
    """Of both schedules, against the trainer's forward."""
    coupled_prefill_steps: int
    collected_prefill_steps: int

    @property
    def k3_ratio(self) -> float | None:
        """Coupled over collected; None where the latter is 0."""
        return self.coupled_k3_kl_mean / self.collected_k3_kl_mean if self.collected_k3_kl_mean else None

    @property
    def passed(self) -> bool:
        """Our kernels must give 0; of others nothing is asked."""
        return self.kernels != "ours" or not (
            self.differing_logprobs or self.coupled_k3_kl_mean or self.collected_k3_kl_mean
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with ratio and verdict."""
        return asdict(self) | {"k3_ratio": self.k3_ratio, "passed": self.passed}


def tell(policy: GatePolicy, arrivals: int, tokens: int = 16) -> list[Chapter]:
    """The whole story: `arrivals` short prompts of one sample each, a multiple of WINDOW of them."""
    assert arrivals % WINDOW == 0, f"{arrivals} arrivals do not fill windows of {WINDOW}"
    random = np.random.default_rng(11)
    vocab_size = policy.trainers[0].config.vocab_size
    prompts = [random.integers(0, vocab_size, 2 + index % 7).astype(np.int32) for index in range(arrivals)]
    reader = replace(policy, job=Job(folder=policy.job.folder, prompts=prompts, n=1, max_tokens=tokens))
    return [_chapter(reader, kernels, make_ops) for kernels, make_ops in KERNELS.items()]


def _chapter(policy: GatePolicy, kernels: str, make_ops: MakeOps | None) -> Chapter:
    with nullcontext() if make_ops is None else engines_use(make_ops):
        coupled, coupled_steps = _mismatch(policy, group=1)
        collected, collected_steps = _mismatch(policy, group=WINDOW)
    return Chapter(
        policy=policy.name,
        kernels=kernels,
        tokens=coupled.num_tokens,
        coupled_k3_kl_mean=coupled.k3_kl_mean,
        collected_k3_kl_mean=collected.k3_kl_mean,
        differing_logprobs=coupled.differing_logprobs + collected.differing_logprobs,
        coupled_prefill_steps=coupled_steps,
        collected_prefill_steps=collected_steps,
    )


def _mismatch(policy: GatePolicy, group: int) -> tuple[KLReport, int]:
    """The mismatch KL and the number of prefill steps when `group` requests join together every `group` steps."""
    rollouts, counters = run_arrival(
        policy.job.options(), policy, lambda run: trickled(run, steps_between=group, together=group)
    )
    trainer = np.concatenate(policy.trainer_logprobs(rollouts))
    sampled = np.concatenate([rollout.policy_logprobs for rollout in rollouts])
    return mismatch_kl(trainer, sampled), int(counters["prefill_steps"])
