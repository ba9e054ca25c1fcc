"""The mixture of experts over several ranks: rows travel to their experts and back, sums stay at the token's own rank.

A token's row goes once to each rank that holds some of its experts, with the slots of weights to use there. Their
outputs come back unweighted, as float32, and are added by the very `combine` that one rank uses, in slot order: the
bits do not depend on where an expert lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu.arena import Arena
from zerokl.kernels.cpu.moe import PackedExperts, combined, expert_outputs, sort_by_expert
from zerokl.kernels.experts import ExpertMap, Routing, SpreadWeights

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the T * k entries of a routing go, and where their outputs come back."""

    tokens: list[NDArray[np.intp]]
    """For each rank the tokens that have experts there, ascending."""
    slots: list[Ints]
    """For each rank, per such token, [n, k]: each entry's slot of weights there, -1 for those elsewhere."""
    rows: Ints
    """[T, k]: the row of an entry's output, after the ranks' outputs were laid end to end."""


def plan_dispatch(ids: Ints, where: ExpertMap, num_ranks: int) -> Dispatch:
    """The dispatch of ids [T, k]."""
    ranks, slots = where.rank[ids], where.slot[ids]
    tokens, sent = [], []
    for rank in range(num_ranks):
        here = ranks == rank
        some = np.flatnonzero(here.any(axis=1))
        tokens.append(some)
        sent.append(np.where(here[some], slots[some], np.int32(-1)))
    # A rank answers in the order of (token, slot), as the entries of one rank stand here.
    rows = np.empty(ids.size, np.int32)
    rows[np.argsort(ranks, axis=None, kind="stable")] = np.arange(ids.size, dtype=np.int32)
    return Dispatch(tokens, sent, rows.reshape(ids.shape))


class SpreadExperts:
    """Runs mixtures over the ranks of a communicator, each of which must call with its own tokens, perhaps none."""

    def __init__(self, group: Communicator[NDArray[Any]]) -> None:
        self._group = group

    def run(
        self, arena: Arena, x: Floats, routing: Routing[Floats], experts: SpreadWeights, shared: Floats | None
    ) -> Floats:
        """As `LocalExperts.run`: [T, E] -> [T, E], the same bits.

        Two exchanges. Raises what the communicator raises.
        """
        plan = plan_dispatch(routing.experts, experts.where, self._group.size)
        outgoing = [_letter(arena, x, *part) for part in zip(plan.tokens, plan.slots, strict=True)]
        incoming = self._group.all_to_all(outgoing)
        answers = self._group.all_to_all(_answer(arena, incoming, x.shape[1], experts.packed))
        outputs = arena.take(routing.experts.size, x.shape[1])
        np.concatenate(answers, out=outputs)
        return combined(arena, outputs, plan.rows, routing.weights, shared)


def _letter(arena: Arena, x: Floats, tokens: NDArray[np.intp], slots: Ints) -> Ints:
    """Rows of x with the slots of their experts behind them, as the bits of one array [n, E + k]."""
    letter = arena.take(len(tokens), x.shape[1] + slots.shape[1]).view(np.int32)
    letter[:, : x.shape[1]] = x[tokens].view(np.int32)
    letter[:, x.shape[1] :] = slots
    return letter


def _answer(arena: Arena, letters: list[Ints], hidden: int, packed: PackedExperts) -> list[Floats]:
    """What this rank's experts give for each letter's entries, in the order of (row, slot): [m_p, E] per rank."""
    x = arena.take(sum(map(len, letters)), hidden)
    np.concatenate([letter[:, :hidden].view(np.float32) for letter in letters], out=x)
    slots = np.concatenate([letter[:, hidden:] for letter in letters])
    row, column = np.nonzero(slots >= 0)
    order = sort_by_expert(slots[row, column][:, None], len(packed.gate_up))
    outputs = expert_outputs(arena, x, order.of_rows(row.astype(np.int32)), packed)
    answers = arena.take(len(row), hidden)
    _cpu.gather_rows(outputs, order.rows.reshape(-1), answers)
    counts = [int(np.count_nonzero(letter[:, hidden:] >= 0)) for letter in letters]
    return np.split(answers, np.cumsum(counts)[:-1])
