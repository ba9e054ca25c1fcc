"""The engine's side: open a published set of weights without copying it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.manifest import Manifest, PublishedWeights
from zerokl.weight_sync.segments import attach, reap_if_dead
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
    memory = attach(published.segment, published.manifest.total_bytes)
    tensors: dict[str, NDArray[Any]] = {}
    try:
        verify_checksums(memory, published.manifest)
        tensors.update(map_tensors(memory, published.manifest))
        yield tensors
    finally:
        tensors.clear()
        _release(memory)
        reap_if_dead(published.segment)


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
    memory = attach(published.segment, published.manifest.total_bytes)
    try:
        yield SegmentLease(memory, published.manifest)
    finally:
        _release(memory)
        reap_if_dead(published.segment)


def _release(memory: mmap.mmap) -> None:
    with suppress(BufferError):  # a view was kept: the mapping, and its lease, end with the last of them
        memory.close()
