"""Tensors that are read while they arrive: in whatever pieces, the same values, checked to the last byte."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.weight_sync import ChecksumError, IncompleteUpdateError, ManifestError, PublishedArrays, UpdateSession
from zerokl.weight_sync.arrivals import ArrivingTensors
from zerokl.weight_sync.transport import Bucket, Piece, bytes_of
from zerokl.weight_sync.views import widen

Tensors = dict[str, Any]


def some(seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        "a": random.standard_normal((40, 7)).astype(np.float32),
        "b": random.integers(0, 2**15, (33, 6)).astype(np.uint16),
        "c": random.standard_normal((9, 5)).astype(np.float16),
        "d": random.standard_normal(70).astype(np.float32),
        "e": np.zeros((0, 4), np.float32),
    }


def published(tensors: Tensors) -> Any:
    made = PublishedArrays(tensors, 1)
    for spec in made.manifest.tensors:
        if spec.dtype == "uint16":
            object.__setattr__(spec, "dtype", "bfloat16")
    return made.manifest


def pieces(tensors: Tensors, order: list[str], size: int) -> list[Piece]:
    return [
        Piece(name=name, start=start, data=bytes_of(tensors[name])[start : start + size])
        for name in order
        for start in range(0, tensors[name].nbytes, size)
    ]


def borrowed(made: list[Piece], per_bucket: int) -> Iterator[Bucket]:
    """What a bucket held is overwritten when the next one is asked for."""
    for start in range(0, len(made), per_bucket):
        copies = [Piece(name=p.name, start=p.start, data=p.data.copy()) for p in made[start : start + per_bucket]]
        yield Bucket(pieces=tuple(copies))
        for piece in copies:
            piece.data[:] = 0xA5


def floats(rows: np.ndarray) -> np.ndarray:
    return widen(rows, "bfloat16") if rows.dtype == np.uint16 else rows


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pieces_in_any_order_give_the_tensors(data: st.DataObject) -> None:
    tensors = some(data.draw(st.integers(0, 9)))
    order = data.draw(st.permutations(list(tensors)))
    made = pieces(tensors, order, data.draw(st.integers(1, 400)))
    lasting = data.draw(st.booleans())
    per_bucket = data.draw(st.integers(1, 5))
    buckets: Any = (
        [Bucket(pieces=tuple(made[i : i + per_bucket]), lasting=True) for i in range(0, len(made), per_bucket)]
        if lasting
        else borrowed(made, per_bucket)
    )
    manifest = published(tensors)
    arriving = ArrivingTensors(manifest, buckets, set(tensors) - {"d"})
    assert list(arriving) == ["a", "b", "c", "e"]
    for pair in data.draw(st.permutations([("a", "b"), ("c",)])):  # pairs are read side by side, as gate and up are
        taken: dict[str, list[np.ndarray]] = {name: [] for name in pair}
        step = data.draw(st.integers(1, 40))
        for stop in range(step, 40 + step, step):
            stops = {name: min(stop, len(tensors[name])) for name in pair}
            for name in pair:
                arriving[name].wait(stops[name])
            for name in pair:
                taken[name].append(floats(arriving[name].read(stops[name])).copy())
        for name, parts in taken.items():
            np.testing.assert_array_equal(np.concatenate(parts), floats(tensors[name]).astype(np.float32))
    arriving.finish()
    assert all(tensor.num_read == tensors[name].nbytes for name, tensor in arriving._tensors.items())


def begun(tensors: Tensors, buckets: list[Bucket]) -> tuple[UpdateSession, ArrivingTensors]:
    session = UpdateSession({name: array.shape for name, array in tensors.items()})
    session.begin(1, published(tensors))
    return session, session.arriving(buckets)


def test_a_flipped_bit_is_found_by_the_last_read_or_at_the_end() -> None:
    for name, is_read in (("a", True), ("a", False), ("d", True)):
        tensors = some(1)
        session, arriving = begun(some(1), [Bucket(pieces=tuple(pieces(tensors, list(tensors), 50)), lasting=True)])
        tensors[name].view(np.uint32).reshape(-1)[-1] ^= 1
        with pytest.raises(ChecksumError, match=f"'{name}' of version 1"):
            if is_read:
                arriving[name].read(40 if name == "a" else 1)
            session.verify_read()
        if not is_read:
            assert session.state == "aborted"


def test_a_source_that_ends_early_or_repeats_is_refused() -> None:
    tensors = some(2)
    made = pieces(tensors, list(tensors), 64)
    _, arriving = begun(tensors, [Bucket(pieces=tuple(made[:3]))])
    with pytest.raises(IncompleteUpdateError, match="ended before"):
        arriving["a"].read(40)
    session, _ = begun(tensors, [Bucket(pieces=tuple(made[:3]))])
    with pytest.raises(IncompleteUpdateError, match=r"'a' did not arrive whole .928 bytes are missing"):
        session.verify_read()
    for false, text in [
        ([made[0], made[0]], "byte 0 came where 64 was due"),
        ([made[1]], "byte 64 came where 0 was due"),
        ([Piece(name="x", start=0, data=made[0].data)], "'x' is not in the manifest"),
        ([Piece(name="a", start=0, data=np.zeros(2000, np.uint8))], "bytes 0 to 2000 of 1120"),
    ]:
        session, _ = begun(tensors, [Bucket(pieces=tuple(false))])
        with pytest.raises(ManifestError, match=text):
            session.verify_read()


def test_what_others_read_is_counted_and_not_looked_at() -> None:
    tensors = some(3)
    for missing in (0, 1):
        made = pieces(tensors, list(tensors), 64)
        for piece in made:
            if piece.name == "a":
                piece.data[:] = 0
        arriving = ArrivingTensors(published(some(3)), borrowed(made[missing:], 2), set(tensors), set(tensors) - {"a"})
        if missing:
            with pytest.raises(ManifestError, match="byte 64 came where 0 was due"):
                arriving.finish()
        else:
            arriving.finish()
            with pytest.raises(ChecksumError, match="'a'"):
                ArrivingTensors(published(some(3)), borrowed(made, 2), set(tensors)).finish()


def test_what_is_read_in_order_needs_little_memory() -> None:
    tensors = {f"t{i}": np.ones((500, 500), np.float32) for i in range(12)}
    arriving = ArrivingTensors(published(tensors), borrowed(pieces(tensors, list(tensors), 100_000), 1), set(tensors))
    tracemalloc.start()
    for name in tensors:
        for stop in range(50, 501, 50):
            arriving[name].read(stop)
    arriving.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_500_000  # of 12 MB; new windows are of 1 MiB
