"""An engine loop without its thread: turned by hand, on a clock that moves by hand, over the hash model of each rank.

Everything of the engine's control plane is real (inbox, calls, pause, updates, sleep, scheduler, KV caches); ranks are
not. `LoopRig.run` says where the thread would have slept for ever although somebody waits: that is a hang.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from late_device import LateDevice, begin_on
from scheduling_rig import MASK, FakeModel, draw, figure, mix

from zerokl.rollout.control import POLICY, Call, Exclusive, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.in_flight import InFlightOptions, InFlightRequests
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.routing_store import NO_ROUTING
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.sleep import Sleep
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.stop import StopStrings
from zerokl.rollout.weight_source import TensorWeights

BLOCKS, BLOCK = 20, 8
WINDOW = 100.0
"""Seconds of the collection window."""
_TURNS = 3_000


class HandRanks:
    """Hash models whose weights are a version's number; memory that is put away loses its content."""

    def __init__(self, count: int) -> None:
        self.models = [FakeModel(BLOCKS, BLOCK, {POLICY: 0}) for _ in range(count)]
        self.num_steps = 0
        self.staged: int | None = None
        self.away: set[str] = set()

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        assert not self.away, f"a step while {self.away} are away"
        self.num_steps += 1
        pairs = zip(self.models, orders, strict=True)
        return [StepResult(sampled=model.execute(order.inputs)) for model, order in pairs]

    def stage_weights(self, source: Any, version: int) -> None:
        assert self.staged is None, "two versions staged"
        self.staged = version

    def commit_weights(self) -> None:
        assert self.staged is not None
        for model in self.models:
            model.weights = {POLICY: self.staged}
        self.staged = None

    def discard_staged(self) -> None:
        self.staged = None

    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None) -> None:
        self.away |= set(tags)
        for model in self.models if "kv_cache" in tags else ():
            model.pool = [[mix(block, 99) for _ in range(BLOCK)] for block in range(BLOCKS)]

    def wake_up(self, tags: Collection[str]) -> None:
        self.away -= set(tags)

    def close(self) -> None:
        pass


class LoopRig:
    def __init__(self, num_ranks: int = 2, overlaps: bool = False) -> None:
        """`overlaps`: steps of the one rank are launched before the results of the last one, and run when asked for."""
        self.now = 0.0
        self.ranks = HandRanks(num_ranks)
        ranks: Any = self.ranks
        kv_caches = [KVCacheManager(BLOCKS, BLOCK) for _ in range(num_ranks)]
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, batched_token_timeout=WINDOW)
        self.scheduler = Scheduler(config, kv_caches)
        self.kv_caches = kv_caches
        self.weights = WeightSets(ranks, self.scheduler)
        self.sleeping = Sleep(ranks, self.weights, self.scheduler, NO_ROUTING)
        self.weights.load_first(TensorWeights(tensors={}))
        stop = StopStrings(None)
        self.device = LateDevice(lambda order: self.ranks.execute([order])[0], late=True) if overlaps else None
        self.loop = EngineLoop(
            self.scheduler,
            ranks,
            self.weights,
            stop,
            BLOCK,
            self.sleeping.check_awake,
            clock=lambda: self.now,
            begin_step=None if self.device is None else begin_on([self.device]),
        )
        self.in_flight = InFlightRequests(
            self.scheduler, kv_caches, stop, deliver=self.loop.deliver, refuse=self.loop.refuse
        )

    # -- what callers do ----------------------------------------------------------------------------------------------
    def submit(self, groups: dict[str, list[Request]]) -> Call:
        call = Call(groups)
        self.loop.submit(call)
        return call

    def update(self, options: InFlightOptions) -> Exclusive:
        """Stage the next version and hand in its commit, as `WeightUpdates` does."""
        if self.ranks.staged is not None:  # by an update that was called off or refused
            discarded = self.loop.at_boundary(self.weights.discard)
            assert self.turn() and discarded.done()
        self.weights.stage(TensorWeights(tensors={}), None)
        return self._change(partial(self._commit, options), waits=options.mode == "wait")

    def put_away(self, tags: list[str], level: int) -> Exclusive:
        return self._change(partial(self.sleeping.put_away, tags, level, None))

    def bring_back(self, tags: list[str]) -> Exclusive:
        return self._change(lambda: None, prepare=partial(self.sleeping.bring_back, tags))

    def _change(self, apply: Callable[[], Any], **options: Any) -> Exclusive:
        change = Exclusive(apply, **options)
        self.loop.submit(change)
        return change

    def _commit(self, options: InFlightOptions) -> int:
        self.in_flight.make_way(POLICY, self.weights.staged_version, options)
        version = self.weights.commit(keep_running=options.keeps_kv)
        self.sleeping.weights_came()
        self.ranks.away.discard("weights")
        return version

    # -- time ---------------------------------------------------------------------------------------------------------
    def turn(self) -> bool:
        """What the thread would do next; False where it would sleep."""
        loop = self.loop
        if not (loop._inbox.num_urgent or loop._has_work()):
            return False
        assert loop._wait_for_work()
        loop._turn()
        self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        """Until the thread would sleep with no deadline; a collection window is waited for."""
        for _ in range(_TURNS):
            if not self.turn():
                if self.loop._hold is None:
                    return
                self.now = max(self.now, self.loop._hold.until)
        raise AssertionError(f"no rest after {_TURNS} turns: {self.scheduler.num_unfinished} requests are unfinished")

    def check_rest(self) -> None:
        """Assert that nothing is left of any call."""
        assert self.scheduler.num_unfinished == 0 == len(self.loop._inbox)
        assert not self.loop._inbox._open and not self.loop._calls._calls, "ids of calls that are over"
        assert all(cache.num_free_blocks == BLOCKS for cache in self.kv_caches), "blocks got lost"


def check_tokens(request: Request) -> None:
    """Each token is the one that a fresh engine with the version's weights draws after those before it."""
    tokens, start = request.token_ids.tolist(), request.num_prompt_tokens
    for index, version in enumerate(request.policy_versions.tolist()):
        past, chain = 0, 0
        for position, token in enumerate(tokens[: start + index]):
            chain = mix(chain, token, position, version)
            past += chain
        past = mix(past & MASK, 0)
        drawn = draw(past, (), request.seed, request.sample_index, start + index)
        token = tokens[start + index]
        assert request.kind == "score" or token == drawn, f"{request.request_id}: token {index}"
        assert request.logprobs[index] == figure(past, token), f"{request.request_id}: logprob {index}"


def outcome(future: Future[Any]) -> Any:
    """What it resolved to, an error as well."""
    assert future.done(), "somebody waits for ever"
    return None if future.cancelled() else future.exception() or future.result()
