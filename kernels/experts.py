"""Plain data of a mixture of experts: how a router chooses, what it chose, and the weights of a layer's block.

Shape letters: T tokens, X experts, k slots (experts per token), E hidden size, F inner size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """Constants of one layer's router."""

    top_k: int
    normalise: bool
    """Weights of the chosen experts are divided by max(their sum, norm_min); otherwise they are plain probabilities."""
    norm_min: float
    index: int
    """Which of the model's mixtures this is, from 0: the row of `StepInputs.routing`."""


@dataclass(frozen=True, slots=True)
class Routing(Generic[Array]):
    """A choice of experts. Slots are ordered best first, and outputs are added in this order."""

    experts: NDArray[np.int32]
    """[T, k], distinct ids per token."""
    weights: Array
    """[T, k] float32."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a step is told of one mixture's routing, in place of its router's choice."""

    experts: NDArray[np.int32]
    """[T, k], distinct ids in slot order; a row of -1 is not given: the router chooses."""
    weights: NDArray[np.float32] | None
    """[T, k], constants in place of the router's weights where experts are given; None: the router's everywhere."""

    @property
    def given(self) -> NDArray[np.bool_]:
        """[T, 1], whether a token's experts are given."""
        return self.experts[:, :1] >= 0

    def put_weights(self, weights: NDArray[Any]) -> None:
        """Overwrite the router's `weights` [T, k] where others are given."""
        if self.weights is not None:
            np.copyto(weights, self.weights, where=self.given)


@dataclass(frozen=True, slots=True)
class MoeParams(Generic[Array]):
    """Weights of a mixture of experts, beside shared experts, which are a dense block of their own."""

    router: Any
    """A packed matrix [X, E]."""
    correction: Array | None
    """[1, X], added to the probabilities for the choice, not to the weights."""
    experts: Any
    """What `Ops.pack_experts` made."""


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Where the tokens of one rank find each expert of a mixture that is spread over a group of ranks."""

    rank: NDArray[np.int32]
    """[X], rank within the group."""
    slot: NDArray[np.int32]
    """[X], which of that rank's experts it is."""


@dataclass(frozen=True, slots=True)
class SpreadWeights:
    """One rank's part of a mixture's experts, and where its tokens find the others."""

    packed: Any
    """What `Ops.pack_experts` made of the rank's own experts, in the order of their slots."""
    where: ExpertMap
