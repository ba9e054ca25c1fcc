"""What an engine takes from a model's folder beside the weights: sizes for its options, and the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zerokl.kernels.dispatch import gpu_memories, gpu_memory, resolve_dtype
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.gpu_memory import DTYPE_BYTES, kv_cache_bytes
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.text import Tokenizer


def resolve_config(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """`config` with the fields filled in that follow from the model. Raises ValueError where the two do not fit."""
    if config.return_routing != "none" and model.moe is None:
        raise ValueError(
            f"return_routing must be 'none' for {model.architecture}, which has no mixture of experts, "
            f"got {config.return_routing!r}"
        )
    dtype = resolve_dtype(config.device, config.dtype)
    if config.device == "gpu" and config.num_blocks is None and config.kv_cache_bytes is None:
        numbers = [config.gpu_of(rank) for rank in range(config.num_ranks)]
        memories = gpu_memories(numbers) if config.has_processes else [gpu_memory(numbers[0])]
        room = min(kv_cache_bytes(config, model, dtype, free, total) for free, total in memories)
        config = dataclasses.replace(config, kv_cache_bytes=room)
    keys_and_values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return dataclasses.replace(config, dtype=dtype).resolve(
        max_position_embeddings=model.max_position_embeddings,
        kv_bytes_per_token=keys_and_values * DTYPE_BYTES[dtype],
        num_experts=None if model.moe is None else model.moe.num_experts,
    )


def find_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer that the options name, else the model folder's, else None: the engine then takes token ids only."""
    if config.tokenizer is not None:
        return Tokenizer(config.tokenizer)
    beside = Path(config.model) / "tokenizer.json"
    return Tokenizer(beside) if beside.is_file() else None
