"""What a trainer's weights go through on their way to shared memory: rounding, a checksum, a copy past the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu

_PIECE = 1 << 16  # values: read and hashed, then written from the second-level cache


def fill(values: NDArray[np.float32], out: NDArray[Any]) -> int:
    """See `dispatch.fill_weights`."""
    digest = xxhash.xxh3_64()
    rounded = np.empty(min(_PIECE, values.size), np.uint16) if out.dtype == np.uint16 else None
    source, target, size = _bytes(values), _bytes(out), out.itemsize
    for start in range(0, values.size, _PIECE):
        stop = min(start + _PIECE, values.size)
        if rounded is None:
            piece = source[start * size : stop * size]
        else:
            _cpu.narrow_bfloat16(values[start:stop], rounded[: stop - start])
            piece = _bytes(rounded[: stop - start])
        digest.update(piece.data)
        _cpu.stream_bytes(piece, target[start * size : stop * size])
    return digest.intdigest()


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.view(np.uint8)
