"""The trainer's side of weights that stay on the GPU: handles of its memory take the place of copies on the host."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from zerokl.weight_sync.device_descriptor import (
    Allocation,
    Descriptor,
    PublishedDeviceWeights,
    checksums_size,
    withdraw,
    write,
)
from zerokl.weight_sync.device_memory import DeviceMemory
from zerokl.weight_sync.errors import BufferLeasedError, DeviceHandleError
from zerokl.weight_sync.known_tensors import KnownTensors, Located, look_at
from zerokl.weight_sync.manifest import require_version
from zerokl.weight_sync.owed_checksums import OwedChecksums
from zerokl.weight_sync.segments import OwnedSegment, reap_dead_segments

_SEGMENT_BYTES = 1 << 16
"""For the descriptor of each 256 tensors, which takes some 110 bytes of one."""


@dataclass(frozen=True, eq=False)
class _Reading:
    """How a known set is read for a publication, and what receivers are told of where it then is."""

    known: KnownTensors
    plan: Any
    """Of the device's memory: for its checksums, and into a buffer for the copy."""
    descriptor: bytes


@dataclass(eq=False)
class _Turn:
    """A descriptor's segment, and the buffer that it describes; without one it describes the trainer's memory."""

    segment: OwnedSegment
    checksums: OwnedSegment
    """For those of a publication, held against readers until they are known."""
    buffer: int = 0
    size: int = 0
    reading: _Reading | None = None
    """Of the last set that was copied to the buffer."""


