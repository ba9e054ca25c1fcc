"""Engines over several ranks, and a gate before their steps."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from leftovers import wait_for_end

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_order import StepOrder, StepResult

SMALL: dict[str, Any] = {"block_size": 8, "num_blocks": 128, "num_threads": 1, "batched_token_timeout": 0.005}


PROMPTS = [list(range(1 + index, 4 + index + 9 * (index % 4))) for index in range(9)]
SPREAD: dict[str, dict[str, Any]] = {
    "D2": {"data_parallel_size": 2},
    "E2": {"expert_parallel_size": 2},
    "E2 x D2": {"expert_parallel_size": 2, "data_parallel_size": 2, "num_redundant_experts": 2},
}


def write_moe_model(folder: Path) -> Path:
    """Two mixtures of 8 experts, 3 of them per token, after a dense layer."""
    content = tiny_moe_config()
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), 0, gain=2.0))
    return folder


def on_ranks(folder: Path, **options: Any) -> RolloutEngine:
    """A small engine."""
    return RolloutEngine(EngineConfig(model=str(folder), **(SMALL | options)))


def sampled(engine: RolloutEngine, order: list[int] | None = None) -> list[Rollout]:
    """Two samples of each prompt, each with its own seed; in the order of PROMPTS whatever that of arrival."""
    order = list(range(len(PROMPTS))) if order is None else order
    params = [SamplingParams(n=2, max_tokens=11, seed=100 + index, ignore_eos=True) for index in order]
    rollouts = engine.generate([PROMPTS[index] for index in order], params)
    return [rollouts[2 * order.index(index) + sample] for index in range(len(PROMPTS)) for sample in range(2)]


def kill_rank(engine: RolloutEngine, rank: int) -> list[int]:
    """Kill one process and wait for its end; the pids of all."""
    pids = [facts["pid"] for facts in engine.describe_ranks()]
    os.kill(pids[rank], signal.SIGKILL)
    assert wait_for_end(pids[rank])
    return pids


@contextmanager
def no_new_files(pid: int) -> Iterator[None]:
    """The process cannot open anything: its first descriptors are all in use. (It may still poll a few.)"""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


class GatedRanks:
    """Steps that wait for permits of `gate` before any rank hears of them; `began` counts those that wait or went."""

    def __init__(self, ranks: Ranks) -> None:
        self.gate = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.num_sent = 0
        self._ranks = ranks

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        self.began.release()
        self.gate.acquire()
        self.num_sent += 1
        return self._ranks.execute(orders)

    def kill(self) -> None:
        self._ranks.kill()

    def close(self) -> None:
        self._ranks.close()

    def open(self) -> None:
        """Let all further steps pass."""
        self.gate.release(1_000_000)


@contextmanager
def gated(engine: RolloutEngine) -> Iterator[GatedRanks]:
    """The engine's steps wait, until the context ends. No request is in flight at its begin."""
    steps: Any = engine._loop._steps
    ranks = GatedRanks(steps._ranks)
    steps._ranks = ranks
    try:
        yield ranks
    finally:
        ranks.open()
        steps._ranks = ranks._ranks
