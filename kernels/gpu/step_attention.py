"""Attention of a step: which tokens a program takes, which sequences share keys, and the buffers that this needs."""

from __future__ import annotations

import numpy as np
import triton
from numpy.typing import NDArray

from zerokl.kernels.gpu import norms, paged_attention, tiles
from zerokl.kernels.gpu.attention_tiles import (
    SHARED_HEAD,
    SPLIT,
    TILE_COLUMNS,
    attention_tiles,
    share_prefixes,
    splits_pay,
)
from zerokl.kernels.gpu.current_step import CurrentStep
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.packed import Dtype
from zerokl.kernels.gpu.step_arrays import bucket
from zerokl.kernels.ops import AttentionSpec, LayerParams, StepInputs


class StepAttention:
    """The attention layers of the step that is under way. Serves pools of one `AttentionSpec`, told by `serve`."""

    _spec: AttentionSpec

    def __init__(self, step: CurrentStep, dtype: Dtype, *, spreads_splits: bool, shares_prefixes: bool) -> None:
        """`spreads_splits`: where there are few sequences, each split of their keys has a program of its own.
        `shares_prefixes`: keys that sequences share are read once for all of them. No bit depends on either.
        """
        self._step = step
        self._chunk_tile = tiles.PREFILL_ATTENTION if dtype == "bfloat16" else tiles.DECODE_ATTENTION
        self._spreads_splits = spreads_splits
        self._shares_prefixes = shares_prefixes

    def serve(self, spec: AttentionSpec) -> None:
        """Steps have pools of this one from now on."""
        self._spec = spec

    def lists(self, inputs: StepInputs, block_size: int) -> dict[str, NDArray[np.int32]]:
        """The sections of a step that are read here, by name; see `attention_tiles`."""
        spec = self._spec
        per_tile = paged_attention.tokens_per_tile(self._chunk_tile, spec)
        singles, chunks = attention_tiles(inputs.seq_starts, inputs.context_lens, per_tile)
        members = paged_attention.members_per_tile(spec)
        shared = share_prefixes(singles, inputs.block_tables, block_size, members, SPLIT)
        if len(shared):
            # To the most that so many sequences can have: a recorded step serves any groups.
            shared = np.pad(shared, ((0, bucket(len(singles)) // 2 - len(shared)), (0, 0)))
        return {"single_tiles": singles, "chunk_tiles": chunks, "shared_tiles": shared}

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        step, at = self._step, self._step.sections
        query, out = (step.take(qkv.shape[0], spec.num_heads * spec.head_dim) for _ in range(2))
        norms.qkv_to_cache(
            qkv, params.q_norm, params.k_norm, rope, at["positions"], at["slots"], step.pool, layer, query, spec
        )
        tables = at["tables"].reshape([-1, step.layout.max_blocks])
        for section, tile in (("single_tiles", tiles.DECODE_ATTENTION), ("chunk_tiles", self._chunk_tile)):
            count = step.layout.num_entries(section) // TILE_COLUMNS
            if count:
                partial = shared = None
                if section == "single_tiles":
                    partial = self._partial(count, spec)
                    shared = self._shared(qkv.shape[0], spec) if partial is None else None
                tile_list = at[section].reshape([count, TILE_COLUMNS])
                paged_attention.attention(
                    query, step.pool, layer, tables, tile_list, out, spec, partial=partial, shared=shared, tile=tile
                )  # fmt: skip
        return out

    def _shared(self, tokens: int, spec: AttentionSpec) -> paged_attention.Shared | None:
        """The step's tokens that share keys, with buffers for their state; None where there are none."""
        columns = SHARED_HEAD + paged_attention.members_per_tile(spec)
        count = self._step.layout.num_entries("shared_tiles") // columns
        if not count or not self._shares_prefixes:
            return None
        return paged_attention.Shared(
            self._step.sections["shared_tiles"].reshape([count, columns]),
            self._step.take(tokens, spec.num_heads, spec.head_dim, dtype="float32"),
            self._step.take(tokens, spec.num_heads, 2, dtype="float32"),
        )

    def _partial(self, count: int, spec: AttentionSpec) -> tuple[Tensor, Tensor] | None:
        """Buffers for a program per split of `count` single tokens, where a program per token and key head would leave
        the chip idle. Layouts with as many splits in all have the same ones.
        """
        context = self._step.layout.max_blocks * self._step.pool.block_size
        if not self._spreads_splits or not splits_pay(count, spec.num_kv_heads, context):
            return None
        take, states = self._step.take, count * triton.cdiv(context, SPLIT) * spec.num_heads
        return take(states, spec.head_dim, dtype="float32"), take(states, 2, dtype="float32")
