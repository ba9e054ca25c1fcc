"""What a trainer says of weights in a GPU's memory: the publication that is passed on, and the descriptor behind it.

The publication (segment, key, manifest) may travel anywhere. Where the bytes are, and the handles that open them, stand
in the shared memory segment, which is for this user's processes alone and whose lease is the lease of the memory.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

from zerokl.weight_sync.device_checksums import CHECKSUM_KIND
from zerokl.weight_sync.errors import ManifestError, SegmentBusyError
from zerokl.weight_sync.manifest import FORMAT_VERSION, Manifest, unpack
from zerokl.weight_sync.tensor_spec import MAX_INT, is_integer

_HEAD = 8
"""Bytes before the encoded descriptor: its size, 0 where nothing is published."""
_HANDLE = 64
"""Bytes of a handle of the CUDA runtime."""
_MAX_GPU = 64
"""Letters of a GPU's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDeviceWeights:
    """A set of weights in a GPU's memory: all that a receiver on this machine needs to open it.

    Raises ManifestError for a delta, and for checksums that no device makes.
    """

    segment: str
    """Name of the POSIX shared memory segment with the descriptor."""
    key: int
    """The descriptor's; a later one in the same segment has another."""
    manifest: Manifest
    """Offsets say where tensors lie in a publisher's buffer; those of a trainer's own memory lie anywhere."""

    def __post_init__(self) -> None:
        if not isinstance(self.segment, str) or not is_integer(self.key, MAX_INT):
            raise ManifestError(f"device weights: segment {self.segment!r:.200}, key {self.key!r} are none")
        if self.manifest.parent is not None or self.manifest.checksum_kind != CHECKSUM_KIND:
            raise ManifestError(f"device weights: must be complete, with checksums of kind {CHECKSUM_KIND!r}")

    @property
    def version(self) -> int:
        """The manifest's policy version."""
        return self.manifest.version

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, segment, key, encoded manifest]."""
        encoded: bytes = msgpack.packb((FORMAT_VERSION, self.segment, self.key, self.manifest.to_bytes()))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes) -> PublishedDeviceWeights:
        """Inverse of `to_bytes`. Raises ManifestError for anything else than its output."""
        segment, key, manifest = unpack(encoded, "device weights", 3)
        if not isinstance(manifest, bytes):
            raise ManifestError("device weights: expected an encoded manifest")
        return PublishedDeviceWeights(segment=segment, key=key, manifest=Manifest.from_bytes(manifest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Device memory that its process exports."""

    handle: bytes
    base: int
    """First address, in the publisher's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Where the tensors of one publication are."""

    key: int
    gpu: str
    """Where they are: `DeviceMemory.gpu`."""
    event: bytes
    """Handle of the event that is reached once the tensors have been written."""
    local_event: int
    """The event in the publisher's process."""
    allocations: tuple[Allocation, ...]
    places: tuple[tuple[int, int], ...]
    """In the manifest's order: which allocation, and bytes from its first address."""

    def write(self, memory: mmap.mmap) -> None:
        """Put it into a segment, which is held against readers and large enough."""
        encoded = self._encoded()
        assert _HEAD + len(encoded) <= len(memory), f"a descriptor of {len(encoded)} bytes"
        memory[_HEAD : _HEAD + len(encoded)] = encoded
        memory[:_HEAD] = len(encoded).to_bytes(_HEAD, "little")

    def _encoded(self) -> bytes:
        allocations = [(allocation.handle, allocation.base) for allocation in self.allocations]
        fields = (self.key, self.gpu, self.event, self.local_event, allocations, self.places)
        encoded: bytes = msgpack.packb((FORMAT_VERSION, *fields))
        return encoded

    @staticmethod
    def read(memory: mmap.mmap, published: PublishedDeviceWeights) -> Descriptor:
        """The descriptor of a publication in its segment, which is leased.

        Raises SegmentBusyError where it is there no more, ManifestError for one that does not fit.
        """
        size = int.from_bytes(memory[:_HEAD], "little")
        if size > len(memory) - _HEAD:
            raise ManifestError(f"segment {published.segment}: descriptor of {size} bytes in {len(memory)}")
        if not size:
            raise SegmentBusyError(f"version {published.version} was withdrawn: its publisher writes to that memory")
        key, gpu, event, local_event, allocations, places = unpack(memory[_HEAD : _HEAD + size], "descriptor", 6)
        if key != published.key:
            raise SegmentBusyError(f"segment {published.segment} holds a later publication than {published.version}")
        if not isinstance(gpu, str) or len(gpu) > _MAX_GPU:
            raise ManifestError(f"descriptor: {gpu!r:.200} is no name of a GPU")
        if not _is_handle(event) or not is_integer(local_event, MAX_INT):
            raise ManifestError("descriptor: the event is no handle and number")
        read = Descriptor(
            key=key,
            gpu=gpu,
            event=event,
            local_event=local_event,
            allocations=tuple(_allocation(row) for row in _rows("allocations", allocations)),
            places=tuple((index, offset) for index, offset in _rows("places", places)),
        )
        read._check_places(published.manifest)
        return read

    def _check_places(self, manifest: Manifest) -> None:
        if len(self.places) != len(manifest.tensors):
            raise ManifestError(f"descriptor: {len(self.places)} places for {len(manifest.tensors)} tensors")
        for index, offset in self.places:
            if not is_integer(index, max(0, len(self.allocations) - 1)) or not is_integer(offset, MAX_INT):
                raise ManifestError(f"descriptor: place ({index!r}, {offset!r}) is in none of its allocations")


def withdraw(memory: mmap.mmap) -> None:
    """Have a segment, which is held against readers, publish nothing."""
    memory[:_HEAD] = bytes(_HEAD)


def _rows(what: str, rows: Any) -> list[tuple[Any, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ManifestError(f"descriptor: {what} are no pairs")
    return [(first, second) for first, second in rows]


def _allocation(row: tuple[Any, Any]) -> Allocation:
    handle, base = row
    if not _is_handle(handle) or not is_integer(base, MAX_INT):
        raise ManifestError("descriptor: an allocation is no handle and address")
    return Allocation(handle=handle, base=base)


def _is_handle(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == _HANDLE
