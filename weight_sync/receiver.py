"""The engine's side: open a published set of weights without copying it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.manifest import Manifest, PublishedWeights
from zerokl.weight_sync.segments import Attachment, reap_if_dead
from zerokl.weight_sync.shared_memory import map_tensors, verify_checksums
from zerokl.weight_sync.transport import DEFAULT_BUCKET_BYTES, Bucket, Piece


@contextmanager
def open_published(published: PublishedWeights) -> Iterator[dict[str, NDArray[Any]]]:
    """Map the tensors by name, read-only and without a copy, after their sizes and checksums were verified.

    The publisher cannot overwrite them before the block is left; the dict is empty then. A view that was kept beyond
    the block stays valid, and keeps the publisher off until it is gone.

    Raises SegmentMissingError, SegmentTruncatedError, SegmentBusyError or ChecksumError (all of them ValueErrors)
    before the block is entered. If the publisher died meanwhile, the segment is removed on the way out.
    """
    tensors: dict[str, NDArray[Any]] = {}
    with _attached(published) as memory:
        try:
            verify_checksums(memory, published.manifest)
            tensors.update(map_tensors(memory, published.manifest))
            yield tensors
        finally:
            tensors.clear()


class SegmentLease:
    """A segment that is mapped: a `Lease` whose buckets are views of it, and last."""

    def __init__(self, memory: mmap.mmap, manifest: Manifest) -> None:
        self._memory = memory
        self.manifest = manifest

    def buckets(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[Bucket]:
        """One tensor each; nothing is copied, so `bucket_bytes` bounds nothing."""
        for spec in self.manifest.tensors:
            offset = spec.offset if spec.nbytes else 0
            data = np.frombuffer(self._memory, np.uint8, spec.nbytes, offset)
            yield Bucket(pieces=(Piece(name=spec.name, start=0, data=data),), lasting=True)


@contextmanager
def lease_published(published: PublishedWeights) -> Iterator[SegmentLease]:
    """Map a segment; its content is for an `UpdateSession` to verify. Otherwise as `open_published`."""
    with _attached(published) as memory:
        yield SegmentLease(memory, published.manifest)


class SegmentMappings:
    """Segments that stay mapped between their publications: mapping a large one anew takes longer than reading it.

    One that is gone elsewhere is let go with the next lease, or by `release`. For one thread at a time.
    """

    def __init__(self) -> None:
        self._attachments: dict[str, Attachment] = {}

    @contextmanager
    def lease(self, published: PublishedWeights) -> Iterator[SegmentLease]:
        """As `lease_published`; but views must not be read after the block: the publisher writes there again."""
        name = published.segment
        self._drop_unlinked()
        if name not in self._attachments:
            self._attachments[name] = Attachment(name)
        attachment = self._attachments[name]
        memory = attachment.lock(published.manifest.total_bytes)
        try:
            yield SegmentLease(memory, published.manifest)
        finally:
            del memory
            attachment.unlock()
            reap_if_dead(name)
            self._drop_unlinked()

    def release(self) -> None:
        """Unmap all."""
        for attachment in self._attachments.values():
            attachment.close()
        self._attachments.clear()

    def _drop_unlinked(self) -> None:
        for name in [name for name, attachment in self._attachments.items() if attachment.is_unlinked]:
            self._attachments.pop(name).close()


@contextmanager
def _attached(published: PublishedWeights) -> Iterator[mmap.mmap]:
    """The mapping for the time of the block; a view that is kept keeps it, and its lease."""
    attachment = Attachment(published.segment)
    try:
        yield attachment.lock(published.manifest.total_bytes)
    finally:
        attachment.close()
        reap_if_dead(published.segment)
