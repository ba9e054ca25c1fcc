"""When a rank counts as lost: the pure rules, under a clock that the test moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.supervision import START_SECONDS, Fault, Supervision

TICK = 0.25


class Watched:
    """Two ranks, looked at every tick; each is heard of in every tick unless it is named among the silent."""

    def __init__(self, **options: float) -> None:
        given = {"heartbeat_timeout": 1.5, "step_timeout_base": 10.0, "step_timeout_per_token": 0.5} | options
        self.rules = Supervision(2, tick=TICK, **given)
        self.now = 100.0
        for rank in range(2):
            self.rules.started(rank, self.now)

    def pass_time(
        self, seconds: float, silent: tuple[int, ...] = (), unanswered: tuple[int, ...] = ()
    ) -> dict[int, Fault]:
        faults: dict[int, Fault] = {}
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            for rank in range(2):
                if rank not in silent:
                    self.rules.heard(rank, self.now)
            faults |= self.rules.look(self.now, unanswered)
        return faults


def test_a_rank_that_falls_silent_is_lost_in_time_and_said_once() -> None:
    watched = Watched()
    assert watched.pass_time(60) == {}
    assert watched.pass_time(1.25, silent=(1,)) == {}
    assert watched.pass_time(0.5, silent=(1,)) == {
        1: Fault(kind="stall", text="it was stopped, or stuck: it gave no sign of life")
    }
    assert watched.pass_time(60, silent=(1,)) == {}
    watched.rules.started(1, watched.now)
    assert watched.pass_time(60) == {}


def test_a_new_process_has_longer_until_it_is_first_heard_of() -> None:
    watched = Watched()
    assert watched.pass_time(START_SECONDS - TICK, silent=(0,)) == {}
    faults = watched.pass_time(TICK, silent=(0,))
    assert {rank: fault.kind for rank, fault in faults.items()} == {0: "stall"}


def test_a_new_process_that_is_stopped_has_not() -> None:
    watched = Watched()
    for _ in range(6):
        assert watched.pass_time(TICK, silent=(0,)) == {}
        watched.rules.stopped(0, watched.now)
    assert list(watched.pass_time(2 * TICK, silent=(0,))) == [0]


def test_one_that_has_ended_is_not_missed() -> None:
    watched = Watched()
    watched.pass_time(1)
    watched.rules.ended(0)
    assert watched.pass_time(60, silent=(0,)) == {}


@pytest.mark.parametrize(("num_tokens", "seconds"), [(0, 10.0), (7, 13.5)])
def test_a_step_may_take_longer_the_more_tokens_it_has(num_tokens: int, seconds: float) -> None:
    watched = Watched()
    watched.pass_time(1)
    watched.rules.begin_step(num_tokens, watched.now)
    assert watched.pass_time(seconds - TICK, unanswered=(1,)) == {}
    assert watched.pass_time(TICK, unanswered=(1,)) == {
        1: Fault(kind="step_timeout", text=f"its step did not end within {seconds:g} s")
    }


def test_a_step_that_ends_in_time_is_forgotten() -> None:
    watched = Watched()
    watched.rules.begin_step(0, watched.now)
    assert watched.pass_time(9.5, unanswered=(0, 1)) == {}
    watched.rules.end_step()
    assert watched.pass_time(60, unanswered=(0, 1)) == {}


@given(away=st.floats(3 * TICK, 1e6))
def test_time_in_which_the_watcher_did_not_run_is_held_against_nobody(away: float) -> None:
    """It was stopped, with or without the ranks: they have as long afterwards as they had left before."""
    watched = Watched()
    watched.pass_time(5)
    watched.rules.begin_step(0, watched.now)
    assert watched.pass_time(0.75, silent=(0, 1), unanswered=(0, 1)) == {}
    watched.now += away
    assert watched.rules.look(watched.now, (0, 1)) == {}
    assert watched.pass_time(0.25, silent=(0,)) == {}
    assert list(watched.pass_time(1.0, silent=(0,))) == [0]
    assert watched.pass_time(7.0, unanswered=(1,)) == {}
    assert list(watched.pass_time(1.5, unanswered=(1,))) == [1]


@given(
    delays=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=60),
    timeout=st.floats(1.26, 5.0),
)
def test_who_is_heard_of_often_enough_is_never_lost(delays: list[float], timeout: float) -> None:
    rules = Supervision(1, heartbeat_timeout=timeout, step_timeout_base=1, step_timeout_per_token=0, tick=TICK)
    now = due = 0.0
    rules.started(0, now)
    for delay in delays:
        now += TICK
        if now >= due:
            rules.heard(0, now)
            due = now + delay
        assert rules.look(now) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank_restarts": -1}, "max_rank_restarts must be an integer >= 0, got -1"),
        ({"rank_heartbeat_timeout": 0.1}, "rank_heartbeat_timeout must be seconds >= 0.5, got 0.1"),
        ({"step_timeout_base": -1.0}, "step_timeout_base must be a number of seconds >= 0, got -1.0"),
        ({"step_timeout_per_token": math.nan}, "step_timeout_per_token must be a number of seconds >= 0, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **options)  # type: ignore[arg-type]
