"""Every way of carrying weights gives the same tensors; a file is whole or is not there."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from zerokl.weight_sync import (
    ChecksumError,
    ManifestError,
    PublishedArrays,
    PublishedFile,
    PublishedShards,
    SegmentMissingError,
    SegmentTruncatedError,
    TrainerLayout,
    UpdateSession,
    WeightPublisher,
    from_hugging_face,
    paddleformers_layout,
    publish_file,
    to_hugging_face,
)
from zerokl.weight_sync.session import receive

Tensors = dict[str, Any]
HEADS, KV_HEADS, SIZE, WIDTH, INNER = 6, 2, 4, 10, 14


def model_tensors(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (11, WIDTH),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * SIZE, WIDTH),
        "model.layers.0.self_attn.q_proj.bias": (HEADS * SIZE,),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * SIZE, WIDTH),
        "model.layers.0.self_attn.k_proj.bias": (KV_HEADS * SIZE,),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * SIZE, WIDTH),
        "model.layers.0.self_attn.v_proj.bias": (KV_HEADS * SIZE,),
        "model.layers.0.mlp.gate_proj.weight": (INNER, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (INNER, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, INNER),
        "model.norm.weight": (WIDTH,),
        "nothing": (0, 4),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_equal(actual: Any, expected: Tensors) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def received(publication: Any, bucket_bytes: int = 100) -> Tensors:
    session = UpdateSession({name: array.shape for name, array in model_tensors().items()})
    with publication.open() as lease:
        tensors = receive(session, publication.version, lease, bucket_bytes)
        copies = {name: np.array(tensors[name]) for name in tensors}
        del tensors
        session.release()
    return copies


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_all_transports_bring_the_same(tmp_path: Path, bucket_bytes: int) -> None:
    expected = model_tensors()
    with WeightPublisher() as publisher:
        for publication in (
            publisher.publish(expected, 3),
            publish_file(tmp_path / "w.safetensors", expected, 3),
            PublishedArrays(expected, 3),
        ):
            assert publication.version == 3
            assert_equal(received(publication, bucket_bytes), expected)


def test_a_rounded_file_brings_what_a_rounded_segment_does(tmp_path: Path) -> None:
    given = {name: array for name, array in model_tensors().items() if array.dtype == np.float32}
    with WeightPublisher() as publisher:
        expected = received(publisher.publish(given, 1, dtype="bfloat16"))
        for inexact in (True, False):
            file = publish_file(tmp_path / "w.safetensors", given, 1, dtype="bfloat16", inexact=inexact)
            assert_equal(received(file), expected)
            with file.open() as lease:
                assert lease.manifest.inexact is inexact
    with pytest.raises(ManifestError, match="rounds float32 tensors, 'odd'"):
        publish_file(tmp_path / "w.safetensors", {"odd": np.zeros(3)}, 2, dtype="bfloat16")


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_file_is_replaced_at_once_and_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    first = publish_file(path, model_tensors(1), 1)
    with first.open() as lease:
        second = publish_file(path, model_tensors(2), 2)
        session = UpdateSession({name: array.shape for name, array in model_tensors().items()})
        assert_equal(receive(session, 1, lease), model_tensors(1))
    assert_equal(received(second), model_tensors(2))
    assert_equal(load_file(path), model_tensors(2))
    with pytest.raises(ManifestError, match="holds version 2, not 1"):
        received(first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    publication = publish_file(path, model_tensors(1), 1)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for size in (0, 7, 8, 100, len(whole) - 1, *random.integers(len(whole), size=10)):
        path.write_bytes(whole[:size])
        with pytest.raises((SegmentTruncatedError, ManifestError), match=r"w\.safetensors"):
            received(publication)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in random.integers(start, len(whole), size=10):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ChecksumError):
            received(publication)
    path.unlink()
    with pytest.raises(SegmentMissingError, match="no such file"):
        received(PublishedFile(path=str(path), version=1))


_FULL_DISK = """
import resource, sys, numpy as np
from zerokl.weight_sync import DiskFullError, publish_file
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    publish_file(sys.argv[1], {"a": np.ones(100_000, np.float32)}, 2)
except DiskFullError as error:
    print("full:", error)
