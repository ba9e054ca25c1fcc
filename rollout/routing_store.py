"""The routing of every computed token, kept beside its KV slot: the controller's part of routing replay.

Keys and values that are shared, or found in the prefix cache, were routed by somebody else's forward. So the choice is
kept where they are kept: it is there for as long as they are, and moves where they move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.request import Request
from zerokl.rollout.routing import ExpertIds, RolloutRouting
from zerokl.rollout.step_order import RoutedTokens, StepOrder, StepResult
from zerokl.rollout.step_plan import Handover

INT16_EXPERTS = 1 << 15
"""Ids of this many experts fit int16."""


class RoutingStore:
    """One per rank: an entry for each of its KV slots. The engine's loop thread writes and reads.

    A step's result is written at the step's slots before the scheduler takes it; when a request lets go of its blocks
    (finished, aborted or preempted) `keep` copies what they hold to the request, before anybody can use them again.
    Memory: M * k * 6 bytes per slot (8 beyond 32,768 experts), taken from the system when first written.
    """

    def __init__(self, num_blocks: int, block_size: int, moe: MoeConfig, returned: Literal["output", "all"]) -> None:
        """`returned`: which positions a request gets, as `EngineConfig.return_routing`."""
        self._shape = (num_blocks, block_size, len(moe.layers), moe.top_k)
        self._id_type = np.dtype(np.int16 if moe.num_experts <= INT16_EXPERTS else np.int32)
        self._block_size = block_size
        self._returned = returned
        self.clear()

    def clear(self) -> None:
        """Forget every entry and give the memory back; no request holds blocks."""
        self._experts: ExpertIds = np.zeros(self._shape, self._id_type)
        self._weights = np.zeros(self._shape, np.float32)

    @property
    def num_bytes(self) -> int:
        """Memory once every slot has been written."""
        return self._experts.nbytes + self._weights.nbytes

    def write(self, slot_mapping: NDArray[np.int32], routed: RoutedTokens) -> None:
        """Take a step's result for its T tokens at `slot_mapping` [T], as in `StepInputs`."""
        written = slot_mapping >= 0
        blocks, offsets = np.divmod(slot_mapping[written], self._block_size)
        self._experts[blocks, offsets] = routed.experts.swapaxes(0, 1)[written]
        self._weights[blocks, offsets] = routed.weights.swapaxes(0, 1)[written]

    def copy(self, source: RoutingStore, source_blocks: Sequence[int], target_blocks: Sequence[int]) -> None:
        """The entries of blocks of `source`, handed over from its rank: the i-th goes to the i-th target block."""
        self._experts[list(target_blocks)] = source._experts[list(source_blocks)]
        self._weights[list(target_blocks)] = source._weights[list(source_blocks)]

    def keep(self, request: Request) -> None:
        """Copy the routing of the request's computed positions to `request.routing`. It still holds its blocks.

        Results that it had before keep the routing they came from: a position is computed again after a preemption, to
        the same bits, or under other weights, which did not give the result. A score request returns no routing.
        """
        if request.kind != "generate":
            return
        first_row = request.num_prompt_tokens - 1
        start = 0 if self._returned == "all" else first_row
        positions = np.arange(start, request.num_computed_tokens)
        blocks, offsets = request.block_table[positions // self._block_size], positions % self._block_size
        computed = RolloutRouting(
            experts=self._experts[blocks, offsets], weights=self._weights[blocks, offsets], start=start
        )
        known: RolloutRouting | None = request.routing
        request.routing = computed if known is None else known.updated(computed, first_row)


class RankRouting:
    """The stores of an engine's ranks; without a store it does nothing, as an engine that returns no routing needs."""

    def __init__(self, stores: Sequence[RoutingStore] = ()) -> None:
        self._stores = tuple(stores)

    @classmethod
    def of_engine(cls, config: EngineConfig, moe: MoeConfig | None, num_ranks: int = 1) -> RankRouting:
        """For a resolved config and the mixtures of its model."""
        if config.return_routing == "none":
            return NO_ROUTING
        assert moe is not None and config.num_blocks is not None, "an unresolved EngineConfig"
        returned = config.return_routing
        stores = [RoutingStore(config.num_blocks, config.block_size, moe, returned) for _ in range(num_ranks)]
        return cls(stores)

    def record(self, orders: Sequence[StepOrder], results: Sequence[StepResult]) -> None:
        """Take each rank's outcome of a step, before the scheduler takes it: blocks may change hands afterwards."""
        for store, order, result in zip(self._stores, orders, results):  # noqa: B905 - there may be no stores
            assert result.routed is not None, "the worker returned no routing"
            store.write(order.inputs.slot_mapping, result.routed)

    def hand_over(self, handovers: Sequence[Handover]) -> None:
        """Take the entries of blocks along that go to another rank, once it is planned: both ranks hold them then."""
        if not self._stores:
            return
        for handover in handovers:
            source, target = self._stores[handover.source], self._stores[handover.target]
            target.copy(source, handover.source_blocks, handover.target_blocks)

    def clear(self) -> None:
        """Give the memory back where the ranks' keys and values are put away."""
        for store in self._stores:
            store.clear()

    def keep(self, rank: int, request: Request) -> None:
        """See `RoutingStore.keep`: `on_release` of the rank's `KVCacheManager`."""
        if self._stores:
            self._stores[rank].keep(request)


NO_ROUTING = RankRouting()
"""Of an engine that returns no routing."""
