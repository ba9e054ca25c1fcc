"""Ranks whose processes are started anew where they are lost, and brought to hold what the others hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.dispatch import device_reader
from zerokl.rollout import messages
from zerokl.rollout.errors import StepAbandonedError, WorkerError
from zerokl.rollout.kept_weights import KeptWeights
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.ranks import LoopActions
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import TensorWeights, WeightSource
from zerokl.rollout.worker_link import RankProcesses, WorkerDiedError, put_away

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_ATTEMPTS = 8
"""Ranks lost in a row while others are started anew, before that is given up."""


class RestartsSpentError(WorkerError):
    """A rank was lost, and `max_rank_restarts` allows no further restart; `__cause__` says how it was lost."""


class RestartingRanks(RankProcesses):
    """`RankProcesses` that outlive the loss of some, or all. Once it is watched, by a loop on whose thread it heals.

    Lost is a rank whose process has ended, or was killed because it was found stopped or stuck.

    - A step is abandoned: it is applied nowhere, the lost ranks are replaced, the others get new links to them and keep
      what they hold.
    - Weights that are being staged are staged again, on all ranks.
    - Any other order may have been carried out by some: all ranks are started anew as they were, and it is given again.
    """

    def __init__(self, config: EngineConfig) -> None:
        """As RankProcesses."""
        super().__init__(config)
        self._restarts_left = config.max_rank_restarts
        self._max_restarts = config.max_rank_restarts
        self._kept = KeptWeights(ModelConfig.from_json(config.model), partial(device_reader, config.gpu_of(0)))
        self._is_staged = False
        self._levels: dict[str, int] = {}
        """Parts that are put away, and the level they were put away with."""
        self._spill_dir: str | None = None
        self._placement: list[list[list[int]]] = []
        self._loop: LoopActions | None = None
        self._tell_lost: Callable[[Collection[int]], None] = lambda _: None

    # -- steps and weights ---------------------------------------------------------------------------------------------
    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        """See Ranks."""
        try:
            return super().execute(orders)
        except WorkerDiedError as error:
            self.faults.count_in_step(len(self._lost()))
            self.heal()
            raise StepAbandonedError("a rank was lost in the step, and has been replaced") from error

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """See Ranks. What is staged is copied first, for ranks that are started anew later."""
        self._is_staged = False
        kept = self._kept.keep(source, version)
        if isinstance(source, TensorWeights):
            source = kept.source
        try:
            self._stage_on_all(source, version)
        except BaseException as error:
            self._kept.forget_staged(is_read=not isinstance(error, ValueError))
            raise

    def _stage_on_all(self, source: WeightSource, version: int) -> None:
        while True:
            try:
                with self._link.staging.lock:  # a rank that is lost now is replaced by one that has them staged, or not
                    super().stage_weights(source, version)
                    self._is_staged = True
                    return
            except WorkerDiedError:
                if self._loop is None:
                    raise
                self._loop.at_boundary(self.heal).result()

    def commit_weights(self) -> None:
        """See Ranks."""
        self._surely(super().commit_weights)
        self._is_staged = False
        self._levels.pop("weights", None)
        self._kept.commit()

    def discard_staged(self) -> None:
        """See Ranks."""
        self._is_staged = False
        self._kept.forget_staged()
        self._surely(super().discard_staged)

    def pin_weights(self, name: str) -> None:
        """See Ranks."""
        self._surely(lambda: super(RestartingRanks, self).pin_weights(name))
        self._kept.pin(name)

    def drop_weights(self, name: str) -> None:
        """See Ranks."""
        self._surely(lambda: super(RestartingRanks, self).drop_weights(name))
        self._kept.drop(name)

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """See Ranks."""
        self._surely(lambda: super(RestartingRanks, self).sleep(tags, level, spill_dir))
        self._levels |= dict.fromkeys(tags, level)
        self._spill_dir = spill_dir
        if "weights" not in tags:
            return
        if level == 2:
            self._is_staged = False
            self._kept.drop_all()
        self._kept.free_spare()

    def wake_up(self, tags: Collection[str]) -> None:
        """See Ranks."""
        self._surely(lambda: super(RestartingRanks, self).wake_up(tags))
        self._levels = {tag: level for tag, level in self._levels.items() if tag not in tags}

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """See Ranks."""
        self._surely(lambda: super(RestartingRanks, self).rearrange_experts(placement))
        self._placement = placement.tolist()

    def describe(self) -> list[dict[str, Any]]:
        """See Ranks."""
        while True:
            try:
                return super().describe()
            except WorkerDiedError:
                self.heal()

    def watch(self, loop: LoopActions, lost: Callable[[Collection[int]], None]) -> None:
        """See Ranks."""
        self._loop, self._tell_lost = loop, lost
        self._begin_watch(lambda _: loop.run_soon(self.heal))

    def close(self) -> None:
        """See Ranks."""
        super().close()
        self._kept.close()

    # -- recovery ------------------------------------------------------------------------------------------------------
    def heal(self) -> None:
        """Replace the ranks that are lost, if any; on the loop thread.

        Raises RestartsSpentError, or another WorkerError where they cannot be brought to hold what they should.
        """
        if self._lost():
            self._replace(set())

    def _surely(self, order: Callable[[], Result]) -> Result:
        """Give an order until no rank is lost meanwhile. Where one is, the others may have carried it out or not."""
        self.heal()
        while True:
            try:
                return order()
            except WorkerDiedError:
                self._replace(range(self.size))

    def _replace(self, others: Iterable[int]) -> None:
        """Start lost ranks anew, and `others` as well."""
        start = time.perf_counter()
        replaced: set[int] = set()
        for _ in range(_ATTEMPTS):
            fresh = self._charge() | (set(others) - replaced)
            for rank in fresh:
                self._link.children[rank].end()
            replaced |= fresh
            try:
                with self._link.steps.lock, self._link.staging.lock:  # nobody else may speak to a rank meanwhile
                    self._restart(fresh, self._placement)
                    self._reload(sorted(replaced))
            except WorkerDiedError:
                continue
            except ValueError as error:
                raise WorkerError(f"ranks {sorted(replaced)} were lost and cannot hold their weights again") from error
            seconds = time.perf_counter() - start
            self.faults.count_restarts(len(replaced), seconds)
            logger.warning("ranks %s were started anew in %.2f s", sorted(replaced), seconds)
            self._tell_lost(sorted(replaced))
            return
        raise WorkerError(f"ranks {sorted(replaced)} cannot be started anew: {_ATTEMPTS} times in a row one was lost")

    def _charge(self) -> set[int]:
        """Account for the ranks that are lost now, and give them. Raises RestartsSpentError."""
        lost = self._lost()
        self.faults.count_lost(child.fault for child in lost)
        deaths = [child.death() for child in lost]
        for child, death in zip(lost, deaths, strict=True):
            logger.warning("%s", death, extra={"rank": child.rank})
        if len(lost) > self._restarts_left:
            raise RestartsSpentError(f"max_rank_restarts ({self._max_restarts}) are spent: {deaths[0]}") from deaths[0]
        self._restarts_left -= len(lost)
        return {child.rank for child in lost}

    def _reload(self, ranks: Sequence[int]) -> None:
        """Have these ranks hold what all should."""
        for kept, names in self._kept.in_order():
            self._load(ranks, kept, names)
        if self._is_staged and self._kept.staged is not None:
            self._done(messages.Stage(source=self._kept.staged.source, version=self._kept.staged.version), ranks)
        for tag, level in self._levels.items():
            self._done(put_away(tag, level, self._spill_dir), ranks)
