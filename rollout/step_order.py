"""What one rank is told to do in a step, and what it answers: plain data between scheduler and worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult, StepInputs

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMove:
    """KV blocks that go from this rank to another one, or come from it, before the step's forward."""

    peer: int
    """Rank at the other end."""
    blocks: Ints
    """[n], ids in this rank's pool; the i-th of the sender becomes the i-th of the receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """A rank's part of a step. A rank without requests gets one without tokens, as the others need its experts."""

    inputs: StepInputs
    sends: tuple[BlockMove, ...] = ()
    """Handed over by this rank; one per peer at most."""
    receives: tuple[BlockMove, ...] = ()
    """Taken over by this rank; one per peer at most."""
    has_moves: bool = False
    """Whether any rank of the step sends blocks: all take part in the exchange then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTokens:
    """The routers' choice for the T tokens of a step, of each of M mixtures: k experts in slot order."""

    experts: Ints
    """[M, T, k]"""
    weights: NDArray[np.float32]
    """[M, T, k], the gate weights that the experts' outputs were added with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of a rank's part of a step. The arrays are the receiver's to keep."""

    sampled: SampleResult
    """R rows."""
    expert_tokens: Ints | None = None
    """[M, X], how often this rank's tokens chose each expert; None for a model without mixtures."""
    routed: RoutedTokens | None = None
    """None unless the engine returns routing."""
