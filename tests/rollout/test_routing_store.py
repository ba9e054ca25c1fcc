"""The routing store: slots in, positions out, and what a request keeps over several stays in the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling_rig import generate, record

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.models.synthetic import tiny_moe_config
from zerokl.rollout.request import Request
from zerokl.rollout.results import Origin
from zerokl.rollout.routing import RolloutRouting, replay_arrays
from zerokl.rollout.routing_store import INT16_EXPERTS, RankRouting, RoutingStore
from zerokl.rollout.step_order import RoutedTokens
from zerokl.rollout.step_plan import Handover

MIXTURES, SLOTS, BLOCK, BLOCKS = 2, 3, 8, 6
ORIGIN = Origin(policy_version=0)


def moe(num_experts: int = 8) -> MoeConfig:
    config = ModelConfig.from_json(tiny_moe_config(num_experts=num_experts)).moe
    assert config is not None
    return config


def routed(marks: Any) -> RoutedTokens:
    """[T] marks: the experts of token t are marks[t], + 1, + 2 in the first mixture and 100 higher in the second."""
    at = np.asarray(marks, np.int32)[None, :, None]
    experts = at + 100 * np.arange(MIXTURES)[:, None, None] + np.arange(SLOTS)
    return RoutedTokens(experts=experts.astype(np.int32), weights=(experts / 7).astype(np.float32))


def marks(routing: RolloutRouting) -> list[int]:
    """The marks of a request's positions, after a check of the whole arrays."""
    found = routing.experts[:, 0, 0].tolist()
    expected = routed(found)
    np.testing.assert_array_equal(routing.experts, expected.experts.swapaxes(0, 1))
    np.testing.assert_array_equal(routing.weights, expected.weights.swapaxes(0, 1))
    return found


def running(request: Request, blocks: list[int], num_computed: int) -> Request:
    request.block_table, request.num_blocks = np.array(blocks, np.int32), len(blocks)
    request.num_computed_tokens = num_computed
    return request


def filled(returned: Any = "all") -> RoutingStore:
    """Slot s has mark s, written by two steps in no order."""
    store = RoutingStore(BLOCKS, BLOCK, moe(), returned)
    slots = np.random.default_rng(0).permutation(BLOCKS * BLOCK).astype(np.int32)
    for some in (slots[:20], slots[20:]):
        store.write(some, routed(some))
    return store


@pytest.mark.parametrize(("returned", "start"), [("all", 0), ("output", 9)])
def test_a_request_gets_its_positions_in_order(returned: str, start: int) -> None:
    request = running(generate("a", 10), [4, 0, 5], 19)
    filled(returned).keep(request)
    assert request.routing is not None and request.routing.start == start
    assert marks(request.routing) == [*range(32, 40), *range(8), 40, 41, 42][start:]


def test_a_token_without_a_slot_leaves_every_entry_as_it_was() -> None:
    store, expected = filled(), filled()
    store.write(np.array([-1, 3, -1], np.int32), routed([70, 71, 72]))
    expected.write(np.array([3], np.int32), routed([71]))
    np.testing.assert_array_equal(store._experts, expected._experts)
    np.testing.assert_array_equal(store._weights, expected._weights)


def test_a_score_request_keeps_nothing() -> None:
    request = running(Request.score("s", list(range(9))), [1, 2], 8)
    filled().keep(request)
    assert request.routing is None


def test_blocks_that_are_handed_over_take_their_routing_along() -> None:
    routing = RankRouting([filled(), RoutingStore(BLOCKS, BLOCK, moe(), "all")])
    routing.hand_over([Handover("a", 0, 1, (4, 2), (0, 3))])
    request = running(generate("a", 10), [0, 3], 12)
    routing.keep(1, request)
    assert request.routing is not None and marks(request.routing) == [*range(32, 40), *range(16, 20)]


