"""Ranks on GPUs, each in a process of its own: the bits of an engine in one process, whatever becomes of a rank.

Two ranks share GPU 0 where there is one; where there are two each has its own as well. Under TRITON_INTERPRET=1 the
processes run the kernels on the CPU: what travels between them is tested, no claim about a GPU's bits.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from leftovers import wait_for_end
from numpy.typing import NDArray

rig.require_device()
if not rig.INTERPRETED:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from gpu_processes import Trainer  # noqa: E402

from zerokl.kernels.gpu import ops  # noqa: E402
from zerokl.rollout import worker_child  # noqa: E402
from zerokl.rollout.config import EngineConfig  # noqa: E402
from zerokl.rollout.engine import RolloutEngine  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.saver import save_pretrained  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config  # noqa: E402
from zerokl.rollout.outputs import Rollout  # noqa: E402
from zerokl.rollout.sampling_params import SamplingParams  # noqa: E402
from zerokl.weight_sync import ChecksumError  # noqa: E402

pytestmark = pytest.mark.gpu

NUM_GPUS = 1
OPTIONS: dict[str, Any] = {
    "device": "gpu", "max_model_len": 256, "num_blocks": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512,
    "batched_token_timeout": 0.01,
}  # fmt: skip
if rig.INTERPRETED:
    COMMON: dict[str, Any] = {"vocab_size": 200}
    MODELS = {"dense": tiny_config("Qwen2ForCausalLM", num_hidden_layers=1, tie_word_embeddings=True, **COMMON)}
    MODELS["mixture"] = tiny_moe_config(**COMMON)
    OPTIONS |= {"dtype": "float32", "max_model_len": 64, "num_blocks": 32, "max_num_seqs": 2}
    OPTIONS |= {"max_num_batched_tokens": 64}
    TOKENS, PROMPTS, SAMPLES = 4, [list(range(1 + n, 4 + 2 * n)) for n in range(3)], 1
else:
    import paddle

    NUM_GPUS = paddle.device.cuda.device_count()
    COMMON = {"vocab_size": 1500, "eos_token_id": 7, "max_position_embeddings": 4096}
    MODELS = {"dense": tiny_config("Qwen3ForCausalLM", hidden_size=128, head_dim=32, **COMMON)}
    MODELS["mixture"] = tiny_moe_config(hidden_size=64, **COMMON)
    TOKENS, PROMPTS, SAMPLES = 60, [list(range(5 + n, 12 + 7 * n)) for n in range(20)], 2

PARAMS = [
    SamplingParams(n=SAMPLES, max_tokens=TOKENS, seed=100 + n, ignore_eos=True, **({"top_p": 0.9} if n % 3 else {}))
    for n in range(len(PROMPTS))
]
one_gpu_only = pytest.mark.skipif(rig.INTERPRETED, reason="needs the memory of a GPU")
TWO_RANKS = [
    pytest.param([0, 0], id="sharing"),
    pytest.param([0, 1], id="apart", marks=pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")),
]


@pytest.fixture(autouse=True)
def gpus_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, here and in the ranks."""
    if not rig.INTERPRETED:
        return
    monkeypatch.setattr(ops, "_gpu", lambda number: rig.HostDevice())
    boot, main = worker_child._BOOT, "from zerokl.rollout.worker_process"
    assert main in boot
    path = f"import sys; sys.path.append({str(Path(rig.__file__).parent)!r}); "
    play = "import gpu_rig; from zerokl.kernels.gpu import ops; ops._gpu = lambda number: gpu_rig.HostDevice(); "
    monkeypatch.setattr(worker_child, "_BOOT", path + boot.replace(main, play + main))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A model with the values that `gpu_trainer.py` has for a seed."""
    made: dict[tuple[str, int], Path] = {}

    def of(model: str, seed: int) -> Path:
        if (model, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{model}-{seed}")
            made[model, seed] = save_pretrained(folder, MODELS[model], tensors_of(model, seed))
        return made[model, seed]

    return of


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str, int], Path]) -> Callable[[str, int], list[Rollout]]:
    """What an engine in this process gives on GPU 0."""
    known: dict[tuple[str, int], list[Rollout]] = {}

    def of(model: str, seed: int) -> list[Rollout]:
        if (model, seed) not in known:
            with engine_on(folder_of(model, seed), **routed(model)) as engine:
                known[model, seed] = sampled(engine)
        return known[model, seed]

    return of


def tensors_of(model: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """Values that bfloat16 holds exactly, those of vectors too, which an engine would take as they are."""
    tensors = random_tensors(ModelConfig.from_json(MODELS[model]), seed, gain=2.0)
    return {name: rig.from_bfloat16(rig.to_bfloat16(values)) for name, values in tensors.items()}


def routed(model: str) -> dict[str, Any]:
    return {"return_routing": "all"} if model == "mixture" else {}


@contextmanager
def engine_on(folder: Path, **options: Any) -> Iterator[RolloutEngine]:
    with RolloutEngine(EngineConfig(model=str(folder), **(OPTIONS | options))) as engine:
        yield engine


def on_two(folder: Path, gpus: list[int], **options: Any) -> Any:
    return engine_on(folder, data_parallel_size=2, gpus=gpus, **options)


def sampled(engine: RolloutEngine) -> list[Rollout]:
    engine.reset_prefix_cache()
    return engine.generate(PROMPTS, PARAMS)


def num_differing(one: list[Rollout], other: list[Rollout]) -> int:
    count = 0
    for a, b in zip(one, other, strict=True):
        for name in ("token_ids", "logprobs", "policy_logprobs", "entropy"):
            x, y = getattr(a, name), getattr(b, name)
            assert len(x) == len(y) == TOKENS and not np.isnan(x).any()
            count += int((x != y).sum())
        assert (a.routing is None) == (b.routing is None)
        if a.routing is not None and b.routing is not None:
            count += int((a.routing.experts != b.routing.experts).sum())
            count += int((a.routing.weights != b.routing.weights).sum())
    return count


def disturbed(engine: RolloutEngine, rank: int, after: int) -> list[Rollout]:
    """The same rollouts, while a rank is killed after some steps."""
    steps, done = iter(range(after)), threading.Event()
    end = engine.watch_steps(lambda: done.set() if next(steps, None) is None else None)
    restarts, pids = engine.metrics()["rank_restarts"], engine.rank_pids

    def kill() -> None:
        assert done.wait(120)
        os.kill(pids[rank], signal.SIGKILL)
        assert wait_for_end(pids[rank])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return sampled(engine)
    finally:
        killer.join()
        end()
        assert engine.metrics()["rank_restarts"] == restarts + 1 and engine.rank_pids[rank] != pids[rank]


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_in_a_process_has_the_bits_of_one_in_this(
    folder_of: Callable[[str, int], Path], expected: Callable[[str, int], list[Rollout]], model: str
) -> None:
    with engine_on(folder_of(model, 1), worker="process", **routed(model)) as engine:
        assert engine.rank_pids != [os.getpid()]
        assert num_differing(expected(model, 1), sampled(engine)) == 0
        engine.update_weights(str(folder_of(model, 2)))
        assert num_differing(expected(model, 2), sampled(engine)) == 0
        assert num_differing(expected(model, 1), expected(model, 2)) > 0, "the control"
        engine.sleep(level=1)
        engine.wake_up()
        assert num_differing(expected(model, 2), sampled(engine)) == 0
        engine.sleep(level=2)
        engine.update_weights(tensors_of(model, 1))
        engine.wake_up()
        assert num_differing(expected(model, 1), sampled(engine)) == 0


@pytest.mark.parametrize("gpus", TWO_RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_have_the_bits_of_one(
    folder_of: Callable[[str, int], Path],
    expected: Callable[[str, int], list[Rollout]],
    model: str,
    gpus: list[int],
) -> None:
    with on_two(folder_of(model, 1), gpus, **routed(model)) as engine:
        rollouts = sampled(engine)
        assert num_differing(expected(model, 1), rollouts) == 0
        assert len(set(engine.rank_pids)) == 2
        assert {int(rank) for rollout in rollouts for rank in rollout.ranks} == {0, 1}
        one = engine.generate(PROMPTS[:1], PARAMS[:1])  # the other rank has nothing to do
        assert num_differing(expected(model, 1)[:SAMPLES], one) == 0
        engine.update_weights(str(folder_of(model, 2)))
        assert num_differing(expected(model, 2), sampled(engine)) == 0


@pytest.mark.parametrize("gpus", TWO_RANKS)
def test_a_rank_that_is_killed_is_replaced_without_a_trace(
    folder_of: Callable[[str, int], Path], expected: Callable[[str, int], list[Rollout]], gpus: list[int]
) -> None:
    with on_two(folder_of("dense", 1), gpus, max_rank_restarts=3) as engine:
        assert num_differing(expected("dense", 1), disturbed(engine, 1, TOKENS // 2)) == 0
        engine.update_weights(tensors_of("dense", 2))
        assert num_differing(expected("dense", 2), disturbed(engine, 0, 1)) == 0


@one_gpu_only
@pytest.mark.parametrize("gpus", TWO_RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_come_to_all_ranks_from_a_trainers_gpu(
    folder_of: Callable[[str, int], Path], expected: Callable[[str, int], list[Rollout]], model: str, gpus: list[int]
) -> None:
    trainer = Trainer(MODELS[model])
    try:
        with on_two(folder_of(model, 0), gpus, max_rank_restarts=2, **routed(model)) as engine:
            for version in range(1, 4):
                seed = 1 + version % 2
                assert engine.update_weights(trainer.publish(seed, version)) == version
                assert num_differing(expected(model, seed), sampled(engine)) == 0
            trainer.do("write")  # what a rank that is started anew gets is the engine's own copy
            assert num_differing(expected(model, 2), disturbed(engine, 1, TOKENS // 2)) == 0
            published = trainer.publish(1, 4)
            trainer.do("flip", "model.norm.weight")
            with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
                engine.update_weights(published)
            assert num_differing(expected(model, 2), sampled(engine)) == 0
        with on_two(folder_of(model, 0), gpus, **routed(model)) as engine:  # which keeps no copy
            published = trainer.publish(1, 1)
            trainer.do("flip", "model.norm.weight")
            with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
                engine.update_weights(published)
            trainer.do("flip", "model.norm.weight")
            assert engine.update_weights(published) == 1
            assert num_differing(expected(model, 1), sampled(engine)) == 0
    finally:
        trainer.end()


@one_gpu_only
def test_the_pool_is_as_large_as_the_gpus_allow(folder_of: Callable[[str, int], Path]) -> None:
    options = {"num_blocks": None, "gpu_memory_fraction": 0.1}
    for ranks in range(1, min(NUM_GPUS, 2) + 1):
        with engine_on(folder_of("dense", 1), worker="process", data_parallel_size=ranks, **options) as engine:
            assert (engine.config.num_blocks or 0) > 10_000
            sampled(engine)


@one_gpu_only
def test_a_gpu_that_is_not_there_is_told(folder_of: Callable[[str, int], Path]) -> None:
    for options in ({}, {"num_blocks": None}):
        with (
            pytest.raises(RuntimeError, match=rf"there is no GPU 99: \w+ sees {NUM_GPUS}"),
            engine_on(folder_of("dense", 1), worker="process", gpus=[99], **options),
        ):
            pass
