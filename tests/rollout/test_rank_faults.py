"""Ranks that die, stop or hang are started anew, and what comes back has the bits of a run that nothing disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import children_of, segments_of, wait_for_end
from ranks_engine import gated, on_ranks, write_moe_model
from tiny_engine import in_thread, wait_until

from zerokl.rollout import engine_loop, worker_child
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineAsleepError, EngineClosedError, EngineFailedError
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.recovery import RestartsSpentError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.worker_child import WorkerDiedError
from zerokl.weight_sync import WeightPublisher, publish_file

PROMPTS = [list(range(1 + index, 4 + index + 9 * (index % 4))) for index in range(9)]
SPREAD: dict[str, dict[str, Any]] = {
    "1": {"worker": "process"},
    "D2": {"data_parallel_size": 2},
    "E2": {"expert_parallel_size": 2, "expert_rebalance_interval": 5},
    "E2 x D2": {
        "expert_parallel_size": 2,
        "data_parallel_size": 2,
        "num_redundant_experts": 2,
        "expert_rebalance_interval": 3,
        "rank_roles": ["prefill", "decode", "mixed", "decode"],
    },
}
RESTARTS = 1000


def some_slow(quick: Sequence[Any], slow: Sequence[Any]) -> list[Any]:
    """Parameters, some of which `make test-slow` alone tries."""
    values = [one if isinstance(one, tuple) else (one,) for one in slow]
    return [*quick, *(pytest.param(*one, marks=pytest.mark.slow) for one in values)]


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe_model(tmp_path_factory.mktemp("moe_model"))


@pytest.fixture(scope="module")
def engine_of(moe_model: Path) -> Iterator[Callable[[str], RolloutEngine]]:
    """One engine for each way to spread the model, for tests that leave it as they found it, whatever its pids."""
    engines: dict[str, RolloutEngine] = {}

    def get(spread: str) -> RolloutEngine:
        if spread not in engines:
            engines[spread] = on_ranks(moe_model, return_routing="all", max_rank_restarts=RESTARTS, **SPREAD[spread])
        return engines[spread]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def expected(moe_model: Path) -> list[Rollout]:
    """What an engine of one rank in this process gives, which nothing disturbs."""
    with on_ranks(moe_model, return_routing="all") as engine:
        return sampled(engine)


def params() -> list[SamplingParams]:
    return [SamplingParams(n=2, max_tokens=14, seed=100 + index, ignore_eos=True) for index in range(len(PROMPTS))]


def sampled(engine: RolloutEngine) -> list[Rollout]:
    return engine.generate(PROMPTS, params())


def faults(engine: RolloutEngine) -> int:
    metrics = engine.metrics()
    return int(metrics["rank_deaths"] + metrics["rank_stalls"] + metrics["rank_step_timeouts"])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def booted(spawn: Callable[..., Any], boots: Iterator[str], *given: Any) -> Any:
    """Spawn a process that runs the next of `boots`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker_child, "_BOOT", next(boots))
        return spawn(*given)


def disturbed(engine: RolloutEngine, hits: list[tuple[int, int, signal.Signals]]) -> list[Rollout]:
    """The batch, with a signal to a rank as soon as so many steps have ended since the last one."""
    engine.reset_prefix_cache()
    steps = threading.Semaphore(0)
    end = engine.watch_steps(steps.release)
    try:
        call = in_thread(lambda: sampled(engine))
        for num_steps, rank, kind in hits:
            for _ in range(num_steps):
                assert steps.acquire(timeout=30)
            os.kill(engine.rank_pids[rank], kind)
        return call()
    finally:
        end()


# -- the same bits -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spread", some_slow(["1", "E2 x D2"], ["D2", "E2"]))
def test_a_batch_is_the_same_whichever_ranks_die_in_it(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str
) -> None:
    engine = engine_of(spread)
    before, num_ranks = faults(engine), engine.config.num_ranks
    old = engine.rank_pids
    hits = [(3, num_ranks - 1, signal.SIGKILL), (6, 0, signal.SIGKILL)]
    assert differences(expected, disturbed(engine, hits)) == NONE_DIFFER
    assert faults(engine) == before + 2 and engine.metrics()["rank_restarts"] >= 2
    assert engine.rank_pids[0] != old[0] and engine.rank_pids[-1] != old[-1]
    assert [rank["pid"] for rank in engine.health()["ranks"]] == engine.rank_pids
    assert [rank["pid"] for rank in engine.describe_ranks()] == engine.rank_pids