def test_the_memory_stated() -> None:
    assert RoutingStore(BLOCKS, BLOCK, moe(), "all").num_bytes == BLOCKS * BLOCK * MIXTURES * SLOTS * 6
    assert RoutingStore(1, 8, moe(INT16_EXPERTS), "all").num_bytes == 8 * MIXTURES * SLOTS * 6
    assert RoutingStore(1, 8, moe(INT16_EXPERTS + 1), "all").num_bytes == 8 * MIXTURES * SLOTS * 8


def test_a_cleared_store_takes_new_entries_and_has_no_old_ones() -> None:
    store = filled()
    store.clear()
    store.write(np.arange(8, dtype=np.int32), routed(np.arange(50, 58)))
    request = running(generate("a", 4), [0], 8)
    store.keep(request)
    assert request.routing is not None and marks(request.routing) == [*range(50, 58)]
    assert not store._weights[1:].any()


def result(num_rows: int = 1) -> SampleResult:
    one = np.zeros(num_rows, np.float32)
    return SampleResult(tokens=np.zeros(num_rows, np.int32), logprobs=one, policy_logprobs=one, entropy=one)


@given(
    prompt=st.integers(1, 20),
    stays=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=5),
    returned=st.sampled_from(["all", "output"]),
)
def test_results_keep_their_routing_over_any_stays_in_the_pool(
    prompt: int, stays: list[tuple[int, int]], returned: str
) -> None:
    """A stay computes known tokens, perhaps not all, then draws some. Stay i, position p is routed with a mark of both.

    The model: a position's entry is replaced by the latest stay that gave a result, unless it had given one before.
    """
    request = generate("a", prompt, max_tokens=64)
    store = RoutingStore(BLOCKS * 2, BLOCK, moe(), returned)  # type: ignore[arg-type]
    expected: dict[int, int] = {}
    for stay, (budget, draws) in enumerate(stays):
        known, had = request.num_tokens, request.num_output_tokens
        computed = min(budget, known)
        if computed == known:
            draws = min(draws, 64 - had)
            for _ in range(draws):
                record(request, result(), 0, 1, ORIGIN)
            computed = known + max(draws - 1, 0) if draws else known - 1
        new = {position: 100 * stay + position for position in range(computed)}
        frozen = range(prompt - 1, prompt - 1 + had)
        if not had:
            expected = new
        elif request.num_output_tokens > had:
            expected |= {position: mark for position, mark in new.items() if position not in frozen}
        blocks = np.random.default_rng(stay).permutation(BLOCKS * 2)
        positions = np.arange(computed)
        slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
        store.write(slots.astype(np.int32), routed(list(new.values())))
        store.keep(running(request, blocks.tolist(), computed))
    start = 0 if returned == "all" else prompt - 1
    assert request.routing is not None and request.routing.start == start
    assert marks(request.routing) == [expected[position] for position in sorted(expected) if position >= start]


def test_a_request_that_begins_anew_forgets_its_routing() -> None:
    request = running(generate("a", 10), [4, 0], 10)
    record(request, result(), 0, 1, ORIGIN)
    filled().keep(request)
    request.num_blocks = 0
    request.restart()
    assert request.routing is None


def test_what_is_returned_is_checked(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"return_routing must be one of \('none', 'output', 'all'\), got 'prompt'"):
        EngineConfig(model="m", return_routing="prompt")  # type: ignore[arg-type]
    config = EngineConfig(model=str(tiny_model), return_routing="all")
    with pytest.raises(ValueError, match="return_routing must be 'none' for LlamaForCausalLM, which has no mixture"):
        RolloutEngine(config)


def test_replay_needs_routing(engine: RolloutEngine) -> None:
    rollouts = engine.generate([[1, 2]])
    assert rollouts[0].routing is None
    with pytest.raises(ValueError, match=r"rollouts\[0\]\.routing must not be None: set EngineConfig.return_routing"):
        replay_arrays(rollouts)
    with pytest.raises(ValueError, match="rollouts must hold at least one rollout, got 0"):
        replay_arrays([])
