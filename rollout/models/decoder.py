"""The decoder, written once over the op table: engine, trainer and every device run this forward.

Nothing is computed here outside an op (`zerokl.kernels.ops.Ops`), so a forward has the numerics of the ops object that
it is given and nothing else, and a device may record a step as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from zerokl.kernels.experts import MoeParams, RouterSpec
from zerokl.kernels.ops import AttentionSpec, DecoderParams, KVPool, LayerParams, Ops, StepInputs

from .config import ModelConfig
from .layout import CORRECTION, EMBED, FINAL_NORM, LM_HEAD, ROUTER, SHARED_EXPERTS, expert_prefix, layer_prefix
from .moe_config import MoeConfig

Array = TypeVar("Array")

MlpBlock = Callable[[Ops[Any], Any, LayerParams[Any]], Any]
"""(ops, normed input [T, E], layer) -> [T, E]: the part between a layer's second norm and its residual sum."""


def dense_mlp(ops: Ops[Array], x: Array, layer: LayerParams[Array]) -> Array:
    """SwiGLU block (arXiv:2002.05202): down(silu(gate x) * up x)."""
    return ops.linear(ops.swiglu_linear(x, layer.gate_up), layer.down)


def no_shared_experts(_ops: Ops[Array], _x: Array, _layer: LayerParams[Array]) -> None:
    """What stands in for shared experts where there are none."""


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """A mixture of experts (arXiv:1701.06538) beside the shared experts, which every token passes."""

    router: RouterSpec
    shared: MlpBlock

    def __call__(self, ops: Ops[Array], x: Array, layer: LayerParams[Array]) -> Array:
        """An `MlpBlock`."""
        assert layer.moe is not None, "a mixture without experts"
        routing = ops.route(x, layer.moe, self.router)
        return ops.moe(x, routing, layer.moe.experts, self.shared(ops, x, layer))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """What `forward` needs to know of a model beside its weights."""

    attention: AttentionSpec
    norm_eps: float
    mlps: tuple[MlpBlock, ...]
    """One per layer."""

    @classmethod
    def from_config(cls, config: ModelConfig) -> DecoderSpec:
        """The spec of a configured model."""
        return cls(attention=attention_spec(config), norm_eps=config.rms_norm_eps, mlps=mlp_blocks(config))


def mlp_blocks(config: ModelConfig) -> tuple[MlpBlock, ...]:
    """The block of each layer: dense, or a mixture of experts."""
    blocks: list[MlpBlock] = [dense_mlp] * config.num_hidden_layers
    if config.moe is not None:
        shared = dense_mlp if config.moe.shared_intermediate_size else no_shared_experts
        for index, layer in enumerate(config.moe.layers):
            blocks[layer] = MoeMlp(router_spec(config.moe, index), shared)
    return tuple(blocks)


def router_spec(moe: MoeConfig, index: int) -> RouterSpec:
    """Constants of the model's mixture number `index`."""
    return RouterSpec(top_k=moe.top_k, normalise=moe.normalise, norm_min=moe.norm_min, index=index)


def attention_spec(config: ModelConfig) -> AttentionSpec:
    """Attention constants of a model; scale is head_dim ** -0.5 in every supported family."""
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        rotary_layout=config.rotary_layout,
        norm_eps=config.rms_norm_eps,
    )


def build_params(
    ops: Ops[Array],
    config: ModelConfig,
    tensors: Mapping[str, Array],
    rope: Array,
    *,
    keep: Callable[[Array], Array] = lambda array: array,
) -> DecoderParams[Array]:
    """Pack tensors under their Hugging Face names (checked before, by `loader.check_tensors`) for `ops`.

    `rope` is `rope.rope_table` in the device's form. `keep` makes what is stored unpacked (norm weights, embedding) the
    caller's own; packing copies. Each tensor is looked up once, in forward order, and dropped when packed (the
    embedding twice where tied), so `tensors` may read from disk.
    """
    embed = keep(tensors[EMBED])
    layers = tuple(_build_layer(ops, config, tensors, index, keep) for index in range(config.num_hidden_layers))
    head = embed if config.tie_word_embeddings else tensors[LM_HEAD]
    return DecoderParams(
        embed=embed,
        layers=layers,
        final_norm=keep(tensors[FINAL_NORM]),
        lm_head=ops.pack_linear([head], [None]),
        rope=rope,
    )


