"""What `PolicyModel` starts from and leaves behind: initial weights, and a config.json made from a ModelConfig."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.models.config import ModelConfig, RopeConfig
from zerokl.rollout.models.layout import expected_tensors

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Ernie4_5ForCausalLM": "ernie4_5",
}
_STD = 0.02  # initializer_range of all supported families


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Matrices from N(0, 0.02^2), norm weights 1, biases 0. The same seed gives the same bits."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith(".bias"):
            tensors[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = random.standard_normal(shape, np.float32) * np.float32(_STD)
    return tensors


def config_content(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that reads back as `config`, with float32 as its dtype."""
    content: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_bias" if config.architecture.startswith("Ernie") else "attention_bias": config.o_bias,
        "rope_theta": config.rope.theta,
        "dtype": "float32",
    }
    if config.rope.kind != "default":
        content["rope_scaling"] = _rope_scaling(config.rope)
    if config.eos_token_ids:
        content["eos_token_id"] = list(config.eos_token_ids)
    return content


def _rope_scaling(rope: RopeConfig) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return scaling
