"""Engines over several ranks give what an engine of one rank gives, to the bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import children_of
from ranks_engine import PROMPTS, SMALL, SPREAD, gated, on_ranks, sampled
from tiny_engine import ctrl_c_after, in_thread, tiny_model_config, tiny_tensors, update_after, wait_until

from zerokl.rollout import messages
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import FolderWeights
from zerokl.weight_sync import WeightPublisher


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
