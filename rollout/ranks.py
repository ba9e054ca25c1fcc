"""The engine's one view of all ranks: orders for each of them in, a result of each out, and nothing done by halves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.rank_faults import FaultMeter
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import WeightSource
from zerokl.rollout.worker import LocalWorker, OverlappingWorker, Worker

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig


class LoopActions(Protocol):
    """What ranks ask of the loop that runs them. From any thread."""

    def fail(self, error: WorkerError) -> None:
        """End the loop with this error, if it runs; returns at once."""
        ...

    def run_soon(self, action: Callable[[], None]) -> None:
        """Run an action on the loop's thread between two steps, if it runs; returns at once."""
        ...

    def at_boundary(self, action: Callable[[], None]) -> Future[None]:
        """The same, with a future; raises EngineFailedError or EngineClosedError."""
        ...


class Ranks(Protocol):
    """All ranks, in rank order. What is said of `Worker`'s methods holds for those of the same names here, on all ranks
    or on none.

    `zerokl.rollout.errors.WorkerError` from any method means that they cannot go on. It is raised at once when one rank
    has died, whatever the others are at, and names that rank.
    """

    size: int
    """Number of ranks."""

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        """Run one step: rank r does orders[r]; the results are in rank order, and the caller's to keep.

        Whatever is raised, some ranks may have done their part: no result is given. StepAbandonedError: the same
        tokens can be ordered again, where a rank's KV pool was not lost with it; after any other, no further step.
        """
        ...

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """As `Worker.stage_weights`. Where any rank refuses, what it raises is raised and nothing is staged on any."""
        ...

    def commit_weights(self) -> None:
        """As `Worker.commit_weights`."""
        ...

    def discard_staged(self) -> None:
        """As `Worker.discard_staged`."""
        ...

    def pin_weights(self, name: str) -> None:
        """As `Worker.pin_weights`."""
        ...

    def drop_weights(self, name: str) -> None:
        """As `Worker.drop_weights`."""
        ...

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """As `Worker.sleep`."""
        ...

    def wake_up(self, tags: Collection[str]) -> None:
        """As `Worker.wake_up`."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """`Worker.describe` of each rank."""
        ...

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """As `Worker.rearrange_experts`."""
        ...

    @property
    def pids(self) -> list[int]:
        """The process of each rank now. From any thread, at any time."""
        ...

    def metrics(self) -> dict[str, float]:
        """See `zerokl.rollout.rank_faults.FaultMeter.metrics`."""
        ...

    def watch(self, loop: LoopActions, lost: Callable[[Collection[int]], None]) -> None:
        """From here on have ranks that are lost noticed in any moment, idle or not, until `close`.

        Where they can be replaced, that is done on the loop's thread, and `lost` called there: their KV pools are empty
        then. If not, the loop is made to fail.
        """
        ...

    def kill(self) -> None:
        """End processes at once, where ranks are such, for good; from any thread. What they are at fails."""
        ...

    def close(self) -> None:
        """As `Worker.close`."""
        ...


class OverlappingRanks(Ranks, Protocol):
    """Ranks whose devices run steps while the caller goes on."""

    def begin(self, orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        """`execute` without waiting; what it returns waits. Further steps may be begun before; nothing else may."""
        ...

    def warm_up(self) -> None:
        """As `OverlappingWorker.warm_up`."""
        ...


class OneRank:
    """`Ranks` of one worker, which answers by itself."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.pids = [worker.describe()["pid"]]
        self.stage_weights = worker.stage_weights
        self.commit_weights = worker.commit_weights
        self.discard_staged = worker.discard_staged
        self.pin_weights = worker.pin_weights
        self.drop_weights = worker.drop_weights
        self.sleep = worker.sleep
        self.wake_up = worker.wake_up
        self.rearrange_experts = worker.rearrange_experts
        self.close = worker.close

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        """See Ranks."""
        (order,) = orders
        return [self.worker.execute(order)]

    def begin(self, orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        """See OverlappingRanks, for an OverlappingWorker."""
        (order,) = orders
        pending = cast("OverlappingWorker", self.worker).begin(order)
        return lambda: [pending.result()]

    def warm_up(self) -> None:
        """See OverlappingRanks, for an OverlappingWorker."""
        cast("OverlappingWorker", self.worker).warm_up()

    def metrics(self) -> dict[str, float]:
        """See Ranks."""
        return FaultMeter().metrics()

    def watch(self, loop: LoopActions, lost: Callable[[Collection[int]], None]) -> None:
        """See Ranks. The next call of a lone worker reports its end."""

    def kill(self) -> None:
        """See Ranks."""

    def describe(self) -> list[dict[str, Any]]:
        """See Ranks."""
        return [self.worker.describe()]


def overlapping_ranks(ranks: Ranks, config: EngineConfig) -> OverlappingRanks | None:
    """The ranks of `config`, if their steps may overlap with the host's work: those on GPUs.

    None where ranks that are lost are to be replaced: what is lost with one is a single step then, planned anew.
    """
    if config.device != "gpu" or (config.has_processes and config.max_rank_restarts):
        return None
    return cast("OverlappingRanks", ranks)


def make_ranks(config: EngineConfig, make_worker: Callable[[EngineConfig], Worker] | None = None) -> Ranks:
    """The ranks of `config`, which must be resolved: what `make_worker` makes, in place of one rank, if it is given.

    Processes of the config are started anew where they are lost, if `max_rank_restarts` allows it.
    """
    if config.num_ranks == 1 and (make_worker is not None or config.worker != "process"):
        return OneRank((make_worker or LocalWorker)(config))
    if config.max_rank_restarts:
        from zerokl.rollout.recovery import RestartingRanks

        return RestartingRanks(config)
    from zerokl.rollout.worker_link import RankProcesses

    return RankProcesses(config)
