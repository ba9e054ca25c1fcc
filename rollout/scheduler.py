"""Decides what each step computes. Pure bookkeeping: no clock, no lock, no device; one thread owns it.

There is no prefill phase and no decode phase. Every request has `num_computed_tokens`, which catches up with its tokens
under one token budget per step; chunked prefill, cached prefixes, scoring and re-computation after a preemption are all
the same movement. What a step computes never changes what it gives: only speed and fairness are decided here.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.completion import End, StopChecker, find_end
from zerokl.rollout.config import SchedulerConfig
from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.running_set import RunningSet
from zerokl.rollout.step_plan import Refusal, StepDraft, StepPlan
from zerokl.rollout.waiting_queue import WaitingQueue


class WeightSet(NamedTuple):
    """What the scheduler knows of a weight set: `epoch` keys KV blocks and never repeats, `version` is reported."""

    epoch: int
    version: int


class Scheduler:
    """Requests from `add` to the list returned by `update`.

    A request is waiting (holds no block), running (holds blocks for all its known tokens) or finished (gone from here).
    In a step those that run are served first, in order of admission, single tokens before chunks; then waiting ones
    join. Where one that runs needs a block and none is free, the most recently admitted one is preempted: the
    oldest always gets through, so all do. Steps alternate between the weight sets that have work.
    """

    def __init__(
        self, config: SchedulerConfig, kv_cache: KVCacheManager, stop_checker: StopChecker | None = None
    ) -> None:
        self.requests: dict[str, Request] = {}
        """All unfinished requests by id; read only for others."""
        self._config = config
        self._kv_cache = kv_cache
        self._stop_checker = stop_checker
        self._queue = WaitingQueue(config.max_overtakes)
        self._running = RunningSet()
        self._weights: dict[str, WeightSet] = {}
        self._last_turn: dict[str, int] = {}
        self._step = 0
        self._num_arrivals = 0
        self._counts: Counter[str] = Counter()

    # -- weight sets -------------------------------------------------------------------------------
    def set_weights(self, name: str, *, epoch: int, version: int, keep_running: bool = False) -> None:
        """Declare or replace a weight set.

        Raises ValueError while requests of that name run on the old one, unless `keep_running` says that they go on
        with the blocks they hold.
        """
        if self._running.count(name) and not keep_running:
            raise ValueError(
                f"weight set {name!r} must not be replaced under {self._running.count(name)} running requests: "
                "drain, abort or preempt them first"
            )
        self._weights[name] = WeightSet(epoch, version)

    def drop_weights(self, name: str) -> None:
        """Forget a weight set. Raises ValueError where it is unknown or has unfinished requests."""
        if name not in self._weights:
            raise ValueError(f"weight set {name!r} is unknown; known: {sorted(self._weights)}")
        if self.has_unfinished(name):
            raise ValueError(f"weight set {name!r} must not be dropped while it has unfinished requests")
        del self._weights[name]
        self._last_turn.pop(name, None)

    # -- requests ----------------------------------------------------------------------------------
    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return self._running.size

    @property
    def num_waiting(self) -> int:
        """Requests that hold none, those that wait for a sibling included."""
        return len(self._queue)

    @property
    def num_unfinished(self) -> int:
        """Running and waiting requests."""
        return len(self.requests)

    def has_unfinished(self, policy: str) -> bool:
        """Whether requests of a weight set wait or run."""
        return self._running.count(policy) > 0 or policy in self._queue.policies()

    def add(self, request: Request) -> None:
        """Queue a request that has passed `AdmissionLimits.check`. ValueError for an id in use or unknown weights."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id must be new, got {request.request_id!r}, which is unfinished")
        if request.policy not in self._weights:
            raise ValueError(f"policy must be one of {sorted(self._weights)}, got {request.policy!r}")
        assert request.status is RequestStatus.WAITING and request.arrival < 0, f"{request.request_id} was added before"
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        self._queue.add(request, shareable_tokens=self._kv_cache.shareable_tokens(request))

    def abort(self, request_id: str) -> Request | None:
        """End a request with what it has so far and return it; None if it is unknown or finished.

        Not between `plan` and `build_step_inputs`; in any other moment, a running step's result for it is ignored.
        """
        request = self.requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
        else:
            self._queue.remove(request)
        if self._queue.leads(request):
            self._queue.replace_leader(request)
        self._finish(request, End("abort"))
        return request

    def abort_all(self) -> list[Request]:
        """Abort every unfinished request and return them in order of arrival."""
        return [request for request in map(self.abort, list(self.requests)) if request is not None]

    def preempt(self, request_id: str) -> bool:
        """Take a running request's blocks and put it first in the queue; False if it does not run."""
        request = self.requests.get(request_id)
        if request is None or request.status is not RequestStatus.RUNNING:
            return False
        self._preempt(request)
        return True

    def preempt_all(self) -> None:
        """Preempt every running request; their order is kept."""
        while self._running.size:
            self._preempt(self._running.latest())

    # -- a step ------------------------------------------------------------------------------------
    def plan(self) -> StepPlan | None:
        """The next step; None if there is no unfinished request.

        Allocates blocks and may preempt, but moves no request forward: that is `update`'s. After a step that failed,
        plan again: it lists the same tokens.
        """
        if not self.requests:
            return None
        self._step += 1
        preempted: list[str] = []
        for policy in self._turns():
            draft = StepDraft(self._step, self._config.max_num_batched_tokens)
            self._serve_running(draft, policy, preempted)
            self._admit(draft, policy, may_join=not preempted)
            if draft.entries:
                return self._commit(draft, policy, preempted)
        raise AssertionError("unfinished requests, but none can run")

    def update(self, plan: StepPlan, result: SampleResult) -> list[Request]:
        """Apply a step's result and return the requests that it finished.

        Requests that were aborted or preempted since the plan was made are left alone.
        """
        assert len(result.tokens) == plan.num_rows, f"{len(result.tokens)} rows for a plan of {plan.num_rows}"
        tokens = result.tokens.tolist()
        finished: list[Request] = []
        leaders: list[Request] = []
        for entry in plan.entries:
            request = self.requests.get(entry.request_id)
            if request is None or request.in_flight_step != plan.step:
                continue
            request.in_flight_step = -1
            request.num_computed_tokens = entry.start + entry.num_tokens
            self._kv_cache.publish(request)
            if request.group_id is not None and self._has_computed_shared(request):
                leaders.append(request)
            if entry.num_rows:
                request.record(result, entry.first_row, entry.num_rows, plan.policy_version)
                end = find_end(request, tokens[entry.first_row], self._stop_checker)
                if end is not None:
                    self._stop_running(request)
                    self._finish(request, end)
                    finished.append(request)
        for leader in reversed(leaders):  # each enters at the front: the last one first keeps the order of prompts
            self._queue.release_group(leader)
        self._counts["computed_tokens"] += plan.num_tokens
        self._counts["result_rows"] += plan.num_rows
        return finished

    def metrics(self) -> dict[str, int]:
        """Gauges and counters since the start; refusals are counted per step and cause."""
        gauges = {
            "steps": self._step,
            "running": self.num_running,
            "waiting": self.num_waiting,
            "free_blocks": self._kv_cache.num_free_blocks,
            "cached_blocks": self._kv_cache.num_cached_blocks,
            "total_blocks": self._kv_cache.num_blocks,
        }
        names = ["computed_tokens", "cached_tokens", "result_rows", "admissions", "preemptions"]
        names += [f"refused_{refusal.value}" for refusal in Refusal]
        names += ["finished_stop", "finished_length", "finished_abort"]
        return gauges | {name: self._counts[name] for name in names}

    # -- planning ----------------------------------------------------------------------------------
    def _turns(self) -> list[str]:
        """Weight sets with work, the one that has waited longest for a step first."""
        names = list(dict.fromkeys([*self._running.policies(), *self._queue.policies()]))
        return sorted(names, key=lambda name: self._last_turn.get(name, 0))

    def _serve_running(self, draft: StepDraft, policy: str, preempted: list[str]) -> None:
        chunks: list[Request] = []
        for request in self._running.of(policy):
            if request.status is not RequestStatus.RUNNING:  # preempted for one before it
                continue
            if request.compute_target - request.num_computed_tokens > 1:
                chunks.append(request)
            elif draft.budget > 0 and self._make_room(request, preempted):
                draft.take(request)
        for request in chunks:
            if draft.budget > 0 and request.status is RequestStatus.RUNNING:
                draft.take(request)

    def _make_room(self, request: Request, preempted: list[str]) -> bool:
        """Give the request a block if it needs one; False if it was itself the one to be preempted for it."""
        if not self._kv_cache.needs_block(request):
            return True
        while not self._kv_cache.can_grow():
            assert self._running.size > 1, f"{request.request_id} alone does not fit the pool: admission must refuse it"
            victim = self._running.latest()
            self._preempt(victim)
            preempted.append(victim.request_id)
            if victim is request:
                return False
        self._kv_cache.grow(request)
        return True

    def _admit(self, draft: StepDraft, policy: str, *, may_join: bool) -> None:
        """Let waiting requests join. Test, then commit: one that is refused only ages."""
        slots = self._config.max_num_seqs - self.num_running
        num_blocked = 0
        if self._queue.aged is not None and len(self._queue) > 1:
            self._refuse(Refusal.TURN)
        for request in self._queue.candidates(policy, slots + self._config.look_ahead + 1):
            if draft.budget == 0:
                return self._refuse(Refusal.TOKENS)
            if slots == 0:
                return self._refuse(Refusal.SLOTS)
            if not may_join:
                return self._refuse(Refusal.BLOCKS)
            if self._queue.aged not in (None, request):  # it came of age by one that joined just now
                return self._refuse(Refusal.TURN)
            matched = self._kv_cache.match(request, self._weights[policy].epoch)
            if self._kv_cache.can_admit(request, matched, reserve=self.num_running):
                self._start_running(request, matched)
                draft.take(request)
                slots -= 1
                continue
            self._refuse(Refusal.BLOCKS)
            self._queue.note_blocked(request)
            num_blocked += 1
            if num_blocked > self._config.look_ahead:
                return None
        return None

    def _commit(self, draft: StepDraft, policy: str, preempted: list[str]) -> StepPlan:
        self._last_turn[policy] = self._step
        for other in self._queue.policies():
            if other != policy:
                self._refuse(Refusal.POLICY)
        weights = self._weights[policy]
        return StepPlan(
            step=self._step,
            policy=policy,
            policy_version=weights.version,
            weight_epoch=weights.epoch,
            entries=tuple(draft.entries),
            preempted=tuple(preempted),
            num_tokens=draft.num_tokens,
            num_rows=draft.num_rows,
        )

    def _refuse(self, refusal: Refusal) -> None:
        self._counts[f"refused_{refusal.value}"] += 1

    # -- changes of state --------------------------------------------------------------------------
    def _start_running(self, request: Request, matched: list[int]) -> None:
        self._kv_cache.admit(request, matched)
        self._queue.remove(request)
        self._queue.note_joined(request)
        request.status = RequestStatus.RUNNING
        self._running.add(request)
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self._counts["admissions"] += 1
        self._counts["cached_tokens"] += request.num_computed_tokens

    def _stop_running(self, request: Request) -> None:
        self._running.remove(request)
        self._kv_cache.release(request)
        request.num_computed_tokens = 0
        request.in_flight_step = -1

    def _preempt(self, request: Request) -> None:
        self._stop_running(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._queue.add_front(request)
        self._counts["preemptions"] += 1

    def _has_computed_shared(self, request: Request) -> bool:
        return self._queue.leads(request) and request.num_computed_tokens >= self._kv_cache.shareable_tokens(request)

    def _finish(self, request: Request, end: End) -> None:
        request.finish(end.finish_reason, end.reason)
        del self.requests[request.request_id]
        self._counts[f"finished_{end.finish_reason}"] += 1
