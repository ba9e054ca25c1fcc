"""The trainer's forward on a GPU: the bits of the rollouts that an engine gave there, and their routing.

Needs what `test_engine.py` needs. Everything runs without gradients, which a GPU has none of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest

rig.require_device()
if rig.INTERPRETED:
    pytest.skip("claims about bits are claims about a GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
paddle = pytest.importorskip("paddle")

from gpu_models import engine_on, tensors_of, write_models  # noqa: E402
from routing_rig import per_rollout, trainer_routing  # noqa: E402

from zerokl.integrations import NoGpuBackwardError, PolicyModel, pack_rollouts  # noqa: E402
from zerokl.kernels.gpu import paged_attention  # noqa: E402
from zerokl.rollout.engine import RolloutEngine  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.synthetic import tiny_config, tiny_moe_config  # noqa: E402
from zerokl.rollout.outputs import Rollout  # noqa: E402
from zerokl.rollout.routing import replay_arrays  # noqa: E402
from zerokl.rollout.sampling_params import SamplingParams  # noqa: E402
from zerokl.weight_sync import WeightPublisher  # noqa: E402

pytestmark = pytest.mark.gpu

COMMON = {"vocab_size": 1500, "eos_token_id": 7, "max_position_embeddings": 1024}
MODELS = {
    "dense": tiny_config("Qwen3ForCausalLM", hidden_size=128, head_dim=32, **COMMON),
    "tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, **COMMON),
    "mixture": tiny_moe_config(hidden_size=64, **COMMON),
    "ernie": tiny_moe_config("Ernie4_5_MoeForCausalLM", hidden_size=64, **COMMON),
}
PLAIN = SamplingParams(n=4, max_tokens=40, seed=11)
WARM = SamplingParams(n=3, max_tokens=40, seed=12, temperature=0.7, top_p=0.95)
BOTH = ("bfloat16", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(MODELS, tmp_path_factory)


def sampled(engine: RolloutEngine, params: SamplingParams) -> list[Rollout]:
    random = np.random.default_rng(5)
    vocab = engine.model_config.vocab_size
    shared = random.integers(10, vocab, 70)
    tails = [random.integers(10, vocab, size) for size in (1, 3, 20, 64, 100)]
    prompts = [np.concatenate([shared, tail]).astype(np.int32) for tail in tails] + [tails[1].astype(np.int32)]
    return engine.generate(prompts, params)


def policy_on(folder: Path, dtype: str = "bfloat16", **options: Any) -> PolicyModel:
    return PolicyModel.from_pretrained(folder, device="gpu", dtype=dtype, **options)


def differing(policy: PolicyModel, rollouts: Sequence[Rollout], temperature: float = 1.0, **replay: Any) -> int:
    """Logprobs and entropies of a packed forward that are not those of the rollouts."""
    batch = pack_rollouts(rollouts)
    with paddle.no_grad():
        results = policy.logprobs(batch.token_ids, batch.cu_seqlens, temperature, batch.rows, **replay)
    count = 0
    for name, result in zip(("policy_logprobs", "entropy"), results, strict=True):
        expected = np.concatenate([getattr(rollout, name) for rollout in rollouts])
        got = result.numpy()
        assert got.shape == expected.shape and not np.isnan(got).any() and len(expected) > 0
        count += int((got != expected).sum())
    return count


def nudge(policy: PolicyModel, name: str = "model.norm.weight") -> None:
    """Change one weight a little."""
    parameter = policy.named_tensors()[name]
    values = parameter.numpy().copy()
    values.reshape(-1)[3] *= np.float32(1.01)
    parameter.set_value(values)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", [*MODELS, "smollm2"])
def test_the_packed_forward_has_the_bits_of_decode_and_score(folders: dict[str, Path], name: str, dtype: str) -> None:
    if name not in folders:
        pytest.skip("needs the weights of SmolLM2")
    with engine_on(folders[name], dtype=dtype) as engine:
        policy = policy_on(folders[name], dtype)
        for params in (PLAIN, WARM):
            rollouts = sampled(engine, params)
            for rollout, whole in zip(rollouts, engine.score(rollouts), strict=True):
                np.testing.assert_array_equal(whole, rollout.policy_logprobs)
            assert differing(policy, rollouts, params.temperature) == 0
            assert differing(policy, rollouts[::-1], params.temperature) == 0
            assert sum(differing(policy, [one], params.temperature) for one in rollouts[:5]) == 0
            again = sampled(engine, params)  # a forward in between leaves the engine's recorded steps alone
            assert all((a.policy_logprobs == b.policy_logprobs).all() for a, b in zip(rollouts, again, strict=True))
        nudge(policy)
        assert differing(policy, rollouts, WARM.temperature) > 0, "the control"


@pytest.mark.parametrize("dtype", BOTH)
def test_another_split_of_the_keys_gives_other_bits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The control."""
    with engine_on(folders["dense"], dtype=dtype) as engine:
        rollouts = sampled(engine, PLAIN)
    policy = policy_on(folders["dense"], dtype)
    assert differing(policy, rollouts) == 0
    monkeypatch.setitem(paged_attention.attention.__kwdefaults__, "split", 32)
    assert differing(policy, rollouts) > 0