"""


@pytest.mark.parametrize("limit", [1, 4096, 300_000])
def test_a_full_disk_leaves_the_file_before(tmp_path: Path, limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "w.safetensors"
    first = publish_file(path, model_tensors(1), 1)
    command = [sys.executable, "-c", _FULL_DISK, str(path), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.startswith("full: cannot write 400000 bytes to"), run
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert_equal(received(first), model_tensors(1))


# -- shards ------------------------------------------------------------------------------------------------------------
def test_shards_are_joined() -> None:
    expected = model_tensors()
    axes = {name: 1 if "down" in name else 0 for name in expected if "proj" in name}
    cut = {name: np.split(array, 2, axis=axes[name]) for name, array in expected.items() if name in axes}
    ranks = [{name: cut[name][rank] if name in cut else expected[name] for name in expected} for rank in range(2)]
    with WeightPublisher("rank0") as zero, WeightPublisher("rank1") as one:
        published = tuple(made.publish(shard, 4) for made, shard in zip((zero, one), ranks, strict=True))
        shards = PublishedShards(ranks=published, axes=axes)
        assert PublishedShards.from_bytes(shards.to_bytes()) == shards
        with shards.verified() as tensors:
            assert tensors.shapes() == {name: array.shape for name, array in expected.items()}
            assert_equal(tensors, expected)
            del tensors
        with pytest.raises(ManifestError, match=r"'model\.layers\.0.*is not cut, but differs"):
            PublishedShards(ranks=published)
        later = zero.publish(ranks[0], 5)
        with pytest.raises(ManifestError, match="rank 1 published version 4, rank 0 5"):
            PublishedShards(ranks=(later, published[1]), axes=axes)


# -- layouts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "layout",
    [
        TrainerLayout(num_heads=HEADS, num_kv_heads=KV_HEADS),
        TrainerLayout(num_heads=HEADS, num_kv_heads=KV_HEADS, fused_qkv="qkv_proj", fused_gate_up="gate_up_proj"),
        TrainerLayout(num_heads=HEADS, num_kv_heads=KV_HEADS, fused_gate_up="up_gate_proj", up_first=True),
        TrainerLayout(num_heads=HEADS, num_kv_heads=KV_HEADS, prefix=("llama.", "model."), transposed=True),
        paddleformers_layout(HEADS, KV_HEADS),
        paddleformers_layout(HEADS, KV_HEADS, fused=False),
    ],
)
def test_layouts_there_and_back(layout: TrainerLayout) -> None:
    expected = model_tensors()
    there = from_hugging_face(expected, layout)
    assert_equal(to_hugging_face(there, layout), expected)


def test_a_fused_matrix_by_groups_is_told_apart_from_one_by_blocks() -> None:
    tensors = model_tensors()
    layout = paddleformers_layout(HEADS, KV_HEADS)
    fused = from_hugging_face(tensors, layout)["model.layers.0.self_attn.qkv_proj.weight"].T
    q, k, v = (tensors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    per_group = HEADS // KV_HEADS * SIZE
    np.testing.assert_array_equal(fused[:per_group], q[:per_group])
    np.testing.assert_array_equal(fused[per_group : per_group + SIZE], k[:SIZE])
    np.testing.assert_array_equal(fused[per_group + SIZE : per_group + 2 * SIZE], v[:SIZE])


def test_what_does_not_fit_a_layout_is_named() -> None:
    layout = TrainerLayout(num_heads=HEADS, num_kv_heads=KV_HEADS, fused_qkv="qkv", fused_gate_up="gu")
    with pytest.raises(ManifestError, match=r"'a\.qkv\.weight': 7 rows are not 6 \+ 2 x 2 heads"):
        to_hugging_face({"a.qkv.weight": np.zeros((7, 2))}, layout)
    with pytest.raises(ManifestError, match=r"'a\.gu\.weight': 7 rows are not two halves"):
        to_hugging_face({"a.gu.weight": np.zeros((7, 2))}, layout)
    with pytest.raises(ManifestError, match=r"'a\.k_proj\.weight' is missing"):
        from_hugging_face({"a.q_proj.weight": np.zeros((24, 2))}, layout)
    with pytest.raises(ValueError, match="num_heads 5 is not a multiple"):
        TrainerLayout(num_heads=5, num_kv_heads=2)