@pytest.mark.parametrize("spread", some_slow(["D2"], ["E2 x D2"]))
def test_a_rank_that_is_stopped_is_as_good_as_dead(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str
) -> None:
    engine = engine_of(spread)
    stalls, pid = engine.metrics()["rank_stalls"], engine.rank_pids[1]
    assert differences(expected, disturbed(engine, [(5, 1, signal.SIGSTOP)])) == NONE_DIFFER
    assert engine.metrics()["rank_stalls"] == stalls + 1 and wait_for_end(pid)


@pytest.mark.parametrize(
    ("spread", "seed"),
    some_slow([("E2", 0), ("D2", 1)], [(spread, seed) for spread in SPREAD for seed in range(10, 25)]),
)
def test_a_batch_is_the_same_under_faults_at_any_moments(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str, seed: int
) -> None:
    """Not at the ends of steps: a little later each, so in the middle of one, or of the last restart."""
    engine, random = engine_of(spread), np.random.default_rng(seed)
    pause, before = threading.Event(), faults(engine)

    def strike() -> None:
        for kind in (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP if random.integers(2) else signal.SIGKILL):
            pause.wait(float(random.exponential(0.1)))
            pid = engine.rank_pids[int(random.integers(engine.config.num_ranks))]
            with suppress(ProcessLookupError):  # it has just been struck
                os.kill(pid, kind)

    with ThreadPoolExecutor(1) as pool:
        striking = pool.submit(strike)
        while not striking.done():
            engine.reset_prefix_cache()
            assert differences(expected, sampled(engine)) == NONE_DIFFER
    striking.result()
    assert differences(expected, sampled(engine)) == NONE_DIFFER
    assert faults(engine) > before


