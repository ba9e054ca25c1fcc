"""Packing beside steps, unpacking, and memory that is used again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Slabs
from zerokl.kernels.cpu.packing import Packer, unpack_gate_up, unpack_linear


def matrix(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("rows", [(32,), (64, 32, 32), (48, 16, 16), (1,), (33, 31), (96, 5)])
def test_packing_piece_by_piece_gives_what_the_pool_gives_and_can_be_undone(rows: tuple[int, ...]) -> None:
    weights = [matrix(count, 24, seed) for seed, count in enumerate(rows)]
    biases = [None, *(np.full(count, 2.0, np.float32) for count in rows[1:])]
    packed = Packer().pack_linear(weights, biases)
    whole = np.empty_like(packed.panels)
    assert _cpu.pack_linear(np.concatenate(weights), whole, pool=True)
    np.testing.assert_array_equal(packed.panels, whole)
    np.testing.assert_array_equal(unpack_linear(packed), np.concatenate(weights))
    if len(rows) > 1:
        expected = np.concatenate([np.zeros(rows[0]), *(np.full(count, 2.0) for count in rows[1:])])
        np.testing.assert_array_equal(packed.bias, expected)


@pytest.mark.parametrize("rows", [16, 48, 17, 5])
def test_gate_and_up_piece_by_piece(rows: int) -> None:
    gate, up = matrix(rows, 40), matrix(rows, 40, 1)
    packed = Packer().pack_gate_up(gate, up)
    whole = np.empty_like(packed.panels)
    assert _cpu.pack_gate_up(gate, up, whole, pool=True)
    np.testing.assert_array_equal(packed.panels, whole)
    for actual, expected in zip(unpack_gate_up(packed), (gate, up), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_memory_of_a_dropped_set_is_used_by_the_next_and_no_other() -> None:
    packer = Packer()

    def one_set(seed: int) -> list[NDArray[np.float32]]:
        made = packer.next_set()
        return [made.tensor(matrix(300, 40, seed + part)) for part in range(5)]

    first, second = one_set(0), one_set(10)
    assert not any(np.shares_memory(a, b) for a in first for b in second)
    size = packer.slabs.nbytes()
    kept = first[2][3:5]
    del first
    third = one_set(20)
    np.testing.assert_array_equal(kept, matrix(300, 40, 2)[3:5])
    assert packer.slabs.nbytes() > size  # a view of the first set keeps its piece
    del kept, third
    size = packer.slabs.nbytes()
    for seed in range(30, 36):
        one_set(seed)
    assert packer.slabs.nbytes() == size
    packer.slabs.finish()
    assert packer.slabs.release_spare() > 0
    for part, array in enumerate(second):
        np.testing.assert_array_equal(array, matrix(300, 40, 10 + part))


def test_memory_in_use_is_not_released() -> None:
    slabs = Slabs()
    array = slabs.take(10)
    array[...] = 3
    assert slabs.release_spare() == 0
    del array
    assert slabs.release_spare() > 0 and slabs.nbytes() == 0
