"""What a trainer says of weights in a GPU's memory: the publication that is passed on, and the descriptor behind it.

The publication (segment, key, version, layout, checksums) may travel anywhere. Where the tensors are, and the handles
that open them, stand in the shared memory segment, which is for this user's processes alone and whose lease is the
lease of the memory. What stays as it is from one publication to the next, layout and descriptor, is encoded apart: a
receiver that sees the same bytes again keeps what it made of them.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

from zerokl.weight_sync.device_checksums import CHECKSUM_KIND
from zerokl.weight_sync.errors import ManifestError, SegmentBusyError
from zerokl.weight_sync.manifest import FORMAT_VERSION, Manifest, require_version, unpack
from zerokl.weight_sync.tensor_spec import MAX_INT, TensorSpec, is_integer

_WORD = 8
_HEAD = 2 * _WORD
"""Bytes before the encoded descriptor: its size, 0 where nothing is published, and the publication's key."""
_HANDLE = 64
"""Bytes of a handle of the CUDA runtime."""
_MAX_GPU = 64
"""Letters of a GPU's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDeviceWeights:
    """A set of weights in a GPU's memory: all that a receiver on this machine needs to open it.

    Raises ManifestError for fields of another kind. What `layout` says is checked by whoever reads it.
    """

    segment: str
    """Name of the POSIX shared memory segment with the descriptor."""
    key: int
    """The publication's; a later one in the same segment has another."""
    version: int
    """Policy version, from 0."""
    layout: bytes
    """What `encode_layout` made of the tensors."""
    checksums: bytes
    """Of the tensors in their order, 8 bytes each, little-endian."""

    def __post_init__(self) -> None:
        if not isinstance(self.segment, str) or not is_integer(self.key, MAX_INT):
            raise ManifestError(f"device weights: segment {self.segment!r:.200}, key {self.key!r} are none")
        require_version(self.version)
        if not isinstance(self.layout, bytes) or not isinstance(self.checksums, bytes):
            raise ManifestError("device weights: expected an encoded layout and the bytes of checksums")

    @property
    def manifest(self) -> Manifest:
        """All that is known of the set. Raises ManifestError as `decode_layout`, and where checksums do not fit."""
        layout = decode_layout(self.layout).with_version(self.version)
        specs = zip(layout.tensors, self.checksums_of(layout), strict=True)
        return layout.with_checksums(tuple(spec.with_checksum(value) for spec, value in specs))

    def checksums_of(self, layout: Manifest) -> list[int]:
        """Those of a layout's tensors, in its order. Raises ManifestError where there are more or fewer."""
        if len(self.checksums) != _WORD * len(layout.tensors):
            raise ManifestError(
                f"device weights: {len(self.checksums)} bytes of checksums for {len(layout.tensors)} tensors"
            )
        values: list[int] = np.frombuffer(self.checksums, "<u8").tolist()
        return values

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, segment, key, version, layout, checksums]."""
        fields = (self.segment, self.key, self.version, self.layout, self.checksums)
        encoded: bytes = msgpack.packb((FORMAT_VERSION, *fields))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes) -> PublishedDeviceWeights:
        """Inverse of `to_bytes`. Raises ManifestError for bytes of another form; see the class for the layout's."""
        segment, key, version, layout, checksums = unpack(encoded, "device weights", 5)
        return PublishedDeviceWeights(segment=segment, key=key, version=version, layout=layout, checksums=checksums)


def encode_layout(tensors: tuple[TensorSpec, ...], total_bytes: int) -> bytes:
    """A set without what changes with each publication: its manifest, of version 0 and without checksums.

    Offsets say where tensors lie in a publisher's buffer; those of a trainer's own memory lie anywhere. Raises
    ManifestError for tensors that make no manifest.
    """
    return Manifest(version=0, tensors=tensors, total_bytes=total_bytes, checksum_kind=CHECKSUM_KIND).to_bytes()


