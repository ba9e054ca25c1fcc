"""The rotary embedding's table of cosines and sines (RoFormer, arXiv:2104.09864).

Computed once in float64 and rounded to float32, so every device reads the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float64]:
    """[head_dim / 2], radians per position of each rotated pair, fastest first, after the model's scaling."""
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    assert rope.kind == "llama3", rope.kind
    # Llama 3.1: wavelengths beyond the training length / low_freq_factor are stretched by `factor`, those below
    # length / high_freq_factor are kept, those between are blended linearly in length / wavelength.
    turns = rope.original_max_position_embeddings * base / (2.0 * np.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    blended: NDArray[np.float64] = (1.0 - keep) * base / rope.factor + keep * base
    return blended


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> NDArray[np.float32]:
    """[num_positions, 2, head_dim / 2] float32: cosines, then sines, of position * inverse frequency."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inverse_frequencies(rope, head_dim)
    table = np.empty((num_positions, 2, head_dim // 2), np.float32)
    table[:, 0] = np.cos(angles)
    table[:, 1] = np.sin(angles)
    return table
