"""The decoder over CpuOps: right against an independent float64 model, and bit-equal however a sequence is cut up."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.ops import StepInputs, neutral_sampling
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config, tiny_moe_config

Doubles = NDArray[np.float64]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": tiny_config("LlamaForCausalLM", head_dim=None),
    "llama3 rope, biases": tiny_config("LlamaForCausalLM", rope_parameters=LLAMA3, attention_bias=True),
    "qwen2 tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen3": tiny_config("Qwen3ForCausalLM", head_dim=24, num_key_value_heads=1),
    "ernie": tiny_config("Ernie4_5ForCausalLM", head_dim=20, intermediate_size=72, num_key_value_heads=4),
    "qwen3 moe": tiny_moe_config("Qwen3MoeForCausalLM", head_dim=24),
    "qwen3 moe, plain weights": tiny_moe_config("Qwen3MoeForCausalLM", norm_topk_prob=False, decoder_sparse_step=2),
    "ernie moe": tiny_moe_config("Ernie4_5_MoeForCausalLM", tie_word_embeddings=True),
    "ernie moe, no shared experts": tiny_moe_config("Ernie4_5_MoeForCausalLM", moe_num_shared_experts=0),
}


# -- an independent model: dense, one sequence, float64, after the families' published code ----------------------------
class PlainModel:
    def __init__(self, content: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> None:
        self.content = content
        self.tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.family = content["architectures"][0]
        self.heads = content["num_attention_heads"]
        self.kv_heads = content["num_key_value_heads"]
        self.head_dim = content.get("head_dim", content["hidden_size"] // self.heads)

    def linear(self, name: str, x: Doubles) -> Doubles:
        y: Doubles = x @ self.tensors[name + ".weight"].T
        return y + self.tensors.get(name + ".bias", 0.0)

    def norm(self, name: str, x: Doubles) -> Doubles:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.content["rms_norm_eps"])
        return x / scale * self.tensors[name + ".weight"]

    def rotate(self, x: Doubles) -> Doubles:
        rope = self.content["rope_parameters"]
        half = self.head_dim // 2
        frequency = np.array([rope["rope_theta"] ** (-2 * i / self.head_dim) for i in range(half)])
        if rope["rope_type"] == "llama3":
            wave = 2 * np.pi / frequency
            length = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (length / wave - low) / (high - low)
            middle = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
            frequency = np.where(
                wave < length / high, frequency, np.where(wave > length / low, frequency / rope["factor"], middle)
            )
        angle = np.arange(len(x))[:, None, None] * frequency
        turned = np.empty_like(x)
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if "Ernie" in self.family else (slice(half), slice(half, None))
        )
        number = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
        turned[..., first], turned[..., second] = number.real, number.imag
        return turned

    def attention(self, prefix: str, x: Doubles) -> Doubles:
        q, k, v = (self.linear(f"{prefix}.{p}_proj", x).reshape(len(x), -1, self.head_dim) for p in "qkv")
        if self.family.startswith("Qwen3"):
            q, k = self.norm(prefix + ".q_norm", q), self.norm(prefix + ".k_norm", k)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(part, self.heads // self.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self.head_dim)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(prefix + ".o_proj", np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1))

    def block(self, prefix: str, x: Doubles) -> Doubles:
        gate = self.linear(prefix + "gate_proj", x)
        return self.linear(prefix + "down_proj", gate / (1 + np.exp(-gate)) * self.linear(prefix + "up_proj", x))

    def mixture(self, prefix: str, x: Doubles) -> Doubles:
        content, ernie = self.content, "Ernie" in self.family
        top_k = content["moe_k" if ernie else "num_experts_per_tok"]
        logits = x @ self.tensors[prefix + "gate.weight"].T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for token, row in enumerate(p):
            score = row + self.tensors[prefix + "moe_statics.e_score_correction_bias"][0] if ernie else row
            chosen = sorted(range(len(row)), key=lambda expert: (-score[expert], expert))[:top_k]
            divisor = max(row[chosen].sum(), 1e-12) if ernie or content["norm_topk_prob"] else 1.0
            for expert in chosen:
                out[token] += row[expert] / divisor * self.block(f"{prefix}experts.{expert}.", x[token : token + 1])[0]
        shared = prefix + "shared_experts."
        return out + self.block(shared, x) if shared + "gate_proj.weight" in self.tensors else out

    def hidden(self, token_ids: NDArray[np.int32]) -> Doubles:
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for layer in range(self.content["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(prefix + "self_attn", self.norm(prefix + "input_layernorm", x))
            y = self.norm(prefix + "post_attention_layernorm", x)
            mixed = prefix + "mlp.gate.weight" in self.tensors
            x = x + (self.mixture if mixed else self.block)(prefix + "mlp.", y)
        return self.norm("model.norm", x)

    def logprobs(self, token_ids: NDArray[np.int32]) -> Doubles:
        tied = self.content["tie_word_embeddings"]
        head = self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
        logits = self.hidden(token_ids) @ head.T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# -- the model under test ----------------------------------------------------------------------------------------------
class Runnable:
    """A tiny model with an ops object and a KV pool of its own."""

    def __init__(
        self, ops: Any, content: dict[str, Any], block_size: int = 16, num_blocks: int = 64, seed: int = 3
    ) -> None:
        self.config = ModelConfig.from_json(content)
        self.spec = DecoderSpec.from_config(self.config)
        self.ops, self.block_size = ops, block_size
        rope = rope_table(self.config.rope, self.config.head_dim, 256)
        self.params = build_params(ops, self.config, random_tensors(self.config, seed), rope)
        self.pool = ops.kv_pool(self.config.num_hidden_layers, num_blocks, block_size, self.spec.attention)
        # What nobody wrote must not be read.
        self.pool.keys[...] = np.nan
        self.pool.values[...] = np.nan

    def run(self, inputs: StepInputs) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Hidden rows and the logprobs of the forced tokens."""
        hidden = forward(self.ops, self.params, self.spec, inputs, self.pool)
        result = self.ops.sample(hidden, self.params.lm_head, inputs.sampling)
        return np.array(hidden), result.policy_logprobs