def test_requests_that_keep_what_was_lost_are_seen(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with its computed tokens counted as before, a request reads an empty KV pool."""
    engine = engine_of("D2")
    with monkeypatch.context() as patched:
        patched.setattr(engine._ranks, "_tell_lost", lambda ranks: None)
        rollouts = disturbed(engine, [(6, 1, signal.SIGKILL)])
    assert differences(expected, rollouts) != NONE_DIFFER
    engine.reset_prefix_cache()
    assert differences(expected, sampled(engine)) == NONE_DIFFER


# -- what ranks hold ---------------------------------------------------------------------------------------------------
def weights(engine: RolloutEngine, seed: int) -> dict[str, Any]:
    return random_tensors(engine.model_config, seed, gain=2.0)


def short(engine: RolloutEngine) -> list[Rollout]:
    return engine.generate(PROMPTS[:3], [SamplingParams(max_tokens=6, seed=seed, ignore_eos=True) for seed in range(3)])


def lose(engine: RolloutEngine, *ranks: int) -> None:
    """The ranks die while nothing runs, and are replaced."""
    before = engine.metrics()["rank_restarts"]
    for rank in ranks:
        os.kill(engine.rank_pids[rank], signal.SIGKILL)
    wait_until(lambda: engine.metrics()["rank_restarts"] >= before + len(ranks))


def holds(engine: RolloutEngine) -> tuple[Any, ...]:
    """What the live and the pinned weights give; with KV computed anew, so by whoever has the weights now."""
    engine.reset_prefix_cache()
    rollouts = short(engine)
    scores = engine.score(rollouts, policy="reference")
    bits = [(rollout.token_ids.tobytes(), rollout.logprobs.tobytes()) for rollout in rollouts]
    return bits, [score.tobytes() for score in scores], engine.health()["weight_versions"]


def test_a_new_rank_holds_what_every_kind_of_update_has_left(moe_model: Path, tmp_path: Path) -> None:
    """Arrays, a publication that is overwritten later, a delta to it, a file and a folder that are gone later."""
    children, segments = children_of(os.getpid()), segments_of(os.getpid())
    with (
        on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine,
        WeightPublisher() as publisher,
    ):
        save_pretrained(tmp_path / "folder", tiny_moe_config(), weights(engine, 6))
        delta = {name: tensor for name, tensor in weights(engine, 4).items() if "norm" in name or ".experts.1." in name}
        sources: list[Callable[[], Any]] = [
            lambda: weights(engine, 1),
            lambda: publisher.publish(weights(engine, 2), 2),
            lambda: publisher.publish_delta(delta, 3),
            lambda: publish_file(tmp_path / "file", weights(engine, 5), 4),
            lambda: str(tmp_path / "folder"),
            lambda: publisher.publish(weights(engine, 7), 6, dtype="bfloat16"),
            lambda: publisher.publish_delta(delta, 7),
        ]
        for number, source in enumerate(sources):
            engine.update_weights(source())
            if number in (0, 3):
                engine.pin_weights()
            if number == 4:
                shutil.rmtree(tmp_path / "folder")
            before = holds(engine)
            lose(engine, number % 2)
            assert holds(engine) == before
            if number == 3:
                engine.rebalance_experts()
        lose(engine, 0, 1)
        assert holds(engine) == before
        engine.drop_weights("reference")
        assert len(segments_of(os.getpid())) <= len(segments) + 2 + 2
    assert children_of(os.getpid()) == children and segments_of(os.getpid()) == segments


def test_deltas_go_on_after_a_restart(moe_model: Path) -> None:
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine, WeightPublisher() as one:
        first, second, third = (weights(engine, seed) for seed in (1, 2, 3))
        engine.update_weights(one.publish(first, 1))
        lose(engine, 1)
        names = [name for name in first if "norm" in name or ".experts.1." in name]
        engine.update_weights(one.publish_delta({name: second[name] for name in names}, 2))
        lose(engine, 0)
        engine.update_weights(one.publish_delta({names[0]: third[names[0]]}, 3))
        rollouts = short(engine)
        engine.update_weights(first | {name: second[name] for name in names} | {names[0]: third[names[0]]})
        engine.reset_prefix_cache()
        assert differences(rollouts, short(engine)) == NONE_DIFFER


@pytest.mark.parametrize("level", [1, 2])
def test_a_rank_lost_asleep_is_replaced_by_one_that_sleeps(moe_model: Path, tmp_path: Path, level: int) -> None:
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        engine.sleep(level=level, spill_dir=tmp_path)
        lose(engine, 1)
        assert engine.health()["asleep"] == {"weights": level, "kv_cache": level}
        with pytest.raises(EngineAsleepError):
            short(engine)
        if level == 2:
            engine.update_weights(str(moe_model))
        assert engine.wake_up() == []
        assert differences(expected, short(engine)) == NONE_DIFFER


def test_a_rank_lost_in_a_pause_is_replaced_and_what_stood_still_goes_on(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout]
) -> None:
    engine = engine_of("D2")
    engine.reset_prefix_cache()
    steps = threading.Semaphore(0)
    end = engine.watch_steps(steps.release)
    call = in_thread(lambda: sampled(engine))
    for _ in range(4):
        assert steps.acquire(timeout=30)
    end()
    engine.pause_generation("keep")
    lose(engine, 0, 1)
    assert engine.health()["state"] == "paused"
    engine.resume_generation()
    assert differences(expected, call()) == NONE_DIFFER


# -- updates -----------------------------------------------------------------------------------------------------------
_DIES_ONCE = """
import os, signal, sys
import zerokl.rollout.worker as worker
whole = worker.LocalWorker.{method}
def dying(self, *given):
    if sys.argv[2] == "{rank}" and os.path.exists({flag!r}):
        os.unlink({flag!r})
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *given)
worker.LocalWorker.{method} = dying
"""


@pytest.fixture
def dying_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], Callable[[], None]]:
    """Have a rank of engines that are made afterwards die in a method of its worker: once, after what is returned."""

    def prepare(method: str, rank: int) -> Callable[[], None]:
        flag = tmp_path / "armed"
        script = _DIES_ONCE.format(method=method, rank=rank, flag=str(flag))
        monkeypatch.setattr(worker_child, "_BOOT", worker_child._BOOT.replace("main()", "") + script + "\nmain()")
        return flag.touch

    return prepare


@pytest.mark.parametrize(
    ("method", "mode"),
    some_slow(
        [("stage_weights", "keep"), ("commit_weights", "wait"), ("stage_weights", "abort")],
        [
            ("stage_weights", "wait"),
            ("stage_weights", "in_place"),
            *(("commit_weights", mode) for mode in ("keep", "in_place", "abort")),
        ],
    ),
)
def test_an_update_in_which_a_rank_dies_comes_about_all_the_same(
    moe_model: Path, dying_in: Callable[[str, int], Callable[[], None]], mode: Any, method: str
) -> None:
    """On all ranks; and every span of tokens is its version's, to the bit."""
    arm = dying_in(method, 1)
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        steps = threading.Semaphore(0)
        end = engine.watch_steps(steps.release)
        call = in_thread(lambda: sampled(engine))
        assert steps.acquire(timeout=30)
        end()
        arm()
        assert engine.update_weights(weights(engine, 1), mode=mode) == 1
        rollouts = call()
        assert engine.metrics()["rank_deaths"] == 1
        assert [rank["versions"] for rank in engine.describe_ranks()] == [{"policy": 1}] * 2
        scores = {1: engine.score(rollouts)}
        engine.update_weights(str(moe_model), version=0, allow_rewind=True)
        scores[0] = engine.score(rollouts)
        for index, rollout in enumerate(rollouts):
            for start, stop, version in rollout.version_spans if not rollout.num_kept_updates else []:
                np.testing.assert_array_equal(scores[version][index][start:stop], rollout.policy_logprobs[start:stop])


