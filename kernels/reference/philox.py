"""Philox4x32-10 in Python integers (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

from __future__ import annotations

Words = tuple[int, int, int, int]

_LOW = 0xFFFFFFFF


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over a counter of four 32-bit words under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW, (a >> 32) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def token_bits(seed: int, sample_index: int, position: int) -> int:
    """The 64 random bits of the token at `position` of sample `sample_index` of the request with this 64-bit seed."""
    words = philox4x32((position, sample_index, 0, 0), (seed & _LOW, seed >> 32))
    return words[0] | words[1] << 32