def some_tokens(length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)


def in_pieces(
    model: Runnable, sequences: list[NDArray[np.int32]], steps: list[list[int]], seed: int = 0
) -> list[tuple[NDArray[Any], NDArray[np.float32]]]:
    """Run sequences together, step by step: steps[i][s] tokens of sequence s (0: left out), in scattered blocks."""
    blocks = iter(np.random.default_rng(seed).permutation(model.pool.keys.shape[1]).tolist())
    tables = [[next(blocks) for _ in range(-(-len(tokens) // model.block_size))] for tokens in sequences]
    done = [0] * len(sequences)
    results: list[list[tuple[NDArray[Any], NDArray[np.float32]]]] = [[] for _ in sequences]
    for counts in steps:
        active = [s for s, count in enumerate(counts) if count]
        tokens = [sequences[s][done[s] : done[s] + counts[s]] for s in active]
        inputs = step_inputs(tokens, [done[s] for s in active], [tables[s] for s in active], model.block_size)
        hidden, logprobs = model.run(with_next_tokens(inputs, tokens))
        row = 0
        for s in active:
            results[s].append((hidden[row : row + counts[s]], logprobs[row : row + counts[s]]))
            row += counts[s]
            done[s] += counts[s]
    assert done == [len(tokens) for tokens in sequences]
    return [(np.concatenate([h for h, _ in parts]), np.concatenate([p for _, p in parts])) for parts in results]


def with_next_tokens(inputs: StepInputs, tokens: list[NDArray[np.int32]]) -> StepInputs:
    """Ask for the logprob of a token that the position determines."""
    forced = (inputs.positions * 7 + 1) % 96
    return replace(inputs, sampling=neutral_sampling(len(forced), forced))


def cut(lengths: list[int], chunk: int, together: bool) -> list[list[int]]:
    """Steps of at most `chunk` tokens of each sequence, all sequences at once or one after the other."""
    pieces = [[min(chunk, length - at) for at in range(0, length, chunk)] for length in lengths]
    if together:
        return [list(step) for step in zip_longest(*pieces, fillvalue=0)]
    return [[count if s == t else 0 for t in range(len(lengths))] for s, part in enumerate(pieces) for count in part]


@pytest.mark.parametrize("name", MODELS)
def test_forward_agrees_with_an_independent_float64_model(name: str) -> None:
    content = MODELS[name]
    tokens = some_tokens(83)
    plain = PlainModel(content, random_tensors(ModelConfig.from_json(content), 3))
    forced = (np.arange(83) * 7 + 1) % 96
    expected_hidden, expected = plain.hidden(tokens), plain.logprobs(tokens)[np.arange(83), forced]
    for ops, hidden_error, logprob_error in ((ReferenceOps(), 2e-6, 2e-6), (CpuOps(), 3e-5, 1e-5)):
        hidden, logprobs = in_pieces(Runnable(ops, content), [tokens], [[83]])[0]
        assert np.abs(hidden - expected_hidden).max() < hidden_error
        assert np.abs(logprobs - expected).max() < logprob_error


SEQUENCES = [some_tokens(37, 1), some_tokens(5, 2), some_tokens(130, 3), some_tokens(1, 4)]
LENGTHS = [len(tokens) for tokens in SEQUENCES]


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_chunks_batch_blocks_or_threads(name: str) -> None:
    content = MODELS[name]
    expected = in_pieces(Runnable(CpuOps(2), content), SEQUENCES, cut(LENGTHS, 1000, together=False))
    for block_size, chunk, together, threads in (
        (16, 1000, True, 2),
        (8, 1, True, 1),
        (64, 13, True, 2),
        (16, 16, False, 1),
        (32, 64, True, 2),
    ):
        model = Runnable(CpuOps(threads), content, block_size)
        got = in_pieces(model, SEQUENCES, cut(LENGTHS, chunk, together), seed=chunk)
        for (hidden, logprobs), (expected_hidden, expected_logprobs) in zip(got, expected, strict=True):
            np.testing.assert_array_equal(hidden, expected_hidden)
            np.testing.assert_array_equal(logprobs, expected_logprobs)


def test_ordinary_matrix_products_do_depend_on_the_batch() -> None:
    """The control of the test above: the library's float32 product in place of ours, nothing else changed."""

    class LibraryLinear(CpuOps):
        def pack_linear(self, weights: Any, biases: Any) -> Any:
            return np.concatenate(weights), super().pack_linear(weights, biases)

        def linear(self, x: Any, weight: Any) -> Any:
            return x @ weight[0].T

        qkv_linear = linear

        def sample(self, hidden: Any, lm_head: Any, batch: Any) -> Any:
            return CpuOps().sample(hidden, lm_head[1], batch)

    content = tiny_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    whole = in_pieces(Runnable(LibraryLinear(), content), SEQUENCES, cut(LENGTHS, 1000, together=False))
    by_one = in_pieces(Runnable(LibraryLinear(), content), SEQUENCES, cut(LENGTHS, 1, together=True))
    assert any((left != right).any() for (left, _), (right, _) in zip(whole, by_one, strict=True))


def test_later_tokens_and_other_sequences_do_not_matter_but_earlier_tokens_do() -> None:
    model = Runnable(CpuOps(), MODELS["qwen3"])
    tokens = some_tokens(40)
    expected, _ = in_pieces(model, [tokens], [[40]])[0]
    changed = tokens.copy()
    changed[30] = (changed[30] + 1) % 96
    got, _ = in_pieces(model, [changed], [[40]])[0]
    np.testing.assert_array_equal(got[:30], expected[:30])
    assert (got[30:] != expected[30:]).any(axis=1).all()


def test_no_logit_rows_still_write_keys_and_values() -> None:
    model = Runnable(CpuOps(), MODELS["llama"])
    tokens = some_tokens(20)
    expected, _ = in_pieces(model, [tokens], [[20]])[0]
    none = np.zeros(0, np.int32)
    first = step_inputs([tokens[:17]], [0], [[4, 2]], 16, logit_rows=none)
    assert forward(model.ops, model.params, model.spec, first, model.pool).shape == (0, 48)
    last = step_inputs([tokens[17:]], [17], [[4, 2]], 16, logit_rows=np.array([2, 0], np.int32))
    hidden = forward(model.ops, model.params, model.spec, last, model.pool)
    np.testing.assert_array_equal(hidden, expected[[19, 17]])


def test_padding_is_ignored() -> None:
    """A sequence without tokens, and tokens of no sequence with slot -1, change nothing."""
    model = Runnable(CpuOps(), MODELS["llama"])
    tokens = some_tokens(9)
    plain = step_inputs([tokens], [0], [[3]], 16)
    expected = np.array(forward(model.ops, model.params, model.spec, plain, model.pool))
    padded = replace(
        plain,
        token_ids=np.append(plain.token_ids, [0, 0]).astype(np.int32),
        positions=np.append(plain.positions, [0, 0]).astype(np.int32),
        slot_mapping=np.append(plain.slot_mapping, [-1, -1]).astype(np.int32),
        seq_starts=np.array([0, 9, 9], np.int32),
        context_lens=np.array([9, 0], np.int32),
        block_tables=np.array([[3], [-1]], np.int32),
    )
    np.testing.assert_array_equal(forward(model.ops, model.params, model.spec, padded, model.pool), expected)
