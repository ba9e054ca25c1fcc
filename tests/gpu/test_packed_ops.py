"""The trainer's op table on a GPU: packing there, a packed forward, routing recorded and replayed.

Under TRITON_INTERPRET=1 everything runs on the CPU in float32: indexing and formulas, no claims about tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()

from zerokl.kernels.gpu.packed_ops import PackedGpuOps  # noqa: E402
from zerokl.kernels.gpu.parameter_packing import ParameterPacker  # noqa: E402
from zerokl.kernels.ops import DecoderParams, StepInputs, neutral_sampling  # noqa: E402
from zerokl.kernels.packed_step import BLOCK_SIZE, num_blocks, packed_step  # noqa: E402
from zerokl.kernels.reference.ops import ReferenceOps  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.decoder import DecoderSpec, forward  # noqa: E402
from zerokl.rollout.models.decoder_params import build_params  # noqa: E402
from zerokl.rollout.models.rope import rope_table  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config  # noqa: E402
from zerokl.rollout.routing_capture import RoutingCapture  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB = 40 if rig.INTERPRETED else 1100  # there two chunks of the partition of a row of logits
SIZES: dict[str, Any] = {"vocab_size": VOCAB}
if rig.INTERPRETED:  # a millisecond for each program
    SIZES |= {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
MODELS = {
    "llama": tiny_config("LlamaForCausalLM", **SIZES),
    "qwen2": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, **SIZES),
    "qwen3": tiny_config("Qwen3ForCausalLM", **(SIZES | {"head_dim": 24, "num_key_value_heads": 1})),
    "ernie": tiny_config("Ernie4_5ForCausalLM", head_dim=20, intermediate_size=72, **SIZES),
    "qwen3_moe": tiny_moe_config(**SIZES),
    "ernie_moe": tiny_moe_config("Ernie4_5_MoeForCausalLM", **SIZES),
}
DTYPES = ("float32",) if rig.INTERPRETED else ("float32", "bfloat16")
LENGTHS = (66, 1, 4)


def ops_of(dtype: Any) -> PackedGpuOps:
    return PackedGpuOps(rig.HostDevice(), dtype) if rig.INTERPRETED else PackedGpuOps(dtype=dtype)


@dataclass(slots=True)
class Model:
    """A model whose float32 weights are on the device before they are packed."""

    config: ModelConfig
    ops: PackedGpuOps
    params: DecoderParams[Any]

    @classmethod
    def of(cls, name: str, dtype: str, rounds: bool = False) -> Model:
        config, ops = ModelConfig.from_json(MODELS[name]), ops_of(dtype)
        packer = ParameterPacker(ops.device, ops.dtype, rounds=rounds)
        given = {name: ops.device.put(values) for name, values in random_tensors(config, 3).items()}
        return cls(config, ops, build_params(packer, config, given, rope_of(ops, config), keep=packer.tensor))

    def hidden(self, step: StepInputs, ops: Any = None) -> NDArray[Any]:
        spec = DecoderSpec.from_config(self.config)
        pool = self.ops.scratch_pool(step, spec.attention)
        return self.ops.device.get(forward(ops or self.ops, self.params, spec, step, pool))

    def logprobs(self, step: StepInputs, **options: Any) -> tuple[NDArray[Any], ...]:
        spec = DecoderSpec.from_config(self.config)
        pool = self.ops.scratch_pool(step, spec.attention)
        hidden = forward(self.ops, self.params, spec, step, pool)
        return self.ops.logprobs(hidden, self.params.lm_head, targets_of(step), **options)


def rope_of(ops: Any, config: ModelConfig) -> Any:
    return ops.tensor(rope_table(config.rope, config.head_dim, 256))


def some_step(seed: int = 1, **replay: Any) -> StepInputs:
    """Whole sequences; every other row is wanted."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    ids = np.random.default_rng(seed).integers(0, VOCAB, starts[-1]).astype(np.int32)
    return packed_step(ids, starts, np.arange(0, starts[-1], 2, dtype=np.int32), **replay)


def targets_of(step: StepInputs) -> NDArray[np.int32]:
    return (step.logit_rows * 7 % VOCAB).astype(np.int32)


