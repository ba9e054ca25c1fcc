"""Engines over several ranks end as one: when a rank is lost, and when they are closed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import children_of, segments_of, wait_for_end
from ranks_engine import PROMPTS, SPREAD, gated, kill_rank, no_new_files, on_ranks, sampled
from tiny_engine import in_thread, tiny_tensors, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.sampling_params import SamplingParams


def state(engine: RolloutEngine) -> tuple[Any, ...]:
    requests = engine._scheduler.requests.values()
    counts = [(request.num_computed_tokens, request.num_output_tokens) for request in requests]
    return counts, engine.metrics()["computed_tokens"], engine.metrics()["result_rows"]


@pytest.mark.parametrize("spread", ["D2", "E2"])
def test_a_rank_killed_in_a_step_ends_the_engine_with_its_number_and_the_step_is_applied_nowhere(
    moe_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spread: str
) -> None:
    segments = segments_of(os.getpid())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children = children_of(os.getpid())
    engine = on_ranks(moe_model, **SPREAD[spread])
    pids = [rank["pid"] for rank in engine.describe_ranks()]
    with gated(engine) as ranks:
        call = in_thread(lambda: sampled(engine))
        for _ in range(3):
            ranks.began.acquire()
            ranks.gate.release()
        ranks.began.acquire()
        before = state(engine)
        os.kill(pids[1], signal.SIGSTOP)  # it will not finish the step
        ranks.open()
        wait_until(lambda: ranks.num_sent == 4)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match=f"rank 1: worker process {pids[1]} was killed by SIGKILL"):
            call()
    assert state(engine) == before and engine.health()["state"] == "failed"
    with pytest.raises(EngineFailedError, match="rank 1"):
        sampled(engine)
    engine.close()
    assert all(wait_for_end(pid) for pid in pids) and children_of(os.getpid()) == children
    assert segments_of(os.getpid()) == segments and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_rank_killed_at_any_moment_of_anything_ends_all_calls(
    moe_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """While requests run, weights are staged and experts move; nothing is left of any rank."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    random, children, segments = np.random.default_rng(seed), children_of(os.getpid()), segments_of(os.getpid())
    options: dict[str, Any] = [
        {"expert_parallel_size": 2, "expert_rebalance_interval": 1},
        {"expert_parallel_size": 2, "data_parallel_size": 2, "rank_roles": ["prefill", "decode", "mixed", "decode"]},
        {"data_parallel_size": 3, "rank_roles": ["prefill", "decode", "decode"]},
        {"expert_parallel_size": 4},
    ][seed % 4]
    engine = on_ranks(moe_model, return_routing="all", **options)
    pids = [rank["pid"] for rank in engine.describe_ranks()]

    def until_it_fails(work: Callable[[], Any]) -> None:
        while True:
            work()

    def change() -> None:
        engine.update_weights(str(moe_model), mode=str(random.choice(["wait", "keep", "in_place", "abort"])))
        engine.rebalance_experts()
        engine.reset_prefix_cache()

    calls = [in_thread(lambda work=work: until_it_fails(work)) for work in (lambda: sampled(engine), change)]
    steps = int(random.integers(1, 60))
    wait_until(lambda: engine.metrics()["steps"] >= steps)
    victim = int(random.integers(len(pids)))
    os.kill(pids[victim], signal.SIGKILL)
    for call in calls:
        with pytest.raises(EngineFailedError, match=f"rank {victim}: worker process {pids[victim]} was killed"):
            call()
    engine.close()
    assert all(wait_for_end(pid) for pid in pids) and children_of(os.getpid()) == children
    assert segments_of(os.getpid()) == segments and list(tmp_path.iterdir()) == []


