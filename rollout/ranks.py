"""The engine's one view of all ranks: orders for each of them in, a result of each out, and nothing done by halves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import WeightSource
from zerokl.rollout.worker import OverlappingWorker, Worker, make_worker

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig


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

        Whatever is raised, some ranks may have done their part: no result is given, and no further step can be run.
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

    def watch(self, report: Callable[[WorkerError], None]) -> None:
        """Have `report` called, in another thread, when a rank's process ends before `close`, be it idle."""
        ...

    def close(self) -> None:
        """As `Worker.close`."""
        ...


class OneRank:
    """`Ranks` of one worker, which answers by itself."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
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

    def watch(self, report: Callable[[WorkerError], None]) -> None:
        """See Ranks. The next call of a lone worker reports its end."""

    def describe(self) -> list[dict[str, Any]]:
        """See Ranks."""
        return [self.worker.describe()]


def overlapping_worker(ranks: Ranks, config: EngineConfig) -> OverlappingWorker | None:
    """The worker of the ranks of `config`, if its steps may overlap with the host's work: one on a GPU."""
    if config.device != "gpu":
        return None
    assert isinstance(ranks, OneRank), "several ranks on a GPU"
    return cast("OverlappingWorker", ranks.worker)


def make_ranks(config: EngineConfig, make_worker: Callable[[EngineConfig], Worker] = make_worker) -> Ranks:
    """The ranks of `config`, which must be resolved: what `make_worker` makes for one, processes for several."""
    if config.num_ranks == 1:
        return OneRank(make_worker(config))
    from zerokl.rollout.worker_link import RankProcesses

    return RankProcesses(config)