def test_an_update_that_is_refused_after_a_rank_died_leaves_the_old_version(
    moe_model: Path, dying_in: Callable[[str, int], Callable[[], None]]
) -> None:
    arm = dying_in("stage_weights", 0)
    with on_ranks(moe_model, data_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        arm()
        wrong = weights(engine, 1)
        del wrong["model.norm.weight"]
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            engine.update_weights(wrong)
        wait_until(lambda: engine.metrics()["rank_restarts"] == 1)
        engine.reset_prefix_cache()
        assert differences(expected, short(engine)) == NONE_DIFFER
        assert engine.update_weights(weights(engine, 1)) == 1


def test_a_rank_lost_between_staging_and_commit_has_the_staged_weights_too(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout]
) -> None:
    engine = engine_of("D2")
    with gated(engine) as ranks:
        call = in_thread(lambda: sampled(engine))
        ranks.began.acquire()
        update = in_thread(lambda: engine.update_weights(weights(engine, 1)))
        wait_until(lambda: engine.health()["num_held"] == 1)  # staged; it waits for the requests
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        ranks.open()
        assert differences(expected, call()) == NONE_DIFFER
        assert update() == 1
    assert [rank["versions"] for rank in engine.describe_ranks()] == [{"policy": 1}] * 2
    engine.update_weights(engine.config.model, version=0, allow_rewind=True)
    assert differences(expected, sampled(engine)) == NONE_DIFFER


@pytest.mark.parametrize("method", some_slow(["rearrange_experts", "sleep"], ["pin_weights", "wake_up"]))
def test_an_order_in_which_a_rank_dies_is_carried_out_on_all(
    moe_model: Path, tmp_path: Path, dying_in: Callable[[str, int], Callable[[], None]], method: str
) -> None:
    arm = dying_in(method, 1)
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        arm()
        engine.rebalance_experts()
        engine.pin_weights()
        engine.sleep(spill_dir=tmp_path)
        engine.wake_up()
        assert engine.metrics()["rank_deaths"] == 1 and engine.metrics()["rank_restarts"] == 2
        assert differences(expected, short(engine)) == NONE_DIFFER
        scores = engine.score(expected, policy="reference")
        assert all(np.array_equal(a, b.policy_logprobs) for a, b in zip(scores, expected, strict=True))


# -- stuck, and spent --------------------------------------------------------------------------------------------------
_HANGS = """
import ctypes, os, sys, threading
import zerokl.rollout.worker as worker
whole = worker.LocalWorker.execute
def hanging(self, order):
    if sys.argv[2] == "1" and os.path.exists({flag!r}):
        os.unlink({flag!r})
        {hang}
    return whole(self, order)
worker.LocalWorker.execute = hanging
"""


@pytest.mark.parametrize(
    ("hang", "counter"),
    [("threading.Event().wait()", "rank_step_timeouts"), ("ctypes.PyDLL(None).sleep(1000)", "rank_stalls")],
    ids=["waits for ever", "holds the interpreter"],
)
def test_a_rank_that_is_stuck_in_a_step_is_replaced(
    moe_model: Path, expected: list[Rollout], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hang: str, counter: str
) -> None:
    flag = tmp_path / "armed"
    script = _HANGS.format(flag=str(flag), hang=hang)
    monkeypatch.setattr(worker_child, "_BOOT", worker_child._BOOT.replace("main()", "") + script + "\nmain()")
    options = {"step_timeout_base": 1.0, "step_timeout_per_token": 0.02, "max_rank_restarts": RESTARTS}
    with on_ranks(moe_model, return_routing="all", data_parallel_size=2, **options) as engine:
        assert differences(expected, sampled(engine)) == NONE_DIFFER
        flag.touch()
        assert differences(expected, sampled(engine)) == NONE_DIFFER
        metrics = engine.metrics()
        assert metrics[counter] == 1 == metrics["rank_restarts"] == metrics["rank_faults_in_step"]


