"""Names and shapes of a model's tensors, under their Hugging Face names.

The one list that the loader, weight sync, the engine's packing and the trainer's `PolicyModel` share.
"""

from __future__ import annotations

import math

from .config import ModelConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Start of the names of a layer's tensors, the dot included."""
    return f"model.layers.{layer}."


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, name -> shape, in forward order. `lm_head.weight` is left out where tied.

    Matrices are [outputs, inputs]: y = x W^T.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, config.hidden_size)}
    layer_shapes = _layer_tensors(config)
    for layer in range(config.num_hidden_layers):
        shapes.update({layer_prefix(layer) + name: shape for name, shape in layer_shapes.items()})
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Scalars in all tensors of `expected_tensors`."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        shapes[f"self_attn.{name}.weight"] = (rows, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, q_size)
    if config.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = (inner, hidden)
    shapes["mlp.up_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    return shapes
