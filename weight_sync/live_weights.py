"""The version that serves, as a delta to it needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.errors import ParentMismatchError
from zerokl.weight_sync.views import narrow


@dataclass(frozen=True, kw_only=True)
class LiveWeights:
    """Version, tensors and their checksums."""

    version: int
    tensors: Mapping[str, NDArray[np.float32]]
    """All of them; read for tensors of which a delta brings a part, or whose checksum is not known."""
    checksums: dict[str, int] = field(default_factory=dict)
    """xxh3_64 of the tensors' bytes by name, where known; others are added as they are computed."""
    dtype: str = "float32"
    """Element type that `checksums` are of: float32 or bfloat16."""

    def in_dtype(self, dtype: str) -> LiveWeights:
        """The same with checksums of another type, none of them known yet."""
        return self if dtype == self.dtype else LiveWeights(version=self.version, tensors=self.tensors, dtype=dtype)

    def checksum(self, name: str) -> int:
        """That of one tensor. Raises ParentMismatchError for one that was not rounded to `dtype`."""
        if name not in self.checksums:
            self.checksums[name] = checksum_as(self.dtype, name, self.tensors[name])
        return self.checksums[name]


def checksum_as(dtype: str, name: str, values: NDArray[np.float32]) -> int:
    """The checksum of float32 values as elements of `dtype`. Raises ParentMismatchError where they are none."""
    values = np.ascontiguousarray(values)
    if dtype == "float32":
        return checksum_of(values)
    patterns = np.empty(values.size, np.uint16)
    if narrow(values.reshape(-1), patterns):
        raise ParentMismatchError(f"tensor {name!r} is not rounded to bfloat16 here, as the delta's parent is")
    return checksum_of(patterns)
