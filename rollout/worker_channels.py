"""The processes of all ranks and the channels to them: orders go to all ranks, then the answers are collected."""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import zmq

from zerokl.rollout import worker_child
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import Close, Hello, Message
from zerokl.rollout.wire import WireError, decode, encode
from zerokl.rollout.worker_child import WorkerChild, WorkerDiedError, await_ends

STEPS, STAGING = "steps", "staging"
"""The channels of a worker: one for all orders, one for weights that are staged meanwhile."""

_MAX_FOLDER_BYTES = 90
"""Bytes; with "/staging-12345678" this stays within the kernel's 107 for the address of a Unix socket."""


def address(folder: Path, name: str, rank: int) -> str:
    """Where the channel of a rank is bound."""
    return f"ipc://{folder}/{name}-{rank}"


class Channels:
    """A socket to each rank's process. One exchange at a time, with all ranks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, name: str, size: int) -> None:
        self.lock = threading.RLock()
        self._sequence = 0
        self._closed = False
        self._sockets = [context.socket(zmq.PAIR) for _ in range(size)]
        for rank, socket in enumerate(self._sockets):
            socket.bind(address(folder, name, rank))
        self._children: Sequence[WorkerChild] = ()
        self._poller = zmq.Poller()

    def attach(self, children: Sequence[WorkerChild]) -> None:
        """Watch the processes that are at the other ends, in rank order."""
        self._children = children
        for socket, child in zip(self._sockets, children, strict=True):
            for source in (socket, child.pidfd, child.output):
                self._poller.register(source, zmq.POLLIN)

    def greet(self) -> None:
        """Wait until the other ends are up."""
        with self.lock:
            for hello in self._receive(0):
                if not isinstance(hello, Hello):
                    raise WorkerError(f"expected Hello from the worker, got {type(hello).__name__}")

    def exchange(
        self, orders: Sequence[Message], enough: Callable[[Message], bool] | None = None
    ) -> list[Message | None]:
        """Send each rank its order and wait for all answers, in rank order.

        An answer for which `enough` holds ends the wait; what has not come by then is None, and dropped when it comes.
        Raises WorkerDiedError as soon as any rank's process has ended, whether or not others still work, and
        WorkerError when the channels are closed.
        """
        with self.lock:
            if self._closed:
                raise WorkerError("the worker is closed")
            self._sequence += 1
            for child, socket, order in zip(self._children, self._sockets, orders, strict=True):
                try:
                    socket.send_multipart(encode(self._sequence, order), zmq.NOBLOCK)
                except zmq.Again:  # nobody at the other end
                    child.raise_death()
            return self._receive(self._sequence, enough)

    def tell(self, message: Message) -> list[bool]:
        """Send all ranks what is not answered; says at which of the other ends there was anybody."""
        return [self._tell(socket, message) for socket in self._sockets]

    def close(self) -> None:
        """Close the sockets; the caller holds the lock."""
        self._closed = True
        for socket in self._sockets:
            socket.close(linger=0)

    def _tell(self, socket: zmq.Socket[bytes], message: Message) -> bool:
        with suppress(zmq.Again):
            socket.send_multipart(encode(self._sequence + 1, message), zmq.NOBLOCK)
            return True
        return False

    def _receive(self, expected: int, enough: Callable[[Message], bool] | None = None) -> list[Message | None]:
        replies: list[Message | None] = [None] * len(self._sockets)
        num_left = len(replies)
        while num_left:
            events = dict(self._poller.poll())
            for rank, (socket, child) in enumerate(zip(self._sockets, self._children, strict=True)):
                if child.output in events and not child.forward_output() and child.output in self._poller:
                    self._poller.unregister(child.output)  # end of file: it would be reported readable for ever
                if socket in events:
                    reply = _answer(socket, expected)
                    if reply is not None:
                        replies[rank] = reply
                        num_left -= 1
                        if enough is not None and enough(reply):
                            return replies
                elif child.pidfd in events:  # whatever it had to say has been read
                    child.raise_death()
        return replies


def _answer(socket: zmq.Socket[bytes], expected: int) -> Message | None:
    """The next message of a socket that has one; None for a late answer to an exchange that was left early."""
    try:
        sequence, reply = decode(socket.recv_multipart())
    except WireError as error:
        raise WorkerError(f"the worker sent what is no message: {error}") from error
    if sequence > expected:
        raise WorkerError(f"the worker answered message {sequence}, the last one sent was {expected}")
    return reply if sequence == expected else None


class WorkerLink:
    """The processes of all ranks and two channels to each. `close` may be called from any thread."""

    def __init__(self, size: int) -> None:
        """Start the processes, all together; `start` waits for them."""
        self._owner_pid = os.getpid()
        with ExitStack() as undo:
            self.folder = _private_folder()
            """Where sockets of the processes are bound, until `forget_folder`."""
            undo.callback(self.forget_folder)
            context = zmq.Context()
            undo.callback(context.term)
            self._children: list[WorkerChild] = []
            self.steps, self.staging = (Channels(context, self.folder, name, size) for name in (STEPS, STAGING))
            undo.callback(self.staging.close)
            undo.callback(self.steps.close)
            for rank in range(size):
                child = WorkerChild(self.folder, rank)
                undo.callback(child.close)
                self._children.append(child)
            self.steps.attach(self._children)
            self.staging.attach(self._children)
            undo.callback(self._ask_to_end)
            self._undo = undo.pop_all()

    def start(self) -> None:
        """Wait until the processes are up."""
        self.steps.greet()
        self.staging.greet()

    def watch(self, report: Callable[[WorkerDiedError], None]) -> None:
        """Have `report` called, in a thread of its own, when a process ends before `close`, idle or not; once."""
        stop = os.eventfd(0)
        thread = threading.Thread(target=self._watch, args=(stop, report), name="zerokl-rank-watch", daemon=True)
        thread.start()
        self._undo.callback(os.close, stop)
        self._undo.callback(thread.join)
        self._undo.callback(os.eventfd_write, stop, 1)

    def _watch(self, stop: int, report: Callable[[WorkerDiedError], None]) -> None:
        children = {child.pidfd: child for child in self._children}
        poll = select.poll()
        for descriptor in (stop, *children):
            poll.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poll.poll()]
        if stop not in ended:
            try:
                children[ended[0]].raise_death()
            except WorkerDiedError as error:
                report(error)

    def forget_folder(self) -> None:
        """Remove the folder: sockets that are connected need no names any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """End the processes and free everything; idempotent. An exchange in flight in another thread fails."""
        if os.getpid() != self._owner_pid:  # a forked copy of the engine: the workers are not its own
            return
        with ExitStack() as held:
            for channels in (self.steps, self.staging):
                if not channels.lock.acquire(timeout=worker_child.CLOSE_SECONDS):
                    for child in self._children:
                        child.process.kill()  # the exchange in flight notices, and lets go of the lock
                    channels.lock.acquire()
                held.callback(channels.lock.release)
            self._undo.close()

    def _ask_to_end(self) -> None:
        told = self.steps.tell(Close())
        await_ends([child for child, heard in zip(self._children, told, strict=True) if heard])


def _private_folder() -> Path:
    """A new folder that only this user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="zerokl-"))
    if len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="zerokl-", dir="/tmp"))


__all__ = ["STAGING", "STEPS", "WorkerDiedError", "WorkerLink", "address"]
