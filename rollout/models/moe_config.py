"""The mixture of experts of a model, read from config.json in the words of each family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .config_fields import ConfigFields


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Which layers are mixtures of experts, and what these are made of."""

    layers: tuple[int, ...]
    """Indices of the mixture layers, ascending; the others are dense."""
    num_experts: int
    top_k: int
    """Experts per token."""
    intermediate_size: int
    """Inner size of one expert."""
    shared_intermediate_size: int = 0
    """Inner size of the shared experts taken together; 0: there are none."""
    correction_bias: bool = False
    """The router's choice is corrected by a bias, its weights are not."""
    normalise: bool
    """Weights of the chosen experts are divided by max(their sum, norm_min)."""
    norm_min: float = 0.0


def read_qwen3_moe(fields: ConfigFields, num_layers: int) -> MoeConfig:
    """Qwen3-MoE: `mlp_only_layers` are dense, of the others every `decoder_sparse_step`-th is a mixture."""
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in dense):
        raise fields.error(f"mlp_only_layers must be a list of layers in [0, {num_layers}), got {dense!r}")
    step = fields.integer("decoder_sparse_step", minimum=1, default=1)
    # transformers 5 knows the field by both names.
    names = ("num_experts", "num_local_experts")
    values = {fields.integer(name, minimum=1) for name in names if fields.get(name, None) is not None}
    if len(values) != 1:
        raise fields.error(f"num_experts (or num_local_experts) must be one number, got {sorted(values)}")
    (num_experts,) = values
    return MoeConfig(
        layers=tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
        num_experts=num_experts,
        top_k=_top_k(fields, "num_experts_per_tok", num_experts),
        intermediate_size=fields.integer("moe_intermediate_size", minimum=1),
        normalise=fields.boolean("norm_topk_prob", default=False),
    )


def read_ernie4_5_moe(fields: ConfigFields, num_layers: int) -> MoeConfig:
    """ERNIE 4.5: every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""
    start = fields.integer("moe_layer_start_index", minimum=0, default=1)
    end = fields.integer("moe_layer_end_index", minimum=-1, default=-1)
    interval = fields.integer("moe_layer_interval", minimum=1, default=1)
    last = num_layers - 1 if end == -1 else min(end, num_layers - 1)
    num_experts = fields.integer("moe_num_experts", minimum=1)
    inner = fields.integer("moe_intermediate_size", minimum=1)
    return MoeConfig(
        layers=tuple(layer for layer in range(start, last + 1) if (layer + 1) % interval == 0),
        num_experts=num_experts,
        top_k=_top_k(fields, "moe_k", num_experts),
        intermediate_size=inner,
        shared_intermediate_size=inner * fields.integer("moe_num_shared_experts", minimum=0, default=2),
        correction_bias=True,
        normalise=True,
        norm_min=fields.number("moe_norm_min", above=0.0, default=1e-12),
    )


def _top_k(fields: ConfigFields, name: str, num_experts: int) -> int:
    top_k = fields.integer(name, minimum=1)
    if top_k > num_experts:
        raise fields.error(f"{name} must be at most the number of experts {num_experts}, got {top_k}")
    return top_k


MoeReader = Callable[[ConfigFields, int], MoeConfig]
"""(fields, number of layers) -> the mixture of a family."""
