"""Small models with random weights and hand-made steps, for tests, benchmarks and the demonstration on a toy task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch, StepInputs, neutral_sampling

from .config import ModelConfig
from .layout import expected_tensors


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json content of two layers; `changes` replace fields (None removes one)."""
    content: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    content.update(changes)
    return {name: value for name, value in content.items() if value is not None}


def tiny_moe_config(architecture: str = "Qwen3MoeForCausalLM", **changes: Any) -> dict[str, Any]:
    """As `tiny_config`, three layers of which the first is dense, 8 experts and 3 of them per token."""
    ernie = architecture.startswith("Ernie")
    moe: dict[str, Any] = (
        {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}
        if ernie
        else {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [0]}
    )
    return tiny_config(architecture, **({"num_hidden_layers": 3, "moe_intermediate_size": 40} | moe | changes))


def random_tensors(config: ModelConfig, seed: int = 0, *, gain: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the layout from a seeded normal distribution; the same seed gives the same bits.

    Matrices have standard deviation gain / sqrt(inputs), which keeps activations near unit size; norm weights scatter
    around 1 and biases around 0, so that a forward that forgets one of them is wrong.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = random.standard_normal(shape, np.float32)
        if name.endswith(".bias"):
            values *= np.float32(0.2)
        elif name.endswith("correction_bias"):
            values *= np.float32(0.05)
        elif len(shape) == 1:
            values = np.float32(1.0) + np.float32(0.1) * values
        else:
            values *= np.float32(gain / np.sqrt(shape[-1]))
        tensors[name] = np.ascontiguousarray(values, np.float32)
    return tensors


def step_inputs(
    tokens: Sequence[NDArray[np.int32]],
    starts: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    *,
    logit_rows: NDArray[np.int32] | None = None,
    sampling: SamplingBatch | None = None,
    step: int = 0,
    policy: str = "policy",
) -> StepInputs:
    """One step in which sequence s computes `tokens[s]` at positions starts[s] on, its keys in the blocks of its table.

    Every row's distribution is wanted unless `logit_rows` says otherwise; `sampling` defaults to plain draws.
    """
    lengths = [len(some) for some in tokens]
    positions = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    tables = np.full((len(tokens), max((len(table) for table in block_tables), default=0)), -1, np.int32)
    for row, table in zip(tables, block_tables, strict=True):
        row[: len(table)] = table
    slots = [
        table[at // block_size] * block_size + at % block_size for table, at in zip(tables, positions, strict=True)
    ]
    rows = np.arange(sum(lengths), dtype=np.int32) if logit_rows is None else logit_rows
    return StepInputs(
        token_ids=_flat(tokens),
        positions=_flat(positions),
        slot_mapping=_flat(slots),
        seq_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        context_lens=np.array([start + length for start, length in zip(starts, lengths, strict=True)], np.int32),
        block_tables=tables,
        logit_rows=rows,
        sampling=neutral_sampling(len(rows)) if sampling is None else sampling,
        step=step,
        policy=policy,
    )


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
