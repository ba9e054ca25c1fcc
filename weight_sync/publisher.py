"""The trainer's side: copy weights into shared memory, version by version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.manifest import Manifest, PublishedWeights, plan_layout, result_checksum
from zerokl.weight_sync.segments import Attachment, OwnedSegment, reap_dead_segments
from zerokl.weight_sync.shared_memory import Fill, check_rounding, fill, write_tensors
from zerokl.weight_sync.tensor_spec import TensorSpec

Span = tuple[int, int]


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

    def __init__(self, name: str = "policy", *, buffers: int = 2, fill: Fill = fill) -> None:
        """`name` stands in the segments' names, for people: 1 to 32 of a-z, 0-9 and _.

        `fill` writes float32 tensors, rounded or as they are, and gives their checksums; NumPy does by default, and
        `zerokl.kernels.dispatch.fill_weights` is faster, for bfloat16 many times.
        """
        if type(buffers) is not int or buffers < 1:
            raise ValueError(f"buffers {buffers!r} is not an integer from 1")
        reap_dead_segments()
        self._name = name
        self._segments: list[OwnedSegment | None] = [None] * buffers
        self._next = 0
        self._closed = False
        self._fill = fill
        self._described: Any = None
        self._planned: tuple[tuple[TensorSpec, ...], int] = ((), 0)
        """The layout of the complete set that is described so: a trainer's next one is laid out alike."""
        self._checksums: dict[str, int] = {}
        self._dtype = "float32"
        self._inexact = False
        self._version: int | None = None

    def publish(
        self,
        tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
        version: int,
        *,
        dtype: Literal["bfloat16"] | None = None,
        inexact: bool = True,
    ) -> PublishedWeights:
        """Copy arrays, by name, into the next buffer; returns what a receiver needs to open them.

        The arrays may have any strides and NumPy dtypes of `manifest.DTYPES`; they are read before this returns. With
        `dtype="bfloat16"` float32 values are rounded to nearest on the way; the manifest is then marked `inexact`,
        unless the caller vouches with inexact=False that its own forward rounds alike. `version` counts from 0. Raises
        ManifestError for a name, dtype or version that cannot be published, BufferLeasedError while a reader has the
        next buffer open, SharedMemoryFullError; the latest publication then stays as it was.
        """
        named = self._checked(tensors)
        check_rounding(dtype, named)
        specs, total_bytes = self._layout(dtype, named)
        planned = Manifest(
            version=version, tensors=specs, total_bytes=total_bytes, inexact=bool(dtype) and inexact
        )  # refuses before a write
        published = self._write(planned, [array for _, array in named])
        self._dtype, self._inexact, self._version = dtype or "float32", planned.inexact, version
        complete = all(spec.dtype == self._dtype for spec in specs)
        self._checksums = {spec.name: spec.checksum for spec in published.manifest.tensors} if complete else {}
        return published

    def publish_stored(self, tensors: Sequence[tuple[TensorSpec, NDArray[Any]]], version: int) -> PublishedWeights:
        """Copy tensors as they are stored, bfloat16 as uint16 patterns, into the next buffer; of a spec name, dtype and
        shape count.

        No delta can follow it. Raises as `publish`.
        """
        named = self._checked((spec.name, array) for spec, array in tensors)
        specs, total_bytes = plan_layout((spec.name, spec.dtype, spec.shape) for spec, _ in tensors)
        planned = Manifest(version=version, tensors=specs, total_bytes=total_bytes)
        published = self._write(planned, [array for _, array in named])
        self._checksums, self._version = {}, None
        return published

    def publish_delta(
        self,
        changed: Mapping[str, NDArray[np.float32]] | Iterable[tuple[str, NDArray[np.float32]]],
        version: int,
        *,
        spans: Mapping[str, Span | Sequence[Span]] | None = None,
    ) -> PublishedWeights:
        """Publish only the tensors that differ from this publisher's latest publication, the delta's parent.

        `changed` holds whole float32 tensors, which are rounded if the parent was; of those in `spans` only the
        elements [start, stop) of one range or several, in C order, are copied, and the others must be as they were.
        The receiver verifies the checksum of the whole result; after one that was refused or never read, the next
        publication must be complete. Raises as `publish` does, and ManifestError for tensors that the parent has not
        or that are no float32, or when the parent was neither all float32 nor rounded by this publisher.
        """
        named = self._checked(changed)
        ranges = {name: _ranges(given) for name, given in (spans or {}).items()}
        self._check_changed(named, ranges)
        arrays = [np.ascontiguousarray(array) for _, array in named]
        specs, total_bytes = plan_layout(((name, self._dtype, array.shape) for name, array in named), spans=ranges)
        parts = [_chosen(array, spec.spans) for spec, array in zip(specs, arrays, strict=True)]
        specs = tuple(
            spec if spec.spans is None else replace(spec, whole=self._checksum(array))
            for spec, array in zip(specs, arrays, strict=True)
        )
        planned = Manifest(
            version=version,
            tensors=specs,
            total_bytes=total_bytes,
            parent=self._version,
            result=0,  # known once all is written
            result_dtype=self._dtype,
            inexact=self._inexact,
        )
        published = self._write(planned, parts)
        whole = {spec.name: spec.checksum if spec.spans is None else spec.whole for spec in published.manifest.tensors}
        self._checksums, self._version = {**self._checksums, **whole}, version
        return replace(published, manifest=replace(published.manifest, result=result_checksum(self._checksums)))

    def republish(self, published: PublishedWeights) -> PublishedWeights:
        """Copy another publisher's complete publication into the next buffer: its bytes, under its manifest.

        No delta can follow it. Raises what `open_published` raises but ChecksumError, which is for whoever reads the
        copy, BufferLeasedError and SharedMemoryFullError as `publish`.
        """
        manifest = published.manifest
        if self._closed or manifest.parent is not None:
            raise ManifestError(f"a complete publication can be copied by an open publisher, got {published.segment}")
        attachment = Attachment(published.segment)
        try:
            source = attachment.lock(manifest.total_bytes)
            segment = self._next_segment(manifest.total_bytes)
            with segment.writing() as memory, memoryview(source) as read, memoryview(memory) as written:
                written[: manifest.total_bytes] = read[: manifest.total_bytes]
        finally:
            attachment.close()
        self._next = (self._next + 1) % len(self._segments)
        self._checksums, self._version = {}, None
        return PublishedWeights(segment=segment.name, manifest=manifest)

    def _check_changed(self, named: list[tuple[str, NDArray[Any]]], spans: Mapping[str, object]) -> None:
        if not self._checksums:
            raise ManifestError("a delta needs a complete float32 or rounded publication of this publisher before it")
        for name, array in named:
            if name not in self._checksums or array.dtype != np.float32:
                raise ManifestError(f"tensor {name!r}: a delta holds float32 tensors of its parent, got {array.dtype}")
        if strays := sorted(spans.keys() - {name for name, _ in named}):
            raise ManifestError(f"spans: {strays[0]!r} is not among the changed tensors")

    def _checksum(self, array: NDArray[np.float32]) -> int:
        """Of a whole tensor as published."""
        if self._dtype == "float32":
            return checksum_of(array)
        return self._fill(array.reshape(-1), np.empty(array.size, np.uint16))

    def _layout(self, dtype: str | None, named: list[tuple[str, NDArray[Any]]]) -> tuple[tuple[TensorSpec, ...], int]:
        """`plan_layout` of a complete set."""
        described = dtype, [(name, array.dtype, array.shape) for name, array in named]
        if described != self._described:
            self._planned = plan_layout((name, dtype or array.dtype.name, array.shape) for name, array in named)
            self._described = described
        return self._planned

    def _write(self, planned: Manifest, arrays: list[NDArray[Any]]) -> PublishedWeights:
        segment = self._next_segment(planned.total_bytes)
        with segment.writing() as memory:
            written = write_tensors(memory, planned.tensors, arrays, self._fill)
        self._next = (self._next + 1) % len(self._segments)
        return PublishedWeights(segment=segment.name, manifest=planned.with_checksums(written))

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
        self, tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]]
    ) -> list[tuple[str, NDArray[Any]]]:
        if self._closed:
            raise ValueError(f"publisher {self._name!r} is closed")
        named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        for name, array in named:
            if not isinstance(array, np.ndarray):
                raise ManifestError(f"tensor {name!r} is a {type(array).__name__}, not a numpy array")
            if not array.dtype.isnative:
                raise ManifestError(f"tensor {name!r}: dtype {array.dtype.str!r} is not in this machine's byte order")
        return named


def _ranges(given: Span | Sequence[Span]) -> tuple[Span, ...]:
    """One range, or several, as several."""
    ranges: Any = tuple(given)
    return (ranges,) if ranges and not isinstance(ranges[0], Sequence) else tuple(tuple(span) for span in ranges)


def _chosen(array: NDArray[Any], spans: tuple[Span, ...] | None) -> NDArray[Any]:
    """The elements of the ranges, one after the other; without ranges all, as they are."""
    if spans is None:
        return array
    flat = array.reshape(-1)
    return np.concatenate([flat[start:stop] for start, stop in spans])
