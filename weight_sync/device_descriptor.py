"""What a trainer says of weights in a GPU's memory: the publication that is passed on, and the descriptor behind it.

The publication (segment, key, version, layout, segment of the checksums) may travel anywhere. Where the tensors are,
and the handles that open them, stand in the shared memory segment, which is for this user's processes alone and whose
lease is the lease of the memory. The checksums come to a segment of their own, which the publisher holds until they are
known: a receiver copies meanwhile. What stays as it is from one publication to the next, layout and descriptor, is
encoded apart: a receiver that sees the same bytes again keeps what it made of them.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.device_checksums import CHECKSUM_KIND
from zerokl.weight_sync.errors import DeviceHandleError, ManifestError, PublisherDiedError, SegmentBusyError
from zerokl.weight_sync.manifest import FORMAT_VERSION, Manifest, require_version, unpack
from zerokl.weight_sync.tensor_spec import MAX_INT, TensorSpec, is_integer

_WORD = 8
_HEAD = 2 * _WORD
"""Bytes before the encoded descriptor: its size, 0 where nothing is published, and the publication's key."""
_FAILED = 1 << 63
"""Added to the key in place of checksums: keys have 63 bits."""
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
    checksums: str
    """Name of the segment that their checksums come to: `read_checksums`."""

    def __post_init__(self) -> None:
        if not isinstance(self.segment, str) or not is_integer(self.key, MAX_INT):
            raise ManifestError(f"device weights: segment {self.segment!r:.200}, key {self.key!r} are none")
        require_version(self.version)
        if not isinstance(self.layout, bytes) or not isinstance(self.checksums, str):
            raise ManifestError("device weights: expected an encoded layout and the name of a segment")

    @property
    def manifest(self) -> Manifest:
        """Names, shapes and dtypes, without checksums. Raises ManifestError as `decode_layout`."""
        return decode_layout(self.layout).with_version(self.version)

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, segment, key, version, layout, segment of checksums]."""
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


def write_checksums(memory: mmap.mmap, key: int, checksums: NDArray[np.uint64] | None) -> None:
    """Note the checksums of publication `key`, or that there are none, in their segment, which is held against readers
    and large enough.
    """
    if checksums is not None:
        encoded = checksums.astype("<u8").tobytes()
        memory[_WORD : _WORD + len(encoded)] = encoded
    state = key if checksums is not None else key | _FAILED
    memory[:_WORD] = state.to_bytes(_WORD, "little")


def read_checksums(memory: mmap.mmap, key: int, count: int) -> list[int]:
    """The checksums of that many tensors of publication `key`, in its order.

    Their segment is leased, and of the size for so many. Raises DeviceHandleError where there are none,
    PublisherDiedError where nobody noted that: the lock of who would have has gone with it.
    """
    state = int.from_bytes(memory[:_WORD], "little")
    if state == key | _FAILED:
        raise DeviceHandleError("the publisher's GPU failed to compute the checksums of what it published")
    if state != key:
        raise PublisherDiedError("the publisher ended before its GPU had computed the checksums")
    values: list[int] = np.frombuffer(memory[_WORD : checksums_size(count)], "<u8").tolist()
    return values


def checksums_size(count: int) -> int:
    """Bytes of a segment for the checksums of so many tensors."""
    return _WORD * (1 + count)


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
    allocations: tuple[Allocation, ...]
    places: tuple[tuple[int, int], ...]
    """In the layout's order: which allocation, and bytes from its first address."""

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, GPU, rows of allocations, places]."""
        allocations = [(allocation.handle, allocation.base) for allocation in self.allocations]
        fields = (self.gpu, allocations, self.places)
        encoded: bytes = msgpack.packb((FORMAT_VERSION, *fields))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes, layout: Manifest) -> Descriptor:
        """Inverse of `to_bytes`. Raises ManifestError for anything else, and where it does not fit the layout."""
        gpu, allocations, places = unpack(encoded, "descriptor", 3)
        if not isinstance(gpu, str) or len(gpu) > _MAX_GPU:
            raise ManifestError(f"descriptor: {gpu!r:.200} is no name of a GPU")
        made = Descriptor(
            gpu=gpu,
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
