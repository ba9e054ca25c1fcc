"""What a server holds while it is idle, and what it leaves behind when it has ended."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from chaos_run.server_process import ServerProcess
from zerokl.rollout.client import RolloutClient

_POLL_SECONDS = 0.05
_SEGMENT = re.compile(r"/dev/shm/zerokl-([a-z0-9_]+)-.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Of a server process."""

    num_children: int
    descriptors: Counter[str]
    """By kind: "socket", "anon_inode", "pipe", "segment LABEL", or the file."""
    num_threads: int
    segments: int


def holdings(server: ServerProcess) -> Holdings:
    """What the server's process holds now."""
    process = Path(f"/proc/{server.process.pid}")
    kinds: Counter[str] = Counter()
    for entry in (process / "fd").iterdir():
        try:
            kinds[_SEGMENT.sub(r"segment \1", str(entry.readlink()).split(":[")[0])] += 1
        except FileNotFoundError:  # closed meanwhile
            continue
    return Holdings(
        num_children=len(server.look()) - 1,
        descriptors=kinds,
        num_threads=len(list((process / "task").iterdir())),
        segments=len(server.segments()),
    )


def wait_idle(client: RolloutClient, seconds: float) -> list[str]:
    """Wait until the server knows of no client but this one and of no request; what is still there after `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while left := _unfinished(client):
        if time.monotonic() > deadline:
            return left
        pause.wait(_POLL_SECONDS)
    return []


def _unfinished(client: RolloutClient) -> list[str]:
    metrics = client.metrics()
    expected = {
        "waiting": 0,
        "running": 0,
        "held": 0,
        "free_blocks": metrics["total_blocks"],
        "server_clients": 1,
        "server_calls": 1,  # this one
    }
    return [f"{name} is {metrics[name]}, not {value}" for name, value in expected.items() if metrics[name] != value]


def grown(before: Holdings, after: Holdings) -> list[str]:
    """What an idle server holds more of than when it was idle before."""
    found = [
        f"{after.descriptors[kind] - count} more descriptors of {kind}"
        for kind, count in ((kind, before.descriptors[kind]) for kind in after.descriptors)
        if after.descriptors[kind] > count
    ]
    for name in ("num_children", "num_threads", "segments"):
        one, other = getattr(before, name), getattr(after, name)
        if other > one:
            found.append(f"{name} grew from {one} to {other}")
    return found


def left_behind(server: ServerProcess) -> list[str]:
    """Processes, segments and files of a server that has ended."""
    found = [f"process {pid}" for pid in server.survivors()]
    found += [f"segment {name}" for name in server.segments()]
    return found + [f"file {path.name}" for path in sorted(server.temporary.iterdir())]
