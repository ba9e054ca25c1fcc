"""Updates of the policy's weights as the threads that ask for them see it: hooks, the wait, giving up."""

from __future__ import annotations

import dataclasses
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from zerokl.rollout.control import POLICY, Exclusive, WeightSets
from zerokl.rollout.hooks import UpdateEvent, UpdateHooks
from zerokl.rollout.in_flight import InFlightOptions, InFlightRequests

if TYPE_CHECKING:
    from zerokl.rollout.engine_loop import EngineLoop
    from zerokl.rollout.worker import WeightSource


class WeightUpdates:
    """Makes `WeightUpdate`s. Any thread may; the loop applies them one after the other."""

    def __init__(self, loop: EngineLoop, weights: WeightSets, in_flight: InFlightRequests) -> None:
        self.hooks = UpdateHooks()
        self._loop = loop
        self._weights = weights
        self._in_flight = in_flight

    def make(
        self, source: WeightSource, version: int | None, options: InFlightOptions, *, allow_rewind: bool
    ) -> WeightUpdate:
        """An update that nobody knows of until it is run."""
        change = Exclusive(
            prepare=lambda: self._weights.stage(source, version, allow_rewind=allow_rewind),
            apply=lambda: self._commit(options),
            discard=self._weights.discard,
            waits=options.mode == "wait",
        )
        event = UpdateEvent(live_version=self._weights.versions[POLICY], version=version, mode=options.mode)
        return WeightUpdate(self._loop, self.hooks, change, event)

    def _commit(self, options: InFlightOptions) -> int:
        self._in_flight.make_way(POLICY, self._weights.staged_version, options)
        return self._weights.commit(keep_running=options.keeps_kv)


class WeightUpdate:
    """One update; `run` it once, in any thread that may block."""

    def __init__(self, loop: EngineLoop, hooks: UpdateHooks, change: Exclusive, event: UpdateEvent) -> None:
        self._loop = loop
        self._hooks = hooks
        self._change = change
        self._event = event

    def run(self) -> int:
        """Hooks, staging, commit; returns the live version. Whatever is raised, the old version goes on serving."""
        try:
            self._hooks.call("before_update", self._event)
            live = self._apply()
        except BaseException as error:
            self._hooks.call("on_failure", dataclasses.replace(self._event, error=error))
            raise
        self._hooks.call("after_commit", dataclasses.replace(self._event, live_version=live))
        return live

    def give_up(self) -> None:
        """Have `run` raise CancelledError, if the commit has not begun; from any thread."""
        self._change.future.cancel()

    def _apply(self) -> int:
        if self._change.future.cancelled():
            raise CancelledError
        self._loop.submit(self._change)
        try:
            live: int = self._change.future.result()
        except KeyboardInterrupt:
            self.give_up()
            raise
        return live
