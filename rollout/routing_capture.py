"""Records what the routers of a step chose, around any op table: the model code knows nothing of it."""

from __future__ import annotations

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

    def __init__(self, ops: Ops[Array], moe: MoeConfig) -> None:
        self._ops = ops
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
        self._experts[spec.index] = routing.experts
        self._weights[spec.index] = np.asarray(routing.weights)
        return routing

    def take(self) -> RoutedTokens:
        """The routing of the last step; the caller's to keep."""
        return RoutedTokens(experts=self._experts, weights=self._weights)

    def expert_tokens(self) -> NDArray[np.int32]:
        """[M, X]: how often the tokens of the last step chose each expert."""
        counts = [np.bincount(ids.reshape(-1), minlength=self._moe.num_experts) for ids in self._experts]
        return np.array(counts, np.int32).reshape(len(counts), self._moe.num_experts)
