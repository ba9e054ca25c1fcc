"""New tokens of requests whose clients asked for them, collected between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.request import Request


class _Stream:
    """One request: how far it was collected."""

    __slots__ = ("call", "chunk", "index", "request", "restarts", "taken")

    def __init__(self, call: int, index: int, request: Request, chunk: int) -> None:
        self.call = call
        self.index = index
        self.request = request
        self.chunk = chunk
        self.taken = 0
        self.restarts = request.num_restarts


class TokenFeed:
    """The streams of one client. The engine's thread collects, the server's takes.

    There is one batch at a time: until it is taken, tokens stay where they are, in the requests. So a client that does
    not read costs nothing.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._batch: dict[str, NDArray[Any]] | None = None

    def add(self, call: int, requests: Sequence[Request], chunk: int) -> None:
        """Stream a call's requests, `chunk` tokens or more at a time; the last tokens come with the result only."""
        with self._lock:
            for index, request in enumerate(requests):
                self._streams[call, index] = _Stream(call, index, request, chunk)

    def remove(self, call: int, count: int) -> None:
        """The call is over."""
        with self._lock:
            for index in range(count):
                self._streams.pop((call, index), None)

    def collect(self) -> None:
        """On the engine's thread, between two steps."""
        if self._batch is not None or not self._streams:
            return
        with self._lock:
            due = [stream for stream in self._streams.values() if _is_due(stream)]
            batch = _batch_of(due) if due else None
        if batch is not None:
            self._batch = batch
            self._wake()

    def take(self) -> dict[str, NDArray[Any]] | None:
        """The arrays of a `tokens` message, if some are due."""
        batch, self._batch = self._batch, None
        return batch


def _is_due(stream: _Stream) -> bool:
    request = stream.request
    if request.num_restarts != stream.restarts:
        stream.restarts = request.num_restarts
        stream.taken = 0
    return request.num_output_tokens - stream.taken >= stream.chunk


def _batch_of(streams: list[_Stream]) -> dict[str, NDArray[Any]]:
    starts = [stream.taken for stream in streams]
    for stream in streams:
        stream.taken = stream.request.num_output_tokens
    pairs = [(stream.request, start) for stream, start in zip(streams, starts, strict=True)]
    return {
        "calls": np.array([stream.call for stream in streams], np.int64),
        "indexes": np.array([stream.index for stream in streams], np.int32),
        "starts": np.array(starts, np.int32),
        "counts": np.array([stream.taken for stream in streams], np.int32) - np.array(starts, np.int32),
        "restarts": np.array([stream.restarts for stream in streams], np.int32),
        "token_ids": np.concatenate([request.output_token_ids[start:] for request, start in pairs]),
        "logprobs": np.concatenate([request.logprobs[start:] for request, start in pairs]),
        "policy_logprobs": np.concatenate([request.policy_logprobs[start:] for request, start in pairs]),
        "policy_versions": np.concatenate([request.policy_versions[start:] for request, start in pairs]),
    }
