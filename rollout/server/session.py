"""A client as the server sees it: over however many connections, until it says bye or is not heard of for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from zerokl.rollout.protocol.codec import Frame, Message
from zerokl.rollout.server.outbox import Outbox
from zerokl.rollout.server.served_call import ServedCall
from zerokl.rollout.server.streams import TokenFeed


class Session:
    """Owned by the server's thread.

    A call is open from receipt until its outcome is posted, then answering until its last message is in the outbox.
    Messages of answers and tokens are made only while the outbox has room.
    """

    def __init__(self, token: bytes, user: str, name: str, feed: TokenFeed, window_bytes: int) -> None:
        self.token = token
        """Secret name, which a client shows to go on after its connection broke."""
        self.user = user
        """CURVE key of the client; empty without authentication."""
        self.name = name
        self.feed = feed
        self.route: bytes | None = None
        """Routing id of its connection."""
        self.last_heard = 0.0
        self.outbox = Outbox(window_bytes)
        self.highest_call = 0
        self.open_calls: dict[int, ServedCall] = {}
        self.wants_room = False
        """A call was refused for want of room."""
        self._answers: deque[tuple[ServedCall, Iterator[Message]]] = deque()

    @property
    def num_calls(self) -> int:
        """Calls that are open or answering."""
        return len(self.open_calls) + len(self._answers)

    @property
    def num_unread(self) -> int:
        """Messages that the client has not acknowledged, and answers of which it has none yet."""
        return len(self.outbox) + len(self._answers)

    @property
    def is_idle(self) -> bool:
        """Whether the client has received all that it waits for."""
        return not self.num_calls and self.outbox.is_empty

    def answer(self, call: ServedCall, messages: Iterator[Message]) -> None:
        """Queue the messages of a call that is done."""
        self._answers.append((call, messages))

    def pump(self, send: Callable[[list[Frame]], bool], finish: Callable[[ServedCall], None]) -> None:
        """Make messages while there is room, and send what can be sent; `finish` takes calls that are all told."""
        while self.outbox.has_room:
            batch = self.feed.take()
            if batch is not None:
                self.outbox.add(Message(kind="tokens", arrays=batch))
            elif self._answers:
                self._continue_answer(finish)
            else:
                break
        if self.route is not None:
            self.outbox.send(send)

    def close(self, finish: Callable[[ServedCall], None]) -> list[ServedCall]:
        """Drop all answers; returns the calls that are still open."""
        while self._answers:
            finish(self._answers.popleft()[0])
        self.route = None
        return list(self.open_calls.values())

    def _continue_answer(self, finish: Callable[[ServedCall], None]) -> None:
        call, messages = self._answers[0]
        message = next(messages, None)
        if message is not None:
            self.outbox.add(message)
        if message is None or message.ends_call:
            self._answers.popleft()
            finish(call)
