"""Who runs on which rank, with which blocks: the one place that carries out what was decided about running requests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.running_set import RunningSet
from zerokl.rollout.snapshot import Decision, Join, Move
from zerokl.rollout.step_plan import Handover


@dataclass(slots=True)
class _Moving:
    """A request that runs on another rank now, whose blocks on the first one are still to be copied."""

    handover: Handover
    held: list[int]
    """All its blocks on the source rank."""
    step: int
    """The latest step that copies them."""


class Residents:
    """The running requests of every rank. A request handed over belongs to its target at once, but keeps its blocks on
    the source until a step that copies them has succeeded; a failed one is repeated.
    """

    def __init__(self, kv_caches: Sequence[KVCacheManager]) -> None:
        self.kv_caches = tuple(kv_caches)
        self.left: set[str] = set()
        """Ids of those that have stopped since the latest step was planned: its results are not for them."""
        self.left_before: set[str] = set()
        """Ids of those that had stopped by then since the step before it was planned."""
        self.running = tuple(RunningSet(kv_cache.block_size) for kv_cache in kv_caches)
        self._moving: dict[str, _Moving] = {}
        self._num_admissions = 0

    @property
    def size(self) -> int:
        """Running requests of all ranks."""
        return sum(running.size for running in self.running)

    def count(self, policy: str) -> int:
        """Running requests of one weight set."""
        return sum(running.count(policy) for running in self.running)

    def policies(self) -> list[str]:
        """Weight sets with a running request."""
        return list(dict.fromkeys(policy for running in self.running for policy in running.policies()))

    def in_order(self) -> list[Request]:
        """All, oldest admission first."""
        members = [request for running in self.running for request in running.in_order()]
        return sorted(members, key=lambda request: request.admission)

    def with_blocks_on(self, ranks: Collection[int]) -> list[Request]:
        """Those that hold blocks of these ranks, where they run or on the way from there; oldest admission first."""
        leaving = {key for key, moving in self._moving.items() if moving.handover.source in ranks}
        return [request for request in self.in_order() if request.rank in ranks or request.request_id in leaving]

    def share(self, decision: Decision) -> None:
        """Take hold of all blocks that the decision has matched: nothing carried out later may evict them."""
        for request, prefix in decision.prefixes.values():
            self.kv_caches[0].adopt_keys(request, prefix)
        for outcome in decision.outcomes:
            if isinstance(outcome, Join):
                self.kv_caches[outcome.rank].share(outcome.matched)
        for move in decision.moves:
            self.kv_caches[move.target].share(move.matched)

    def start(self, join: Join) -> None:
        """Give a waiting request its blocks; those matched are shared before."""
        request = join.request
        self.kv_caches[join.rank].admit(request, join.matched)
        request.status = RequestStatus.RUNNING
        request.num_matched_tokens = request.num_computed_tokens
        self._settle_on(request, join.rank)

    def note_planned(self) -> None:
        """A step has been planned, with all who have not stopped before."""
        self.left_before, self.left = self.left, set()

    def stop(self, request: Request) -> None:
        """Take a running request's blocks, on both ranks if it is on its way."""
        self.left.add(request.request_id)
        if request.log is not None:
            request.log.leave(request)
        self.running[request.rank].remove(request)
        self.kv_caches[request.rank].release(request)
        moving = self._moving.pop(request.request_id, None)
        if moving is not None:
            self.kv_caches[moving.handover.source].release_blocks(moving.held)
        request.num_computed_tokens = 0
        request.rank = -1

    def grow(self, rank: int, requests: Iterable[Request]) -> None:
        """One more block for each."""
        for request in requests:
            self.kv_caches[rank].grow(request)
            self.running[rank].note_grown(request)

    def move(self, move: Move) -> None:
        """Let a request go on on another rank; its handover is listed until a step that has it succeeds."""
        request, source, target, matched = move
        assert request.request_id not in self._moving, f"{request.request_id} is on its way already"
        self.running[source].remove(request)
        kv_cache = self.kv_caches[target]
        held = kv_cache.take_over(request, matched)
        request.num_matched_tokens = max(request.num_matched_tokens, kv_cache.first_position(request, matched))
        self._settle_on(request, target)
        copied = slice(len(matched), kv_cache.blocks_for(request.num_computed_tokens))
        targets = request.block_table[: request.num_blocks].tolist()
        handover = Handover(request.request_id, source, target, tuple(held[copied]), tuple(targets[copied]))
        self._moving[request.request_id] = _Moving(handover, held, -1)

    def handovers(self, step: int) -> tuple[Handover, ...]:
        """All that this step is to copy: new ones, and those of steps that failed."""
        for moving in self._moving.values():
            moving.step = step
        return tuple(moving.handover for moving in self._moving.values())

    def release_copied(self, step: int) -> None:
        """The step has succeeded: let go of the sources of what it copied."""
        if not self._moving:
            return
        done = [request_id for request_id, moving in self._moving.items() if moving.step == step]
        for request_id in done:
            moving = self._moving.pop(request_id)
            self.kv_caches[moving.handover.source].release_blocks(moving.held)

    def check_integrity(self) -> None:
        """Assert on each rank that no block is lost, held twice or held by nobody."""
        for rank, kv_cache in enumerate(self.kv_caches):
            held = [moving.held for moving in self._moving.values() if moving.handover.source == rank]
            members = self.running[rank].in_order()
            assert all(request.rank == rank for request in members)
            self.running[rank].check_integrity()
            kv_cache.check_integrity(members, held)

    def _settle_on(self, request: Request, rank: int) -> None:
        request.rank = rank
        self.running[rank].add(request, self._num_admissions)
        self._num_admissions += 1
