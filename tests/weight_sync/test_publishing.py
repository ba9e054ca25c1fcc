"""Publishing and opening in one process: contents, leases, buffers, and the refusal of whatever is not as published."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leftovers import segments_of
from numpy.typing import NDArray

from zerokl.weight_sync import (
    BufferLeasedError,
    ChecksumError,
    Manifest,
    ManifestError,
    PublishedWeights,
    SegmentBusyError,
    SegmentMissingError,
    SegmentTruncatedError,
    WeightPublisher,
    open_published,
)
from zerokl.weight_sync.segments import OwnedSegment
from zerokl.weight_sync.tensor_spec import DTYPES

Tensors = dict[str, NDArray[Any]]


def some_tensors(fill: float = 0.0) -> Tensors:
    """A few tensors, one of more than one checksum chunk."""
    random = np.random.default_rng(7)
    return {
        "embed": random.standard_normal((700, 601)).astype(np.float32) + np.float32(fill),
        "norm": np.full(33, fill, np.float32),
        "scale": np.array(fill, np.float64),
        "none": np.zeros((0, 5), np.int8),
    }


def opened_copy(published: PublishedWeights) -> Tensors:
    with open_published(published) as tensors:
        return {name: array.copy() for name, array in tensors.items()}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_published_is_what_is_opened(data: st.DataObject) -> None:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
    array = hnp.arrays(st.sampled_from(list(DTYPES.values())), shapes)
    tensors = data.draw(
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), array, max_size=5)
    )
    with WeightPublisher() as publisher:
        assert_same(opened_copy(publisher.publish(tensors, version=5)), tensors)


def test_a_set_of_another_layout_than_the_one_before_is_laid_out_anew() -> None:
    values = np.arange(6, dtype=np.float32)
    sets: list[Tensors] = [
        {"a": values, "b": -values},
        {"a": values + 1, "b": -values},  # as before
        {"a": values.reshape(2, 3), "b": -values},
        {"a": values.reshape(2, 3), "c": -values},
        {"c": -values, "a": values.reshape(2, 3)},
        {"c": -values.astype(np.int32), "a": values.reshape(2, 3)},
    ]
    with WeightPublisher() as publisher:
        for version, tensors in enumerate(sets):
            assert_same(opened_copy(publisher.publish(tensors, version)), tensors)
        rounded = publisher.publish(sets[0], 10, dtype="bfloat16").manifest
        assert [(spec.dtype, spec.nbytes) for spec in rounded.tensors] == [("bfloat16", 12)] * 2
        with pytest.raises(ManifestError, match="version"):
            publisher.publish(sets[0], -1, dtype="bfloat16")
        assert_same(opened_copy(publisher.publish(sets[0], 11)), sets[0])


def test_strided_sources_are_laid_out_in_c_order() -> None:
    base = np.arange(3_000_000, dtype=np.float32).reshape(1500, 2000)
    tensors = {"transposed": base.T, "every other": base[::2, 1::3], "backwards": base[::-1]}
    with WeightPublisher() as publisher:
        assert_same(opened_copy(publisher.publish(tensors.items(), version=0)), tensors)


def test_views_are_read_only_aligned_and_not_copies() -> None:
    with WeightPublisher() as publisher, open_published(publisher.publish(some_tensors(), 1)) as tensors:
        for name, array in tensors.items():
            assert array.ctypes.data % 64 == 0 or not array.size, name
            assert not array.flags.writeable and not array.flags.owndata, name
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 1
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                array.setflags(write=True)
        del array


def test_segments_are_used_again_and_grow_when_they_must() -> None:
    with WeightPublisher(buffers=2) as publisher:
        names = [publisher.publish(some_tensors(v), v).segment for v in range(6)]
        assert names == names[:2] * 3 and len(set(names)) == 2
        grown = publisher.publish({"large": np.ones(1_000_000)}, 6)
        assert grown.segment not in names
        assert len(segments_of(os.getpid())) == 2
        assert_same(opened_copy(grown), {"large": np.ones(1_000_000)})


def test_two_publishers_at_once_do_not_meet() -> None:
    with WeightPublisher("policy") as one, WeightPublisher("policy") as two:
        first = [one.publish(some_tensors(v), v) for v in range(2)]
        second = [two.publish(some_tensors(-v), v) for v in range(2)]
        assert len({published.segment for published in first + second}) == 4
        for version in range(2):
            assert_same(opened_copy(first[version]), some_tensors(version))
            assert_same(opened_copy(second[version]), some_tensors(-version))


# -- leases ------------------------------------------------------------------------------------------------------------
def test_a_reader_keeps_its_version_until_it_leaves() -> None:
    with WeightPublisher(buffers=2) as publisher:
        first = publisher.publish(some_tensors(1), 1)
        with open_published(first) as tensors:
            publisher.publish(some_tensors(2), 2)
            with pytest.raises(BufferLeasedError, match=first.segment):
                publisher.publish(some_tensors(3), 3)
            assert_same(tensors, some_tensors(1))
        third = publisher.publish(some_tensors(3), 3)
        assert third.segment == first.segment
        assert_same(opened_copy(third), some_tensors(3))


def test_several_readers_share_a_version() -> None:
    with WeightPublisher(buffers=1) as publisher:
        published = publisher.publish(some_tensors(), 1)
        with open_published(published) as one, open_published(published) as two:
            assert_same(one, two)
        publisher.publish(some_tensors(), 2)


def test_a_view_kept_beyond_the_block_is_never_overwritten() -> None:
    with WeightPublisher(buffers=1) as publisher:
        with open_published(publisher.publish(some_tensors(1), 1)) as tensors:
            kept = tensors["embed"]
        assert tensors == {}
        with pytest.raises(BufferLeasedError):
            publisher.publish(some_tensors(2), 2)
        np.testing.assert_array_equal(kept, some_tensors(1)["embed"])
        del kept
        publisher.publish(some_tensors(2), 2)


def test_a_failed_block_gives_the_lease_back() -> None:
    with WeightPublisher(buffers=1) as publisher:
        published = publisher.publish(some_tensors(), 1)
        with pytest.raises(ZeroDivisionError), open_published(published):
            raise ZeroDivisionError
        publisher.publish(some_tensors(), 2)


def test_the_lease_of_a_killed_reader_is_dropped() -> None:
    program = (
        "import sys, zerokl.weight_sync as w\n"
        "with w.open_published(w.PublishedWeights.from_bytes(bytes.fromhex(sys.argv[1]))):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with WeightPublisher(buffers=1) as publisher:
        published = publisher.publish(some_tensors(), 1)
        command = [sys.executable, "-c", program, published.to_bytes().hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None and reader.stdout.readline() == b"open\n"
            with pytest.raises(BufferLeasedError):
                publisher.publish(some_tensors(), 2)
            reader.kill()
        assert_same(opened_copy(publisher.publish(some_tensors(3), 3)), some_tensors(3))


def test_a_publication_being_overwritten_cannot_be_opened() -> None:
    segment = OwnedSegment("policy", 4096)
    published = PublishedWeights(segment=segment.name, manifest=Manifest(version=0, tensors=(), total_bytes=0))
    with segment.writing(), pytest.raises(SegmentBusyError), open_published(published):
        pytest.fail("opened while it is written")
    segment.close()


# -- what must be refused ----------------------------------------------------------------------------------------------
def flip_bit(published: PublishedWeights, at: int) -> None:
    with Path("/dev/shm" + published.segment).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(("name", "byte"), [("embed", 0), ("embed", 700 * 601 * 4 - 1), ("norm", 50), ("scale", 7)])
def test_a_flipped_bit_is_found_and_its_tensor_named(name: str, byte: int) -> None:
    with WeightPublisher() as publisher:
        published = publisher.publish(some_tensors(), 4)
        spec = next(spec for spec in published.manifest.tensors if spec.name == name)
        flip_bit(published, spec.offset + byte)
        with pytest.raises(ChecksumError, match=f"tensor '{name}' of version 4"), open_published(published):
            pytest.fail("opened damaged weights")
        flip_bit(published, spec.offset + byte)
        assert_same(opened_copy(published), some_tensors())
        publisher.publish(some_tensors(), 5)
        publisher.publish(some_tensors(), 6)


def test_padding_between_tensors_is_not_part_of_them() -> None:
    with WeightPublisher() as publisher:
        published = publisher.publish({"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}, 0)
        flip_bit(published, 12)
        opened_copy(published)


def test_an_overwritten_publication_is_refused() -> None:
    with WeightPublisher(buffers=1) as publisher:
        first = publisher.publish(some_tensors(1), 1)
        publisher.publish(some_tensors(2), 2)
        with pytest.raises(ChecksumError, match="overwritten by a later publication"), open_published(first):
            pytest.fail("opened version 1")


def test_a_truncated_segment_is_refused() -> None:
    with WeightPublisher() as publisher:
        published = publisher.publish(some_tensors(), 0)
        os.truncate("/dev/shm" + published.segment, published.manifest.total_bytes - 1)
        with pytest.raises(SegmentTruncatedError, match=f"{published.manifest.total_bytes - 1} bytes"):
            opened_copy(published)
        os.truncate("/dev/shm" + published.segment, 0)
        with pytest.raises(SegmentTruncatedError, match="has 0 bytes"):
            opened_copy(published)


def test_a_closed_publisher_leaves_nothing_to_open() -> None:
    publisher = WeightPublisher()
    published = publisher.publish(some_tensors(), 0)
    with open_published(published) as tensors:
        publisher.close()
        publisher.close()
        assert_same(tensors, some_tensors())
    with pytest.raises(SegmentMissingError, match=published.segment):
        opened_copy(published)
    with pytest.raises(ValueError, match="publisher 'policy' is closed"):
        publisher.publish(some_tensors(), 1)


@pytest.mark.parametrize("name", ["/psm_1234", "zerokl-policy-1-2-3-0011223344556677", "/../etc/passwd", "/zerokl", ""])
def test_only_names_of_ours_are_attached(name: str) -> None:
    published = PublishedWeights(segment=name, manifest=Manifest(version=0, tensors=(), total_bytes=0))
    with pytest.raises(SegmentMissingError, match="is not a name"):
        opened_copy(published)


@pytest.mark.parametrize(
    ("tensors", "version", "message"),
    [
        ({"w": np.zeros(2)}, -1, "version -1"),
        ({"w": np.zeros(2)}, 1.0, r"version 1\.0"),
        ({"": np.zeros(2)}, 1, "1 to 1024 characters"),
        ([("w", np.zeros(2)), ("w", np.zeros(2))], 1, "'w' is listed twice"),
        ({"w": np.zeros(2, bool)}, 1, "'w': dtype 'bool' is not one of"),
        ({"w": np.zeros(2, ">f4")}, 1, "'w': dtype '>f4' is not in this machine's byte order"),
        ({"w": [1.0, 2.0]}, 1, "'w' is a list, not a numpy array"),
    ],
)
def test_what_cannot_be_published_leaves_the_latest_version_alone(tensors: Any, version: Any, message: str) -> None:
    with WeightPublisher(buffers=2) as publisher:
        latest = [publisher.publish(some_tensors(v), v) for v in range(2)][-1]
        with pytest.raises(ManifestError, match=message):
            publisher.publish(tensors, version)
        assert_same(opened_copy(latest), some_tensors(1))


def test_a_source_that_fails_midway_leaves_the_latest_version_alone() -> None:
    def failing() -> Any:
        yield from some_tensors(9).items()
        raise OSError("the trainer's iterator broke")

    with WeightPublisher(buffers=2) as publisher:
        latest = [publisher.publish(some_tensors(v), v) for v in range(2)][-1]
        with pytest.raises(OSError, match="iterator broke"):
            publisher.publish(failing(), 2)
        assert_same(opened_copy(latest), some_tensors(1))
        assert_same(opened_copy(publisher.publish(some_tensors(3), 3)), some_tensors(3))


@pytest.mark.parametrize("arguments", [{"buffers": 0}, {"buffers": True}, {"buffers": 2.0}])
def test_bad_buffer_counts_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"buffers .* is not an integer from 1"):
        WeightPublisher(**arguments)


def test_a_bad_label_is_refused() -> None:
    with WeightPublisher("no/slash") as publisher, pytest.raises(ValueError, match="label 'no/slash'"):
        publisher.publish(some_tensors(), 0)
