"""The checksum of tensors on a device is the one that is written down, and finds what it says it finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zerokl.weight_sync.device_checksums import device_checksum

ALL = (1 << 64) - 1


def by_definition(array: NDArray[Any]) -> int:
    """The text of the module, with Python's integers."""
    rows = [array] if array.ndim != 2 else list(array)
    words = []
    for row in rows:
        content = row.tobytes()
        content += bytes(-len(content) % 8)
        words += [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
    total = 0
    for number, word in enumerate(words):
        x = (word + (number + 1) * 0x9E3779B97F4A7C15) & ALL
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL
        total += x ^ (x >> 31)
    return total & ALL


def some(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


@given(
    st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from([np.uint16, np.uint32]), st.integers(0, 1 << 30)
)
@settings(deadline=None)
def test_it_is_its_definition(shape: tuple[int, ...], dtype: Any, seed: int) -> None:
    array = some(shape, dtype, seed)
    assert device_checksum(array) == by_definition(array)


def test_it_is_its_definition_beyond_one_chunk() -> None:
    array = some((700, 3001), np.uint16)
    assert device_checksum(array) == by_definition(array)


def test_known_values() -> None:
    """Of SplitMix64: its outputs from seed 0 are the checksums of words of zeros, one more each."""
    first, second = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
    assert device_checksum(np.zeros(4, np.uint16)) == first
    assert device_checksum(np.zeros((2, 3), np.uint16)) == (first + second) & ALL
    assert device_checksum(np.zeros((0, 3), np.uint16)) == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_any_flipped_bit_and_any_two_rows_that_trade_places_are_found(dtype: Any) -> None:
    array = some((6, 10), dtype)
    expected = device_checksum(array)
    for place in np.ndindex(array.shape):
        for bit in range(8 * array.itemsize):
            array[place] ^= dtype(1 << bit)
            assert device_checksum(array) != expected
            array[place] ^= dtype(1 << bit)
    assert device_checksum(array) == expected
    assert device_checksum(array[[1, 0, 2, 3, 4, 5]]) != expected
    assert device_checksum(array.reshape(3, 20)) != expected or dtype == np.uint32  # rows are padded to words
