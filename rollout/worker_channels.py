"""The processes of all ranks and the channels to them: orders go to all ranks, then the answers are collected."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import zmq

from zerokl.rollout import worker_child
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.expert_parallel.links import call_off
from zerokl.rollout.messages import Close, Hello, Message
from zerokl.rollout.rank_watch import RankWatch
from zerokl.rollout.supervision import Supervision
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
    """A socket to each rank's process. One exchange at a time, with all ranks or some."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        self.lock = threading.RLock()
        self.awaited: frozenset[int] = frozenset()
        """Ranks that have not answered the exchange that is under way; any thread may read it."""
        self._context = context
        self._name = name
        self._sequence = 0
        self._closed = False
        self._sockets: list[zmq.Socket[bytes]] = []
        self.silent: set[int] = set()
        """Ranks whose processes have not said Hello."""
        self._children: list[WorkerChild] = []
        self._poller = zmq.Poller()

    def bind(self, folder: Path, ranks: Collection[int]) -> None:
        """Have sockets for these ranks in `folder`, in place of those that they had; all, in order, at first."""
        for rank in sorted(ranks):
            if rank < len(self._sockets):
                self._forget(rank)
            else:
                self._sockets.append(self._new_socket())
            self._sockets[rank].bind(address(folder, self._name, rank))

    def attach(self, child: WorkerChild) -> None:
        """Watch the process that is at the other end of its rank's socket; in rank order at first."""
        self._children[child.rank : child.rank + 1] = [child]
        self.silent.add(child.rank)
        for source in (self._sockets[child.rank], child.pidfd, child.output):
            self._poller.register(source, zmq.POLLIN)

    def greet(self) -> None:
        """Wait until all other ends are up. Raises WorkerDiedError as `exchange`."""
        with self.lock:
            self._receive(set(self.silent), 0)

    def exchange(
        self, orders: Mapping[int, Message], enough: Callable[[Message], bool] | None = None
    ) -> dict[int, Message]:
        """Send ranks their orders and wait for their answers.

        An answer for which `enough` holds ends the wait; what has not come by then is dropped when it comes.
        Raises WorkerDiedError as soon as any rank's process has ended, whether or not others still work, and
        WorkerError when the channels are closed.
        """
        with self.lock:
            if self._closed:
                raise WorkerError("the worker is closed")
            self._sequence += 1
            self._send(orders)
            return self._receive(orders, self._sequence, enough)

    def post(self, orders: Mapping[int, Message]) -> None:
        """Send ranks orders that are not answered. Raises as `exchange`, of a rank whose socket nobody reads."""
        with self.lock:
            if self._closed:
                raise WorkerError("the worker is closed")
            self._send(orders)

    def tell(self, message: Message) -> list[bool]:
        """Send all ranks what is not answered; says at which of the other ends there was anybody."""
        return [self._tell(socket, message) for socket in self._sockets]

    def close(self) -> None:
        """Close the sockets; the caller holds the lock."""
        self._closed = True
        for socket in self._sockets:
            socket.close()

    def _forget(self, rank: int) -> None:
        """Close the socket to a process that has ended, and make another."""
        child = self._children[rank]
        for source in (self._sockets[rank], child.pidfd, child.output):
            if source in self._poller:
                self._poller.unregister(source)
        self._sockets[rank].close()
        self._sockets[rank] = self._new_socket()

    def _new_socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PAIR)
        # Before it is bound: libzmq has each connection wait as long as the socket said then, whatever it says later,
        # to send what is queued; and for ever by default, to a process that was killed.
        socket.set(zmq.LINGER, 0)
        return socket

    def _send(self, orders: Mapping[int, Message]) -> None:
        for rank, order in orders.items():
            try:
                self._sockets[rank].send_multipart(encode(self._sequence, order), zmq.NOBLOCK)
            except zmq.Again:  # nobody at the other end
                raise self._children[rank].death() from None

    def _tell(self, socket: zmq.Socket[bytes], message: Message) -> bool:
        with suppress(zmq.Again):
            socket.send_multipart(encode(self._sequence + 1, message), zmq.NOBLOCK)
            return True
        return False

    def _receive(
        self, ranks: Collection[int], expected: int, enough: Callable[[Message], bool] | None = None
    ) -> dict[int, Message]:
        self.awaited = frozenset(ranks)
        replies: dict[int, Message] = {}
        try:
            while self.awaited:
                events = dict(self._poller.poll())
                for rank, (socket, child) in enumerate(zip(self._sockets, self._children, strict=True)):
                    if child.output in events and not child.forward_output() and child.output in self._poller:
                        self._poller.unregister(child.output)  # end of file: it would be reported readable for ever
                    if socket in events:
                        reply = self._answer(rank, expected)
                        if reply is not None and rank in self.awaited:
                            replies[rank] = reply
                            self.awaited -= {rank}
                            if enough is not None and enough(reply):
                                return replies
                    elif child.pidfd in events:  # whatever it had to say has been read
                        raise child.death()
            return replies
        finally:
            self.awaited = frozenset()

    def _answer(self, rank: int, expected: int) -> Message | None:
        """The next message of a socket that has one; None for a late answer to an exchange that was left early."""
        try:
            sequence, reply = decode(self._sockets[rank].recv_multipart())
        except WireError as error:
            raise WorkerError(f"the worker sent what is no message: {error}") from error
        if sequence > self._sequence:
            raise WorkerError(f"the worker answered message {sequence}, the last one sent was {self._sequence}")
        if rank in self.silent:
            if not isinstance(reply, Hello):
                raise WorkerError(f"expected Hello from the worker, got {type(reply).__name__}")
            self.silent.remove(rank)
        return reply if sequence == expected else None


