"""Ranks that are stuck, restarts that are spent, and what is left of an engine that ends."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import children_of, segments_of, wait_for_end
from rank_faults_rig import RESTARTS, SPREAD, disturbed, lose, sampled, short, some_slow, weights
from ranks_engine import gated, on_ranks
from tiny_engine import in_thread, wait_until

from zerokl.rollout import engine_loop, worker_child
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.recovery import RestartsSpentError
from zerokl.rollout.worker_child import WorkerDiedError


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def booted(spawn: Callable[..., Any], boots: Iterator[str], *given: Any) -> Any:
    """Spawn a process that runs the next of `boots`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker_child, "_BOOT", next(boots))
        return spawn(*given)


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
