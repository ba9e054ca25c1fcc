"""Workers in child processes, seen from the engine: starts them, passes orders, notices at once when one dies.

A child is a fresh interpreter: it inherits the environment and nothing else, so it works from any script, notebook or
thread. Nothing of it stays behind: not after `close`, exit, an exception or Ctrl-C, nor when either side is killed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout import messages
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import Failed, Message, exception_of, is_consequence
from zerokl.rollout.rank_faults import FaultMeter
from zerokl.rollout.rank_watch import TICK_SECONDS
from zerokl.rollout.reachable_sources import ReachableSources
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.supervision import Supervision
from zerokl.rollout.weight_source import WeightSource
from zerokl.rollout.worker_channels import Channels, WorkerDiedError, WorkerLink
from zerokl.rollout.worker_child import WorkerChild
from zerokl.weight_sync import reap_dead_segments

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig
    from zerokl.rollout.kept_weights import KeptSet
    from zerokl.rollout.ranks import LoopActions

Reply = TypeVar("Reply")


class RemoteTraceback(Exception):  # noqa: N818 - shown as the cause of an error, never raised
    """The worker's own traceback, as text."""


class RankProcesses:
    """`zerokl.rollout.ranks.Ranks` with a process for each rank of the config, each with a LocalWorker.

    Every order goes to all ranks, and is done when all have done it. Besides `Ranks`' errors every method raises
    WorkerDiedError (a WorkerError) at once when a process dies.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Start them together, wait until all are ready. Raises what LocalWorker(config) raises; no process is left."""
        reap_dead_segments()
        self.size = config.num_ranks
        self.faults = FaultMeter()
        self._config = config
        self._options = dataclasses.asdict(config)
        self._sources = ReachableSources()
        self._away: frozenset[str] = frozenset()
        """Parts that are put away."""
        self._num_tokens = 0
        """Of the latest step."""
        with ExitStack() as undo:
            self._link = WorkerLink(self.size)
            undo.callback(self._link.close)
            self._configure(range(self.size), [])
            self._connect()
            undo.pop_all()
        self._close = weakref.finalize(self, self._link.close)

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        """See Ranks. The first rank that fails ends the wait: others may be waiting for it."""
        executes: dict[int, Message] = {rank: messages.Execute(order=order) for rank, order in enumerate(orders)}
        self._num_tokens = sum(len(order.inputs.token_ids) for order in orders)
        with self._link.step_of(self._num_tokens):
            replies = self._exchange(executes, messages.Sampled, enough=_is_cause)
        return [reply.result for reply in replies]

    def begin(self, orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        """See OverlappingRanks. What a rank raises at its begin is raised where its result is waited for."""
        self._link.steps.post({rank: messages.Begin(order=order) for rank, order in enumerate(orders)})
        num_tokens = sum(len(order.inputs.token_ids) for order in orders)

        def wait() -> list[StepResult]:
            with self._link.step_of(num_tokens):
                collect: dict[int, Message] = dict.fromkeys(range(self.size), messages.Collect())
                replies = self._exchange(collect, messages.Sampled, enough=_is_cause)
            return [reply.result for reply in replies]

        return wait

    def warm_up(self) -> None:
        """See OverlappingRanks. Each rank does so by itself, when its first weights are committed."""

    def describe(self) -> list[dict[str, Any]]:
        """See Ranks."""
        orders: dict[int, Message] = dict.fromkeys(range(self.size), messages.Describe())
        return [reply.facts for reply in self._exchange(orders, messages.Facts)]

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """See Ranks. On all ranks or, where one refuses, on none; raises what the first that refused raised.

        Arrays of this process (TensorWeights) are copied once into shared memory, which all ranks read and which is
        kept for the next call, until `sleep` of "weights" or `close`.
        """
        reachable = self._sources.reachable(source, version)
        try:
            self._done(messages.Stage(source=reachable, version=version), channels=self._link.staging)
        except WorkerError:
            self._sources.free()  # a rank is gone: what was published may still be read
            raise
        except Exception:
            self._done(messages.Discard(), channels=self._link.staging)
            raise
        except BaseException:  # Ctrl-C: afterwards no rank is still at it, unless a second one cuts it short
            self._sources.free()
            self._done(messages.Discard(), channels=self._link.staging)
            raise

    def commit_weights(self) -> None:
        """See Ranks."""
        self._done(messages.Commit())
        self._away -= {"weights"}

    def discard_staged(self) -> None:
        """See Ranks."""
        self._done(messages.Discard())

    def pin_weights(self, name: str) -> None:
        """See Ranks."""
        self._done(messages.Pin(name=name))

    def drop_weights(self, name: str) -> None:
        """See Ranks."""
        self._done(messages.Drop(name=name))

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        """See Ranks. Weights go first, as only they can fail to: where one rank fails, the others' come back."""
        for tag in ("weights", "kv_cache"):
            if tag not in tags:
                continue
            try:
                self._done(put_away(tag, level, spill_dir))
            except ValueError:
                if tag not in self._away:
                    self.wake_up([tag])
                raise
            self._away |= {tag}
        if "weights" in tags:
            self._sources.free()

    def wake_up(self, tags: Collection[str]) -> None:
        """See Ranks. Where a rank fails to, it may be called again: what is there stays."""
        self._done(messages.BringBack(weights="weights" in tags, kv_cache="kv_cache" in tags))
        self._away -= set(tags)

    def rearrange_experts(self, placement: NDArray[np.int32]) -> None:
        """See Ranks. As with a step, the first rank that fails ends the wait: others may be waiting for it."""
        self._done(messages.Rearrange(placement=placement.tolist()), enough=_is_cause)

    def close(self) -> None:
        """End the processes: asked first, killed if they have not ended after 5 seconds."""
        self._close()
        self._sources.free()

    @property
    def pids(self) -> list[int]:
        """See Ranks."""
        return [child.process.pid for child in self._link.children]

    def metrics(self) -> dict[str, float]:
        """See Ranks."""
        return self.faults.metrics()

    def watch(self, loop: LoopActions, lost: Callable[[Collection[int]], None]) -> None:
        """See Ranks. A rank that is lost ends the loop."""

        def report(child: WorkerChild) -> None:
            self.faults.count_lost([child.fault])
            loop.fail(child.death())

        self._begin_watch(report)

    def kill(self) -> None:
        """See Ranks."""
        self._link.kill()

    def _begin_watch(self, report: Callable[[WorkerChild], None]) -> None:
        """Have ranks killed that are stopped or stuck, and `report` called when a rank's process has ended."""
        config = self._config
        assert config.rank_heartbeat_timeout is not None, "an unresolved config"
        supervision = Supervision(
            self.size,
            heartbeat_timeout=config.rank_heartbeat_timeout,
            step_timeout_base=config.step_timeout_base,
            step_timeout_per_token=config.step_timeout_per_token,
            tick=TICK_SECONDS,
        )
        self._link.watch(supervision, report)

    # -- orders --------------------------------------------------------------------------------------------------------
    def _configure(self, ranks: Iterable[int], placement: list[list[list[int]]]) -> None:
        """Let the others reach these ranks; `placement` as in the message."""
        options, folder = self._options, str(self._link.folder)
        orders: dict[int, Message] = {
            rank: messages.Configure(options=options, rank=rank, folder=folder, placement=placement) for rank in ranks
        }
        self._exchange(orders, messages.Done)

    def _connect(self) -> None:
        """Link all ranks, which are configured, with each other."""
        self._done(messages.Connect(), enough=_is_cause)
        self._link.forget_folder()

    def _done(
        self,
        order: Message,
        ranks: Iterable[int] | None = None,
        *,
        channels: Channels | None = None,
        enough: Callable[[Message], bool] | None = None,
    ) -> None:
        """Have these ranks (None: all) carry out one order."""
        orders = dict.fromkeys(range(self.size) if ranks is None else ranks, order)
        self._exchange(orders, messages.Done, channels=channels, enough=enough)

    def _exchange(
        self,
        orders: Mapping[int, Message],
        kind: type[Reply],
        *,
        channels: Channels | None = None,
        enough: Callable[[Message], bool] | None = None,
    ) -> list[Reply]:
        """Send ranks their orders and give their answers in rank order, all of which must be of that kind."""
        replies = (channels or self._link.steps).exchange(orders, enough)
        answers = {rank: reply for rank, reply in replies.items() if isinstance(reply, kind)}
        if len(answers) < len(orders):
            _refuse({rank: reply for rank, reply in sorted(replies.items()) if rank not in answers})
        return [answers[rank] for rank in sorted(answers)]

    # -- ranks one by one ----------------------------------------------------------------------------------------------
    def _lost(self) -> list[WorkerChild]:
        """Those whose processes have ended."""
        return [child for child in self._link.children if child.has_ended]

    def _restart(self, ranks: Collection[int], placement: list[list[list[int]]]) -> None:
        """Start processes in place of ended ones, linked with the others, which keep what they hold.

        The new ones have no weights yet, and experts are where `placement` says (empty: where they are at first).
        """
        ranks = self._link.start(ranks)
        with self._link.step_of(self._num_tokens):  # the others may be at their part of one that is given up
            self._configure(set(range(self.size)) - set(ranks), placement)
        self._configure(ranks, placement)
        self._connect()

    def _load(self, ranks: Collection[int], kept: KeptSet, pins: Iterable[str]) -> None:
        """Give ranks a set of weights as the policy's, pinned under some names too."""
        self._done(messages.Stage(source=kept.source, version=kept.version), ranks)
        self._done(messages.Commit(), ranks)
        for name in pins:
            self._done(messages.Pin(name=name), ranks)


def put_away(tag: str, level: int, spill_dir: str | None) -> messages.PutAway:
    """The order to free the memory of "weights" or "kv_cache", as `Worker.sleep`."""
    folder = "" if spill_dir is None else str(Path(spill_dir).absolute())  # working directories may have parted
    return messages.PutAway(weights=tag == "weights", kv_cache=tag == "kv_cache", level=level, spill_dir=folder)


def _is_cause(reply: Message) -> bool:
    return isinstance(reply, Failed) and not is_consequence(reply)


def _refuse(replies: Mapping[int, Message]) -> NoReturn:
    """Raise what the first rank says that did not merely lose another one."""
    rank = next((rank for rank, reply in replies.items() if _is_cause(reply)), min(replies))
    reply = replies[rank]
    if isinstance(reply, Failed):
        raise exception_of(reply) from RemoteTraceback(f"\nrank {rank}: {reply.traceback}")
    raise WorkerError(f"unexpected reply {type(reply).__name__} from the worker of rank {rank}")


__all__ = ["RankProcesses", "RemoteTraceback", "WorkerDiedError"]
