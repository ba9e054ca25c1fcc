"""Carries out what each step is to compute, and takes its results. One thread owns it; it has no lock and no device.

What a step computes is decided in `zerokl.rollout.planning`; here are the requests, from `add` to their end.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.completion import End, StopChecker, find_end
from zerokl.rollout.config import SchedulerConfig
from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.planning import plan as plan_step
from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.residents import Residents
from zerokl.rollout.results import DECODE, PREFILL, Origin
from zerokl.rollout.scheduler_meter import SchedulerMeter
from zerokl.rollout.snapshot import Decision, Join, Snapshot, WeightSet
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_plan import Hold, PlanEntry, RankPlan, StepPlan
from zerokl.rollout.waiting_queue import WaitingQueue

logger = logging.getLogger(__name__)


class Scheduler:
    """Requests from `add` to the list returned by `update`.

    A request is waiting (holds no block), running on one rank (holds blocks there for all its known tokens) or finished
    (gone from here). In a step those that run are served first, in order of admission, single tokens before chunks;
    then waiting ones join. Where one that runs needs a block and its rank has none free, the most recently admitted one
    there is preempted: the oldest always gets through, so all do. Steps alternate between the weight sets that have
    work; all ranks run the same one.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_caches: Sequence[KVCacheManager],
        stop_checker: StopChecker | None = None,
    ) -> None:
        """`kv_caches`: one per rank, alike. Raises ValueError where `config.roles` names another number of ranks."""
        if not kv_caches or (config.roles is not None and len(config.roles) != len(kv_caches)):
            raise ValueError(f"roles must name each of the {len(kv_caches)} ranks once, got {config.roles!r}")
        self.requests: dict[str, Request] = {}
        """All unfinished requests by id; read only for others."""
        self._config = config
        self._stop_checker = stop_checker
        self._queue = WaitingQueue(config.max_overtakes)
        self._residents = Residents(kv_caches)
        self._weights: dict[str, WeightSet] = {}
        self._last_turn: dict[str, int] = {}
        self._step = 0
        self._num_arrivals = 0
        self._meter = SchedulerMeter(self._residents)

    # -- weight sets -------------------------------------------------------------------------------
    def set_weights(self, name: str, *, epoch: int, version: int, keep_running: bool = False) -> None:
        """Declare or replace a weight set.

        Raises ValueError while requests of that name run on the old one, unless `keep_running` says that they go on
        with the blocks they hold.
        """
        num_running = self._residents.count(name)
        if num_running and not keep_running:
            raise ValueError(
                f"weight set {name!r} must not be replaced under {num_running} running requests: "
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
        return self._residents.size

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
        return self._residents.count(policy) > 0 or policy in self._queue.policies()

    def add(self, request: Request, now: float = 0.0) -> None:
        """Queue a request that has passed `AdmissionLimits.check` and arrived at `now`, in seconds of `plan`'s clock.

        Raises ValueError for an id in use or unknown weights.
        """
        if request.request_id in self.requests:
            raise ValueError(f"request_id must be new, got {request.request_id!r}, which is unfinished")
        if request.policy not in self._weights:
            raise ValueError(f"policy must be one of {sorted(self._weights)}, got {request.policy!r}")
        assert request.status is RequestStatus.WAITING and request.arrival < 0, f"{request.request_id} was added before"
        request.arrival = self._num_arrivals
        request.arrival_time = now
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        self._queue.add(request, shareable_tokens=self._shareable_tokens(request))

    def abort(self, request_id: str) -> Request | None:
        """End a request with what it has so far and return it; None if it is unknown or finished.

        Not between `plan` and `build_step_orders`; in any other moment, a running step's result for it is ignored.
        """
        request = self.requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self._residents.stop(request)
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
        for request in reversed(self._residents.in_order()):
            self._preempt(request)

    def lose_ranks(self, ranks: Collection[int]) -> None:
        """The KV pools of these ranks are empty now: preempt what runs there, or was to come from there.

        Between a step that failed and the next plan, or between any other two.
        """
        for request in reversed(self._residents.with_blocks_on(ranks)):
            self._preempt(request)
        for rank in ranks:
            self._residents.kv_caches[rank].reset()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes on all ranks. Running requests keep their blocks."""
        for kv_cache in self._residents.kv_caches:
            kv_cache.reset()

    # -- a step ------------------------------------------------------------------------------------
    def plan(self, now: float) -> StepPlan | Hold | None:
        """The next step; None if there is no unfinished request.

        Hold: new requests are kept back until then and nothing else is to be computed; ask again when it is time, or
        when anything has arrived, ended or changed. A `now` of infinity holds nobody back.

        Allocates blocks and may preempt, but moves no request forward: that is `update`'s. After a step that failed,
        plan again: it lists the same tokens and the same handovers.
        """
        if not self.requests:
            return None
        turns = dict.fromkeys([*self._residents.policies(), *self._queue.policies()])
        snapshot = Snapshot(
            running=self._residents.running,
            kv_caches=self._residents.kv_caches,
            queue=self._queue,
            weights=self._weights,
            turns=sorted(turns, key=lambda name: self._last_turn.get(name, 0)),
        )
        return self._commit(plan_step(snapshot, self._config, now))

    def update(self, plan: StepPlan, results: Sequence[StepResult]) -> list[Request]:
        """Apply a step's results, one per rank, and return the requests that it finished.

        Requests that were aborted or preempted since the plan was made are left alone.
        """
        self._residents.release_copied(plan.step)
        finished: list[Request] = []
        leaders: list[Request] = []
        for rank_plan, result in zip(plan.ranks, results, strict=True):
            sampled = result.sampled
            num_rows = len(sampled.tokens)
            assert num_rows == rank_plan.num_rows, f"{num_rows} rows for a plan of {rank_plan.num_rows}"
            kv_cache = self._residents.kv_caches[rank_plan.rank]
            tokens = sampled.tokens.tolist()
            for entry in rank_plan.entries:
                request = self.requests.get(entry.request_id)
                if request is None or request.in_flight_step != plan.step:
                    continue
                request.in_flight_step = -1
                request.num_computed_tokens = entry.start + entry.num_tokens
                kv_cache.publish(request)
                if request.group_id is not None and self._has_computed_shared(request):
                    leaders.append(request)
                if entry.num_rows and self._record(request, plan, entry, sampled, tokens[entry.first_row]):
                    finished.append(request)
            self._meter.count_results(rank_plan.num_tokens, rank_plan.num_rows)
        for leader in reversed(leaders):  # each enters at the front: the last one first keeps the order of prompts
            self._queue.release_group(leader)
        return finished

    def _record(self, request: Request, plan: StepPlan, entry: PlanEntry, sampled: SampleResult, token: int) -> bool:
        """Take an entry's rows, of which `token` is the first one's; whether they end the request."""
        decodes = entry.num_tokens == 1 and request.kind == "generate" and entry.start >= request.num_prompt_tokens
        origin = Origin(
            plan.policy_version,
            plan.step,
            DECODE if decodes else PREFILL,
            request.num_matched_tokens,
            request.rank,
        )
        request.record(sampled, entry.first_row, entry.num_rows, origin)
        end = find_end(request, token, self._stop_checker)
        if end is None:
            return False
        self._residents.stop(request)
        self._finish(request, end)
        return True

    def metrics(self) -> dict[str, int]:
        """Gauges and counters since the start; refusals are counted per step and cause."""
        return self._meter.metrics(steps=self._step, waiting=self.num_waiting)

    def rank_metrics(self) -> list[dict[str, int]]:
        """Gauges of each rank: the requests that run there and its KV blocks."""
        return self._meter.rank_metrics()

    def check_integrity(self) -> None:
        """Assert on each rank that no KV block is lost, held twice or held by nobody."""
        self._residents.check_integrity()

    # -- carrying out a decision -------------------------------------------------------------------
    def _commit(self, decision: Decision) -> StepPlan | Hold:
        for refusal, request_id in decision.refusals:
            self._meter.count_refusal(refusal)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("step %d: refused for %s: %s", self._step + 1, refusal.name, request_id or "all that wait")
        if decision.policy is None:
            assert decision.hold_until is not None, "unfinished requests, but none can run"
            return Hold(decision.hold_until)
        self._step += 1
        self._last_turn[decision.policy] = self._step
        self._change_residents(decision)
        for policy in decision.left:
            self._queue.note_tried(policy)
        for rank in decision.ranks:
            for request in rank.members:
                request.in_flight_step = self._step
        weights = self._weights[decision.policy]
        return StepPlan(
            step=self._step,
            policy=decision.policy,
            policy_version=weights.version,
            weight_epoch=weights.epoch,
            ranks=tuple(
                RankPlan(number, tuple(rank.entries), rank.num_tokens, rank.num_rows)
                for number, rank in enumerate(decision.ranks)
            ),
            handovers=self._residents.handovers(self._step),
            preempted=tuple(request.request_id for rank in decision.ranks for request in rank.preempted),
        )

    def _change_residents(self, decision: Decision) -> None:
        self._residents.share(decision)
        for number, rank in enumerate(decision.ranks):
            for request in rank.preempted:
                self._preempt(request)
            self._residents.grow(number, rank.grown)
        for move in decision.moves:
            self._residents.move(move)
            self._meter.count_handover()
        for outcome in decision.outcomes:
            if isinstance(outcome, Join):
                self._start_running(outcome)
            else:
                self._queue.note_blocked(outcome.request)

    def _start_running(self, join: Join) -> None:
        request = join.request
        self._residents.start(join)
        self._queue.remove(request)
        self._queue.note_joined(request)
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self._meter.count_admission(request.num_computed_tokens)

    def _preempt(self, request: Request) -> None:
        self._residents.stop(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._queue.add_front(request)
        self._meter.count_preemption()

    def _shareable_tokens(self, request: Request) -> int:
        return self._residents.kv_caches[0].shareable_tokens(request)

    def _has_computed_shared(self, request: Request) -> bool:
        return self._queue.leads(request) and request.num_computed_tokens >= self._shareable_tokens(request)

    def _finish(self, request: Request, end: End) -> None:
        request.finish(end.finish_reason, end.reason)
        del self.requests[request.request_id]
        self._meter.count_finish(end.finish_reason)
