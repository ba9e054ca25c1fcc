"""The contract of all transports: a publication is a manifest and a stream of buckets under a lease.

A transport reads from memory, a segment, a file; later ones from a device or a network. Whoever holds a `Lease` may
read, and while anybody does the publisher does not write there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.manifest import Manifest

DEFAULT_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive bytes of one tensor."""

    name: str
    start: int
    """First byte, counted from the tensor's (or its span's) first."""
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What arrives at once."""

    pieces: tuple[Piece, ...]
    lasting: bool = False
    """Whether the data stays as it is until the lease ends; otherwise only until the next bucket is asked for."""


class Lease(Protocol):
    """The right to read one publication; ends with the context that gave it."""

    @property
    def manifest(self) -> Manifest:
        """What is published."""
        ...

    def buckets(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[Bucket]:
        """All bytes of all tensors, each once, in pieces of at most `bucket_bytes` together unless they last.

        Raises a WeightSyncError naming the cause when the source is damaged or gone.
        """
        ...


class Publication(Protocol):
    """Where a set of weights can be had."""

    @property
    def version(self) -> int:
        """The manifest's."""
        ...

    def open(self) -> AbstractContextManager[Lease]:
        """A lease, which a writer respects. Raises a WeightSyncError when there is nothing to be had."""
        ...


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A C-contiguous array as its bytes, without a copy."""
    return array.reshape(-1).view(np.uint8)