def _build_layer(
    ops: Ops[Array],
    config: ModelConfig,
    tensors: Mapping[str, Array],
    index: int,
    keep: Callable[[Array], Array],
) -> LayerParams[Array]:
    prefix = layer_prefix(index)
    attention = prefix + "self_attn."
    projections = ("q_proj", "k_proj", "v_proj")
    return LayerParams(
        input_norm=keep(tensors[prefix + "input_layernorm.weight"]),
        qkv=ops.pack_linear(
            [tensors[f"{attention}{name}.weight"] for name in projections],
            [tensors[f"{attention}{name}.bias"] if config.qkv_bias else None for name in projections],
        ),
        q_norm=keep(tensors[attention + "q_norm.weight"]) if config.qk_norm else None,
        k_norm=keep(tensors[attention + "k_norm.weight"]) if config.qk_norm else None,
        o=ops.pack_linear(
            [tensors[attention + "o_proj.weight"]],
            [tensors[attention + "o_proj.bias"] if config.o_bias else None],
        ),
        post_norm=keep(tensors[prefix + "post_attention_layernorm.weight"]),
        **_build_mlp(ops, config, tensors, index, keep),
    )


def _build_mlp(
    ops: Ops[Array],
    config: ModelConfig,
    tensors: Mapping[str, Array],
    index: int,
    keep: Callable[[Array], Array],
) -> dict[str, Any]:
    """The last fields of `LayerParams`."""
    prefix, moe = layer_prefix(index), config.moe
    if moe is None or index not in moe.layers:
        return _build_block(ops, tensors, prefix + "mlp.")
    router = ops.pack_linear([tensors[prefix + ROUTER]], [None])
    correction = keep(tensors[prefix + CORRECTION]) if moe.correction_bias else None
    block: dict[str, Any] = {"gate_up": None, "down": None}
    if moe.shared_intermediate_size:
        block = _build_block(ops, tensors, prefix + SHARED_EXPERTS)
    names = (prefix + expert_prefix(expert) for expert in range(moe.num_experts))
    parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    experts = ((tensors[name + parts[0]], tensors[name + parts[1]], tensors[name + parts[2]]) for name in names)
    return block | {"moe": MoeParams(router, correction, ops.pack_experts(moe.num_experts, experts))}


def _build_block(ops: Ops[Array], tensors: Mapping[str, Array], prefix: str) -> dict[str, Any]:
    gate, up = tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"]
    return {
        "gate_up": ops.pack_gate_up(gate, up),
        "down": ops.pack_linear([tensors[prefix + "down_proj.weight"]], [None]),
    }


def forward(
    ops: Ops[Array], params: DecoderParams[Array], spec: DecoderSpec, inputs: StepInputs, pool: KVPool[Array]
) -> Array:
    """Run one step: write the keys and values of its T tokens, return the normed hidden rows [R, E] of `logit_rows`.

    What follows is `ops.sample(hidden, params.lm_head, inputs.sampling)` in the engine, a loss in the trainer. With no
    logit rows the result has no rows either and the head is not worth a call.
    """
    ops.begin_step(inputs, pool)
    residual = ops.embedding(inputs.token_ids, params.embed)
    x = ops.rms_norm(residual, params.layers[0].input_norm, spec.norm_eps)
    # The sum that closes a layer is fused with the norm that opens the next one.
    next_norms = [layer.input_norm for layer in params.layers[1:]]
    next_norms.append(params.final_norm)
    for index, (layer, mlp, next_norm) in enumerate(zip(params.layers, spec.mlps, next_norms, strict=True)):
        attended = ops.attention(ops.qkv_linear(x, layer.qkv), index, layer, params.rope, spec.attention)
        delta = ops.linear(attended, layer.o)
        residual, x = ops.add_rms_norm(residual, delta, layer.post_norm, spec.norm_eps)
        delta = mlp(ops, x, layer)
        residual, x = ops.add_rms_norm(residual, delta, next_norm, spec.norm_eps)
    return ops.gather_rows(x, inputs.logit_rows)
