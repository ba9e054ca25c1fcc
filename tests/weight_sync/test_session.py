"""The receiving half of an update, step by step, and every way in which it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.errors import (
    ChecksumError,
    IncompleteUpdateError,
    ManifestError,
    ParentMismatchError,
    ProtocolError,
    VersionOrderError,
)
from zerokl.weight_sync.live_weights import LiveWeights
from zerokl.weight_sync.manifest import Manifest, plan_layout, result_checksum
from zerokl.weight_sync.session import UpdateSession
from zerokl.weight_sync.transport import Bucket, Piece, bytes_of
from zerokl.weight_sync.version_order import check_version

Tensors = dict[str, Any]


def tensors_of(seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        "a": random.standard_normal((5, 7)).astype(np.float32),
        "b": random.standard_normal(33).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
    }


EXPECTED = {name: array.shape for name, array in tensors_of(0).items()}


def manifest_of(tensors: Tensors, version: int = 1, **changes: Any) -> Manifest:
    specs, total = plan_layout((name, array.dtype.name, array.shape) for name, array in tensors.items())
    specs = tuple(replace(spec, checksum=checksum_of(tensors[spec.name])) for spec in specs)
    return Manifest(version=version, tensors=specs, total_bytes=total, **changes)


def pieces_of(tensors: Tensors, size: int = 40) -> list[Bucket]:
    return [
        Bucket(pieces=(Piece(name=name, start=start, data=bytes_of(array)[start : start + size]),))
        for name, array in tensors.items()
        for start in range(0, array.nbytes, size)
    ]


def begun(tensors: Tensors | None = None) -> UpdateSession:
    session = UpdateSession(EXPECTED)
    session.begin(1, manifest_of(tensors_of(1) if tensors is None else tensors))
    return session


@pytest.mark.parametrize("size", [1, 16, 1 << 20])
def test_an_update_in_buckets_of_any_size(size: int) -> None:
    session = begun()
    for bucket in pieces_of(tensors_of(1), size):
        session.stage(bucket)
    tensors = session.verify()
    for name, array in tensors_of(1).items():
        np.testing.assert_array_equal(tensors[name], array)
    flipped: list[bool] = []
    session.commit(lambda: flipped.append(True))
    assert session.publish() == 1 and flipped == [True] and session.state == "published"
    with pytest.raises(ProtocolError, match="abort of version 1, which is published"):
        session.abort()


def test_steps_out_of_order_are_refused_and_change_nothing() -> None:
    steps: dict[str, Callable[[UpdateSession], Any]] = {
        "begin": lambda session: session.begin(1, manifest_of(tensors_of(1))),
        "stage": lambda session: session.stage(Bucket(pieces=())),
        "verify": lambda session: session.verify(),
        "commit": lambda session: session.commit(lambda: pytest.fail("flipped")),
        "publish": lambda session: session.publish(),
    }
    reached = [UpdateSession(EXPECTED), begun(), begun(), begun()]
    for session in reached[2:]:
        for bucket in pieces_of(tensors_of(1)):
            session.stage(bucket)
        session.verify()
    reached[3].commit(lambda: None)
    allowed = [{"begin"}, {"stage", "verify"}, {"commit"}, {"publish"}]
    for session, fine in zip(reached, allowed, strict=True):
        for name in steps.keys() - fine:
            state = session.state
            with pytest.raises(ProtocolError, match=f"{name} needs an update that is"):
                steps[name](session)
            assert session.state == state


def test_bytes_that_are_missing_strange_or_repeated() -> None:
    cases: list[tuple[Bucket | None, type[Exception], str]] = [
        (None, IncompleteUpdateError, r"1 tensors did not arrive whole, the first of them 'b' \(132 bytes"),
        (Bucket(pieces=(Piece(name="c", start=0, data=np.zeros(4, np.uint8)),)), ManifestError, "'c' is not in"),
        (Bucket(pieces=(Piece(name="b", start=8, data=np.zeros(4, np.uint8)),)), ManifestError, "byte 8 came where 0"),
        (Bucket(pieces=(Piece(name="b", start=0, data=np.zeros(140, np.uint8)),)), ManifestError, "0 to 140 of 132"),
        (pieces_of(tensors_of(1))[0], ManifestError, "byte 0 came where 140 was due"),
        (Bucket(pieces=(Piece(name="b", start=0, data=np.zeros(132, np.uint8)),)), ChecksumError, "'b' of version 1"),
    ]
    for bucket, error, text in cases:
        session = begun()
        for good in pieces_of({"a": tensors_of(1)["a"]}):
            session.stage(good)
        with pytest.raises(error, match=text):
            if bucket is not None:
                session.stage(bucket)
            session.verify()
        assert session.state == "aborted"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("b"), "missing: 'b'"),
        (lambda t: t.update(c=np.zeros(2, np.float32)), "extra: 'c'"),
        (lambda t: t.update(b=np.zeros((33, 1), np.float32)), r"'b' has shape \(33, 1\), expected \(33,\)"),
        (lambda t: t.update({"ü\n\0": np.zeros(2, np.float32)}), "extra"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_before_a_byte_is_read(change: Callable[..., Any], text: str) -> None:
    tensors = tensors_of(1)
    change(tensors)
    with pytest.raises(ManifestError, match=text):
        begun(tensors)


def test_what_a_device_placed_is_told_by_its_checksums() -> None:
    tensors, placed = tensors_of(1), dict.fromkeys(EXPECTED, 5)

    def placing() -> UpdateSession:
        session = UpdateSession(EXPECTED)
        session.check_fit(manifest_of(tensors))
        session.begin_placed(manifest_of(tensors))
        return session

    published = placed | {"more": 6}
    session = placing()
    session.verify_placed(published, placed)
    session.commit(lambda: None)
    assert session.publish() == 1
    for false, error, text in (
        (placed | {"b": 4}, ChecksumError, "'b' of version 1: checksum 0000000000000004 is not"),
        ({"a": 5, "none": 5}, IncompleteUpdateError, "version 1: tensor 'b' did not arrive"),
    ):
        session = placing()
        with pytest.raises(error, match=text):
            session.verify_placed(published, false)
        assert session.state == "aborted"
    with pytest.raises(ProtocolError, match="needs an update that is placing, this one is staging"):
        begun().verify_placed(published, placed)
    with pytest.raises(ProtocolError, match="stage needs an update that is staging, this one is placing"):
        placing().stage(pieces_of(tensors)[0])
    with pytest.raises(ManifestError, match="missing: 'b'"):
        UpdateSession(EXPECTED).check_fit(manifest_of({name: tensors[name] for name in ("a", "none")}))


def test_a_commit_that_raises_aborts() -> None:
    session = begun()
    for bucket in pieces_of(tensors_of(1)):
        session.stage(bucket)
    session.verify()

    def fail() -> None:
        raise MemoryError("no")

    with pytest.raises(MemoryError):
        session.commit(fail)
    assert session.state == "aborted"


# -- deltas ------------------------------------------------------------------------------------------------------------
def delta_session(live: Tensors, changed: Tensors, parent: int = 4, live_version: int = 4) -> UpdateSession:
    result = result_checksum({name: checksum_of(array) for name, array in (tensors_of(1) | changed).items()})
    session = UpdateSession(EXPECTED, LiveWeights(version=live_version, tensors=live))
    session.begin(5, manifest_of(changed, 5, parent=parent, result=result))
    for bucket in pieces_of(changed):
        session.stage(bucket)
    return session


def test_a_delta_is_verified_by_the_checksum_of_its_result() -> None:
    changed = {"b": tensors_of(2)["b"]}
    session = delta_session(tensors_of(1), changed)
    assert list(session.verify()) == ["b"]
    assert session.checksums == {name: checksum_of(array) for name, array in (tensors_of(1) | changed).items()}
    other = tensors_of(1)
    other["a"][0, 0] += 1
    with pytest.raises(ParentMismatchError, match="its publisher has"):
        delta_session(other, changed).verify()
    with pytest.raises(ParentMismatchError, match="a delta to version 3, but version 4 is live"):
        delta_session(tensors_of(1), changed, parent=3)


def test_a_delta_needs_a_live_set() -> None:
    with pytest.raises(ParentMismatchError, match="no complete set is live"):
        UpdateSession(EXPECTED).begin(5, manifest_of({}, 5, parent=4, result=0))


@pytest.mark.parametrize(("version", "kind"), [(4, "repetition"), (3, "step back"), (6, "gap")])
def test_versions_follow_each_other(version: int, kind: str) -> None:
    check_version(4, 5)
    check_version(4, version, allow_rewind=True)
    with pytest.raises(VersionOrderError, match=f"must be 5.*{kind}"):
        check_version(4, version)