class WorkerLink:
    """The processes of all ranks and two channels to each. `close` and `kill` may be called from any thread."""

    def __init__(self, size: int) -> None:
        """Start the processes, all together, and wait until they are up."""
        self._owner_pid = os.getpid()
        self._closing = False
        self._watch: RankWatch | None = None
        with ExitStack() as undo:
            context = zmq.Context()
            undo.callback(context.term)
            self.children: list[WorkerChild] = []
            """In rank order."""
            self.steps, self.staging = (Channels(context, name) for name in (STEPS, STAGING))
            undo.callback(self.staging.close)
            undo.callback(self.steps.close)
            undo.callback(self._close_children)
            self.folder: Path | None = None
            """Where sockets of the processes are bound, until `forget_folder`."""
            undo.callback(self.forget_folder)
            self.start(range(size))
            undo.callback(self._ask_to_end)
            undo.callback(self._close_watch)
            self._undo = undo.pop_all()

    def start(self, ranks: Collection[int]) -> set[int]:
        """Start a process for each of these ranks, in place of one that has ended, and wait until they are up.

        Those that were started before and did not come so far are replaced too; returns all that are new. Raises
        WorkerDiedError when any rank ends meanwhile, WorkerError when the link is being closed.
        """
        self.forget_folder()
        unborn = self.steps.silent | self.staging.silent
        for rank in unborn:
            self.children[rank].end()
        ranks = {*ranks, *unborn}
        self.folder = _private_folder()
        with self.steps.lock, self.staging.lock:
            for channels in (self.steps, self.staging):
                channels.bind(self.folder, ranks)
            for rank in sorted(ranks):
                self._start(rank)
        self.steps.greet()
        self.staging.greet()
        return ranks

    def _start(self, rank: int) -> None:
        if self._closing:
            raise WorkerError("the worker is closed")
        assert self.folder is not None
        child = WorkerChild(self.folder, rank)
        old = self.children[rank : rank + 1]
        self.children[rank : rank + 1] = [child]
        for channels in (self.steps, self.staging):
            channels.attach(child)
        if self._watch is not None:
            self._watch.replace(child)
        for ended in old:
            ended.close()

    def watch(self, supervision: Supervision, report: Callable[[WorkerChild], None]) -> None:
        """Have what is lost killed, and `report` called, in a thread of its own, when a process ends before `close`."""
        self._watch = RankWatch(self.children, supervision, lambda: self.steps.awaited, report)

    @contextmanager
    def step_of(self, num_tokens: int) -> Iterator[None]:
        """While a step of so many tokens, of all ranks together, is under way."""
        if self._watch is None:
            yield
            return
        self._watch.begin_step(num_tokens)
        try:
            yield
        finally:
            self._watch.end_step()

    def forget_folder(self) -> None:
        """Remove the folder: sockets that are connected need no names any more. Ranks still waiting there give up."""
        if self.folder is not None:
            call_off(self.folder, len(self.children))
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def kill(self) -> None:
        """End all processes at once, for good: an exchange in flight fails, and none is started any more."""
        self._closing = True
        for child in list(self.children):
            child.process.kill()

    def close(self) -> None:
        """End the processes and free everything; idempotent. An exchange in flight in another thread fails."""
        if os.getpid() != self._owner_pid:  # a forked copy of the engine: the workers are not its own
            return
        self._closing = True
        with ExitStack() as held:
            for channels in (self.steps, self.staging):
                if not channels.lock.acquire(timeout=worker_child.CLOSE_SECONDS):
                    self.kill()  # the exchange in flight notices, and lets go of the lock
                    channels.lock.acquire()
                held.callback(channels.lock.release)
            self._undo.close()

    def _ask_to_end(self) -> None:
        told = self.steps.tell(Close())
        await_ends([child for child, heard in zip(self.children, told, strict=True) if heard])

    def _close_children(self) -> None:
        for child in self.children:
            child.close()

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _private_folder() -> Path:
    """A new folder that only this user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="zerokl-"))
    if len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="zerokl-", dir="/tmp"))


__all__ = ["STAGING", "STEPS", "WorkerDiedError", "WorkerLink", "address"]
