"""Routing under random schedules: every position of every rollout, whoever computed it, on whichever rank.

The rig's fake model leaves a hash of all that came before in each KV slot; here that hash is also what its "routers"
choose, so that `expected_marks` can tell each position's routing from the tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduling_rig import Rig, generate, mix

from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.models.synthetic import tiny_moe_config
from zerokl.rollout.request import Request
from zerokl.rollout.routing_store import RankRouting, RoutingStore
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_order import RoutedTokens, StepOrder, StepResult
from zerokl.rollout.step_plan import StepPlan

ROLES = [None, ("mixed", "mixed"), ("prefill", "decode"), ("prefill", "mixed", "decode")]


def mark(entry: int) -> int:
    return entry % 30_000


class RoutedRig(Rig):
    """A rig whose steps return routing, and whose requests keep it, as an engine's loop has it."""

    carries = True
    """Off: routing stays behind when blocks are handed over, a planted fault."""

    def __post_init__(self) -> None:
        stores = [RoutingStore(self.num_blocks, self.block_size, one_mixture(), "all") for _ in range(self.num_ranks)]
        self.routing = RankRouting(stores)
        rank = iter(range(self.num_ranks))
        self.manager = lambda *sizes: KVCacheManager(*sizes, on_release=keeper(self.routing, next(rank)))
        super().__post_init__()

    def orders(self, plan: StepPlan) -> list[StepOrder]:
        if self.carries:
            self.routing.hand_over(plan.handovers)
        return super().orders(plan)

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        results = [
            dataclasses.replace(result, routed=self.routed(rank, order))
            for rank, (order, result) in enumerate(zip(orders, super().execute(orders), strict=True))
        ]
        self.routing.record(orders, results)
        return results

    def routed(self, rank: int, order: StepOrder) -> RoutedTokens:
        pool = self.models[rank].pool
        slots = [divmod(slot, self.block_size) for slot in order.inputs.slot_mapping.tolist()]
        marks = np.array([mark(pool[block][offset]) for block, offset in slots], np.int32)[None, :, None]
        return RoutedTokens(experts=marks, weights=marks.astype(np.float32))


def keeper(routing: RankRouting, rank: int) -> Callable[[Request], None]:
    return lambda request: routing.keep(rank, request)


def one_mixture() -> MoeConfig:
    tiny = ModelConfig.from_json(tiny_moe_config()).moe
    assert tiny is not None
    return dataclasses.replace(tiny, layers=(0,), top_k=1, num_experts=30_000)


def expected_marks(request: Request, weights: int) -> list[int]:
    """Of all positions but the last."""
    marks, chain = [], 0
    for position, token in enumerate(request.token_ids.tolist()[:-1]):
        chain = mix(chain, token, position, weights)
        marks.append(mark(chain))
    return marks


def num_wrong(rig: Rig) -> int:
    """Positions of finished requests with another routing than expected."""
    wrong = 0
    for request in rig.finished.values():
        expected = expected_marks(request, rig.weights[request.policy])
        assert request.routing is not None and request.routing.experts.shape == (len(expected), 1, 1)
        np.testing.assert_array_equal(request.routing.experts, request.routing.weights)
        wrong += int((request.routing.experts.ravel() != expected).sum())
    return wrong


@st.composite
def jobs(draw: st.DrawFn) -> list[Request]:
    """Prompts that begin alike in threes, alone or as groups of samples."""
    requests = []
    for number in range(draw(st.integers(1, 6))):
        length, size = draw(st.integers(1, 40)), draw(st.sampled_from([1, 1, 3]))
        group = f"group {number}" if size > 1 else None
        prompt = (np.arange(length) * (1 + number // 3)) % 50
        for sample in range(size):
            params, name = SamplingParams(max_tokens=draw(st.integers(1, 12))), f"{number}.{sample}"
            requests.append(Request.generate(name, prompt, params, seed=7, sample_index=sample, group_id=group))
    return requests


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=jobs(),
    roles=st.sampled_from(ROLES),
    num_blocks=st.sampled_from([9, 14, 40]),
    budget=st.sampled_from([3, 16, 64]),
    caching=st.booleans(),
    preempted=st.lists(st.integers(0, 30), max_size=4),
)
def test_every_position_has_its_routing(
    requests: list[Request], roles: Any, num_blocks: int, budget: int, caching: bool, preempted: list[int]
) -> None:
    rig = RoutedRig(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        num_ranks=len(roles or (1,)),
        roles=roles,
    )
    rig.add(*requests)
    for number in range(5_000):
        if rig.step() is None:
            break
        if number in preempted:
            rig.scheduler.preempt_all()
    assert len(rig.finished) == len(requests)
    assert num_wrong(rig) == 0


@pytest.mark.parametrize("carries", [True, False])
def test_routing_that_stays_behind_at_a_handover_is_found_out(carries: bool) -> None:
    rig = RoutedRig(num_ranks=2, roles=("prefill", "decode"))
    rig.carries = carries
    rig.run([generate(f"r{index}", 20 + index, max_tokens=6) for index in range(4)])
    assert any(plan.handovers for plan in rig.plans)
    assert (num_wrong(rig) == 0) == carries
