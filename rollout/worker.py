"""The worker: whoever owns weights and KV pool and runs steps, in this process or in one of its own.

The engine's loop thread is the only caller of a worker, except that another may stage weights while steps run. Life of
a worker:

    made (no weights) -> stage_weights(folder, 0) -> commit_weights() -> execute() ... -> close()

A new set of weights is staged beside the live one (read, verified, packed) and becomes live at `commit_weights`,
between two steps. Anything that goes wrong before the commit leaves the live weights as they were.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import WeightSource

if TYPE_CHECKING:
    from zerokl.kernels.communicator import Communicator
    from zerokl.rollout.config import EngineConfig
    from zerokl.rollout.expert_parallel.rank_place import RankPlace
    from zerokl.rollout.model_runner import ModelRunner
    from zerokl.rollout.step_outcome import PendingStep


class Worker(Protocol):
    """One rank. Methods are called by one thread at a time and return when the work is done; only `stage_weights` may
    run in another thread beside `execute`.

    Raises `zerokl.rollout.errors.WorkerError` from any method once the worker cannot go on. A ValueError (bad weights,
    unknown name) is the caller's fault and leaves the worker as it was.
    """

    def execute(self, order: StepOrder) -> StepResult:
        """Run one step with the weight set `order.inputs.policy`. The arrays returned are the caller's to keep.

        Raises ValueError when no weight set has that name, FloatingPointError when logits are not finite.
        """
        ...

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """Read, verify and pack a set of weights beside the live one. Replaces what was staged before.

        A delta is refused unless its parent is the live version. Raises ValueError naming the tensors that are missing,
        extra or misshapen; nothing is staged then.
        """
        ...

    def commit_weights(self) -> None:
        """Make the staged weights the live "policy". Cannot fail once staging succeeded."""
        ...

    def discard_staged(self) -> None:
        """Drop the staged weights, if any."""
        ...

    def pin_weights(self, name: str) -> None:
        """Keep the live weights under `name` as well, whatever is committed later; an earlier pin of it is replaced."""
        ...

    def drop_weights(self, name: str) -> None:
        """Forget a pinned set. Raises ValueError for an unknown name."""
        ...

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """Free the memory of "weights" (all sets) and "kv_cache" (the pool), each possibly free already.

        Level 1 writes the sets to an unlinked file in `spill_dir` (None: the system's folder for temporary files),
        level 2 drops them. Raises ValueError where they cannot be written; nothing is freed then.
        """
        ...

    def wake_up(self, tags: Collection[str]) -> None:
        """Read the sets of level 1 back, byte for byte, and make an empty KV pool; what is there stays."""
        ...

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """Have each expert where `placement` [M, E, slots] wants it, copied from rank to rank; no output changes a bit.

        Called on every rank between the same two steps, while none stages weights. Raises ValueError for a placement
        that does not fit, with experts on one rank alone, and while the weights are asleep; nothing has moved then.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for people and logs: kind, pid, num_threads, peak_rss_bytes of its process, weight versions by name."""
        ...

    def close(self) -> None:
        """Free everything; idempotent. The worker answers nothing afterwards."""
        ...


class OverlappingWorker(Worker, Protocol):
    """A worker whose device runs steps while its caller goes on."""

    def begin(self, order: StepOrder) -> PendingStep:
        """`execute` without waiting. Further steps may be begun before its result is asked for; nothing else may."""
        ...

    def warm_up(self) -> None:
        """Once, when there are weights: make ready what the first steps would have to wait for."""
        ...


class LocalWorker:
    """A worker inside the calling process, around a ModelRunner."""

    def __init__(self, config: EngineConfig, place: RankPlace | None = None) -> None:
        """Allocate the KV pool of `config`, which must be resolved. `place` is the rank's among others; None: alone.

        Raises ValueError for an unusable model folder, or one that cannot be spread over the ranks.
        """
        # Late: the model code pulls in the C++ extension, which an engine with a worker process of its own never needs.
        from zerokl.rollout.model_runner import ModelRunner
        from zerokl.rollout.models.config import ModelConfig
        from zerokl.rollout.source_staging import SourceStaging

        model = ModelConfig.from_json(config.model)
        self._runner: ModelRunner | None = ModelRunner(config, model, place)
        self._staging = SourceStaging(model, config.device, config.gpu_of(0 if place is None else place.rank))
        self._num_threads = config.num_threads or len(os.sched_getaffinity(0))

    def execute(self, order: StepOrder) -> StepResult:
        """As `Worker.execute`."""
        return self._live_runner().execute(order)

    def begin(self, order: StepOrder) -> PendingStep:
        """As `OverlappingWorker.begin`, on a GPU."""
        return self._live_runner().begin(order)

    def warm_up(self) -> None:
        """As `OverlappingWorker.warm_up`."""
        self._live_runner().warm_up()

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """As `Worker.stage_weights`."""
        self._staging.stage(self._live_runner(), source, version)

    def commit_weights(self) -> None:
        """As `Worker.commit_weights`."""
        self._staging.commit(self._live_runner())

    def discard_staged(self) -> None:
        """As `Worker.discard_staged`."""
        self._staging.discard(self._live_runner())

    def pin_weights(self, name: str) -> None:
        """As `Worker.pin_weights`."""
        self._live_runner().pin(name)

    def drop_weights(self, name: str) -> None:
        """As `Worker.drop_weights`."""
        self._live_runner().drop(name)

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """As `Worker.sleep`."""
        self._live_runner().sleep(tags, level, spill_dir)
        self._staging.release()

    def wake_up(self, tags: Collection[str]) -> None:
        """As `Worker.wake_up`."""
        self._live_runner().wake_up(tags)

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """As `Worker.rearrange_experts`."""
        self._live_runner().rearrange_experts(placement)

    def relink(self, communicator: Communicator[NDArray[Any]]) -> None:
        """Reach the other ranks by another communicator from the next step on; what this one holds stays."""
        self._live_runner().relink(communicator)

    def describe(self) -> dict[str, Any]:
        """As `Worker.describe`."""
        return {
            "kind": "inprocess",
            "pid": os.getpid(),
            "num_threads": self._num_threads,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": {name: weights.version for name, weights in self._live_runner().weight_sets.items()},
        }

    def close(self) -> None:
        """As `Worker.close`."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None
        self._staging.release()

    def _live_runner(self) -> ModelRunner:
        if self._runner is None:
            raise WorkerError("the worker is closed")
        return self._runner