@pytest.mark.parametrize("dtype", BOTH)
def test_weights_that_change_are_seen_by_both_sides(folders: dict[str, Path], dtype: str) -> None:
    policy = policy_on(folders["dense"], dtype)
    with engine_on(folders["dense"], dtype=dtype) as engine, WeightPublisher() as publisher:
        for version in (1, 2):
            newer = tensors_of(MODELS["dense"], 1 + version)
            for name, parameter in policy.named_tensors().items():
                parameter.set_value(newer[name])
            rollouts = sampled(engine, PLAIN)
            assert differing(policy, rollouts) > 0
            engine.update_weights(publisher.publish(policy.named_arrays(), version))
            rollouts = sampled(engine, PLAIN)
            assert differing(policy, rollouts) == 0


@pytest.mark.parametrize("dtype", BOTH)
def test_a_policy_that_rounds_its_weights_has_the_bits_of_an_engine_that_got_them_rounded(
    folders: dict[str, Path], dtype: str
) -> None:
    rounding, plain = (policy_on(folders["tied"], dtype, weight_dtype=kind) for kind in ("bfloat16", "float32"))
    with engine_on(folders["tied"], dtype=dtype) as engine, WeightPublisher() as publisher:
        engine.update_weights(publisher.publish(rounding.named_arrays(), 1, dtype="bfloat16", inexact=False))
        rollouts = sampled(engine, PLAIN)
    assert differing(rounding, rollouts) == 0
    assert differing(plain, rollouts) > 0, "norms and biases are not rounded without it"


def test_hidden_states_and_the_head_apart_have_the_same_bits(folders: dict[str, Path]) -> None:
    policy = policy_on(folders["dense"], chunk_rows=17)
    with engine_on(folders["dense"]) as engine:
        rollouts = sampled(engine, PLAIN)
    batch = pack_rollouts(rollouts)
    with paddle.no_grad():
        hidden = policy.hidden_states(batch.token_ids, batch.cu_seqlens, batch.rows)
        logprobs, _ = policy.head_logprobs(hidden, batch.targets)
    np.testing.assert_array_equal(logprobs.numpy(), batch.rollout_logprobs)


def test_gradients_are_refused_by_name(folders: dict[str, Path]) -> None:
    policy = policy_on(folders["dense"])
    ids, starts = np.arange(20, dtype=np.int32), np.array([0, 20], np.int32)
    for call in (policy.logprobs, policy.hidden_states):
        with pytest.raises(NoGpuBackwardError, match="no backward"):
            call(ids, starts)
    with paddle.no_grad():
        expected, _ = policy.logprobs(ids, starts)
    for parameter in policy.parameters():
        parameter.stop_gradient = True
    got, _ = policy.logprobs(ids, starts)
    np.testing.assert_array_equal(got.numpy(), expected.numpy())
    assert got.stop_gradient and got.place.is_gpu_place()


