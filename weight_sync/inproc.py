"""Weights that lie in this process already: a publication without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.manifest import Manifest, plan_layout
from zerokl.weight_sync.transport import DEFAULT_BUCKET_BYTES, Bucket, Piece, bytes_of


class PublishedArrays:
    """Arrays by name as a `Publication` and its `Lease`. Nobody may write to them while it is read."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]], version: int) -> None:
        """Describe the arrays. Raises ManifestError for a name, dtype or version that cannot be published."""
        self._arrays = {name: np.ascontiguousarray(array) for name, array in dict(tensors).items()}
        specs, total = plan_layout((name, array.dtype.name, array.shape) for name, array in self._arrays.items())
        specs = tuple(spec.with_checksum(checksum_of(self._arrays[spec.name])) for spec in specs)
        self.manifest = Manifest(version=version, tensors=specs, total_bytes=total)

    @property
    def version(self) -> int:
        """The manifest's."""
        return self.manifest.version

    @contextmanager
    def open(self) -> Iterator[PublishedArrays]:
        """Itself."""
        yield self

    def buckets(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[Bucket]:
        """One array each, without a copy."""
        for name, array in self._arrays.items():
            yield Bucket(pieces=(Piece(name=name, start=0, data=bytes_of(array)),), lasting=True)
