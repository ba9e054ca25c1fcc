"""The decoder, written once over the op table: engine, trainer and every device run this forward.

Nothing is computed here outside an op (`zerokl.kernels.ops.Ops`), so a forward has the numerics of the ops object that
it is given and nothing else, and a device may record a step as one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from zerokl.kernels.experts import RouterSpec
from zerokl.kernels.ops import AttentionSpec, DecoderParams, KVPool, LayerParams, Ops, StepInputs

from .config import ModelConfig
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


def forward(
    ops: Ops[Array], params: DecoderParams[Array], spec: DecoderSpec, inputs: StepInputs, pool: KVPool[Array]
) -> Array:
    """Run one step: write the keys and values of its T tokens, return the normed hidden rows [R, E] of `logit_rows`.

    What follows is `ops.sample(hidden, params.lm_head, inputs.sampling)` in the engine, a loss in the trainer. With no
    logit rows the result has no rows either and the head is not worth a call.
    """
    ops.begin_step(inputs, pool)
    return forward_begun(ops, params, spec, inputs)


def forward_begun(ops: Ops[Array], params: DecoderParams[Array], spec: DecoderSpec, inputs: StepInputs) -> Array:
    """`forward` of a step that has begun: nothing here depends on the values of `inputs`, so it may be recorded."""
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
