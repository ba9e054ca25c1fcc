# ruff: noqa: D102 - the class that each protocol names says what its methods do
"""What a step is planned from and what comes of it: questions that change nothing, and a decision as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from zerokl.rollout.kv_cache.prefix_cache import PrefixKeys
from zerokl.rollout.request import Request
from zerokl.rollout.step_plan import PlanEntry, Refusal


class WeightSet(NamedTuple):
    """What the scheduler knows of a weight set: `epoch` keys KV blocks and never repeats, `version` is reported."""

    epoch: int
    version: int


class RunningView(Protocol):
    """The questions of `RunningSet`."""

    size: int
    expected_tokens: int

    def of(self, policy: str) -> Mapping[str, Request]: ...
    def next_entries(self, policy: str) -> Mapping[str, PlanEntry | None]: ...
    @property
    def short(self) -> Mapping[str, Request]: ...
    @property
    def resting(self) -> Mapping[str, Request]: ...
    def in_order(self) -> list[Request]: ...
    def policies(self) -> list[str]: ...


class QueueView(Protocol):
    """The questions of `WaitingQueue`."""

    def __len__(self) -> int: ...
    def policies(self) -> list[str]: ...
    def candidates(self, policy: str, limit: int) -> list[Request]: ...
    def gathers_since(self, policy: str) -> float | None: ...
    @property
    def aged(self) -> Request | None: ...
    @property
    def blocked(self) -> Mapping[str, Request]: ...


class KVCacheView(Protocol):
    """The questions of `KVCacheManager`."""

    block_size: int

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    def blocks_for(self, num_tokens: int) -> int: ...
    def prefix_keys(self, request: Request, weight_epoch: int) -> PrefixKeys: ...
    def match(self, request: Request, prefix: PrefixKeys) -> list[int]: ...
    def first_position(self, request: Request, matched: Sequence[int]) -> int: ...
    def num_unused(self, blocks: Sequence[int], besides: Set[int]) -> int: ...
    def num_released(self, request: Request, dropped: Counter[int]) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The scheduler's state between two steps, seen through questions; holds while nobody changes it."""

    running: Sequence[RunningView]
    """One per rank."""
    kv_caches: Sequence[KVCacheView]
    """One per rank."""
    queue: QueueView
    weights: Mapping[str, WeightSet]
    turns: Sequence[str]
    """Weight sets with work, the one that has waited longest for a step first."""


class Join(NamedTuple):
    """A waiting request starts to run on a rank, with `matched` blocks of its prefix cache."""

    request: Request
    rank: int
    matched: list[int]


class Blocked(NamedTuple):
    """A waiting request lacks blocks: from now on younger ones that join overtake it."""

    request: Request


class Move(NamedTuple):
    """A running request goes on on another rank, with `matched` blocks of the prefix cache there."""

    request: Request
    source: int
    target: int
    matched: list[int]


class RankDecision(NamedTuple):
    """A rank's part: its entries, and what happens to its requests before they are computed."""

    entries: list[PlanEntry]
    num_tokens: int
    num_rows: int
    preempted: list[Request]
    """In the order in which to preempt them."""
    grown: list[Request]
    """Each gets one more block."""


@dataclass(slots=True, kw_only=True)
class Decision:
    """What `Scheduler` is to do; nothing of it has been done yet.

    Order of execution: keys are remembered, all matched blocks shared, then preempted, grown, moved, joined.
    """

    policy: str | None
    """The weight set to run; None if there is nothing to compute before `hold_until`."""
    ranks: list[RankDecision]
    """One per rank."""
    outcomes: list[Join | Blocked] = field(default_factory=list)
    """Of the waiting requests that were tried, in their order."""
    moves: list[Move] = field(default_factory=list)
    refusals: list[tuple[Refusal, str | None]] = field(default_factory=list)
    """With the id of the request, where it was one."""
    prefixes: dict[str, tuple[Request, PrefixKeys]] = field(default_factory=dict)
    """By request id the keys that were made on the way: worth remembering."""
    hold_until: float | None = None
    """When the first collection window closes."""
    left: list[str] = field(default_factory=list)
    """Weight sets of which all that could join has joined: their requests that still wait are held no more."""

    def prefix_keys(self, kv_cache: KVCacheView, request: Request, epoch: int) -> PrefixKeys:
        """The request's prefix keys, made anew or found here."""
        known = self.prefixes.get(request.request_id)
        if known is None:
            known = self.prefixes[request.request_id] = request, kv_cache.prefix_keys(request, epoch)
        return known[1]
