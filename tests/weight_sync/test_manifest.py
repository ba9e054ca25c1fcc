"""The manifest: layout, validation, comparison with a model, and its encoded form under arbitrary damage."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.weight_sync import Manifest, ManifestError, PublishedWeights, TensorSpec
from zerokl.weight_sync.manifest import plan_layout
from zerokl.weight_sync.tensor_spec import ALIGNMENT, DTYPES

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_lists = st.lists(st.tuples(names, st.sampled_from(sorted(DTYPES)), shapes), max_size=8, unique_by=lambda t: t[0])


def manifest_of(tensors: list[tuple[str, str, tuple[int, ...]]], version: int = 3) -> Manifest:
    specs, total_bytes = plan_layout(tensors)
    return Manifest(version=version, tensors=specs, total_bytes=total_bytes)


@settings(max_examples=60, deadline=None)
@given(tensor_lists, st.integers(0, 2**63 - 1))
def test_layout_is_aligned_and_dense_and_survives_the_wire(tensors: list[Any], version: int) -> None:
    manifest = manifest_of(tensors, version)
    end = 0
    for spec, (name, dtype, shape) in zip(manifest.tensors, tensors, strict=True):
        assert (spec.name, spec.dtype, spec.shape) == (name, dtype, shape)
        assert spec.nbytes == math.prod(shape) * DTYPES[dtype].itemsize
        assert spec.offset % ALIGNMENT == 0 and 0 <= spec.offset - end < ALIGNMENT
        end = spec.offset + spec.nbytes
    assert 0 <= manifest.total_bytes - end < ALIGNMENT
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    published = PublishedWeights(segment="/anything", manifest=manifest)
    assert PublishedWeights.from_bytes(published.to_bytes()) == published
    assert published.version == version


@settings(max_examples=150, deadline=None)
@given(tensor_lists, st.data())
def test_damaged_bytes_are_refused_or_still_well_formed(tensors: list[Any], data: st.DataObject) -> None:
    encoded = bytearray(manifest_of(tensors).to_bytes())
    at = data.draw(st.integers(0, len(encoded) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "append"]))
    if damage == "flip":
        encoded[at] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del encoded[at:]
    else:
        encoded.append(0)
    try:
        manifest = Manifest.from_bytes(bytes(encoded))
    except ManifestError:
        return
    assert damage == "flip"
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_raise_the_typed_error(encoded: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(encoded)
    with pytest.raises(ManifestError):
        PublishedWeights.from_bytes(encoded)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "name": "w",
        "dtype": "float32",
        "shape": [2, 3],
        "offset": 0,
        "checksum": 0,
        "spans": None,
        "whole": 0,
    } | changes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(name="")], "1 to 1024 characters"),
        ([row(name=7)], "1 to 1024 characters"),
        ([row(name="x" * 1025)], "1 to 1024 characters"),
        ([row(dtype="bfloat17")], "dtype 'bfloat17' is not one of float64"),
        ([row(dtype=4)], "is not a row"),
        ([row(shape=[2, -1])], "shape .2, -1. is not a tuple of sizes"),
        ([row(shape=[2, True])], "shape .2, True. is not"),
        ([row(shape="ab")], "is not a row"),
        ([row(offset=32)], "offset 32 is not a multiple of 64"),
        ([row(offset=-64)], "offset -64 is not a multiple"),
        ([row(whole=-1)], "whole -1 is not an unsigned"),
        ([row(checksum=-1)], "checksum -1 is not an unsigned"),
        ([row(checksum=0.5)], "checksum 0.5 is not an unsigned"),
        ([row(), row(offset=64)], "'w' is listed twice"),
        ([row(shape=[17]), row(name="v", offset=64)], "'v': offset 64, but the one before ends at 68"),
        ([row(offset=128)], "'w': ends at byte 152, beyond total_bytes 128"),
        ([row(shape=[2**40, 2**40])], "beyond total_bytes"),
        ([row() | {"more": 1}], "is not a row"),
        ([row(spans=[[0, 2]])], "has spans, but the set is no delta"),
        ([row(spans=[[0, 7]])], "span .0, 7. is not a range of its 6 elements"),
        ([row(spans=[[0, 1], [2, 2]])], "is not a range"),
        ([row(spans=3)], "are not a tuple of ranges"),
        ([row(spans=[3])], "is not a range"),
        ([row(spans=[])], "are not a tuple of ranges"),
        ([row(spans=[[2, 4], [3, 5]])], "begins before the end of the one before, 4"),
        (["w"], "is not a row"),
        ("w", "the tensor table is not a list"),
    ],
)
def test_malformed_tables_name_tensor_field_and_value(rows: Any, message: str) -> None:
    table = [list(entry.values()) if isinstance(entry, dict) else entry for entry in rows] if rows != "w" else rows
    with pytest.raises(ManifestError, match=message):
        Manifest.from_bytes(msgpack.packb([7, 0, 128, None, None, "float32", False, "xxh3_64", table]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 0, 0, []], "format version 1 is not 7"),
        ([], "expected a list"),
        ({"format": 1}, "expected a list, got dict"),
        ([7, 0, 0], "expected 9 fields, got 3"),
        ([7, -1, 0, None, None, "float32", False, "xxh3_64", []], "version -1 is not an integer from 0"),
        ([7, True, 0, None, None, "float32", False, "xxh3_64", []], "version True is not"),
        ([7, 2**63, 0, None, None, "float32", False, "xxh3_64", []], "is not an integer from 0"),
        ([7, 0, -1, None, None, "float32", False, "xxh3_64", []], "total_bytes -1 is not"),
        ([7, 0, "0", None, None, "float32", False, "xxh3_64", []], "total_bytes '0' is not"),
        ([7, 1, 0, 0, None, "float32", False, "xxh3_64", []], "belong together"),
        ([7, 1, 0, -1, 7, "float32", False, "xxh3_64", []], "not a version and a checksum"),
        ([7, 1, 0, None, None, "float32", 0, "xxh3_64", []], "inexact 0 is not a bool"),
        ([7, 1, 0, 0, 7, "float16", False, "xxh3_64", []], "result_dtype 'float16' is not float32 or bfloat16"),
        ([7, 1, 0, None, None, "float32", False, "crc", []], "checksum_kind 'crc' is not one of"),
        ([7, 1, 0, 0, 7, "float32", False, "splitmix64_sum", []], "must be 'xxh3_64' of a delta"),
    ],
)
def test_malformed_heads_are_refused(content: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.from_bytes(msgpack.packb(content))


def test_a_name_without_utf8_form_is_refused() -> None:
    with pytest.raises(ManifestError, match="lone surrogate"):
        TensorSpec(name="w\udc80", dtype="float32", shape=(), offset=0)


def test_difference_to_a_model_names_missing_extra_and_misshapen() -> None:
    manifest = manifest_of([("a", "float32", (2, 3)), ("b", "float32", (4,)), ("d", "float32", ())])
    assert not manifest.diff({"a": (2, 3), "b": (4,), "d": ()})
    manifest.require({"d": (), "a": (2, 3), "b": (4,)})
    difference = manifest.diff({"a": (3, 2), "c": (1,), "d": ()})
    assert difference.missing == ("c",) and difference.extra == ("b",)
    assert difference.misshapen == (("a", (2, 3), (3, 2)),)
    expected = r"version 3 .* missing: 'c'; extra: 'b'; misshapen: 'a' has shape \(2, 3\), expected \(3, 2\)"
    with pytest.raises(ManifestError, match=expected):
        manifest.require({"a": (3, 2), "c": (1,), "d": ()})


def test_a_long_difference_is_cut_short() -> None:
    text = manifest_of([]).diff({f"layer.{i}": (1,) for i in range(100)}).describe()
    assert "'layer.7' and 92 more" in text and "'layer.8'" not in text


def test_a_manifest_of_many_tensors_is_checked_in_reasonable_time() -> None:
    manifest = manifest_of([(f"t{i}", "float32", (1,)) for i in range(20_000)])
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
