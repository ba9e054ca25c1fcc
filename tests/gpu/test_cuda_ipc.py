"""Weights from a Paddle trainer's process through the GPU: the engine then has the bits of a fresh one on them.

Needs what `test_engine.py` needs; trainer and engine share GPU 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from gpu_processes import Trainer
from leftovers import segments_of, wait_for_end
from numpy.typing import NDArray

rig.require_device()
if rig.INTERPRETED:
    pytest.skip("processes share the memory of a GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from zerokl.kernels.dispatch import device_memory  # noqa: E402
from zerokl.kernels.gpu.shared_memory import SharedGpuMemory  # noqa: E402
from zerokl.rollout.config import EngineConfig  # noqa: E402
from zerokl.rollout.engine import RolloutEngine  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.saver import save_pretrained  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config  # noqa: E402
from zerokl.rollout.sampling_params import SamplingParams  # noqa: E402
from zerokl.weight_sync import (  # noqa: E402
    ChecksumError,
    DeviceHandleError,
    DevicePublisher,
    PublisherDiedError,
)
from zerokl.weight_sync.device_descriptor import Descriptor  # noqa: E402

pytestmark = pytest.mark.gpu

COMMON: dict[str, Any] = {"vocab_size": 1500, "eos_token_id": 7, "max_position_embeddings": 4096}
MODELS = {
    "dense": tiny_config("Qwen3ForCausalLM", hidden_size=128, head_dim=32, **COMMON),
    "biased": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, **COMMON),
    "mixture": tiny_moe_config(hidden_size=64, **COMMON),
}
PARAMS = SamplingParams(n=4, max_tokens=40, seed=11, ignore_eos=True)


@pytest.fixture
def start_trainer() -> Iterator[Callable[..., Trainer]]:
    trainers: list[Trainer] = []

    def start(model: str, *given: Any, **options: Any) -> Trainer:
        trainers.append(Trainer(MODELS[model], *given, **options))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.end()
        assert wait_for_end(trainer.pid)


def engine_on(folder: Path, **options: Any) -> RolloutEngine:
    defaults: dict[str, Any] = {
        "model": str(folder), "device": "gpu", "max_model_len": 4096, "num_blocks": 1024, "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
    }  # fmt: skip
    return RolloutEngine(EngineConfig(**(defaults | options)))


def folder_of(tmp_path: Path, model: str, seed: int, dtype: str = "bfloat16") -> Path:
    """A folder with the values that the trainer has for `seed`."""
    tensors = random_tensors(ModelConfig.from_json(MODELS[model]), seed, gain=2.0)
    if dtype == "bfloat16":
        tensors = {name: rig.from_bfloat16(rig.to_bfloat16(values)) for name, values in tensors.items()}
    folder = tmp_path / f"{model}-{seed}-{dtype}"
    if not folder.exists():
        folder.mkdir()
        save_pretrained(folder, MODELS[model], tensors)
    return folder


def bits(engine: RolloutEngine) -> list[NDArray[Any]]:
    engine.reset_prefix_cache()
    rollouts = engine.generate([[5, 6, 7, 8], list(range(10, 90))], PARAMS)
    return [values for r in rollouts for values in (r.token_ids, r.logprobs, r.policy_logprobs, r.entropy)]


def num_differing(one: list[NDArray[Any]], other: list[NDArray[Any]]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("buffers", [0, 2])
@pytest.mark.parametrize("model", MODELS)
def test_an_update_gives_the_bits_of_a_fresh_engine(
    tmp_path: Path, start_trainer: Callable[..., Trainer], model: str, buffers: int
) -> None:
    expected = {}
    for seed in (1, 2):
        with engine_on(folder_of(tmp_path, model, seed)) as engine:
            expected[seed] = bits(engine)
    assert num_differing(expected[1], expected[2]) > 0, "the control"
    trainer = start_trainer(model, buffers=buffers)
    with engine_on(folder_of(tmp_path, model, 0)) as engine:
        for version in range(1, 6):  # both slots, and each of them again with its graphs
            seed = 1 + version % 2
            assert engine.update_weights(trainer.publish(seed, version)) == version
            assert num_differing(expected[seed], bits(engine)) == 0
        trainer.do("write")
        assert num_differing(expected[2], bits(engine)) == 0, "nothing is read from the trainer any more"
        engine.sleep(level=1)
        engine.wake_up()
        assert num_differing(expected[2], bits(engine)) == 0


@pytest.mark.parametrize(
    ("trainer_dtype", "dtype"), [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_types_that_change_on_the_way(
    tmp_path: Path, start_trainer: Callable[..., Trainer], trainer_dtype: str, dtype: str
) -> None:
    with engine_on(folder_of(tmp_path, "dense", 1, trainer_dtype), dtype=dtype) as engine:
        expected = bits(engine)
    trainer = start_trainer("dense", trainer_dtype)
    with engine_on(folder_of(tmp_path, "dense", 0), dtype=dtype) as engine:
        engine.update_weights(trainer.publish(1, 1))
        assert num_differing(expected, bits(engine)) == 0


def test_an_update_while_requests_run(tmp_path: Path, start_trainer: Callable[..., Trainer]) -> None:
    trainer = start_trainer("dense")
    params = SamplingParams(n=8, max_tokens=3000, seed=3, ignore_eos=True)
    with engine_on(folder_of(tmp_path, "dense", 0), num_blocks=4096) as engine:
        published = trainer.publish(1, 1)
        call = engine.submit([[5, 6, 7, 8]], params)
        engine.update_weights(published, mode="keep")
        call.future.result()
        versions = []
        for rollout in call.read():
            later = rollout.policy_versions == 1
            versions.append(later)
            (whole,) = engine.score(rollout)
            np.testing.assert_array_equal(whole[later], rollout.policy_logprobs[later])
            assert later.all() or (whole[~later] != rollout.policy_logprobs[~later]).any()
        assert np.concatenate(versions).any(), "the update came after all tokens"


def test_a_corrupted_tensor_is_refused(tmp_path: Path, start_trainer: Callable[..., Trainer]) -> None:
    trainer = start_trainer("dense")
    name = "model.layers.1.mlp.up_proj.weight"
    with engine_on(folder_of(tmp_path, "dense", 0)) as engine:
        engine.update_weights(trainer.publish(1, 1))
        before, published = bits(engine), trainer.publish(2, 2)
        trainer.do("flip", name)  # without a word to anybody
        with pytest.raises(ChecksumError, match=name):
            engine.update_weights(published)
        assert engine.get_weight_version() == 1 and num_differing(before, bits(engine)) == 0
        trainer.do("flip", name)
        assert engine.update_weights(published) == 2
        assert num_differing(before, bits(engine)) > 0


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
def test_a_killed_trainer_leaves_the_old_version(
    tmp_path: Path, start_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    trainer = start_trainer("dense")
    with engine_on(folder_of(tmp_path, "dense", 0)) as engine:
        engine.update_weights(trainer.publish(1, 1))
        before, published = bits(engine), trainer.publish(2, 2)
        place = SharedGpuMemory.place

        def kill_and_place(*given: Any, **more: Any) -> Any:
            trainer.kill()
            return place(*given, **more)

        with monkeypatch.context() as patch:
            if when == "while it is read":
                patch.setattr(SharedGpuMemory, "place", kill_and_place)
            else:
                trainer.kill()
            with pytest.raises(PublisherDiedError):
                engine.update_weights(published)
        assert engine.get_weight_version() == 1 and num_differing(before, bits(engine)) == 0
        assert segments_of(trainer.pid) == []
        other = start_trainer("dense")
        assert engine.update_weights(other.publish(2, 2)) == 2
        assert num_differing(before, bits(engine)) > 0


def test_a_false_handle_is_refused(
    tmp_path: Path, start_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, read = start_trainer("dense"), Descriptor.from_bytes

    def false(*given: Any) -> Descriptor:
        descriptor = read(*given)
        return replace(descriptor, allocations=tuple(replace(a, handle=bytes(64)) for a in descriptor.allocations))

    with engine_on(folder_of(tmp_path, "dense", 0)) as engine:
        before, published = bits(engine), trainer.publish(1, 1)
        with monkeypatch.context() as patch, pytest.raises(DeviceHandleError):
            patch.setattr(Descriptor, "from_bytes", false)
            engine.update_weights(published)
        assert num_differing(before, bits(engine)) == 0
        assert engine.update_weights(published) == 1


def test_a_trainer_in_the_engines_process(tmp_path: Path) -> None:
    import paddle

    with engine_on(folder_of(tmp_path, "dense", 1)) as engine:
        expected = bits(engine)
    tensors = random_tensors(ModelConfig.from_json(MODELS["dense"]), 1, gain=2.0)
    with engine_on(folder_of(tmp_path, "dense", 0)) as engine, DevicePublisher(device_memory()) as publisher:
        parameters = {
            name: paddle.to_tensor(rig.to_bfloat16(values), place=paddle.CUDAPlace(0))
            for name, values in tensors.items()
        }
        engine.update_weights(publisher.publish(parameters, 1))
        assert num_differing(expected, bits(engine)) == 0


def test_nobody_has_handles_of_memory_that_cuda_did_not_allocate() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        device_memory().allocation_of(np.zeros(64, np.uint8).ctypes.data)


def test_memory_that_was_given_back_is_told_from_what_comes_in_its_place() -> None:
    memory = device_memory()
    base = memory.allocate(8 << 20)
    numbers = memory.allocation_ids([base, base])
    assert numbers[0] == numbers[1] and memory.allocation_ids([base, base]) == numbers
    memory.free(base)
    with pytest.raises(RuntimeError, match="CUDA"):
        memory.allocation_ids([base])
    again = memory.allocate(8 << 20)  # as a rule at the same address
    assert memory.allocation_ids([again]) != numbers[:1]
    memory.free(again)
