"""The engine's side: open a published set of weights without copying it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from zerokl.weight_sync.manifest import PublishedWeights
from zerokl.weight_sync.segments import attach, reap_if_dead
from zerokl.weight_sync.shared_memory import map_tensors, verify_checksums


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


def _release(memory: mmap.mmap) -> None:
    with suppress(BufferError):  # a view was kept: the mapping, and its lease, end with the last of them
        memory.close()
