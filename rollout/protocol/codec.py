"""A message as ZMQ frames: one msgpack header, then one raw frame for each array.

    header = [protocol version, kind, call, seq, body, [[array name, dtype, shape], ...]]

Arrays are little-endian, in C order. Those that come out of `decode` are read-only views of their frames.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.schema import Schema

PROTOCOL_VERSION = 1
"""Raised with every change that an older peer would not understand."""
MAX_HEADER_BYTES = 1 << 20
"""Of the first frame. A small header may unpack to 60 times its size in objects; arrays do not grow."""
_MAX_NUMBER = 2**63 - 1
_MAX_DIMENSIONS = 8

assert sys.byteorder == "little", "frames hold arrays as they lie in memory"


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


Frame = bytes | memoryview


def encode(message: Message) -> list[Frame]:
    """The message's frames; those of arrays share their memory."""
    arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
    table = [(name, _name_of(array.dtype), array.shape) for name, array in arrays.items()]
    header: bytes = msgpack.packb(
        (PROTOCOL_VERSION, message.kind, message.call, message.seq, dict(message.body), table)
    )
    return [header, *(_bytes_of(array) for array in arrays.values())]


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
        arrays = _arrays(kind, table, frames[1:])
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


def _arrays(kind: str, table: Any, frames: Sequence[Frame]) -> dict[str, NDArray[Any]]:
    if not isinstance(table, list) or len(table) != len(frames):
        raise ProtocolError(f"{kind}: {len(frames)} frames follow the header, its table says otherwise")
    arrays: dict[str, NDArray[Any]] = {}
    for row, frame in zip(table, frames, strict=True):
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or not isinstance(row[2], list):
            raise ProtocolError(f"{kind}: {row!r:.80} does not describe an array")
        name, dtype, shape = row
        if name in arrays:
            raise ProtocolError(f"{kind}: array {name!r:.40} comes twice")
        arrays[name] = _array(f"{kind}.{name:.40}", dtype, shape, frame)
    return arrays


_DTYPES = {name: np.dtype(name) for name in ("uint8", "int16", "int32", "int64", "float32")}


def _array(name: str, dtype: Any, shape: list[Any], frame: Frame) -> NDArray[Any]:
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError(f"{name}: dtype must be one of {sorted(_DTYPES)}, got {dtype!r:.40}")
    if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= _MAX_NUMBER for size in shape):
        raise ProtocolError(f"{name}: {shape!r:.80} is not a shape")
    kind = _DTYPES[dtype]
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes != len(frame):
        raise ProtocolError(f"{name}: shape {shape!r:.80} of {dtype} takes {nbytes} bytes, its frame has {len(frame)}")
    array = np.frombuffer(frame, kind) if nbytes else np.empty(0, kind)
    try:
        return array.reshape(shape)
    except ValueError:  # no bytes, but lengths that no array can have
        raise ProtocolError(f"{name}: {shape!r:.80} is not a shape") from None


@functools.lru_cache(maxsize=16)
def _name_of(kind: np.dtype[Any]) -> str:
    name: str = kind.name  # which NumPy puts together anew each time, in microseconds
    return name


def _bytes_of(array: NDArray[Any]) -> Frame:
    return array.reshape(-1).view(np.uint8).data if array.size else b""
