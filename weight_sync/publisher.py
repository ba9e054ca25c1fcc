"""The trainer's side: copy weights into shared memory, version by version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.manifest import Manifest, PublishedWeights, plan_layout
from zerokl.weight_sync.segments import OwnedSegment, reap_dead_segments
from zerokl.weight_sync.shared_memory import write_tensors


class WeightPublisher:
    """Publishes sets of weights through shared memory, in turn into `buffers` segments that are kept for re-use.

    The latest publication is never overwritten (unless there is one buffer only), and no publication while a reader has
    it open. So with two buffers version v stays whole until v + 2 is published. Example:

        with WeightPublisher() as publisher:
            published = publisher.publish(model.named_arrays(), version=1)
            engine.update_weights(published)

    Not thread-safe. Segments vanish with `close`, or with the process, however it ends: what a killed process leaves
    behind is removed by the next publisher, or by the reader that still had it open.
    """

    def __init__(self, name: str = "policy", *, buffers: int = 2) -> None:
        """`name` stands in the segments' names, for people: 1 to 32 of a-z, 0-9 and _."""
        if type(buffers) is not int or buffers < 1:
            raise ValueError(f"buffers {buffers!r} is not an integer from 1")
        reap_dead_segments()
        self._name = name
        self._segments: list[OwnedSegment | None] = [None] * buffers
        self._next = 0
        self._closed = False

    def publish(
        self, tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]], version: int
    ) -> PublishedWeights:
        """Copy arrays, by name, into the next buffer; returns what a receiver needs to open them.

        The arrays may have any strides and the dtypes of `manifest.DTYPES`; they are read before this returns.
        `version` counts from 0. Raises ManifestError for a name, dtype or version that cannot be published,
        BufferLeasedError while a reader has the next buffer open, SharedMemoryFullError; the latest publication then
        stays as it was.
        """
        if self._closed:
            raise ValueError(f"publisher {self._name!r} is closed")
        named = _checked(tensors)
        specs, total_bytes = plan_layout((name, array.dtype.name, array.shape) for name, array in named)
        planned = Manifest(version=version, tensors=specs, total_bytes=total_bytes)  # refuses before a write
        segment = self._next_segment(total_bytes)
        with segment.writing() as memory:
            written = write_tensors(memory, planned.tensors, [array for _, array in named])
        self._next = (self._next + 1) % len(self._segments)
        return PublishedWeights(
            segment=segment.name, manifest=Manifest(version=version, tensors=written, total_bytes=total_bytes)
        )

    def close(self) -> None:
        """Remove the segments; idempotent. Readers that have one open keep what they see."""
        self._closed = True
        for segment in self._segments:
            if segment is not None:
                segment.close()
        self._segments.clear()

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next_segment(self, size: int) -> OwnedSegment:
        """The segment to write, replaced by a larger one where it has become too small."""
        segment = self._segments[self._next]
        if segment is not None and segment.size >= size:
            return segment
        if segment is not None:
            self._segments[self._next] = None
            segment.close()
        segment = self._segments[self._next] = OwnedSegment(self._name, size)
        return segment


def _checked(
    tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
) -> list[tuple[str, NDArray[Any]]]:
    named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    for name, array in named:
        if not isinstance(array, np.ndarray):
            raise ManifestError(f"tensor {name!r} is a {type(array).__name__}, not a numpy array")
        if not array.dtype.isnative:
            raise ManifestError(f"tensor {name!r}: dtype {array.dtype.str!r} is not in this machine's byte order")
    return named
