"""The op table on Paddle's GPU tensors, in bfloat16 on tensor cores or in float32, by Triton kernels.

One copy to the device opens a step (`begin_step`: metadata and sampling options together), one copy back closes it
(`fetch`); nothing waits for the host but the reader of its result, so steps may be launched one after the other. Rows
are padded to the step's bucket; what padding rows hold is arbitrary. Which tensor has which type, and the order of
every sum, is said in docs/numerics.md. Paddle serves memory alone: no Paddle operator computes anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import triton
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.gpu import elementwise, general_sampling, matmul, norms, paged_attention, sampling, tiles
from zerokl.kernels.gpu import experts as mixtures
from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu.attention_tiles import SHARED_HEAD, TILE_COLUMNS, attention_tiles, share_prefixes
from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.packed import PackedExperts, PackedGateUp, PackedLinear
from zerokl.kernels.gpu.routing_record import FetchedRouting, RoutingRecord
from zerokl.kernels.gpu.scratch import Scratch
from zerokl.kernels.gpu.step_arrays import StepLayout, bucket, lay_out
from zerokl.kernels.gpu.transfers import Downloads, Fetch, Uploads
from zerokl.kernels.gpu.weight_slots import WeightSlots
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Dtype = Literal["float32", "bfloat16"]

_MAX_ROWS = 1 << 16
"""Rows of results that a step can have."""
_ROWS_PER_PASS = 512
"""Rows whose logits are in memory at once."""


class GpuOps:
    """`zerokl.kernels.ops.Ops[paddle.Tensor]` on one GPU. Weights are given as NumPy arrays of float32 or, as uint16
    patterns, of bfloat16.

    `dtype` is the type of matrices, activations, keys and values; the residual stream and sums are float32 either way.
    An op never writes what an earlier one of the step has returned while that is referred to, and a later step with the
    same shapes has the same addresses. Serves pools of one `AttentionSpec`. One thread runs steps; packing may go on
    in another one meanwhile.
    """

    takes_patterns = True
    """Whether packing takes bfloat16 patterns."""

    _attention_spec: AttentionSpec

    def __init__(self, device: Device | None = None, dtype: Dtype = "float32", number: int = 0) -> None:
        """On the GPU of this number unless a device is given. Raises RuntimeError where it cannot be used."""
        self.device = _gpu(number) if device is None else device
        self.dtype = dtype
        self._scratch = Scratch(self.device.empty)
        self._uploads = Uploads(self.device)
        self._downloads = Downloads(self.device)
        self._inputs: StepInputs | None = None
        self._layout: StepLayout | None = None
        self._flat: Tensor = None
        self._sections: dict[str, Tensor] = {}
        self._arrays: dict[tuple[tuple[str, int], ...], tuple[Tensor, dict[str, Tensor]]] = {}
        self._pool: KVPool[Tensor] | None = None
        self.slots = WeightSlots(self.device.empty)
        """For sets of weights that are copied on the device."""
        self._results = self.device.empty([_MAX_ROWS, int(sampling.NUM_RESULTS)], "int32")
        """Of the last step that drew; the tokens of the next one may be taken from here."""
        self._routing_record: RoutingRecord | None = None

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[Any]) -> Tensor:
        """A copy on the device: matrices in the table's type, vectors and angle tables in float32."""
        return self._matrix(values) if values.ndim == 2 and len(values) > 1 else self._place_float32(values)

    def _matrix(self, values: NDArray[Any]) -> Tensor:
        if self.dtype == "float32":
            return self._place_float32(values)
        return self.device.put(values if values.dtype == np.uint16 else _bfloat16_bits(values))

    def _place_float32(self, values: NDArray[Any]) -> Tensor:
        return self.device.put(_widened(values))

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Tensor]:
        """An uninitialised pool, keys and values [layers, blocks, KV, B, D]; nothing is read before it was written."""
        self._attention_spec = spec
        shape = [num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim]
        return KVPool(self.device.empty(shape, self.dtype), self.device.empty(shape, self.dtype), block_size)

    def _take(self, *shape: int, dtype: str | None = None) -> Tensor:
        return self._scratch.take(shape, dtype or self.dtype)

    def forget_step(self) -> None:
        """Let go of the pool and of what steps have in memory; recorded steps are not to be launched any more."""
        self.device.synchronize()
        self._inputs = self._layout = self._pool = self._flat = None
        self._sections = {}
        if self._routing_record is not None:
            self._routing_record.forget()
        self._arrays.clear()
        self._scratch.clear()
        self.device.release_unused()

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
            pairs = zip(weights, biases, strict=True)
            parts = [np.zeros(len(w), np.float32) if b is None else _widened(b) for w, b in pairs]
            bias = self._place_float32(np.concatenate(parts))
        return PackedLinear(self._matrix(np.concatenate(_alike(weights))), bias)

    def pack_gate_up(self, gate: Any, up: Any) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return PackedGateUp(self._matrix(_in_turn(gate, up)))

    def pack_experts(self, count: int, experts: Iterable[tuple[Any, Any, Any]]) -> PackedExperts:
        """See `Ops.pack_experts`."""
        parts = [(_in_turn(gate, up), down) for gate, up, down in experts]
        assert len(parts) == count, f"{count} experts were promised, {len(parts)} came"
        gate_ups, downs = (_alike(some) for some in zip(*parts, strict=True))
        return PackedExperts(self._matrix(np.stack(gate_ups)), self._matrix(np.stack(downs)))

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """See `Ops.begin_step`. Waits for no step before."""
        self.device.enter()
        self._inputs, self._pool = inputs, pool
        self._layout = layout = lay_out(inputs, **self._attention_lists(inputs, pool.block_size))
        self._restart()
        self._flat, self._sections = self._metadata(layout)
        self._uploads.send(layout.flat, self._flat)

    def _metadata(self, layout: StepLayout) -> tuple[Tensor, dict[str, Tensor]]:
        """Where the layout goes on the device, for what may be recorded an address of its own, and its sections."""
        key, kept = layout.key(), self.step_kind() is not None
        if kept and key in self._arrays:
            return self._arrays[key]
        size = len(layout.flat)
        flat = self.device.empty([size], "int32") if kept else self._take(size, dtype="int32")
        made = flat, {name: flat[section] for name, section in layout.sections.items()}
        if kept:
            self._arrays[key] = made
        return made

    @property
    def inputs(self) -> StepInputs:
        """Of the step that has begun last."""
        assert self._inputs is not None, "no step has begun"
        return self._inputs

    def _restart(self) -> None:
        assert self._layout is not None
        self._scratch.begin((self._layout.num_tokens, self._layout.num_rows))
        if self._routing_record is not None:
            self._routing_record.begin(self._layout.num_tokens, self._take)

    def step_kind(self) -> tuple[Any, ...] | None:
        """Equal for steps that launch the same kernels at the same addresses with equal parameters and pool.

        None for a step with more than a token of any sequence, whose kind seldom comes again. After `begin_step`.
        """
        assert self._layout is not None and self._inputs is not None
        if self._layout.num_entries("chunk_tiles"):
            return None
        batch = self._inputs.sampling
        return self._layout.key(), None if heads.serves(batch) else general_sampling.needs_of(batch)

    def record(self, launches: Callable[[], None]) -> Any:
        """A `device.Graph` of the ops that `launches` calls for the step that has begun; it serves its kind."""

        def again() -> None:
            self._restart()
            launches()

        return self.device.record(again)

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
        return tiles.PREFILL_ATTENTION if self.dtype == "bfloat16" else tiles.DECODE_ATTENTION

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """Rows of the table, widened to the float32 residual: [T] -> [T, E]."""
        assert self._inputs is not None and self._layout is not None and token_ids is self._inputs.token_ids
        out = self._take(self._layout.num_tokens, table.shape[1], dtype="float32")
        ids, rows = self._sections["token_ids"], self._sections["token_rows"]
        elementwise.embed(table, ids, rows, self._results, int(sampling.TOKEN), out)
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
        return self._product(x, weight, self.dtype)

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
        if self._routing_record is None:
            ids, weights = self._take(*shape, dtype="int32"), self._take(*shape, dtype="float32")
        else:
            ids, weights = self._routing_record.of(spec.index)
        size = shape[0] * shape[1]
        given = {
            name: self._sections[section][spec.index * size : (spec.index + 1) * size]
            for name, section in (("given", "routing"), ("given_weights", "routing_weights"))
            if section in self._sections
        }
        mixtures.choose_experts(logits, params.correction, spec, ids, weights, **given)
        return Routing(ids, weights)

    def record_routing(self, num_mixtures: int, top_k: int) -> None:
        """Keep what the routers choose until `fetch_routing`, from the next step on."""
        self._routing_record = RoutingRecord(num_mixtures, top_k)

    def fetch_routing(self) -> FetchedRouting:
        """Begin to copy what the routers of the step that was launched last choose to the host."""
        assert self._routing_record is not None and self._inputs is not None, "nothing has been recorded"
        return self._routing_record.fetch(self._downloads, len(self._inputs.token_ids))

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: PackedExperts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`."""
        (tokens, slots), (count, k, width) = routing.experts.shape, experts.down.shape
        tile = mixtures.expert_tile(tokens * slots, count, self.dtype)
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
        """See `Ops.sample`; `batch` is the step's. A row whose logits are not all finite gets token -1."""
        self.draw(hidden, lm_head, batch)
        return self.fetch(len(batch.forced), want_raw=batch.want_raw).result()

    def draw(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> None:
        """`sample` without its result, which `fetch` gets.

        Each option that some row has costs passes over the logits: see `general_sampling`.
        """
        assert self._inputs is not None and batch is self._inputs.sampling
        assert len(batch.forced) <= _MAX_ROWS, f"{len(batch.forced)} rows of results"
        needs = None if heads.serves(batch) else general_sampling.needs_of(batch)
        rows, options = hidden.shape[0], int(sampling.NUM_OPTIONS)
        if needs is not None and needs.processed:
            sampling.count_drawn(self._sections, self._results)  # before these results take the place of the last ones
        for first in range(0, rows, _ROWS_PER_PASS):
            last = min(first + _ROWS_PER_PASS, rows)
            whole = last - first == rows
            at = dict(self._sections)
            if not whole:
                at["options"] = at["options"][first * options : last * options]
                at["history_start"] = at["history_start"][first : last + 1]
                at["bias_start"] = at["bias_start"][first : last + 1]
            some, out = hidden if whole else hidden[first:last], self._results[first:last]
            if needs is None:
                self._settle(some, lm_head, at, out)
            else:
                general_sampling.sample(some, lm_head.weight, at, out, needs, self._take)

    def fetch(self, rows: int, *, want_raw: bool) -> FetchedSample:
        """Begin to copy the first rows of what was drawn last to the host."""
        size = rows * int(sampling.NUM_RESULTS)
        return FetchedSample(self._downloads.fetch(self._results, size), want_raw)

    def _settle(self, hidden: Tensor, lm_head: PackedLinear, at: dict[str, Tensor], out: Tensor) -> None:
        rows, vocab = hidden.shape[0], lm_head.weight.shape[0]
        chunks = heads.num_chunks(vocab)
        logits, tile_max = (
            self._take(rows, width, dtype="float32") for width in (vocab, heads.num_tiles(rows, vocab, self.dtype))
        )
        sums = self._take(rows, chunks, 2, dtype="float32")
        masses = self._take(rows, chunks, dtype="int64")
        heads.settle(hidden, lm_head.weight, at["options"], logits, tile_max, sums, masses, out)


class FetchedSample:
    """Results of a step on their way to the host."""

    def __init__(self, fetch: Fetch, want_raw: bool) -> None:
        self._fetch, self._want_raw = fetch, want_raw

    def result(self) -> SampleResult:
        """Wait for them; asked for once."""
        columns = self._fetch.result().reshape(-1, int(sampling.NUM_RESULTS))
        return _sample_result(columns, self._want_raw)


def _gpu(number: int) -> Device:
    from zerokl.kernels.gpu.paddle_device import PaddleDevice

    return PaddleDevice(number)


def _in_turn(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    return np.stack(_alike([gate, up]), axis=1).reshape(-1, gate.shape[1])


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even, as bits: Paddle takes uint16 for bfloat16. NaNs may change."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _alike(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The arrays as they are if all are patterns, else as float32."""
    return list(arrays) if all(array.dtype == np.uint16 for array in arrays) else [_widened(a) for a in arrays]


def _widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """float32 values, of bfloat16 patterns too."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, np.float32)


def _sample_result(columns: NDArray[np.int32], want_raw: bool) -> SampleResult:
    floats = columns.view(np.float32)
    return SampleResult(
        tokens=columns[:, int(sampling.TOKEN)].copy(),
        logprobs=floats[:, int(sampling.LOGPROB)].copy(),
        policy_logprobs=floats[:, int(sampling.POLICY_LOGPROB)].copy(),
        entropy=floats[:, int(sampling.ENTROPY)].copy(),
        raw_logprobs=floats[:, int(sampling.RAW_LOGPROB)].copy() if want_raw else None,
    )
