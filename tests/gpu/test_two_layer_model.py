"""The op tables on a GPU, once through: two-layer models over Paddle tensors and Triton kernels, float32 and bfloat16.

Compared with the float64 reference, and bit for bit with themselves however a sequence is cut up. Needs Paddle's GPU
build and Triton, but neither the C++ extension nor an installed ZeroKL: a directory `zerokl` of links to the rooms on
PYTHONPATH is enough. Also runs as a script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

triton = pytest.importorskip("triton", reason="needs Triton")
paddle = pytest.importorskip("paddle", reason="needs Paddle")
if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
    pytest.skip("needs a GPU that Paddle can use", allow_module_level=True)

from zerokl.kernels.dispatch import get_ops  # noqa: E402
from zerokl.kernels.gpu import attention_tiles, paged_attention  # noqa: E402
from zerokl.kernels.ops import SampleResult, StepInputs, neutral_sampling  # noqa: E402
from zerokl.rollout.models.config import ModelConfig  # noqa: E402
from zerokl.rollout.models.decoder import DecoderSpec, forward, forward_begun  # noqa: E402
from zerokl.rollout.models.decoder_params import build_params  # noqa: E402
from zerokl.rollout.models.rope import rope_table  # noqa: E402
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config, tiny_moe_config  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB = 1500  # two chunks of the partition of a row of logits
MODELS = {
    "llama": tiny_config("LlamaForCausalLM", vocab_size=VOCAB),
    "qwen2": tiny_config("Qwen2ForCausalLM", vocab_size=VOCAB, tie_word_embeddings=True),
    "qwen3": tiny_config("Qwen3ForCausalLM", vocab_size=VOCAB, head_dim=24, num_key_value_heads=1),
    "ernie": tiny_config("Ernie4_5ForCausalLM", vocab_size=VOCAB, head_dim=20, intermediate_size=72),
}
MIXTURES = {
    "qwen3_moe": tiny_moe_config(vocab_size=VOCAB),
    "ernie_moe": tiny_moe_config("Ernie4_5_MoeForCausalLM", vocab_size=VOCAB),
}
ALL_MODELS = MODELS | MIXTURES
CASES = [(device, name) for device in ("float32", "bfloat16") for name in ALL_MODELS]
Rows = dict[str, NDArray[Any]]


class Model:
    """A tiny model with a KV pool: "reference", or a type on the GPU."""

    def __init__(self, device: str, content: dict[str, Any], block_size: int = 16) -> None:
        config = ModelConfig.from_json(content)
        self.spec = DecoderSpec.from_config(config)
        self.ops: Any = get_ops(device) if device == "reference" else get_ops("gpu", dtype=device)
        self.block_size = block_size
        rope = self.ops.tensor(rope_table(config.rope, config.head_dim, 256))
        self.params = build_params(self.ops, config, tensors_of(config), rope, keep=self.ops.tensor)
        self.pool = self.ops.kv_pool(config.num_hidden_layers, 64, block_size, self.spec.attention)

    def run(self, inputs: StepInputs) -> Rows:
        hidden = forward(self.ops, self.params, self.spec, inputs, self.pool)
        result = self.ops.sample(hidden, self.params.lm_head, inputs.sampling)
        return {"hidden": host(hidden)[: len(inputs.logit_rows)], **columns(result)}


def tensors_of(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Random tensors that bfloat16 holds exactly."""
    return {name: rig.from_bfloat16(rig.to_bfloat16(x)) for name, x in random_tensors(config, 3).items()}


def host(tensor: Any) -> NDArray[Any]:
    return tensor if isinstance(tensor, np.ndarray) else rig.get(tensor)


def columns(result: SampleResult) -> Rows:
    return {name: getattr(result, name) for name in ("tokens", "logprobs", "policy_logprobs", "entropy")}


