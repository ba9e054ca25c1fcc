"""Runs of one job under different engine options, and the count of values in which two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.worker import Worker

Ids = NDArray[np.int32]

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 40": {"top_k": 40},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "temperature 0": {"temperature": 0.0},
}
"""Ways to sample; each must be as exact as the first."""


VARIANTS: dict[str, dict[str, Any]] = {
    "batch 1": {"max_num_seqs": 1},
    "batch 3": {"max_num_seqs": 3},
    "batch 7": {"max_num_seqs": 7},
    "tokens 16": {"max_num_batched_tokens": 16},
    "tokens 100": {"max_num_batched_tokens": 100},
    "block 8": {"block_size": 8},
    "block 64": {"block_size": 64, "num_blocks": 256},
    "cache off": {"enable_prefix_caching": False},
    "cache warm": {},
    "preempted": {"block_size": 8},
    "other order": {},
    "1 thread": {"num_threads": 1},
}
"""Ways to run an engine, each apart from the plain one (`Job.options`) in one thing. `run_variant` adds what depends on
the job. The plain run has all of a small job in one batch, so its 16 sequences are batch 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts to sample from, with the seed of each fixed by its place in the job."""

    folder: Path
    prompts: Sequence[Ids]
    n: int
    max_tokens: int
    return_routing: str = "none"

    def params(self, settings: Sequence[dict[str, Any]]) -> list[SamplingParams]:
        """One per prompt, the settings in turn."""
        chosen = [settings[index % len(settings)] for index in range(len(self.prompts))]
        return [
            SamplingParams(n=self.n, max_tokens=self.max_tokens, ignore_eos=True, seed=1000 + index, **one)
            for index, one in enumerate(chosen)
        ]

    def options(self, **changes: Any) -> EngineConfig:
        """The plain way to run the job; `changes` make a variant."""
        plain: dict[str, Any] = {"block_size": 16, "num_blocks": 1024, "max_num_seqs": 128, "num_threads": 2}
        plain |= {"model": str(self.folder), "return_routing": self.return_routing}
        return EngineConfig(**(plain | changes))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave, and the engine's counters after it."""

    rollouts: list[Rollout]
    scores: dict[str, list[NDArray[np.float32]]]
    metrics: dict[str, float]


def run(
    job: Job,
    settings: Sequence[dict[str, Any]] = ({},),
    *,
    order: Sequence[int] | None = None,
    repeat: int = 1,
    make_worker: Callable[[EngineConfig], Worker] | None = None,
    **changes: Any,
) -> Outcome:
    """The job on an engine of its own: sample, then score what was sampled. `order`: of the prompts in the call."""
    with RolloutEngine(job.options(**changes), make_worker=make_worker) as engine:
        for _ in range(repeat):
            rollouts = generate(engine, job, settings, order)
        scores = {"policy_logprobs": engine.score(rollouts)}
        if any(settings):  # without an option the two definitions are one
            scores["logprobs"] = engine.score(rollouts, definition="logprobs")
        return Outcome(rollouts, scores, engine.metrics())


def run_variant(job: Job, variant: str, settings: Sequence[dict[str, Any]] = ({},), **changes: Any) -> Outcome:
    """The job under one of VARIANTS; asserts that the variant did what its name says."""
    options = VARIANTS.get(variant, {}) | changes
    order, repeat = None, 1
    if variant == "preempted":
        # Room for the longest request and little else: running ones must be thrown out.
        options["num_blocks"] = 4 + (max(map(len, job.prompts)) + job.max_tokens) // options["block_size"]
    if variant == "other order":
        order = list(reversed(range(len(job.prompts))))
    if variant == "cache warm":
        repeat = 2
    outcome = run(job, settings, order=order, repeat=repeat, **options)
    if variant == "preempted":
        assert outcome.metrics["preemptions"] > 0
    if variant == "cache warm":
        assert max(rollout.num_cached_tokens for rollout in outcome.rollouts) >= 64
    return outcome


