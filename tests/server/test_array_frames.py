"""Arrays in frames and back, and every way in which their table can be wrong."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zerokl.rollout.protocol.array_frames import OWN_FRAME_BYTES, pack_arrays, read_arrays
from zerokl.rollout.protocol.codec import decode
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.schema import CLIENT_MESSAGES

Rows = list[list[Any]]


def uploaded(table: Any, *frames: bytes) -> list[bytes]:
    """An `upload`, which has one array."""
    return [msgpack.packb([2, "upload", 1, 0, {"upload": 1, "pieces": []}, table]), *frames]


def scored(table: Any, *frames: bytes) -> list[bytes]:
    """A `score`, which has up to four."""
    return [msgpack.packb([2, "score", 1, 0, {"definition": "logprobs", "policy": "p"}, table]), *frames]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (uploaded([], b"x"), "1 frames follow the header, for 0 arrays"),
        (uploaded([["data", "uint8", [1], 1, 0]] * 9, b"x"), "at most 1 arrays"),
        (uploaded([["data", "uint8", [1], 1, 0]], b"x", b""), "2 frames follow the header, for 1 arrays"),
        (uploaded([["a", "uint8", [1], 1, 0]], b"x"), "no array 'a'"),
        (uploaded([]), "array data is missing"),
        (uploaded([["data", "int32", [1], 1, 0]], b"1234"), "must be uint8 of 1 dimensions"),
        (uploaded([5], b"x"), "does not describe"),
        (uploaded([["data", "uint8", [1], 1]], b"x"), "does not describe"),
        (uploaded([[b"data", "uint8", [1], 1, 0]], b"x"), "does not describe"),
        (uploaded([["data", "object", [1], 1, 0]], b"12345678"), "dtype must be one of"),
        (uploaded([["data", ["uint8"], [1], 1, 0]], b"x"), "dtype must be one of"),
        (uploaded([["data", "uint8", 1, 1, 0]], b"x"), "not a shape"),
        (uploaded([["data", "uint8", [-1], 1, 0]], b""), "not a shape"),
        (uploaded([["data", "uint8", [True], 1, 0]], b"x"), "not a shape"),
        (uploaded([["data", "uint8", [1] * 99, 1, 0]], b"x"), "not a shape"),
        (uploaded([["data", "uint8", [0, 2**62, 4], 1, 0]], b""), "not a shape"),
        (uploaded([["data", "uint8", [2**62, 4], 1, 0]], b"x"), "ends at byte 18446744073709551616, its frame has 1"),
        (uploaded([["data", "uint8", [2], 1, 0]], b"x"), "ends at byte 2, its frame has 1"),
        (uploaded([["data", "uint8", [1], 1, 0]], b"xy"), "frame 1 has 2 bytes, its arrays end at 1"),
        (uploaded([["data", "uint8", [1], 1, 0]]), "its frame must be one of the 0"),
        (uploaded([["data", "uint8", [0], 0, 0]], b""), "its frame must be one of the 1"),
        (uploaded([["data", "uint8", [0], -1, 0]], b""), "its frame must be one of the 1"),
        (uploaded([["data", "uint8", [0], 2**64 - 1, 0]], b""), "its frame must be one of the 1"),
        (uploaded([["data", "uint8", [0], True, 0]], b""), "its frame must be one of the 1"),
        (uploaded([["data", "uint8", [1], 1, 1]], b"xy"), "offset in frame 1 must be 0, got 1"),
        (uploaded([["data", "uint8", [1], 1, -1]], b"x"), "offset in frame 1 must be 0, got -1"),
        (uploaded([["data", "uint8", [1], 1, False]], b"x"), "offset in frame 1 must be 0, got False"),
        (scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [1], 1, 0]], bytes(4)), "must be 8, got 0"),
        (scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [1], 1, 4]], bytes(8)), "must be 8, got 4"),
        (scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [1], 1, 16]], bytes(20)), "must be 8, got 16"),
        (scored([["token_ids", "int32", [1], 1, 0], ["token_ids", "int32", [1], 1, 8]], bytes(12)), "comes twice"),
        (scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [2], 1, 8]], bytes(12)), "ends at byte 16"),
        (
            scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [0], 1, 8]], bytes(4), b""),
            "ends at byte 8, its frame has 4",
        ),
        (
            scored([["token_ids", "int32", [1], 1, 0], ["lens", "int32", [0], 1, 8]], bytes(8), b"x"),
            "frame 2 has 1 bytes, its arrays end at 0",
        ),
    ],
)
def test_wrong_tables_are_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(frames, CLIENT_MESSAGES)


@st.composite
def some_arrays(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    """Arrays of all types, small ones, empty ones and at times one or two that have frames of their own."""
    shapes = st.lists(st.integers(0, 5), max_size=3) | st.sampled_from([[OWN_FRAME_BYTES], [0, 7], [2, 9000]])
    arrays = {}
    for number in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(["uint8", "int16", "int32", "int64", "float32"]))
        shape = draw(shapes)
        array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
        arrays[f"array {number}"] = array.T if draw(st.booleans()) else array
    return arrays


def as_received(arrays: dict[str, NDArray[Any]]) -> tuple[Rows, list[bytes]]:
    """Table and frames as they come out of msgpack and a socket; frame 0 stands for the header."""
    table, frames = pack_arrays(arrays)
    return msgpack.unpackb(msgpack.packb(table)), [b"header", *map(bytes, frames)]


@settings(deadline=None)
@given(some_arrays())
def test_arrays_come_back_as_they_were(arrays: dict[str, NDArray[Any]]) -> None:
    table, frames = as_received(arrays)
    num_large = sum(array.nbytes >= OWN_FRAME_BYTES for array in arrays.values())
    assert len(frames) == 1 + num_large + (num_large < len(arrays))
    back = read_arrays("kind", table, frames, len(arrays))
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        if array.size:
            place = frames[next(row[3] for row in table if row[0] == name)]
            assert np.shares_memory(back[name], np.frombuffer(place, np.uint8))
            assert not back[name].flags.writeable


def test_large_arrays_are_not_copied() -> None:
    large, small = np.zeros(OWN_FRAME_BYTES, np.uint8), np.zeros(3, np.uint8)
    table, frames = pack_arrays({"small": small, "large": large})
    assert [(row[0], *row[3:]) for row in table] == [("large", 1, 0), ("small", 2, 0)]
    assert np.shares_memory(np.frombuffer(frames[0], np.uint8), large)


def shift(table: Rows, frames: list[bytes], draw: Any) -> None:
    """An array begins elsewhere: over another, beyond the end, off the boundary."""
    row = draw(st.sampled_from(table))
    row[4] = draw(st.integers(-(2**63), 2**64 - 1).filter(lambda offset: offset != row[4]) | st.just(row[4] + 4))


def move(table: Rows, frames: list[bytes], draw: Any) -> None:
    """An array lies in another frame, or in none."""
    row = draw(st.sampled_from(table))
    row[3] = draw(st.integers(-2, 9).filter(lambda frame: frame != row[3]))


def grow(table: Rows, frames: list[bytes], draw: Any) -> None:
    """An array is longer than its bytes."""
    row = draw(st.sampled_from(table))
    row[2] = [draw(st.integers(2**18, 2**63 - 1))]


def repeat(table: Rows, frames: list[bytes], draw: Any) -> None:
    """An array comes twice."""
    table.insert(draw(st.integers(0, len(table))), list(draw(st.sampled_from(table))))


def lengthen(table: Rows, frames: list[bytes], draw: Any) -> None:
    """A frame holds more than its arrays."""
    frames[draw(st.integers(1, len(frames) - 1))] += draw(st.binary(min_size=1, max_size=9))


def shorten(table: Rows, frames: list[bytes], draw: Any) -> None:
    """A frame ends within its arrays."""
    which = draw(st.integers(1, len(frames) - 1))
    frames[which] = frames[which][: draw(st.integers(0, len(frames[which]) - 1))]


def add(table: Rows, frames: list[bytes], draw: Any) -> None:
    """There are more frames than arrays."""
    frames += [b"x"] * draw(st.integers(1, 100))


DAMAGES = [shift, move, grow, repeat, lengthen, shorten, add]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(DAMAGES))
def test_any_damage_of_table_or_frames_is_refused(data: st.DataObject, damage: Any) -> None:
    given = {name: array for name, array in data.draw(some_arrays()).items() if array.size}
    given["last"] = np.arange(3, dtype=np.int32)
    table, frames = as_received(given)
    damage(table, frames, data.draw)
    with pytest.raises(ProtocolError) as caught:
        read_arrays("kind", table, frames, len(given))
    assert len(str(caught.value)) < 500
