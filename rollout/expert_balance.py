"""How busy each expert was, and moving experts between ranks by it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.expert_parallel.placement import ExpertPlacement, moves
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.step_order import StepResult

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """How often tokens chose each expert, all ranks together: int64 [M, X], M mixtures of X experts."""

    last_step: Counts
    total: Counts
    """Since the start, or the last `expert_load(reset=True)`."""


class ExpertBalance:
    """Counts the experts' tokens, and moves experts between the ranks, between two steps on the loop thread."""

    def __init__(self, config: EngineConfig, model: ModelConfig, ranks: Ranks, staging: threading.Lock) -> None:
        """`staging` is held by whoever stages weights or puts them away."""
        self._ranks = ranks
        self._staging = staging
        self._interval = config.expert_rebalance_interval
        self._placement: ExpertPlacement | None = None
        shape = (0, 0)
        if model.moe is not None:
            shape = len(model.moe.layers), model.moe.num_experts
            size = config.expert_parallel_size
            if size > 1:
                self._placement = ExpertPlacement.initial(*shape, size, config.num_redundant_experts)
        self._last_step, self._total, self._since_move = (np.zeros(shape, np.int64) for _ in range(3))
        self._steps_left = self._interval or 0
        self.num_moves = 0
        """Experts that came to a rank which did not hold them, replicas counted one by one."""
        self.num_rebalances = 0
        """Rearrangements that moved anything."""

    def count_step(self, results: Sequence[StepResult]) -> None:
        """Take the load of a step from its results; rebalance where the interval has passed.

        While weights are staged the automatic rebalance is put off, a step at a time.
        """
        counts = [result.expert_tokens for result in results if result.expert_tokens is not None]
        if not counts:
            return
        self._last_step = np.sum(counts, axis=0, dtype=np.int64)
        self._total = self._total + self._last_step
        self._since_move = self._since_move + self._last_step
        if self._interval is None:
            return
        self._steps_left -= 1
        if self._steps_left <= 0 and self._staging.acquire(blocking=False):
            try:
                self.rebalance()
            finally:
                self._staging.release()

    def rebalance(self) -> int:
        """Move experts by the load since the last move; returns how many came to another rank.

        The weights are there, and none are being staged.
        """
        self._steps_left = self._interval or 0
        if self._placement is None or not self._since_move.any():
            return 0
        placement = self._placement.rebalanced(self._since_move)
        changed = [move for mixture in moves(self._placement, placement) for move in mixture]
        if changed:
            self._ranks.rearrange_experts(placement.experts)
            self._placement = placement
            self.num_rebalances += 1
        self._since_move = np.zeros_like(self._since_move)
        num_moves = sum(move.source_rank != move.target_rank for move in changed)
        self.num_moves += num_moves
        return num_moves

    def load(self, *, reset: bool) -> ExpertLoad:
        """The counts so far."""
        load = ExpertLoad(last_step=self._last_step.copy(), total=self._total.copy())
        if reset:
            self._total = np.zeros_like(self._total)
        return load

    def metrics(self) -> dict[str, int]:
        """`expert_moves` and `expert_rebalances` since the start."""
        return {"expert_moves": self.num_moves, "expert_rebalances": self.num_rebalances}
