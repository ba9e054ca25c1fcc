"""Hooks around updates, hot_swap and updates from coroutines: an exception has one declared effect and none hangs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import gated_engine, in_thread, tiny_tensors, update_after, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError, HookError
from zerokl.rollout.hooks import UpdateEvent
from zerokl.rollout.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


def record(engine: RolloutEngine) -> list[tuple[str, UpdateEvent]]:
    seen: list[tuple[str, UpdateEvent]] = []
    for name in ("before_update", "after_commit", "on_failure"):
        engine.add_update_hook(name, lambda event, name=name: seen.append((name, event)))  # type: ignore[misc]
    return seen


def fail(event: UpdateEvent) -> None:
    raise OSError("the hook is broken")


def test_hooks_come_in_order_and_know_the_versions(engine: RolloutEngine) -> None:
    seen = record(engine)
    engine.update_weights(tiny_tensors(1), version=1, mode="keep")
    assert [(name, event.live_version, event.version, event.mode) for name, event in seen] == [
        ("before_update", 0, 1, "keep"),
        ("after_commit", 1, 1, "keep"),
    ]
    seen.clear()
    with pytest.raises(ValueError, match="a gap"):
        engine.update_weights(tiny_tensors(2), version=9)
    (_, before), (name, failed) = seen
    assert name == "on_failure" and isinstance(failed.error, ValueError) and before.error is None


def test_a_hook_may_use_the_engine_and_can_be_removed(engine: RolloutEngine) -> None:
    versions: list[list[int]] = []

    def sample(event: UpdateEvent) -> None:
        versions.append(engine.generate("a", PARAMS)[0].policy_versions.tolist())

    removals = [engine.add_update_hook(name, sample) for name in ("before_update", "after_commit")]  # type: ignore[arg-type]
    engine.update_weights(tiny_tensors(1))
    assert versions == [[0] * 6, [1] * 6]
    for remove in removals:
        remove()
        remove()
    engine.update_weights(tiny_tensors(2))
    assert len(versions) == 2


def test_a_hook_before_an_update_can_call_it_off(engine: RolloutEngine) -> None:
    seen = record(engine)
    before = engine.generate("a", PARAMS)[0]
    remove = engine.add_update_hook("before_update", fail)
    with pytest.raises(HookError, match=r"before_update hook fail raised OSError.*: the update is off") as caught:
        engine.update_weights(tiny_tensors(1))
    assert isinstance(caught.value.__cause__, OSError)
    assert [name for name, _ in seen] == ["before_update", "on_failure"] and seen[1][1].error is caught.value
    np.testing.assert_array_equal(engine.generate("a", PARAMS)[0].logprobs, before.logprobs)
    remove()
    assert engine.update_weights(tiny_tensors(1)) == 1


def test_hooks_that_only_report_change_nothing(engine: RolloutEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.add_update_hook("before_update", fail, on_error="report")
    engine.add_update_hook("after_commit", fail)
    engine.add_update_hook("on_failure", fail)
    seen = record(engine)
    with caplog.at_level(logging.ERROR):
        assert engine.update_weights(tiny_tensors(1)) == 1
        with pytest.raises(ValueError, match="source must be"):
            engine.update_weights(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a repetition"):
            engine.update_weights(tiny_tensors(1), version=1)
    assert [name for name, _ in seen] == ["before_update", "after_commit", "before_update", "on_failure"]
    assert engine.health()["hook_errors"] == 4
    assert "after_commit hook" in caplog.text and "the hook is broken" in caplog.text


def test_an_update_of_a_closed_engine_reaches_the_hooks(engine: RolloutEngine) -> None:
    seen = record(engine)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.update_weights(tiny_tensors(1))
    assert seen[-1][0] == "on_failure" and isinstance(seen[-1][1].error, EngineClosedError)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("after_update", fail), "name must be one of"),
        (("after_commit", 5), "hook must be callable"),
        (("after_commit", fail, "abort"), "on_error must be one of .* for after_commit"),
    ],
)
def test_bad_hooks_are_refused(engine: RolloutEngine, arguments: tuple[Any, ...], text: str) -> None:
    name, hook, *on_error = arguments
    with pytest.raises(ValueError, match=text):
        engine.add_update_hook(name, hook, on_error=on_error[0] if on_error else None)


def test_hot_swap_updates_after_a_body_that_ends_well(engine: RolloutEngine) -> None:
    weights = tiny_tensors(1)
    with engine.hot_swap(lambda: weights, mode="keep") as swap:
        weights = tiny_tensors(2)
        assert swap.version is None and engine.get_weight_version() == 0
    assert swap.version == 1
    swapped = engine.generate("a", PARAMS)[0]
    engine.update_weights(tiny_tensors(2))
    np.testing.assert_array_equal(engine.generate("a", PARAMS)[0].logprobs, swapped.logprobs)


def test_hot_swap_updates_nothing_after_a_body_that_raises(engine: RolloutEngine) -> None:
    with pytest.raises(ZeroDivisionError), engine.hot_swap(tiny_tensors(1)):
        1 / 0
    with pytest.raises(ValueError, match="mode must be one of"), engine.hot_swap(tiny_tensors(1), mode="drain"):
        raise AssertionError("bad options are refused before the body")
    assert engine.get_weight_version() == 0


def test_a_coroutine_updates_while_others_generate(engine: RolloutEngine) -> None:
    async def both() -> tuple[int, Any]:
        return await asyncio.gather(  # type: ignore[return-value]
            engine.aupdate_weights(tiny_tensors(1), mode="keep"), engine.agenerate("a", PARAMS)
        )

    version, rollouts = asyncio.run(both())
    assert version == 1 == engine.get_weight_version()
    assert len(rollouts[0].token_ids) == 6


def test_a_cancelled_task_gives_up_its_update(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)

    async def cancel() -> None:
        task = asyncio.create_task(engine.aupdate_weights(tiny_tensors(1)))
        await asyncio.to_thread(wait_until, lambda: engine.health()["num_held"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with engine:
        call = in_thread(lambda: engine.generate("a", PARAMS))
        worker.began.acquire()
        asyncio.run(cancel())
        worker.open()
        assert call()[0].policy_versions.tolist() == [0] * 6
        assert engine.get_weight_version() == 0
        assert engine.update_weights(tiny_tensors(1)) == 1


def test_updates_of_two_threads_come_one_after_the_other(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate("a", PARAMS))
        first = update_after(engine, worker, 1, tiny_tensors(1), mode="keep")
        second = in_thread(lambda: engine.update_weights(tiny_tensors(2), mode="keep"))
        worker.open()
        assert {first(), second()} == {1, 2}
        assert call()[0].finish_reason == "length"
