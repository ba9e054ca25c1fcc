"""What staging refuses, and the memory that it takes."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from leftovers import segments_of
from tiny_engine import tiny_model_config, tiny_options, tiny_tensors, write_tiny_model

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import FolderWeights, SharedWeights, TensorWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.rollout.worker_link import RankProcesses
from zerokl.weight_sync import PublishedFile, WeightPublisher, publish_file


@pytest.fixture(params=["inprocess", "process"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(write_tiny_model(tmp_path), worker=request.param)) as made:
        yield made


def bits(engine: RolloutEngine) -> bytes:
    engine.reset_prefix_cache()
    (rollout,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, seed=4, ignore_eos=True))
    return np.asarray(rollout.token_ids).tobytes() + np.asarray(rollout.logprobs).tobytes()


def test_a_nan_or_infinity_is_refused_by_name_from_every_source(engine: RolloutEngine, tmp_path: Path) -> None:
    before = bits(engine)
    random = np.random.default_rng(0)
    with WeightPublisher() as publisher:
        for number, name in enumerate(random.choice(list(tiny_tensors()), 8, replace=False)):
            bad = tiny_tensors(1)
            bad[name] = bad[name].copy()
            bad[name].reshape(-1)[int(random.integers(bad[name].size))] = (np.nan, np.inf, -np.inf)[number % 3]
            folder = tmp_path / f"bad{number}"
            save_pretrained(folder, tiny_model_config(), bad)
            for source in (
                bad,
                str(folder),
                publish_file(tmp_path / "bad.safetensors", bad, 1),
                publisher.publish(bad, 1),
                publisher.publish(bad, 1, dtype="bfloat16"),
            ):
                with pytest.raises(ValueError, match=f"tensor '{name}' holds a NaN or an infinity"):
                    engine.update_weights(source)
        assert bits(engine) == before
        publisher.publish(tiny_tensors(0), 0)
        engine.update_weights(publisher.publish(tiny_tensors(0), 1))
        with pytest.raises(ValueError, match=f"tensor '{name}' holds a NaN"):
            engine.update_weights(publisher.publish_delta({name: bad[name]}, 2))
        assert bits(engine) == before


def test_arrays_to_a_worker_process_go_through_one_segment(tmp_path: Path) -> None:
    options = tiny_options(write_tiny_model(tmp_path), worker="process", max_model_len=64)
    worker = RankProcesses(options)
    worker.stage_weights(FolderWeights(path=str(tmp_path)), 0)
    worker.commit_weights()
    assert segments_of(os.getpid()) == []
    names = set()
    for version in range(1, 4):
        worker.stage_weights(TensorWeights(tensors=tiny_tensors(version)), version)
        worker.commit_weights()
        names.update(segments_of(os.getpid()))
        with pytest.raises(ValueError, match="missing"):
            worker.stage_weights(TensorWeights(tensors={}), version + 1)
    assert len(names) == 1 and segments_of(os.getpid()) == list(names)
    worker.sleep(["weights"], 2, None)
    assert segments_of(os.getpid()) == []
    worker.stage_weights(TensorWeights(tensors=tiny_tensors(4)), 4)
    worker.close()
    assert segments_of(os.getpid()) == []


def mapped_segments() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/zerokl-mapped" in line]


def local_worker(folder: Path) -> LocalWorker:
    return LocalWorker(tiny_options(write_tiny_model(folder), max_model_len=64))


def test_a_segment_stays_mapped_until_its_publisher_is_gone(tmp_path: Path) -> None:
    worker = local_worker(tmp_path)
    with WeightPublisher("mapped", buffers=2) as publisher:
        for version in range(6):
            published = publisher.publish(tiny_tensors(version), version)
            worker.stage_weights(SharedWeights(published=published), version)
            worker.commit_weights()
        assert len(mapped_segments()) == 4  # two by either side
        worker.sleep(["kv_cache"], 1, None)
        assert len(mapped_segments()) == 2
        worker.stage_weights(SharedWeights(published=publisher.publish(tiny_tensors(6), 6)), 6)
        assert len(mapped_segments()) == 3
    with WeightPublisher("other") as other:
        worker.stage_weights(SharedWeights(published=other.publish(tiny_tensors(7), 7)), 7)
        assert mapped_segments() == []
    worker.close()


LARGE = tiny_config("LlamaForCausalLM", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=512)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_is_read_in_buckets(tmp_path: Path, reverse: bool) -> None:
    model = ModelConfig.from_json(LARGE)
    tensors = random_tensors(model, 0)
    save_pretrained(tmp_path, LARGE, tensors)
    names = list(tensors)[::-1] if reverse else list(tensors)
    published = publish_file(tmp_path / "next.safetensors", {name: tensors[name] for name in names}, 1)
    assert isinstance(published, PublishedFile)
    total = sum(array.nbytes for array in tensors.values())
    worker = LocalWorker(EngineConfig(model=str(tmp_path), num_blocks=8, max_model_len=128, num_threads=1))
    peaks = []
    for bucket_bytes in (1 << 17, 1 << 28):
        tracemalloc.start()
        worker.stage_weights(SharedWeights(published=published, bucket_bytes=bucket_bytes), 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        worker.commit_weights()
    assert total > 25e6
    if reverse:  # what comes before it is wanted is kept: the control
        assert peaks[0] > total / 2
    else:
        assert peaks[0] < 5e6


def test_bucket_bytes_reach_the_worker_and_are_checked(engine: RolloutEngine, tmp_path: Path) -> None:
    published = publish_file(tmp_path / "next.safetensors", tiny_tensors(1), 1)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="bucket_bytes"):
            engine.update_weights(published, bucket_bytes=wrong)
    assert engine.update_weights(published, bucket_bytes=100) == 1
    by_file = bits(engine)
    engine.update_weights(tiny_tensors(1))
    assert bits(engine) == by_file
