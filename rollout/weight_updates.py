"""Updates of the policy's weights as the threads that ask for them see it: hooks, the wait, giving up."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import TYPE_CHECKING

from zerokl.rollout.control import POLICY, Exclusive, WeightSets
from zerokl.rollout.errors import EngineClosedError, EngineFailedError, WorkerError
from zerokl.rollout.hooks import UpdateEvent, UpdateHooks
from zerokl.rollout.in_flight import InFlightOptions, InFlightRequests
from zerokl.rollout.weight_source import DeviceWeights, WeightSource

if TYPE_CHECKING:
    from zerokl.rollout.engine_loop import EngineLoop
    from zerokl.rollout.sleep import Sleep


class WeightUpdates:
    """Makes `WeightUpdate`s, which are staged one at a time, beside the steps, and applied between two of them.

    The loop thread must not touch weights while another one stages: whoever has it do so holds `lock`.
    """

    def __init__(
        self,
        loop: EngineLoop,
        weights: WeightSets,
        in_flight: InFlightRequests,
        sleep: Sleep,
        lock: threading.Lock,
    ) -> None:
        self.hooks = UpdateHooks()
        self.lock = lock
        self.num_failures = 0
        """Updates that left the old version serving."""
        self._discarded: Future[None] | None = None
        self.boundary = loop.awaited_boundary
        self._loop = loop
        self._weights = weights
        self._in_flight = in_flight
        self._sleep = sleep

    def make(
        self, source: WeightSource, version: int | None, options: InFlightOptions, *, allow_rewind: bool
    ) -> WeightUpdate:
        """An update that nobody knows of until it is run.

        One that does not wait for requests announces its commit, where its staging tells that it is nearly done.
        """
        if isinstance(source, DeviceWeights) and options.mode != "wait":
            source = dataclasses.replace(source, nearly_staged=self.boundary.announce)
        return WeightUpdate(self, source, version, options, allow_rewind=allow_rewind)

    @property
    def live_version(self) -> int:
        """Version of the live weights."""
        return self._weights.versions[POLICY]

    def stage(self, source: WeightSource, version: int | None, *, allow_rewind: bool) -> None:
        """Prepare the new weights, in the calling thread, which holds `lock`.

        What a worker dies of ends the engine, with EngineFailedError; any other error is the caller's.
        """
        self._loop.check_alive()
        if self._discarded is not None:
            self._discarded.result()
        self._sleep.check_update()
        try:
            self._weights.stage(source, version, allow_rewind=allow_rewind)
        except WorkerError as error:
            self._loop.at_boundary(partial(_throw, error)).result()
            raise
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget what is staged, soon: a step may be long. The next `stage` waits for it."""
        with contextlib.suppress(EngineClosedError, EngineFailedError):
            self._discarded = self._loop.at_boundary(self._weights.discard)

    def apply(self, change: Exclusive) -> int:
        """Have the loop apply the commit of what is staged; returns the version.

        A change that is given up in time is discarded here and not by the loop, which might come to it when the next
        one is staged already.
        """
        try:
            self._loop.submit(change)
            live: int = change.future.result()
        except ValueError:  # it cannot be applied now
            self.discard()
            raise
        except (KeyboardInterrupt, CancelledError):
            if change.future.cancel():
                self.discard()
            else:
                wait([change.future])  # it has begun, or is over: nobody stages before its end
            raise
        return live

    def commit(self, options: InFlightOptions) -> int:
        """On the loop thread: let the requests in flight go where `options` say, and flip."""
        self._in_flight.make_way(POLICY, self._weights.staged_version, options)
        version = self._weights.commit(keep_running=options.keeps_kv)
        self._sleep.weights_came()
        self.boundary.is_near = False
        return version


class WeightUpdate:
    """One update; `run` it once, in any thread that may block."""

    def __init__(
        self,
        updates: WeightUpdates,
        source: WeightSource,
        version: int | None,
        options: InFlightOptions,
        *,
        allow_rewind: bool,
    ) -> None:
        self._updates = updates
        self._stage = partial(updates.stage, source, version, allow_rewind=allow_rewind)
        self._change = Exclusive(partial(updates.commit, options), waits=options.mode == "wait")
        self._event = UpdateEvent(live_version=updates.live_version, version=version, mode=options.mode)

    def run(self) -> int:
        """Hooks, staging, commit; returns the live version. Whatever is raised, the old version goes on serving."""
        hooks = self._updates.hooks
        try:
            hooks.call("before_update", self._event)
            with self._updates.lock:
                try:
                    live = self._stage_and_apply()
                finally:
                    self._updates.boundary.is_near = False
        except BaseException as error:
            self._updates.num_failures += 1
            hooks.call("on_failure", dataclasses.replace(self._event, error=error))
            raise
        hooks.call("after_commit", dataclasses.replace(self._event, live_version=live))
        return live

    def give_up(self) -> None:
        """Have `run` raise CancelledError, if the commit has not begun; from any thread."""
        self._change.future.cancel()

    def _stage_and_apply(self) -> int:
        if not self._change.future.cancelled():
            self._stage()
        if self._change.future.cancelled():
            self._updates.discard()
            raise CancelledError
        return self._updates.apply(self._change)


def _throw(error: WorkerError) -> None:
    raise error
