"""A rank's place among the others: whom it exchanges with, and which experts are its own."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator
from zerokl.kernels.dispatch import EngineOps, spread_experts
from zerokl.kernels.ops import KVPool
from zerokl.rollout.expert_parallel.block_moves import move_blocks
from zerokl.rollout.expert_parallel.placement import ExpertPlacement, RankExperts
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder_params import AllExperts, ExpertShare
from zerokl.rollout.step_order import StepOrder


class RankPlace:
    """Rank `rank` of `size`, in a group of `expert_parallel_size` that has a model's experts between its members.

    Groups are of neighbours: ranks g * E to g * E + E - 1. `communicator` connects all `size` ranks; a rank that is
    alone needs none. `num_redundant_experts` are the slots that a group has beyond the number of experts, `placement`
    [M, E, slots] where the group has its experts when the rank joins it (None: as at first). Raises ValueError where
    the numbers do not fit each other.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        expert_parallel_size: int = 1,
        communicator: Communicator[NDArray[Any]] | None = None,
        num_redundant_experts: int = 0,
        placement: Any = None,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, {size}), got {rank}")
        if expert_parallel_size < 1 or size % expert_parallel_size:
            raise ValueError(f"expert_parallel_size must divide the number of ranks {size}, got {expert_parallel_size}")
        if communicator is None and size > 1:
            raise ValueError(f"communicator must connect all {size} ranks, got None")
        if num_redundant_experts and expert_parallel_size == 1:
            raise ValueError(
                f"num_redundant_experts must be 0 where expert_parallel_size is 1, got {num_redundant_experts}"
            )
        self.rank, self.size, self.expert_parallel_size = rank, size, expert_parallel_size
        self.communicator = communicator
        self._num_redundant = num_redundant_experts
        self._placement = placement

    @cached_property
    def group(self) -> Communicator[NDArray[Any]]:
        """The expert group."""
        assert self.communicator is not None, "a rank alone has no group"
        first = self.rank // self.expert_parallel_size * self.expert_parallel_size
        return self.communicator.group(range(first, first + self.expert_parallel_size))

    @property
    def spreads_experts(self) -> bool:
        """Whether experts are on several ranks."""
        return self.expert_parallel_size > 1

    def prepare(self, ops: EngineOps[Any]) -> None:
        """Have the ops reach the experts of the group. Raises ValueError for a device that cannot."""
        if self.spreads_experts:
            spread_experts(ops, self.group)

    def relink(self, communicator: Communicator[NDArray[Any]], ops: EngineOps[Any]) -> None:
        """Reach the other ranks by another communicator from here on."""
        self.communicator = communicator
        self.__dict__.pop("group", None)
        self.prepare(ops)

    def initial_placement(self, config: ModelConfig) -> ExpertPlacement | None:
        """Where experts are when the rank joins; None: all on each rank. ValueError for a model without mixtures."""
        if not self.spreads_experts:
            return None
        if config.moe is None:
            raise ValueError(
                f"expert_parallel_size must be 1 for a model without experts, got {self.expert_parallel_size}"
            )
        moe = config.moe
        size, redundant = self.expert_parallel_size, self._num_redundant
        first = ExpertPlacement.initial(len(moe.layers), moe.num_experts, size, redundant)
        return first if self._placement is None else first.like(self._placement)

    def share(self, placement: ExpertPlacement | None) -> ExpertShare:
        """This rank's experts."""
        return AllExperts() if placement is None else RankExperts(placement, self.rank % self.expert_parallel_size)

    def begin_step(self, order: StepOrder, pool: KVPool[NDArray[np.float32]]) -> None:
        """What comes before a step's forward: its number, and the blocks that ranks hand over."""
        if self.communicator is None:
            assert not order.has_moves, "blocks move between ranks"
            return
        self.communicator.begin_step(order.inputs.step)
        if order.has_moves:
            move_blocks(self.communicator, pool, order.sends, order.receives)
