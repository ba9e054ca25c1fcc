"""How a GPU's memory is shared out: sets of weights, what a step needs, and KV blocks from what is left."""

from __future__ import annotations

import math

from zerokl.kernels.gpu.attention_tiles import ENOUGH_PROGRAMS, MOST_STATES, SPLIT
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

OTHER_BYTES = 5 << 28
"""For CUDA's context, compiled kernels (0.6 GiB on an H100) and recorded graphs, and some to spare."""

ROWS_OF_LOGITS = 512
"""Rows whose logits are in memory at once."""


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of one set of weights on a GPU: matrices in `dtype`, everything else in float32."""
    shapes = expected_tensors(model).values()
    return sum(math.prod(shape) * (DTYPE_BYTES[dtype] if len(shape) == 2 else 4) for shape in shapes)


def step_bytes(model: ModelConfig, dtype: str, config: EngineConfig) -> int:
    """Bytes that the largest step needs on its way, from above."""
    size, tokens = DTYPE_BYTES[dtype], config.max_num_batched_tokens
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    per_token = (
        4 * model.hidden_size
        + 4 * heads * (model.head_dim + 2)
        + size * (6 * model.hidden_size + (3 * heads + 2 * kv_heads) * model.head_dim + 2 * model.intermediate_size)
    )
    if model.moe is not None:
        moe = model.moe
        inner = moe.intermediate_size * moe.top_k + (moe.shared_intermediate_size or 0)
        per_token += 4 * moe.num_experts + size * inner + 4 * moe.top_k * (model.hidden_size + 8)
        if config.return_routing != "none":
            per_token += 8 * moe.top_k * len(moe.layers)
    logits = 2 * 4 * model.vocab_size * min(ROWS_OF_LOGITS, max(tokens, 16))
    length = config.max_model_len or model.max_position_embeddings
    # Block tables have up to four times the width that is needed.
    num_states = min(MOST_STATES, max(16, ENOUGH_PROGRAMS // kv_heads) * -(-4 * length // SPLIT))
    # Steps of other sizes have half, a quarter, ... as many beside them.
    split_states = 2 * 4 * num_states * heads * (model.head_dim + 2)
    return (tokens + 512) * per_token + logits + split_states


def kv_cache_bytes(config: EngineConfig, model: ModelConfig, dtype: str, free: int, total: int) -> int:
    """Bytes for the KV pool of a GPU with `free` of `total` bytes to be had.

    Raises ValueError where `weight_slots` sets of weights and a step leave none.
    """
    usable = int(total * config.gpu_memory_fraction) - (total - free) - OTHER_BYTES
    weights, step = config.weight_slots * weight_bytes(model, dtype), step_bytes(model, dtype, config)
    if usable <= weights + step:
        raise ValueError(
            f"gpu_memory_fraction {config.gpu_memory_fraction} of {total} bytes, {total - free} of them in use, must "
            f"hold weight_slots = {config.weight_slots} sets of weights ({weights} bytes) and a step ({step} bytes)"
        )
    return usable - weights - step
