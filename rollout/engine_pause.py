"""The engine's methods that stop and go on with generation, or watch it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.pause import PauseMode, pause_mode


class PauseMethods:
    """The part of `RolloutEngine` that pauses; the engine makes the loop."""

    _loop: EngineLoop

    def pause_generation(self, mode: PauseMode = "wait") -> None:
        """Run no requests until `resume_generation`; returns once the pause holds. Later calls are taken, and wait.

        - "wait": requests in flight finish first.
        - "abort": those that generate end with finish_reason "abort" and the tokens so far (`generate(resume_from=...)`
          continues them); scores finish first.
        - "keep": they stop after the current step, and go on by `resume_generation` with the same bits. Until then what
          would wait for them (an update with mode "wait", `sleep`, `pin_weights`) is refused with ValueError.

        Asked for again, it changes the mode. Raises ValueError for an unknown mode, PauseLiftedError when
        `resume_generation` comes first.
        """
        holds = self.submit_pause(mode)
        try:
            holds.result()
        except KeyboardInterrupt:
            holds.cancel()
            raise

    def submit_pause(self, mode: PauseMode) -> Future[None]:
        """`pause_generation` without waiting; cancelling the future gives up the wait, not the pause."""
        return self._loop.pause(pause_mode(mode))

    def resume_generation(self) -> None:
        """End a pause; what it held is taken up in order. Without a pause nothing happens."""
        self.submit_resume().result()

    def submit_resume(self) -> Future[None]:
        """`resume_generation` without waiting."""
        return self._loop.resume()

    def watch_steps(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Have `watcher` called on the engine's thread after each step; it must be quick and not raise. Returns what
        ends it.
        """
        return self._loop.watch_steps(watcher)