def test_tensors_on_the_gpu_become_the_parameters(folders: dict[str, Path]) -> None:
    config = ModelConfig.from_json(folders["dense"])
    given = {name: rig.put(values, "float32") for name, values in tensors_of(MODELS["dense"]).items()}
    policy = PolicyModel(config, given)
    assert policy.device == "gpu" and policy.dtype == "bfloat16"
    named = policy.named_tensors()
    assert all(named[name].data_ptr() == tensor.data_ptr() for name, tensor in given.items())
    for name, array in policy.named_arrays():
        np.testing.assert_array_equal(array, tensors_of(MODELS["dense"])[name])
    with engine_on(folders["dense"]) as engine:
        assert differing(policy, sampled(engine, PLAIN)) == 0


ROUTING_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "graphs off": {"record_graphs": False},
    "small chunks": {"max_num_batched_tokens": 19},
    "preemption": {"num_blocks": 40, "block_size": 8},
}


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["mixture", "ernie"])
def test_returned_routing_is_the_trainers_own(folders: dict[str, Path], name: str, dtype: str) -> None:
    policy = policy_on(folders[name], dtype)
    expected: list[Rollout] = []
    for variant, options in ROUTING_VARIANTS.items():
        with engine_on(folders[name], dtype=dtype, return_routing="all", **options) as engine:
            rollouts = sampled(engine, PLAIN)
            assert sum(rollout.num_preemptions for rollout in rollouts) > 0 or variant != "preemption"
            assert engine.expert_load().total.sum() > 0
        expected = expected or rollouts
        for one, other in zip(expected, rollouts, strict=True):
            np.testing.assert_array_equal(one.policy_logprobs, other.policy_logprobs)
        with paddle.no_grad():
            routed = trainer_routing(policy, rollouts)
        parts = [per_rollout(array, rollouts) for array in (routed.experts, routed.weights)]
        for rollout, experts, weights in zip(rollouts, *parts, strict=True):
            assert rollout.routing is not None and rollout.routing.start == 0
            np.testing.assert_array_equal(rollout.routing.experts, experts, err_msg=variant)
            np.testing.assert_array_equal(rollout.routing.weights, weights, err_msg=variant)
    with engine_on(folders[name], dtype=dtype) as engine:  # routing that is not returned changes nothing
        for one, other in zip(expected, sampled(engine, PLAIN), strict=True):
            np.testing.assert_array_equal(one.policy_logprobs, other.policy_logprobs)
            assert other.routing is None


@pytest.mark.parametrize("dtype", BOTH)
def test_replay_holds_the_rollouts_bits(folders: dict[str, Path], dtype: str) -> None:
    policy = policy_on(folders["mixture"], dtype)
    with engine_on(folders["mixture"], dtype=dtype, return_routing="output") as engine:
        rollouts = sampled(engine, PLAIN)
        assert differing(policy, rollouts, routing=replay_arrays(rollouts)[0]) == 0
    with engine_on(folders["mixture"], dtype=dtype, return_routing="all") as engine:
        rollouts = sampled(engine, PLAIN)
    experts, weights = replay_arrays(rollouts)
    assert differing(policy, rollouts, routing=experts) == 0
    assert differing(policy, rollouts, routing=experts, routing_weights=weights) == 0
    for name, parameter in policy.named_tensors().items():
        if name.endswith("mlp.gate.weight"):
            noise = 0.1 * np.random.default_rng(9).standard_normal(tuple(parameter.shape))
            parameter.set_value((parameter.numpy() + noise).astype(np.float32))
    with paddle.no_grad():
        free, held = trainer_routing(policy, rollouts), trainer_routing(policy, rollouts, routing=experts)
    given = experts[..., 0] >= 0
    assert (free.experts != experts)[given].any(), "the stirred routers choose alike"
    np.testing.assert_array_equal(held.experts[given], experts[given])
    assert differing(policy, rollouts, routing=experts, routing_weights=weights) == 0, "nothing of the routers is left"
    assert differing(policy, rollouts, routing=experts) > 0, "the control: the weights are the stirred routers'"


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", "-rs", "-p", "no:cacheprovider"]))
