"""The communicator of ranks on one machine: what arrives, who is out of step, and what is left of a dead rank."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import segments_of
from ranks_rig import communicators, each

from zerokl.kernels.communicator import CommunicatorError, PeerLostError
from zerokl.rollout.expert_parallel.shared_memory import SharedMemoryCommunicator

RANKS = 3


@pytest.fixture(scope="module")
def shared_ends() -> Any:
    with communicators(RANKS) as ends:
        yield ends


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def rows(source: int, target: int, count: int, dtype: Any = np.float32) -> np.ndarray:
    """Rows that say where they come from and go to."""
    return (np.arange(count * 5).reshape(count, 5) + 1000 * source + 100_000 * target).astype(dtype)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(
        st.lists(st.sampled_from([0, 1, 3, 2000]), min_size=RANKS, max_size=RANKS), min_size=RANKS, max_size=RANKS
    ),
    dtype=st.sampled_from([np.float32, np.int32, np.float64, np.uint8]),
    step=st.integers(0, 1 << 40),
)
def test_every_part_arrives_at_its_rank(shared_ends: Any, counts: list[list[int]], dtype: Any, step: int) -> None:
    def work(rank: int) -> None:
        end = shared_ends[rank]
        end.begin_step(step)
        for turn in range(3):
            got = end.all_to_all([rows(rank + turn, target, counts[rank][target], dtype) for target in range(RANKS)])
            for source, part in enumerate(got):
                np.testing.assert_array_equal(part, rows(source + turn, rank, counts[source][rank], dtype))
                assert part.dtype == dtype
            gathered = end.all_gather(rows(rank, turn, counts[rank][0], dtype))
            for source, part in enumerate(gathered):
                np.testing.assert_array_equal(part, rows(source, turn, counts[source][0], dtype))

    each(RANKS, work)


def test_what_is_received_stands_until_the_next_exchange(shared_ends: Any) -> None:
    def work(rank: int) -> None:
        end = shared_ends[rank]
        for turn in range(20):  # the peers write the next exchange while this one is read
            part = rows(rank, turn, 300)
            got = end.all_gather(part)
            part[:] = -1
            for source in set(range(RANKS)) - {rank}:
                np.testing.assert_array_equal(got[source], rows(source, turn, 300))
                with pytest.raises(ValueError, match="read-only"):
                    got[source][0, 0] = 0

    each(RANKS, work)


def test_groups_exchange_among_themselves_and_between_exchanges_of_all() -> None:
    with communicators(4) as ends:

        def work(rank: int) -> list[int]:
            end = ends[rank]
            pair = end.group([rank // 2 * 2, rank // 2 * 2 + 1])
            assert pair is end.group((rank // 2 * 2, rank // 2 * 2 + 1)) and (pair.rank, pair.size) == (rank % 2, 2)
            assert pair.group([pair.rank]).size == 1
            seen = []
            for step in range(5):
                end.begin_step(step)
                for count in (1, 1 + rank // 2 * 50, 2):
                    part = np.full((count, 1), 10 * step + rank)
                    if count == 2:
                        seen += [int(other[0, 0]) for other in end.all_gather(part)]
                    else:
                        seen += [int(other[0, 0]) for other in pair.all_gather(part)]
            pair.close()
            end.all_gather(np.zeros((1, 1)))
            return seen

        for rank, seen in enumerate(each(4, work)):
            pair = [rank // 2 * 2, rank // 2 * 2 + 1]
            assert seen == [10 * step + r for step in range(5) for r in (*pair, *pair, 0, 1, 2, 3)]


def test_one_rank_passes_its_parts_through() -> None:
    with communicators(1) as (end,):
        part = rows(0, 0, 3)
        assert end.all_to_all([part])[0] is part and end.all_gather(part)[0] is part


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda end: end.begin_step(2), r"in exchange 0 of step 2 .*, this one in exchange 0 of step 1"),
        (lambda end: end.all_to_all([np.zeros((1, 4), np.float32)] * 2), "all_to_all of 2 ranks.*all_gather"),
        (lambda end: end.all_gather(np.zeros((1, 5), np.float32)), "rows of 5 float32, this one of 4 float32"),
        (lambda end: end.all_gather(np.zeros((1, 4), np.int32)), "rows of 4 int32, this one of 4 float32"),
        (lambda end: (end.group([1]).all_gather(np.zeros((1, 4), np.float32)), end.begin_step(0)), "step 0"),
    ],
)
def test_ranks_that_disagree_find_out(theirs: Any, message: str) -> None:
    with communicators(2) as ends:
        for end in ends:
            end.begin_step(1)

        def work(rank: int) -> str:
            with pytest.raises(CommunicatorError) as caught:
                if rank == 1:
                    theirs(ends[1])
                ends[rank].all_gather(np.zeros((1, 4), np.float32))
            return str(caught.value)

        told = each(2, work)
        assert any(re.search(message, text) for text in told), told
        for end in ends:  # nothing can be exchanged afterwards
            with pytest.raises(CommunicatorError):
                end.all_gather(np.zeros((1, 4), np.float32))


def test_refusals_change_nothing() -> None:
    with communicators(2) as ends:
        part = np.zeros((1, 4), np.float32)
        for parts in ([part], [part, part[0]], [part, part[:, :2]], [part, part.astype(np.int32)]):
            with pytest.raises(ValueError, match="parts must be"):
                ends[0].all_to_all(parts)
        for ranks in ([1], [1, 0], [0, 0], [0, 2], []):
            with pytest.raises(ValueError, match="ranks must be ascending"):
                ends[0].group(ranks)
        each(2, lambda rank: ends[rank].all_to_all([part, part]))


def test_memory_that_cannot_be_had_is_an_error_for_all() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with communicators(2) as ends:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:

            def work(rank: int) -> None:
                with pytest.raises(CommunicatorError, match=r"cannot reserve .* bytes of shared memory|rank 0 is gone"):
                    ends[rank].all_gather(np.zeros((1 << 20 if rank == 0 else 1, 1), np.float64))

            each(2, work)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_rank_that_leaves_is_missed_by_all_at_once() -> None:
    with communicators(3) as ends:

        def work(rank: int) -> None:
            if rank == 2:
                ends[2].close()
                return
            with pytest.raises(PeerLostError):
                ends[rank].all_gather(np.zeros((1, 1)))

        each(3, work)


def test_close_frees_everything() -> None:
    with communicators(2) as ends:  # what is opened once for all
        each(2, lambda rank: ends[rank].all_gather(np.zeros((1, 1))))
    before = num_descriptors()
    with communicators(3) as ends:
        part = each(3, lambda rank: (ends[rank].all_gather(rows(rank, 0, 9)), ends[rank].all_gather(rows(rank, 0, 9))))
        assert num_descriptors() > before
    for end in ends:
        end.close()
        end.begin_step(3)
    np.testing.assert_array_equal(part[0][1][2], rows(2, 0, 9))  # what was received keeps what it holds
    del part
    assert num_descriptors() == before
    with pytest.raises(CommunicatorError, match="closed"):
        ends[0].all_gather(rows(0, 0, 1))


def test_setup_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        SharedMemoryCommunicator.bind(2, 2, tmp_path)
    with pytest.raises(ValueError, match="folder must make socket paths of at most 107 bytes"):
        SharedMemoryCommunicator.bind(0, 2, tmp_path / ("long" * 30))
    bound = SharedMemoryCommunicator.bind(1, 2, tmp_path)
    with pytest.raises(PeerLostError, match="rank 0 is gone: it does not listen"):
        SharedMemoryCommunicator.connect(bound)
    bound = SharedMemoryCommunicator.bind(0, 2, tmp_path)
    with pytest.raises(CommunicatorError, match=r"a rank above it did not connect within 0.01 s"):
        SharedMemoryCommunicator.connect(bound, 0.01)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys
import numpy as np
from zerokl.kernels.communicator import PeerLostError
from zerokl.rollout.expert_parallel.shared_memory import SharedMemoryCommunicator

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
bound = SharedMemoryCommunicator.bind(rank, size, folder)
print("bound", flush=True)
sys.stdin.readline()
end = SharedMemoryCommunicator.connect(bound)
print("connected", flush=True)
step = 0
try:
    while True:
        end.begin_step(step)
        for count in (1, 300):
            got = end.all_gather(np.full((count * (step % 50 + 1), 64), rank * 1000.0 + step))
            assert all((part == other * 1000.0 + step).all() for other, part in enumerate(got))
        step += 1
        if step == 20:
            print("running", flush=True)
except PeerLostError as error:
    print("lost", error.rank, flush=True)
"""


