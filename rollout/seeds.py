"""Seeds of requests that bring none."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(engine_seed: int, call_number: int, prompt_index: int, purpose: str = "seed") -> int:
    """The seed in [0, 2^64) of a request that brings none: a hash, so that near inputs give unrelated streams.

    It depends on no arrival order: the same calls to an engine with the same seed draw the same random numbers.
    `purpose` keeps seeds apart that are derived from equal numbers.
    """
    words = np.array([engine_seed, call_number, prompt_index], "<u8").tobytes()
    person = f"zerokl-{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8, person=person).digest(), "little")
