"""Moves running requests forward by what a step computes, which is known before its results are.

What a step draws is known later. So a step may be planned as if the one under way were over: every request that samples
has one more token then, which the device has already.
"""

from __future__ import annotations

from collections.abc import Mapping

from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.residents import Residents
from zerokl.rollout.step_plan import PlanEntry, RankPlan, StepPlan
from zerokl.rollout.waiting_queue import WaitingQueue


class Progress:
    """Progress of computed tokens, and what follows from it: published blocks, samples that may share a prompt."""

    def __init__(self, residents: Residents, queue: WaitingQueue) -> None:
        self.foreseen_step = 0
        """The latest step that `foresee` was given."""
        self._residents = residents
        self._queue = queue
        self._leaders: list[Request] = []

    def move(self, request: Request, entry: PlanEntry, kv_cache: KVCacheManager) -> None:
        """The entry's tokens count as computed from here on; all of them are known."""
        request.num_computed_tokens = entry.start + entry.num_tokens
        kv_cache.publish(request)
        if request.group_id is not None and self._has_computed_shared(request):
            self._leaders.append(request)

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
        for rank_plan in plan.ranks:
            self._foresee_rank(rank_plan, requests)
        self.release_groups()
        self.foreseen_step = plan.step

    def _foresee_rank(self, rank_plan: RankPlan, requests: Mapping[str, Request]) -> None:
        left = self._residents.left
        running, kv_cache = self._residents.running[rank_plan.rank], self._residents.kv_caches[rank_plan.rank]
        for entry in rank_plan.entries:
            if entry.request_id in left:
                continue  # its result will be dropped
            request = requests[entry.request_id]
            self.move(request, entry, kv_cache)
            end = request.num_computed_tokens
            if entry.num_rows and request.kind == "generate" and end + 1 < request.max_num_tokens:
                request.compute_target = end + 1  # the token that is drawn is one more to compute
            if end < request.compute_target:
                running.advance(request)
            else:
                running.rest(request)

    def _has_computed_shared(self, request: Request) -> bool:
        kv_cache = self._residents.kv_caches[0]
        return self._queue.leads(request) and request.num_computed_tokens >= kv_cache.shareable_tokens(request)
