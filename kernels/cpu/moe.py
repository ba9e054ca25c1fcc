"""The mixture of experts on NumPy arrays: rows sorted by expert, products by group, sums in slot order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Arena
from zerokl.kernels.experts import Routing

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts of a layer, in panels as of `PackedGateUp` and `PackedLinear`."""

    gate_up: Floats
    """[X, ceil(F / 16), E, 32]"""
    down: Floats
    """[X, ceil(E / 32), F, 32]"""
    inner_size: int
    """F"""

    def in_slots(self, slots: list[int]) -> PackedExperts:
        """Expert slots[i] of these in slot i; a copy, unless that is each where it is."""
        if slots == list(range(len(self.gate_up))):
            return self
        return PackedExperts(self.gate_up[slots], self.down[slots], self.inner_size)


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The T * k entries of a routing, ordered by (expert, token, slot)."""

    starts: Ints
    """[X + 1], where each expert's rows begin."""
    tokens: Ints
    """[T * k], the token of a row."""
    rows: Ints
    """[T, k], the row of a token's slot."""

    def of_rows(self, tokens: Ints) -> ExpertRows:
        """The same order, after what were tokens here are found to be those of `tokens`."""
        return ExpertRows(self.starts, tokens[self.tokens], self.rows)


def sort_by_expert(ids: Ints, num_experts: int) -> ExpertRows:
    """Where each expert's rows lie, for ids [T, k]."""
    order = ExpertRows(np.empty(num_experts + 1, np.int32), np.empty(ids.size, np.int32), np.empty_like(ids))
    _cpu.sort_by_expert(ids, order.starts, order.tokens, order.rows)
    return order


def expert_outputs(arena: Arena, x: Floats, order: ExpertRows, experts: PackedExperts) -> Floats:
    """What each row's expert gives for its token's x: [T, E] -> [T * k, E], not yet weighted."""
    count, hidden = len(order.tokens), x.shape[1]
    rows = arena.take(count, hidden)
    _cpu.gather_rows(x, order.tokens, rows)
    inner = arena.take(count, experts.inner_size)
    _cpu.grouped_swiglu(rows, order.starts, experts.gate_up, experts.inner_size, inner)
    outputs = arena.take(count, hidden)
    _cpu.grouped_linear(inner, order.starts, experts.down, hidden, outputs)
    return outputs


def combined(arena: Arena, outputs: Floats, rows: Ints, weights: Floats, shared: Floats | None) -> Floats:
    """The sum over slots, in order, of weight and output: outputs [N, E], rows and weights [T, k] -> [T, E]."""
    out = arena.take(len(rows), outputs.shape[1])
    _cpu.combine(outputs, rows, weights, shared, out)
    return out


class ExpertRunner(Protocol):
    """How a mixture gets to its experts. It knows what form their weights have."""

    def run(self, arena: Arena, x: Floats, routing: Routing[Floats], experts: Any, shared: Floats | None) -> Floats:
        """See `Ops.moe`."""
        ...


class LocalExperts:
    """All experts are here, as `PackedExperts`."""

    def run(
        self, arena: Arena, x: Floats, routing: Routing[Floats], experts: PackedExperts, shared: Floats | None
    ) -> Floats:
        """See `Ops.moe`."""
        order = sort_by_expert(routing.experts, len(experts.gate_up))
        return combined(arena, expert_outputs(arena, x, order, experts), order.rows, routing.weights, shared)