def test_restarts_that_are_spent_end_the_engine_with_a_typed_error(moe_model: Path) -> None:
    with on_ranks(moe_model, data_parallel_size=2, max_rank_restarts=1) as engine:
        lose(engine, 0)
        pid = engine.rank_pids[1]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineFailedError, match=rf"max_rank_restarts \(1\) are spent.*rank 1.*{pid}") as failed:
            while True:
                short(engine)
        assert isinstance(failed.value.__cause__, RestartsSpentError)
        assert isinstance(failed.value.__cause__.__cause__, WorkerDiedError)


def test_a_new_rank_may_die_too_but_not_for_ever(moe_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = children_of(os.getpid())
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected, boot, spawn = short(engine), worker_child._BOOT, worker_child._spawn
        late = boot.replace("main()", "raise SystemExit(1)")
        boots: Iterator[str] = iter(["raise SystemExit('not yet')", late, boot])
        monkeypatch.setattr(worker_child, "_spawn", partial(booted, spawn, boots))
        lose(engine, 1)
        engine.reset_prefix_cache()
        assert differences(expected, short(engine)) == NONE_DIFFER
        assert engine.metrics()["rank_deaths"] == 3 and next(boots, None) is None
        monkeypatch.setattr(worker_child, "_spawn", partial(booted, spawn, repeat("raise SystemExit(1)")))
        os.kill(engine.rank_pids[0], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match="cannot be started anew"):
            while True:
                short(engine)
    assert children_of(os.getpid()) == children


def test_a_folder_that_has_changed_is_not_taken_for_what_was_in_it(moe_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(moe_model, folder)
    with on_ranks(folder, data_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        save_pretrained(folder, tiny_moe_config(), weights(engine, 1))
        os.kill(engine.rank_pids[0], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match="where its weights came from, has changed"):
            while True:
                short(engine)


# -- the end -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("spread", "restarts"), some_slow([("1", 0), ("E2", RESTARTS)], [("1", RESTARTS), ("E2", 0)]))
def test_close_is_not_held_up_by_a_rank_that_is_stopped(
    moe_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restarts: int, spread: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(engine_loop, "CLOSE_SECONDS", 0.2)
    children, segments, descriptors = children_of(os.getpid()), segments_of(os.getpid()), open_files()
    engine = on_ranks(moe_model, max_rank_restarts=restarts, **SPREAD[spread])
    with gated(engine) as ranks:
        call = in_thread(lambda: sampled(engine))
        ranks.began.acquire()
        pids = engine.rank_pids
        os.kill(pids[-1], signal.SIGSTOP)
        ranks.open()
        wait_until(lambda: ranks.num_sent == 1)
        engine.close()
        with pytest.raises((EngineClosedError, EngineFailedError)):
            call()
    assert all(wait_for_end(pid) for pid in pids) and children_of(os.getpid()) == children
    assert segments_of(os.getpid()) == segments and list(tmp_path.iterdir()) == [] and open_files() == descriptors


def test_a_stopped_rank_fails_an_engine_that_may_not_restart_it(moe_model: Path) -> None:
    with on_ranks(moe_model, data_parallel_size=2) as engine:
        short(engine)
        os.kill(engine.rank_pids[1], signal.SIGSTOP)
        wait_until(lambda: engine.health()["state"] == "failed")
        assert "rank 1" in engine.health()["cause"] and "no sign of life" in engine.health()["cause"]
        assert engine.metrics()["rank_stalls"] == 1


def test_nothing_is_left_of_ranks_that_were_replaced(
    moe_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children, segments, before = children_of(os.getpid()), segments_of(os.getpid()), open_files()
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        descriptors, pids = open_files(), engine.rank_pids
        for kind in (signal.SIGKILL, signal.SIGSTOP):
            disturbed(engine, [(3, 1, kind)])
            pids += engine.rank_pids
        lose(engine, 0, 1)
        assert open_files() == descriptors and len(children_of(os.getpid())) == len(children) + 2
        assert list(tmp_path.iterdir()) == [] and segments_of(os.getpid()) == segments
        pids += engine.rank_pids
    assert all(wait_for_end(pid) for pid in pids) and children_of(os.getpid()) == children
    assert open_files() == before and list(tmp_path.iterdir()) == []
