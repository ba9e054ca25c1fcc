"""Engines on another GPU than the first, and weights that come to them from a trainer's GPU by peer access.

What needs two GPUs is skipped where there is one. A process computes on one GPU, so engines on the second one are in
processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_rig as rig
import pytest
from gpu_processes import EngineProcess, Trainer

rig.require_device()
if rig.INTERPRETED:
    pytest.skip("one process has one GPU there", allow_module_level=True)
pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

import paddle  # noqa: E402
from gpu_engine import digest  # noqa: E402
from gpu_models import engine_on  # noqa: E402

from zerokl.kernels.dispatch import gpu_memories  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.saver import save_pretrained  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config  # noqa: E402

pytestmark = pytest.mark.gpu
COUNT = paddle.device.cuda.device_count()
needs_two = pytest.mark.skipif(COUNT < 2, reason="needs two GPUs")

COMMON: dict[str, Any] = {"vocab_size": 1500, "eos_token_id": 7, "max_position_embeddings": 4096}
MODELS = {
    "dense": tiny_config("Qwen3ForCausalLM", hidden_size=128, head_dim=32, **COMMON),
    "mixture": tiny_moe_config(hidden_size=64, **COMMON),
}
OPTIONS: dict[str, Any] = {
    "device": "gpu", "max_model_len": 256, "num_blocks": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The values that `gpu_trainer.py` has for seeds 0 to 2, by model and seed."""
    made = {}
    for name, content in MODELS.items():
        for seed in range(3):
            tensors = random_tensors(ModelConfig.from_json(content), seed, gain=2.0)
            rounded = {tensor: rig.from_bfloat16(rig.to_bfloat16(values)) for tensor, values in tensors.items()}
            made[name, seed] = save_pretrained(tmp_path_factory.mktemp(f"{name}-{seed}"), content, rounded)
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[tuple[str, int], Path]) -> Callable[[str, int], str]:
    """Bits of a fresh engine on GPU 0, in this process."""
    known: dict[tuple[str, int], str] = {}

    def of(model: str, seed: int) -> str:
        if (model, seed) not in known:
            with engine_on(folders[model, seed]) as engine:
                known[model, seed] = digest(engine)
        return known[model, seed]

    return of


@contextmanager
def engine_process(folder: Path, **options: Any) -> Iterator[EngineProcess]:
    engine = EngineProcess(model=str(folder), **(OPTIONS | options))
    try:
        yield engine
    finally:
        engine.end()


@contextmanager
def trainer_on_gpu_0(model: str, buffers: int) -> Iterator[Trainer]:
    trainer = Trainer(MODELS[model], buffers=buffers)
    try:
        yield trainer
    finally:
        trainer.end()


def test_a_gpu_that_is_not_there_is_told(folders: dict[tuple[str, int], Path]) -> None:
    for options in ({}, {"num_blocks": None}):
        with (
            pytest.raises(RuntimeError, match=rf"there is no GPU 99: \w+ sees {COUNT}"),
            engine_on(folders["dense", 0], gpus=[99], **options),
        ):
            pass


@needs_two
def test_a_process_computes_on_one_gpu(folders: dict[tuple[str, int], Path]) -> None:
    with (
        pytest.raises(RuntimeError, match="this process computes on GPU 0: what is to run on GPU 1"),
        engine_on(folders["dense", 0], gpus=[1]),
    ):
        pass


@needs_two
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_runs_on_the_gpu_that_is_named(
    folders: dict[tuple[str, int], Path], expected: Callable[[str, int], str], model: str
) -> None:
    with engine_process(folders[model, 1], gpus=[1]) as engine:
        assert engine.digest() == expected(model, 1)


@needs_two
def test_it_leaves_the_other_gpu_alone(folders: dict[tuple[str, int], Path]) -> None:
    before = gpu_memories([0, 1])
    with engine_process(folders["dense", 1], gpus=[1]) as engine:
        engine.digest()
        taken = [then - now for (then, _), (now, _) in zip(before, gpu_memories([0, 1]), strict=True)]
    assert taken[1] > 200 << 20 > 32 << 20 > taken[0], taken


@needs_two
@pytest.mark.parametrize("buffers", [0, 2])
@pytest.mark.parametrize("model", MODELS)
def test_an_update_from_a_peer_gives_the_bits_of_a_fresh_engine(
    folders: dict[tuple[str, int], Path], expected: Callable[[str, int], str], model: str, buffers: int
) -> None:
    assert expected(model, 1) != expected(model, 2), "the control"
    with trainer_on_gpu_0(model, buffers) as trainer, engine_process(folders[model, 0], gpus=[1]) as engine:
        for version in range(1, 6):  # both slots, and each of them again with its graphs
            seed = 1 + version % 2
            assert engine.update(trainer.publish(seed, version)) == {"version": version}
            assert engine.digest() == expected(model, seed)
        trainer.do("write")
        assert engine.digest() == expected(model, 2), "nothing is read from the trainer any more"


@needs_two
def test_a_bit_that_flips_on_the_peer_is_refused(
    folders: dict[tuple[str, int], Path], expected: Callable[[str, int], str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with trainer_on_gpu_0("dense", 0) as trainer, engine_process(folders["dense", 0], gpus=[1]) as engine:
        assert engine.update(trainer.publish(1, 1)) == {"version": 1}
        published = trainer.publish(2, 2)
        trainer.do("flip", name)  # without a word to anybody
        refused = engine.update(published)
        assert refused["error"] == "ChecksumError" and name in refused["text"]
        assert engine.digest() == expected("dense", 1)
        trainer.do("flip", name)
        assert engine.update(published) == {"version": 2}
        assert engine.digest() == expected("dense", 2)
