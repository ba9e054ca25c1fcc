"""A message as ZMQ frames: one msgpack header, then the raw bytes of its arrays, as its table says.

    header = [protocol version, kind, call, seq, body, [[array name, dtype, shape, frame, offset], ...]]

Arrays are little-endian, in C order. Those that come out of `decode` are read-only views of their frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]
from numpy.typing import NDArray

from zerokl.rollout.protocol.array_frames import Frame, pack_arrays, read_arrays
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.schema import Schema

PROTOCOL_VERSION = 2
"""Raised with every change that an older peer would not understand."""
MAX_HEADER_BYTES = 1 << 20
"""Of the first frame. A small header may unpack to 60 times its size in objects; arrays do not grow."""
_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message in either direction."""

    kind: str
    call: int = 0
    """Number of the call that it is about, chosen by the client, from 1 up; 0 for messages about the connection."""
    seq: int = 0
    """From a server: number of this message in the session, from 1 up, or 0 for one that is not kept for a resumption.
    From a client: the highest such number that it has received."""
    body: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def ends_call(self) -> bool:
        """Whether a server says no more about the call after it."""
        return self.kind in ("result", "error") or "total" in self.body


def encode(message: Message) -> list[Frame]:
    """The message's frames; those of large arrays share their memory."""
    table, frames = pack_arrays(message.arrays)
    header: bytes = msgpack.packb(
        (PROTOCOL_VERSION, message.kind, message.call, message.seq, dict(message.body), table)
    )
    return [header, *frames]


def decode(frames: Sequence[Frame], schema: Schema) -> Message:
    """Inverse of `encode`, for messages of `schema`; raises ProtocolError for anything else, whatever the bytes."""
    if not frames:
        raise ProtocolError("a message has at least one frame")
    version, kind, call, seq, body, table = _header(frames[0])
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version!r:.40} is not {PROTOCOL_VERSION}", code="version")
    if not isinstance(kind, str) or kind not in schema:
        raise ProtocolError(f"unknown kind of message {kind!r:.40}")
    for name, number in (("call", call), ("seq", seq)):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise ProtocolError(f"{kind}: {name} must be an integer in [0, 2^63), got {number!r:.40}")
    expected = schema[kind]
    expected.check_call(kind, call)
    try:
        expected.check_body(kind, body)
        arrays = read_arrays(kind, table, frames, len(expected.arrays))
        expected.check_arrays(kind, arrays)
    except ProtocolError as error:
        error.call = call
        raise
    return Message(kind=kind, call=call, seq=seq, body=body, arrays=arrays)


def size_of(frames: Sequence[Frame]) -> int:
    """Bytes of a message."""
    return sum(frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames)


def _header(frame: Frame) -> list[Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header has at most {MAX_HEADER_BYTES} bytes, got {len(frame)}")
    try:
        header = msgpack.unpackb(frame)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"the header is not msgpack: {error!r:.100}") from None
    if not isinstance(header, list) or len(header) != 6:
        raise ProtocolError("a header is a list of 6")
    return header


__all__ = ["MAX_HEADER_BYTES", "PROTOCOL_VERSION", "Frame", "Message", "decode", "encode", "size_of"]
