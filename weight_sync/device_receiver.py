"""The engine's side of weights that stay on the GPU: other processes' allocations, mapped while there is use for them.

What is mapped stays mapped between publications of one publisher, which has hundreds of allocations as a rule; it is
let go once the publisher has closed, died, or published other memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from zerokl.weight_sync.device_descriptor import Descriptor, PublishedDeviceWeights
from zerokl.weight_sync.device_memory import DEVICE_DTYPES, MappedMemory
from zerokl.weight_sync.errors import DeviceHandleError, ManifestError, PublisherDiedError
from zerokl.weight_sync.manifest import Manifest
from zerokl.weight_sync.segments import Attachment, Owner, current_owner, is_dead, owner_of, reap_if_dead


class DeviceLease:
    """The right to read one publication; ends with the context that gave it."""

    def __init__(self, manifest: Manifest, addresses: Mapping[str, int], owner: Owner) -> None:
        self.manifest = manifest
        self.addresses = addresses
        """Of the tensors, by name, in this process."""
        self._owner = owner

    def check_owner(self) -> None:
        """Raise PublisherDiedError if the publisher is gone: what was read may not have been the publication."""
        if is_dead(self._owner):
            raise PublisherDiedError(
                f"version {self.manifest.version}: its publisher, process {self._owner.pid}, ended while it was read"
            )


@dataclass
class _Publisher:
    """What is open of one segment's publisher."""

    attachment: Attachment
    handles: set[bytes] = field(default_factory=set)
    """Of its mapped allocations."""
    events: dict[bytes, int] = field(default_factory=dict)


class DeviceMappings:
    """Opens publications and keeps what is mapped. For one thread at a time."""

    def __init__(self, memory: MappedMemory) -> None:
        self._memory = memory
        self._publishers: dict[str, _Publisher] = {}
        self._bases: dict[bytes, int] = {}
        """Mapped allocations by handle, once each, whoever publishes them."""

    @contextmanager
    def lease(self, published: PublishedDeviceWeights) -> Iterator[DeviceLease]:
        """Map the tensors; what is asked of the memory from then on waits for the publisher's writes, on the device.

        The publisher cannot withdraw it before the block is left; by then what reads it must be done. Raises
        SegmentMissingError, SegmentBusyError, ManifestError, DeviceHandleError, PublisherDiedError.
        """
        name = published.segment
        self.drop_gone()
        if name not in self._publishers:
            self._publishers[name] = _Publisher(Attachment(name))
        publisher = self._publishers[name]
        memory = publisher.attachment.lock(0)
        try:
            owner = owner_of(name)
            assert owner is not None, "attached"
            descriptor = Descriptor.read(memory, published)
            lease = DeviceLease(published.manifest, {}, owner)
            lease.check_owner()
            lease.addresses = self._map(publisher, descriptor, published.manifest, is_local=owner == current_owner())
            yield lease
        finally:
            del memory
            publisher.attachment.unlock()
            reap_if_dead(name)
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
    def _map(
        self, publisher: _Publisher, descriptor: Descriptor, manifest: Manifest, *, is_local: bool
    ) -> dict[str, int]:
        if not self._memory.reaches(descriptor.gpu):
            raise DeviceHandleError(
                f"the weights are on GPU {descriptor.gpu}, which GPU {self._memory.gpu} has no peer access to"
            )
        if is_local:  # a process cannot open its own handles
            bases = [allocation.base for allocation in descriptor.allocations]
            self._wait_for(descriptor.local_event)
        else:
            handles = [allocation.handle for allocation in descriptor.allocations]
            self._unmap(publisher, publisher.handles.difference(handles))
            bases = [self._open(publisher, handle, descriptor.gpu) for handle in handles]
            if descriptor.gpu == self._memory.gpu:  # of a peer's nothing is left to wait for: `publish` has done so
                self._wait_for(self._open_event(publisher, descriptor.event))
        ends = [sum(self._extent(base)) for base in bases]
        addresses = {}
        for spec, (index, offset) in zip(manifest.tensors, descriptor.places, strict=True):
            if spec.dtype not in DEVICE_DTYPES:
                raise ManifestError(f"tensor {spec.name!r} has dtype {spec.dtype}; must be one of {DEVICE_DTYPES}")
            addresses[spec.name] = bases[index] + offset if spec.nbytes else 0
            if spec.nbytes and addresses[spec.name] + spec.nbytes > ends[index]:
                raise DeviceHandleError(f"tensor {spec.name!r} ends beyond the memory that was opened for it")
        return addresses

    def _open(self, publisher: _Publisher, handle: bytes, gpu: str) -> int:
        if handle not in self._bases:
            try:
                self._bases[handle] = self._memory.open_memory(handle)
            except RuntimeError as error:
                raise DeviceHandleError(
                    f"a handle of memory on GPU {gpu} cannot be opened on GPU {self._memory.gpu}: {error}"
                ) from error
        publisher.handles.add(handle)
        return self._bases[handle]

    def _open_event(self, publisher: _Publisher, handle: bytes) -> int:
        if handle not in publisher.events:
            try:
                publisher.events[handle] = self._memory.open_event(handle)
            except RuntimeError as error:
                raise DeviceHandleError(f"the publisher's event cannot be opened: {error}") from error
        return publisher.events[handle]

    def _wait_for(self, event: int) -> None:
        try:
            self._memory.wait(event)
        except RuntimeError as error:
            raise DeviceHandleError(f"the publisher's event cannot be waited for: {error}") from error

    def _extent(self, base: int) -> tuple[int, int]:
        try:
            return self._memory.allocation_of(base)
        except RuntimeError as error:
            raise DeviceHandleError(f"the publisher's memory is not there: {error}") from error

    def _unmap(self, publisher: _Publisher, handles: set[bytes]) -> None:
        """Unmap what this publisher had published and does no more, unless another has."""
        publisher.handles -= handles
        for handle in handles.difference(*(other.handles for other in self._publishers.values())):
            self._memory.close_memory(self._bases.pop(handle))

    def _close(self, publisher: _Publisher) -> None:
        self._unmap(publisher, set(publisher.handles))
        for event in publisher.events.values():
            self._memory.close_event(event)
        publisher.attachment.close()
