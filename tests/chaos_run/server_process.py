"""`rollout-server` as a process of its own, with everything it leaves behind in one place."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from leftovers import children_of, segments_of, wait_for_end

from chaos_run.layouts import Layout

MARK = "ZEROKL_CHAOS_RUN"
"""Environment variable that a server's descendants inherit, whatever becomes of their parents."""
LIMITS = {"heartbeat_seconds": 0.5, "session_seconds": 3.0}
END_SECONDS = 60.0
"""Longer than the server itself waits before it tells where its threads stand and ends."""


class ServerProcess:
    """A server that serves `model` from the constructor's return to `end`. `breach`: see `breached_server.py`."""

    def __init__(self, layout: Layout, model: Path, folder: Path, breach: str | None = None) -> None:
        self.temporary = folder / "tmp"
        """Where the server's temporary files go."""
        self.temporary.mkdir()
        self._log = folder / "server.log"
        self._token = secrets.token_hex(8)
        self.pids: set[int] = set()
        """Every process of the server that was ever seen."""
        program = ["-m", "zerokl.rollout.server.main"]
        if breach is not None:
            program = [str(Path(__file__).with_name("breached_server.py")), breach]
        command = [sys.executable, *program, "--model", str(model), "--bind", "tcp://127.0.0.1:0"]
        for name, value in layout.options.items():
            command += ["--set", f"{name}={json.dumps(value)}"]
        for name, value in LIMITS.items():
            command += ["--limit", f"{name}={value}"]
        environment = {**os.environ, MARK: self._token, "TMPDIR": str(self.temporary), "PYTHONSAFEPATH": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            self.kill()
            raise RuntimeError(f"the server did not start:\n{self.last_words()}")
        self.endpoint = words[-1]
        self.look()

    def look(self) -> set[int]:
        """Its processes of now, the server itself included."""
        found = {self.process.pid, *children_of(self.process.pid)}
        self.pids |= found
        return found

    def last_words(self, size: int = 4000) -> str:
        """The end of what it logged."""
        return self._log.read_text(errors="replace")[-size:]

    def end(self) -> int | None:
        """SIGTERM; the exit status, or None where it had to be killed."""
        self.look()
        self.process.send_signal(signal.SIGTERM)
        ended = wait_for_end(self.process.pid, END_SECONDS)
        if not ended:
            self.kill()
        status = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status if ended else None

    def kill(self) -> None:
        """End it and what it started, at once."""
        self.process.kill()  # nothing, where it has ended
        self.process.wait()
        for pid in self.survivors():
            os.kill(pid, signal.SIGKILL)

    def survivors(self) -> list[int]:
        """Processes that the server or any descendant of it started and that live."""
        return sorted(_marked(self._token))

    def segments(self) -> list[str]:
        """Shared memory that its processes made and that is still there."""
        return sorted(name for pid in self.pids for name in segments_of(pid))


def _marked(token: str) -> Iterator[int]:
    mark = f"{MARK}={token}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
        except (OSError, ValueError):  # another user's, or gone
            continue
