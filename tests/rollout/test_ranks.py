"""Several ranks in processes: all work at once, all or none change, and whichever dies is named at once."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from leftovers import children_of, segments_of, wait_for_end
from process_rig import CONTENT, MODEL, loaded, process_config
from ranks_engine import no_new_files
from tiny_engine import in_thread

from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.rollout import worker_child
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.messages import Done, Failed, is_consequence
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs
from zerokl.rollout.ranks import OneRank, make_ranks
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.weight_source import FolderWeights, TensorWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.rollout.worker_link import RankProcesses, WorkerDiedError, _refuse


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return process_config(tmp_path_factory.mktemp("model"), data_parallel_size=2)


@pytest.fixture(scope="module")
def shared(config: EngineConfig) -> Iterator[RankProcesses]:
    ranks = loaded(config)
    yield ranks
    ranks.close()


@pytest.fixture
def mortal(config: EngineConfig) -> Iterator[RankProcesses]:
    ranks = loaded(config)
    yield ranks
    ranks.close()


def a_short_step(first: int) -> StepInputs:
    tokens = np.arange(first, first + 19, dtype=np.int32)
    sampling = dataclasses.replace(neutral_sampling(19), seed=tokens.astype(np.uint64))
    return step_inputs([tokens], [0], [[5, 3]], 16, logit_rows=np.arange(19, dtype=np.int32), sampling=sampling)


def orders() -> list[StepOrder]:
    return [StepOrder(inputs=a_short_step(1)), StepOrder(inputs=a_short_step(7))]


def sampled(ranks: RankProcesses) -> list[list[float]]:
    return [result.sampled.logprobs.tolist() for result in ranks.execute(orders())]


def local(config: EngineConfig, seed: int) -> list[list[float]]:
    worker = LocalWorker(dataclasses.replace(config, data_parallel_size=1, worker="inprocess"))
    worker.stage_weights(TensorWeights(tensors=random_tensors(MODEL, seed)), 0)
    worker.commit_weights()
    return [worker.execute(order).sampled.logprobs.tolist() for order in orders()]


def pids(ranks: RankProcesses) -> list[int]:
    return [facts["pid"] for facts in ranks.describe()]


# -- all at once, all or none ------------------------------------------------------------------------------------------
def test_each_rank_does_its_own_order(shared: RankProcesses, config: EngineConfig) -> None:
    expected = local(config, 0)
    assert sampled(shared) == expected and expected[0] != expected[1]
    assert len(set(pids(shared))) == 2 and shared.size == 2


def test_weights_come_to_all_ranks_from_one_publication(shared: RankProcesses, config: EngineConfig) -> None:
    shared.pin_weights("old")
    shared.stage_weights(TensorWeights(tensors=random_tensors(MODEL, 1)), 1)
    assert len(segments_of(os.getpid())) == 1  # kept for the next ones
    assert sampled(shared) == local(config, 0)
    shared.commit_weights()
    assert sampled(shared) == local(config, 1)
    assert [facts["versions"] for facts in shared.describe()] == [{"policy": 1, "old": 0}] * 2
    shared.drop_weights("old")
    shared.stage_weights(FolderWeights(path=config.model), 0)
    shared.commit_weights()
    assert sampled(shared) == local(config, 0)


def test_weights_that_one_rank_refuses_are_staged_on_none(
    shared: RankProcesses, config: EngineConfig, tmp_path: Path
) -> None:
    save_pretrained(tmp_path, CONTENT, random_tensors(MODEL, 1))
    with no_new_files(pids(shared)[1]), pytest.raises(ValueError, match="Too many open files"):
        shared.stage_weights(FolderWeights(path=str(tmp_path)), 1)
    assert sampled(shared) == local(config, 0)
    with pytest.raises(RuntimeError, match="commit without staged weights"):
        shared.commit_weights()
    assert sampled(shared) == local(config, 0)


def test_ctrl_c_while_weights_are_staged_leaves_none_staged(shared: RankProcesses, config: EngineConfig) -> None:
    slow = pids(shared)[1]

    def interrupt(*_: object) -> None:
        os.kill(slow, signal.SIGCONT)
        raise KeyboardInterrupt

    os.kill(slow, signal.SIGSTOP)
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            shared.stage_weights(TensorWeights(tensors=random_tensors(MODEL, 1)), 1)
    finally:
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(RuntimeError, match="commit without staged weights"):
        shared.commit_weights()
    assert sampled(shared) == local(config, 0)
    assert segments_of(os.getpid()) == []  # a rank may still read it: the next call takes another one


def test_a_refusal_by_all_has_the_class_and_text_of_one(shared: RankProcesses) -> None:
    tensors = random_tensors(MODEL, 1)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        shared.stage_weights(TensorWeights(tensors=tensors), 1)
    assert len(segments_of(os.getpid())) == 1


def test_where_one_rank_cannot_put_weights_away_all_stay_awake(
    shared: RankProcesses, config: EngineConfig, tmp_path: Path
) -> None:
    with no_new_files(pids(shared)[1]), pytest.raises(ValueError, match="Too many open files"):
        shared.sleep(["weights", "kv_cache"], 1, str(tmp_path))
    assert sampled(shared) == local(config, 0)
    shared.sleep(["weights", "kv_cache"], 1, str(tmp_path))
    shared.wake_up(["weights", "kv_cache"])
    assert sampled(shared) == local(config, 0)


def test_one_rank_is_the_worker_itself(config: EngineConfig) -> None:
    alone = dataclasses.replace(config, data_parallel_size=1, worker="inprocess")
    ranks = make_ranks(alone)
    assert isinstance(ranks, OneRank) and ranks.describe()[0]["kind"] == "inprocess"
    ranks.close()


# -- death -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("work", ["step", "staging"])
def test_a_rank_killed_at_work_is_named_at_once_though_another_one_is_slow(mortal: RankProcesses, work: str) -> None:
    segments = segments_of(os.getpid())
    both = pids(mortal)
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    source = TensorWeights(tensors=random_tensors(MODEL, 1))
    call = in_thread(lambda: sampled(mortal) if work == "step" else mortal.stage_weights(source, 1))
    os.kill(both[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=f"rank 1: worker process {both[1]} was killed by SIGKILL"):
        call()
    os.kill(both[0], signal.SIGCONT)
    mortal.close()
    assert all(wait_for_end(pid) for pid in both) and not set(both) & set(children_of(os.getpid()))
    assert segments_of(os.getpid()) == segments


def test_a_rank_killed_between_steps_is_named_by_the_next_one(mortal: RankProcesses) -> None:
    victim = pids(mortal)[0]
    os.kill(victim, signal.SIGKILL)
    assert wait_for_end(victim)
    with pytest.raises(WorkerDiedError, match="rank 0"):
        mortal.execute(orders())


def test_the_loss_of_a_peer_never_hides_the_cause() -> None:
    lost = Failed(error="PeerLostError", text="rank 1 is gone", traceback="")
    cause = Failed(error="FloatingPointError", text="step 3", traceback="")
    assert is_consequence(lost) and not is_consequence(cause)
    with pytest.raises(FloatingPointError, match="step 3"):
        _refuse({0: lost, 1: cause})
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        _refuse({0: lost})
    with pytest.raises(RuntimeError, match="unexpected reply Done from the worker of rank 1"):
        _refuse({1: Done()})


# -- starting and ending -----------------------------------------------------------------------------------------------
def test_a_rank_that_cannot_start_ends_all(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = children_of(os.getpid())
    boot = "import sys\nif sys.argv[2] == '1':\n    raise SystemExit('not me')\n" + worker_child._BOOT
    monkeypatch.setattr(worker_child, "_BOOT", boot)
    with pytest.raises(WorkerDiedError, match=r"(?s)rank 1: worker process \d+ ended with exit status 1.*not me"):
        RankProcesses(config)
    assert children_of(os.getpid()) == before and list(tmp_path.iterdir()) == []


def test_a_bad_model_folder_raises_as_in_process(config: EngineConfig, tmp_path: Path) -> None:
    before = children_of(os.getpid())
    with pytest.raises(ValueError, match="no such file"):
        RankProcesses(dataclasses.replace(config, model=str(tmp_path)))
    assert children_of(os.getpid()) == before


def test_close_leaves_nothing(monkeypatch: pytest.MonkeyPatch, config: EngineConfig, tmp_path: Path) -> None:
    def state() -> tuple[list[int], int, int]:
        tasks, descriptors = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd"))
        return children_of(os.getpid()), tasks, descriptors

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = state()
    ranks = RankProcesses(config)
    assert list(tmp_path.iterdir()) == []  # connected sockets need no names
    ranks.close()
    ranks.close()
    left = state()
    assert left[0] == before[0] and left[1] <= before[1] and left[2] == before[2]  # threads of earlier tests may end
