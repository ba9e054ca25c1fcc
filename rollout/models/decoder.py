"""The decoder, written once over the op table: engine, trainer and every device run this forward.

Nothing is computed here outside an op (`zerokl.kernels.ops.Ops`), so a forward has the numerics of the ops object that
it is given and nothing else, and a device may record a step as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from zerokl.kernels.experts import MoeParams, RouterSpec
from zerokl.kernels.ops import AttentionSpec, DecoderParams, KVPool, LayerParams, Ops, StepInputs

from .config import ModelConfig
from .layout import (
    BLOCK,
    CORRECTION,
    EMBED,
    FINAL_NORM,
    LM_HEAD,
    ROUTER,
    SHARED_EXPERTS,
    expected_tensors,
    expert_tensors,
    layer_prefix,
)
from .moe_config import MoeConfig

Array = TypeVar("Array")
Operand = TypeVar("Operand", contravariant=True)

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


class Packs(Protocol[Operand]):
    """The part of an op table that `build_params` needs."""

    def pack_linear(self, weights: Sequence[Operand], biases: Sequence[Operand | None]) -> Any:
        """See `Ops.pack_linear`."""
        ...

    def pack_gate_up(self, gate: Operand, up: Operand) -> Any:
        """See `Ops.pack_gate_up`."""
        ...

    def pack_experts(self, count: int, experts: Iterable[tuple[Operand, Operand, Operand]]) -> Any:
        """See `Ops.pack_experts`."""
        ...


class ExpertShare(Protocol):
    """Which experts of a mixture are packed here, and in what form `Ops.moe` wants them."""

    def held(self, mixture: int, num_experts: int) -> Sequence[int]:
        """Experts of the mixture by slot."""
        ...

    def weights(self, mixture: int, packed: Any) -> Any:
        """The operand of `Ops.moe`, from what `pack_experts` made of those held, each of them once."""
        ...

    def packed(self, weights: Any) -> Any:
        """The way back: what `pack_experts` made."""
        ...


class AllExperts:
    """The share of a rank that has the whole model."""

    def held(self, mixture: int, num_experts: int) -> Sequence[int]:
        """See `ExpertShare.held`."""
        return range(num_experts)

    def weights(self, mixture: int, packed: Any) -> Any:
        """See `ExpertShare.weights`."""
        return packed

    def packed(self, weights: Any) -> Any:
        """See `ExpertShare.packed`."""
        return weights


def held_tensors(config: ModelConfig, share: ExpertShare) -> dict[str, tuple[int, ...]]:
    """`expected_tensors` without those of experts that are not held."""
    shapes = expected_tensors(config)
    if config.moe is not None:
        for mixture, layer in enumerate(config.moe.layers):
            for expert in set(range(config.moe.num_experts)).difference(share.held(mixture, config.moe.num_experts)):
                for name in expert_tensors(layer_prefix(layer), expert):
                    del shapes[name]
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """Parameters whose parts are used again where none of their tensors has changed."""

    params: DecoderParams[Any]
    changed: Set[str]

    def part(self, owner: Any, field: str, names: Sequence[str]) -> Any:
        """The owner's field, or None where one of the tensors in it has changed."""
        return getattr(owner, field) if self.changed.isdisjoint(names) else None


def build_params(
    ops: Packs[Array],
    config: ModelConfig,
    tensors: Mapping[str, Array],
    rope: Array,
    *,
    keep: Callable[[Array], Array] = lambda array: array,
    previous: Previous | None = None,
    share: ExpertShare | None = None,
    embeds_from_head: bool = False,
) -> DecoderParams[Array]:
    """Pack tensors under their Hugging Face names (checked before, by `loader.check_tensors`) for `ops`.

    `rope` is `rope.rope_table` in the device's form. `keep` makes what is stored unpacked (norm weights, embedding) the
    caller's own; packing copies. Each tensor is looked up once, in forward order, and dropped when packed, so `tensors`
    may read from disk. Of `previous` the parts are taken over, and their tensors not looked up, that have not changed.
    With `embeds_from_head` a tied table is packed once, for both ends.
    """
    build = _PartBuilder(ops, tensors, keep, previous, AllExperts() if share is None else share)
    root = None if previous is None else previous.params
    embed, head = build.ends(root, tied=config.tie_word_embeddings, shared=embeds_from_head)
    layers = tuple(
        _build_layer(build, config, index, None if root is None else root.layers[index])
        for index in range(config.num_hidden_layers)
    )
    return DecoderParams(
        embed=embed,
        layers=layers,
        final_norm=build.kept(root, "final_norm", FINAL_NORM),
        lm_head=build.linear(root, "lm_head", [LM_HEAD], [None]) if head is None else head,
        rope=rope,
    )


