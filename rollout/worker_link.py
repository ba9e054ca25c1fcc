"""A worker in a child process, seen from the engine: starts it, passes orders, notices at once when it dies.

The child is a fresh interpreter: it inherits the environment and nothing else, so it works from any script, notebook or
thread. Nothing of it stays behind: not after `close`, exit, an exception or Ctrl-C, nor when either side is killed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import zmq

from zerokl.kernels.ops import SampleResult, StepInputs
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import (
    Close,
    Commit,
    Configure,
    Describe,
    Discard,
    Done,
    Drop,
    Execute,
    Facts,
    Failed,
    Hello,
    Message,
    Pin,
    Sampled,
    Stage,
    exception_of,
)
from zerokl.rollout.wire import WireError, decode, encode
from zerokl.rollout.worker import FolderWeights, SharedWeights, TensorWeights, WeightSource, as_array
from zerokl.weight_sync import WeightPublisher, reap_dead_segments

if TYPE_CHECKING:
    from zerokl.rollout.config import EngineConfig

CLOSE_SECONDS = 5.0
"""How long a worker may take to end when asked, before it is killed."""

_TAIL_BYTES = 8192
_MAX_FOLDER_BYTES = 100
"""Bytes; with "/socket" this stays within the kernel's 107 for the address of a Unix socket."""

# `-m` would put the working directory on the import path before `-P` existed (Python 3.11), and a folder named like an
# installed package there would win over it.
_BOOT = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from zerokl.rollout.worker_process import main; main()"
)


class WorkerDiedError(WorkerError):
    """The worker's process ended unasked. The text has the cause and the last lines that it wrote."""


class RemoteTraceback(Exception):  # noqa: N818 - shown as the cause of an error, never raised
    """The worker's own traceback, as text."""


class RemoteWorker:
    """A `zerokl.rollout.worker.Worker` in a process of its own.

    Besides the protocol's errors every method raises WorkerDiedError (a WorkerError) at once when the process dies.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Start the process and wait until it is ready. Raises what LocalWorker(config) raises."""
        reap_dead_segments()
        with ExitStack() as undo:
            self._link = WorkerLink()
            undo.callback(self._link.close)
            self._link.start()
            self._done(Configure(options=dataclasses.asdict(config)))
            undo.pop_all()
        self._close = weakref.finalize(self, self._link.close)

    def execute(self, inputs: StepInputs) -> SampleResult:
        """See Worker. The arrays travel through the socket, which adds about 0.2 ms to a step."""
        reply = self._link.exchange(Execute(inputs=inputs))
        if not isinstance(reply, Sampled):
            self._refuse(reply)
        return reply.result

    def stage_weights(self, source: WeightSource, version: int) -> None:
        """See Worker. Arrays of this process (TensorWeights) are published for the time of the call, which copies them
        once into fresh shared memory; a trainer that publishes by itself re-uses its segments and is faster.
        """
        if isinstance(source, TensorWeights):
            with WeightPublisher("staging", buffers=1) as publisher:
                arrays = ((name, as_array(name, tensor)) for name, tensor in source.tensors.items())
                published = publisher.publish(arrays, version)
                self._done(Stage(source=SharedWeights(published=published), version=version))
        elif isinstance(source, FolderWeights):
            absolute = FolderWeights(path=str(Path(source.path).absolute()))  # working directories may have parted
            self._done(Stage(source=absolute, version=version))
        else:
            self._done(Stage(source=source, version=version))

    def commit_weights(self) -> None:
        """See Worker."""
        self._done(Commit())

    def discard_staged(self) -> None:
        """See Worker."""
        self._done(Discard())

    def pin_weights(self, name: str) -> None:
        """See Worker."""
        self._done(Pin(name=name))

    def drop_weights(self, name: str) -> None:
        """See Worker."""
        self._done(Drop(name=name))

    def describe(self) -> dict[str, Any]:
        """See Worker."""
        reply = self._link.exchange(Describe())
        if not isinstance(reply, Facts):
            self._refuse(reply)
        return reply.facts

    def close(self) -> None:
        """End the process: asked first, killed if it has not ended after 5 seconds."""
        self._close()

    def _done(self, message: Message) -> None:
        reply = self._link.exchange(message)
        if not isinstance(reply, Done):
            self._refuse(reply)

    def _refuse(self, reply: Message) -> NoReturn:
        if isinstance(reply, Failed):
            raise exception_of(reply) from RemoteTraceback("\n" + reply.traceback)
        raise WorkerError(f"unexpected reply {type(reply).__name__} from the worker")


