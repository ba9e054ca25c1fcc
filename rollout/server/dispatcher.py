"""What a server does with each message. No sockets and no clock: frames and times come in, frames go out."""

from __future__ import annotations

import heapq
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from zerokl.rollout.protocol.codec import PROTOCOL_VERSION, Frame, Message, decode, encode, size_of
from zerokl.rollout.protocol.failures import BusyError, DeadlineError, ServerClosingError, failure_of
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.schema import CLIENT_MESSAGES, SESSION_BYTES
from zerokl.rollout.server.call_log import log_call, log_outcome
from zerokl.rollout.server.jobs import EngineJobs
from zerokl.rollout.server.ledger import Ledger
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.served_call import Outcome, ServedCall
from zerokl.rollout.server.session import Session
from zerokl.rollout.server.streams import TokenFeed

Send = Callable[[bytes, Sequence[Frame]], bool]
"""Send frames to a routing id; False where no more fits now, or there is no such peer any more."""

_WITH_PARTIAL_RESULTS = ("generate", "resume")
"""Kinds of calls whose answer, when they end early, is what they have so far."""
_logger = logging.getLogger(__name__)


class Dispatcher:
    """All sessions. Owned by the server's thread; `now` is in seconds from any start, and never goes back."""

    def __init__(
        self, jobs: EngineJobs, limits: ServerLimits, ledger: Ledger, send: Send, wake: Callable[[], None], name: str
    ) -> None:
        """`wake`, called by the engine's thread, has `pump_all` called soon."""
        self._jobs = jobs
        self._limits = limits
        self._ledger = ledger
        self._send = send
        self._wake = wake
        self._name = name
        self._sessions: dict[bytes, Session] = {}
        self._routes: dict[bytes, Session] = {}
        self._deadlines: list[tuple[float, bytes, int]] = []
        self._next_review = 0.0
        self.is_closing = False
        self.num_refused = 0
        """Messages that were none, or came before hello."""

    # -- messages -----------------------------------------------------------------------------------------------------
    def receive(self, route: bytes, user: str, frames: Sequence[Frame], now: float) -> None:
        """Act on one message of a peer; whatever it is, nothing is raised."""
        try:
            message = decode(frames, CLIENT_MESSAGES)
            if message.kind == "hello":
                self._greet(route, user, message, now)
                return
            session = self._routes.get(route)
            if session is None:
                raise ProtocolError(f"{message.kind} before hello", code="hello_first")
            session.last_heard = now
            session.outbox.acknowledge(message.seq)
            self._act(session, message, size_of(frames), now)
        except ProtocolError as error:
            self.num_refused += 1
            session = self._routes.get(route)
            if session is not None and error.call > session.highest_call:
                self._refuse_call(session, error)
                return
            self._tell(route, Message(kind="refused", body={"code": error.code, "text": str(error)[:500]}))
        else:
            self._pump(session)

    def _act(self, session: Session, message: Message, nbytes: int, now: float) -> None:
        if message.kind == "ping":
            assert session.route is not None
            self._tell(session.route, Message(kind="pong"))
        elif message.kind == "bye":
            self._end(session, "said bye")
        elif message.kind == "cancel":
            call = session.open_calls.get(message.call)
            if call is not None:
                self._jobs.call_off(call)
        elif message.call > session.highest_call:  # any other has been received before: its answer comes, or came
            session.highest_call = message.call
            self._begin(session, message, nbytes, now)

    def _begin(self, session: Session, message: Message, nbytes: int, now: float) -> None:
        call = ServedCall(session.token, message, session.feed)
        session.open_calls[message.call] = call
        try:
            if self.is_closing:
                raise ServerClosingError("the server ends soon and takes no further calls")
            if session.num_calls > self._limits.max_calls:
                raise BusyError(f"{session.num_calls - 1} calls are in flight, of at most {self._limits.max_calls}")
            self._ledger.take(session.token, nbytes)
        except (ValueError, BusyError, ServerClosingError) as error:
            self.complete(call, error)
            return
        call.nbytes = nbytes
        deadline = message.body.get("deadline")
        if deadline is not None:
            heapq.heappush(self._deadlines, (now + deadline, session.token, message.call))
        log_call(logging.DEBUG, "call received", session.name, call)
        self._jobs.start(call, message)

    def _refuse_call(self, session: Session, error: ProtocolError) -> None:
        """Answer a call whose message could not be read any further than its number."""
        session.highest_call = error.call
        session.outbox.add(Message(kind="error", call=error.call, body=failure_of(error)))
        self._pump(session)

    def _greet(self, route: bytes, user: str, message: Message, now: float) -> None:
        if PROTOCOL_VERSION not in message.body["versions"]:
            raise ProtocolError(f"this server speaks version {PROTOCOL_VERSION} alone", code="version")
        session = self._sessions.get(message.body.get("session", b""))
        resumed = session is not None and session.user == user
        if session is None or not resumed:
            if len(self._sessions) >= self._limits.max_clients:
                raise ProtocolError(f"there are {len(self._sessions)} clients already", code="full")
            session = self._open(user, message.body["name"])
        else:
            session.outbox.resume(message.seq)
        old = self._routes.get(route)
        if old is not None and old is not session:
            old.route = None
        if session.route is not None:
            self._routes.pop(session.route, None)
        session.route, session.last_heard = route, now
        self._routes[route] = session
        self._tell(route, self._welcome(session, resumed))
        self._pump(session)

    def _open(self, user: str, name: str) -> Session:
        feed = TokenFeed(self._wake)
        session = Session(secrets.token_bytes(SESSION_BYTES), user, name, feed, self._limits.window_bytes)
        self._sessions[session.token] = session
        self._jobs.add_feed(feed)
        _logger.info("client here", extra={"client": name})
        return session

    def _welcome(self, session: Session, resumed: bool) -> Message:
        body = {
            "version": PROTOCOL_VERSION,
            "session": session.token,
            "resumed": resumed,
            "heartbeat": self._limits.heartbeat_seconds,
            "limits": {
                name: getattr(self._limits, name) for name in ("max_message_bytes", "max_calls", "max_requests")
            },
            "server": self._name,
        }
        return Message(kind="welcome", body=body)

    # -- outcomes -----------------------------------------------------------------------------------------------------
    def complete(self, call: ServedCall, outcome: Outcome) -> None:
        """A call is done; the server's thread brings here what jobs have posted."""
        session = self._sessions.get(call.client)
        if session is not None:
            del session.open_calls[call.number]
            log_outcome(session.name, call, outcome)
        call.feed.remove(call.number, call.num_requests)
        if session is None or call.is_answered:
            self._settle(call)
            return
        if isinstance(outcome, BaseException):
            call.was_refused = isinstance(outcome, BusyError)
            session.wants_room |= call.was_refused
            outcome = iter([Message(kind="error", call=call.number, body=failure_of(outcome))])
        session.answer(call, outcome)
        self._pump(session)

    def pump_all(self) -> None:
        """Send whatever new tokens there are."""
        for session in list(self._routes.values()):
            self._pump(session)

    def _pump(self, session: Session) -> None:
        route = session.route
        if self._sessions.get(session.token) is not session:
            return
        if session.num_unread > self._limits.max_unread_messages:
            self._end(session, f"leaves {session.num_unread} messages unread")
        else:
            session.pump(lambda frames: route is not None and self._send(route, frames), self._settle)

    def _settle(self, call: ServedCall) -> None:
        """Nothing of the call is kept any more."""
        self._ledger.give_back(call.client, call.nbytes, call.num_requests)
        # One that was refused has made no room; it would only be refused again, at once. But it may be the last.
        if self._ledger.is_roomy and (not call.was_refused or not self._ledger.queued_bytes):
            for session in [session for session in self._sessions.values() if session.wants_room]:
                session.wants_room = False
                session.outbox.add(Message(kind="room"))
                self._wake()

    # -- time ---------------------------------------------------------------------------------------------------------
    def tick(self, now: float) -> float:
        """Do what is due; returns when to be called again at the latest."""
        while self._deadlines and self._deadlines[0][0] <= now:
            call = self._open_call(*heapq.heappop(self._deadlines)[1:])
            if call is not None:
                self._expire(call)
        if now >= self._next_review:
            self._next_review = now + min(1.0, self._limits.heartbeat_seconds)
            self._review(now)
        return min(self._next_review, self._deadlines[0][0]) if self._deadlines else self._next_review

    def _review(self, now: float) -> None:
        """Forget deadlines of calls that were in time, and clients that were not heard of."""
        self._deadlines = [entry for entry in self._deadlines if self._open_call(*entry[1:]) is not None]
        heapq.heapify(self._deadlines)
        for session in list(self._sessions.values()):
            silence = now - session.last_heard
            if silence > self._limits.session_seconds:
                self._end(session, f"not heard of for {silence:.1f} s")
            else:
                self._pump(session)

    def _open_call(self, client: bytes, number: int) -> ServedCall | None:
        session = self._sessions.get(client)
        return None if session is None else session.open_calls.get(number)

    def _expire(self, call: ServedCall) -> None:
        self._jobs.call_off(call)
        if call.kind in _WITH_PARTIAL_RESULTS or call.is_answered:
            return
        call.is_answered = True
        session = self._sessions[call.client]
        body = failure_of(DeadlineError(f"the deadline of {call.kind} has passed"))
        session.outbox.add(Message(kind="error", call=call.number, body=body))
        self._pump(session)

    def _end(self, session: Session, why: str) -> None:
        _logger.info("client gone", extra={"client": session.name, "reason": why})
        del self._sessions[session.token]
        if session.route is not None:
            self._routes.pop(session.route, None)
        for call in session.close(self._settle):
            call.is_answered = True
            self._jobs.call_off(call)
        self._jobs.drop_client(session.token, session.feed)

    # -- the server's own ---------------------------------------------------------------------------------------------
    def begin_closing(self) -> None:
        """Take no further calls."""
        self.is_closing = True
        for session in self._sessions.values():
            session.outbox.add(Message(kind="closing"))
            self._pump(session)

    def call_off_all(self) -> None:
        """Have all calls end soon."""
        for session in self._sessions.values():
            for call in session.open_calls.values():
                self._jobs.call_off(call)

    @property
    def is_idle(self) -> bool:
        """Whether all clients have all that they wait for."""
        return all(session.is_idle for session in self._sessions.values())

    @property
    def has_open_calls(self) -> bool:
        """Whether the engine still works for a client."""
        return any(session.open_calls for session in self._sessions.values())

    def facts(self) -> dict[str, Any]:
        """Numbers for `metrics`."""
        sessions = list(self._sessions.values())
        return {
            "server_clients": len(sessions),
            "server_calls": sum(session.num_calls for session in sessions),
            "server_queued_bytes": self._ledger.queued_bytes,
            "server_max_queued_bytes": self._ledger.max_queued_bytes,
            "server_unacknowledged_bytes": sum(session.outbox.nbytes for session in sessions),
            "server_refused_messages": self.num_refused,
        }

    def _tell(self, route: bytes, message: Message) -> None:
        self._send(route, encode(message))
