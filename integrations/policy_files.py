"""What `PolicyModel` starts from and leaves behind: initial weights, and a config.json made from a ModelConfig."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.models.config import ModelConfig, RopeConfig
from zerokl.rollout.models.layout import CORRECTION, expected_tensors
from zerokl.rollout.models.moe_config import MoeConfig

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
}
_STD = 0.02  # initializer_range of all supported families


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Matrices from N(0, 0.02^2), norm weights 1, biases and corrections 0. The same seed gives the same bits."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith((".bias", CORRECTION)):
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
    if config.moe is not None:
        content |= _MOE_FIELDS[config.architecture](config.moe, config.num_hidden_layers)
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


def _qwen3_moe(moe: MoeConfig, num_layers: int) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in moe.layers],
    }


def _ernie4_5_moe(moe: MoeConfig, num_layers: int) -> dict[str, Any]:
    # The family's mixtures lie at equal distances; without any, the first would come after the last layer.
    first, last = (moe.layers[0], moe.layers[-1]) if moe.layers else (num_layers, num_layers)
    interval = moe.layers[1] - first if len(moe.layers) > 1 else first + 1
    return {
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_num_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": interval,
        "moe_norm_min": moe.norm_min,
    }


_MOE_FIELDS = {"Qwen3MoeForCausalLM": _qwen3_moe, "Ernie4_5_MoeForCausalLM": _ernie4_5_moe}
