"""Moves running requests forward by what a step computes, which is known before its results are.

What a step draws is known later. So a step may be planned as if the one under way were over: every request that samples
has one more token then, which the device has already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from zerokl.rollout.request import Request
from zerokl.rollout.residents import Residents
from zerokl.rollout.step_plan import RankPlan, StepPlan
from zerokl.rollout.waiting_queue import WaitingQueue


class Progress:
    """Progress of computed tokens, and what follows from it: published blocks, samples that may share a prompt."""

    def __init__(self, residents: Residents, queue: WaitingQueue) -> None:
        self.foreseen_step = 0
        """The latest step that `foresee` was given."""
        self._residents = residents
        self._queue = queue
        self._leaders: list[Request] = []

    def move(self, rank_plan: RankPlan, members: Sequence[Request | None]) -> None:
        """What a rank's step computes counts as computed from here on; all of it is known.

        `members`: the request of each entry, None for those that have left.
        """
        kv_cache, has_leaders = self._residents.kv_caches[rank_plan.rank], self._queue.has_leaders
        block_size = kv_cache.block_size
        for (_, start, num_tokens, _), request in zip(rank_plan.entries, members, strict=True):
            if request is None:
                continue
            request.num_computed_tokens = end = start + num_tokens
            if end // block_size > request.num_published_blocks:
                kv_cache.publish(request)
            if has_leaders and self._has_computed_shared(request):
                self._leaders.append(request)

    def note_moved(self, rank_plan: RankPlan, members: Sequence[Request | None], ended: Set[str]) -> None:
        """After `move`, and once results are taken: what the next step computes of all but those that have `ended`."""
        advance = self._residents.running[rank_plan.rank].advance
        for request in members:
            if request is not None and request.request_id not in ended:
                advance(request)

    def release_groups(self) -> None:
        """Let the samples join that wait for a prompt which has been computed by now."""
        # Each enters at the front: the last one first keeps the order of prompts.
        for leader in reversed(self._leaders):
            self._queue.release_group(leader)
        self._leaders.clear()

    def foresee(self, plan: StepPlan, requests: Mapping[str, Request]) -> None:
        """Move the requests of a step on to the next step, while this one is under way.

        Blocks are published: who reads them does so in a later step. Those that end whatever the results are rest.
        """
        left = self._residents.left  # their results will be dropped
        for rank_plan in plan.ranks:
            members = [None if entry[0] in left else requests[entry[0]] for entry in rank_plan.entries]
            self.move(rank_plan, members)
            self._residents.running[rank_plan.rank].foresee(plan.policy, rank_plan.entries, members)
        self.release_groups()
        self.foreseen_step = plan.step

    def _has_computed_shared(self, request: Request) -> bool:
        kv_cache = self._residents.kv_caches[0]
        return self._queue.leads(request) and request.num_computed_tokens >= kv_cache.shareable_tokens(request)