def decode_layout(layout: bytes) -> Manifest:
    """Inverse of `encode_layout`. Raises ManifestError for a delta, for checksums that no device makes, and for bytes
    that are no manifest.
    """
    manifest = Manifest.from_bytes(layout)
    if manifest.parent is not None or manifest.checksum_kind != CHECKSUM_KIND:
        raise ManifestError(f"device weights: must be complete, with checksums of kind {CHECKSUM_KIND!r}")
    return manifest


def write(memory: mmap.mmap, key: int, descriptor: bytes) -> None:
    """Publish an encoded descriptor in a segment, which is held against readers and large enough."""
    assert _HEAD + len(descriptor) <= len(memory), f"a descriptor of {len(descriptor)} bytes"
    memory[_HEAD : _HEAD + len(descriptor)] = descriptor
    memory[_WORD:_HEAD] = key.to_bytes(_WORD, "little")
    memory[:_WORD] = len(descriptor).to_bytes(_WORD, "little")


def withdraw(memory: mmap.mmap) -> None:
    """Have a segment, which is held against readers, publish nothing."""
    memory[:_WORD] = bytes(_WORD)


def read(memory: mmap.mmap, published: PublishedDeviceWeights) -> bytes:
    """The encoded descriptor of a publication in its segment, which is leased.

    Raises SegmentBusyError where it is there no more, ManifestError for one that the segment has no room for.
    """
    size = int.from_bytes(memory[:_WORD], "little")
    if size > len(memory) - _HEAD:
        raise ManifestError(f"segment {published.segment}: descriptor of {size} bytes in {len(memory)}")
    if not size:
        raise SegmentBusyError(f"version {published.version} was withdrawn: its publisher writes to that memory")
    if int.from_bytes(memory[_WORD:_HEAD], "little") != published.key:
        raise SegmentBusyError(f"segment {published.segment} holds a later publication than {published.version}")
    return memory[_HEAD : _HEAD + size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Device memory that its process exports."""

    handle: bytes
    base: int
    """First address, in the publisher's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Where the tensors of a publication are."""

    gpu: str
    """Where they are: `DeviceMemory.gpu`."""
    event: bytes
    """Handle of the event that is reached once the tensors have been written."""
    local_event: int
    """The event in the publisher's process."""
    allocations: tuple[Allocation, ...]
    places: tuple[tuple[int, int], ...]
    """In the layout's order: which allocation, and bytes from its first address."""

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, GPU, event, local event, rows of allocations, places]."""
        allocations = [(allocation.handle, allocation.base) for allocation in self.allocations]
        fields = (self.gpu, self.event, self.local_event, allocations, self.places)
        encoded: bytes = msgpack.packb((FORMAT_VERSION, *fields))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes, layout: Manifest) -> Descriptor:
        """Inverse of `to_bytes`. Raises ManifestError for anything else, and where it does not fit the layout."""
        gpu, event, local_event, allocations, places = unpack(encoded, "descriptor", 5)
        if not isinstance(gpu, str) or len(gpu) > _MAX_GPU:
            raise ManifestError(f"descriptor: {gpu!r:.200} is no name of a GPU")
        if not _is_handle(event) or not is_integer(local_event, MAX_INT):
            raise ManifestError("descriptor: the event is no handle and number")
        made = Descriptor(
            gpu=gpu,
            event=event,
            local_event=local_event,
            allocations=tuple(_allocation(row) for row in _rows("allocations", allocations)),
            places=tuple((index, offset) for index, offset in _rows("places", places)),
        )
        made._check_places(layout)
        return made

    def _check_places(self, layout: Manifest) -> None:
        if len(self.places) != len(layout.tensors):
            raise ManifestError(f"descriptor: {len(self.places)} places for {len(layout.tensors)} tensors")
        for index, offset in self.places:
            if not is_integer(index, max(0, len(self.allocations) - 1)) or not is_integer(offset, MAX_INT):
                raise ManifestError(f"descriptor: place ({index!r}, {offset!r}) is in none of its allocations")


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
