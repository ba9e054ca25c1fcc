"""An engine with weights from a GPU's memory, all its kernels under Triton's interpreter (TRITON_INTERPRET=1).

What `test_cuda_ipc.py` holds of a GPU and two processes, held here of one process and the host's memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from host_calls import HostCalls
from numpy.typing import NDArray

rig.require_device()
if not rig.INTERPRETED:
    pytest.skip("on a GPU test_cuda_ipc.py says more", allow_module_level=True)

from zerokl.kernels.gpu import ops  # noqa: E402
from zerokl.kernels.gpu.shared_memory import SharedGpuMemory  # noqa: E402
from zerokl.rollout import source_staging  # noqa: E402
from zerokl.rollout.config import EngineConfig  # noqa: E402
from zerokl.rollout.engine import RolloutEngine  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.saver import save_pretrained  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config  # noqa: E402
from zerokl.rollout.sampling_params import SamplingParams  # noqa: E402
from zerokl.weight_sync import ChecksumError, DevicePublisher  # noqa: E402

pytestmark = pytest.mark.gpu

CONTENT = tiny_config("Qwen2ForCausalLM", vocab_size=200, num_hidden_layers=1, tie_word_embeddings=True)
PARAMS = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)


def shared_memory(*given: Any) -> SharedGpuMemory:
    calls: Any = HostCalls()
    return SharedGpuMemory(calls, lambda stream: nullcontext(), list)


def tensors_of(seed: int) -> dict[str, NDArray[np.float32]]:
    return random_tensors(ModelConfig.from_json(CONTENT), seed, gain=2.0)


def engine_with(folder: Path, seed: int) -> RolloutEngine:
    folder = folder / str(seed)
    folder.mkdir()
    save_pretrained(folder, CONTENT, tensors_of(seed))
    return RolloutEngine(
        EngineConfig(
            model=str(folder), device="gpu", dtype="float32", max_model_len=64, num_blocks=16, max_num_seqs=2,
            max_num_batched_tokens=64,
        )
    )  # fmt: skip


def bits(engine: RolloutEngine) -> bytes:
    engine.reset_prefix_cache()
    (rollout,) = engine.generate([[1, 2, 3, 4, 5]], PARAMS)
    return np.asarray(rollout.token_ids).tobytes() + np.asarray(rollout.logprobs).tobytes()


def test_updates_have_the_bits_of_fresh_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = rig.HostDevice()
    monkeypatch.setattr(ops, "_gpu", lambda number: device)
    monkeypatch.setattr(source_staging, "device_memory", shared_memory)
    expected = {}
    for seed in (1, 2):
        with engine_with(tmp_path, seed) as engine:
            expected[seed] = bits(engine)
    assert expected[1] != expected[2]
    with engine_with(tmp_path, 0) as engine, DevicePublisher(shared_memory()) as publisher:
        recorded = []
        for version, seed in enumerate((2, 1, 2, 1, 2), 1):
            tensors = {name: rig.HostArray(np.ascontiguousarray(values)) for name, values in tensors_of(seed).items()}
            assert engine.update_weights(publisher.publish(tensors, version), mode="keep") == version
            assert bits(engine) == expected[seed]
            recorded.append(device.num_recorded)
        assert recorded[2] == recorded[4], "steps that were recorded over a slot serve its next set"
        engine.sleep(level=1)
        engine.wake_up()
        assert bits(engine) == expected[2]
        published = publisher.publish(tensors, 6)
        tensors["model.norm.weight"].values[1] += 1
        with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
            engine.update_weights(published)
        assert bits(engine) == expected[2] and engine.get_weight_version() == 5
