"""A GPU's memory as processes share it: a `zerokl.weight_sync.device_memory.DeviceMemory`, and where sets are placed.

All work is launched on one stream that gives way to the steps. Two threads may not use one object at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu.copies import launch
from zerokl.kernels.gpu.copy_plan import PIECE_WORDS, CopyPlan, Group, Tables, buckets

if TYPE_CHECKING:
    from zerokl.kernels.gpu.cuda_calls import CudaCalls

_AT_ONCE = 1 << 46
"""Bytes of a trainer's launch: all there are. It has no step of its own to let through."""
_LAST_BYTES = 6 << 30
"""So many are left to copy when a copy is nearly done: beside steps they take longer than the two steps under way."""
_PLANS_KEPT = 8
"""Plans whose tables stay on the device: the same memory is read again, and copied into one of two places."""


class _Loaded(NamedTuple):
    """A plan's tables on the device."""

    address: int
    size: int
    tables: list[Tables]
    """By group, counted from the address."""


class _Results(NamedTuple):
    """Memory for what a plan finds: on the device, and pinned on the host, so that nothing waits for its copy."""

    address: int
    host: int
    size: int


class _Found(NamedTuple):
    """What a plan finds, by placement; there once the device is done, and until its memory is given to another."""

    sums: NDArray[np.uint64]
    broken: NDArray[np.int32]
    results: _Results


