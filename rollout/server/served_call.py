"""One call of a client as the server's threads share it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.server.streams import TokenFeed
from zerokl.rollout.submission import Submission

if TYPE_CHECKING:
    from zerokl.rollout.weight_updates import WeightUpdate

Outcome = Iterator[Message] | BaseException
"""The messages that answer a call, made as they are asked for; or why there are none."""


class ServedCall:
    """One call of a client, from receipt to its last message."""

    __slots__ = (
        "client",
        "feed",
        "future",
        "is_answered",
        "is_called_off",
        "kind",
        "nbytes",
        "num_requests",
        "number",
        "request_ids",
        "submission",
        "update",
        "was_refused",
    )

    def __init__(self, client: bytes, message: Message, feed: TokenFeed) -> None:
        self.client = client
        self.number = message.call
        self.kind = message.kind
        self.feed = feed
        self.request_ids: list[str] = message.body.get("request_ids", [])
        """As the client named them; the engine's own once it has the call."""
        # The server's thread's:
        self.is_called_off = False
        self.is_answered = False
        """The client has its answer, or is gone: what still comes is dropped."""
        self.was_refused = False
        """There was no room for it."""
        # What the ledger has promised. The intake thread's until the outcome is posted, then the server's:
        self.nbytes = 0
        self.num_requests = 0
        # How to call it off, while it can be:
        self.submission: Submission[Any] | None = None
        self.update: WeightUpdate | None = None
        self.future: Future[Any] | None = None
