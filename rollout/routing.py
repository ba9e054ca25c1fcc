"""What the routers of a mixture-of-experts policy chose for a rollout, and its form for a trainer's replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zerokl.rollout.outputs import Rollout

ExpertIds = NDArray[np.int16] | NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutRouting:
    """The choice at positions start, start + 1, ... of prompt and output, of each of M mixtures: k experts per token.

    With P tokens of prompt and N of output the last position is P + N - 2: the token at position p is routed on the way
    to the logprob of the token at p + 1, and the last one leads to none. A position that gave a logprob holds the
    routing of the very forward that gave it, whatever version of the weights came later; one of the prompt before that,
    the routing of the forward that led to the latest logprob.
    """

    experts: ExpertIds
    """[P + N - 1 - start, M, k], distinct ids per token and mixture in slot order, best first. int16, or int32 where
    the model has more than 32,768 experts. Shorter only for a rollout without tokens, aborted within its prompt."""
    weights: NDArray[np.float32]
    """Same shape: the gate weights that the experts' outputs were added with."""
    start: int
    """0 with `EngineConfig.return_routing` "all"; P - 1, the row that gave the first output token, with "output"."""

    def updated(self, newer: RolloutRouting, first_row: int) -> RolloutRouting:
        """This and what was computed since, with the same `start`.

        Positions from `first_row` on have given results, which keep their routing; `newer` counts before and after
        them. A computation that ended before it gave a result counts nowhere: under other weights, its part of the
        prompt has not led to any result that is known.
        """
        assert self.start == newer.start, "routing of two modes"
        known, split = len(self.experts), first_row - self.start
        if known <= split:
            return newer
        if len(newer.experts) <= known:
            return self

        def joined(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([new[:split], old[split:], new[known:]])

        return RolloutRouting(
            experts=joined(self.experts, newer.experts),
            weights=joined(self.weights, newer.weights),
            start=self.start,
        )


def replay_arrays(rollouts: Sequence[Rollout]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(experts, weights), both [M, T, k], for `PolicyModel.logprobs` over the rollouts packed end to end.

    Each contributes its prompt and output, T tokens in all, as `pack_rollouts` lays them out. Positions without a
    recorded choice (the last token of each, and the prompt with `return_routing="output"`) hold -1 and 0: there the
    trainer's routers choose. Pass `experts` as `routing`; `weights` as `routing_weights` only where gate weights are to
    be constants. Raises ValueError for a rollout without routing, or none at all.
    """
    if not rollouts:
        raise ValueError("rollouts must hold at least one rollout, got 0")
    parts = []
    for index, rollout in enumerate(rollouts):
        if rollout.routing is None:
            raise ValueError(f"rollouts[{index}].routing must not be None: set EngineConfig.return_routing")
        parts.append((rollout.routing, len(rollout.prompt_token_ids) + len(rollout.token_ids)))
    _, mixtures, slots = parts[0][0].experts.shape
    shape = (mixtures, sum(length for _, length in parts), slots)
    experts, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    begin = 0
    for routing, length in parts:
        first = begin + routing.start
        some = slice(first, first + len(routing.experts))
        experts[:, some] = routing.experts.swapaxes(0, 1)
        weights[:, some] = routing.weights.swapaxes(0, 1)
        begin += length
    return experts, weights
