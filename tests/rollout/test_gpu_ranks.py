"""Ranks on GPUs, as far as it can be held without one: numbers, memory, idle steps, kept weights."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_publications import await_checksums
from fake_gpu import FakeGpu, FakeTensor
from numpy.typing import NDArray
from ranks_rig import each
from tiny_engine import write_tiny_model

from zerokl.kernels.ops import neutral_sampling
from zerokl.rollout import messages, model_folder, model_runner, worker_process
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.gpu_memory import kv_cache_bytes
from zerokl.rollout.kept_weights import KeptWeights
from zerokl.rollout.messages import Message
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import step_inputs, tiny_config, tiny_moe_config
from zerokl.rollout.ranks import overlapping_ranks
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.step_outcome import IdleStep
from zerokl.rollout.weight_source import DeviceWeights, SharedWeights
from zerokl.weight_sync import (
    ChecksumError,
    DevicePublisher,
    PublishedWeights,
    SegmentBusyError,
    WeightPublisher,
    open_published,
)

GIB = 1 << 30
MODEL = ModelConfig.from_json(tiny_config())


def resolved(patch: pytest.MonkeyPatch, asked: list[Any], **options: Any) -> EngineConfig:
    """A config over GPUs of which number n has 20 - n GiB free of 40; `asked` gets what was asked for."""

    def several(numbers: list[int]) -> list[tuple[int, int]]:
        asked.append(list(numbers))
        return [((20 - number) * GIB, 40 * GIB) for number in numbers]

    def one(number: int) -> tuple[int, int]:
        asked.append(number)
        return several([number])[0]

    patch.setattr(model_folder, "gpu_memories", several)
    patch.setattr(model_folder, "gpu_memory", one)
    return model_folder.resolve_config(EngineConfig(model="unused", device="gpu", **options), MODEL)


def test_the_pool_is_sized_by_the_gpu_with_the_least_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    config = resolved(monkeypatch, asked, data_parallel_size=3, gpus=[4, 0, 7])
    assert asked == [[4, 0, 7]], "a process of its own was asked, once"
    assert config.worker == "process"
    assert config.kv_cache_bytes == kv_cache_bytes(config, MODEL, "bfloat16", 13 * GIB, 40 * GIB)
    again = EngineConfig.from_dict(dataclasses.asdict(config))
    assert again == config and again.gpu_of(2) == 7


def test_an_engine_in_process_asks_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    assert resolved(monkeypatch, asked, gpus=[3]).worker == "inprocess" and asked[0] == 3
    asked.clear()
    assert resolved(monkeypatch, asked, gpus=[3], worker="process").worker == "process" and asked == [[3]]
    asked.clear()
    assert resolved(monkeypatch, asked, gpus=[3, 3], data_parallel_size=2, num_blocks=7).num_blocks == 7
    assert asked == []


class NoOps:
    """Ops that do nothing but be there."""

    def kv_pool(self, *given: Any) -> None: ...

    def tensor(self, values: Any) -> None: ...

    def record(self, launches: Any) -> None: ...

    def record_routing(self, *given: Any) -> None: ...

    device = dataclasses.make_dataclass("Device", ["get", "put"])(None, None)


def test_each_rank_asks_for_the_gpu_of_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's process that is told its options and place, but for the process."""
    asked: dict[str, int] = {}

    def get_ops(device: str, num_threads: int, dtype: str, number: int) -> NoOps:
        asked[threading.current_thread().name] = number
        assert (device, dtype) == ("gpu", "bfloat16")
        return NoOps()

    monkeypatch.setattr(model_runner, "get_ops", get_ops)
    options = {"device": "gpu", "data_parallel_size": 2, "gpus": [5, 2], "num_blocks": 8}
    config = model_folder.resolve_config(EngineConfig(model=str(write_tiny_model(tmp_path)), **options), MODEL)
    ranks = [worker_process.Rank() for _ in range(2)]

    def tell(message: Message, rank: int) -> None:
        assert worker_process.reply_to(ranks[rank], message) == messages.Done()

    for rank in range(2):
        made = dataclasses.asdict(config)
        tell(messages.Configure(options=made, rank=rank, folder=str(tmp_path), placement=[]), rank)

    def connect(rank: int) -> int:
        tell(messages.Connect(), rank)
        return asked[threading.current_thread().name]

    assert each(2, connect) == [5, 2]


def test_steps_overlap_on_gpus_unless_ranks_are_to_be_replaced() -> None:
    ranks: Any = object()
    for options, overlap in (
        ({}, True),
        ({"max_rank_restarts": 1}, True),  # of ranks that are processes alone
        ({"worker": "process"}, True),
        ({"data_parallel_size": 2}, True),
        ({"worker": "process", "max_rank_restarts": 1}, False),
        ({"data_parallel_size": 2, "max_rank_restarts": 1}, False),
    ):
        config = EngineConfig(model="unused", device="gpu", **options)  # type: ignore[arg-type]
        assert overlapping_ranks(ranks, config) is (ranks if overlap else None), options
    assert overlapping_ranks(ranks, EngineConfig(model="unused", data_parallel_size=2)) is None


