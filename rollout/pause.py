"""A pause of generation: what becomes of the requests in flight, and who waits for it to take effect."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Literal, get_args

from zerokl.rollout.errors import PauseLiftedError
from zerokl.rollout.histogram import Histogram

PauseMode = Literal["abort", "wait", "keep"]


class GenerationPause:
    """Running -> (draining ->) paused -> running. The loop thread changes it; any thread may read.

        wait    requests in flight finish; the pause holds once none is left
        abort   the same, but those that generate end at once with what they have
        keep    they stay where they are, blocks and all, and go on by `lift` with the same bits

    In every mode calls that come later stay in the inbox until `lift`.
    """

    def __init__(self) -> None:
        self.mode: PauseMode | None = None
        """None: generation is not paused, nor about to be."""
        self.times = Histogram()
        """Seconds of the pauses that have ended, each from the moment it held."""
        self._since: float | None = None
        self._waiters: list[Future[None]] = []

    @property
    def holds_calls(self) -> bool:
        """Whether calls stay in the inbox."""
        return self.mode is not None

    @property
    def is_frozen(self) -> bool:
        """Whether no step may run although requests are unfinished."""
        return self.mode == "keep"

    def begin(self, mode: PauseMode, waiter: Future[None]) -> None:
        """Pause, or change the mode of a pause; `waiter` resolves once it holds."""
        self.mode = mode
        self._waiters.append(waiter)

    def settle(self, num_unfinished: int) -> None:
        """Tell those that wait, if the pause holds now."""
        if self.mode is None or (num_unfinished and not self.is_frozen):
            return
        if self._since is None:
            self._since = time.perf_counter()
        for waiter in self.take_waiters():
            waiter.set_result(None)

    def lift(self) -> None:
        """End the pause; whoever still waits for it to hold gets PauseLiftedError."""
        self.mode = None
        if self._since is not None:
            self.times.observe(time.perf_counter() - self._since)
            self._since = None
        for waiter in self.take_waiters():
            waiter.set_exception(PauseLiftedError("generation was resumed before the pause held"))

    def take_waiters(self) -> list[Future[None]]:
        """Those that still wait; they are the caller's to resolve now, but for the ones that gave up."""
        waiters, self._waiters = self._waiters, []
        return [waiter for waiter in waiters if waiter.set_running_or_notify_cancel()]

    def check_can_drain(self, num_unfinished: int) -> None:
        """Raise ValueError where a change would wait for requests that stand still."""
        if self.is_frozen and num_unfinished:
            raise ValueError(
                f"generation is paused with mode='keep' and {num_unfinished} requests in flight, which a change that "
                "waits for them would wait for until resume_generation: update with mode 'keep' or 'abort', or pause "
                "with mode 'abort' or 'wait' first"
            )


def pause_mode(mode: object) -> PauseMode:
    """The mode a user gave. Raises ValueError for any other value."""
    for known in get_args(PauseMode):
        if mode == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"mode must be one of {get_args(PauseMode)}, got {mode!r}")
