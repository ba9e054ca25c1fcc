"""Names and shapes of a model's tensors, under their Hugging Face names.

The one list that the loader, weight sync, the engine's packing and the trainer's `PolicyModel` share.
"""

from __future__ import annotations

import math

from .config import ModelConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# Behind `layer_prefix`, in layers that are mixtures of experts.
ROUTER = "mlp.gate.weight"
CORRECTION = "mlp.moe_statics.e_score_correction_bias"
SHARED_EXPERTS = "mlp.shared_experts."
BLOCK = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""A SwiGLU block's tensors behind its prefix."""


def layer_prefix(layer: int) -> str:
    """Start of the names of a layer's tensors, the dot included."""
    return f"model.layers.{layer}."


def expert_prefix(expert: int) -> str:
    """Start of the names of an expert's tensors behind `layer_prefix`, the dot included."""
    return f"mlp.experts.{expert}."


def expert_tensors(prefix: str, expert: int) -> tuple[str, str, str]:
    """Names of an expert's gate, up and down matrix in the layer of `prefix`."""
    gate, up, down = (prefix + expert_prefix(expert) + name for name in BLOCK)
    return gate, up, down


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, name -> shape, in forward order. `lm_head.weight` is left out where tied.

    Matrices are [outputs, inputs]: y = x W^T.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, config.hidden_size)}
    mixtures = () if config.moe is None else config.moe.layers
    dense, mixed = _block_tensors(config, config.intermediate_size), _moe_tensors(config)
    for layer in range(config.num_hidden_layers):
        blocks = (_attention_tensors(config), mixed if layer in mixtures else dense)
        shapes.update({layer_prefix(layer) + name: shape for block in blocks for name, shape in block.items()})
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Scalars in all tensors of `expected_tensors`."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def _attention_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """With the norms around it, up to the one before the MLP."""
    hidden = config.hidden_size
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
    return shapes


def _block_tensors(config: ModelConfig, inner: int, prefix: str = "mlp.") -> dict[str, tuple[int, ...]]:
    """A SwiGLU block."""
    return {
        f"{prefix}gate_proj.weight": (inner, config.hidden_size),
        f"{prefix}up_proj.weight": (inner, config.hidden_size),
        f"{prefix}down_proj.weight": (config.hidden_size, inner),
    }


def _moe_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    moe = config.moe
    if moe is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {ROUTER: (moe.num_experts, config.hidden_size)}
    if moe.correction_bias:
        shapes[CORRECTION] = (1, moe.num_experts)
    if moe.shared_intermediate_size:
        shapes |= _block_tensors(config, moe.shared_intermediate_size, SHARED_EXPERTS)
    for expert in range(moe.num_experts):
        shapes |= _block_tensors(config, moe.intermediate_size, expert_prefix(expert))
    return shapes
