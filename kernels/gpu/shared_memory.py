"""A GPU's memory as processes share it: a `zerokl.weight_sync.device_memory.DeviceMemory`, and where sets are placed.

All work is launched on one stream that gives way to the steps. Two threads may not use one object at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.device_tensors import Placement
from zerokl.kernels.gpu.copies import launch
from zerokl.kernels.gpu.copy_plan import JOB_COLUMNS, Group, buckets, plan_groups

if TYPE_CHECKING:
    from zerokl.kernels.gpu.cuda_calls import CudaCalls

_BUCKET_BYTES = 64 << 20
_PIECES_KEPT = 32
"""Tables of pieces: those of a layout come again with each of its publications."""
_PLANS_KEPT = 8
"""Plans: the same memory is published again, into one of two slots."""
_JOB_BYTES = 8 * JOB_COLUMNS


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
        self._follows: list[int] = []
        self._tables: dict[str, tuple[int, int]] = {}
        """Address and size of memory that grows as it is asked for."""
        self._pieces: dict[Any, tuple[int, int]] = {}
        """Address and number of pieces, by what they depend on."""
        self._plans: dict[tuple[Placement, ...], list[Group]] = {}
        self.gpu = calls.gpu
        self.reaches = calls.reaches
        self.allocate = calls.allocate
        self.free = calls.free
        self.allocation_of = calls.allocation_of
        self.allocation_id = calls.allocation_id
        self.export_memory = calls.export_memory
        self.open_memory = calls.open_memory
        self.close_memory = calls.close_memory
        self.new_event = calls.new_event
        self.export_event = calls.export_event
        self.open_event = calls.open_event
        self.close_event = calls.close_event
        self.wait = calls.wait

    def record(self, event: int) -> None:
        """See `DeviceMemory.record`."""
        self._calls.record(event, self._calls.stream)

    def follow(self, stream: int | None) -> None:
        """See `DeviceMemory.follow`."""
        streams = self._written_on() if stream is None else [stream]
        while len(self._follows) < len(streams):
            self._follows.append(self._calls.new_event())
        for event, written_on in zip(self._follows, streams, strict=False):
            self._calls.record(event, written_on)
            self._calls.wait(event)

    def checksums(self, tensors: Sequence[tuple[int, int, int, str]]) -> list[int]:
        """See `DeviceMemory.checksums`."""
        there = [Placement(*tensor, tensor[0], tensor[3], tensor[2]) for tensor in tensors]
        return self._run(there, _BUCKET_BYTES, copies=False)[0]

    def copy(self, tensors: Sequence[tuple[int, int, int, str]], targets: Sequence[int]) -> list[int]:
        """See `DeviceMemory.copy`."""
        pairs = zip(tensors, targets, strict=True)
        return self.place([Placement(*tensor, target, tensor[3], tensor[2]) for tensor, target in pairs])[0]

    def place(self, placements: Sequence[Placement], bucket_bytes: int = _BUCKET_BYTES) -> tuple[list[int], list[int]]:
        """Copy tensors to their places, `bucket_bytes` at a time, and wait.

        Returns, for each, the checksum of its source as the place now tells it (of one that was rounded: of what was
        read), and whether there is a NaN or an infinity in it, as a number above 0.
        """
        return self._run(placements, bucket_bytes, copies=True)

    # -- inside --------------------------------------------------------------------------------------------------------
    def _run(self, placements: Sequence[Placement], bucket_bytes: int, *, copies: bool) -> tuple[list[int], list[int]]:
        count = len(placements)
        sums, broken = np.zeros(count, np.int64), np.zeros(count, np.int32)
        groups = self._plan(tuple(placements))
        if not groups:
            return sums.tolist(), broken.tolist()
        results = self._table("results", 12 * count)
        jobs = self._upload("jobs", np.concatenate([part for g in groups for part in (g.copy_jobs, g.check_jobs)]))
        pieces = [self._pieces_of(group) for group in groups]
        self._calls.clear(results, 12 * count)
        try:
            with self._launching_on(self._calls.stream):
                for group, (piece_table, num_pieces) in zip(groups, pieces, strict=True):
                    tables = (piece_table, results, results + 8 * count)
                    for first, some in buckets(num_pieces, bucket_bytes):
                        self._launch(group, first, some, jobs, tables, copies=copies)
                    jobs += 2 * _JOB_BYTES * len(group.extents)
            self._calls.download(sums.ctypes.data, results, sums.nbytes)
            self._calls.download(broken.ctypes.data, results + 8 * count, broken.nbytes)
        finally:
            self._calls.synchronize()  # a lease that ends now must not be read under any more
        return sums.view(np.uint64).tolist(), broken.tolist()

    def _plan(self, placements: tuple[Placement, ...]) -> list[Group]:
        if placements not in self._plans:
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[placements] = plan_groups(placements)
        return self._plans[placements]

    def _launch(
        self, group: Group, first: int, count: int, jobs: int, tables: tuple[int, int, int], *, copies: bool
    ) -> None:
        checks = group.can_check
        if copies:
            launch(group.variant, first, count, jobs, *tables, reads_target=False, writes=True, hashes=not checks)
        if checks:
            check_jobs = jobs + _JOB_BYTES * len(group.extents)
            launch(group.variant, first, count, check_jobs, *tables, reads_target=True, writes=False, hashes=True)

    def _pieces_of(self, group: Group) -> tuple[int, int]:
        key = group.variant.line, group.extents
        if key not in self._pieces:
            while len(self._pieces) >= _PIECES_KEPT:
                address, _ = self._pieces.pop(next(iter(self._pieces)))
                self._calls.free(address)
            made = group.pieces()
            address = self._calls.allocate(made.nbytes)
            self._calls.upload(address, made.ctypes.data, made.nbytes)
            self._pieces[key] = address, len(made)
        return self._pieces[key]

    def _upload(self, name: str, values: NDArray[Any]) -> int:
        address = self._table(name, values.nbytes)
        self._calls.upload(address, values.ctypes.data, values.nbytes)
        return address

    def _table(self, name: str, size: int) -> int:
        """Memory of at least this size, the same one each time while it suffices."""
        address, known = self._tables.get(name, (0, 0))
        if known < size:
            if known:
                self._calls.free(address)
            address = self._calls.allocate(2 * size)
            self._tables[name] = address, 2 * size
        return address


def shared_gpu_memory(number: int | None = None) -> SharedGpuMemory:
    """The memory of a GPU of this process; None: Paddle's current one. Raises RuntimeError where it cannot be used."""
    from zerokl.kernels.gpu import driver
    from zerokl.kernels.gpu.cuda_calls import CudaCalls

    number = driver.current_gpu() if number is None else number
    driver.activate(number)
    return SharedGpuMemory(CudaCalls(number), driver.launching_on, driver.framework_streams)
