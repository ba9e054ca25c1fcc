"""Checksums of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_PIECE_BYTES = 4 << 20


def checksum_of(array: NDArray[Any]) -> int:
    """xxh3_64 of a C-contiguous array's bytes, in pieces between which other threads may run."""
    digest = xxhash.xxh3_64()
    # Memory views are released here; arrays would live on in the frames of an error's traceback and hold a lease.
    with memoryview(array.reshape(-1).view(np.uint8).data) as whole:
        for start in range(0, len(whole), _PIECE_BYTES):
            with whole[start : start + _PIECE_BYTES] as piece:
                digest.update(piece)
    return digest.intdigest()
