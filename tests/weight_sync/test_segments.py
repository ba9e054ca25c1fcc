"""Segments and their owners, with real processes: who may be removed, what stays behind, what a full memory does."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import posix_ipc
import pytest
from leftovers import segments_of, wait_for_end

from zerokl.weight_sync import (
    PublishedWeights,
    WeightPublisher,
    open_published,
    reap_dead_segments,
)
from zerokl.weight_sync.segments import OwnedSegment, current_owner, is_dead, owner_of

PUBLISH = """
import sys, os, signal, numpy as np
from zerokl.weight_sync import WeightPublisher
publisher = WeightPublisher()
published = publisher.publish({"w": np.arange(1000.0)}, 1)
print(published.to_bytes().hex(), flush=True)
"""


@contextmanager
def trainer(then: str) -> Iterator[tuple[subprocess.Popen[bytes], PublishedWeights]]:
    """A process that has published one version and goes on with `then`; killed at the end if it still runs."""
    command = [sys.executable, "-c", PUBLISH + then]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        published = PublishedWeights.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
        try:
            yield process, published
        finally:
            process.kill()
    reap_dead_segments()
    assert segments_of(process.pid) == []


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('trainer bug')", 1),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
        ("kept = __import__('mmap'); view = memoryview(publisher._segments[0].memory)", 0),
    ],
    ids=["end", "exit", "exception", "ctrl-c", "view-kept"],
)
def test_a_trainer_that_ends_leaves_nothing(then: str, status: int) -> None:
    with trainer(then) as (process, _):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == status, errors.decode()
        assert segments_of(process.pid) == []
    assert b"resource_tracker" not in errors and b"Exception ignored" not in errors


def test_a_forked_child_does_not_remove_its_parents_segments() -> None:
    then = """
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
print("joined", flush=True)
sys.stdin.read()
"""
    with trainer(then) as (process, published):
        assert process.stdout is not None and process.stdout.readline() == b"joined\n"
        with open_published(published) as tensors:
            np.testing.assert_array_equal(tensors["w"], np.arange(1000.0))


def test_a_killed_trainers_segments_are_removed_by_the_next_start_and_no_others() -> None:
    with trainer("sys.stdin.read()") as (process, _), trainer("sys.stdin.read()") as (other, alive):
        assert len(segments_of(process.pid)) == 1
        process.kill()
        process.wait()
        with WeightPublisher() as own:
            published = own.publish({"w": np.ones(3)}, 1)
            assert segments_of(process.pid) == []
            assert segments_of(other.pid) == [alive.segment]
            assert segments_of(os.getpid()) == [published.segment]
            with open_published(alive) as tensors:
                np.testing.assert_array_equal(tensors["w"], np.arange(1000.0))


def test_a_trainer_killed_in_the_middle_of_a_write_leaves_the_version_before_whole() -> None:
    then = """
class Deadly(np.ndarray):
    @property
    def flags(self):
        os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.readline()
publisher.publish({"a": np.zeros(1 << 20), "w": np.zeros(1 << 20).view(Deadly)}, 2)
"""
    # The version before is opened while its owner lives: whatever program of this user starts to publish after its
    # death may remove what it has left.
    with trainer(then) as (process, published), open_published(published) as tensors:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(timeout=20) == -signal.SIGKILL
        np.testing.assert_array_equal(tensors["w"], np.arange(1000.0))
        reap_dead_segments()
        assert segments_of(process.pid) == []
        np.testing.assert_array_equal(tensors["w"], np.arange(1000.0))


def test_an_unreaped_zombie_counts_as_dead() -> None:
    with trainer("sys.stdin.read()") as (process, published):
        owner = owner_of(published.segment)
        assert owner is not None and not is_dead(owner)
        process.kill()
        assert wait_for_end(process.pid)
        assert is_dead(owner)


def test_a_recycled_pid_is_another_owner_and_a_foreign_namespace_is_left_alone() -> None:
    own = current_owner()
    assert not is_dead(own)
    assert is_dead(dataclasses.replace(own, start_ticks=own.start_ticks - 1))
    assert not is_dead(dataclasses.replace(own, start_ticks=own.start_ticks - 1, pid_namespace=1))
    names = [
        f"/zerokl-policy-{own.pid}-{own.start_ticks - 1}-{own.pid_namespace}-{0:016x}",
        f"/zerokl-policy-{own.pid}-{own.start_ticks - 1}-1-{0:016x}",
        "/zerokl-policy-of-someone-else",
    ]
    for name in names:
        posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=4096).close_fd()
    try:
        reap_dead_segments()
        left = [name for name in names if Path("/dev/shm" + name).exists()]
        assert left == names[1:]
    finally:
        for name in names[1:]:
            posix_ipc.unlink_shared_memory(name)


# -- full memory -------------------------------------------------------------------------------------------------------
FILL = """
import numpy as np
from pathlib import Path
from zerokl.weight_sync import SharedMemoryFullError, WeightPublisher, open_published
with WeightPublisher(buffers=2) as publisher:
    small = publisher.publish({"w": np.arange(1000.0)}, 1)
    try:
        publisher.publish({"w": np.zeros(1 << 20)}, 2)
    except SharedMemoryFullError as error:
        print(error)
    with open_published(small) as tensors:
        assert (tensors["w"] == np.arange(1000.0)).all()
    assert len(list(Path("/dev/shm").glob("zerokl-*"))) >= 1
    publisher.publish({"w": np.zeros(10)}, 3)
"""


def can_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small tmpfs")
def test_a_full_tmpfs_raises_the_typed_error() -> None:
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "{sys.executable}" -c "$1"'
    ended = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", FILL], capture_output=True, timeout=20)
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"cannot reserve 8388608 bytes in /dev/shm" in ended.stdout
    assert b"No space left on device" in ended.stdout


def test_a_file_size_limit_raises_the_typed_error() -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))" + FILL
    ended = subprocess.run([sys.executable, "-c", limited], capture_output=True, timeout=20)
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"cannot reserve 8388608 bytes" in ended.stdout and b"File too large" in ended.stdout


def test_an_owned_segment_is_removed_when_it_is_forgotten() -> None:
    name = OwnedSegment("policy", 1).name
    assert name not in segments_of(os.getpid())
