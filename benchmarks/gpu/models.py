"""Folders of random models at the sizes of real ones, written fast: matrices N(0, 0.02), embeddings N(0, 0.05)."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.models.loader import SINGLE_FILE

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "A": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, "rope_theta": 1e6,
    },
    "B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 5e5,
    },
    "C": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48,
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "max_position_embeddings": 40960, "rope_theta": 1e6,
    },
}  # fmt: skip
"""A: Qwen3-0.6B, B: Llama-3.1-8B, C: Qwen3-30B-A3B."""

_PATTERN = 1 << 22
"""Values drawn per tensor at most; a larger one repeats them, at no multiple of its rows."""


def write_model(name: str, folder: Path, seed: int = 0) -> Path:
    """The folder of model `name`, weights in bfloat16; not written again where it is there."""
    content = _COMMON | MODELS[name]
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = expected_tensors(ModelConfig.from_json(content))
    header: dict[str, Any] = {}
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    stored = np.memmap(folder / SINGLE_FILE, np.uint16, "r+", offset=8 + len(head))

    def fill(number: int, tensor: str) -> None:
        start, stop = (offset // 2 for offset in header[tensor]["data_offsets"])
        stored[start:stop] = np.resize(_patterns(tensor, shapes[tensor], seed + number), stop - start)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(shapes)), shapes))
    stored.flush()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def _patterns(tensor: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)  # norms of 1
    scale = 0.05 if "embed" in tensor or "lm_head" in tensor else 0.02
    count = min(math.prod(shape), _PATTERN - 12345)
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(scale)
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
