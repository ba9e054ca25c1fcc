"""Weights on their way: rounding, widening, copies and packing tell the same on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.packing import Packer
from zerokl.kernels.dispatch import fill_weights
from zerokl.kernels.row_stream import ArrayRows, NamedRows, NonFiniteWeightsError, WholeTensors
from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.shared_memory import fill


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.instruction_set()
    _cpu.set_instruction_set(request.param)
    yield request.param
    _cpu.set_instruction_set(before)


def rounded(values: np.ndarray) -> np.ndarray:
    """By integers of 64 bits: to nearest, ties to even, a NaN quiet."""
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = bits + 0x7FFF + (bits >> 16 & 1)
    return (np.where(np.isnan(values), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def test_rounding_is_to_nearest_even_and_keeps_nans(isa: str) -> None:
    for count in (0, 1, 15, 17, 100_003):
        values = np.random.default_rng(count).integers(0, 2**32, count, np.uint64).astype(np.uint32).view(np.float32)
        values = np.concatenate([values, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, 3.4e38], np.float32)])
        patterns, floats = np.empty(values.size, np.uint16), np.empty(values.size, np.float32)
        _cpu.narrow_bfloat16(values, patterns)
        _cpu.round_bfloat16(values, floats)
        np.testing.assert_array_equal(patterns, rounded(values))
        np.testing.assert_array_equal(floats.view(np.uint32), patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize("count", [0, 1, 60, 61, 63, 64, 120, 121, 272, 512, 528, 1024, 1025, 3107, 200_001])
def test_what_is_filled_in_is_rounded_or_copied_and_hashed(isa: str, count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    for expected in (values, rounded(values)):
        for offset in (0, 1):
            out = np.empty(count + offset, expected.dtype)[offset:]
            assert fill_weights(values, out) == fill(values, np.empty_like(expected)) == checksum_of(expected)
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("offset", [0, 1])
def test_copies_widen_and_tell_what_is_not_finite(isa: str, offset: int) -> None:
    values = np.random.default_rng(0).standard_normal(1003).astype(np.float32)
    patterns = rounded(values)
    wide = (patterns.astype(np.uint32) << 16).view(np.float32)
    out = np.empty(1003 + offset, np.float32)[offset:]
    for source, expected in ((values, values), (patterns, wide)):
        assert _cpu.copy_weights(source, out)
        np.testing.assert_array_equal(out, expected)
        for bad in (np.nan, np.inf, -np.inf):
            for place in (0, 500, 1002):
                broken = source.copy()
                broken[place] = rounded(np.array([bad], np.float32))[0] if source is patterns else bad
                assert not _cpu.copy_weights(broken, out)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 5), (64, 300), (96, 257), (20, 64)])
def test_patterns_are_packed_as_their_widened_values(isa: str, rows: int, width: int) -> None:
    patterns = rounded(np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32))
    wide = (patterns.astype(np.uint32) << 16).view(np.float32)
    shape = (-(-rows // 32), width, 32)
    for pool in (False, True):
        packed, expected = np.full(shape, 7, np.float32), np.zeros(shape, np.float32)
        assert _cpu.pack_linear(patterns, packed, pool) and _cpu.pack_linear(wide, expected, pool)
        np.testing.assert_array_equal(packed, expected)
        padded = np.zeros((shape[0] * 32, width), np.float32)
        padded[:rows] = wide
        np.testing.assert_array_equal(expected.transpose(0, 2, 1).reshape(padded.shape), padded)
        pairs = np.full((-(-rows // 16), width, 32), 7, np.float32)
        others = np.zeros_like(pairs)
        assert _cpu.pack_gate_up(patterns, patterns[::-1].copy(), pairs, pool)
        assert _cpu.pack_gate_up(wide, wide[::-1].copy(), others, pool)
        np.testing.assert_array_equal(pairs, others)


BAD = [(np.nan, 0), (np.inf, 70), (-np.inf, -1)]


@pytest.mark.parametrize(("value", "place"), BAD)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_tensor_that_is_not_finite_is_named(isa: str, value: float, place: int, stored: str) -> None:
    def stream(name: str, bad: bool, shape: tuple[int, ...] = (70, 20)) -> Any:
        values = np.ones(shape, np.float32)
        if bad:
            values.reshape(-1)[place] = value
        return ArrayRows(values if stored == "float32" else rounded(values), name)  # type: ignore[arg-type]

    packer = Packer()
    for what in (
        lambda: packer.tensor(stream("bad", True)),
        lambda: packer.tensor(stream("bad", True, (90,))),
        lambda: packer.pack_linear([stream("a", False), stream("bad", True)], [None, None]),
        lambda: packer.pack_linear([stream("a", False, (90, 20))], [stream("bad", True, (90,))]),
        lambda: packer.pack_gate_up(stream("a", False), stream("bad", True)),
        lambda: packer.pack_gate_up(stream("bad", True), stream("a", False)),
        lambda: packer.pack_experts(1, [(stream("a", False), stream("b", False), stream("bad", True, (20, 70)))]),
        lambda: WholeTensors({"bad": stream("bad", True)})["bad"],
    ):
        with pytest.raises(NonFiniteWeightsError, match="tensor 'bad' holds a NaN or an infinity"):
            what()


def test_arrays_become_streams_that_know_their_names() -> None:
    rows = NamedRows({"w": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float32)})
    assert (list(rows), len(rows), rows["w"].name, rows["b"].shape) == (["w", "b"], 2, "w", (2,))
    assert [rows["w"].read(1).shape, rows["b"].read(1).shape] == [(1, 4), (1, 2)]
    with pytest.raises(NonFiniteWeightsError):
        Packer().tensor(NamedRows({"w": np.array([np.nan], np.float32)})["w"])
