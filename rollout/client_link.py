"""A client's connection to its server: one thread, one socket at a time, calls that outlive both."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from zerokl.rollout.client_calls import PendingCall, token_chunks
from zerokl.rollout.client_open_calls import OpenCalls
from zerokl.rollout.client_socket import ClientSocket, LinkOptions
from zerokl.rollout.protocol.codec import MAX_HEADER_BYTES, Message, decode, encode, size_of
from zerokl.rollout.protocol.failures import BusyError, exception_of
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.schema import SERVER_MESSAGES

_ACK_BYTES = 256 << 10
"""Received and not yet acknowledged at most; the server's window is larger."""
_SILENT_BEATS = 3
"""Heartbeats without a word from the server after which the connection counts as lost."""
_BYE_MS = 200
_RETRY_SECONDS = 0.1
"""Between attempts, where a connection breaks before the server has said welcome."""
_HELLO_SECONDS = 5.0
"""After which an unanswered hello is said again: it may have been refused for a while."""
_BURST = 256
_UNPARKED_BY_ROOM = 16
_UNPARKED_BY_ANSWER = 2
"""Calls that are tried again at a time, after the server had no room for them."""


class ServerLostError(ConnectionError):
    """No server answers at the endpoint, or it is not the one that had the call: what became of it is unknown."""