class SharedGpuMemory:
    """Memory, events and copies of one GPU; see `DeviceMemory` for the methods that are not told here."""

    def __init__(
        self,
        calls: CudaCalls,
        launching_on: Callable[[int], AbstractContextManager[None]],
        written_on: Callable[[], Sequence[int]],
    ) -> None:
        """`launching_on(stream)` has kernels launched there inside; `written_on` names the streams of the framework."""
        self._calls = calls
        self._launching_on = launching_on
        self._written_on = written_on
        self._loaded: dict[CopyPlan, _Loaded] = {}
        """The oldest first."""
        self._spare: list[_Results] = []
        """Of plans whose results have been taken. One that was launched has its own until then."""
        self._nearly_done = 0
        """An event, once there is use for one."""
        self.gpu = calls.gpu
        self.gpu_of = calls.gpu_of
        self.reaches = calls.reaches
        self.allocate = calls.allocate
        self.free = calls.free
        self.allocation_of = calls.allocation_of
        self.allocation_ids = calls.allocation_ids
        self.export_memory = calls.export_memory
        self.open_memory = calls.open_memory
        self.close_memory = calls.close_memory

    def settle(self, stream: int | None) -> None:
        """See `DeviceMemory.settle`."""
        for written_on in self._written_on() if stream is None else [stream]:
            self._calls.settle(written_on)

    def plan(self, tensors: Sequence[tuple[int, int, int, str]], targets: Sequence[int] | None = None) -> CopyPlan:
        """See `DeviceMemory.plan`."""
        return CopyPlan.of_tensors(tensors, targets)

    def begin_checksums(self, plan: CopyPlan) -> Callable[[], NDArray[np.uint64]]:
        """See `DeviceMemory.begin_checksums`. All is launched at once: beside the work of another process the device
        comes to it in slices of time, and each wait costs one.
        """
        try:
            found = self._launch(plan, _AT_ONCE)
        except BaseException:
            self._calls.synchronize()  # what is read must not be written to under what was launched
            raise

        def result() -> NDArray[np.uint64]:
            self._calls.synchronize()
            return self._taken(found)[0]

        return result

    def place(
        self, plan: CopyPlan, bucket_bytes: int, nearly_done: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        """Copy tensors to their places, `bucket_bytes` at a time, and wait.

        `nearly_done` is called once only the last gigabytes are to be copied, which may be all. Returns, for each
        tensor, the checksum of its source as the place now tells it (of one that was rounded: of what was read), and
        whether there is a NaN or an infinity in it, as a number above 0.
        """
        are_last = plan.num_bytes <= _LAST_BYTES
        event = self._nearly_done = self._nearly_done or self._calls.new_event()
        try:
            if are_last:
                nearly_done()
            found = self._launch(plan, bucket_bytes, event)
            if not are_last:
                self._calls.await_event(event)
                nearly_done()
        finally:
            self._calls.synchronize()  # a lease that ends now must not be read under any more
        return self._taken(found)

    # -- inside --------------------------------------------------------------------------------------------------------
    def _launch(self, plan: CopyPlan, bucket_bytes: int, nearly_done: int = 0) -> _Found:
        """Launch a plan's kernels and the copy of what they find, which is there once that is done.

        The event `nearly_done` is reached before the last bytes.
        """
        count = len(plan.placements)
        if not plan.groups:
            return _Found(np.zeros(count, np.uint64), np.zeros(count, np.int32), _Results(0, 0, 0))
        loaded, results = self._load(plan), self._results_of(12 * count)
        self._calls.clear(results.address, 12 * count)
        there = results.address, results.address + 8 * count
        left = sum(tables.num_pieces for tables in loaded.tables) * 8 * PIECE_WORDS
        with self._launching_on(self._calls.stream):
            for group, tables in zip(plan.groups, loaded.tables, strict=True):
                for first, some in buckets(tables.num_pieces, bucket_bytes):
                    if nearly_done and left <= _LAST_BYTES:
                        self._calls.record(nearly_done)
                        nearly_done = 0
                    _launch(group, first, some, tables.at(loaded.address), there, copies=plan.copies)
                    left -= some * 8 * PIECE_WORDS
        self._calls.download(results.host, results.address, 12 * count)
        found = np.ctypeslib.as_array((ctypes.c_uint8 * (12 * count)).from_address(results.host))
        return _Found(found[: 8 * count].view(np.uint64), found[8 * count :].view(np.int32), results)

    def _taken(self, found: _Found) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        """Copies of what was found, whose memory is for other plans then."""
        copies = np.array(found.sums), np.array(found.broken)
        if found.results.size:
            self._spare.append(found.results)
        return copies

    def _load(self, plan: CopyPlan) -> _Loaded:
        """The plan's tables on the device, where they stay for the next time."""
        loaded = self._loaded.pop(plan, None)
        if loaded is None:
            content, tables = plan.tables()
            loaded = _Loaded(*self._memory_for(content.nbytes), tables)
            self._calls.upload(loaded.address, content.ctypes.data, content.nbytes)
        self._loaded[plan] = loaded
        return loaded

    def _memory_for(self, size: int) -> tuple[int, int]:
        """Address and size of new memory, or of that of the plan that has not come for longest."""
        if len(self._loaded) >= _PLANS_KEPT:
            oldest = self._loaded.pop(next(iter(self._loaded)))
            if oldest.size >= size:
                return oldest.address, oldest.size
            self._calls.free(oldest.address)
        return self._calls.allocate(size), size

    def _results_of(self, size: int) -> _Results:
        """Memory of at least this size, one that is spare where it suffices."""
        while self._spare:
            known = self._spare.pop()
            if known.size >= size:
                return known
            self._calls.free(known.address)
            self._calls.free_pinned(known.host)
        host = self._calls.allocate_pinned(2 * size)
        try:
            return _Results(self._calls.allocate(2 * size), host, 2 * size)
        except RuntimeError:
            self._calls.free_pinned(host)
            raise


def _launch(group: Group, first: int, count: int, tables: Tables, results: tuple[int, int], *, copies: bool) -> None:
    """Pieces `first` to `first + count`; tables and results are given by their addresses."""
    checks, rest = group.can_check, (tables.pieces, *results)
    if copies:
        launch(group.variant, first, count, tables.copy_jobs, *rest, reads_target=False, writes=True, hashes=not checks)
    if checks:
        launch(group.variant, first, count, tables.check_jobs, *rest, reads_target=True, writes=False, hashes=True)


def shared_gpu_memory(number: int | None = None) -> SharedGpuMemory:
    """The memory of a GPU of this process; None: Paddle's current one. Raises RuntimeError where it cannot be used."""
    from zerokl.kernels.gpu import driver
    from zerokl.kernels.gpu.cuda_calls import CudaCalls

    number = driver.current_gpu() if number is None else number
    driver.activate(number)
    return SharedGpuMemory(CudaCalls(number), driver.launching_on, driver.framework_streams)
