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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.validation import check_int

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig
    from zerokl.rollout.expert_parallel.rank_place import RankPlace
    from zerokl.rollout.model_runner import ModelRunner
    from zerokl.weight_sync import PublishedFile, PublishedShards, PublishedWeights
    from zerokl.weight_sync.session import LiveWeights, UpdateSession

    Published = PublishedWeights | PublishedFile | PublishedShards

INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorWeights:
    """Weights given as arrays of the calling process, read before `stage_weights` returns.

    `tensors` maps Hugging Face names to float32 arrays; anything `np.from_dlpack` or `np.asarray` takes will do.
    """

    tensors: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderWeights:
    """Weights in a Hugging Face style folder of safetensors files."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Weights that a trainer published: in shared memory, mapped by the worker and not copied, or in a file."""

    published: Published


WeightSource = TensorWeights | FolderWeights | SharedWeights
"""Where a set of weights comes from."""


def weight_source(source: Any, version: int | None) -> tuple[WeightSource, int | None]:
    """What a user gave as weights, and their version: the given one, or else the publication's, or else None.

    Raises ValueError for a source of another kind and for a version that is not an integer from 0.
    """
    from zerokl.weight_sync import PublishedFile, PublishedShards, PublishedWeights

    if version is not None:
        version = check_int("version", version, 0, INT64_MAX)
    if isinstance(source, (PublishedWeights, PublishedFile, PublishedShards)):
        return SharedWeights(published=source), source.version if version is None else version
    if isinstance(source, (str, os.PathLike)):
        return FolderWeights(path=os.fspath(source)), version
    if isinstance(source, Mapping):
        return TensorWeights(tensors=source), version
    kind = f"an object of type {type(source).__name__}"
    if isinstance(source, Iterable):
        try:
            return TensorWeights(tensors=dict(source)), version
        except (TypeError, ValueError):
            kind += " whose items are no pairs of name and tensor"
    raise ValueError(f"source must be tensors by name, a folder or PublishedWeights, got {kind}")


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


class LocalWorker:
    """A worker inside the calling process, around a ModelRunner."""

    def __init__(self, config: EngineConfig, place: RankPlace | None = None) -> None:
        """Allocate the KV pool of `config`, which must be resolved. `place` is the rank's among others; None: alone.

        Raises ValueError for an unusable model folder, or one that cannot be spread over the ranks.
        """
        # Late: the model code pulls in the C++ extension, which an engine with a worker process of its own never needs.
        from zerokl.rollout.model_runner import ModelRunner
        from zerokl.rollout.models.config import ModelConfig

        self._model_config = ModelConfig.from_json(config.model)
        self._runner: ModelRunner | None = ModelRunner(config, self._model_config, place)
        self._session: UpdateSession | None = None
        self._checksums: dict[str, int] = {}
        self._num_threads = config.num_threads or len(os.sched_getaffinity(0))

    def execute(self, order: StepOrder) -> StepResult:
        """As `Worker.execute`."""
        return self._live_runner().execute(order)

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """As `Worker.stage_weights`."""
        runner = self._live_runner()
        self._session = None
        if isinstance(source, TensorWeights):
            runner.stage({name: as_array(name, tensor) for name, tensor in source.tensors.items()}, version)
        elif isinstance(source, FolderWeights):
            from zerokl.rollout.models.loader import open_tensors

            # Read tensor by tensor while packing: the folder's tensors are never in memory all at once.
            runner.stage(open_tensors(source.path, self._model_config), version)
        else:
            self._stage_published(runner, source.published, version)

    def commit_weights(self) -> None:
        """As `Worker.commit_weights`."""
        runner, session = self._live_runner(), self._session
        if session is None:
            runner.commit()
            self._checksums = {}
        else:
            session.commit(runner.commit)
            self._checksums = session.checksums
            session.publish()
        self._session = None

    def discard_staged(self) -> None:
        """As `Worker.discard_staged`."""
        self._session = None
        self._live_runner().discard_staged()

    def pin_weights(self, name: str) -> None:
        """As `Worker.pin_weights`."""
        self._live_runner().pin(name)

    def drop_weights(self, name: str) -> None:
        """As `Worker.drop_weights`."""
        self._live_runner().drop(name)

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """As `Worker.sleep`."""
        self._live_runner().sleep(tags, level, spill_dir)

    def wake_up(self, tags: Collection[str]) -> None:
        """As `Worker.wake_up`."""
        self._live_runner().wake_up(tags)

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """As `Worker.rearrange_experts`."""
        self._live_runner().rearrange_experts(placement)

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
        self._runner = None

    def _stage_published(self, runner: ModelRunner, published: Published, version: int) -> None:
        from zerokl.rollout.models.layout import LM_HEAD, expected_tensors
        from zerokl.weight_sync.session import UpdateSession, receive
        from zerokl.weight_sync.shards import PublishedShards

        expected = expected_tensors(self._model_config)
        tied = {LM_HEAD: next(iter(expected.values()))} if LM_HEAD not in expected else {}
        if isinstance(published, PublishedShards):
            with published.verified() as tensors:
                runner.stage(tensors, version)
            return
        with published.open() as lease:
            delta = lease.manifest.parent is not None
            live = self._live_weights(runner) if delta else None
            session = UpdateSession(expected, live, tied, read={*runner.held_tensors(), *tied})
            try:
                runner.stage(receive(session, version, lease), version, delta=delta)
            finally:
                session.release()
        self._session = session

    def _live_weights(self, runner: ModelRunner) -> LiveWeights | None:
        from zerokl.rollout.expert_parallel.own_tensors import OwnTensors
        from zerokl.rollout.model_runner import LIVE
        from zerokl.weight_sync.session import LiveWeights

        live = runner.weight_sets.get(LIVE)
        if live is None:
            return None
        tensors = OwnTensors(runner.live_tensors(), self._model_config)
        return LiveWeights(version=live.version, tensors=tensors, checksums=self._checksums)

    def _live_runner(self) -> ModelRunner:
        if self._runner is None:
            raise WorkerError("the worker is closed")
        return self._runner


def as_array(name: str, tensor: Any) -> NDArray[Any]:
    """A NumPy view of a tensor (Paddle's through DLPack, without a copy) or the array itself.

    Raises ValueError naming a tensor that NumPy cannot view.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        if hasattr(tensor, "__dlpack__"):
            # A Paddle parameter refuses to export itself while it wants gradients.
            return np.from_dlpack(tensor.detach() if hasattr(tensor, "detach") else tensor)
        return np.asarray(tensor)
    except (TypeError, RuntimeError, BufferError) as error:
        raise ValueError(f"{name} must be an array that NumPy can view, got {type(tensor).__name__}: {error}") from None


def make_worker(config: EngineConfig) -> Worker:
    """The worker that `config.worker` names, "inprocess" or "process"; `config` must be resolved."""
    if config.worker == "process":
        from zerokl.rollout.worker_link import RemoteWorker

        return RemoteWorker(config)
    return LocalWorker(config)
