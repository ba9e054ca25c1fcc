"""The checksum of tensors that lie on a device: few instructions a word for a GPU, in any order, defined to the bit.

A tensor's rows (a tensor of another rank than 2 is one row) are each padded with zero bytes to whole 64-bit words,
little-endian. With w the words, row after row, and i their number from 0 on, all arithmetic modulo 2^64,

    checksum = sum over i of mix(w[i] + (i + 1) * 0x9E3779B97F4A7C15)

where mix is the finaliser of SplitMix64, a bijection. So any change within one word is found, a change of several
escapes with probability 2^-64, words that trade places count as changed, and the sum may be taken in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKSUM_KIND = "splitmix64_sum"
"""Of `Manifest.checksum_kind`."""

STEP = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

_WORDS = 1 << 20


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser of each word."""
    first, second = (np.uint64(factor) for factor in FACTORS)
    words = (words ^ (words >> np.uint64(30))) * first
    words = (words ^ (words >> np.uint64(27))) * second
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def device_checksum(array: NDArray[Any]) -> int:
    """The checksum of a C-contiguous array; bfloat16 as uint16 patterns."""
    rows = array if array.ndim == 2 else array.reshape(1, -1)
    if not rows.size:
        return 0
    total = 0
    width = -(-rows.shape[1] * rows.itemsize // 8)
    step = max(1, _WORDS // width)
    for start in range(0, len(rows), step):
        words = _words(rows[start : start + step], width)
        numbers = np.arange(start * width + 1, start * width + 1 + len(words), dtype=np.uint64)
        total += int(mix(words + numbers * np.uint64(STEP)).sum(dtype=np.uint64))
    return total % (1 << 64)


def _words(rows: NDArray[Any], width: int) -> NDArray[np.uint64]:
    """The rows, each padded to `width` words, as one array."""
    stored = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    if stored.shape[1] < 8 * width:
        stored = np.pad(stored, ((0, 0), (0, 8 * width - stored.shape[1])))
    return stored.reshape(-1).view("<u8").astype(np.uint64, copy=False)
