"""Experts over several ranks: the bits of one rank, for every routing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ranks_rig import communicators, each

from zerokl.kernels.cpu import _cpu, spread_experts
from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.cpu.spread_experts import Dispatch, SpreadExperts, plan_dispatch
from zerokl.kernels.experts import ExpertMap, Routing, SpreadWeights

Floats = NDArray[np.float32]
HIDDEN, INNER, EXPERTS, SLOTS = 40, 24, 8, 3
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def groups() -> Any:
    with communicators(1) as one, communicators(2) as two, communicators(4) as four:
        yield dict(zip(RANKS, (one, two, four), strict=True))


@pytest.fixture(scope="module")
def experts() -> list[tuple[Floats, ...]]:
    random = np.random.default_rng(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [tuple(random.standard_normal(shape, np.float32) for shape in shapes) for _ in range(EXPERTS)]


def random_map(random: np.random.Generator, num_ranks: int) -> tuple[ExpertMap, NDArray[np.int64]]:
    """Experts dealt at random, as many to each rank."""
    dealt = random.permutation(EXPERTS).reshape(num_ranks, -1)
    rank, slot = np.empty(EXPERTS, np.int32), np.empty(EXPERTS, np.int32)
    for where, some in enumerate(dealt):
        rank[some], slot[some] = where, np.arange(len(some))
    return ExpertMap(rank, slot), dealt


def draw_routing(random: np.random.Generator, tokens: int, choices: int) -> Routing[Floats]:
    """Tokens choose among the first `choices` experts alone."""
    ids = np.array([random.permutation(choices)[:SLOTS] for _ in range(tokens)], np.int32).reshape(tokens, SLOTS)
    return Routing(ids, random.random((tokens, SLOTS), np.float32))


def spread(ends: Any, experts: Any, loads: list[tuple[Floats, Routing[Floats], Any]], seed: int) -> list[Floats]:
    where, dealt = random_map(np.random.default_rng(seed), len(ends))

    def work(rank: int) -> Floats:
        ops = CpuOps()
        ops.experts = SpreadExperts(ends[rank])
        packed = ops.pack_experts(dealt.shape[1], (experts[expert] for expert in dealt[rank]))
        x, routing, shared = loads[rank]
        return np.array(ops.moe(x, routing, SpreadWeights(packed, where), shared))

    return each(len(ends), work)


@settings(max_examples=25, deadline=None)
@given(
    num_ranks=st.sampled_from(RANKS),
    tokens=st.lists(st.sampled_from([0, 0, 1, 2, 7, 33]), min_size=4, max_size=4),
    choices=st.integers(SLOTS, EXPERTS),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bits_are_those_of_one_rank(
    groups: Any, experts: Any, num_ranks: int, tokens: list[int], choices: int, shared: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    loads = []
    for count in tokens[:num_ranks]:
        x = random.standard_normal((count, HIDDEN), np.float32)
        loads.append((x, draw_routing(random, count, choices), x * 2 if shared else None))
    got = spread(groups[num_ranks], experts, loads, seed)
    ops = CpuOps()
    packed = ops.pack_experts(EXPERTS, iter(experts))
    for ours, (x, routing, more) in zip(got, loads, strict=True):
        np.testing.assert_array_equal(ours, ops.moe(x, routing, packed, more))


def test_sums_in_the_order_of_ranks_are_found_out(groups: Any, experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same outputs, added rank by rank."""
    random = np.random.default_rng(1)
    loads = []
    for _ in range(2):
        x = random.standard_normal((50, HIDDEN), np.float32)
        loads.append((x, draw_routing(random, 50, EXPERTS), None))
    expected = spread(groups[2], experts, loads, 0)

    def by_rank(arena: Any, outputs: Any, rows: Any, weights: Any, shared: Any) -> Any:
        order = np.argsort(rows, axis=1)  # rows of rank 0 come first
        out = np.empty((len(rows), HIDDEN), np.float32)
        _cpu.combine(
            outputs,
            np.ascontiguousarray(np.take_along_axis(rows, order, 1)),
            np.ascontiguousarray(np.take_along_axis(weights, order, 1)),
            shared,
            out,
        )
        return out

    monkeypatch.setattr(spread_experts, "combined", by_rank)
    for ours, theirs in zip(spread(groups[2], experts, loads, 0), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
        assert (ours != theirs).any()


def test_a_row_travels_once_to_each_rank() -> None:
    where = ExpertMap(np.array([0, 1, 1, 0], np.int32), np.array([0, 0, 1, 1], np.int32))
    plan: Dispatch = plan_dispatch(np.array([[1, 0, 2], [3, 0, 1], [0, 3, 0]], np.int32), where, 2)
    assert [tokens.tolist() for tokens in plan.tokens] == [[0, 1, 2], [0, 1]]
    assert plan.slots[0].tolist() == [[-1, 0, -1], [1, 0, -1], [0, 1, 0]]
    assert plan.slots[1].tolist() == [[0, -1, 1], [-1, -1, 0]]
    assert plan.rows.tolist() == [[6, 0, 7], [1, 2, 8], [3, 4, 5]]
