"""What a process may leave on the machine; tests look for it. Other processes' things are not looked at."""

from __future__ import annotations

import os
import select
from pathlib import Path


def segments_of(pid: int) -> list[str]:
    """Names of the shared memory segments that a process made."""
    return sorted(f"/{path.name}" for path in Path("/dev/shm").glob(f"zerokl-*-{pid}-*"))


def children_of(pid: int) -> list[int]:
    """Living child processes, zombies included."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def wait_for_end(pid: int, seconds: float = 5.0) -> bool:
    """Wait until a process, which need not be a child, has ended; says whether it did."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
