"""The op table in NumPy float64: what every other implementation is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs
from zerokl.kernels.reference import attention, elementwise, sampling
from zerokl.kernels.reference import moe as mixture

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """Matrices on top of each other: weight [sum N_i, K], bias [sum N_i] or None."""

    weight: Floats
    bias: Floats | None


@dataclass(frozen=True, slots=True)
class ReferenceGateUp:
    """Input matrices of a SwiGLU block, both [F, E]."""

    gate: Floats
    up: Floats


class ReferenceOps:
    """`zerokl.kernels.ops.Ops[NDArray[np.float64]]`; float32 input is widened. Returns fresh arrays always."""

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None
        self._pool: KVPool[Floats] | None = None

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[np.floating]) -> Floats:
        """A float64 copy of `values`."""
        return np.array(values, np.float64)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Floats]:
        """A zeroed float64 pool; see `KVPool` for the layouts."""
        heads, size = spec.num_kv_heads, spec.head_dim
        return KVPool(
            keys=np.zeros((num_layers, num_blocks, heads, size, block_size)),
            values=np.zeros((num_layers, num_blocks, heads, block_size, size)),
            block_size=block_size,
        )

    # -- packing -------------------------------------------------------------------------------------------------------
    def pack_linear(self, weights: Sequence[Floats], biases: Sequence[Floats | None]) -> ReferenceLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros."""
        weight = np.concatenate([np.asarray(w, np.float64) for w in weights])
        if all(b is None for b in biases):
            return ReferenceLinear(weight, None)
        parts = [np.zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return ReferenceLinear(weight, np.concatenate(parts).astype(np.float64))

    def pack_gate_up(self, gate: Floats, up: Floats) -> ReferenceGateUp:
        """See `Ops.pack_gate_up`."""
        return ReferenceGateUp(np.array(gate, np.float64), np.array(up, np.float64))

    def pack_experts(
        self, count: int, experts: Iterable[tuple[Floats, Floats, Floats]]
    ) -> tuple[mixture.ReferenceExpert, ...]:
        """See `Ops.pack_experts`."""
        packed = tuple(mixture.ReferenceExpert(*(np.array(part, np.float64) for part in expert)) for expert in experts)
        assert len(packed) == count
        return packed

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Floats]) -> None:
        """See `Ops.begin_step`."""
        self._inputs = inputs
        self._pool = pool

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Floats) -> Floats:
        """Rows of the table: [T], [V, E] -> [T, E]."""
        return np.asarray(table[token_ids], np.float64)

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        """See `elementwise.rms_norm`."""
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: Floats, delta: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        """(residual + delta, its RMS norm)."""
        total = residual + delta
        return total, elementwise.rms_norm(total, weight, eps)

    def linear(self, x: Floats, weight: ReferenceLinear) -> Floats:
        """See `elementwise.linear`."""
        return elementwise.linear(x, weight.weight, weight.bias)

    qkv_linear = linear

    def swiglu_linear(self, x: Floats, weight: ReferenceGateUp) -> Floats:
        """silu(x Wg^T) * (x Wu^T)."""
        return elementwise.swiglu(x @ weight.gate.T, x @ weight.up.T)

    def route(self, x: Floats, params: MoeParams[Floats], spec: RouterSpec) -> Routing[Floats]:
        """See `mixture.route`."""
        replay = None if self._inputs is None else self._inputs.replay(spec.index)
        return mixture.route(self.linear(x, params.router), params.correction, spec, replay)

    def moe(
        self, x: Floats, routing: Routing[Floats], experts: tuple[mixture.ReferenceExpert, ...], shared: Floats | None
    ) -> Floats:
        """See `mixture.moe`."""
        return mixture.moe(x, routing, experts, shared)

    def attention(
        self, qkv: Floats, layer: int, params: LayerParams[Floats], rope: Floats, spec: AttentionSpec
    ) -> Floats:
        """Norms and rotates queries and keys, stores keys and values, attends. [T, (H + 2 KV) D] -> [T, H D].

        A row holds H query heads, KV key heads and KV value heads, in this order.
        """
        inputs, pool = self._inputs, self._pool
        assert inputs is not None and pool is not None, "attention before begin_step"
        heads = qkv.reshape(len(qkv), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = np.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
        if params.q_norm is not None:
            q = elementwise.rms_norm(q, params.q_norm, spec.norm_eps)
        if params.k_norm is not None:
            k = elementwise.rms_norm(k, params.k_norm, spec.norm_eps)
        q = elementwise.rotate(q, inputs.positions, rope, spec.rotary_layout)
        k = elementwise.rotate(k, inputs.positions, rope, spec.rotary_layout)
        keys, values = pool.keys[layer], pool.values[layer]
        attention.write_kv(k, v, inputs.slot_mapping, keys, values)
        starts, lengths = inputs.seq_starts, inputs.context_lens
        out = attention.paged_attention(q, keys, values, inputs.block_tables, starts, lengths, spec.scale)
        return out.reshape(len(out), -1)

    def gather_rows(self, x: Floats, rows: NDArray[np.int32]) -> Floats:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        return x[rows]

    def sample(self, hidden: Floats, lm_head: ReferenceLinear, batch: SamplingBatch) -> SampleResult:
        """See `sampling.sample_rows`; results are rounded to float32."""
        rows = sampling.sample_rows(self.linear(hidden, lm_head), batch)
        return SampleResult(
            tokens=rows.tokens,
            logprobs=rows.logprobs.astype(np.float32),
            policy_logprobs=rows.policy_logprobs.astype(np.float32),
            entropy=rows.entropy.astype(np.float32),
            raw_logprobs=rows.raw_logprobs.astype(np.float32) if batch.want_raw else None,
        )
