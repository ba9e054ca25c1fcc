"""POSIX shared memory segments that know their owner.

A segment's name says which process made it, by pid, start time and pid namespace. So what a killed process left behind
can be told from what a living one uses, even after its pid was given to another.

Leases are `flock`s on the segment: readers hold it shared for as long as they map it, the writer takes it exclusively
while it writes. The kernel drops a lock with the last descriptor of its holder, so a reader that is killed holds
nothing up.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from zerokl.weight_sync.errors import (
    BufferLeasedError,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    SharedMemoryFullError,
)

SHM_FOLDER = Path("/dev/shm")
"""Where Linux keeps POSIX shared memory by name."""

_NAME = re.compile(r"/zerokl-([a-z0-9_]{1,32})-(\d{1,10})-(\d{1,20})-(\d{1,20})-([0-9a-f]{16})")
_LABEL = re.compile(r"[a-z0-9_]{1,32}")
_FULL = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process, told apart from any other that ever had its pid."""

    pid: int
    start_ticks: int
    """Clock ticks since boot at which it started: field 22 of /proc/pid/stat."""
    pid_namespace: int
    """Inode of the pid namespace: containers may share memory and yet number their processes apart."""


def current_owner() -> Owner:
    """This process."""
    pid = os.getpid()
    started = _start_ticks(pid)
    assert started is not None, "this process is missing from /proc"
    return Owner(pid=pid, start_ticks=started, pid_namespace=_pid_namespace())


def is_dead(owner: Owner) -> bool:
    """Whether the process is known to be gone. A process of another pid namespace cannot be seen: False."""
    return owner.pid_namespace == _pid_namespace() and _start_ticks(owner.pid) != owner.start_ticks


def owner_of(segment_name: str) -> Owner | None:
    """The process in a segment's name; None when the name is not one of ours."""
    match = _NAME.fullmatch(segment_name)
    if match is None:
        return None
    return Owner(pid=int(match[2]), start_ticks=int(match[3]), pid_namespace=int(match[4]))


def reap_dead_segments() -> list[str]:
    """Remove the segments whose owner is dead and return their names. Those of a living owner are never touched.

    Only segments of this user are looked at: another user's processes may be hidden from /proc.
    """
    return [name for name in sorted(f"/{path.name}" for path in SHM_FOLDER.iterdir()) if reap_if_dead(name)]


def reap_if_dead(segment_name: str) -> bool:
    """Remove one segment if its owner is dead; says whether it did. Mappings that exist stay valid."""
    owner = owner_of(segment_name)
    if owner is None or not is_dead(owner):
        return False
    try:
        if (SHM_FOLDER / segment_name[1:]).stat().st_uid != os.geteuid():
            return False
        posix_ipc.unlink_shared_memory(segment_name)
    except (FileNotFoundError, posix_ipc.ExistentialError):  # another process was faster
        return False
    return True


class OwnedSegment:
    """A writable segment made by this process and removed with it (on exit, exception or Ctrl-C alike).

    `size` bytes are reserved at once: a segment that exists can be written to its end. Raises SharedMemoryFullError
    when they cannot be had (without the reservation, a write to a full tmpfs would kill the process by SIGBUS).
    """

    def __init__(self, label: str, size: int) -> None:
        if not _LABEL.fullmatch(label):
            raise ValueError(f"label {label!r} must consist of 1 to 32 of a-z, 0-9 and _")
        owner = current_owner()
        self.name = f"/zerokl-{label}-{owner.pid}-{owner.start_ticks}-{owner.pid_namespace}-{secrets.token_hex(8)}"
        self.size = max(size, mmap.PAGESIZE)
        memory = posix_ipc.SharedMemory(self.name, posix_ipc.O_CREX, mode=0o600)
        with ExitStack() as undo:
            undo.callback(_remove, self.name, memory.fd, owner.pid)
            _reserve(memory.fd, self.size)
            self.memory = mmap.mmap(memory.fd, self.size)
            self._fd = memory.fd
            self._finalizer = weakref.finalize(self, undo.pop_all().close)

    @contextmanager
    def writing(self, *, wait: bool = False) -> Iterator[mmap.mmap]:
        """Hold the segment against readers. When one has it mapped raises BufferLeasedError at once, or waits."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BufferLeasedError(f"segment {self.name} is still mapped by a reader") from error
        try:
            yield self.memory
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Remove the segment; idempotent. Readers that have it mapped keep what they see."""
        if self._finalizer.alive:
            self._finalizer()
            self.memory.close()


class Attachment:
    """An existing segment, mapped read-only; its content may be read under a lease.

    Raises SegmentMissingError; a name that this room never makes counts as missing.
    """

    def __init__(self, segment_name: str) -> None:
        if owner_of(segment_name) is None:
            raise SegmentMissingError(f"segment {segment_name!r:.200} is not a name that zerokl.weight_sync makes")
        try:
            shared = posix_ipc.SharedMemory(segment_name, read_only=True)
        except posix_ipc.ExistentialError as error:
            raise SegmentMissingError(f"segment {segment_name} does not exist: its publisher closed or died") from error
        self.name = segment_name
        self._fd: int = shared.fd
        self._memory: mmap.mmap | None = None

    def lock(self, size: int) -> mmap.mmap:
        """Take the shared lease and give the mapping.

        Raises SegmentTruncatedError when there are fewer than `size` bytes, SegmentBusyError when its owner is writing.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SegmentBusyError(f"segment {self.name} is being overwritten by a later publication") from error
        actual = os.fstat(self._fd).st_size
        if actual < max(size, 1):
            self.unlock()
            raise SegmentTruncatedError(f"segment {self.name} has {actual} bytes, its manifest says {size}")
        if self._memory is None:
            self._memory = mmap.mmap(self._fd, actual, prot=mmap.PROT_READ)
        return self._memory

    def unlock(self) -> None:
        """End the lease; the mapping stays."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    @property
    def is_unlinked(self) -> bool:
        """Whether the name is gone: what is mapped here nobody else can have any more."""
        return os.fstat(self._fd).st_nlink == 0

    def close(self) -> None:
        """Let go; once. A view that was kept keeps the mapping, and a lease that was not ended, until it is gone."""
        os.close(self._fd)
        if self._memory is not None:
            with suppress(BufferError):
                self._memory.close()


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        space = os.statvfs(SHM_FOLDER)
        free = space.f_bavail * space.f_frsize
        reason = os.strerror(error.errno)
        raise SharedMemoryFullError(f"cannot reserve {size} bytes in {SHM_FOLDER} ({free} free): {reason}") from error


def _remove(segment_name: str, fd: int, owner_pid: int) -> None:
    """Close and unlink; in a forked child of the owner only close: the segment is not the child's to remove."""
    os.close(fd)
    if os.getpid() != owner_pid:
        return
    with suppress(posix_ipc.ExistentialError):  # removed by hand
        posix_ipc.unlink_shared_memory(segment_name)


def _start_ticks(pid: int) -> int | None:
    """Start time of a living process; None when there is none, or only its exit status is left (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # after the command's name, which may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