def generate(
    engine: RolloutEngine, job: Job, settings: Sequence[dict[str, Any]], order: Sequence[int] | None = None
) -> list[Rollout]:
    """The job's rollouts, prompt by prompt, whatever the order in which the prompts were submitted."""
    params = job.params(settings)
    if order is None:
        return engine.generate(job.prompts, params)
    rollouts = engine.generate([job.prompts[index] for index in order], [params[index] for index in order])
    by_prompt = dict(zip(order, _chunks(rollouts, job.n), strict=True))
    return [replace(rollout, prompt_index=index) for index in range(len(job.prompts)) for rollout in by_prompt[index]]


def _chunks(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]


def differences(left: Sequence[Rollout], right: Sequence[Rollout]) -> dict[str, int]:
    """Values that are not the same bits, by field."""
    counts = dict.fromkeys(("token_ids", "logprobs", "policy_logprobs", "entropy"), 0)
    for a, b in zip(left, right, strict=True):
        for field in counts:
            counts[field] += differing(getattr(a, field), getattr(b, field))
    return counts | {"routing": sum(routing_differs(a.routing, b.routing) for a, b in zip(left, right, strict=True))}


def routing_differs(left: RolloutRouting | None, right: RolloutRouting | None) -> int:
    """Entries of two routings that differ; 0 where neither is there."""
    if left is None or right is None:
        return int(left is not right)
    assert left.start == right.start
    experts = differing(left.experts.ravel().astype(np.int32), right.experts.ravel().astype(np.int32))
    return experts + differing(left.weights.ravel(), right.weights.ravel())


def score_differences(outcome: Outcome) -> dict[str, int]:
    """Values in which teacher-forced scores differ from what sampling reported, by definition."""
    return {
        definition: sum(
            differing(score, getattr(rollout, definition))
            for score, rollout in zip(scores, outcome.rollouts, strict=True)
        )
        for definition, scores in outcome.scores.items()
    }


def differing(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Entries whose bits differ; a missing entry counts."""
    return len(differing_places(left, right))


def differing_places(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of the entries whose bits differ, or that one of the two misses."""
    size, longest = sorted((len(left), len(right)))
    differ = np.ones(longest, bool)
    differ[:size] = left[:size].view(np.uint32) != right[:size].view(np.uint32)
    return np.flatnonzero(differ)


NONE_DIFFER = {"token_ids": 0, "logprobs": 0, "policy_logprobs": 0, "entropy": 0, "routing": 0}
NO_FORWARD_DIFFERS = {"policy_logprobs": 0, "entropy": 0}


def trainer_differences(rollouts: Sequence[Rollout], model: Any, pack: int) -> dict[str, int]:
    """Values in which the trainer's forward, `pack` sequences at a time, differs from the rollouts."""
    counts = {"policy_logprobs": 0, "entropy": 0}
    for start in range(0, len(rollouts), pack):
        some = list(rollouts[start : start + pack])
        by_temperature: dict[float, list[Rollout]] = {}
        for rollout in some:
            # At temperature 0 the policy's distribution is the one at 1.
            by_temperature.setdefault(rollout.sampling_params.temperature or 1.0, []).append(rollout)
        for temperature, group in by_temperature.items():
            for rollout, (logprobs, entropy) in zip(group, trainer_forward(model, group, temperature), strict=True):
                counts["policy_logprobs"] += differing(logprobs, rollout.policy_logprobs)
                counts["entropy"] += differing(entropy, rollout.entropy)
    return counts


def trainer_forward(
    model: Any, rollouts: Sequence[Rollout], temperature: float
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """(logprobs, entropies) of the rollouts' tokens by PolicyModel, in one packed forward."""
    sequences = [np.concatenate([rollout.prompt_token_ids, rollout.token_ids]) for rollout in rollouts]
    cu_seqlens = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])]).astype(np.int32)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    rows = np.concatenate(
        [np.arange(end - 1 - length, end - 1) for end, length in zip(cu_seqlens[1:], lengths, strict=True)]
    )
    logprobs, entropy = model.logprobs(np.concatenate(sequences), cu_seqlens, temperature, rows)
    cuts = np.cumsum(lengths)[:-1]
    return list(zip(np.split(logprobs.numpy(), cuts), np.split(entropy.numpy(), cuts), strict=True))
