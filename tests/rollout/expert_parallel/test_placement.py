"""Where experts live: every expert has a slot, loads even out, few move."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.rollout.expert_parallel.placement import ExpertPlacement, moves


@st.composite
def placements(draw: Any) -> ExpertPlacement:
    ranks, slots = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 6))
    experts = draw(st.integers(max(1, ranks * slots // 2), ranks * slots))
    return ExpertPlacement.initial(draw(st.integers(1, 3)), experts, ranks, ranks * slots - experts)


def draw_load(placement: ExpertPlacement, seed: int, zeros: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    load = np.floor(random.pareto(1.0, (len(placement.experts), placement.num_experts)) * 10)
    return np.where(random.random(load.shape) < zeros, 0, load)


@settings(max_examples=150, deadline=None)
@given(placements(), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_rebalanced_placements(old: ExpertPlacement, seed: int, zeros: float) -> None:
    load = draw_load(old, seed, zeros)
    new = old.rebalanced(load)
    assert new.experts.shape == old.experts.shape and (new.experts == old.rebalanced(load).experts).all()
    loads, before = new.rank_loads(load), old.rank_loads(load)
    np.testing.assert_allclose(loads.sum(axis=1), load.sum(axis=1))
    assert (loads.max(axis=1) <= before.max(axis=1)).all()
    for mixture, slots in enumerate(new.experts):
        counts = Counter(slots.reshape(-1).tolist())
        assert sorted(counts) == list(range(old.num_experts))  # every expert has a slot, every slot an expert
        # Replicas dealt afresh: no rank has more than the mean and one replica's load.
        dealt = np.array(old._dealt(mixture, load[mixture]))
        assert slots.shape[1] > old.num_experts or all(len(set(rank)) == len(rank) for rank in dealt.tolist())
        fresh = Counter(dealt.reshape(-1).tolist())
        heaviest = max(load[mixture, expert] / count for expert, count in fresh.items())
        assert loads[mixture].max() <= loads[mixture].mean() + heaviest + 1e-9
    assert not any(moves(new, new.rebalanced(load))), "balanced already: nothing moves"


@settings(max_examples=100, deadline=None)
@given(placements(), st.integers(0, 10_000))
def test_moves_lead_from_one_to_the_other(old: ExpertPlacement, seed: int) -> None:
    new = old.rebalanced(draw_load(old, seed, 0.3))
    result = old.experts.copy()
    for mixture, some in enumerate(moves(old, new)):
        for move in some:
            assert move.mixture == mixture
            assert old.experts[mixture, move.source_rank, move.source_slot] == move.expert
            at_home = move.expert in old.experts[mixture, move.target_rank]
            assert at_home == (move.source_rank == move.target_rank)
            result[mixture, move.target_rank, move.target_slot] = move.expert
    np.testing.assert_array_equal(result, new.experts)


@settings(max_examples=50, deadline=None)
@given(placements(), st.integers(0, 7))
def test_maps_point_to_the_expert_and_home_first(placement: ExpertPlacement, source: int) -> None:
    source %= placement.num_ranks
    for mixture, slots in enumerate(placement.experts):
        where = placement.expert_map(mixture, source)
        np.testing.assert_array_equal(slots[where.rank, where.slot], np.arange(placement.num_experts))
        assert (where.rank[slots[source]] == source).all()


def test_the_first_placement() -> None:
    assert ExpertPlacement.initial(1, 8, 4).experts.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert ExpertPlacement.initial(2, 4, 2, 2).experts[1].tolist() == [[0, 1, 2], [2, 3, 0]]
    with pytest.raises(ValueError, match=r"expert_parallel_size must divide .* 8 \+ 1, got 2"):
        ExpertPlacement.initial(1, 8, 2, 1)


def test_a_hot_expert_is_replicated_and_the_others_stay() -> None:
    old = ExpertPlacement.initial(1, 6, 2, 2)
    load = np.array([[100, 1, 1, 1, 1, 1]])
    new = old.rebalanced(load)
    assert all(0 in slots for slots in new.experts[0])
    assert new.rank_loads(load).max() < 60
    assert sum(map(len, moves(old, old.rebalanced(np.ones((1, 6)))))) == 0


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros((1, 2, 3), int), r"placement must be of shape \[1, 2, 2\], got \[1, 2, 3\]"),
        ([[[0, 1], [2, 2]]], r"placement\[0\] must hold every expert of \[0, 4\)"),
        ([[[0, 1], [2, 4]]], r"placement\[0\] must hold every expert of \[0, 4\)"),
    ],
)
def test_placements_that_do_not_fit(experts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.initial(1, 4, 2).like(experts)
    with pytest.raises(ValueError, match="load must be"):
        ExpertPlacement.initial(1, 4, 2).rebalanced(-np.ones((1, 4)))
