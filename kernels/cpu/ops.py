"""The op table on NumPy arrays: float32, batch invariant, multi-threaded, over the C++ extension.

Each method is one call into `_cpu` (two for attention) on arrays from an `Arena`; docs/numerics.md states what is
computed and in which order. Sizes are checked by the extension, which raises ValueError naming the argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.cpu import moe as mixture
from zerokl.kernels.cpu.arena import Arena, zeroed_pages
from zerokl.kernels.cpu.packing import PackedGateUp, PackedLinear, Packer
from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

_MAX_HEAD_DIM = 256  # of csrc/elementwise.h
_LOGIT_BYTES = 32 << 20  # of one LM-head call: rows are independent, so larger batches go through in parts


class CpuOps:
    """`zerokl.kernels.ops.Ops[NDArray[np.float32]]`.

    What an op returns lives in a buffer that is used again after its last reference is gone. Not for use by several
    threads at once. `num_threads` sets the threads of the extension, the calling one included, **for the whole
    process**: the extension has one pool, and the last setting counts. None leaves it as it is. Results do not depend
    on it. Raises ValueError if it is outside [1, 1024].
    """

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is not None:
            _cpu.set_num_threads(num_threads)
        self._arena = Arena()
        self.packer = Packer()
        self.experts: mixture.ExpertRunner = mixture.LocalExperts()
        self._inputs: StepInputs | None = None
        self._pool: KVPool[Floats] | None = None
        self._layer_caches: list[tuple[Floats, Floats]] = []

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: Floats) -> Floats:
        """A float32 copy of `values` that the caller owns."""
        return np.array(values, np.float32, order="C")

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Floats]:
        """A zeroed pool. Its pages are taken from the system when first written.

        Raises ValueError for a head size that the attention kernel cannot do.
        """
        heads, size = spec.num_kv_heads, spec.head_dim
        if size > _MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM} on the CPU, got {size}")
        return KVPool(
            keys=zeroed_pages(num_layers, num_blocks, heads, size, block_size),
            values=zeroed_pages(num_layers, num_blocks, heads, block_size, size),
            block_size=block_size,
        )

    def forget_step(self) -> None:
        """Let go of the pool and the buffers of the last step; the next step takes them anew."""
        self._inputs, self._pool, self._layer_caches = None, None, []
        self._arena = Arena()

    # -- packing ------------------------------------------------------------------------------------------------------
    def pack_linear(self, weights: Sequence[Floats], biases: Sequence[Floats | None]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros."""
        return self.packer.pack_linear(weights, biases)

    def pack_gate_up(self, gate: Floats, up: Floats) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return self.packer.pack_gate_up(gate, up)

    def pack_experts(self, count: int, experts: Iterable[tuple[Floats, Floats, Floats]]) -> mixture.PackedExperts:
        """See `Ops.pack_experts`."""
        return self.packer.pack_experts(count, experts)

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Floats]) -> None:
        """See `Ops.begin_step`."""
        self._inputs = inputs
        if pool is not self._pool:
            self._pool = pool
            self._layer_caches = list(zip(pool.keys, pool.values, strict=True))

    # -- ops ----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: Ints, table: Floats | PackedLinear) -> Floats:
        """Rows of the table, which may be packed as a tied head is: [T] -> [T, E]."""
        rows = table.panels if isinstance(table, PackedLinear) else table
        out = self._arena.take(len(token_ids), rows.shape[1])
        _cpu.embedding(token_ids, rows, out)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        """See `Ops.rms_norm`."""
        out = self._arena.take(*x.shape)
        _cpu.rms_norm(x, weight, eps, out, None)
        return out

    def add_rms_norm(self, residual: Floats, delta: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        """See `Ops.add_rms_norm`; the sum takes the place of `residual`."""
        out = self._arena.take(*residual.shape)
        _cpu.add_rms_norm(residual, delta, weight, eps, residual, out, None)
        return residual, out

    def linear(self, x: Floats, weight: PackedLinear) -> Floats:
        """[T, K] -> [T, sum N_i], biases added."""
        out = self._arena.take(len(x), weight.num_outputs)
        _cpu.linear(x, weight.panels, weight.num_outputs, weight.bias, out)
        return out

    qkv_linear = linear

    def swiglu_linear(self, x: Floats, weight: PackedGateUp) -> Floats:
        """See `Ops.swiglu_linear`: [T, E] -> [T, F]."""
        out = self._arena.take(len(x), weight.num_outputs)
        _cpu.swiglu_linear(x, weight.panels, weight.num_outputs, out)
        return out

    def route(self, x: Floats, params: MoeParams[Floats], spec: RouterSpec) -> Routing[Floats]:
        """See `Ops.route`."""
        replay = None if self._inputs is None else self._inputs.replay(spec.index)
        ids = np.empty((len(x), spec.top_k), np.int32) if replay is None else replay.experts.copy()
        weights = self._arena.take(len(x), spec.top_k)
        correction = None if params.correction is None else params.correction.reshape(-1)
        logits = self.linear(x, params.router)
        _cpu.route(logits, correction, spec.normalise, spec.norm_min, ids, weights, replay is not None)
        if replay is not None:
            replay.put_weights(weights)
        return Routing(ids, weights)

    def moe(self, x: Floats, routing: Routing[Floats], experts: Any, shared: Floats | None) -> Floats:
        """See `Ops.moe`."""
        return self.experts.run(self._arena, x, routing, experts, shared)

    def attention(
        self, qkv: Floats, layer: int, params: LayerParams[Floats], rope: Floats, spec: AttentionSpec
    ) -> Floats:
        """See `Ops.attention`."""
        inputs = self._inputs
        assert inputs is not None, "attention before begin_step"
        keys, values = self._layer_caches[layer]
        tokens, width = len(qkv), spec.num_heads * spec.head_dim
        query = self._arena.take(tokens, width).reshape(tokens, spec.num_heads, spec.head_dim)
        _cpu.qkv_to_cache(
            qkv,
            spec.num_heads,
            spec.num_kv_heads,
            params.q_norm,
            params.k_norm,
            spec.norm_eps,
            inputs.positions,
            rope,
            spec.rotary_layout == "interleaved",
            inputs.slot_mapping,
            keys,
            values,
            query,
        )
        out = self._arena.take(tokens, width)
        _cpu.attention(
            query,
            keys,
            values,
            inputs.block_tables,
            inputs.seq_starts,
            inputs.context_lens,
            spec.scale,
            out.reshape(query.shape),
        )
        return out

    def gather_rows(self, x: Floats, rows: Ints) -> Floats:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        out = self._arena.take(len(rows), x.shape[1])
        _cpu.gather_rows(x, rows, out)
        return out

    def sample(self, hidden: Floats, lm_head: PackedLinear, batch: SamplingBatch) -> SampleResult:
        """See `Ops.sample`. A row whose logits are not all finite gets token -1."""
        rows = len(hidden)
        result = SampleResult(
            tokens=np.empty(rows, np.int32),
            logprobs=np.empty(rows, np.float32),
            policy_logprobs=np.empty(rows, np.float32),
            entropy=np.empty(rows, np.float32),
            raw_logprobs=np.empty(rows, np.float32) if batch.want_raw else None,
        )
        part = max(1, _LOGIT_BYTES // (4 * lm_head.num_outputs))
        if rows <= part:
            self._sample_into(hidden, lm_head, batch, slice(0, rows), result)
            return result
        for start in range(0, rows, part):
            some = slice(start, min(start + part, rows))
            self._sample_into(hidden[some], lm_head, _rows_of(batch, some), some, result)
        return result

    def _sample_into(
        self, hidden: Floats, lm_head: PackedLinear, batch: SamplingBatch, rows: slice, result: SampleResult
    ) -> None:
        _cpu.sample(
            self.linear(hidden, lm_head),
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.repetition_penalty,
            batch.presence_penalty,
            batch.frequency_penalty,
            batch.seed,
            batch.sample_index,
            batch.position,
            batch.forced,
            batch.history_start,
            batch.history_token,
            batch.history_count,
            batch.bias_start,
            batch.bias_token,
            batch.bias_value,
            result.tokens[rows],
            result.logprobs[rows],
            result.policy_logprobs[rows],
            result.entropy[rows],
            None if result.raw_logprobs is None else result.raw_logprobs[rows],
        )


def _rows_of(batch: SamplingBatch, rows: slice) -> SamplingBatch:
    """Some rows of a batch as a batch of its own."""
    history = slice(batch.history_start[rows.start], batch.history_start[rows.stop])
    bias = slice(batch.bias_start[rows.start], batch.bias_start[rows.stop])
    offsets = slice(rows.start, rows.stop + 1)
    return SamplingBatch(
        temperature=batch.temperature[rows],
        top_k=batch.top_k[rows],
        top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
        repetition_penalty=batch.repetition_penalty[rows],
        presence_penalty=batch.presence_penalty[rows],
        frequency_penalty=batch.frequency_penalty[rows],
        seed=batch.seed[rows],
        sample_index=batch.sample_index[rows],
        position=batch.position[rows],
        forced=batch.forced[rows],
        history_start=batch.history_start[offsets] - history.start,
        history_token=batch.history_token[history],
        history_count=batch.history_count[history],
        bias_start=batch.bias_start[offsets] - bias.start,
        bias_token=batch.bias_token[bias],
        bias_value=batch.bias_value[bias],
        want_raw=batch.want_raw,
    )