class DevicePublisher:
    """Publishes sets of weights that lie in a GPU's memory, for engines on the same machine.

    With `buffers` 0 the tensors are read where they are: a trainer must not write to them before `withdraw`, which
    waits for readers. Their checksums are computed while receivers copy. With more, `publish` copies them, on the GPU,
    into as many buffers in turn, and the trainer may write once it returns; as with `WeightPublisher` the latest of two
    is never overwritten. Example:

        with DevicePublisher(device_memory("gpu")) as publisher:
            published = publisher.publish(model.named_parameters(), version=1)
            ...                                     # elsewhere: engine.update_weights(published)
            publisher.withdraw()
            optimizer.step()

    Not thread-safe. Segments vanish with `close`, or with the process, however it ends.
    """

    def __init__(self, memory: DeviceMemory, name: str = "policy", *, buffers: int = 0) -> None:
        """`memory` is the GPU that the tensors are on; `zerokl.kernels.dispatch.device_memory` makes it. One thread
        may use it at a time.

        `name` stands in the segments' names, for people: 1 to 32 of a-z, 0-9 and _.
        """
        if type(buffers) is not int or buffers < 0:
            raise ValueError(f"buffers {buffers!r} is not an integer from 0")
        reap_dead_segments()
        self._memory = memory
        self._name = name
        self._copies = buffers > 0
        self._turns: list[_Turn | None] = [None] * max(1, buffers)
        self._next = 0
        self._closed = False
        self._owed = OwedChecksums(memory, name)
        self._handles: dict[tuple[int, int], bytes] = {}
        """Of the allocations that were described last, by address and number."""
        self._known: KnownTensors | None = None
        self._in_place: _Reading | None = None
        self._held: list[Any] = []
        """The tensors that are read in place: their memory must not be given to others."""

    def publish(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], version: int, *, stream: int | None = None
    ) -> PublishedDeviceWeights:
        """Describe tensors, by name, for receivers; returns what these need to open them.

        Each is C-contiguous, on this publisher's GPU, float32 or bfloat16, with `data_ptr()`, `shape` and `dtype` as a
        Paddle tensor has them. What was launched on `stream` (a handle; None: Paddle's current one) is waited for. In
        place this returns while the GPU computes the checksums, which receivers wait for once they have copied.
        `version` counts from 0. Raises ManifestError for what cannot be published, DeviceHandleError for memory that
        cannot be exported, BufferLeasedError while a reader has the next buffer (in place: the publication before)
        open; the latest one then stays as it was. RuntimeError where the device fails, or has failed to compute
        checksums: `withdraw` and `close` raise that, too.
        """
        if self._closed:
            raise ValueError(f"publisher {self._name!r} is closed")
        require_version(version)
        self._owed.finish()
        named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        # A kernel that reads elsewhere would end the process.
        known = self._known = look_at(self._memory, named, self._known)
        reading = None if self._copies else self._read_in_place(known)
        turn, key = self._next_turn(len(named)), secrets.randbits(63)
        with turn.segment.writing() as shared:
            withdraw(shared)
            self._memory.settle(stream)
            if reading is None:
                reading = self._read_into_buffer(turn, known)
            else:
                self._held = [tensor for _, tensor in named]
            self._owed.begin(turn.checksums, key, reading.plan)
            if self._copies:
                self._owed.finish()
            write(shared, key, reading.descriptor)
        self._next = (self._next + 1) % len(self._turns)
        return PublishedDeviceWeights(
            segment=turn.segment.name,
            key=key,
            version=version,
            layout=known.layout,
            checksums=turn.checksums.name,
        )

    def withdraw(self, *, wait: bool = True) -> None:
        """End all publications: who comes later is refused, and the tensors may be written to once this returns.

        While a reader has one open, or the GPU computes the checksums, it waits, or with wait=False raises
        BufferLeasedError at once. A reader that dies holds nothing up. Raises RuntimeError where the GPU failed; they
        are withdrawn then.
        """
        if not wait and not self._owed.are_computed:
            raise BufferLeasedError(f"publisher {self._name!r}: checksums of what it published are being computed")
        try:
            self._owed.finish()
        finally:
            for turn in self._turns:
                if turn is not None:
                    with turn.segment.writing(wait=wait) as shared:
                        withdraw(shared)
        self._held = []

    def close(self) -> None:
        """Withdraw all publications and free the buffers; idempotent. Waits for readers."""
        self._closed = True
        try:
            self._owed.close()
        finally:
            for turn in self._turns:
                if turn is not None:
                    self._end(turn, wait=True)
            self._held = []

    def __enter__(self) -> DevicePublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _read_in_place(self, known: KnownTensors) -> _Reading:
        if self._in_place is None or self._in_place.known is not known:
            plan = self._memory.plan(known.stored)
            self._in_place = _Reading(known, plan, self._describe(known.located, known.bases, known.ids))
        return self._in_place

    def _read_into_buffer(self, turn: _Turn, known: KnownTensors) -> _Reading:
        """Make the turn's buffer large enough, too."""
        if turn.reading is None or turn.reading.known is not known:
            turn.reading = None
            if turn.size < known.total_bytes:
                if turn.buffer:
                    self._memory.free(turn.buffer)
                    turn.buffer = turn.size = 0
                turn.buffer = self._memory.allocate(known.total_bytes)
                turn.size = known.total_bytes
            places = [turn.buffer + spec.offset for spec in known.specs]
            located = [(turn.buffer, spec.offset) for spec in known.specs]
            bases = [turn.buffer] if turn.buffer else []
            descriptor = self._describe(located, bases, self._memory.allocation_ids(bases))
            turn.reading = _Reading(known, self._memory.plan(known.stored, places), descriptor)
        return turn.reading

    def _next_turn(self, count: int) -> _Turn:
        """The turn to publish that many tensors in, with segments that are large enough."""
        size = _SEGMENT_BYTES * (1 + count // 256)
        turn = self._turns[self._next]
        if turn is not None and turn.segment.size < size:
            self._end(turn)
            turn = None
        if turn is None:
            # In steps of as many tensors as the other's.
            checksums = OwnedSegment(self._name, checksums_size(256 * (1 + count // 256)))
            turn = self._turns[self._next] = _Turn(OwnedSegment(self._name, size), checksums)
        return turn

    def _end(self, turn: _Turn, *, wait: bool = False) -> None:
        with turn.segment.writing(wait=wait) as shared:
            withdraw(shared)
        self._turns[self._turns.index(turn)] = None
        turn.segment.close()
        turn.checksums.close()
        if turn.buffer:
            self._memory.free(turn.buffer)

    def _describe(self, located: Sequence[Located], bases: list[int], ids: list[int]) -> bytes:
        numbers = {base: number for number, base in enumerate(bases)}
        keys = list(zip(bases, ids, strict=True))
        self._handles = {key: self._handles.get(key) or self._export(key[0]) for key in keys}
        return Descriptor(
            gpu=self._memory.gpu,
            allocations=tuple(Allocation(handle=self._handles[key], base=key[0]) for key in keys),
            places=tuple((numbers.get(base, 0), offset) for base, offset in located),
        ).to_bytes()

    def _export(self, base: int) -> bytes:
        try:
            return self._memory.export_memory(base)
        except RuntimeError as error:
            raise DeviceHandleError(
                f"memory at {base:#x} cannot be exported, as allocators other than cudaMalloc's cannot: {error}"
            ) from error
