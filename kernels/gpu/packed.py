"""Forms in which a GPU keeps weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Tensor = Any  # as in `elementwise`, which needs Triton

Dtype = Literal["float32", "bfloat16"]
"""Of matrices, activations, keys and values."""


def dtype_of_shape(shape: Sequence[int], dtype: str) -> str:
    """Type of a tensor of weights in a table of this type: vectors and tables of one row are float32 in any."""
    return dtype if len(shape) == 2 and shape[0] > 1 else "float32"


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Matrices on top of each other, [N, K], and their biases [N] in float32."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedGateUp:
    """The rows of the two input matrices of a SwiGLU block in turn, [2 F, E]."""

    weight: Tensor


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts of a mixture on top of each other: gate and up [X, 2 F, E] as in `PackedGateUp`, down [X, E, F]."""

    gate_up: Tensor
    down: Tensor
