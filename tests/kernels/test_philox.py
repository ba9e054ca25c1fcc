"""Philox4x32-10 against the published known answers, in both implementations."""

import numpy as np
import pytest

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.reference.philox import philox4x32, token_bits

# Random123, file kat_vectors, generator philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert philox4x32(counter, key) == answer
    assert _cpu.philox4x32(*counter, *key) == answer


def test_implementations_agree():
    rng = np.random.default_rng(0)
    for words in rng.integers(0, 2**32, (200, 6)).tolist():
        assert philox4x32(tuple(words[:4]), tuple(words[4:])) == _cpu.philox4x32(*words)


def test_token_bits_layout():
    bits = token_bits(seed=0x299F31D0A4093822, sample_index=7, position=3)
    out = philox4x32((3, 7, 0, 0), (0xA4093822, 0x299F31D0))
    assert bits == out[0] + out[1] * 2**32


def test_token_bits_are_uniform():
    """Mean and bit balance over consecutive positions and samples of consecutive seeds."""
    draws = [token_bits(seed, index, position) for seed in range(10) for index in range(10) for position in range(100)]
    assert len(set(draws)) == len(draws)
    assert abs(np.mean(draws) / 2**64 - 0.5) < 4 * (1 / 12 / len(draws)) ** 0.5
    for bit in (0, 31, 32, 63):
        assert abs(np.mean([draw >> bit & 1 for draw in draws]) - 0.5) < 4 * (0.25 / len(draws)) ** 0.5