class _PartBuilder:
    """Makes the parts of `DecoderParams`, or takes those of the previous ones."""

    def __init__(
        self,
        ops: Packs[Any],
        tensors: Mapping[str, Any],
        keep: Callable[[Any], Any],
        previous: Previous | None,
        share: ExpertShare,
    ) -> None:
        self._ops, self._tensors, self._keep, self._previous = ops, tensors, keep, previous
        self._share = share

    def kept(self, owner: Any, field: str, name: str) -> Any:
        old = self._old(owner, field, [name])
        return self._keep(self._tensors[name]) if old is None else old

    def linear(self, owner: Any, field: str, weights: Sequence[str], biases: Sequence[str | None]) -> Any:
        old = self._old(owner, field, [*weights, *(name for name in biases if name is not None)])
        if old is not None:
            return old
        return self._ops.pack_linear(
            [self._tensors[name] for name in weights],
            [None if name is None else self._tensors[name] for name in biases],
        )

    def ends(self, owner: Any, *, tied: bool, shared: bool) -> tuple[Any, Any]:
        """The embedding and, where tied, the head, from one read of the table."""
        if tied and shared:
            head = self.linear(owner, "lm_head", [EMBED], [None])
            return head, head
        embed = self.kept(owner, "embed", EMBED)
        if not tied:
            return embed, None
        old = self._old(owner, "lm_head", [EMBED])
        return embed, self._ops.pack_linear([embed], [None]) if old is None else old

    def gate_up(self, owner: Any, field: str, gate: str, up: str) -> Any:
        old = self._old(owner, field, [gate, up])
        return self._ops.pack_gate_up(self._tensors[gate], self._tensors[up]) if old is None else old

    def experts(self, owner: Any, prefix: str, mixture: int, num_experts: int) -> Any:
        held = dict.fromkeys(self._share.held(mixture, num_experts))  # a tensor is read once: replicas are copied
        names = [expert_tensors(prefix, expert) for expert in held]
        old = self._old(owner, "experts", list(chain.from_iterable(names)))
        if old is not None:
            return old
        triples = ((self._tensors[gate], self._tensors[up], self._tensors[down]) for gate, up, down in names)
        return self._share.weights(mixture, self._ops.pack_experts(len(names), triples))

    def _old(self, owner: Any, field: str, names: Sequence[str]) -> Any:
        return None if self._previous is None else self._previous.part(owner, field, names)


def _build_layer(
    build: _PartBuilder, config: ModelConfig, index: int, old: LayerParams[Any] | None
) -> LayerParams[Any]:
    prefix = layer_prefix(index)
    attention = prefix + "self_attn."
    projections = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    return LayerParams(
        input_norm=build.kept(old, "input_norm", prefix + "input_layernorm.weight"),
        qkv=build.linear(
            old,
            "qkv",
            [f"{name}.weight" for name in projections],
            [f"{name}.bias" if config.qkv_bias else None for name in projections],
        ),
        q_norm=build.kept(old, "q_norm", attention + "q_norm.weight") if config.qk_norm else None,
        k_norm=build.kept(old, "k_norm", attention + "k_norm.weight") if config.qk_norm else None,
        o=build.linear(old, "o", [attention + "o_proj.weight"], [attention + "o_proj.bias" if config.o_bias else None]),
        post_norm=build.kept(old, "post_norm", prefix + "post_attention_layernorm.weight"),
        **_build_mlp(build, config, index, old),
    )


def _build_mlp(build: _PartBuilder, config: ModelConfig, index: int, old: LayerParams[Any] | None) -> dict[str, Any]:
    """The last fields of `LayerParams`."""
    prefix, moe = layer_prefix(index), config.moe
    if moe is None or index not in moe.layers:
        return _build_block(build, old, prefix + "mlp.")
    mixture = None if old is None else old.moe
    router = build.linear(mixture, "router", [prefix + ROUTER], [None])
    correction = build.kept(mixture, "correction", prefix + CORRECTION) if moe.correction_bias else None
    block: dict[str, Any] = {"gate_up": None, "down": None}
    if moe.shared_intermediate_size:
        block = _build_block(build, old, prefix + SHARED_EXPERTS)
    experts = build.experts(mixture, prefix, moe.layers.index(index), moe.num_experts)
    return block | {"moe": MoeParams(router, correction, experts)}


def _build_block(build: _PartBuilder, old: LayerParams[Any] | None, prefix: str) -> dict[str, Any]:
    gate, up, down = (prefix + name for name in BLOCK)
    return {"gate_up": build.gate_up(old, "gate_up", gate, up), "down": build.linear(old, "down", [down], [None])}


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
