"""Numbered messages to one client, kept until it has received them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from zerokl.rollout.protocol.codec import Frame, Message, encode, size_of
from zerokl.rollout.protocol.fields import ProtocolError


class Outbox:
    """seq:  ... acknowledged | sent, kept | not yet sent ...   A resumption makes the kept ones unsent again."""

    def __init__(self, window_bytes: int) -> None:
        self._window = window_bytes
        self._kept: deque[tuple[list[Frame], int]] = deque()
        self._last_seq = 0
        self._num_sent = 0
        """Of the kept ones."""
        self.nbytes = 0
        """Of the kept ones."""

    @property
    def has_room(self) -> bool:
        """Whether a further message of any size may be added."""
        return self.nbytes < self._window

    def __len__(self) -> int:
        """Messages kept."""
        return len(self._kept)

    @property
    def is_empty(self) -> bool:
        """Whether the client has received everything."""
        return not self._kept

    def add(self, message: Message) -> None:
        """Number a message and keep it."""
        self._last_seq += 1
        frames = encode(replace(message, seq=self._last_seq))
        size = size_of(frames)
        self._kept.append((frames, size))
        self.nbytes += size

    def acknowledge(self, seq: int) -> None:
        """The client has everything up to `seq`. Raises ProtocolError for what it cannot have."""
        first = self._last_seq - len(self._kept) + 1
        if seq >= first + self._num_sent:
            raise ProtocolError(f"message {seq} is acknowledged, the last one sent is {first + self._num_sent - 1}")
        for _ in range(first, seq + 1):
            _, size = self._kept.popleft()
            self.nbytes -= size
            self._num_sent -= 1

    def resume(self, received: int) -> None:
        """The client is on a new connection and has everything up to `received`."""
        self.acknowledge(received)
        self._num_sent = 0

    def send(self, send: Callable[[list[Frame]], bool]) -> None:
        """Send what was not yet sent, until `send` says that no more fits."""
        while self._num_sent < len(self._kept) and send(self._kept[self._num_sent][0]):
            self._num_sent += 1
