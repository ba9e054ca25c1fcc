"""Updates that announce their commit: it waits for the step under way alone, and what was announced ends with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from late_device import LateDevice
from loop_rig import LoopRig, check_tokens
from tiny_engine import in_thread, tiny_options, tiny_tensors

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import Exclusive
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError, EngineFailedError, HookError, WorkerError
from zerokl.rollout.hooks import UpdateEvent
from zerokl.rollout.in_flight import InFlightOptions
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import DeviceWeights, TensorWeights, WeightSource
from zerokl.rollout.weight_updates import WeightUpdate
from zerokl.rollout.worker import LocalWorker

KEEP = InFlightOptions(mode="keep", kv="keep")


# -- the loop, by hand ------------------------------------------------------------------------------------------------
def requests() -> list[Request]:
    params = SamplingParams(max_tokens=24)
    return [
        Request.generate(f"{name}/0", np.arange(5 + name), params, seed=name, sample_index=0, group_id=None)
        for name in range(3)
    ]


@pytest.mark.parametrize("options", [KEEP, InFlightOptions(mode="keep"), InFlightOptions(mode="abort")])
@pytest.mark.parametrize("announced", [True, False])
def test_a_change_that_comes_meanwhile_waits_for_one_step_if_it_was_announced(
    options: InFlightOptions, announced: bool
) -> None:
    """Not announced, it finds the next step launched. The device says what runs; tokens are those of their versions."""
    rig, members = LoopRig(1, overlaps=True), requests()
    assert rig.device is not None
    rig.submit({request.request_id: [request] for request in members})
    for _ in range(5):
        rig.turn()
    assert rig.device.num_ahead > 0
    if announced:
        rig.loop.awaited_boundary.announce()
    for _ in range(3):
        rig.turn()
    begun = rig.device.num_ahead
    change, steps_before = comes_in_the_next_step(rig, options)
    while not change:
        rig.turn()
    assert announced is (rig.device.num_ahead == begun)
    while not change[0].future.done():
        rig.turn()
    assert rig.ranks.num_steps - steps_before[0] == (1 if announced else 2)
    rig.loop.awaited_boundary.is_near = False
    rig.run()
    rig.check_rest()
    if not options.keeps_kv:
        for request in members:
            check_tokens(request)
    assert all(request.policy_versions.tolist()[0] == 0 for request in members)
    assert options.mode == "abort" or any(request.policy_versions.tolist()[-1] == 1 for request in members)
    assert options.mode == "abort" or rig.device.num_ahead > begun + 3, "it runs ahead again"


def comes_in_the_next_step(rig: LoopRig, options: InFlightOptions) -> tuple[list[Exclusive], list[int]]:
    """Have an update handed in while the device is at its next step; the change, and the steps before that, then."""
    made: list[Exclusive] = []
    steps: list[int] = []
    assert rig.device is not None
    execute = rig.device.execute

    def meanwhile(order: Any) -> Any:
        if not made:
            steps.append(rig.ranks.num_steps)
            made.append(rig.update(options))
        return execute(order)

    rig.device.execute = meanwhile
    return made, steps


# -- whole engines ----------------------------------------------------------------------------------------------------
class AnnouncingWorker(LocalWorker):
    """A step runs when its result is asked for. Weights that a device would have are arrays in place of a publication;
    that they are nearly there is said once they are.
    """

    device: LateDevice
    takes_drawn_tokens = True
    after: Callable[[], None] = staticmethod(lambda: None)
    """What happens in the thread that stages then."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        taken = AnnouncingWorker.takes_drawn_tokens
        self.device = AnnouncingWorker.device = LateDevice(self.execute, late=True, takes_drawn_tokens=taken)
        self.begin = self.device.begin

    def warm_up(self) -> None:
        """Nothing to make ready."""

    def stage_weights(self, source: WeightSource, version: int) -> None:
        if not isinstance(source, DeviceWeights):
            super().stage_weights(source, version)
            return
        arrays: Any = source.published
        super().stage_weights(TensorWeights(tensors=arrays), version)
        source.nearly_staged()
        AnnouncingWorker.after()


def overlapping_ranks(ranks: Any, config: EngineConfig) -> Any:
    return ranks if isinstance(ranks.worker, AnnouncingWorker) else None


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerokl.rollout.engine.overlapping_ranks", overlapping_ranks)


@pytest.fixture
def engine(tiny_model: Path, overlapped: None) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model), make_worker=AnnouncingWorker) as made:
        yield made


def update_of(engine: RolloutEngine, options: InFlightOptions = KEEP) -> WeightUpdate:
    arrays: Any = tiny_tensors()
    return engine._updates.make(DeviceWeights(published=arrays), None, options, allow_rewind=False)


def near(engine: RolloutEngine) -> bool:
    return engine._loop.awaited_boundary.is_near


def ahead_of(engine: RolloutEngine) -> float:
    """How many of the steps of a call are begun before the results of the one before."""
    device = AnnouncingWorker.device
    before = device.num_ahead, device.num_steps
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=30, ignore_eos=True))
    return (device.num_ahead - before[0]) / (device.num_steps - before[1])


PROMPTS = [np.arange(3 + 7 * number) % 200 for number in range(6)]


def bits(engine: RolloutEngine) -> list[Any]:
    params = SamplingParams(max_tokens=25, seed=5, n=2)
    calls = [in_thread(lambda prompt=prompt: engine.generate([prompt], params)) for prompt in PROMPTS]
    return [(r.token_ids.tolist(), r.logprobs.tolist()) for call in calls for r in call()]


