"""Records what the routers of a step chose, around any op table: the model code knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.ops import KVPool, Ops, StepInputs
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.step_order import RoutedTokens

Array = TypeVar("Array")


class RoutingCapture(Generic[Array]):
    """Runs as `ops` does, with a copy of each layer's routing: `recording_ops` for a forward, then `take`."""

    def __init__(self, ops: Ops[Array], moe: MoeConfig, to_host: Callable[[Any], NDArray[Any]] = np.asarray) -> None:
        """`to_host` copies ids and weights [T, k] from the device, which may have padded T."""
        self._ops = ops
        self._to_host = to_host
        self._moe = moe
        self._experts = np.zeros((0, 0, 0), np.int32)
        self._weights = np.zeros((0, 0, 0), np.float32)

    @property
    def recording_ops(self) -> Ops[Array]:
        """The op table to run a forward over."""
        return cast("Ops[Array]", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def begin_step(self, inputs: StepInputs, pool: KVPool[Array]) -> None:
        """See `Ops.begin_step`; forgets the step before."""
        shape = (len(self._moe.layers), len(inputs.token_ids), self._moe.top_k)
        self._experts, self._weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        self._ops.begin_step(inputs, pool)

    def route(self, x: Array, params: MoeParams[Array], spec: RouterSpec) -> Routing[Array]:
        """See `Ops.route`."""
        routing = self._ops.route(x, params, spec)
        num_tokens = self._experts.shape[1]
        self._experts[spec.index] = self._to_host(routing.experts)[:num_tokens]
        self._weights[spec.index] = self._to_host(routing.weights)[:num_tokens]
        return routing

    def take(self) -> RoutedTokens:
        """The routing of the last step; the caller's to keep."""
        return RoutedTokens(experts=self._experts, weights=self._weights)

    def expert_tokens(self) -> NDArray[np.int32]:
        """`count_experts` of the last step."""
        return count_experts(self._experts, self._moe.num_experts)


def count_experts(ids: NDArray[np.int32], num_experts: int) -> NDArray[np.int32]:
    """[M, X]: how often each expert was chosen, of ids [M, T, k]."""
    counts = [np.bincount(some.reshape(-1), minlength=num_experts) for some in ids]
    return np.array(counts, np.int32).reshape(len(counts), num_experts)
