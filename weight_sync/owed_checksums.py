"""Checksums that a publisher owes: its GPU computes them while receivers copy, and a thread writes them down.

publish      hold the segment, launch ........... return
thread                       wait for the device, write, let go
receiver                        copy .............. the segment is free: read
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.device_descriptor import write_checksums
from zerokl.weight_sync.device_memory import DeviceMemory
from zerokl.weight_sync.segments import OwnedSegment


class OwedChecksums:
    """Of one publication at a time. One thread calls."""

    def __init__(self, memory: DeviceMemory, name: str) -> None:
        self._memory = memory
        self._thread = ThreadPoolExecutor(1, f"zerokl-{name}")
        self._is_owing = False
        """From before anything was begun: Ctrl-C may come between any two lines."""
        self._paid: Future[None] | None = None

    @property
    def are_computed(self) -> bool:
        """Whether `finish` would not wait."""
        return not self._is_owing or (self._paid is not None and self._paid.done())

    def begin(self, segment: OwnedSegment, key: int, plan: Any) -> None:
        """Have those of publication `key` computed, after `finish`; the segment is held until they are in it.

        Raises RuntimeError where the device fails.
        """
        assert not self._is_owing, "those of the publication before"
        self._is_owing = True
        with ExitStack() as failed:
            shared = failed.enter_context(segment.writing(wait=True))
            result = self._memory.begin_checksums(plan)
            self._paid = self._thread.submit(_pay, failed.pop_all(), shared, key, result)

    def finish(self) -> None:
        """Wait for them: nothing reads what was published then, but receivers.

        Raises what computing them raised, once.
        """
        if not self._is_owing:
            return
        self._thread.submit(int).result()  # behind what was begun, noted here or not
        self._is_owing = False
        paid, self._paid = self._paid, None
        if paid is not None:
            paid.result()

    def close(self) -> None:
        """Wait for them, and end the thread. Raises as `finish`."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()


def _pay(held: ExitStack, shared: mmap.mmap, key: int, result: Callable[[], NDArray[np.uint64]]) -> None:
    """Note the checksums, or that there are none, in the memory that `held` holds."""
    with held:
        try:
            checksums = result()
        except BaseException:
            write_checksums(shared, key, None)
            raise
        write_checksums(shared, key, checksums)
