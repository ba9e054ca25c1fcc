"""What the routers of a step choose, kept in memory of its own until it is copied to the host.

The buffers are taken from the step's scratch before anything else, so a recorded step finds them where it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu.transfers import Downloads, Fetch

if TYPE_CHECKING:
    from zerokl.kernels.gpu.elementwise import Tensor


class RoutingRecord:
    """Ids [M, T, k] int32 and gate weights [M, T, k] float32 of a step, T its tokens with padding."""

    def __init__(self, num_mixtures: int, top_k: int) -> None:
        self._num_mixtures = num_mixtures
        self._top_k = top_k
        self._num_tokens = 0
        self._ids: Tensor = None
        self._weights: Tensor = None

    def begin(self, num_tokens: int, take: Callable[..., Tensor]) -> None:
        """A step of so many tokens begins; `take(*shape, dtype=name)` gives memory that nothing else of it writes."""
        self.forget()  # first: what is referred to is not given again
        self._num_tokens = num_tokens
        shape = (self._num_mixtures, num_tokens, self._top_k)
        self._ids, self._weights = take(*shape, dtype="int32"), take(*shape, dtype="float32")

    def of(self, mixture: int) -> tuple[Tensor, Tensor]:
        """Where the router of a mixture writes: ids [T, k] and weights [T, k]."""
        size = self._num_tokens * self._top_k
        here, shape = slice(mixture * size, (mixture + 1) * size), [self._num_tokens, self._top_k]
        ids, weights = (part.reshape([-1])[here].reshape(shape) for part in (self._ids, self._weights))
        return ids, weights

    def fetch(self, downloads: Downloads, num_tokens: int) -> FetchedRouting:
        """Begin to copy the choices of the first `num_tokens` tokens to the host."""
        shape = (self._num_mixtures, self._num_tokens, self._top_k)
        size = int(np.prod(shape))
        return FetchedRouting(downloads.fetch(self._ids, size), downloads.fetch(self._weights, size), shape, num_tokens)

    def forget(self) -> None:
        """Refer to no step's memory."""
        self._ids = self._weights = None


class FetchedRouting:
    """Choices of a step on their way to the host."""

    def __init__(self, ids: Fetch, weights: Fetch, shape: tuple[int, ...], num_tokens: int) -> None:
        self._ids, self._weights, self._shape, self._num_tokens = ids, weights, shape, num_tokens

    def result(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Wait for them: ids and gate weights, [M, T, k] both. Asked for once."""
        ids, bits = (
            np.ascontiguousarray(part.result().reshape(self._shape)[:, : self._num_tokens])
            for part in (self._ids, self._weights)
        )
        weights: NDArray[Any] = bits.view(np.float32)
        return ids, weights
