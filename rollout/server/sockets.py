"""The server's sockets and its thread: a ROUTER for clients, one for authentication, a descriptor to be woken by."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import zmq

from zerokl.rollout.protocol.codec import Frame
from zerokl.rollout.server.dispatcher import Dispatcher
from zerokl.rollout.server.jobs import EngineJobs
from zerokl.rollout.server.keys import ServerKeys, check_endpoint
from zerokl.rollout.server.ledger import Ledger
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.served_call import Outcome, ServedCall
from zerokl.rollout.socket_frames import receive_frames, send_frames

if TYPE_CHECKING:
    from zerokl.rollout.engine import RolloutEngine

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"rollout-server"
_SEND_QUEUE = 64
_RECEIVE_QUEUE = 64
"""Messages that ZMQ itself queues for, and of, one peer."""
_BURST = 256
"""Messages taken from the socket before other things have their turn."""
_FLUSH_SECONDS = 2.0
"""After a drain: how long clients have to fetch what was answered."""

_logger = logging.getLogger(__name__)


class EndpointTakenError(RuntimeError):
    """Another server has the endpoint; it was left alone."""


class RolloutServer:
    """Serves an engine at an endpoint. The engine stays the caller's: it outlives the server.

        with RolloutEngine(config) as engine, RolloutServer("tcp://127.0.0.1:5757") as server:
            server.serve(engine)

    `bind` comes first and costs nothing, so that a second server gives up before it loads a model.
    """

    def __init__(self, endpoint: str, *, keys: ServerKeys | None = None, limits: ServerLimits | None = None) -> None:
        """Bind. Raises ValueError for an endpoint that is none or needs keys, EndpointTakenError."""
        check_endpoint(endpoint, has_keys=keys is not None)
        self._keys = keys
        self._limits = limits or ServerLimits()
        self._mail: deque[tuple[ServedCall, Outcome]] = deque()
        self._stop_seconds: float | None = None
        self._thread: threading.Thread | None = None
        self._dispatcher: Dispatcher | None = None
        with ExitStack() as undo:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._wake_fd)
            self._context = zmq.Context()
            undo.callback(self._context.destroy, linger=0)
            if endpoint.startswith("ipc://"):
                undo.callback(os.close, _lock(endpoint))
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(_ZAP_ENDPOINT)
            self._router = self._bind(endpoint)
            self._poller = zmq.Poller()
            for source in (self._router, self._zap, self._wake_fd):
                self._poller.register(source, zmq.POLLIN)
            self._undo = undo.pop_all()
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where it is bound; a port 0 is filled in."""

    def _bind(self, endpoint: str) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, self._limits.max_message_bytes)
        router.set(zmq.SNDHWM, _SEND_QUEUE)
        router.set(zmq.RCVHWM, _RECEIVE_QUEUE)
        router.set(zmq.LINGER, int(1000 * _FLUSH_SECONDS))
        router.set(zmq.HEARTBEAT_IVL, int(1000 * self._limits.heartbeat_seconds))
        if self._keys is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_SECRETKEY, self._keys.secret)
            router.set(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        try:
            router.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise EndpointTakenError(f"{endpoint} is taken by another server") from None
            raise ValueError(f"endpoint {endpoint!r} cannot be bound: {error}") from None
        return router

    # -- life ---------------------------------------------------------------------------------------------------------
    def serve(self, engine: RolloutEngine, name: str = "rollout-server") -> None:
        """Serve until `stop`, in this thread. Calls in flight then have the time that `stop` gave to finish."""
        ledger = Ledger(self._limits)
        jobs = EngineJobs(engine, self._limits, ledger, self._post, lambda: dispatcher.facts())
        self._dispatcher = dispatcher = Dispatcher(jobs, self._limits, ledger, self._send, self._wake, name)
        try:
            while self._stop_seconds is None:
                self._turn(dispatcher)
            self._drain(dispatcher, self._stop_seconds)
        finally:
            jobs.close()

    def start(self, engine: RolloutEngine, name: str = "rollout-server") -> None:
        """`serve` in a thread of its own; `close` ends it."""
        self._thread = threading.Thread(target=self.serve, args=(engine, name), name="zerokl-server", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Have `serve` return; calls in flight may finish for so long, and are aborted then. From any thread."""
        self._stop_seconds = drain_seconds
        self._wake()

    def facts(self) -> dict[str, Any]:
        """Counters of the server, from any thread; none before it serves."""
        return {} if self._dispatcher is None else self._dispatcher.facts()

    def close(self) -> None:
        """Stop, and free the endpoint; idempotent."""
        if self._thread is not None:
            self.stop(self._stop_seconds or 0.0)
            self._thread.join()
            self._thread = None
        self._undo.close()

    def __enter__(self) -> RolloutServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the server's thread ------------------------------------------------------------------------------------------
    def _turn(self, dispatcher: Dispatcher) -> None:
        """Wait for something, and act on it."""
        now = time.monotonic()
        due = dispatcher.tick(now)
        ready = dict(self._poller.poll(int(1000 * max(0.0, due - now)) + 1))
        if self._zap in ready:
            self._authenticate()
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
            while self._mail:
                dispatcher.complete(*self._mail.popleft())
            dispatcher.pump_all()
        if self._router in ready:
            self._receive(dispatcher)

    def _receive(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        for _ in range(_BURST):
            try:
                route, *frames = receive_frames(self._router)
            except zmq.Again:
                return
            user = ""
            if self._keys is not None:
                user = str(route.get("User-Id"))
            dispatcher.receive(route.bytes, user, [frame.buffer for frame in frames], now)

    def _send(self, route: bytes, frames: Sequence[Frame]) -> bool:
        try:
            send_frames(self._router, [route, *frames])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def _authenticate(self) -> None:
        """Answer a question of ZMQ's authentication protocol: may a client with this key connect?"""
        version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        key = zmq.utils.z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        allowed = self._keys is not None and key in self._keys.clients
        status = (b"200", b"OK", key) if allowed else (b"400", b"unknown key", b"")
        if not allowed:
            _logger.warning("client refused", extra={"key": key.decode()})
        self._zap.send_multipart([version, request, *status, b""])

    def _drain(self, dispatcher: Dispatcher, seconds: float) -> None:
        dispatcher.begin_closing()
        end = time.monotonic() + seconds
        while dispatcher.has_open_calls and time.monotonic() < end:
            self._turn(dispatcher)
        dispatcher.call_off_all()
        end = time.monotonic() + _FLUSH_SECONDS
        while not dispatcher.is_idle and time.monotonic() < end:
            self._turn(dispatcher)

    # -- other threads ------------------------------------------------------------------------------------------------
    def _post(self, call: ServedCall, outcome: Outcome) -> None:
        self._mail.append((call, outcome))
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)


def _lock(endpoint: str) -> int:
    """Hold a lock beside an ipc endpoint: ZMQ itself would take the endpoint away from a living server."""
    path = endpoint.removeprefix("ipc://") + ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(f"endpoint {endpoint!r} cannot be bound: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise EndpointTakenError(f"{endpoint} is taken by another server") from None
    return descriptor
