"""The rotary table against formulas written out by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zerokl.rollout.models.config import RopeConfig
from zerokl.rollout.models.rope import inverse_frequencies, rope_table

LLAMA31 = RopeConfig(
    theta=500000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def llama3_frequency(rope: RopeConfig, base: float) -> float:
    """As transformers' `_compute_llama3_parameters` states it, for one frequency."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / base
    if wavelength < length / rope.high_freq_factor:
        return base
    if wavelength > length / rope.low_freq_factor:
        return base / rope.factor
    smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * base / rope.factor + smooth * base


def test_llama3_scaling_matches_its_definition_in_all_three_bands() -> None:
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = inverse_frequencies(LLAMA31, 128)
    expected = [llama3_frequency(LLAMA31, float(base)) for base in plain]
    np.testing.assert_allclose(scaled, expected, rtol=1e-14)
    ratio = plain / scaled
    assert (ratio == 1).any() and (ratio > 7.999).any() and ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize(
    "rope", [RopeConfig(theta=10000.0), RopeConfig(theta=10000.0, kind="linear", factor=4.0), LLAMA31]
)
def test_table_is_the_rounded_float64_value(rope: RopeConfig) -> None:
    table = rope_table(rope, 16, 300)
    assert table.shape == (300, 2, 8) and table.dtype == np.float32 and table.flags.c_contiguous
    frequencies = inverse_frequencies(rope, 16)
    for position in (0, 1, 17, 299):
        for pair in range(8):
            angle = position * float(frequencies[pair])
            assert table[position, 0, pair] == np.float32(math.cos(angle))
            assert table[position, 1, pair] == np.float32(math.sin(angle))


def test_linear_scaling_stretches_positions() -> None:
    stretched = rope_table(RopeConfig(theta=10000.0, kind="linear", factor=4.0), 16, 41)
    np.testing.assert_array_equal(stretched[::4], rope_table(RopeConfig(theta=10000.0), 16, 11))
