"""Carries out what each step is to compute, and takes its results. One thread owns it; it has no lock and no device.

What a step computes is decided in `zerokl.rollout.planning`; here are the requests, from `add` to their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from zerokl.rollout.completion import End, StopChecker
from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.planning import plan as plan_step
from zerokl.rollout.progress import Progress
from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.residents import Residents
from zerokl.rollout.result_intake import ResultIntake
from zerokl.rollout.run_ahead import carried_first
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.scheduler_meter import SchedulerMeter
from zerokl.rollout.snapshot import Decision, Snapshot, WeightSet
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_plan import Hold, RankPlan, StepPlan
from zerokl.rollout.transitions import Transitions
from zerokl.rollout.waiting_queue import WaitingQueue
from zerokl.rollout.weight_turns import WeightTurns


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`kv_caches`: one per rank, alike. `clock` gives seconds, as `add` takes them: it is for the meter alone.

        Raises ValueError where `config.roles` names another number of ranks.
        """
        if not kv_caches or (config.roles is not None and len(config.roles) != len(kv_caches)):
            raise ValueError(f"roles must name each of the {len(kv_caches)} ranks once, got {config.roles!r}")
        self.requests: dict[str, Request] = {}
        """All unfinished requests by id; read only for others."""
        self._config = config
        self._queue = WaitingQueue(config.max_overtakes)
        self._residents = Residents(kv_caches)
        self._progress = Progress(self._residents, self._queue)
        self._weights = WeightTurns()
        self._step = 0
        self._awaited_step = 0
        """The step whose results are to come; 0 if there is none."""
        self._num_arrivals = 0
        self.meter = SchedulerMeter(self._residents, clock)
        """Any thread may read it."""
        self._transitions = Transitions(self._residents, self._queue, self.meter)
        self._intake = ResultIntake(self._residents, self._progress, self.meter, stop_checker)

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
        self._weights.declare(name, WeightSet(epoch, version))

    def drop_weights(self, name: str) -> None:
        """Forget a weight set. Raises ValueError where it is unknown or has unfinished requests."""
        if self.has_unfinished(name):
            raise ValueError(f"weight set {name!r} must not be dropped while it has unfinished requests")
        self._weights.drop(name)

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
        if request.policy not in self._weights.sets:
            raise ValueError(f"policy must be one of {sorted(self._weights.sets)}, got {request.policy!r}")
        assert request.status is RequestStatus.WAITING and request.arrival < 0, f"{request.request_id} was added before"
        request.arrival = self._num_arrivals
        request.arrival_time = now
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        self._queue.add(request, shareable_tokens=self._shareable_tokens(request))
        self.meter.count_received(request)

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
        self._transitions.preempt(request)
        return True

    def preempt_all(self) -> None:
        """Preempt every running request; their order is kept."""
        for request in reversed(self._residents.in_order()):
            self._transitions.preempt(request)

    def lose_ranks(self, ranks: Collection[int]) -> None:
        """The KV pools of these ranks are empty now: preempt what runs there, or was to come from there.

        Between a step that failed and the next plan, or between any other two.
        """
        for request in reversed(self._residents.with_blocks_on(ranks)):
            self._transitions.preempt(request)
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
        decision = plan_step(self._snapshot(), self._config, now)
        if decision.policy is None:
            assert decision.hold_until is not None, "unfinished requests, but none can run"
            self.meter.count_refusals(decision, self.requests, self._queue.policies(), self._step + 1)
            return Hold(decision.hold_until)
        plan = self._commit(decision, decision.policy)
        self._awaited_step = plan.step
        return plan

    def plan_ahead(self, plan: StepPlan, now: float) -> StepPlan | None:
        """The step after the latest one, before its results are in: as if all its requests went on but those that end
        by length. Nobody is preempted for it; `now` is as for `plan`. Ranks that hand requests over have none.

        None where the results are needed first. Whoever calls it gives `update` the results of `plan` next, and the
        plan returned as `ahead`, and changes nothing else before.
        """
        if set(self._config.roles or ()) - {"mixed"}:
            return None
        self._progress.foresee(plan, self.requests)
        decision = plan_step(self._snapshot(), self._config, now)
        if decision.policy is None or any(rank.preempted for rank in decision.ranks):
            return None
        for rank in decision.ranks:
            carried_first(rank.entries, self.requests)
        return self._commit(decision, decision.policy)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            running=self._residents.running,
            kv_caches=self._residents.kv_caches,
            queue=self._queue,
            weights=self._weights.sets,
            turns=self._weights.in_turn([*self._residents.policies(), *self._queue.policies()]),
        )

    def update(self, plan: StepPlan, results: Sequence[StepResult], ahead: StepPlan | None = None) -> list[Request]:
        """Apply a step's results, one per rank, and return the requests that it finished.

        Requests that were aborted or preempted since the plan was made are left alone; a plan that is not the latest
        changes nothing. `ahead` is what `plan_ahead` has made of this plan: its results are to come next.
        """
        if plan.step != self._awaited_step:
            return []
        self._residents.release_copied(plan.step)
        left = self._residents.left if ahead is None else self._residents.left | self._residents.left_before
        ended = self._intake.take(plan, results, left, self.requests)
        for request, end in ended:
            self._residents.stop(request)
            self._finish(request, end)
        self._awaited_step = 0 if ahead is None else ahead.step
        self._progress.release_groups()
        return [request for request, _ in ended]

    def metrics(self) -> dict[str, int]:
        """Gauges and counters since the start; refusals are counted per step and cause."""
        return self.meter.metrics(steps=self._step, waiting=self.num_waiting)

    def rank_metrics(self) -> list[dict[str, int]]:
        """Of each rank the requests that run there, its KV blocks, and tokens since the start."""
        return self.meter.rank_metrics()

    def check_integrity(self) -> None:
        """Assert on each rank that no KV block is lost, held twice or held by nobody."""
        self._residents.check_integrity()

    # -- carrying out a decision -------------------------------------------------------------------
    def _commit(self, decision: Decision, policy: str) -> StepPlan:
        """`policy`: the decision's."""
        self._step += 1
        self._transitions.carry_out(decision)
        self.meter.count_refusals(decision, self.requests, self._queue.policies(), self._step)
        for tried in decision.left:
            self._queue.note_tried(tried)
        self._residents.note_planned()
        weights = self._weights.take(policy, self._step)
        return StepPlan(
            step=self._step,
            policy=policy,
            policy_version=weights.version,
            weight_epoch=weights.epoch,
            ranks=tuple(
                RankPlan(number, tuple(rank.entries), rank.num_tokens, rank.num_rows)
                for number, rank in enumerate(decision.ranks)
            ),
            handovers=self._residents.handovers(self._step),
            preempted=tuple(request.request_id for rank in decision.ranks for request in rank.preempted),
        )

    def _shareable_tokens(self, request: Request) -> int:
        return self._residents.kv_caches[0].shareable_tokens(request)

    def _finish(self, request: Request, end: End) -> None:
        request.finish(end.finish_reason, end.reason)
        del self.requests[request.request_id]
        self.meter.count_finish(request, end.finish_reason)