def test_a_rank_killed_between_steps_ends_the_engine_though_nobody_calls_it(tiny_model: Path) -> None:
    engine = on_ranks(tiny_model, data_parallel_size=2)
    pids = kill_rank(engine, 0)
    wait_until(lambda: engine.health()["state"] == "failed")
    assert "rank 0" in engine.health()["cause"]
    with pytest.raises(EngineFailedError, match=f"rank 0: worker process {pids[0]} was killed by SIGKILL"):
        sampled(engine)
    engine.close()
    assert all(wait_for_end(pid) for pid in pids)


def test_a_rank_killed_while_it_stages_weights_ends_the_engine(tiny_model: Path) -> None:
    segments = segments_of(os.getpid())
    engine = on_ranks(tiny_model, data_parallel_size=2)
    pids = [rank["pid"] for rank in engine.describe_ranks()]
    os.kill(pids[1], signal.SIGSTOP)
    update = in_thread(lambda: engine.update_weights(tiny_tensors(1)))
    wait_until(lambda: segments_of(os.getpid()) != segments)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineFailedError, match="rank 1"):
        update()
    engine.close()
    assert all(wait_for_end(pid) for pid in pids) and segments_of(os.getpid()) == segments


def test_logits_that_are_not_finite_on_one_rank_end_the_engine_with_that_cause(tiny_model: Path) -> None:
    with on_ranks(tiny_model, data_parallel_size=2) as engine:
        pids = [rank["pid"] for rank in engine.describe_ranks()]
        engine.update_weights(tiny_tensors() | {"model.norm.weight": np.full(64, 3e38, np.float32)})
        with pytest.raises(EngineFailedError, match=r"FloatingPointError.*not finite"):
            engine.generate(PROMPTS[:1])
    assert all(wait_for_end(pid) for pid in pids)


def test_the_cause_is_told_and_not_what_it_did_to_the_other_rank(moe_model: Path) -> None:
    with on_ranks(moe_model, expert_parallel_size=2) as engine:
        engine.generate([PROMPTS[0]], SamplingParams(max_tokens=2))
        pids = [rank["pid"] for rank in engine.describe_ranks()]
        with no_new_files(pids[1]), pytest.raises(EngineFailedError, match="Too many open files") as failed:
            # Far more rows than before: the rank cannot map its peer's memory anew, while the peer waits for its rows.
            engine.generate([list(range(1, 90))] * 20, SamplingParams(max_tokens=2))
        cause = failed.value.__cause__
        assert isinstance(cause, OSError) and str(cause.__cause__).startswith("\nrank 1: Traceback")
    assert all(wait_for_end(pid) for pid in pids)


# -- closing -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("roles", [None, ["prefill", "decode"]], ids=["mixed", "prefill and decode"])
def test_closing_while_the_window_holds_requests_ends_their_calls(tiny_model: Path, roles: list[str] | None) -> None:
    segments = segments_of(os.getpid())
    children = children_of(os.getpid())
    engine = on_ranks(tiny_model, data_parallel_size=2, rank_roles=roles, batched_token_timeout=600.0)
    calls = [in_thread(lambda: engine.generate([PROMPTS[0]], SamplingParams(max_tokens=3))) for _ in range(3)]
    wait_until(lambda: engine.metrics()["waiting"] == 3 and engine.metrics()["refused_window"] > 0)
    assert engine.metrics()["steps"] == 0
    engine.close()
    for call in calls:
        with pytest.raises(EngineClosedError):
            call()
    assert children_of(os.getpid()) == children and segments_of(os.getpid()) == segments


def test_a_window_longer_than_any_clock_can_wait_ends_with_an_update(tiny_model: Path) -> None:
    with on_ranks(tiny_model, data_parallel_size=2, batched_token_timeout=1e12) as engine:
        call = in_thread(lambda: engine.generate([PROMPTS[0]], SamplingParams(max_tokens=3, ignore_eos=True)))
        wait_until(lambda: engine.metrics()["refused_window"] > 0)
        engine.update_weights(tiny_tensors(1))  # waits for the call, which it lets go
        assert call()[0].policy_versions.tolist() == [0] * 3
