"""A child process and the channels to it: starting, orders and answers, its death, its last words."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import zmq

from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import Close, Hello, Message
from zerokl.rollout.wire import WireError, decode, encode

CLOSE_SECONDS = 5.0
"""How long a worker may take to end when asked, before it is killed."""

STEPS, STAGING = "steps", "staging"
"""The channels of a worker: one for all orders, one for weights that are staged meanwhile."""

_TAIL_BYTES = 8192
_MAX_FOLDER_BYTES = 98
"""Bytes; with "/staging" this stays within the kernel's 107 for the address of a Unix socket."""

# `-m` would put the working directory on the import path before `-P` existed (Python 3.11), and a folder named like an
# installed package there would win over it.
_BOOT = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from zerokl.rollout.worker_process import main; main()"
)


class WorkerDiedError(WorkerError):
    """The worker's process ended unasked. The text has the cause and the last lines that it wrote."""


class WorkerChild:
    """The process. Its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._tail = b""
        with ExitStack() as undo:
            self.process, self.output = _spawn(folder)
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

    def raise_death(self) -> NoReturn:
        """Raise WorkerDiedError; the process has ended, or is ended here after a bounded wait."""
        self.await_end()
        self.end()
        self.forward_output()
        last_words = self._tail.decode(errors="replace").strip()
        said = f"; it wrote:\n{last_words}" if last_words else ""
        raise WorkerDiedError(f"worker process {self.process.pid} {_how_it_ended(self.process.returncode)}{said}")

    def await_end(self) -> None:
        """Wait for the end of the process, for a bounded time, without letting it block on its output."""
        poller = zmq.Poller()
        for source in (self.pidfd, self.output):
            poller.register(source, zmq.POLLIN)
        deadline = time.monotonic() + CLOSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            events = dict(poller.poll(int(left * 1000) + 1))
            if self.output in events and not self.forward_output():
                poller.unregister(self.output)  # it would be reported readable for ever
            if self.pidfd in events:
                return

    def end(self) -> None:
        """Kill the process if it lives, and reap it."""
        with self._lock:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End the process; idempotent."""
        self._undo.close()


class Channel:
    """A socket to the child. One exchange at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, name: str) -> None:
        self.lock = threading.RLock()
        self._sequence = 0
        self._closed = False
        self._socket = context.socket(zmq.PAIR)
        self._socket.bind(f"ipc://{folder}/{name}")
        self._child: WorkerChild | None = None
        self._poller = zmq.Poller()

    def attach(self, child: WorkerChild) -> None:
        """Watch the process that is at the other end."""
        self._child = child
        for source in (self._socket, child.pidfd, child.output):
            self._poller.register(source, zmq.POLLIN)

    def greet(self) -> None:
        """Wait until the other end is up."""
        with self.lock:
            hello = self._receive(0)
            if not isinstance(hello, Hello):
                raise WorkerError(f"expected Hello from the worker, got {type(hello).__name__}")

    def exchange(self, message: Message) -> Message:
        """Send an order and wait for its answer. Raises WorkerDiedError, and WorkerError when the channel is closed."""
        with self.lock:
            if self._closed:
                raise WorkerError("the worker is closed")
            self._sequence += 1
            try:
                self._socket.send_multipart(encode(self._sequence, message), zmq.NOBLOCK)
            except zmq.Again:  # nobody at the other end
                self._alive().raise_death()
            return self._receive(self._sequence)

    def tell(self, message: Message) -> bool:
        """Send what is not answered; says whether anybody was at the other end."""
        with suppress(zmq.Again):
            self._socket.send_multipart(encode(self._sequence + 1, message), zmq.NOBLOCK)
            return True
        return False

    def close(self) -> None:
        """Close the socket; the caller holds the lock."""
        self._closed = True
        self._socket.close(linger=0)

    def _alive(self) -> WorkerChild:
        assert self._child is not None, "a channel without a process"
        return self._child

    def _receive(self, expected: int) -> Message:
        child = self._alive()
        while True:
            events = dict(self._poller.poll())
            if child.output in events and not child.forward_output() and child.output in self._poller:
                self._poller.unregister(child.output)  # end of file: it would be reported readable for ever
            if self._socket in events:
                try:
                    sequence, reply = decode(self._socket.recv_multipart())
                except WireError as error:
                    raise WorkerError(f"the worker sent what is no message: {error}") from error
                if sequence == expected:
                    return reply
                # A lower number answers an exchange whose caller was interrupted while it waited.
                if sequence > expected:
                    raise WorkerError(f"the worker answered message {sequence}, the last one sent was {expected}")
            elif child.pidfd in events:
                child.raise_death()


class WorkerLink:
    """The child process and two channels to it. `close` may be called from any thread."""

    def __init__(self) -> None:
        """Start the process; `start` waits for it."""
        self._owner_pid = os.getpid()
        with ExitStack() as undo:
            self._folder = _private_folder()
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            context = zmq.Context()
            undo.callback(context.term)
            self.steps, self.staging = (Channel(context, self._folder, name) for name in (STEPS, STAGING))
            undo.callback(self.staging.close)
            undo.callback(self.steps.close)
            self._child = WorkerChild(self._folder)
            undo.callback(self._child.close)
            self.steps.attach(self._child)
            self.staging.attach(self._child)
            undo.callback(self._ask_to_end)
            self._undo = undo.pop_all()

    def start(self) -> None:
        """Wait until the process is up. The sockets need no names any more then, and their folder goes."""
        self.steps.greet()
        self.staging.greet()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """End the process and free everything; idempotent. An exchange in flight in another thread fails."""
        if os.getpid() != self._owner_pid:  # a forked copy of the engine: the worker is not its own
            return
        with ExitStack() as held:
            for channel in (self.steps, self.staging):
                if not channel.lock.acquire(timeout=CLOSE_SECONDS):
                    self._child.process.kill()  # the exchange in flight notices, and lets go of the lock
                    channel.lock.acquire()
                held.callback(channel.lock.release)
            self._undo.close()

    def _ask_to_end(self) -> None:
        if self.steps.tell(Close()):
            self._child.await_end()


def _private_folder() -> Path:
    """A new folder that only this user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="zerokl-"))
    if len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="zerokl-", dir="/tmp"))


def _spawn(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The process and the readable, non-blocking end of the pipe that takes its stdout and stderr."""
    output, child_output = os.pipe()
    os.set_blocking(output, False)
    try:
        command = [sys.executable, "-c", _BOOT, str(folder), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=child_output, stderr=child_output)
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
