"""Which kinds of steps are recorded, and which graphs go when there are too many."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerokl.rollout.recorded_steps import RecordedSteps


class Log:
    """What was done for each step that was launched, and the kinds that graphs were made of."""

    def __init__(self, most: int = 2, most_known: int = 100) -> None:
        self.done: list[str] = []
        self.steps = RecordedSteps(self._record, most, most_known)
        self._kind = 0

    def launch(self, *kinds: int, place: int = 1) -> list[str]:
        """What each of these took: "launched", "recorded" or "again", and of which kind."""
        self.done.clear()
        for self._kind in kinds:
            before = len(self.done)
            self.steps.launch(place, self._kind, lambda: self.done.append(f"launched {self._kind}"))
            assert len(self.done) == before + 1, "every step is launched once"
        return list(self.done)

    def _record(self, launches: Callable[[], None]) -> Any:
        made, kind = iter(["recorded"]), self._kind
        return SimpleNamespace(launch=lambda: self.done.append(f"{next(made, 'again')} {kind}"))


def test_a_kind_is_recorded_when_it_comes_again() -> None:
    assert Log().launch(7, 7, 7, 7) == ["launched 7", "recorded 7", "again 7", "again 7"]


def test_what_came_longest_ago_makes_way() -> None:
    log = Log(most=2)
    assert log.launch(1, 2, 3, 1, 2, 1, 3) == [
        *("launched 1", "launched 2", "launched 3", "recorded 1", "recorded 2", "again 1", "recorded 3")
    ]
    assert log.steps.num_graphs == 2
    assert log.launch(1, 3, 2) == ["again 1", "again 3", "recorded 2"], "2 had come before 1 and was let go"


def test_places_have_graphs_of_their_own() -> None:
    log = Log()
    assert log.launch(7, 7) == ["launched 7", "recorded 7"]
    assert log.launch(7, place=2) == ["recorded 7"], "the kernels are known by then"
    assert set(log.steps.places) == {1, 2}
    log.steps.forget({1})
    assert log.launch(7) == ["recorded 7"] and log.launch(7, place=2) == ["again 7"]


def test_after_all_was_forgotten_kernels_run_before_they_are_recorded() -> None:
    log = Log()
    log.launch(7, 7)
    log.steps.clear()
    assert log.steps.num_graphs == 0 and log.launch(7, 7) == ["launched 7", "recorded 7"]


@pytest.mark.parametrize("place", [1, 2])
@given(kinds=st.lists(st.integers(0, 6), max_size=60), most=st.integers(1, 4), most_known=st.integers(1, 5))
def test_memory_is_bounded_and_each_step_is_one_of_its_kind(
    place: int, kinds: list[int], most: int, most_known: int
) -> None:
    log = Log(most, most_known)
    assert [int(done.split()[1]) for done in log.launch(*kinds, place=place)] == kinds
    assert log.steps.num_graphs <= most
