"""The decoder over CpuOps: right against an independent float64 model, and bit-equal however a sequence is cut up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zerokl.kernels.cpu.ops import CpuOps
from zerokl.kernels.ops import KVPool, StepInputs
from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, build_params, forward
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config

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
}


# -- an independent model: dense, one sequence, float64, straight from the families' papers and published code -----------
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
            length, low, high = (
                rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
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

    def hidden(self, token_ids: NDArray[np.int32]) -> Doubles:
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for layer in range(self.content["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(prefix + "self_attn", self.norm(prefix + "input_layernorm", x))
            y = self.norm(prefix + "post_attention_layernorm", x)
            gate = self.linear(prefix + "mlp.gate_proj", y)
            inner = gate / (1 + np.exp(-gate)) * self.linear(prefix + "mlp.up_proj", y)
            x = x + self.linear(prefix + "mlp.down_proj", inner)
        return self.norm("model.norm", x)

    def logprobs(self, token_ids: NDArray[np.int32]) -> Doubles:
        tied = self.content["tie_word_embeddings"]
        head = self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
        logits = self.hidden(token_ids) @ head.T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# -- the model under test ------------------------------------------------------------------------------------------------
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
        layers, heads, size = self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_dim
        # Not zeros: what nobody wrote must not be read.
        keys = np.full((layers, num_blocks, heads, size, block_size), np.nan, np.float32)
        values = np.full((layers, num_blocks, heads, block_size, size), np.nan, np.float32)
        self.pool = KVPool(keys, values, block_size)

    def run(self, inputs: StepInputs) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Hidden rows and the logprobs of the forced tokens."""
        hidden = forward(self.ops, self.params, self.spec, inputs, self.pool)
        result = self.ops.sample(hidden, self.params.lm_head, inputs.sampling)
        return np.array(hidden), result.policy_logprobs

    def whole(self, tokens: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return self.run(step_inputs([tokens], [0], [range(-(-len(tokens) // self.block_size))], self.block_size))


def some_tokens(length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)
