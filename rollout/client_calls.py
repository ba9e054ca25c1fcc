"""Calls of a client that are on their way, and what is collected of their answers."""

from __future__ import annotations

import asyncio
import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.records import rollouts_from_wire, split


class PendingCall:
    """One call: sent again whenever that is needed, answered once."""

    def __init__(self, kind: str, body: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.kind = kind
        self.body = body
        self.arrays = arrays or {}
        self.future: Future[Any] = Future()
        # A waiting coroutine that is cancelled would otherwise cancel the future under the link's hands.
        self.future.set_running_or_notify_cancel()
        # The link's:
        self.number = 0
        self.is_cancelled = False
        self.waits_since = 0.0

    def take(self, message: Message) -> None:
        """Take a message about the call that is not its last. Raises ValueError for one that does not belong."""
        raise ProtocolError(f"{message.kind} does not answer {self.kind}")

    def take_tokens(self, chunk: TokenChunk) -> None:
        """Take new tokens; those of a call without a stream are passed over."""

    def result(self, message: Message) -> Any:
        """What the call gives, from its last message. Raises ValueError where something is missing."""
        return message.body["value"]

    def succeed(self, message: Message) -> None:
        """Resolve the future."""
        self.future.set_result(self.result(message))

    def fail(self, error: Exception) -> None:
        """Resolve the future with an error."""
        self.future.set_exception(error)


class FilesCall(PendingCall):
    """A call whose result comes with files."""

    def result(self, message: Message) -> Any:
        """(value, contents by file name)."""
        value = message.body["value"]
        data = message.arrays.get("data", np.zeros(0, np.uint8))
        names = [name for name, _ in value["files"]]
        parts = split("data", data, [size for _, size in value["files"]])
        return value, {name: part.tobytes() for name, part in zip(names, parts, strict=True)}


class ListCall(PendingCall, ABC):
    """A call whose result comes in pieces of a list."""

    def __init__(self, kind: str, body: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        super().__init__(kind, body, arrays)
        self._items: list[Any] = []

    def take(self, message: Message) -> None:
        """See PendingCall."""
        if message.body["first"] != len(self._items):
            raise ProtocolError(f"{message.kind} from {message.body['first']} on, expected {len(self._items)}")
        self._items += self.items_of(message)

    @abstractmethod
    def items_of(self, message: Message) -> list[Any]:
        """The items of one piece."""

    def result(self, message: Message) -> list[Any]:
        """See PendingCall."""
        if message.kind == "result":  # nothing was asked for
            total = message.body["value"]
        else:
            self.take(message)
            total = message.body["total"]
        if total != len(self._items):
            raise ProtocolError(f"{len(self._items)} results came, {total!r:.40} were announced")
        return self._items


class ScoreCall(ListCall):
    """score: an array per sequence."""

    def items_of(self, message: Message) -> list[Any]:
        """See ListCall."""
        return split("logprobs", message.arrays["logprobs"], message.arrays["lens"].tolist())


class GenerateCall(ListCall):
    """generate: a rollout per sample."""

    def items_of(self, message: Message) -> list[Any]:
        """See ListCall."""
        return rollouts_from_wire(message.body, message.arrays)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenChunk:
    """New tokens of one rollout of a call; row i of each array belongs to token `start` + i."""

    index: int
    """Which rollout, as in the list that the call returns."""
    start: int
    """Tokens that came before. 0 again where the request began anew (`num_restarts`): forget those."""
    num_restarts: int
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    policy_logprobs: NDArray[np.float32]
    policy_versions: NDArray[np.int64]


def token_chunks(message: Message) -> Iterator[tuple[int, TokenChunk]]:
    """(call, chunk) of each row of a `tokens` message. Raises ValueError where its arrays do not match."""
    arrays = message.arrays
    counts = arrays["counts"].tolist()
    names = ("token_ids", "logprobs", "policy_logprobs", "policy_versions")
    columns = {name: split(name, arrays[name], counts) for name in names}
    rows = [arrays[name].tolist() for name in ("calls", "indexes", "starts", "restarts")]
    if any(len(row) != len(counts) for row in rows):
        raise ProtocolError(f"tokens: rows of {[len(row) for row in rows]} entries, expected {len(counts)}")
    for place, (call, index, start, restarts) in enumerate(zip(*rows, strict=True)):
        parts = {name: columns[name][place] for name in names}
        yield call, TokenChunk(index=index, start=start, num_restarts=restarts, **parts)


class StreamCall(GenerateCall):
    """generate with its tokens as they come: every token once, in order, whatever becomes of the connection."""

    def __init__(self, kind: str, body: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(kind, body, arrays)
        self._heard: dict[int, tuple[int, int]] = {}
        """Rollout -> (restarts, tokens handed on)."""
        self._hand_on: Callable[[TokenChunk | None], None] | None = None
        self._early: list[TokenChunk | None] = []

    def take_tokens(self, chunk: TokenChunk) -> None:
        """See PendingCall."""
        restarts, size = self._heard.get(chunk.index, (0, 0))
        expected = size if chunk.num_restarts == restarts else 0
        if chunk.start != expected:
            raise ProtocolError(f"tokens of rollout {chunk.index} from {chunk.start} on, expected {expected}")
        self._heard[chunk.index] = chunk.num_restarts, chunk.start + len(chunk.token_ids)
        self._give(chunk)

    def succeed(self, message: Message) -> None:
        """Hand on the tokens that only the rollouts hold, then the rollouts."""
        rollouts = self.result(message)
        for index, rollout in enumerate(rollouts):
            chunk = self._rest(index, rollout)
            if chunk is not None:
                self._give(chunk)
        self.future.set_result(rollouts)
        self._give(None)

    def fail(self, error: Exception) -> None:
        """See PendingCall."""
        super().fail(error)
        self._give(None)

    def listen(self, hand_on: Callable[[TokenChunk | None], None]) -> None:
        """Have chunks handed on, the link's thread calling, and None at the end; before the call is sent."""
        self._hand_on = hand_on

    def _give(self, chunk: TokenChunk | None) -> None:
        assert self._hand_on is not None, "nobody listens"
        self._hand_on(chunk)

    def _rest(self, index: int, rollout: Rollout) -> TokenChunk | None:
        restarts, size = self._heard.get(index, (0, 0))
        start = size if restarts == rollout.num_restarts else 0
        if start == len(rollout.token_ids):
            return None
        names = ("token_ids", "logprobs", "policy_logprobs", "policy_versions")
        columns = {name: getattr(rollout, name)[start:] for name in names}
        return TokenChunk(index=index, start=start, num_restarts=rollout.num_restarts, **columns)


class RolloutStream:
    """The chunks of a call as they come, for a loop; `rollouts` has its result. Iterate once, sync or async.

    A loop that is left early gives the call up.
    """

    def __init__(self, call: StreamCall, send: Callable[[PendingCall], None], give_up: Callable[[PendingCall], None]):
        self._call = call
        self._send = send
        self._give_up = give_up

    def __iter__(self) -> Iterator[TokenChunk]:
        chunks: queue.SimpleQueue[TokenChunk | None] = queue.SimpleQueue()
        self._call.listen(chunks.put)
        self._send(self._call)
        try:
            while (chunk := chunks.get()) is not None:
                yield chunk
            self._call.future.result()
        finally:
            if not self._call.future.done():
                self._give_up(self._call)

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[TokenChunk | None] = asyncio.Queue()

        def hand_on(chunk: TokenChunk | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        self._call.listen(hand_on)
        self._send(self._call)
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            self._call.future.result()
        finally:
            if not self._call.future.done():
                self._give_up(self._call)

    def rollouts(self) -> list[Rollout]:
        """The call's result, once the loop has ended; raises what the call raised."""
        result: list[Rollout] = self._call.future.result()
        return result
