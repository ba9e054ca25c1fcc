"""Forms in which a GPU keeps weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Tensor = Any  # as in `elementwise`, which needs Triton


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
