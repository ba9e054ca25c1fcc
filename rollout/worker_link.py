"""A worker in a child process, seen from the engine: starts it, passes orders, notices at once when it dies.

The child is a fresh interpreter: it inherits the environment and nothing else, so it works from any script, notebook or
thread. Nothing of it stays behind: not after `close`, exit, an exception or Ctrl-C, nor when either side is killed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import (
    BringBack,
    Commit,
    Configure,
    Describe,
    Discard,
    Done,
    Drop,
    Execute,
    Facts,
    Failed,
    Message,
    Pin,
    PutAway,
    Sampled,
    Stage,
    exception_of,
)
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.worker import FolderWeights, SharedWeights, TensorWeights, WeightSource, as_array
from zerokl.rollout.worker_channels import WorkerDiedError, WorkerLink
from zerokl.weight_sync import PublishedFile, WeightPublisher, reap_dead_segments

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig


class RemoteTraceback(Exception):  # noqa: N818 - shown as the cause of an error, never raised
    """The worker's own traceback, as text."""


class RemoteWorker:
    """A `zerokl.rollout.worker.Worker` in a process of its own.

    Besides the protocol's errors every method raises WorkerDiedError (a WorkerError) at once when the process dies.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Start the process and wait until it is ready. Raises what LocalWorker(config) raises."""
        reap_dead_segments()
        self._publisher: WeightPublisher | None = None
        with ExitStack() as undo:
            self._link = WorkerLink()
            undo.callback(self._link.close)
            self._link.start()
            self._done(Configure(options=dataclasses.asdict(config)))
            undo.pop_all()
        self._close = weakref.finalize(self, self._link.close)

    def execute(self, order: StepOrder) -> StepResult:
        """See Worker. The arrays travel through the socket, which adds about 0.2 ms to a step."""
        reply = self._link.steps.exchange(Execute(order=order))
        if not isinstance(reply, Sampled):
            self._refuse(reply)
        return reply.result

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """See Worker. Arrays of this process (TensorWeights) are copied once into shared memory, which is kept for the
        next call, until `sleep` of "weights" or `close`.
        """
        if isinstance(source, TensorWeights):
            try:
                self._stage_arrays(source, version)
            except ValueError:
                raise  # the worker has answered, and reads no more
            except BaseException:
                self._free_publisher()  # it may still be read
                raise
        elif isinstance(source, FolderWeights):
            absolute = FolderWeights(path=str(Path(source.path).absolute()))  # working directories may have parted
            self._stage(Stage(source=absolute, version=version))
        elif isinstance(source.published, PublishedFile):
            file = dataclasses.replace(source.published, path=str(Path(source.published.path).absolute()))
            self._stage(Stage(source=dataclasses.replace(source, published=file), version=version))
        else:
            self._stage(Stage(source=source, version=version))

    def _stage_arrays(self, source: TensorWeights, version: int) -> None:
        if self._publisher is None:
            self._publisher = WeightPublisher("staging", buffers=1)
        arrays = ((name, as_array(name, tensor)) for name, tensor in source.tensors.items())
        published = self._publisher.publish(arrays, version)
        self._stage(Stage(source=SharedWeights(published=published), version=version))

    def commit_weights(self) -> None:
        """See Worker."""
        self._done(Commit())

    def discard_staged(self) -> None:
        """See Worker."""
        self._done(Discard())

    def pin_weights(self, name: str) -> None:
        """See Worker."""
        self._done(Pin(name=name))

    def drop_weights(self, name: str) -> None:
        """See Worker."""
        self._done(Drop(name=name))

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """See Worker."""
        folder = "" if spill_dir is None else str(Path(spill_dir).absolute())
        self._done(PutAway(weights="weights" in tags, kv_cache="kv_cache" in tags, level=level, spill_dir=folder))
        if "weights" in tags:
            self._free_publisher()

    def wake_up(self, tags: Collection[str]) -> None:
        """See Worker."""
        self._done(BringBack(weights="weights" in tags, kv_cache="kv_cache" in tags))

    def describe(self) -> dict[str, Any]:
        """See Worker."""
        reply = self._link.steps.exchange(Describe())
        if not isinstance(reply, Facts):
            self._refuse(reply)
        return reply.facts

    def close(self) -> None:
        """End the process: asked first, killed if it has not ended after 5 seconds."""
        self._close()
        self._free_publisher()

    def _free_publisher(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _stage(self, message: Stage) -> None:
        reply = self._link.staging.exchange(message)
        if not isinstance(reply, Done):
            self._refuse(reply)

    def _done(self, message: Message) -> None:
        reply = self._link.steps.exchange(message)
        if not isinstance(reply, Done):
            self._refuse(reply)

    def _refuse(self, reply: Message) -> NoReturn:
        if isinstance(reply, Failed):
            raise exception_of(reply) from RemoteTraceback("\n" + reply.traceback)
        raise WorkerError(f"unexpected reply {type(reply).__name__} from the worker")


__all__ = ["RemoteTraceback", "RemoteWorker", "WorkerDiedError"]
