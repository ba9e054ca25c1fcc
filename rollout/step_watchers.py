"""Who wants to hear of each step that is done."""

from __future__ import annotations

import threading
from collections.abc import Callable

Watcher = Callable[[], None]
"""Called on the loop thread: quick, and without raising."""


class StepWatchers:
    """Any thread may add and remove; the loop thread calls them."""

    def __init__(self) -> None:
        self._watchers: tuple[Watcher, ...] = ()
        self._lock = threading.RLock()

    def add(self, watcher: Watcher) -> Callable[[], None]:
        """Have `watcher` called after each step; returns what ends it."""
        with self._lock:
            self._watchers = (*self._watchers, watcher)

        def end() -> None:
            with self._lock:
                self._watchers = tuple(other for other in self._watchers if other is not watcher)

        return end

    def call(self) -> None:
        """A step is done."""
        for watcher in self._watchers:
            watcher()
