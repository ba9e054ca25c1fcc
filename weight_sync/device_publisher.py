"""The trainer's side of weights that stay on the GPU: handles of its memory take the place of copies on the host."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from zerokl.weight_sync.device_checksums import CHECKSUM_KIND
from zerokl.weight_sync.device_descriptor import Allocation, Descriptor, PublishedDeviceWeights, withdraw
from zerokl.weight_sync.device_memory import DEVICE_DTYPES, DeviceMemory, StoredTensor, as_rows
from zerokl.weight_sync.errors import DeviceHandleError, ManifestError
from zerokl.weight_sync.manifest import Manifest, plan_layout
from zerokl.weight_sync.segments import OwnedSegment, reap_dead_segments
from zerokl.weight_sync.tensor_spec import TensorSpec

_Described = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""
_Located = tuple[int, int]
"""First address of an allocation, and bytes from there."""

_SEGMENT_BYTES = 1 << 16
"""For the descriptor of each 256 tensors, which takes some 110 bytes of one."""


@dataclass(eq=False)
class _Turn:
    """A descriptor's segment, and the buffer that it describes; without one it describes the trainer's memory."""

    segment: OwnedSegment
    buffer: int = 0
    size: int = 0


class DevicePublisher:
    """Publishes sets of weights that lie in a GPU's memory, for engines on the same machine.

    With `buffers` 0 the tensors are read where they are: a trainer must not write to them before `withdraw`, which
    waits for readers. With more, `publish` copies them, on the GPU, into as many buffers in turn, and the trainer may
    go on at once; as with `WeightPublisher` the latest of two is never overwritten. Example:

        with DevicePublisher(device_memory("gpu")) as publisher:
            published = publisher.publish(model.named_parameters(), version=1)
            ...                                     # elsewhere: engine.update_weights(published)
            publisher.withdraw()
            optimizer.step()

    Not thread-safe. Segments vanish with `close`, or with the process, however it ends.
    """

    def __init__(self, memory: DeviceMemory, name: str = "policy", *, buffers: int = 0) -> None:
        """`memory` is the GPU that the tensors are on; `zerokl.kernels.dispatch.device_memory` makes it.

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
        self._event = memory.new_event()
        self._event_handle = memory.export_event(self._event)
        self._handles: dict[tuple[int, int], bytes] = {}
        """Of the allocations of the last publication, by address and number."""
        self._described: list[_Described] = []
        self._planned: tuple[tuple[TensorSpec, ...], int] = ((), 0)
        """The layout of the set that is described so: a trainer's next one is laid out alike."""
        self._held: list[Any] = []
        """The tensors that are read in place: their memory must not be given to others."""

    def publish(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], version: int, *, stream: int | None = None
    ) -> PublishedDeviceWeights:
        """Describe tensors, by name, for receivers; returns what these need to open them.

        Each is C-contiguous, on this publisher's GPU, float32 or bfloat16, with `data_ptr()`, `shape` and `dtype` as a
        Paddle tensor has them. What was launched on `stream` (a handle; None: Paddle's current one) comes first, and
        their checksums are computed there; this returns once they are known. `version` counts from 0. Raises
        ManifestError for what cannot be published, DeviceHandleError for memory that cannot be exported,
        BufferLeasedError while a reader has the next buffer (in place: the publication before) open; the latest one
        then stays as it was. RuntimeError where the device fails.
        """
        if self._closed:
            raise ValueError(f"publisher {self._name!r} is closed")
        named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        described, addresses = _described(named)
        specs, total_bytes = self._layout(described)
        stored = [as_rows(at, shape, dtype) for at, (_, dtype, shape) in zip(addresses, described, strict=True)]
        planned = Manifest(version=version, tensors=specs, total_bytes=total_bytes, checksum_kind=CHECKSUM_KIND)
        located = self._locate(stored, specs)  # a kernel that reads elsewhere would end the process
        descriptor = None if self._copies else self._describe(located)
        turn = self._next_turn(_SEGMENT_BYTES * (1 + len(named) // 256))
        with turn.segment.writing() as shared:
            withdraw(shared)
            self._memory.follow(stream)
            if descriptor is None:
                checksums = self._into_buffer(turn, planned, stored)
                descriptor = self._describe([(turn.buffer, spec.offset) for spec in specs])
            else:
                checksums = self._memory.checksums(stored)
                self._held = [tensor for _, tensor in named]
            self._memory.record(self._event)
            descriptor.write(shared)
        self._next = (self._next + 1) % len(self._turns)
        found = tuple(spec.with_checksum(value) for spec, value in zip(specs, checksums, strict=True))
        return PublishedDeviceWeights(
            segment=turn.segment.name, key=descriptor.key, manifest=planned.with_checksums(found)
        )

    def withdraw(self, *, wait: bool = True) -> None:
        """End all publications: who comes later is refused, and the tensors may be written to once this returns.

        While a reader has one open it waits, or with wait=False raises BufferLeasedError at once. A reader that dies
        holds nothing up.
        """
        for turn in self._turns:
            if turn is not None:
                with turn.segment.writing(wait=wait) as shared:
                    withdraw(shared)
        self._held = []

    def close(self) -> None:
        """Withdraw all publications and free the buffers; idempotent. Waits for readers."""
        self._closed = True
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
    def _layout(self, described: list[_Described]) -> tuple[tuple[TensorSpec, ...], int]:
        if described != self._described:
            self._planned, self._described = plan_layout(described), described
        return self._planned

    def _next_turn(self, size: int) -> _Turn:
        """The turn to publish in, with a segment of at least this size."""
        turn = self._turns[self._next]
        if turn is not None and turn.segment.size < size:
            self._end(turn)
            turn = None
        if turn is None:
            turn = self._turns[self._next] = _Turn(OwnedSegment(self._name, size))
        return turn

    def _end(self, turn: _Turn, *, wait: bool = False) -> None:
        with turn.segment.writing(wait=wait) as shared:
            withdraw(shared)
        self._turns[self._turns.index(turn)] = None
        turn.segment.close()
        if turn.buffer:
            self._memory.free(turn.buffer)

    def _into_buffer(self, turn: _Turn, planned: Manifest, stored: Sequence[StoredTensor]) -> list[int]:
        """Copy the tensors; returns their checksums."""
        if turn.size < planned.total_bytes:
            if turn.buffer:
                self._memory.free(turn.buffer)
                turn.buffer = turn.size = 0
            turn.buffer = self._memory.allocate(planned.total_bytes)
            turn.size = planned.total_bytes
        return self._memory.copy(stored, [turn.buffer + spec.offset for spec in planned.tensors])

    def _describe(self, located: Sequence[_Located]) -> Descriptor:
        numbers = {base: number for number, base in enumerate(dict.fromkeys(base for base, _ in located if base))}
        keys = [(base, self._memory.allocation_id(base)) for base in numbers]
        self._handles = {key: self._handles.get(key) or self._export(key[0]) for key in keys}
        return Descriptor(
            key=secrets.randbits(63),
            gpu=self._memory.gpu,
            event=self._event_handle,
            local_event=self._event,
            allocations=tuple(Allocation(handle=self._handles[key], base=key[0]) for key in keys),
            places=tuple((numbers.get(base, 0), offset) for base, offset in located),
        )

    def _locate(self, stored: Sequence[StoredTensor], specs: Sequence[TensorSpec]) -> list[_Located]:
        """First address of the allocation of each tensor, and the tensor's place in it; of an empty one zeros."""
        found = []
        for tensor, spec in zip(stored, specs, strict=True):
            if not spec.nbytes:
                found.append((0, 0))
                continue
            base, size = self._allocation_of(spec, tensor.address)
            if tensor.address + spec.nbytes > base + size:
                raise DeviceHandleError(f"tensor {spec.name!r} does not lie in one allocation")
            found.append((base, tensor.address - base))
        return found

    def _allocation_of(self, spec: TensorSpec, address: int) -> tuple[int, int]:
        try:
            return self._memory.allocation_of(address)
        except RuntimeError as error:
            raise DeviceHandleError(f"tensor {spec.name!r} is not in a GPU's memory: {error}") from error

    def _export(self, base: int) -> bytes:
        try:
            return self._memory.export_memory(base)
        except RuntimeError as error:
            raise DeviceHandleError(
                f"memory at {base:#x} cannot be exported, as allocators other than cudaMalloc's cannot: {error}"
            ) from error


def _described(named: list[tuple[str, Any]]) -> tuple[list[_Described], list[int]]:
    """Name, dtype and shape of each tensor, and its address."""
    described, addresses = [], []
    for name, tensor in named:
        if not hasattr(tensor, "data_ptr"):
            raise ManifestError(f"tensor {name!r} is a {type(tensor).__name__}, not a tensor on a GPU")
        dtype = str(tensor.dtype).rpartition(".")[2]  # "paddle.bfloat16"
        if dtype not in DEVICE_DTYPES:
            raise ManifestError(f"tensor {name!r} has dtype {dtype}; must be one of {DEVICE_DTYPES}")
        if hasattr(tensor, "is_contiguous") and not tensor.is_contiguous():
            raise ManifestError(f"tensor {name!r} is not contiguous")
        described.append((name, dtype, tuple(tensor.shape)))
        addresses.append(int(tensor.data_ptr()))
    return described, addresses
