"""The child process of a rank: starting it, its death, its last words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import zmq

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.supervision import Fault

CLOSE_SECONDS = 5.0
"""How long a worker may take to end when asked, before it is killed."""

_TAIL_BYTES = 8192

# `-m` would put the working directory on the import path before `-P` existed (Python 3.11), and a folder named like an
# installed package there would win over it.
_BOOT = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from zerokl.rollout.worker_life import begin; begin(); "
    "from zerokl.rollout.worker_process import main; main()"
)


class WorkerDiedError(WorkerError):
    """A worker's process ended unasked. The text has its rank, the cause and the last lines that it wrote."""


class WorkerChild:
    """The process of one rank. Its methods may be called from any thread."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank = rank
        self.fault: Fault | None = None
        """Why the process was killed from here; None: it was not."""
        self._lock = threading.Lock()
        self._tail = b""
        with ExitStack() as undo:
            self.heartbeat, child_heartbeat = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            """Readable, non-blocking: a byte for every sign of life."""
            undo.callback(os.close, self.heartbeat)
            try:
                self.process, self.output = _spawn(folder, rank, child_heartbeat)
            finally:
                os.close(child_heartbeat)
            undo.callback(os.close, self.output)
            undo.callback(self.end)
            self.pidfd = os.pidfd_open(self.process.pid)
            undo.callback(os.close, self.pidfd)
            self._undo = undo.pop_all()

    def forward_output(self) -> bool:
        """Pass on what the process wrote to this one's stderr, and keep the end of it; False at the end of file."""
        with suppress(BlockingIOError):  # all is read for now
            while data := os.read(self.output, 65536):
                with self._lock:
                    self._tail = (self._tail + data)[-_TAIL_BYTES:]
                with suppress(OSError):  # a closed stderr is no reason to fail
                    os.write(2, data)
            return False
        return True

    def take_heartbeats(self) -> bool:
        """Whether there was any sign of life since the last call; False at the end of file too."""
        with suppress(BlockingIOError):
            return bool(os.read(self.heartbeat, 4096))
        return False

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, reaped or not."""
        with self._lock:
            return self.process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process, and none has let it go on."""
        with self._lock, suppress(ChildProcessError):  # it has just ended
            if self.process.poll() is None:
                return os.waitid(os.P_PIDFD, self.pidfd, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def condemn(self, fault: Fault) -> None:
        """Kill a process that is of no use any more, stopped ones included; `raise_death` says why."""
        with self._lock:
            if self.process.poll() is None:
                self.fault = self.fault or fault
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def death(self) -> WorkerDiedError:
        """What to raise of a process that has ended, or is ended here after a bounded wait."""
        await_ends([self])
        self.end()
        self.forward_output()
        last_words = self._tail.decode(errors="replace").strip()
        said = f"; it wrote:\n{last_words}" if last_words else ""
        how = _how_it_ended(self.process.returncode) if self.fault is None else f"was killed: {self.fault.text}"
        return WorkerDiedError(f"rank {self.rank}: worker process {self.process.pid} {how}{said}")

    def end(self) -> None:
        """Kill the process if it lives, and reap it."""
        with self._lock:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End the process; idempotent."""
        self._undo.close()


def await_ends(children: Sequence[WorkerChild]) -> None:
    """Wait until the processes have ended, for a bounded time, without letting one block on its output."""
    poller = zmq.Poller()
    for child in children:
        poller.register(child.pidfd, zmq.POLLIN)
        poller.register(child.output, zmq.POLLIN)
    alive = {child.pidfd for child in children}
    deadline = time.monotonic() + CLOSE_SECONDS
    while alive and (left := deadline - time.monotonic()) > 0:
        events = dict(poller.poll(int(left * 1000) + 1))
        for child in children:
            if child.output in events and not child.forward_output():
                poller.unregister(child.output)  # it would be reported readable for ever
            if child.pidfd in events:
                poller.unregister(child.pidfd)
                alive.remove(child.pidfd)


def _spawn(folder: Path, rank: int, heartbeat: int) -> tuple[subprocess.Popen[bytes], int]:
    """The process and the readable, non-blocking end of the pipe that takes its stdout and stderr."""
    output, child_output = os.pipe()
    os.set_blocking(output, False)
    try:
        command = [sys.executable, "-c", _BOOT, str(folder), str(rank), str(os.getpid()), str(heartbeat)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=child_output, stderr=child_output, pass_fds=[heartbeat]
        )
    except OSError:
        os.close(output)
        raise
    finally:
        os.close(child_output)
    return process, output


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    hint = ", perhaps by the kernel for want of memory" if returncode == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-returncode).name}{hint}"