def start_ranks(size: int, folder: Path) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(rank), str(size), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def expect(ranks: Sequence[subprocess.Popen[str]], word: str) -> None:
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline().split()[0] == word


@pytest.mark.parametrize("moment", ["bound", "connected", "running"])
def test_nothing_is_left_of_a_killed_rank_and_no_other_hangs(tmp_path: Path, moment: str) -> None:
    ranks = start_ranks(3, tmp_path)
    try:
        expect(ranks, "bound")
        if moment == "bound":
            ranks[1].kill()
            ranks[1].wait()
        for rank in ranks:
            if rank.poll() is None and rank.stdin is not None:
                rank.stdin.write("\n")
                rank.stdin.flush()
        if moment == "bound":  # it cannot be reached, by whom it was to reach
            assert ranks[2].wait(10) == 1
            assert not [name for rank in ranks for name in segments_of(rank.pid)]
            return
        expect(ranks, "connected")
        if moment == "running":
            expect(ranks, "running")
        ranks[1].send_signal(signal.SIGKILL)
        for rank in (ranks[0], ranks[2]):
            assert rank.wait(10) == 0
            assert rank.stdout is not None and "lost" in rank.stdout.read()
        assert not [name for rank in ranks for name in segments_of(rank.pid)]
        assert list(tmp_path.iterdir()) == []
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