class Begun:
    """A worker whose steps are under way until they are asked for; `broken` ones cannot be begun."""

    def __init__(self, broken: int) -> None:
        self.broken, self.told = broken, list[str]()

    def begin(self, order: StepOrder) -> Begun:
        step = order.inputs.step
        self.told.append(f"begin {step}")
        if step == self.broken:
            raise ValueError(f"no step {step}")
        return type(self).of(step, self.told)

    @classmethod
    def of(cls, step: int, told: list[str]) -> Begun:
        made = cls(0)
        made.told = told
        made.result = lambda: (told.append(f"result {step}"), messages.Done())[1]  # type: ignore[attr-defined]
        return made


def test_a_process_begins_steps_before_results_are_asked_for_and_keeps_what_went_wrong() -> None:
    rank, worker = worker_process.Rank(), Begun(broken=2)
    rank.worker = worker  # type: ignore[assignment]
    inputs = step_inputs([[1]], [0], [[0]], 16)
    for step in (1, 2, 3):
        rank.begin(StepOrder(inputs=dataclasses.replace(inputs, step=step)))
    replies = [worker_process.reply_to(rank, messages.Collect()) for _ in range(3)]
    assert worker.told == ["begin 1", "begin 2", "begin 3", "result 1", "result 3"]
    assert [type(reply) for reply in replies] == [messages.Sampled, messages.Failed, messages.Sampled]
    assert isinstance(replies[1], messages.Failed) and replies[1].text == "no step 2"


class NotedWorker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.versions: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.told.append(name)

    def describe(self) -> dict[str, Any]:
        return {"pid": 1, "versions": self.versions}

    def commit_weights(self) -> None:
        self.told.append("commit_weights")
        self.versions["policy"] = 1


def test_a_rank_warms_up_with_its_first_weights_before_it_is_told_a_step() -> None:
    worker: Any = NotedWorker()
    for _ in range(3):
        assert worker_process.answer(worker, messages.Commit()) == messages.Done()
    assert worker.told == ["commit_weights", "warm_up", "commit_weights", "commit_weights"]


def test_a_rank_without_tokens_launches_nothing_and_routes_none() -> None:
    moe = ModelConfig.from_json(tiny_moe_config()).moe
    assert moe is not None
    inputs = step_inputs([], [], [], 16)
    inputs = dataclasses.replace(inputs, sampling=dataclasses.replace(neutral_sampling(0), want_raw=True))
    plain, routed = IdleStep(inputs, None).result(), IdleStep(inputs, moe).result()
    for result in (plain, routed):
        assert len(result.sampled.tokens) == 0 and result.sampled.raw_logprobs is not None
    assert plain.routed is None and plain.expert_tokens is None
    assert routed.routed is not None and routed.expert_tokens is not None
    shape = (len(moe.layers), 0, moe.top_k)
    assert routed.routed.experts.shape == routed.routed.weights.shape == shape
    assert routed.expert_tokens.tolist() == [[0] * moe.num_experts] * len(moe.layers)


def tensors_on(gpu: FakeGpu) -> dict[str, FakeTensor]:
    random = np.random.default_rng(3)
    made = {}
    for name, (shape, dtype) in {"a": ((5, 7), "bfloat16"), "b": ((9,), "float32"), "c": ((0,), "float32")}.items():
        bits: NDArray[Any] = random.standard_normal(shape).astype(np.float32).view(np.uint32)
        made[name] = gpu.put((bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits, dtype)
    return made


def test_weights_from_a_gpu_are_kept_as_they_were_published(tmp_path: Path) -> None:
    gpu, made = FakeGpu(tmp_path), list[str]()

    def reader() -> FakeGpu:
        made.append(threading.current_thread().name)
        return gpu  # the publisher is of this process, whose memory is its own

    kept, tensors = KeptWeights(MODEL, reader), tensors_on(gpu)
    with DevicePublisher(gpu) as publisher:
        for version in (1, 2):
            for tensor in tensors.values():
                tensor.values[...] ^= 1
            wanted = {name: tensor.values.copy() for name, tensor in tensors.items()}
            source = kept.keep(DeviceWeights(published=publisher.publish(tensors, version)), version).source
            publisher.withdraw()  # nobody reads any more
            for tensor in tensors.values():
                tensor.values[...] = 0
            assert isinstance(source, SharedWeights) and isinstance(source.published, PublishedWeights)
            manifest = source.published.manifest
            assert manifest.version == version and not manifest.inexact
            assert [spec.dtype for spec in manifest.tensors] == ["bfloat16", "float32", "float32"]
            with open_published(source.published) as stored:
                for name, values in wanted.items():
                    np.testing.assert_array_equal(stored[name].view(values.dtype), values)
            kept.commit()
        assert len(made) == 1 and made[0] != threading.current_thread().name, "the caller's current GPU stays"
        published = publisher.publish(tensors, 3)
        await_checksums(gpu, published)
        tensors["b"].values[4] ^= 1
        with pytest.raises(ChecksumError, match="'b' of version 3"):
            kept.keep(DeviceWeights(published=published), 3)
        publisher.withdraw()
        with pytest.raises(SegmentBusyError):
            kept.keep(DeviceWeights(published=published), 3)
    kept.close()


def test_no_delta_follows_what_was_published_as_stored() -> None:
    with WeightPublisher("stored", buffers=1) as publisher:
        publisher.publish({"a": np.zeros(3, np.float32)}, 1)
        publisher.publish_delta({"a": np.ones(3, np.float32)}, 2)
        publisher.publish_stored([], 3)
        with pytest.raises(ValueError, match="a delta needs a complete"):
            publisher.publish_delta({"a": np.ones(3, np.float32)}, 4)