class WorkerLink:
    """The child process and the socket to it. One exchange at a time; `close` may be called from any thread."""

    def __init__(self) -> None:
        """Start the process; `start` waits for it."""
        self._lock = threading.RLock()
        self._owner_pid = os.getpid()
        self._closed = False
        self._sequence = 0
        self._tail = b""
        with ExitStack() as undo:
            self._folder = _private_folder()
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            context = zmq.Context()
            undo.callback(context.term)
            self._socket = context.socket(zmq.PAIR)
            undo.callback(self._socket.close, linger=0)
            self._socket.bind(f"ipc://{self._folder}/socket")
            self._process, self._output = _spawn(self._folder)
            undo.callback(os.close, self._output)
            undo.callback(_end, self._process)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.callback(os.close, self._pidfd)
            self._poller = zmq.Poller()
            for source in (self._socket, self._pidfd, self._output):
                self._poller.register(source, zmq.POLLIN)
            undo.callback(self._ask_to_end)
            self._undo = undo.pop_all()

    def start(self) -> None:
        """Wait until the process is up. The socket needs no name any more then, and its folder goes."""
        with self._lock:
            hello = self._receive(0)
            if not isinstance(hello, Hello):
                raise WorkerError(f"expected Hello from the worker, got {type(hello).__name__}")
            shutil.rmtree(self._folder, ignore_errors=True)

    def exchange(self, message: Message) -> Message:
        """Send an order and wait for its answer. Raises WorkerDiedError, and WorkerError when the link is closed."""
        with self._lock:
            if self._closed:
                raise WorkerError("the worker is closed")
            self._sequence += 1
            try:
                self._socket.send_multipart(encode(self._sequence, message), zmq.NOBLOCK)
            except zmq.Again:  # nobody at the other end
                self._raise_death()
            return self._receive(self._sequence)

    def close(self) -> None:
        """End the process and free everything; idempotent. An exchange in flight in another thread fails."""
        if os.getpid() != self._owner_pid:  # a forked copy of the engine: the worker is not its own
            return
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            self._process.kill()  # the exchange in flight notices, and lets go of the lock
            self._lock.acquire()
        try:
            self._closed = True
            self._undo.close()
        finally:
            self._lock.release()

    def _receive(self, expected: int) -> Message:
        while True:
            events = dict(self._poller.poll())
            if self._output in events:
                self._forward_output()
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
            elif self._pidfd in events:
                self._raise_death()

    def _ask_to_end(self) -> None:
        with suppress(zmq.Again):
            self._socket.send_multipart(encode(self._sequence + 1, Close()), zmq.NOBLOCK)
            self._await_end()

    def _await_end(self) -> None:
        """Wait for the end of the process, for a bounded time, without letting it block on its output."""
        if self._socket in self._poller:
            self._poller.unregister(self._socket)
        deadline = time.monotonic() + CLOSE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            events = dict(self._poller.poll(int(left * 1000) + 1))
            if self._output in events:
                self._forward_output()
            if self._pidfd in events:
                return

    def _raise_death(self) -> NoReturn:
        self._await_end()
        _end(self._process)
        self._forward_output()
        last_words = self._tail.decode(errors="replace").strip()
        said = f"; it wrote:\n{last_words}" if last_words else ""
        raise WorkerDiedError(f"worker process {self._process.pid} {_how_it_ended(self._process.returncode)}{said}")

    def _forward_output(self) -> None:
        """Pass on what the process wrote to this one's stderr, and keep the end of it."""
        with suppress(BlockingIOError):  # all is read for now
            while data := os.read(self._output, 65536):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                with suppress(OSError):  # a closed stderr is no reason to fail
                    os.write(2, data)
            if self._output in self._poller:
                self._poller.unregister(self._output)  # end of file: it would be reported readable for ever


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


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    hint = ", perhaps by the kernel for want of memory" if returncode == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-returncode).name}{hint}"
