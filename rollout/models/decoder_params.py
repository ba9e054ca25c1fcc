"""A model's tensors packed into the parameters that the decoder runs on, or taken over from those of before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from zerokl.kernels.experts import MoeParams
from zerokl.kernels.ops import DecoderParams, LayerParams

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

Array = TypeVar("Array")
Operand = TypeVar("Operand", contravariant=True)


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
