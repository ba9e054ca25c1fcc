"""Weights staged while steps run, and deltas: equal to a fresh worker, step by step."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.models.packed_tensors import PackedTensors
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config
from zerokl.rollout.ranks import OneRank, Ranks, make_ranks
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.weight_source import FolderWeights, SharedWeights, TensorWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.weight_sync import PublishedShards, WeightPublisher, publish_file
from zerokl.weight_sync.errors import ParentMismatchError

CONTENTS = [
    tiny_config("LlamaForCausalLM"),
    tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True),
    tiny_config("Qwen2ForCausalLM"),
]


def a_step() -> StepInputs:
    rows = np.arange(19, dtype=np.int32)
    sampling = dataclasses.replace(neutral_sampling(19), seed=rows.astype(np.uint64), want_raw=True)
    tokens = np.arange(1, 20, dtype=np.int32)
    return step_inputs([tokens], [0], [[5, 3]], 16, logit_rows=rows, sampling=sampling)


def bits(worker: Ranks) -> bytes:
    result = worker.execute([StepOrder(inputs=a_step())])[0].sampled
    return result.tokens.tobytes() + result.logprobs.tobytes()


def options(folder: Path, content: dict[str, Any], **changes: Any) -> EngineConfig:
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), 0))
    return EngineConfig(model=str(folder), num_blocks=8, max_model_len=128, num_threads=1, **changes)


@pytest.fixture(params=["inprocess", "process"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ranks]:
    made = make_ranks(options(tmp_path, CONTENTS[0], worker=request.param))
    made.stage_weights(FolderWeights(path=str(tmp_path)), 0)
    made.commit_weights()
    yield made
    made.close()


def fresh_bits(folder: Path, tensors: dict[str, Any]) -> bytes:
    fresh = OneRank(LocalWorker(EngineConfig(model=str(folder), num_blocks=8, max_model_len=128, num_threads=1)))
    fresh.stage_weights(TensorWeights(tensors=tensors), 0)
    fresh.commit_weights()
    return bits(fresh)


def test_steps_beside_staging_see_one_version(worker: Ranks, tmp_path: Path) -> None:
    model = ModelConfig.from_json(CONTENTS[0])
    sets = [random_tensors(model, seed) for seed in range(2)]
    expected = [fresh_bits(tmp_path, tensors) for tensors in sets]
    with WeightPublisher() as publisher:
        for version in range(1, 9):
            published = publisher.publish(sets[version % 2], version)
            stager = threading.Thread(target=worker.stage_weights, args=(SharedWeights(published=published), version))
            stager.start()
            seen = [bits(worker)]
            while stager.is_alive():
                seen.append(bits(worker))
            assert set(seen) == {expected[(version - 1) % 2]}
            worker.commit_weights()
            assert bits(worker) == expected[version % 2]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_chain_of_deltas_equals_a_fresh_worker(worker: Ranks, tmp_path: Path, dtype: Any) -> None:
    tensors = random_tensors(ModelConfig.from_json(CONTENTS[0]), 0)
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    with WeightPublisher() as publisher:
        worker.stage_weights(SharedWeights(published=publisher.publish(tensors, 0, dtype=dtype)), 0)
        worker.commit_weights()
        for version in range(1, 21):
            name = names[version % 3]
            tensors[name] = tensors[name].copy()
            ranges = [(0, 8), (11, 12), (tensors[name].size - 5, tensors[name].size)]
            for start, stop in ranges:
                tensors[name].reshape(-1)[start:stop] += np.float32(0.125)
            spans = {name: ranges} if version % 2 else {}
            published = publisher.publish_delta({name: tensors[name]}, version, spans=spans)
            worker.stage_weights(SharedWeights(published=published), version)
            worker.commit_weights()
        expected = fresh_bits(tmp_path, tensors if dtype is None else rounded(tensors))
        assert bits(worker) == expected
        with pytest.raises(ParentMismatchError, match="delta to version 19, but version 20 is live"):
            worker.stage_weights(SharedWeights(published=published), 21)
        assert bits(worker) == expected


def rounded(tensors: dict[str, Any]) -> dict[str, Any]:
    wide = {}
    for name, array in tensors.items():
        whole = array.view(np.uint32)
        wide[name] = ((whole + 0x7FFF + (whole >> 16 & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)
    return wide


def test_perturb_and_revert_is_byte_identical(worker: Ranks) -> None:
    before = bits(worker)
    name = "model.layers.0.mlp.down_proj.weight"
    original = random_tensors(ModelConfig.from_json(CONTENTS[0]), 0)
    with WeightPublisher() as publisher:
        publisher.publish(original, 0)
        perturbed = original[name].copy()
        perturbed[3, 5:9] += np.float32(0.5)
        for version, values in enumerate((perturbed, original[name]), 1):
            published = publisher.publish_delta({name: values}, version, spans={name: (3 * 80 + 5, 3 * 80 + 9)})
            worker.stage_weights(SharedWeights(published=published), version)
            worker.commit_weights()
            assert (bits(worker) == before) == (version == 2)


def test_a_rounded_publication_is_used_as_its_widened_values(worker: Ranks, tmp_path: Path) -> None:
    tensors = random_tensors(ModelConfig.from_json(CONTENTS[0]), 7)
    wide = rounded(tensors)
    with WeightPublisher() as publisher:
        published = publisher.publish(tensors, 1, dtype="bfloat16")
        worker.stage_weights(SharedWeights(published=published), 1)
        worker.commit_weights()
    assert bits(worker) == fresh_bits(tmp_path, wide)


def test_files_and_shards_equal_a_fresh_worker(worker: Ranks, tmp_path: Path) -> None:
    tensors = random_tensors(ModelConfig.from_json(CONTENTS[0]), 5)
    axes = {name: 0 for name in tensors if "proj" in name}
    ranks = [
        {name: np.split(array, 2)[rank] if name in axes else array for name, array in tensors.items()}
        for rank in range(2)
    ]
    with WeightPublisher("rank0") as zero, WeightPublisher("rank1") as one:
        parts = tuple(made.publish(shard, 1) for made, shard in zip((zero, one), ranks, strict=True))
        file = publish_file(tmp_path / "next.safetensors", tensors, 1)
        for published in (file, PublishedShards(ranks=parts, axes=axes)):
            worker.stage_weights(FolderWeights(path=str(tmp_path)), 0)
            worker.commit_weights()
            assert bits(worker) != fresh_bits(tmp_path, tensors)
            worker.stage_weights(SharedWeights(published=published), 1)
            worker.commit_weights()
            assert bits(worker) == fresh_bits(tmp_path, tensors)
        false = PublishedShards(ranks=parts, axes=axes | {"model.layers.0.mlp.down_proj.weight": 1})
        with pytest.raises(ValueError, match="down_proj"):
            worker.stage_weights(SharedWeights(published=false), 2)
        assert bits(worker) == fresh_bits(tmp_path, tensors)


def test_a_delta_after_a_set_with_its_tied_head(tmp_path: Path) -> None:
    worker = OneRank(LocalWorker(options(tmp_path, CONTENTS[1])))
    tensors = random_tensors(ModelConfig.from_json(CONTENTS[1]), 0)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    with WeightPublisher() as publisher:
        for version in range(3):
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
            changed = {"model.norm.weight": tensors["model.norm.weight"]}
            published = (
                publisher.publish_delta(changed, version) if version else publisher.publish(tensors | head, version)
            )
            worker.stage_weights(SharedWeights(published=published), version)
            worker.commit_weights()
            assert bits(worker) == fresh_bits(tmp_path, tensors)
        false = {"lm_head.weight": head["lm_head.weight"] + np.float32(1)}
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            worker.stage_weights(SharedWeights(published=publisher.publish(tensors | false, 3)), 3)


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: content["architectures"][0])
def test_packed_weights_can_be_read_back(content: dict[str, Any], tmp_path: Path) -> None:
    model = ModelConfig.from_json(content)
    worker = LocalWorker(options(tmp_path, content))
    worker.stage_weights(FolderWeights(path=str(tmp_path)), 0)
    worker.commit_weights()
    live = worker._live_runner().live_tensors()
    assert isinstance(live, PackedTensors) and list(live) == list(expected_tensors(model))
    for name, array in random_tensors(model, 0).items():
        np.testing.assert_array_equal(live[name], array, err_msg=name)
    with pytest.raises(KeyError):
        live["lm_head.bias"]
