"""The engine's side of weights that stay on the GPU: other processes' allocations, mapped while there is use for them.

What is mapped stays mapped between publications of one publisher, which has hundreds of allocations as a rule; it is
let go once the publisher has closed, died, or published other memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat

from zerokl.weight_sync.device_descriptor import (
    Descriptor,
    PublishedDeviceWeights,
    checksums_size,
    decode_layout,
    read,
    read_checksums,
)
from zerokl.weight_sync.device_memory import DEVICE_DTYPES, MappedMemory
from zerokl.weight_sync.errors import DeviceHandleError, ManifestError, PublisherDiedError, SegmentBusyError
from zerokl.weight_sync.manifest import Manifest
from zerokl.weight_sync.segments import Attachment, Owner, current_owner, is_dead, owner_of, reap_if_dead

_SOON, _LATER = 0.0002, 0.01
"""Seconds between two looks whether checksums are there: for a tenth of a second, and then."""


@dataclass(frozen=True, eq=False)
class MappedTensors:
    """The tensors of publications as they are mapped here: one object while neither their layout nor their place
    changes.
    """

    layout: Manifest
    """Names, shapes and dtypes; what `decode_layout` gives."""
    addresses: Mapping[str, int]
    """In this process, by name."""

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """By name."""
        return {spec.name: spec.dtype for spec in self.layout.tensors}


class DeviceLease:
    """The right to read one publication; ends with the context that gave it."""

    def __init__(self, published: PublishedDeviceWeights, mapped: MappedTensors, owner: Owner) -> None:
        self.published = published
        self.mapped = mapped
        self._owner = owner

    @cached_property
    def checksums(self) -> Mapping[str, int]:
        """As published, by name; waits until the publisher's GPU has computed them, so ask once all is read.

        Raises SegmentMissingError, SegmentTruncatedError, PublisherDiedError where the publisher ended before,
        DeviceHandleError where its GPU failed.
        """
        addresses = self.mapped.addresses
        shared = Attachment(self.published.checksums)
        try:
            memory = self._locked(shared, checksums_size(len(addresses)))
            values = read_checksums(memory, self.published.key, len(addresses))
        finally:
            shared.close()
        return dict(zip(addresses, values, strict=True))

    def _locked(self, shared: Attachment, size: int) -> mmap.mmap:
        """The mapping of a segment once its publisher lets go of it.

        Asked for again and again: a lock outlives its owner in the processes that this one forked.
        """
        never = threading.Event()
        for pause in chain(repeat(_SOON, 500), repeat(_LATER)):
            try:
                return shared.lock(size)
            except SegmentBusyError:
                self.check_owner()
            never.wait(pause)
        raise AssertionError("it does not end")

    @property
    def addresses(self) -> Mapping[str, int]:
        """Of the tensors, by name, in this process."""
        return self.mapped.addresses

    def contents(self, *names: str) -> dict[str, tuple[str, int]]:
        """Dtype and checksum of those that are there of some tensors."""
        return {name: (self.mapped.dtypes[name], self.checksums[name]) for name in names if name in self.checksums}

    def check_owner(self) -> None:
        """Raise PublisherDiedError if the publisher is gone: what was read may not have been the publication."""
        _check_owner(self._owner, self.published.version)


@dataclass(frozen=True)
class _Opened:
    """What was made of a publication's bytes, and what they were."""

    layout: bytes
    descriptor: bytes
    extents: list[tuple[int, int]]
    """First address of each allocation, and bytes from there."""
    mapped: MappedTensors


@dataclass
class _Publisher:
    """What is open of one segment's publisher."""

    attachment: Attachment
    owner: Owner
    is_local: bool
    """Whether it is in this process, which cannot open its own handles."""
    handles: set[bytes] = field(default_factory=set)
    """Of its mapped allocations."""
    opened: _Opened | None = None
    """The last publication, whose allocations are mapped."""


