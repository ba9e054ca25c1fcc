"""One variant, run and held against the trainer's forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from exactness_harness import differing

from gate.arrivals import Arrival, Run, at_once
from gate.policies import GatePolicy, Key
from gate.step_watch import StepWatch
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineFailedError, WorkerError
from zerokl.rollout.kl import mismatch_kl
from zerokl.rollout.outputs import Rollout
from zerokl.weight_sync import WeightPublisher


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to schedule the job. Options are changes of the plain run's engine."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    arrival: Arrival = at_once
    occurs: tuple[str, ...] = ("steps",)
    """Counters that must be above 0, or the variant was not tried."""
    absent: tuple[str, ...] = ()
    """Counters that must be 0."""
    moe_only: bool = False
    tight_pool: bool = False
    """Room for the longest request and little else."""
    short: bool = True
    """Whether it is among those that the suite runs."""


@dataclass(kw_only=True)
class VariantReport:
    """The mismatch between rollouts and trainer under one variant, and what proves that it took place."""

    name: str
    tokens: int
    k3_kl_mean: float
    k3_kl_p99: float
    k3_kl_max: float
    differing_logprobs: int
    """Tokens whose logprob in the rollout has other bits than the trainer's."""
    differing_tokens: int
    """Tokens that are not the plain run's, missing ones included."""
    factors: dict[str, float]
    """The counters that the variant must bring about, or avoid."""
    missing: list[str]
    """Those of them that are not as they must be."""
    seconds: float

    @property
    def failures(self) -> list[str]:
        """Why the gate does not let this pass; empty if it does."""
        figures = ("k3_kl_mean", "k3_kl_p99", "k3_kl_max", "differing_logprobs", "differing_tokens")
        wrong = [f"{name} is {getattr(self, name)}" for name in figures if getattr(self, name) != 0]
        none = [] if self.tokens else ["no token was sampled"]
        return wrong + none + self.missing

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        return asdict(self) | {"passed": not self.failures}


def plain_runs(policy: GatePolicy) -> None:
    """Sample the job under both versions of the weights, everything in one call, one engine, one rank."""
    with RolloutEngine(policy.job.options()) as engine, WeightPublisher() as publisher:
        run = Run(policy, engine, StepWatch(engine))
        policy.plain = [by_key(run.generate(run.everything))]
        engine.update_weights(policy.publish(publisher, version=1))
        policy.plain.append(by_key(run.generate(run.everything)))
        run.close()


def by_key(rollouts: Sequence[Rollout]) -> dict[Key, Rollout]:
    return {(rollout.prompt_index, rollout.sample_index): rollout for rollout in rollouts}


def engine_options(policy: GatePolicy, variant: Variant) -> EngineConfig:
    """Of the variant's engine."""
    changes = dict(variant.options)
    if variant.tight_pool:
        job, block_size = policy.job, 8
        longest = max(map(len, job.prompts)) + job.max_tokens
        changes |= {"block_size": block_size, "num_blocks": 4 + longest // block_size}
    return policy.job.options(**changes)


def run_variant(policy: GatePolicy, variant: Variant) -> VariantReport:
    """Run the job under the variant and compare: with the trainer's forward, and with the plain run's tokens."""
    start = time.perf_counter()
    name = f"{policy.name}: {variant.name}"
    options = engine_options(policy, variant)
    try:
        rollouts, counters = run_arrival(options, policy, variant.arrival)
    except (EngineFailedError, WorkerError) as error:
        report = compare(name, policy, [])
        report.missing = [f"the engine failed: {error}"]
        return report
    report = compare(name, policy, rollouts)
    report.factors = {name: counters.get(name, 0) for name in (*variant.occurs, *variant.absent)}
    report.missing = [f"{name} is 0: it did not occur" for name in variant.occurs if not report.factors[name]]
    report.missing += [f"{name} is {report.factors[name]}, not 0" for name in variant.absent if report.factors[name]]
    if counters["busy_ranks"] < options.num_ranks:
        report.missing.append(f"busy_ranks is {counters['busy_ranks']} of {options.num_ranks}")
    report.seconds = time.perf_counter() - start
    return report


def run_arrival(options: EngineConfig, policy: GatePolicy, arrival: Arrival) -> tuple[list[Rollout], dict[str, float]]:
    """The job on an engine of its own: its rollouts, and all that was counted."""
    with RolloutEngine(options) as engine:
        run = Run(policy, engine, StepWatch(engine))
        try:
            rollouts = arrival(run)
        finally:
            run.close()
        routed = [rollout.routing for rollout in rollouts if rollout.routing is not None]
        run.factors["replayed_tokens"] = sum(len(routing.experts) for routing in routed)
        return rollouts, {**engine.metrics(), **run.watch.factors(), **run.factors}


def compare(name: str, policy: GatePolicy, rollouts: Sequence[Rollout]) -> VariantReport:
    """The figures of some rollouts, without factors."""
    trainer = policy.trainer_logprobs(rollouts)
    p = np.concatenate([np.zeros(0, np.float32), *trainer])
    q = np.concatenate([np.zeros(0, np.float32), *(rollout.policy_logprobs for rollout in rollouts)])
    kl = mismatch_kl(p, q) if len(p) else None
    return VariantReport(
        name=name,
        tokens=len(q),
        k3_kl_mean=kl.k3_kl_mean if kl else 0.0,
        k3_kl_p99=kl.k3_kl_p99 if kl else 0.0,
        k3_kl_max=kl.k3_kl_max if kl else 0.0,
        differing_logprobs=differing(p, q),
        differing_tokens=differing_tokens(policy, rollouts),
        factors={},
        missing=[],
        seconds=0.0,
    )


def differing_tokens(policy: GatePolicy, rollouts: Sequence[Rollout]) -> int:
    """Tokens unlike the plain run's under the same weights; an aborted rollout is compared as far as it got."""
    count = 0
    complete = set()
    for rollout in rollouts:
        key = (rollout.prompt_index, rollout.sample_index)
        version = int(rollout.policy_versions[0]) if len(rollout.policy_versions) else 0
        expected = policy.plain[version][key].token_ids
        if rollout.finish_reason == "abort":
            expected = expected[: len(rollout.token_ids)]
        else:
            complete.add(key)
        count += differing(rollout.token_ids, expected)
    lost = policy.plain[0].keys() - complete
    return count + sum(len(policy.plain[0][key].token_ids) for key in lost)
