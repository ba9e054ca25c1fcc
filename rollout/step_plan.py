"""What one step computes: plain data that the scheduler writes and `build_step_inputs` and `Scheduler.update` read."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from zerokl.rollout.request import Request


class Refusal(enum.Enum):
    """Why a waiting request did not join a step. A refused request changes no state but its metric and its age."""

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


class PlanEntry(NamedTuple):
    """Tokens start .. start + num_tokens of one request, and rows first_row .. first_row + num_rows of the result.

    The rows belong to the request's last `num_rows` tokens of this step. A tuple, as a step makes one per sequence.
    """

    request_id: str
    start: int
    num_tokens: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward step of one rank with one weight set."""

    step: int
    """Counts plans from 1; never repeats in an engine."""
    policy: str
    """Name of the weight set to run."""
    policy_version: int
    """Version of these weights, recorded with every result of the step."""
    weight_epoch: int
    """Epoch of these weights: part of the key of every KV block written in the step."""
    entries: tuple[PlanEntry, ...]
    """Decoding requests first, then prefill chunks; each request at most once."""
    preempted: tuple[str, ...]
    """Requests that lost their blocks while this step was planned."""
    num_tokens: int
    num_rows: int


class StepDraft:
    """A step in the making: what is left of its token budget, and the entries so far."""

    __slots__ = ("budget", "entries", "num_rows", "num_tokens", "step")

    def __init__(self, step: int, budget: int) -> None:
        self.step = step
        self.budget = budget
        self.entries: list[PlanEntry] = []
        self.num_tokens = 0
        self.num_rows = 0

    def take(self, request: Request) -> None:
        """Compute what the request lacks in this step, as far as the budget goes."""
        start = request.num_computed_tokens
        num_tokens = min(request.compute_target - start, self.budget)
        first_wanted = request.num_prompt_tokens + request.num_output_tokens - 1
        num_rows = max(0, start + num_tokens - max(start, first_wanted))
        self.entries.append(PlanEntry(request.request_id, start, num_tokens, self.num_rows, num_rows))
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        self.num_rows += num_rows
        request.in_flight_step = self.step
