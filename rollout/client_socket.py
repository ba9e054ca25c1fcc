"""The socket of a client and its monitor: made together, dropped together, and made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import zmq
import zmq.utils.monitor

from zerokl.rollout.protocol.codec import PROTOCOL_VERSION, Frame, Message, encode
from zerokl.rollout.socket_frames import receive_frames, send_frames

_RECONNECT_MS = 50
_LOST = zmq.EVENT_DISCONNECTED
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
Ready = Literal["message", "event", "wake"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How to reach a server."""

    endpoint: str
    name: str
    server_key: bytes | None
    """CURVE public key of the server; with it go the client's own two."""
    public_key: bytes
    secret_key: bytes
    reconnect_seconds: float
    """How long a call waits for a connection before it fails."""


class ClientSocket:
    """A connection that says hello as soon as it is made. One thread's."""

    def __init__(self, options: LinkOptions, wake_fd: int) -> None:
        """`wake_fd`: a descriptor that ends a `wait`."""
        self._options = options
        self._wake_fd = wake_fd
        self._context = zmq.Context()
        self._socket, self._monitor, self._poller = self._open()
        self._say_hello(None, 0)

    def reconnect(self, session: bytes | None, received: int) -> None:
        """Drop the connection and make another; `session` and the last message received are what hello says."""
        self._drop(0)
        self._socket, self._monitor, self._poller = self._open()
        self._say_hello(session, received)

    def wait(self, milliseconds: int) -> set[Ready]:
        """What there is to take, after so long at most: a message, an event of the connection, a word on `wake_fd`."""
        sources: dict[Any, Ready] = {self._socket: "message", self._monitor: "event", self._wake_fd: "wake"}
        return {sources[source] for source, _ in self._poller.poll(milliseconds)}

    def receive(self) -> list[Frame] | None:
        """Frames of the next message, if there is one."""
        try:
            return [frame.buffer for frame in receive_frames(self._socket)]
        except zmq.Again:
            return None

    def send(self, frames: Sequence[Frame]) -> None:
        """Queue a message."""
        send_frames(self._socket, frames)  # it always fits: the socket has no bound

    def event(self) -> Literal["lost", "refused"] | None:
        """Take an event, if there is one: the connection broke, or the handshake failed."""
        try:
            message = zmq.utils.monitor.recv_monitor_message(self._monitor, zmq.NOBLOCK)
        except zmq.Again:
            return None
        return "lost" if message["event"] == _LOST else "refused"

    def close(self, linger_ms: int) -> None:
        """Free everything; what is queued has so long to be sent."""
        self._drop(linger_ms)
        self._context.term()

    def _open(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes], zmq.Poller]:
        options = self._options
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)  # the server's window bounds both
        if options.server_key is not None:
            socket.set(zmq.CURVE_SERVERKEY, options.server_key)
            socket.set(zmq.CURVE_PUBLICKEY, options.public_key)
            socket.set(zmq.CURVE_SECRETKEY, options.secret_key)
        monitor = socket.get_monitor_socket(_LOST | _REFUSED)
        socket.connect(options.endpoint)
        poller = zmq.Poller()
        for source in (socket, monitor, self._wake_fd):
            poller.register(source, zmq.POLLIN)
        return socket, monitor, poller

    def _say_hello(self, session: bytes | None, received: int) -> None:
        body: dict[str, Any] = {"versions": [PROTOCOL_VERSION], "name": self._options.name}
        if session is not None:
            body["session"] = session
        self.send(encode(Message(kind="hello", seq=received, body=body)))

    def _drop(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
