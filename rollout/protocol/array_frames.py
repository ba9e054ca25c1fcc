"""The arrays of a message as raw frames and back: small ones lie in a frame together, a large one has its own.

    table = [[array name, dtype, shape, frame, offset], ...]

Frame 0 is the header. The arrays of a frame lie one after the other in the table's order, each from the first multiple
of 8 bytes on, the last one up to the frame's end. (A frame costs ZMQ and Python some 5 us and the interpreter's lock
once, on either side: more than the bytes of a rollout.)
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.protocol.fields import ProtocolError

Frame = bytes | memoryview
Row = tuple[str, str, tuple[int, ...], int, int]

OWN_FRAME_BYTES = 64 << 10
"""Of an array that is sent in a frame of its own: from there on pyzmq sends without a copy."""
_ALIGNMENT = 8
_PADDING = [bytes(size) for size in range(_ALIGNMENT)]
_MAX_SIZE = 2**63 - 1
_MAX_DIMENSIONS = 8
_DTYPES = {name: np.dtype(name) for name in ("uint8", "int16", "int32", "int64", "float32")}

assert sys.byteorder == "little", "frames hold arrays as they lie in memory"


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[Row], list[Frame]]:
    """(table, frames after the header); frames of large arrays share their memory."""
    table: list[Row] = []
    frames: list[Frame] = []
    small: list[tuple[str, NDArray[Any]]] = []
    for name, array in arrays.items():
        if array.nbytes < OWN_FRAME_BYTES:
            small.append((name, array))
        else:
            frames.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            table.append((name, _name_of(array.dtype), array.shape, len(frames), 0))
    if small:
        parts: list[bytes] = []
        end = 0
        for name, array in small:
            padding = -end % _ALIGNMENT
            table.append((name, _name_of(array.dtype), array.shape, len(frames) + 1, end + padding))
            parts += (_PADDING[padding], array.tobytes())
            end += padding + array.nbytes
        frames.append(b"".join(parts))
    return table, frames


def read_arrays(kind: str, table: Any, frames: Sequence[Frame], at_most: int) -> dict[str, NDArray[Any]]:
    """Inverse of `pack_arrays`, of all frames of a message: read-only views, at most so many.

    Raises ProtocolError, with the message's kind, for anything that is not laid out as above.
    """
    if type(table) is not list or len(table) > at_most:
        raise ProtocolError(f"{kind}: its table must be a list of at most {at_most} arrays, got {table!r:.80}")
    if len(frames) - 1 > len(table):
        raise ProtocolError(f"{kind}: {len(frames) - 1} frames follow the header, for {len(table)} arrays")
    arrays: dict[str, NDArray[Any]] = {}
    ends = [0] * len(frames)  # where the arrays so far end
    for row in table:
        if type(row) is not list or len(row) != 5 or type(row[0]) is not str:
            raise ProtocolError(f"{kind}: {row!r:.80} does not describe an array")
        name = row[0]
        if name in arrays:
            raise ProtocolError(f"{kind}: array {name!r:.40} comes twice")
        try:
            arrays[name] = _array(row, frames, ends)
        except ProtocolError as error:
            raise ProtocolError(f"{kind}.{name:.40}: {error}") from None
    for number, frame in enumerate(frames[1:], 1):
        if ends[number] != len(frame):
            raise ProtocolError(f"{kind}: frame {number} has {len(frame)} bytes, its arrays end at {ends[number]}")
    return arrays


def _array(row: list[Any], frames: Sequence[Frame], ends: list[int]) -> NDArray[Any]:
    _, dtype, shape, number, offset = row
    if type(dtype) is not str or dtype not in _DTYPES:
        raise ProtocolError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r:.40}")
    if not _is_shape(shape):
        raise ProtocolError(f"{shape!r:.80} is not a shape")
    if type(number) is not int or not 1 <= number < len(frames):
        raise ProtocolError(f"its frame must be one of the {len(frames) - 1} that follow, got {number!r:.40}")
    start = ends[number] + -ends[number] % _ALIGNMENT
    if type(offset) is not int or offset != start:
        raise ProtocolError(f"its offset in frame {number} must be {start}, got {offset!r:.40}")
    frame, kind, size = frames[number], _DTYPES[dtype], math.prod(shape)
    ends[number] = start + size * kind.itemsize
    if ends[number] > len(frame):
        raise ProtocolError(f"shape {shape!r:.80} of {dtype} ends at byte {ends[number]}, its frame has {len(frame)}")
    array = np.frombuffer(frame, kind, size, start) if size else np.empty(0, kind)
    try:
        return array if len(shape) == 1 else array.reshape(shape)
    except ValueError:  # no bytes, but lengths that no array can have
        raise ProtocolError(f"{shape!r:.80} is not a shape") from None


def _is_shape(shape: Any) -> bool:
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        return False
    for size in shape:  # noqa: SIM110 - a generator costs as much as the rest of an array's checks
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            return False
    return True


@functools.lru_cache(maxsize=16)
def _name_of(kind: np.dtype[Any]) -> str:
    name: str = kind.name  # which NumPy puts together anew each time, in microseconds
    return name
