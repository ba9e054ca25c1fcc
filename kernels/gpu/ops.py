"""The op table on Paddle's GPU tensors, in bfloat16 on tensor cores or in float32, by Triton kernels.

One copy to the device opens a step (`begin_step`: metadata and sampling options together), one copy back closes it
(end of `sample`); nothing between waits for the host. Rows are padded to the step's bucket; what padding rows hold is
arbitrary. Which tensor has which type, and the order of every sum, is said in docs/numerics.md.
Paddle serves memory and copies alone: no Paddle operator computes anything here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import paddle
import triton
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.gpu import driver, elementwise, general_sampling, matmul, norms, paged_attention, sampling, tiles
from zerokl.kernels.gpu import experts as mixtures
from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu.attention_tiles import SHARED_HEAD, TILE_COLUMNS, attention_tiles, share_prefixes
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.step_arrays import StepLayout, bucket, lay_out
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Matrices on top of each other, [N, K], and their biases [N] in float32."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedGateUp:
    """The rows of the two input matrices of a SwiGLU block in turn, [2 F, E]."""

    weight: Tensor


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts of a mixture on top of each other: gate and up [X, 2 F, E] as in `PackedGateUp`, down [X, E, F]."""

    gate_up: Tensor
    down: Tensor


class GpuOps:
    """`zerokl.kernels.ops.Ops[paddle.Tensor]` on one GPU. Weights are given as NumPy arrays.

    `dtype` is the type of matrices, activations, keys and values; the residual stream and sums are float32 either way.
    Results live in buffers found by their place in the order of the step's calls: no op of a step writes what an
    earlier one returned, and a later step with the same shapes has the same addresses. Serves pools of one
    `AttentionSpec`; not for several threads. Raises RuntimeError where there is no usable GPU.
    """

    _attention_spec: AttentionSpec

    def __init__(self, device: int = 0, dtype: Dtype = "float32") -> None:
        self._place = driver.activate(device)
        self._dtype = dtype
        self._buffers: dict[tuple[int, tuple[int, ...], str], Tensor] = {}
        self._calls = 0
        self._inputs: StepInputs | None = None
        self._layout: StepLayout | None = None
        self._sections: dict[str, Tensor] = {}
        self._bucket_arrays: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._pool: KVPool[Tensor] | None = None

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[np.float32]) -> Tensor:
        """A copy on the device: matrices in the table's type, vectors and angle tables in float32."""
        return self._matrix(values) if values.ndim == 2 and len(values) > 1 else self._place_float32(values)

    def _matrix(self, values: NDArray[np.float32]) -> Tensor:
        if self._dtype == "float32":
            return self._place_float32(values)
        return paddle.to_tensor(_bfloat16_bits(values), place=self._place)

    def _place_float32(self, values: NDArray[np.float32]) -> Tensor:
        return paddle.to_tensor(np.ascontiguousarray(values, np.float32), place=self._place)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Tensor]:
        """An uninitialised pool, keys and values [layers, blocks, KV, B, D]; nothing is read before it was written."""
        self._attention_spec = spec
        shape = [num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim]
        return KVPool(paddle.empty(shape, self._dtype), paddle.empty(shape, self._dtype), block_size)

    def _take(self, *shape: int, dtype: str | None = None) -> Tensor:
        key = (self._calls, shape, dtype or self._dtype)
        self._calls += 1
        if key not in self._buffers:
            self._buffers[key] = paddle.empty(list(shape), key[2])
        return self._buffers[key]

    # -- packing -------------------------------------------------------------------------------------------------------
    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros.

        A single matrix that is on the device already (the embedding of a tied model) is shared, not copied.
        """
        if len(weights) == 1 and not isinstance(weights[0], np.ndarray):
            assert biases[0] is None
            return PackedLinear(weights[0], None)
        bias = None
        if any(part is not None for part in biases):
            parts = [np.zeros(len(w), np.float32) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = self._place_float32(np.concatenate(parts))
        return PackedLinear(self._matrix(np.concatenate(weights)), bias)

    def pack_gate_up(self, gate: Any, up: Any) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return PackedGateUp(self._matrix(_in_turn(gate, up)))

    def pack_experts(self, count: int, experts: Iterable[tuple[Any, Any, Any]]) -> PackedExperts:
        """See `Ops.pack_experts`."""
        parts = [(_in_turn(gate, up), down) for gate, up, down in experts]
        assert len(parts) == count, f"{count} experts were promised, {len(parts)} came"
        gate_ups, downs = zip(*parts, strict=True)
        return PackedExperts(self._matrix(np.stack(gate_ups)), self._matrix(np.stack(downs)))

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """See `Ops.begin_step`. Waits for the step before, whose arrays it overwrites.

        Raises ValueError for given gate weights: only expert ids can be given here.
        """
        if inputs.routing_weights is not None:
            raise ValueError("routing_weights must be None on a GPU, which replays expert ids alone")
        self._inputs, self._pool, self._calls = inputs, pool, 0
        self._layout = layout = lay_out(inputs, **self._attention_lists(inputs, pool.block_size))
        paddle.device.cuda.synchronize()
        staged = paddle.to_tensor(layout.flat, place=self._place)
        # Into the bucket's own array, at an address that a recorded step may keep.
        flat = self._bucket_arrays.setdefault(layout.key(), staged)
        if flat is not staged:
            sampling.copy(staged, flat, layout.flat.size)
            paddle.device.cuda.synchronize()
        self._sections = {name: flat[section] for name, section in layout.sections.items()}

    def _attention_lists(self, inputs: StepInputs, block_size: int) -> dict[str, NDArray[np.int32]]:
        spec = self._attention_spec
        per_tile = paged_attention.tokens_per_tile(self._chunk_tile(), spec)
        singles, chunks = attention_tiles(inputs.seq_starts, inputs.context_lens, per_tile)
        members = paged_attention.members_per_tile(spec)
        shared = share_prefixes(singles, inputs.block_tables, block_size, members, paged_attention.SPLIT)
        if len(shared):
            # To the most that so many sequences can have: a recorded step serves any groups.
            shared = np.pad(shared, ((0, bucket(len(singles)) // 2 - len(shared)), (0, 0)))
        return {"single_tiles": singles, "chunk_tiles": chunks, "shared_tiles": shared}

    def _chunk_tile(self) -> tiles.Tile:
        return tiles.PREFILL_ATTENTION if self._dtype == "bfloat16" else tiles.DECODE_ATTENTION

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """Rows of the table, widened to the float32 residual: [T] -> [T, E]."""
        assert self._inputs is not None and self._layout is not None and token_ids is self._inputs.token_ids
        out = self._take(self._layout.num_tokens, table.shape[1], dtype="float32")
        elementwise.gather(table, self._sections["token_ids"], out)
        return out

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        assert self._inputs is not None and self._layout is not None and rows is self._inputs.logit_rows
        out = self._take(self._layout.num_rows, x.shape[1])
        elementwise.gather(x, self._sections["rows"], out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`; x is float32."""
        out = self._take(*x.shape)
        norms.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`; the float32 sum takes the place of `residual`."""
        out = self._take(*residual.shape)
        norms.rms_norm(residual, weight, eps, out, delta=delta)
        return residual, out

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """[T, K] -> [T, sum N_i], biases added."""
        return self._product(x, weight, self._dtype)

    qkv_linear = linear

    def _product(self, x: Tensor, weight: PackedLinear, dtype: str) -> Tensor:
        out = self._take(x.shape[0], weight.weight.shape[0], dtype=dtype)
        matmul.linear(x, weight.weight, weight.bias, out)
        return out

    def swiglu_linear(self, x: Tensor, weight: PackedGateUp) -> Tensor:
        """See `Ops.swiglu_linear`: [T, E] -> [T, F]."""
        out = self._take(x.shape[0], weight.weight.shape[0] // 2)
        matmul.swiglu(x, weight.weight, out)
        return out

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        assert self._pool is not None and self._layout is not None, "attention before begin_step"
        pool, at = self._pool, self._sections
        query, out = (self._take(qkv.shape[0], spec.num_heads * spec.head_dim) for _ in range(2))
        norms.qkv_to_cache(
            qkv, params.q_norm, params.k_norm, rope, at["positions"], at["slots"], pool, layer, query, spec
        )
        tables = at["tables"].reshape([-1, self._layout.max_blocks])
        for section, tile in (("single_tiles", tiles.DECODE_ATTENTION), ("chunk_tiles", self._chunk_tile())):
            count = self._layout.num_entries(section) // TILE_COLUMNS
            if count:
                partial = shared = None
                if section == "single_tiles":
                    partial = self._partial(qkv.shape[0], count, spec)
                    shared = self._shared(qkv.shape[0], spec) if partial is None else None
                tile_list = at[section].reshape([count, TILE_COLUMNS])
                paged_attention.attention(
                    query, pool, layer, tables, tile_list, out, spec, partial=partial, shared=shared, tile=tile
                )  # fmt: skip
        return out

    def _shared(self, tokens: int, spec: AttentionSpec) -> paged_attention.Shared | None:
        """The step's tokens that share keys, with buffers for their state; None where there are none."""
        assert self._layout is not None
        columns = SHARED_HEAD + paged_attention.members_per_tile(spec)
        count = self._layout.num_entries("shared_tiles") // columns
        if not count:
            return None
        return paged_attention.Shared(
            self._sections["shared_tiles"].reshape([count, columns]),
            self._take(tokens, spec.num_heads, spec.head_dim, dtype="float32"),
            self._take(tokens, spec.num_heads, 2, dtype="float32"),
        )

    def _partial(self, tokens: int, count: int, spec: AttentionSpec) -> tuple[Tensor, Tensor] | None:
        """Buffers for a program per split, where a program per sequence and key head would leave the chip idle."""
        assert self._pool is not None and self._layout is not None
        context = self._layout.max_blocks * self._pool.block_size
        if not paged_attention.splits_pay(count, spec.num_kv_heads, context):
            return None
        shape = (tokens, spec.num_heads, triton.cdiv(context, paged_attention.SPLIT))
        return self._take(*shape, spec.head_dim, dtype="float32"), self._take(*shape, 2, dtype="float32")

    # -- mixtures of experts -------------------------------------------------------------------------------------------
    def route(self, x: Tensor, params: MoeParams[Tensor], spec: RouterSpec) -> Routing[Tensor]:
        """See `Ops.route`; ids [T, k] int32 and weights stay on the device."""
        assert self._inputs is not None, "route before begin_step"
        logits = self._product(x, params.router, "float32")
        shape = (x.shape[0], spec.top_k)
        ids, weights = self._take(*shape, dtype="int32"), self._take(*shape, dtype="float32")
        given = None
        if self._inputs.routing is not None:
            size = shape[0] * shape[1]
            given = self._sections["routing"][spec.index * size : (spec.index + 1) * size]
        mixtures.choose_experts(logits, params.correction, spec, ids, weights, given=given)
        return Routing(ids, weights)

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: PackedExperts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`."""
        (tokens, slots), (count, k, width) = routing.experts.shape, experts.down.shape
        tile = mixtures.expert_tile(tokens * slots, count, self._dtype)
        num_tiles = mixtures.num_tiles(tokens * slots, count, tile.BLOCK_M)
        counts, tile_expert, order = (
            self._take(size, dtype="int32") for size in (count, num_tiles, num_tiles * tile.BLOCK_M)
        )
        mixtures.sort_slots(routing.experts, count, counts, order, tile_expert, tile)
        inner, outputs = self._take(tokens * slots, width), self._take(tokens * slots, k, dtype="float32")
        out = self._take(tokens, k)
        mixtures.mixture(
            x, experts.gate_up, experts.down, routing.experts, routing.weights, order, tile_expert,
            inner, outputs, shared, out, tile=tile,
        )  # fmt: skip
        return out

    # -- sampling ------------------------------------------------------------------------------------------------------
    def sample(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> SampleResult:
        """See `Ops.sample`; `batch` is the step's. A row whose logits are not all finite gets token -1.

        Each option that some row has costs passes over the logits: see `general_sampling`.
        """
        assert self._inputs is not None and batch is self._inputs.sampling
        out = self._take(hidden.shape[0], int(sampling.NUM_RESULTS), dtype="int32")
        if heads.serves(batch):
            self._settle(hidden, lm_head.weight, out)
        else:
            needs = general_sampling.needs_of(batch)
            general_sampling.sample(hidden, lm_head.weight, self._sections, out, needs, self._take)
        paddle.device.cuda.synchronize()
        return _sample_result(out.numpy()[: len(batch.forced)], batch.want_raw)

    def _settle(self, hidden: Tensor, head: Tensor, out: Tensor) -> None:
        rows, vocab = hidden.shape[0], head.shape[0]
        chunks = heads.num_chunks(vocab)
        logits, tile_max = (
            self._take(rows, width, dtype="float32") for width in (vocab, heads.num_tiles(rows, vocab, self._dtype))
        )
        sums = self._take(rows, chunks, 2, dtype="float32")
        masses = self._take(rows, chunks, dtype="int64")
        heads.settle(hidden, head, self._sections["options"], logits, tile_max, sums, masses, out)


def _in_turn(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even, as bits: Paddle takes uint16 for bfloat16. NaNs may change."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _sample_result(columns: NDArray[np.int32], want_raw: bool) -> SampleResult:
    floats = columns.view(np.float32)
    return SampleResult(
        tokens=columns[:, int(sampling.TOKEN)].copy(),
        logprobs=floats[:, int(sampling.LOGPROB)].copy(),
        policy_logprobs=floats[:, int(sampling.POLICY_LOGPROB)].copy(),
        entropy=floats[:, int(sampling.ENTROPY)].copy(),
        raw_logprobs=floats[:, int(sampling.RAW_LOGPROB)].copy() if want_raw else None,
    )
