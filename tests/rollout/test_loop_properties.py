"""Random interleavings of calls, aborts, pauses, updates, sleep and turns of conversations, on the real control plane.

Each request in flight ends exactly once, with the tokens of its versions; nobody waits for ever; nothing is left over.
Negative controls: the same machine trips over each planted fault, on a script that leads there and ends well without
it, and (slow) on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from loop_rig import LoopRig, check_tokens, outcome
from scheduling_rig import VOCAB

from zerokl.rollout.control import Call, Exclusive
from zerokl.rollout.errors import EngineAsleepError, EngineClosedError, PauseLiftedError, StaleRequestError
from zerokl.rollout.in_flight import InFlightOptions
from zerokl.rollout.loop_inbox import LoopInbox
from zerokl.rollout.pause import GenerationPause
from zerokl.rollout.request import Request
from zerokl.rollout.running_calls import RunningCalls
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler

SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
HUNT = settings(SETTINGS, max_examples=2_000, phases=[Phase.generate], report_multiple_bugs=False)
OPTIONS = st.sampled_from(
    [
        InFlightOptions(),
        InFlightOptions(mode="abort"),
        InFlightOptions(mode="keep"),
        InFlightOptions(mode="keep", kv="keep"),
        InFlightOptions(mode="keep", max_staleness=0),
        InFlightOptions(mode="keep", max_staleness=1, on_stale="refuse"),
    ]
)
PICKS = st.integers(0, 1000)


class ControlPlane(RuleBasedStateMachine):
    """Callers come in any order; the loop turns in between, or does not."""

    @initialize(num_ranks=st.integers(1, 2), overlaps=st.booleans())
    def start(self, num_ranks: int, overlaps: bool) -> None:
        self.rig = LoopRig(num_ranks, overlaps=overlaps and num_ranks == 1)
        self.calls: list[Call] = []
        self.ended: list[Request] = []
        self.change: Exclusive | None = None
        self.pauses: list[Any] = []
        self.resumes: list[Any] = []
        self.aborts: list[Any] = []
        self.holding: Any = None
        self.frozen_at: int | None = None

    # -- calls --------------------------------------------------------------------------------------------------------
    @rule(length=st.integers(2, 90), samples=st.integers(1, 3), max_tokens=st.integers(1, 24), rated=st.booleans())
    def ask(self, length: int, samples: int, max_tokens: int, rated: bool) -> None:
        tokens = np.arange(length) * (len(self.calls) % 2 + 1) % VOCAB
        self._submit(tokens, samples, max_tokens, rated=rated)

    @precondition(lambda self: self.ended)
    @rule(pick=PICKS, answer=st.integers(1, 5), max_tokens=st.integers(1, 8))
    def take_the_next_turn(self, pick: int, answer: int, max_tokens: int) -> None:
        tokens = self.ended[pick % len(self.ended)].token_ids
        if len(tokens) + answer + max_tokens <= 100:
            self._submit(np.concatenate([tokens, np.arange(answer)]), 1, max_tokens, rated=False)

    def _submit(self, tokens: Any, samples: int, max_tokens: int, *, rated: bool) -> None:
        name = f"call-{len(self.calls)}"
        params = SamplingParams(max_tokens=max_tokens)
        if rated:
            group = [Request.score(f"{name}/0", tokens, score_start=1, sampling_params=params)]
        else:
            group = [
                Request.generate(
                    f"{name}/{index}",
                    tokens,
                    params,
                    seed=len(self.calls),
                    sample_index=index,
                    group_id=name if samples > 1 else None,
                )
                for index in range(samples)
            ]
        try:
            self.calls.append(self.rig.submit({name: group}))
        except EngineAsleepError:
            assert self.rig.sleeping.parts

    @rule(pick=PICKS, everything=st.booleans())
    def abort(self, pick: int, everything: bool) -> None:
        names = None if everything else [name for call in self.calls[pick % 4 :: 4] for name in call.groups]
        self.aborts.append(self.rig.loop.abort(names))

    @rule(is_near=st.booleans())
    def announce(self, is_near: bool) -> None:
        """As an update does that stages beside the steps; what it announces may come late, or never."""
        self.rig.loop.awaited_boundary.is_near = is_near

    # -- pauses -------------------------------------------------------------------------------------------------------
    @rule(mode=st.sampled_from(["wait", "abort", "keep"]), gives_up=st.sampled_from([False] * 4 + [True]))
    def pause(self, mode: Any, gives_up: bool) -> None:
        future = self.rig.loop.pause(mode)
        self.pauses.append(future)
        self.holding, self.frozen_at = future, None
        if gives_up:
            future.cancel()

    @rule()
    def resume(self) -> None:
        self.resumes.append(self.rig.loop.resume())
        self.holding, self.frozen_at = None, None

    # -- changes: one at a time, as the engine's lock has it ----------------------------------------------------------
    @property
    def nobody_changes(self) -> bool:
        return self.change is None or self.change.future.done()

    @precondition(lambda self: self.nobody_changes and "weights" not in self.rig.sleeping.parts)
    @rule(options=OPTIONS)
    def update(self, options: InFlightOptions) -> None:
        self.change = self.rig.update(options)

    @precondition(lambda self: self.nobody_changes)
    @rule(tags=st.sampled_from([["weights"], ["kv_cache"], ["weights", "kv_cache"]]), back=st.booleans())
    def sleep_or_wake(self, tags: list[str], back: bool) -> None:
        self.change = self.rig.bring_back(tags) if back else self.rig.put_away(tags, 1)

    @precondition(lambda self: not self.nobody_changes)
    @rule()
    def call_the_change_off(self) -> None:
        self.change.future.cancel()  # type: ignore[union-attr]

    # -- time ---------------------------------------------------------------------------------------------------------
    @rule(turns=st.integers(1, 12), seconds=st.sampled_from([0.0, 0.0, 60.0]))
    def let_time_pass(self, turns: int, seconds: float) -> None:
        self.rig.now += seconds
        for _ in range(turns):
            if not self.rig.turn():
                break
            self._look()

    # -- what chance alone seldom brings together ---------------------------------------------------------------------
    @rule()
    def begin_a_score_of_several_steps(self) -> None:
        self.ask(length=90, samples=1, max_tokens=1, rated=True)
        self.let_a_step_pass()

    @precondition(lambda self: self.nobody_changes)
    @rule()
    def doze(self) -> None:
        self.sleep_or_wake(["kv_cache"], back=False)
        self.let_time_pass(12, 0.0)
        if self.nobody_changes:
            self.sleep_or_wake(["kv_cache"], back=True)
            self.let_a_step_pass()

    @rule()
    def let_a_step_pass(self) -> None:
        self.let_time_pass(1, 0.0)

    @rule()
    def let_two_steps_pass(self) -> None:
        self.let_time_pass(2, 60.0)

    def _look(self) -> None:
        for call in self.calls:
            if call.future.done() and call.future.exception() is None:
                self.ended += [one for one in call.requests if one.kind == "generate" and one not in self.ended]
        if self.frozen_at is not None:
            assert self.rig.ranks.num_steps == self.frozen_at, "a step in a pause that holds"
        elif self.holding is not None and self.holding.done() and not self.holding.cancelled():
            self.frozen_at = self.rig.ranks.num_steps

    @invariant()
    def what_is_resolved_has_ended(self) -> None:
        for call in getattr(self, "calls", ()):
            if call.future.done() and call.future.exception() is None:
                assert all(request.is_finished for request in call.requests)

    # -- the end ------------------------------------------------------------------------------------------------------
    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        rig.run()
        self.resume()
        rig.run()
        if self.nobody_changes:
            self.change = rig.bring_back(["weights", "kv_cache"])
        rig.run()
        for call in self.calls:
            error = outcome(call.future)
            assert error is None or isinstance(error, (EngineAsleepError, StaleRequestError)), error
            for request in call.requests if error is None else ():
                assert request.is_finished
                assert request.kind == "generate" or len(set(request.policy_versions.tolist())) <= 1
                if not request.num_kept_updates:
                    check_tokens(request)
        for future in self.pauses:
            assert isinstance(outcome(future), (PauseLiftedError, type(None)))
        assert all(outcome(future) is None for future in self.resumes)
        assert all(outcome(future) >= 0 for future in self.aborts)
        assert self.change is None or self.change.future.done(), "a change that never comes"
        rig.check_rest()


class ClosedInTheMiddle(ControlPlane):
    """The engine ends wherever it is: everybody hears of it."""

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.loop._end("closed", None)
        futures = [call.future for call in self.calls] + self.pauses + self.aborts + self.resumes
        for future in futures if self.change is None else [*futures, self.change.future]:
            error = outcome(future)
            known = (EngineClosedError, EngineAsleepError, StaleRequestError, PauseLiftedError, ValueError)
            assert not isinstance(error, BaseException) or isinstance(error, known)


@pytest.mark.parametrize("machine", [ControlPlane, ClosedInTheMiddle])
def test_every_interleaving_ends_well(machine: type[ControlPlane]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.slow
def test_many_more_interleavings_end_well() -> None:
    run_state_machine_as_test(ControlPlane, settings=settings(SETTINGS, max_examples=3_000, stateful_step_count=80))


# -- planted faults ---------------------------------------------------------------------------------------------------
def an_abort_forgets_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort_group(self: RunningCalls, group: list[Request]) -> int:
        return sum(self._scheduler.abort(request.request_id) is not None for request in group)

    monkeypatch.setattr(RunningCalls, "_abort_group", abort_group)


def an_aborted_call_stays_in_the_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_aborted(self: LoopInbox) -> list[Call]:
        return [item for item in self._items if isinstance(item, Call) and len(item.aborted) == len(item.groups)]

    monkeypatch.setattr(LoopInbox, "take_aborted", take_aborted)


def a_lifted_pause_forgets_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationPause, "lift", lambda self: setattr(self, "mode", None))


def a_pause_lets_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationPause, "settle", lambda self, num_unfinished: _SETTLE(self, 0))
    monkeypatch.setattr(GenerationPause, "is_frozen", property(lambda self: False))


def an_update_leaves_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_weights(self: Scheduler, name: str, *, epoch: int, version: int, keep_running: bool = False) -> None:
        _SET_WEIGHTS(self, name, epoch=0, version=version, keep_running=keep_running)

    monkeypatch.setattr(Scheduler, "set_weights", set_weights)


def a_score_goes_on_under_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "restart", lambda self: None)


def sleep_leaves_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "reset_prefix_cache", lambda self: None)


def a_refused_call_keeps_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopInbox, "release_ids", lambda self, call: None)


_SETTLE = GenerationPause.settle
_SET_WEIGHTS = Scheduler.set_weights
WAIT, KEEP = InFlightOptions(), InFlightOptions(mode="keep")


def ask_and_finish(machine: ControlPlane) -> None:
    machine.ask(length=40, samples=1, max_tokens=4, rated=False)
    machine.let_time_pass(12, 0.0)


def ask_again(machine: ControlPlane) -> None:
    """Of two calls in a row one has the prompt of the first call."""
    ask_and_finish(machine)
    ask_and_finish(machine)


def decode(machine: ControlPlane) -> None:
    machine.ask(length=8, samples=1, max_tokens=24, rated=False)
    machine.let_two_steps_pass()


Step = Callable[[ControlPlane], None]
SCRIPTS: dict[Callable[[pytest.MonkeyPatch], None], list[Step]] = {
    an_abort_forgets_to_answer: [decode, lambda machine: machine.abort(0, True)],
    an_aborted_call_stays_in_the_inbox: [
        lambda machine: machine.ask(length=8, samples=1, max_tokens=4, rated=False),
        lambda machine: machine.abort(0, True),
    ],
    a_lifted_pause_forgets_who_waits: [decode, lambda machine: machine.pause("wait", False), ControlPlane.resume],
    a_pause_lets_steps_run: [
        decode,
        lambda machine: machine.pause("keep", False),
        lambda machine: machine.let_time_pass(4, 0.0),
    ],
    an_update_leaves_keys_and_values: [ask_and_finish, lambda machine: machine.update(WAIT), ask_again],
    a_score_goes_on_under_new_weights: [
        ControlPlane.begin_a_score_of_several_steps,
        lambda machine: machine.update(KEEP),
    ],
    sleep_leaves_the_prefix_cache: [ask_and_finish, ControlPlane.doze, ask_again],
    a_refused_call_keeps_its_ids: [ask_and_finish],
}


def play(script: list[Step], overlaps: bool) -> None:
    machine = ControlPlane()
    machine.start(num_ranks=1, overlaps=overlaps)
    for step in script:
        step(machine)
        machine.what_is_resolved_has_ended()
    machine.teardown()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("plant", SCRIPTS)
def test_negative_control_a_planted_fault_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(SCRIPTS[plant], overlaps)
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever the machine trips over first
        play(SCRIPTS[plant], overlaps)


@pytest.mark.slow
@pytest.mark.parametrize("plant", SCRIPTS)
def test_negative_control_chance_finds_a_planted_fault(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever the machine trips over first
        run_state_machine_as_test(ControlPlane, settings=HUNT)
