"""Engines over several ranks give what an engine of one rank gives, to the bit; and end as one when a rank is lost."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import children_of, segments_of, wait_for_end
from ranks_engine import SMALL, gated, kill_rank, no_new_files, on_ranks
from tiny_engine import ctrl_c_after, in_thread, tiny_model_config, tiny_tensors, update_after, wait_until

from zerokl.rollout import messages
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import FolderWeights
from zerokl.weight_sync import WeightPublisher

PROMPTS = [list(range(1 + index, 4 + index + 9 * (index % 4))) for index in range(9)]
SPREAD: dict[str, dict[str, Any]] = {
    "D2": {"data_parallel_size": 2},
    "E2": {"expert_parallel_size": 2},
    "E2 x D2": {"expert_parallel_size": 2, "data_parallel_size": 2, "num_redundant_experts": 2},
}


@pytest.fixture(scope="module")
def engine_of(tiny_model: Path, moe_model: Path) -> Iterator[Callable[[str, str], RolloutEngine]]:
    """One engine per model ("dense", "moe") and way to spread it ("1" or a key of SPREAD), for tests that leave it as
    they found it."""
    engines: dict[tuple[str, str], RolloutEngine] = {}

    def get(model: str, spread: str) -> RolloutEngine:
        if (model, spread) not in engines:
            folder = tiny_model if model == "dense" else moe_model
            engines[model, spread] = on_ranks(folder, **SPREAD.get(spread, {}))
        return engines[model, spread]

    yield get
    for engine in engines.values():
        engine.close()


def sampled(engine: RolloutEngine, order: list[int] | None = None) -> list[Rollout]:
    """Two samples of each prompt, each with its own seed; in the order of PROMPTS whatever that of arrival."""
    order = list(range(len(PROMPTS))) if order is None else order
    params = [SamplingParams(n=2, max_tokens=11, seed=100 + index, ignore_eos=True) for index in order]
    rollouts = engine.generate([PROMPTS[index] for index in order], params)
    return [rollouts[2 * order.index(index) + sample] for index in range(len(PROMPTS)) for sample in range(2)]


# -- the same bits -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "spread"),
    [("dense", "D2"), ("moe", "E2"), pytest.param("moe", "E2 x D2", marks=pytest.mark.slow)],
)
def test_rollouts_and_scores_are_those_of_one_rank(
    engine_of: Callable[[str, str], RolloutEngine], model: str, spread: str
) -> None:
    expected = sampled(engine_of(model, "1"))
    engine = engine_of(model, spread)
    orders = [None, *(np.random.default_rng(seed).permutation(len(PROMPTS)).tolist() for seed in range(2))]
    for order in orders:
        rollouts = sampled(engine, order)
        assert differences(expected, rollouts) == NONE_DIFFER
        assert {int(rank) for rollout in rollouts for rank in rollout.ranks} == set(range(engine.config.num_ranks))
        engine.reset_prefix_cache()
        assert engine.metrics()["cached_blocks"] == 0
    scores = engine.score(expected)
    for rollout, score in zip(expected, scores, strict=True):
        np.testing.assert_array_equal(score, rollout.policy_logprobs)


def test_a_rank_with_other_weights_is_seen(engine_of: Callable[[str, str], RolloutEngine], tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.norm.weight"] = np.nextafter(tensors["model.norm.weight"], np.float32(9))
    save_pretrained(tmp_path, tiny_model_config(), tensors)
    expected, engine = sampled(engine_of("dense", "1")), engine_of("dense", "D2")
    ranks: Any = engine._ranks

    def load(*folders: str) -> None:
        for rank, folder in enumerate(folders):
            stage = messages.Stage(source=FolderWeights(path=folder), version=0)
            ranks._done(stage, [rank], channels=ranks._link.staging)
        ranks.commit_weights()
        engine.reset_prefix_cache()

    load(engine.config.model, str(tmp_path))
    assert differences(expected, sampled(engine)) != NONE_DIFFER
    load(engine.config.model, engine.config.model)
    assert differences(expected, sampled(engine)) == NONE_DIFFER


def test_facts_and_load_of_each_rank_are_told(engine_of: Callable[[str, str], RolloutEngine]) -> None:
    engine = engine_of("dense", "D2")
    health = engine.health()
    assert [rank["rank"] for rank in health["ranks"]] == [0, 1]
    assert [rank["total_blocks"] for rank in health["ranks"]] == [SMALL["num_blocks"]] * 2
    assert engine.metrics()["total_blocks"] == 2 * SMALL["num_blocks"]
    facts = engine.describe_ranks()
    assert len({rank["pid"] for rank in facts} - {os.getpid()}) == 2 and engine.describe_worker()["kind"] == "process"
    assert {rank["pid"] for rank in facts} == {rank["pid"] for rank in health["ranks"]}


# -- experts -----------------------------------------------------------------------------------------------------------
def test_experts_move_while_requests_run_and_no_bit_changes(
    engine_of: Callable[[str, str], RolloutEngine], moe_model: Path
) -> None:
    expected = sampled(engine_of("moe", "1"))
    load = engine_of("moe", "1").expert_load(reset=True)
    with on_ranks(moe_model, expert_parallel_size=2, expert_rebalance_interval=2) as engine:
        engine.pin_weights("reference")
        rollouts = sampled(engine)
        assert differences(expected, rollouts) == NONE_DIFFER
        metrics = engine.metrics()
        assert metrics["expert_moves"] > 0 and metrics["expert_rebalances"] > 1
        # Sets that were pinned before have moved too, and ones that come later are packed where the experts are now.
        scores = engine.score(expected, policy="reference")
        assert all(np.array_equal(a, b.policy_logprobs) for a, b in zip(scores, rollouts, strict=True))
        other = random_tensors(ModelConfig.from_json(str(moe_model)), 5, gain=2.0)
        engine.update_weights(other)
        changed = sampled(engine)
        with on_ranks(moe_model) as alone:
            alone.update_weights(other)
            assert differences(sampled(alone), changed) == NONE_DIFFER != differences(expected, changed)
    assert load.total.shape == (2, 8) and load.total.sum() % (2 * 3) == 0 and load.last_step.sum() > 0


def test_load_is_counted_over_all_ranks_and_experts_move_when_told(
    engine_of: Callable[[str, str], RolloutEngine],
) -> None:
    alone, engine = engine_of("moe", "1"), engine_of("moe", "E2")
    for one in (alone, engine):
        one.reset_prefix_cache()
        one.expert_load(reset=True)
    expected, rollouts = sampled(alone), sampled(engine)
    assert differences(expected, rollouts) == NONE_DIFFER
    np.testing.assert_array_equal(engine.expert_load().total, alone.expert_load().total)
    before = engine.metrics()["expert_moves"]
    num_moves = engine.rebalance_experts()
    assert num_moves > 0 and engine.metrics()["expert_moves"] == before + num_moves
    assert engine.rebalance_experts() == 0  # nothing has been used since
    assert differences(expected, sampled(engine)) == NONE_DIFFER
    assert alone.rebalance_experts() == 0
    assert engine.expert_load(reset=True).total.sum() > 0 and engine.expert_load().total.sum() == 0


def test_experts_that_are_to_move_after_ctrl_c_move_before_weights_are_staged(
    engine_of: Callable[[str, str], RolloutEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, done = engine_of("moe", "E2"), []
    sampled(engine)
    ranks: Any = engine._ranks
    rearrange, stage = ranks.rearrange_experts, ranks.stage_weights
    monkeypatch.setattr(ranks, "rearrange_experts", lambda *given: (done.append("moved"), rearrange(*given)))
    monkeypatch.setattr(ranks, "stage_weights", lambda *given: (done.append("staged"), stage(*given)))
    tensors = random_tensors(ModelConfig.from_json(engine.config.model), 5, gain=2.0)
    with gated(engine) as gate:
        call = in_thread(lambda: engine.generate(PROMPTS[:3], SamplingParams(max_tokens=4, ignore_eos=True)))
        gate.began.acquire()
        with (
            ctrl_c_after(lambda: wait_until(lambda: engine._loop._inbox.num_urgent > 0)),
            pytest.raises(KeyboardInterrupt),
        ):
            engine.rebalance_experts()
        assert engine._updates.lock.locked()  # what was asked for is still to come
        update = in_thread(lambda: engine.update_weights(tensors))
        gate.open()
        call()
        assert update() == 1
    assert done == ["moved", "staged"]
    engine.update_weights(engine.config.model, version=0, allow_rewind=True)
    assert differences(sampled(engine_of("moe", "1")), sampled(engine)) == NONE_DIFFER


# -- weights -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["wait", "keep", "in_place", "abort"])
def test_an_update_in_flight_does_what_it_does_on_one_rank(
    engine_of: Callable[[str, str], RolloutEngine], mode: str
) -> None:
    outcomes = []
    for spread in ("1", "D2"):
        engine = engine_of("dense", spread)
        with gated(engine) as ranks:
            call = in_thread(lambda engine=engine: sampled(engine))
            update = update_after(engine, ranks, 4, tiny_tensors(1), mode=mode)
            ranks.open()
            rollouts = call()
            assert update() == 1
        outcomes.append(rollouts)
        assert all(rank["versions"] == {"policy": 1} for rank in engine.describe_ranks())
        engine.update_weights(tiny_tensors(0), version=0, allow_rewind=True)
    one, several = outcomes
    assert differences(one, several) == NONE_DIFFER
    assert [rollout.version_spans for rollout in one] == [rollout.version_spans for rollout in several]
    assert {rollout.finish_reason for rollout in several} == {"abort" if mode == "abort" else "length"}


def test_changed_tensors_alone_are_published_to_all_ranks(
    engine_of: Callable[[str, str], RolloutEngine], moe_model: Path
) -> None:
    model = ModelConfig.from_json(str(moe_model))
    first, second = (random_tensors(model, seed, gain=2.0) for seed in (5, 6))
    changed = {name: second[name] for name in first if ".experts.2." in name or name == "model.norm.weight"}
    outcomes = []
    for spread in ("1", "E2"):
        engine = engine_of("moe", spread)
        with WeightPublisher() as publisher:
            engine.update_weights(publisher.publish(first, 1))
            engine.update_weights(publisher.publish_delta(changed, 2))
        outcomes.append(sampled(engine))
        engine.update_weights(first | changed)
        assert differences(outcomes[-1], sampled(engine)) == NONE_DIFFER
        engine.update_weights(str(moe_model), version=0, allow_rewind=True)
    assert differences(*outcomes) == NONE_DIFFER


def test_sleep_is_of_all_ranks(engine_of: Callable[[str, str], RolloutEngine], tmp_path: Path) -> None:
    expected, engine = sampled(engine_of("moe", "1")), engine_of("moe", "E2")
    engine.sleep(spill_dir=tmp_path)
    assert engine.wake_up() == []
    assert differences(expected, sampled(engine)) == NONE_DIFFER


# -- the end of a rank -------------------------------------------------------------------------------------------------
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


def test_options_that_do_not_fit_the_model_are_refused_before_anything_starts(
    tiny_model: Path, moe_model: Path
) -> None:
    children = children_of(os.getpid())
    with pytest.raises(ValueError, match=r"expert_parallel_size must be 1 for a model without mixtures .*, got 2"):
        RolloutEngine(EngineConfig(model=str(tiny_model), expert_parallel_size=2))
    with pytest.raises(ValueError, match="expert_parallel_size must divide the model's 8 experts, got 3"):
        RolloutEngine(EngineConfig(model=str(moe_model), expert_parallel_size=3))
    assert children_of(os.getpid()) == children


def test_ranks_hand_blocks_over_and_no_bit_changes(
    engine_of: Callable[[str, str], RolloutEngine], tiny_model: Path
) -> None:
    with on_ranks(tiny_model, data_parallel_size=2, rank_roles=["prefill", "decode"]) as engine:
        assert differences(sampled(engine_of("dense", "1")), sampled(engine)) == NONE_DIFFER
        assert engine.metrics()["handovers"] == 2 * len(PROMPTS)
