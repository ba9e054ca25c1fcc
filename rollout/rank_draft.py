"""One rank's part of a step in the making: what is left of its budgets while decisions are taken, none carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from zerokl.rollout.request import Request
from zerokl.rollout.scheduler_config import Role, SchedulerConfig
from zerokl.rollout.snapshot import KVCacheView, RankDecision, RunningView
from zerokl.rollout.step_plan import PlanEntry, Refusal


class RankDraft:
    """Starts as the rank is now; each `take`, `make_room` and `admit` leaves less of it.

    `fork` gives a copy to try something on. Blocks are counted, not chosen: `free` is what allocations can still have.
    """

    __slots__ = (
        "_dropped",
        "_gone",
        "_preempted_ids",
        "_running",
        "_woken",
        "budget",
        "entries",
        "expected_tokens",
        "free",
        "grown",
        "kv_cache",
        "num_rows",
        "num_tokens",
        "preempted",
        "rank",
        "reserve",
        "reserved_output_blocks",
        "role",
        "slots",
    )

    def __init__(
        self, rank: int, role: Role, running: RunningView, kv_cache: KVCacheView, budgets: SchedulerConfig
    ) -> None:
        self.rank = rank
        self.role = role
        self.kv_cache = kv_cache
        self.budget = budgets.max_num_batched_tokens
        self.slots = budgets.max_num_seqs - running.size
        self.free = kv_cache.num_free_blocks
        self.reserved_output_blocks = budgets.reserved_output_blocks
        self.reserve = running.size
        """Blocks that stay free for the growth of those that run here."""
        self.expected_tokens = running.expected_tokens
        self.entries: list[PlanEntry] = []
        self.num_tokens = 0
        self.num_rows = 0
        self.preempted: list[Request] = []
        self.grown: list[Request] = []
        self._running = running
        self._preempted_ids: set[str] = set()
        self._gone: set[str] = set()
        self._woken: set[int] = set()
        self._dropped: Counter[int] = Counter()
        if self.reserved_output_blocks:
            reserves = (self._output_reserve(request, request.num_blocks) for request in running.in_order())
            self.reserve = sum(max(1, reserve) for reserve in reserves)

    def fork(self) -> RankDraft:
        """A copy that may be changed apart."""
        copy = object.__new__(RankDraft)
        for name in self.__slots__:
            value = getattr(self, name)
            setattr(copy, name, value.copy() if isinstance(value, (list, set, Counter)) else value)
        return copy

    def finish(self) -> RankDecision:
        """What was decided for this rank."""
        return RankDecision(self.entries, self.num_tokens, self.num_rows, self.preempted, self.grown)

    # -- those that run here -----------------------------------------------------------------------
    def serve(self, policy: str, hand_over: Callable[[RankDraft, Request], bool] | None) -> None:
        """List what the running requests of a weight set lack: single tokens first, then chunks, each in order of
        admission. One that `hand_over` finds another rank for goes on there.

        Where one needs a block and none is free, the most recently admitted one of all is preempted.
        """
        requests, entries = self._running.of(policy), self._running.next_entries(policy)
        is_easy = hand_over is None and not self.preempted
        if is_easy and len(self._running.short) <= self.free and len(entries) <= self.budget:
            singles = list(filter(None, entries.values()))
            for request in self._running.short.values():
                if request.request_id in entries:
                    self._make_room(request)
        else:
            singles = self._singles(requests, entries, hand_over)
        self.entries += singles
        self.num_tokens += len(singles)
        self.num_rows += len(singles)
        self.budget -= len(singles)
        if len(singles) == len(entries):
            return
        left_out = self._preempted_ids | self._running.resting.keys()
        for request_id, request in requests.items():
            if entries[request_id] is None and self.budget > 0 and request_id not in left_out:
                self.take(request, request.num_computed_tokens)

    def _singles(
        self,
        requests: Mapping[str, Request],
        entries: Mapping[str, PlanEntry | None],
        hand_over: Callable[[RankDraft, Request], bool] | None,
    ) -> list[PlanEntry]:
        """Entries of those that lack one token, where blocks, tokens or a handover decide about each."""
        singles: list[PlanEntry] = []
        short = self._running.short
        for request_id, entry in entries.items():
            if entry is None or request_id in self._preempted_ids:
                continue
            if hand_over is not None and hand_over(self, requests[request_id]):
                self._gone.add(request_id)
            elif len(singles) < self.budget and (request_id not in short or self._make_room(requests[request_id])):
                singles.append(entry)
        return singles

    def take(self, request: Request, start: int) -> None:
        """Compute what the request lacks from `start` on in this step, as far as the budget goes."""
        num_tokens = request.compute_target - start
        if num_tokens > self.budget:
            num_tokens = self.budget
        # Rows under way lie before `start`: that they are not counted yet makes no difference.
        first_wanted = request.num_prompt_tokens + request.num_output_tokens - 1
        num_rows = start + num_tokens - (start if start > first_wanted else first_wanted)
        if num_rows < 0:
            num_rows = 0
        self.entries.append(PlanEntry(request.request_id, start, num_tokens, num_rows))
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        self.num_rows += num_rows

    def _make_room(self, request: Request) -> bool:
        """Give the request one more block; False if it was itself the one to be preempted for it."""
        while self.free == 0:
            victim = self._latest()
            self._preempted_ids.add(victim.request_id)
            self.preempted.append(victim)
            self.free += self.kv_cache.num_released(victim, self._dropped)
            if victim is request:
                return False
        self.free -= 1
        self.grown.append(request)
        return True

    def _latest(self) -> Request:
        """The most recently admitted request that is neither preempted nor on its way to another rank."""
        left = self._preempted_ids | self._gone
        return next(request for request in reversed(self._running.in_order()) if request.request_id not in left)

    # -- those that come ---------------------------------------------------------------------------
    def refusal(self) -> Refusal | None:
        """Why nobody more can come here in this step; None if one may."""
        if self.budget == 0:
            return Refusal.TOKENS
        if self.slots == 0:
            return Refusal.SLOTS
        return Refusal.BLOCKS if self.preempted else None

    def has_blocks(self, request: Request, matched: list[int]) -> bool:
        """Whether all known tokens of the request fit beside what is reserved, if it shares `matched` blocks."""
        total = self.kv_cache.blocks_for(request.compute_target)
        left = self.free - self.reserve - self._output_reserve(request, total) - (total - len(matched))
        return left >= len(matched) or (left >= 0 and left >= self._num_woken(matched))

    def admit(self, request: Request, matched: list[int], start: int) -> None:
        """Reserve blocks and a slot for the request, and compute it from `start` on."""
        total = self.kv_cache.blocks_for(request.compute_target)
        self.free -= total - len(matched) + self._num_woken(matched)
        self._woken.update(matched)
        self.reserve += max(1, self._output_reserve(request, total))
        self.slots -= 1
        self.expected_tokens += request.max_num_tokens
        self.take(request, start)

    def _num_woken(self, matched: list[int]) -> int:
        """Matched blocks that count as free until they are shared."""
        return self.kv_cache.num_unused(matched, self._woken)

    def _output_reserve(self, request: Request, num_blocks: int) -> int:
        """Blocks kept free for the growth of a request with a table of `num_blocks`."""
        if not self.reserved_output_blocks:
            return 0
        # The last token is never computed.
        growth = self.kv_cache.blocks_for(request.max_num_tokens - 1) - num_blocks
        return min(self.reserved_output_blocks, max(0, growth))
