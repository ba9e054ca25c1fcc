"""A Llama forward in plain NumPy, sharing no line with the engine: the yardstick of the tests on real weights.

One sequence, whole-length attention, any float dtype; made to be read, not to be fast.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class IndependentLlama:
    """Logits [T, V] of a token sequence in the given dtype (float64: the yardstick; float32: an ordinary forward)."""

    def __init__(self, folder, dtype=np.float64):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.weights = {name: w.astype(dtype) for name, w in load_file(Path(folder) / "model.safetensors").items()}
        self.dtype = dtype

    def norm(self, x, name):
        eps = self.dtype(self.config["rms_norm_eps"])
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * self.weights[f"{name}.weight"]

    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(self, x, prefix, cos, sin):
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        length, size = len(x), self.config["hidden_size"] // heads
        q, k, v = (x @ self.weights[f"{prefix}.{part}_proj.weight"].T for part in "qkv")
        q = self.rotate(q.reshape(length, heads, size), cos, sin)
        k = self.rotate(k.reshape(length, kv_heads, size), cos, sin)
        v = v.reshape(length, kv_heads, size)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * self.dtype(size**-0.5)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(length, heads * size)
        return mixed @ self.weights[f"{prefix}.o_proj.weight"].T

    def logits(self, token_ids):
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        frequency = self.config["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        angle = np.arange(len(token_ids), dtype=np.float64)[:, None, None] * frequency
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        h = self.weights["model.embed_tokens.weight"][np.asarray(token_ids)]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            h = h + self.attention(self.norm(h, f"{layer}.input_layernorm"), f"{layer}.self_attn", cos, sin)
            x = self.norm(h, f"{layer}.post_attention_layernorm")
            gate = x @ self.weights[f"{layer}.mlp.gate_proj.weight"].T
            up = x @ self.weights[f"{layer}.mlp.up_proj.weight"].T
            h = h + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{layer}.mlp.down_proj.weight"].T
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm(h, "model.norm") @ head.T
