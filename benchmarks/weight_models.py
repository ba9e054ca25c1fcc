"""Models of plausible shapes whose weights are made up: what a benchmark of weights moves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.models.synthetic import tiny_config

Tensors = dict[str, NDArray[np.float32]]


def _qwen3(hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    return tiny_config(
        "Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


MODELS: dict[str, dict[str, Any]] = {
    "tiny": tiny_config("LlamaForCausalLM", max_position_embeddings=1024),
    "135m": tiny_config(
        "LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    "0.6b": _qwen3(1024, 3072),
    "1.7b": _qwen3(2048, 6144),
}


def made_up_weights(config: ModelConfig) -> Tensors:
    """Tensors that share the memory of the largest one, each from another place on: small, and yet in no cache."""
    shapes = expected_tensors(config)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    block = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)).astype(np.float32)
    shared = np.resize(block, max(sizes.values()))
    tensors, place = {}, 0
    for name, shape in shapes.items():
        place = 0 if place + sizes[name] > len(shared) else place
        tensors[name] = shared[place : place + sizes[name]].reshape(shape)
        place += -(-sizes[name] // 16) * 16
    return tensors


def some_changed(tensors: Tensors, share: float) -> Tensors:
    """Tensors of layers, of at most about this share of all bytes."""
    wanted, chosen = share * sum(array.nbytes for array in tensors.values()), Tensors()
    for name, array in tensors.items():
        if ".down_proj." in name and sum(one.nbytes for one in chosen.values()) + array.nbytes <= wanted:
            chosen[name] = array
    return chosen or {"model.norm.weight": tensors["model.norm.weight"]}