def some_tokens(length: int, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


SEQUENCES = [some_tokens(37, 1), some_tokens(5, 2), some_tokens(130, 3), some_tokens(1, 4)]


def with_options(inputs: StepInputs) -> StepInputs:
    """Draw at every position, with options that depend on the position alone."""
    at, rows = inputs.positions, len(inputs.positions)
    sampling = replace(
        neutral_sampling(rows),
        temperature=np.array([1.0, 0.7, 0.0, 1.3], np.float32)[at % 4],
        top_k=np.array([0, 40, 5], np.int32)[at % 3],
        top_p=np.array([1.0, 0.9], np.float32)[at % 2],
        min_p=np.array([0.0, 0.0, 0.01], np.float32)[at % 3],
        repetition_penalty=np.full(rows, 1.1, np.float32),
        presence_penalty=np.full(rows, 0.2, np.float32),
        seed=np.full(rows, 2**40 + 17, np.uint64),
        position=at.astype(np.uint32),
        forced=np.where(at % 7 == 6, at % VOCAB, -1).astype(np.int32),
        history_start=np.arange(rows + 1, dtype=np.int32) * 2,
        history_token=np.stack([at * 11 % VOCAB, (at * 11 + 1) % VOCAB], 1).reshape(-1).astype(np.int32),
        history_count=np.tile(np.array([1, 0], np.int32), rows),
        bias_start=np.arange(rows + 1, dtype=np.int32),
        bias_token=(at * 13 % VOCAB).astype(np.int32),
        bias_value=np.full(rows, 1.5, np.float32),
    )
    return replace(inputs, sampling=sampling)


def plain(inputs: StepInputs) -> StepInputs:
    """Draw at every position, without penalties and truncation."""
    at = inputs.positions
    sampling = replace(
        neutral_sampling(len(at)),
        temperature=np.array([1.0, 0.7, 0.0, 1.3], np.float32)[at % 4],
        position=at.astype(np.uint32),
    )
    return replace(inputs, sampling=sampling)


def in_pieces(
    model: Model, chunk: int, together: bool, options: Callable[[StepInputs], StepInputs] = with_options
) -> list[Rows]:
    """All sequences in chunks, at once or one after the other, in scattered blocks."""
    blocks = iter(np.random.default_rng(chunk).permutation(64).tolist())
    tables = [[next(blocks) for _ in range(-(-len(tokens) // model.block_size))] for tokens in SEQUENCES]
    pieces = [[(s, at) for at in range(0, len(tokens), chunk)] for s, tokens in enumerate(SEQUENCES)]
    steps = (
        [[p for p in step if p] for step in zip_longest(*pieces)]
        if together
        else [[p] for part in pieces for p in part]
    )
    results: list[list[Rows]] = [[] for _ in SEQUENCES]
    for step in steps:
        tokens = [SEQUENCES[s][at : at + chunk] for s, at in step]
        inputs = step_inputs(tokens, [at for _, at in step], [tables[s] for s, _ in step], model.block_size)
        rows = model.run(options(inputs))
        end = 0
        for (s, _), some in zip(step, tokens, strict=True):
            results[s].append({name: values[end : end + len(some)] for name, values in rows.items()})
            end += len(some)
    return [{name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]} for parts in results]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_agrees_with_the_float64_reference(name: str) -> None:
    expected = in_pieces(Model("reference", ALL_MODELS[name]), 1000, together=True)
    got = in_pieces(Model("float32", ALL_MODELS[name]), 1000, together=True)
    for rows, expected_rows in zip(got, expected, strict=True):
        np.testing.assert_array_equal(rows["tokens"], expected_rows["tokens"])
        np.testing.assert_allclose(rows["hidden"], expected_rows["hidden"], rtol=0, atol=3e-5)
        for column in ("logprobs", "policy_logprobs", "entropy"):
            np.testing.assert_allclose(rows[column], expected_rows[column], rtol=0, atol=3e-5, err_msg=column)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_bfloat16_agrees_with_the_float64_reference(name: str) -> None:
    """To the rounding of activations, each at most 2^-9: tokens may differ, so all are given."""

    def forced(inputs: StepInputs) -> StepInputs:
        at = inputs.positions
        return replace(inputs, sampling=neutral_sampling(len(at), (at * 7 % VOCAB).astype(np.int32)))

    expected = in_pieces(Model("reference", ALL_MODELS[name]), 1000, True, forced)
    got = in_pieces(Model("bfloat16", ALL_MODELS[name]), 1000, True, forced)
    whole, expected_whole = (
        {column: np.concatenate([rows[column] for rows in parts]) for column in parts[0]} for parts in (got, expected)
    )
    pairs = zip(whole["hidden"], expected_whole["hidden"], strict=True)
    errors = np.array([rig.relative_error(row, expected_row) for row, expected_row in pairs])
    assert np.median(errors) < 1.5e-2
    # In a mixture a token near the edge of a choice may go to another expert.
    assert np.mean(errors > 3e-2) <= (0.15 if name in MIXTURES else 0.0), np.sort(errors)[-20:]
    for column in ("policy_logprobs", "entropy"):
        assert np.median(np.abs(whole[column] - expected_whole[column])) < 2e-2, column


@pytest.mark.parametrize("options", [with_options, plain])
@pytest.mark.parametrize(("device", "name"), CASES)
def test_bits_do_not_depend_on_chunks_batch_or_blocks(
    device: str, name: str, options: Callable[[StepInputs], StepInputs]
) -> None:
    expected = in_pieces(Model(device, ALL_MODELS[name]), 1000, False, options)
    for block_size, chunk, together in ((8, 13, True), (16, 1, True), (64, 64, False)):
        got = in_pieces(Model(device, ALL_MODELS[name], block_size), chunk, together, options)
        for rows, expected_rows in zip(got, expected, strict=True):
            for column in rows:
                np.testing.assert_array_equal(rows[column], expected_rows[column], err_msg=column)


@pytest.mark.parametrize(("device", "name"), CASES)
def test_sequences_that_share_blocks_have_the_bits_of_each_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str
) -> None:
    model = Model(device, ALL_MODELS[name])
    prompt, tails = some_tokens(96, 1), [some_tokens(20, 2 + i) for i in range(4)]  # 96: a split and a half
    model.run(plain(step_inputs([prompt], [0], [[*range(6)]], 16)))
    tables = [[*range(6), 10 + 2 * i, 11 + 2 * i] for i in range(4)]

    def decode(which: list[int], at: int) -> list[Rows]:
        tokens = [tails[i][at : at + 1] for i in which]
        rows = model.run(plain(step_inputs(tokens, [96 + at] * len(which), [tables[i] for i in which], 16)))
        return [{name: values[k : k + 1] for name, values in rows.items()} for k in range(len(which))]

    monkeypatch.setattr(attention_tiles, "ENOUGH_PROGRAMS", 1)
    for at in range(20):
        alone = [decode([i], at)[0] for i in range(4)]
        together = decode([2, 0, 3, 1], at)
        assert model.ops._step.layout.num_entries("shared_tiles") > 0
        for i, rows in zip([2, 0, 3, 1], together, strict=True):
            for column in rows:
                np.testing.assert_array_equal(rows[column], alone[i][column], err_msg=f"{column} at {at}")


def test_another_split_of_the_keys_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an order that is not the stated one is seen in the results."""
    expected = in_pieces(Model("bfloat16", MODELS["llama"]), 1000, True, plain)
    monkeypatch.setitem(paged_attention.attention.__kwdefaults__, "split", 32)
    got = in_pieces(Model("bfloat16", MODELS["llama"]), 1000, True, plain)
    assert not np.array_equal(got[2]["policy_logprobs"], expected[2]["policy_logprobs"])


@pytest.mark.parametrize(("device", "name"), [("float32", "qwen3"), ("bfloat16", "qwen3"), ("bfloat16", "qwen3_moe")])
def test_a_step_recorded_as_one_graph_serves_other_steps_of_its_kind(device: str, name: str) -> None:
    """Nothing between begin_step and the end of the forward waits for the host or depends on the step's values."""
    prompts = step_inputs([some_tokens(n, 5 + n) for n in (9, 3, 4, 7)], [0] * 4, [[3], [4], [9], [2]], 16)
    first = with_options(step_inputs([some_tokens(1, 1), some_tokens(1, 2)], [9, 3], [[3], [4]], 16))
    second = with_options(step_inputs([some_tokens(1, 3), some_tokens(1, 4)], [4, 7], [[9], [2]], 16))
    models = [Model(device, ALL_MODELS[name]) for _ in range(2)]
    for model in models:
        model.run(plain(prompts))
    expected = models[0].run(second)
    model, ops = models[1], models[1].ops
    model.run(first)  # compiles and allocates
    ops.begin_step(first, model.pool)
    hidden: list[Any] = []
    graph = ops.record(lambda: hidden.append(forward_begun(ops, model.params, model.spec, first)))
    ops.begin_step(second, model.pool)
    graph.launch()
    ops.device.synchronize()
    np.testing.assert_array_equal(host(hidden[0])[:2], expected["hidden"])


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", "-rs", "-p", "no:cacheprovider"]))
