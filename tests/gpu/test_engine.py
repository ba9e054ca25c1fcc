"""The engine on a GPU: a token's logprob is a function of weights, tokens and parameters, whatever is done around it.

Needs Paddle's GPU build, Triton and cuda-bindings; neither the C++ extension nor an installed ZeroKL. With
ZEROKL_SMOLLM2_GGUF (or KIT, a folder with smollm2.gguf) also on the real weights of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()
if rig.INTERPRETED:
    pytest.skip("claims about bits are claims about a GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from gpu_models import engine_on, tensors_of, write_models  # noqa: E402

from zerokl.kernels.gpu import paged_attention  # noqa: E402
from zerokl.rollout.engine import RolloutEngine  # noqa: E402
from zerokl.rollout.models.saver import save_pretrained  # noqa: E402
from zerokl.rollout.models.synthetic import tiny_config, tiny_moe_config  # noqa: E402
from zerokl.rollout.outputs import Rollout  # noqa: E402
from zerokl.rollout.sampling_params import SamplingParams  # noqa: E402
from zerokl.rollout.scheduler import Scheduler  # noqa: E402
from zerokl.rollout.step_plan import StepPlan  # noqa: E402
from zerokl.weight_sync import WeightPublisher  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB = 1500
COMMON = {"eos_token_id": 7, "max_position_embeddings": 4096}
MODELS = {
    "dense": tiny_config("Qwen3ForCausalLM", vocab_size=VOCAB, hidden_size=128, head_dim=32, **COMMON),
    "mixture": tiny_moe_config(vocab_size=VOCAB, hidden_size=64, **COMMON),
}
PLAIN = SamplingParams(n=4, max_tokens=50, seed=11)
TRUNCATED = SamplingParams(n=3, max_tokens=40, seed=12, temperature=0.7, top_p=0.95)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(MODELS, tmp_path_factory)


def some_prompts(vocab: int) -> list[NDArray[np.int32]]:
    random = np.random.default_rng(5)
    shared = random.integers(10, vocab, 70)
    tails = [random.integers(10, vocab, size) for size in (1, 3, 20, 64, 100)]
    return [np.concatenate([shared, tail]).astype(np.int32) for tail in tails] + [tails[1].astype(np.int32)]


def sampled(engine: RolloutEngine, params: SamplingParams) -> list[Rollout]:
    return engine.generate(some_prompts(engine.model_config.vocab_size), params)


def num_differing(one: list[Rollout], other: list[Rollout]) -> int:
    """Values of tokens, logprobs, policy logprobs and entropies that differ; a value that is missing counts."""
    count = 0
    for a, b in zip(one, other, strict=True):
        for name in ("token_ids", "logprobs", "policy_logprobs", "entropy"):
            x, y = getattr(a, name), getattr(b, name)
            size = min(len(x), len(y))
            assert not np.isnan(x).any()
            count += int((x[:size] != y[:size]).sum()) + abs(len(x) - len(y))
    return count


VARIANTS: dict[str, dict[str, Any]] = {
    "graphs off": {"record_graphs": False},
    "one at a time": {"max_num_seqs": 1},
    "small chunks": {"max_num_batched_tokens": 19},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"num_blocks": 40, "block_size": 8},
    "wide blocks": {"block_size": 64, "num_blocks": 200},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["dense", "mixture", "smollm2"])
def test_decode_equals_score_and_every_way_to_schedule(folders: dict[str, Path], name: str, dtype: str) -> None:
    if name not in folders:
        pytest.skip("needs the weights of SmolLM2")
    with engine_on(folders[name], dtype=dtype) as engine:
        expected = {params: sampled(engine, params) for params in (PLAIN, TRUNCATED)}
        for rollouts in expected.values():
            assert sum(len(rollout.token_ids) for rollout in rollouts) > 300
            for rollout, whole in zip(rollouts, engine.score(rollouts), strict=True):
                np.testing.assert_array_equal(whole, rollout.policy_logprobs)
            for rollout, whole in zip(rollouts, engine.score(rollouts, definition="logprobs"), strict=True):
                np.testing.assert_array_equal(whole, rollout.logprobs)
    differing = {}
    for variant, options in VARIANTS.items():
        if name == "smollm2" and variant in ("one at a time", "wide blocks"):
            continue
        with engine_on(folders[name], dtype=dtype, **options) as engine:
            for params, rollouts in expected.items():
                got = sampled(engine, params)
                differing[variant, params.top_p] = num_differing(rollouts, got)
                if variant == "preemption":
                    assert sum(rollout.num_preemptions for rollout in got) > 0
    assert not any(differing.values()), differing


OPTIONS = [
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"min_tokens": 20, "stop_token_ids": tuple(range(300))},
    {"logit_bias": {5: -np.inf, 9: 2.0}, "presence_penalty": 0.4, "top_p": 0.9},
    {},
]


def test_steps_ahead_give_the_bits_of_steps_that_are_awaited(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls arrive while steps are under way; penalties count tokens that only the device has."""
    steps: list[bool] = []

    def noted(scheduler: Scheduler, plan: StepPlan, now: float) -> StepPlan | None:
        ahead = plan_ahead(scheduler, plan, now)
        steps.append(ahead is not None)
        return ahead

    def run() -> list[Rollout]:
        with engine_on(folders["dense"], max_num_batched_tokens=100, max_num_seqs=24) as engine:
            prompts = some_prompts(engine.model_config.vocab_size)
            submitted = []
            for number, prompt in enumerate(prompts * 4):
                options = SamplingParams(n=2, max_tokens=40 + number, seed=number, **OPTIONS[number % len(OPTIONS)])
                submitted.append(engine.submit([prompt], options))
                if number % 5 == 4:
                    submitted[number - 4].future.result()
            for submission in submitted:
                submission.future.result()
            return [rollout for submission in submitted for rollout in submission.read()]

    plan_ahead = Scheduler.plan_ahead
    monkeypatch.setattr(Scheduler, "plan_ahead", noted)
    rollouts = run()
    assert sum(steps) > 0.8 * len(steps) > 50
    monkeypatch.setattr(Scheduler, "plan_ahead", lambda scheduler, plan, now: None)
    assert num_differing(rollouts, run()) == 0