@pytest.mark.parametrize("fault", [False, True])
def test_steps_one_by_one_and_ahead_in_turn_give_the_same_bits(
    tiny_model: Path, overlapped: None, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    """The control: a device that does not take over the tokens that the step before has drawn."""
    with RolloutEngine(tiny_options(tiny_model)) as plain:
        expected = bits(plain)
    monkeypatch.setattr(AnnouncingWorker, "takes_drawn_tokens", not fault)
    with RolloutEngine(tiny_options(tiny_model), make_worker=AnnouncingWorker) as engine:
        count, is_near = [0], []

        def step_done() -> None:  # nothing is staged: what is announced is all that changes
            count[0] += 1
            is_near.append(near(engine))
            engine._loop.awaited_boundary.is_near = count[0] // 3 % 2 == 0

        engine.watch_steps(step_done)
        assert (bits(engine) == expected) is not fault
        assert len(set(is_near)) == 2
        device = AnnouncingWorker.device
        assert 0.1 * device.num_steps < device.num_ahead < 0.9 * device.num_steps


def test_updates_beside_calls_announce_themselves_and_change_no_bit(engine: RolloutEngine, tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as plain:
        expected = bits(plain)
    announced, seen = [], []
    AnnouncingWorker.after = lambda: announced.append(near(engine))
    engine.watch_steps(lambda: seen.append((engine.get_weight_version(), near(engine))))
    try:
        for _ in range(3):
            calls = in_thread(lambda: bits(engine))
            versions = [update_of(engine, InFlightOptions(mode="keep")).run() for _ in range(6)]
            assert calls() == expected
            assert versions == sorted(versions) and not near(engine)
    finally:
        AnnouncingWorker.after = lambda: None
    assert announced == [True] * 18
    assert ahead_of(engine) > 0.8
    assert seen[-1] == (18, False)


def fail(error: type[BaseException]) -> Callable[..., Any]:
    def raises(*given: Any) -> None:
        raise error("off")

    return raises


def committed(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    engine.add_update_hook("after_commit", lambda event: inside.append(near(engine)))
    commit = engine._weights.commit

    def commit_and_look(**options: Any) -> int:
        inside.append(not near(engine))
        engine._loop.run_soon(lambda: inside.append(near(engine)))
        return commit(**options)

    patch.setattr(engine._weights, "commit", commit_and_look)
    assert update_of(engine).run() == 1
    engine.reset_prefix_cache()  # behind what was to run soon
    assert inside == [False, False, False], "it holds until the commit, and no longer"


def refused_by_staging(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnnouncingWorker, "after", fail(ValueError))
    with pytest.raises(ValueError, match="off"):
        update_of(engine).run()


def interrupted_while_staging(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnnouncingWorker, "after", fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        update_of(engine).run()


def interrupted_while_waiting(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as inner, pytest.raises(KeyboardInterrupt):
        inner.setattr(engine._loop, "submit", fail(KeyboardInterrupt))
        update_of(engine).run()


def given_up(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    update = update_of(engine)
    patch.setattr(AnnouncingWorker, "after", update.give_up)
    with pytest.raises(CancelledError):
        update.run()


def refused_by_the_commit(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as inner, pytest.raises(ValueError, match="off"):
        inner.setattr(engine._updates._in_flight, "make_way", fail(ValueError))
        update_of(engine).run()


def hooks_that_raise(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(event: UpdateEvent) -> None:
        seen.append(near(engine))
        raise ValueError("a hook's own")

    ends = [engine.add_update_hook("on_failure", look), engine.add_update_hook("after_commit", look)]
    refused_by_staging(engine, patch)
    patch.setattr(AnnouncingWorker, "after", lambda: None)
    update_of(engine).run()
    ends.append(engine.add_update_hook("before_update", fail(ValueError)))
    with pytest.raises(HookError):
        update_of(engine).run()
    assert seen == [False] * 3
    for end in ends:
        end()


def asleep_afterwards(engine: RolloutEngine, patch: pytest.MonkeyPatch) -> None:
    update_of(engine).run()
    engine.sleep()
    engine.wake_up()


ENDS = [
    committed,
    refused_by_staging,
    interrupted_while_staging,
    interrupted_while_waiting,
    given_up,
    refused_by_the_commit,
    hooks_that_raise,
    asleep_afterwards,
]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_steps_run_ahead_again_whatever_the_end_of_an_update(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, end: Callable[..., None], beside: bool
) -> None:
    if beside:
        call = engine.submit([[1, 2, 3]], SamplingParams(max_tokens=90, ignore_eos=True))
    end(engine, monkeypatch)
    assert not near(engine)
    if beside:
        call.future.result()
    assert ahead_of(engine) > 0.8
    monkeypatch.setattr(AnnouncingWorker, "after", lambda: None)
    live = engine.get_weight_version()
    assert update_of(engine).run() == live + 1 and not near(engine)


def test_an_announcement_that_stayed_would_be_seen(engine: RolloutEngine) -> None:
    """The control of the test above."""
    engine._loop.awaited_boundary.announce()
    assert ahead_of(engine) == 0.0
    assert update_of(engine).run() == 1
    assert ahead_of(engine) > 0.8


@pytest.mark.parametrize("why", ["closed", "failed"])
def test_an_engine_that_ends_meanwhile_ends_it(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    after = engine.close if why == "closed" else fail(WorkerError)
    monkeypatch.setattr(AnnouncingWorker, "after", after)
    with pytest.raises(EngineClosedError if why == "closed" else EngineFailedError):
        update_of(engine).run()
    assert not near(engine)


def test_an_update_that_waits_for_requests_announces_nothing(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take long."""
    seen: list[bool] = []
    monkeypatch.setattr(AnnouncingWorker, "after", lambda: seen.append(near(engine)))
    for options in (InFlightOptions(), InFlightOptions(mode="abort"), KEEP):
        update_of(engine, options).run()
    assert seen == [False, True, True]
