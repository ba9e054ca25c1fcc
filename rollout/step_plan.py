"""What one step computes: plain data that the scheduler writes and `build_step_inputs` and `Scheduler.update` read."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Refusal(enum.Enum):
    """Why a request did not join a step, or a rank. One that is refused changes no state but its metric and its age."""

    TOKENS = "tokens"
    """The step's token budget is spent."""
    SLOTS = "slots"
    """max_num_seqs requests run already."""
    BLOCKS = "blocks"
    """Too few free KV blocks for its tokens and the growth of those that run, or a preemption in this very step."""
    POLICY = "policy"
    """The step runs another weight set."""
    TURN = "turn"
    """An older request that was overtaken often enough comes first."""
    WINDOW = "window"
    """Held until the collection window closes, as ranks have room for more requests that may yet arrive."""
    HANDOVER = "handover"
    """No decode rank has room for a request whose prompt is computed: it goes on where it is."""


class PlanEntry(NamedTuple):
    """Tokens start .. start + num_tokens of one request, of which the last `num_rows` give a row of the result each.

    Rows lie in the order of the entries, from 0 on each rank. A tuple, as there is one per sequence and step.
    """

    request_id: str
    start: int
    num_tokens: int
    num_rows: int


class RankPlan(NamedTuple):
    """One rank's part of a step."""

    rank: int
    entries: tuple[PlanEntry, ...]
    """Decoding requests first, then prefill chunks; each request at most once."""
    num_tokens: int
    num_rows: int

    @property
    def num_singles(self) -> int:
        """Entries of one token."""
        if self.num_tokens == len(self.entries):  # most steps: a thousand need not be looked at
            return self.num_tokens
        return sum(entry.num_tokens == 1 for entry in self.entries)

    @property
    def is_dummy(self) -> bool:
        """Whether the rank has nothing to compute: it takes part only as the others need its experts."""
        return not self.entries


class Handover(NamedTuple):
    """KV blocks of a request, copied from the pool of one rank to that of another before the step's forward."""

    request_id: str
    source: int
    target: int
    source_blocks: tuple[int, ...]
    """In the source's pool; released once the step's results are in."""
    target_blocks: tuple[int, ...]
    """In the target's pool, as many: the i-th takes the content of the i-th source block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward step of all ranks with one weight set; every rank applies its part, or none does."""

    step: int
    """Counts plans from 1; never repeats in an engine."""
    policy: str
    """Name of the weight set to run."""
    policy_version: int
    """Version of these weights, recorded with every result of the step."""
    weight_epoch: int
    """Epoch of these weights: part of the key of every KV block written in the step."""
    ranks: tuple[RankPlan, ...]
    """One per rank, in order."""
    handovers: tuple[Handover, ...] = ()
    preempted: tuple[str, ...] = ()
    """Requests that lost their blocks while this step was planned."""

    @property
    def num_tokens(self) -> int:
        """Tokens that all ranks compute."""
        return sum(rank.num_tokens for rank in self.ranks)

    @property
    def num_rows(self) -> int:
        """Rows that all ranks give."""
        return sum(rank.num_rows for rank in self.ranks)


class Hold(NamedTuple):
    """Nothing is to be computed before `until`, on the clock that `plan` was given, unless anything arrives or ends."""

    until: float