def test_other_splits_of_the_keys_give_other_bits(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    with engine_on(folders["dense"]) as engine:
        expected = sampled(engine, PLAIN)
    monkeypatch.setitem(paged_attention.attention.__kwdefaults__, "split", 32)
    with engine_on(folders["dense"]) as engine:
        assert num_differing(expected, sampled(engine, PLAIN)) > 0


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_new_weights_take_the_place_of_the_old_ones(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    newer = save_pretrained(tmp_path, MODELS[name], tensors_of(MODELS[name], 2))
    with engine_on(newer) as engine:
        expected = sampled(engine, PLAIN)
    with engine_on(folders[name]) as engine:
        first = sampled(engine, PLAIN)
        engine.update_weights(tensors_of(MODELS[name], 2))
        assert num_differing(first, expected) > 0
        assert num_differing(expected, sampled(engine, PLAIN)) == 0
        engine.update_weights(str(folders[name]))
        assert num_differing(first, sampled(engine, PLAIN)) == 0


def test_weights_come_through_shared_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(MODELS["dense"], 3)
    with engine_on(save_pretrained(tmp_path, MODELS["dense"], tensors)) as engine:
        expected = sampled(engine, PLAIN)
    with engine_on(folders["dense"]) as engine, WeightPublisher() as publisher:
        for version in (1, 2, 3):
            published = tensors if version % 2 else tensors_of(MODELS["dense"])
            engine.update_weights(publisher.publish(published, version))
        assert num_differing(expected, sampled(engine, PLAIN)) == 0


def test_requests_in_flight_go_on_under_new_weights(folders: dict[str, Path]) -> None:
    """What comes after the update is what the new weights give, and nothing that was under way gets in between."""
    params = SamplingParams(n=8, max_tokens=3000, seed=3, ignore_eos=True)
    with engine_on(folders["dense"], max_model_len=4096, num_blocks=4096) as engine:
        call = engine.submit([[5, 6, 7, 8]], params)
        _wait_for_steps(engine, 20)
        engine.update_weights(tensors_of(MODELS["dense"], 2), mode="keep")
        rollouts = call.read() if call.future.result() is None else []
        for rollout in rollouts:
            later = rollout.policy_versions == 1
            assert later.any() and not later.all(), "the update came too late or too early to show anything"
            (whole,) = engine.score(rollout)
            np.testing.assert_array_equal(whole[later], rollout.policy_logprobs[later])
            assert (whole[~later] != rollout.policy_logprobs[~later]).any()


def test_an_abort_leaves_the_others_as_they_are(folders: dict[str, Path]) -> None:
    params = SamplingParams(n=4, max_tokens=1000, seed=4, ignore_eos=True)
    with engine_on(folders["dense"], max_model_len=4096, num_blocks=4096) as engine:
        expected = engine.generate([[9, 8, 7]], params)
        kept = engine.submit([[9, 8, 7]], params)
        cut = engine.submit([[1, 2, 3]], params, request_ids=["cut"])
        _wait_for_steps(engine, 20)
        engine.abort("cut")
        kept.future.result()
        cut.future.result()
        assert num_differing(expected, kept.read()) == 0
        resumed = engine.generate(resume_from=cut.read())
        assert num_differing(engine.generate([[1, 2, 3]], params), resumed) == 0


def _wait_for_steps(engine: RolloutEngine, count: int) -> None:
    """Returns after that many further steps."""
    done, left = threading.Event(), iter(range(count - 1))
    end = engine._loop.watch_steps(lambda: done.set() if next(left, None) is None else None)
    assert done.wait(60)
    end()


def test_sleep_frees_memory_and_waking_restores_the_bits(folders: dict[str, Path]) -> None:
    with engine_on(folders["dense"], num_blocks=None, gpu_memory_fraction=0.5) as engine:
        memory = _device_memory()
        assert memory > 0.3 * _device_memory(total=True), "the pool takes what it may"
        expected = sampled(engine, PLAIN)
        engine.sleep(level=1)
        assert _device_memory() < memory / 4
        engine.wake_up()
        assert num_differing(expected, sampled(engine, PLAIN)) == 0


def _device_memory(*, total: bool = False) -> int:
    from zerokl.kernels.gpu.paddle_device import memory

    free, everything = memory()
    return everything if total else everything - free


def test_the_engine_needs_no_extension() -> None:
    assert "zerokl.kernels.cpu.ops" not in sys.modules


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", "-rs", "-p", "no:cacheprovider"]))
