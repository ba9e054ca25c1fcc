"""The op table in bfloat16 on tensor cores: matrices and activations bfloat16, residual stream and sums float32.

Which tensor has which type, and the order of every sum, is said in docs/numerics.md. Kernels are tuned by number of
rows; bits are not a function of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import triton
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.gpu import experts as mixtures
from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu import matmul, norms, paged_attention, sampling, tiles
from zerokl.kernels.gpu.attention_tiles import attention_tiles
from zerokl.kernels.gpu.ops import GpuOps, PackedGateUp, PackedLinear, Tensor, sample_result
from zerokl.kernels.gpu.step_arrays import StepLayout, lay_out
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts of a mixture on top of each other: gate and up [X, F, E], down [X, E, F], bfloat16."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Bfloat16Ops(GpuOps):
    """`zerokl.kernels.ops.Ops[paddle.Tensor]` on one GPU of compute capability 9.0, mixtures of experts included.

    Buffers as in `GpuOps`; serves pools of one `AttentionSpec`. Raises RuntimeError where there is no usable GPU.
    """

    _attention_spec: AttentionSpec

    # -- placement and packing -----------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[np.float32]) -> Tensor:
        """A copy on the device: matrices in bfloat16, rounded to nearest even; vectors and angle tables in float32."""
        if values.ndim == 2 and len(values) > 1:
            return paddle.to_tensor(_bfloat16_bits(values), place=self._place)
        return super().tensor(values)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Tensor]:
        """An uninitialised pool in bfloat16: keys and values [layers, blocks, KV, block size, D]."""
        self._attention_spec = spec
        shape = [num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim]
        return KVPool(paddle.empty(shape, "bfloat16"), paddle.empty(shape, "bfloat16"), block_size)

    def pack_experts(self, count: int, experts: Iterable[tuple[Any, Any, Any]]) -> PackedExperts:
        """See `Ops.pack_experts`."""
        parts = [[_bfloat16_bits(matrix) for matrix in expert] for expert in experts]
        assert len(parts) == count, f"{count} experts were promised, {len(parts)} came"
        stacks = (np.stack([expert[part] for expert in parts]) for part in range(3))
        return PackedExperts(*(paddle.to_tensor(stack, place=self._place) for stack in stacks))

    # -- a step --------------------------------------------------------------------------------------------------------
    def _lay_out(self, inputs: StepInputs) -> StepLayout:
        per_tile = paged_attention.tokens_per_tile(tiles.PREFILL_ATTENTION, self._attention_spec)
        singles, chunks = attention_tiles(inputs.seq_starts, inputs.context_lens, per_tile)
        return lay_out(inputs, single_tiles=singles, chunk_tiles=chunks)

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """Rows of the table, widened to the float32 residual: [T] -> [T, E]."""
        assert self._inputs is not None and self._layout is not None and token_ids is self._inputs.token_ids
        return self._rows_of(table, "token_ids", self._layout.num_tokens, "float32")

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        assert self._inputs is not None and self._layout is not None and rows is self._inputs.logit_rows
        return self._rows_of(x, "rows", self._layout.num_rows, "bfloat16")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`: x float32, the result bfloat16."""
        out = self._take(*x.shape, dtype="bfloat16")
        norms.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`; the float32 sum takes the place of `residual`."""
        out = self._take(*residual.shape, dtype="bfloat16")
        norms.rms_norm(residual, weight, eps, out, delta=delta)
        return residual, out

    def linear(self, x: Tensor, weight: PackedLinear, dtype: str = "bfloat16") -> Tensor:
        """[T, K] -> [T, sum N_i], biases added, rounded to `dtype`."""
        out = self._take(x.shape[0], weight.weight.shape[0], dtype=dtype)
        matmul.linear(x, weight.weight, weight.bias, out)
        return out

    qkv_linear = linear

    def swiglu_linear(self, x: Tensor, weight: PackedGateUp) -> Tensor:
        """See `Ops.swiglu_linear`: [T, E] -> [T, F]."""
        out = self._take(x.shape[0], weight.gate.shape[0], dtype="bfloat16")
        matmul.swiglu(x, weight.gate, weight.up, out)
        return out

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        assert self._pool is not None and self._layout is not None, "attention before begin_step"
        pool, at, max_blocks = self._pool, self._sections, self._layout.max_blocks
        query, out = (self._take(qkv.shape[0], spec.num_heads * spec.head_dim, dtype="bfloat16") for _ in range(2))
        norms.qkv_to_cache(
            qkv, params.q_norm, params.k_norm, rope, at["positions"], at["slots"], pool, layer, query, spec
        )
        tables = at["tables"].reshape([-1, max_blocks])
        for section, tile in (("single_tiles", tiles.DECODE_ATTENTION), ("chunk_tiles", tiles.PREFILL_ATTENTION)):
            count = self._layout.num_entries(section) // paged_attention.TILE_COLUMNS
            if count:
                partial = self._partial(qkv.shape[0], count, spec) if section == "single_tiles" else None
                tile_list = at[section].reshape([count, paged_attention.TILE_COLUMNS])
                paged_attention.attention(
                    query, pool, layer, tables, tile_list, out, spec, partial=partial, tile=tile
                )  # fmt: skip
        return out

    def _partial(self, tokens: int, count: int, spec: AttentionSpec) -> tuple[Tensor, Tensor] | None:
        """Buffers for a program per split, where a program per sequence and key head would leave the chip idle."""
        assert self._pool is not None and self._layout is not None
        context = self._layout.max_blocks * self._pool.block_size
        if not paged_attention.splits_pay(count, spec.num_kv_heads, context):
            return None
        shape = (tokens, spec.num_heads, triton.cdiv(context, paged_attention.SPLIT))
        return self._take(*shape, spec.head_dim), self._take(*shape, 2)

    # -- mixtures of experts -------------------------------------------------------------------------------------------
    def route(self, x: Tensor, params: MoeParams[Tensor], spec: RouterSpec) -> Routing[Tensor]:
        """See `Ops.route`; ids [T, k] int32 and weights stay on the device."""
        assert self._inputs is not None and self._layout is not None, "route before begin_step"
        logits = self.linear(x, params.router, "float32")
        shape = (x.shape[0], spec.top_k)
        ids, weights = self._take(*shape, dtype="int32"), self._take(*shape)
        given = None
        if self._inputs.routing is not None:
            size = shape[0] * shape[1]
            given = self._sections["routing"][spec.index * size : (spec.index + 1) * size].reshape(list(shape))
        mixtures.choose_experts(logits, params.correction, spec, ids, weights, given=given)
        return Routing(ids, weights)

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: PackedExperts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`: x bfloat16, the result bfloat16."""
        (tokens, slots), (count, width, k) = routing.experts.shape, experts.gate.shape
        tile = mixtures.expert_tile(tokens * slots, count)
        num_tiles = mixtures.num_tiles(tokens * slots, count, tile.BLOCK_M)
        counts, tile_expert = self._take(count, dtype="int32"), self._take(num_tiles, dtype="int32")
        order = self._take(num_tiles * tile.BLOCK_M, dtype="int32")
        mixtures.sort_slots(routing.experts, count, counts, order, tile_expert, tile)
        inner, outputs = self._take(tokens * slots, width, dtype="bfloat16"), self._take(tokens * slots, k)
        out = self._take(tokens, k, dtype="bfloat16")
        mixtures.mixture(
            x, experts.gate, experts.up, experts.down, routing.experts, routing.weights, order, tile_expert,
            inner, outputs, shared, out, tile=tile,
        )  # fmt: skip
        return out

    # -- sampling ------------------------------------------------------------------------------------------------------
    def sample(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> SampleResult:
        """See `Ops.sample`; a batch without penalties and truncation needs one pass over the logits."""
        assert self._inputs is not None and batch is self._inputs.sampling
        if not heads.serves(batch):
            return super().sample(hidden, lm_head, batch)
        rows, vocab = hidden.shape[0], lm_head.weight.shape[0]
        logits, tile_max = self._take(rows, vocab), self._take(rows, heads.num_tiles(rows, vocab))
        sums = self._take(rows, heads.num_chunks(vocab), 2)
        masses = self._take(rows, heads.num_chunks(vocab), dtype="int64")
        out = self._take(rows, int(sampling.NUM_RESULTS), dtype="int32")
        heads.settle(hidden, lm_head.weight, self._sections["options"], logits, tile_max, sums, masses, out)
        paddle.device.cuda.synchronize()
        return sample_result(out.numpy()[: len(batch.forced)], batch.want_raw)

    def _logits(self, hidden: Tensor, lm_head: PackedLinear) -> Tensor:
        return self.linear(hidden, lm_head, "float32")


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even, as bits: Paddle takes uint16 for bfloat16. A NaN may become another NaN or inf."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
