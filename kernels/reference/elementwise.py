"""Definitions of the ops that act on one token at a time: products, norms, gates and the rotary embedding.

Float64 throughout. Every function takes and returns fresh arrays of shape [T, ...] and reads row t for row t alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import RotaryLayout

Floats = NDArray[np.float64]


def linear(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """y = x W^T + b: x [T, K], weight [N, K], bias [N] -> [T, N]."""
    y: Floats = x @ weight.T
    return y if bias is None else y + bias


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [..., E], weight [E] (arXiv:1910.07467)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    scaled: Floats = x / np.sqrt(mean_square + eps) * weight
    return scaled


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up with silu(g) = g / (1 + e^-g): [T, F] twice -> [T, F] (arXiv:2002.05202)."""
    # e^-g is infinite for very negative g, where the quotient is rightly -0.
    with np.errstate(over="ignore"):
        gated: Floats = gate / (1.0 + np.exp(-gate)) * up
    return gated


def rotate(x: Floats, positions: NDArray[np.int32], table: Floats, layout: RotaryLayout) -> Floats:
    """Turn the pairs (a, b) of each head by its token's angles: (a cos - b sin, b cos + a sin) (arXiv:2104.09864).

    x [T, heads, D]; positions [T]; table [P, 2, D / 2], cosines then sines. Pair i is (i, i + D / 2) in layout "half",
    (2i, 2i + 1) in layout "interleaved".
    """
    cosines, sines = table[positions, 0][:, None, :], table[positions, 1][:, None, :]
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out = np.empty_like(x)
    out[..., first] = a * cosines - b * sines
    out[..., second] = b * cosines + a * sines
    return out