class DeviceMappings:
    """Opens publications and keeps what is mapped. For one thread at a time."""

    def __init__(self, memory: MappedMemory) -> None:
        self._memory = memory
        self._publishers: dict[str, _Publisher] = {}
        self._bases: dict[bytes, int] = {}
        """Mapped allocations by handle, once each, whoever publishes them."""

    @contextmanager
    def lease(self, published: PublishedDeviceWeights) -> Iterator[DeviceLease]:
        """Map the tensors, which have been written.

        The publisher cannot withdraw it before the block is left; by then what reads it must be done. Raises
        SegmentMissingError, SegmentBusyError, ManifestError, DeviceHandleError, PublisherDiedError.
        """
        name = published.segment
        self.drop_gone()
        publisher = self._attached(name)
        memory = publisher.attachment.lock(0)
        try:
            descriptor = read(memory, published)
            _check_owner(publisher.owner, published.version)
            opened = self._open(publisher, descriptor, published.layout)
            yield DeviceLease(published, opened.mapped, publisher.owner)
        finally:
            del memory
            publisher.attachment.unlock()
            reap_if_dead(name)
            reap_if_dead(published.checksums)
            self.drop_gone()

    def drop_gone(self) -> None:
        """Unmap the memory of publishers that have closed or died."""
        for name in [name for name, made in self._publishers.items() if made.attachment.is_unlinked]:
            self._close(self._publishers.pop(name))

    def release(self) -> None:
        """Unmap all."""
        while self._publishers:
            self._close(self._publishers.popitem()[1])

    # -- inside --------------------------------------------------------------------------------------------------------
    def _attached(self, name: str) -> _Publisher:
        if name not in self._publishers:
            attachment, owner = Attachment(name), owner_of(name)
            assert owner is not None, "attached"
            self._publishers[name] = _Publisher(attachment, owner, owner == current_owner())
        return self._publishers[name]

    def _open(self, publisher: _Publisher, descriptor: bytes, layout: bytes) -> _Opened:
        """What the last publication was opened to, where this one is the same but for its values."""
        last = publisher.opened
        known = last is not None and last.layout == layout
        if last is not None and known and last.descriptor == descriptor and self._is_there(publisher, last):
            return last
        publisher.opened = None  # of what it has mapped, some may be unmapped now
        decoded = last.mapped.layout if last is not None and known else decode_layout(layout)
        told = Descriptor.from_bytes(descriptor, decoded)
        if not self._memory.reaches(told.gpu):
            raise DeviceHandleError(
                f"the weights are on GPU {told.gpu}, which GPU {self._memory.gpu} has no peer access to"
            )
        bases = self._open_all(publisher, told)
        extents = [self._extent(base) for base in bases]
        mapped = MappedTensors(decoded, _addresses(decoded, told, extents))
        publisher.opened = _Opened(layout, descriptor, extents, mapped)
        return publisher.opened

    def _is_there(self, publisher: _Publisher, opened: _Opened) -> bool:
        """Whether the allocations are as they were: what is mapped stays until we unmap it, our own may be freed."""
        return not publisher.is_local or [self._extent(base) for base, _ in opened.extents] == opened.extents

    def _open_all(self, publisher: _Publisher, told: Descriptor) -> list[int]:
        """Where each allocation begins here."""
        if publisher.is_local:
            return [allocation.base for allocation in told.allocations]
        handles = [allocation.handle for allocation in told.allocations]
        self._unmap(publisher, publisher.handles.difference(handles))
        return [self._open_memory(publisher, handle, told.gpu) for handle in handles]

    def _open_memory(self, publisher: _Publisher, handle: bytes, gpu: str) -> int:
        if handle not in self._bases:
            try:
                self._bases[handle] = self._memory.open_memory(handle)
            except RuntimeError as error:
                raise DeviceHandleError(
                    f"a handle of memory on GPU {gpu} cannot be opened on GPU {self._memory.gpu}: {error}"
                ) from error
        publisher.handles.add(handle)
        return self._bases[handle]

    def _extent(self, base: int) -> tuple[int, int]:
        """An address where an allocation begins, and bytes from there to its end."""
        try:
            first, size = self._memory.allocation_of(base)
        except RuntimeError as error:
            raise DeviceHandleError(f"the publisher's memory is not there: {error}") from error
        return base, first + size - base

    def _unmap(self, publisher: _Publisher, handles: set[bytes]) -> None:
        """Unmap what this publisher had published and does no more, unless another has."""
        publisher.handles -= handles
        for handle in handles.difference(*(other.handles for other in self._publishers.values())):
            self._memory.close_memory(self._bases.pop(handle))

    def _close(self, publisher: _Publisher) -> None:
        self._unmap(publisher, set(publisher.handles))
        publisher.attachment.close()


def _check_owner(owner: Owner, version: int) -> None:
    if is_dead(owner):
        raise PublisherDiedError(f"version {version}: its publisher, process {owner.pid}, ended while it was read")


def _addresses(layout: Manifest, told: Descriptor, extents: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Of each tensor by name, which lies within its allocation; of an empty one 0."""
    addresses = {}
    for spec, (index, offset) in zip(layout.tensors, told.places, strict=True):
        if spec.dtype not in DEVICE_DTYPES:
            raise ManifestError(f"tensor {spec.name!r} has dtype {spec.dtype}; must be one of {DEVICE_DTYPES}")
        addresses[spec.name] = 0
        if spec.nbytes:
            base, size = extents[index]
            addresses[spec.name] = base + offset
            if offset + spec.nbytes > size:
                raise DeviceHandleError(f"tensor {spec.name!r} ends beyond the memory that was opened for it")
    return addresses