def leaves(name: str, part: Any) -> Iterator[tuple[str, Any]]:
    """(path, tensor) of everything in nested dataclasses and tuples."""
    if is_dataclass(part):
        for field in fields(part):
            yield from leaves(f"{name}.{field.name}", getattr(part, field.name))
    elif isinstance(part, tuple):
        for index, each in enumerate(part):
            yield from leaves(f"{name}[{index}]", each)
    elif part is not None:
        yield name, part


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_packing_on_the_device_gives_what_packing_on_the_host_gives(name: str, dtype: str, rounds: bool) -> None:
    model = Model.of(name, dtype, rounds)
    tensors = random_tensors(model.config, 3)
    if rounds:
        tensors = {key: rig.from_bfloat16(rig.to_bfloat16(values)) for key, values in tensors.items()}
    host = ops_of(dtype)
    expected = build_params(host, model.config, tensors, rope_of(host, model.config), keep=host.tensor)
    pairs = list(zip(leaves("", expected), leaves("", model.params), strict=True))
    assert len(pairs) > 15
    for (path, one), (other_path, other) in pairs:
        assert path == other_path
        np.testing.assert_array_equal(model.ops.device.get(other), host.device.get(one), err_msg=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_forward_agrees_with_the_float64_reference(name: str, dtype: str) -> None:
    model, step = Model.of(name, dtype), some_step()
    reference = ReferenceOps()
    spec = DecoderSpec.from_config(model.config)
    tensors = random_tensors(model.config, 3)
    params = build_params(reference, model.config, tensors, rope_of(reference, model.config), keep=reference.tensor)
    pool = reference.kv_pool(model.config.num_hidden_layers, num_blocks(step), BLOCK_SIZE, spec.attention)
    hidden = forward(reference, params, spec, step, pool)
    expected = reference.sample(hidden, params.lm_head, neutral_sampling(len(step.logit_rows), targets_of(step), 0.7))
    got = model.logprobs(step, temperature=0.7)
    for values, right in zip(got, (expected.policy_logprobs, expected.entropy), strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(values, right, rtol=0, atol=3e-5)
        else:
            assert np.median(np.abs(values - right)) < 2e-2


def test_no_bit_depends_on_the_rows_of_logits_that_exist_at_a_time() -> None:
    model, step = Model.of("qwen3", DTYPES[-1]), some_step()
    expected = model.logprobs(step)
    for chunk_rows in (1, 7, 16):
        for one, other in zip(expected, model.logprobs(step, chunk_rows=chunk_rows), strict=True):
            if rig.INTERPRETED:  # a library's products there
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
            else:
                np.testing.assert_array_equal(one, other)


def test_a_step_without_rows_has_no_logprobs() -> None:
    model = Model.of("llama", DTYPES[-1])
    step = replace(some_step(), logit_rows=np.zeros(0, np.int32), sampling=neutral_sampling(0))
    assert [part.shape for part in model.logprobs(step)] == [(0,), (0,)]


def test_a_temperature_without_a_distribution_is_refused() -> None:
    model = Model.of("llama", DTYPES[-1])
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        model.logprobs(some_step(), temperature=0.0)


def routed(model: Model, step: StepInputs) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(hidden, ids, gate weights) of a step, the routing as the routers gave it, layer by layer."""
    assert model.config.moe is not None
    capture = RoutingCapture(model.ops, model.config.moe, model.ops.device.get)
    hidden = model.hidden(step, capture.recording_ops)
    taken = capture.take()
    return hidden, taken.experts, taken.weights


MIXTURES = [(name, dtype) for name in ("qwen3_moe", "ernie_moe") for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), MIXTURES)
def test_what_is_recorded_is_what_the_routers_choose(name: str, dtype: str) -> None:
    model = Model.of(name, dtype)
    moe = model.config.moe
    assert moe is not None
    expected = [routed(model, some_step(seed)) for seed in (1, 2)]
    model.ops.record_routing(len(moe.layers), moe.top_k)
    for seed, (hidden, ids, weights) in zip((1, 2), expected, strict=True):
        again = model.hidden(some_step(seed))
        got_ids, got_weights = model.ops.fetch_routing().result()
        np.testing.assert_array_equal(again, hidden)
        np.testing.assert_array_equal(got_ids, ids)
        np.testing.assert_array_equal(got_weights, weights)
        assert ids.shape == (len(moe.layers), sum(LENGTHS), moe.top_k) and (np.sort(ids)[..., 1:] > 0).all()
    assert (expected[0][1] != expected[1][1]).any(), "two steps are routed alike"


@pytest.mark.parametrize(("name", "dtype"), MIXTURES)
def test_replay_gives_the_bits_of_the_step_it_comes_from(name: str, dtype: str) -> None:
    model = Model.of(name, dtype)
    hidden, ids, weights = routed(model, some_step())
    holes = np.where(np.random.default_rng(4).random(ids.shape[:2])[..., None] < 0.4, -1, ids).astype(np.int32)
    for given in (ids, holes):
        for replay in ({"routing": given}, {"routing": given, "routing_weights": weights}):
            got = routed(model, some_step(**replay))
            for one, other in zip(got, (hidden, ids, weights), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("name", "dtype"), MIXTURES)
def test_given_experts_and_weights_are_used_as_they_are(name: str, dtype: str) -> None:
    model = Model.of(name, dtype)
    hidden, ids, weights = routed(model, some_step())
    moe = model.config.moe
    assert moe is not None
    others = ((ids + 1) % moe.num_experts).astype(np.int32)
    got_hidden, got_ids, got_weights = routed(model, some_step(routing=others))
    np.testing.assert_array_equal(got_ids, others)
    assert (got_hidden != hidden).any() and (got_weights != weights).any()
    halved = (weights / 2).astype(np.float32)
    dropped = np.arange(ids.shape[1]) % 3 == 0
    holes = np.where(dropped[:, None], -1, ids).astype(np.int32)
    got_hidden, got_ids, got_weights = routed(model, some_step(routing=holes, routing_weights=halved))
    np.testing.assert_array_equal(got_weights[:, ~dropped], halved[:, ~dropped])
    np.testing.assert_array_equal(got_weights[0, dropped], weights[0, dropped])
    assert (got_hidden != hidden).any()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", "-rs", "-p", "no:cacheprovider"]))