class ClientLink:
    """Owns the socket and its thread. `submit`, `cancel` and `close` may be called from any thread."""

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._orders: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        """Held while a call is submitted, and while the end of submissions is declared."""
        self._is_closing = False
        # The thread's own:
        self._calls = OpenCalls()
        self._session: bytes | None = None
        self._received = 0
        self._unacknowledged = 0
        """Bytes."""
        self._is_greeted = False
        self._heartbeat = 1.0
        self._last_heard = self._last_sent = self._lost_since = time.monotonic()
        self._hello_again = self._last_heard + _HELLO_SECONDS
        self._max_frame = MAX_HEADER_BYTES
        self._refusal = "no answer"
        self._socket = ClientSocket(options, self._wake_fd)
        self._thread = threading.Thread(target=self._run, name="zerokl-client", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------------
    def submit(self, call: PendingCall) -> None:
        """Send a call. Raises ConnectionError after `close`."""
        with self._lock:
            if self._is_closing:
                raise ConnectionError("the client is closed")
            self._order(lambda: self._calls.add(call))

    def cancel(self, call: PendingCall) -> None:
        """Give a call up; its future resolves as ever, soon."""
        self._order(lambda: self._cancel(call))

    def drop_connection(self) -> None:
        """Connect anew, as after a loss; calls go on."""
        self._order(self._reconnect)

    def close(self) -> None:
        """Say bye, fail calls in flight, free everything; idempotent."""
        with self._lock:
            self._is_closing = True
        self._order(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _order(self, action: Callable[[], None]) -> None:
        self._orders.append(action)
        with suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._wake_fd, 1)

    # -- the thread ---------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._turn()
        finally:
            with self._lock:
                self._is_closing = True
            self._end()

    def _turn(self) -> None:
        seconds = self._heartbeat / 2 if self._is_greeted else _RETRY_SECONDS
        ready = self._socket.wait(int(1000 * seconds) + 1)
        if "wake" in ready:
            os.eventfd_read(self._wake_fd)
        while self._orders:
            self._orders.popleft()()
        if "message" in ready:
            self._receive()
        elif "event" in ready:  # only once nothing is left to read
            self._observe()
        self._send_waiting()
        self._keep_alive(time.monotonic())

    def _reconnect(self) -> None:
        if self._is_greeted:
            self._lost_since = time.monotonic()
        self._is_greeted = False
        self._socket.reconnect(self._session, self._received)
        self._last_heard = time.monotonic()
        self._hello_again = self._last_heard + _HELLO_SECONDS

    def _observe(self) -> None:
        event = self._socket.event()
        if event == "refused":
            self._refusal = "the handshake failed: is the server's key right, and does it know this client's?"
        elif event == "lost" and self._is_greeted:
            self._reconnect()
        elif event == "lost":
            self._hello_again = time.monotonic() + _RETRY_SECONDS

    # -- receiving ----------------------------------------------------------------------------------------------------
    def _receive(self) -> None:
        self._last_heard = time.monotonic()
        for _ in range(_BURST):
            frames = self._socket.receive()
            if frames is None:
                return
            try:
                message = decode(frames, SERVER_MESSAGES)
                if message.seq:
                    if message.seq <= self._received:
                        continue
                    if message.seq != self._received + 1:
                        raise ProtocolError(f"message {message.seq} came after {self._received}")
                    self._received = message.seq
                    self._unacknowledged += size_of(frames)
                self._act(message)
            except ValueError as error:
                self._refusal = f"the server said what is no message: {error}"
                self._calls.fail_all(ProtocolError(self._refusal))
                self._session, self._received = None, 0
                self._reconnect()
                return

    def _act(self, message: Message) -> None:
        if message.kind == "welcome":
            self._settle_in(message)
        elif message.kind == "refused":
            self._refusal = message.body["text"]
            if message.body["code"] == "version":
                self._calls.fail_all(ServerLostError(self._refusal))
        elif message.kind == "room":
            self._calls.unpark(_UNPARKED_BY_ROOM)
        elif message.kind == "tokens":
            for number, chunk in token_chunks(message):
                call = self._calls.find(number)
                if call is not None:
                    call.take_tokens(chunk)
        elif (answered := self._calls.find(message.call)) is not None:
            self._answer(answered, message)

    def _answer(self, call: PendingCall, message: Message) -> None:
        if not message.ends_call:
            call.take(message)
            return
        error = exception_of(message.body) if message.kind == "error" else None
        if isinstance(error, BusyError) and not call.is_cancelled:
            self._calls.park(call)
            return
        self._calls.answered(call)
        # Each that is begun and answered later brings further ones, each refusal a `room`.
        self._calls.unpark(_UNPARKED_BY_ANSWER)
        if error is not None:
            call.fail(error)
            return
        try:
            call.succeed(message)
        except (ValueError, TypeError, KeyError) as wrong:  # the result is not what the call's kind gives
            call.fail(ProtocolError(f"the result of {call.kind} is malformed: {wrong!r:.200}"))

    def _settle_in(self, message: Message) -> None:
        if not message.body["resumed"]:
            if self._session is not None:
                lost = ServerLostError("the server does not know this client any more: it was restarted")
                self._calls.fail_in_flight(lost)
            self._received = 0
        self._session = message.body["session"]
        self._heartbeat = message.body["heartbeat"]
        self._max_frame = message.body["limits"].get("max_message_bytes", MAX_HEADER_BYTES)
        self._is_greeted = True
        for call in self._calls.in_flight:
            self._send_call(call)

    # -- sending ------------------------------------------------------------------------------------------------------
    def _cancel(self, call: PendingCall) -> None:
        if call.future.done():
            return
        call.is_cancelled = True
        if self._calls.find(call.number) is not None:
            self._send(Message(kind="cancel", call=call.number))
            return
        self._calls.remove(call)
        call.fail(ConnectionError("the call was given up"))

    def _send_waiting(self) -> None:
        while self._is_greeted and (call := self._calls.next_to_send()) is not None:
            try:
                self._send_call(call)
            except ValueError as error:
                self._calls.answered(call)
                call.fail(error)

    def _send_call(self, call: PendingCall) -> None:
        self._send(Message(kind=call.kind, call=call.number, body=call.body, arrays=call.arrays))
        if call.is_cancelled:
            self._send(Message(kind="cancel", call=call.number))

    def _send(self, message: Message) -> None:
        if self._is_greeted:  # else the welcome will have it sent
            frames = encode(replace(message, seq=self._received))
            if len(frames[0]) > MAX_HEADER_BYTES:
                raise ValueError(f"the call takes a header over {MAX_HEADER_BYTES} bytes: make several calls of it")
            largest = max(map(len, frames))
            if largest > self._max_frame:
                raise ValueError(
                    f"the call takes a frame of {largest} bytes, over the server's max_message_bytes "
                    f"({self._max_frame}): make several calls of it"
                )
            self._socket.send(frames)
            self._unacknowledged = 0
            self._last_sent = time.monotonic()

    # -- time ---------------------------------------------------------------------------------------------------------
    def _keep_alive(self, now: float) -> None:
        if self._is_greeted:
            if self._unacknowledged and (self._unacknowledged >= _ACK_BYTES or not self._calls.in_flight):
                self._send(Message(kind="ping"))
            if now - self._last_sent >= self._heartbeat:
                self._send(Message(kind="ping"))
            if now - self._last_heard > _SILENT_BEATS * self._heartbeat:
                self._reconnect()
            return
        seconds = self._options.reconnect_seconds
        lost = ServerLostError(f"{self._options.endpoint}: {self._refusal}, for {seconds:g} s")
        if now - self._lost_since > seconds:
            for call in self._calls.waiting_since(now - seconds):
                self._calls.remove(call)
                call.fail(lost)
        if now > self._hello_again:
            self._reconnect()

    def _end(self) -> None:
        if self._is_greeted:
            self._send(Message(kind="bye"))
        while self._orders:
            self._orders.popleft()()
        self._calls.fail_all(ConnectionError("the client was closed while the call was in flight"))
        self._socket.close(_BYE_MS)
        os.close(self._wake_fd)
